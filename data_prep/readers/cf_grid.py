"""Where the pixels of a CF field lie: rows and columns turned to north and west, projection."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.cf_model import CFDataset, CFVariable
from data_prep.readers.hdf5 import number
from data_prep.readers.projection import is_geographic, metric, placed_grid, unit_of
from data_prep.readers.radar import BadFileError
from tmu_dist.data.manifest import Grid

_Y_NAMES = ("y", "lat", "latitude", "south_north", "ny", "yc", "row", "rows", "northing", "rlat")
_X_NAMES = ("x", "lon", "longitude", "west_east", "nx", "xc", "col", "cols", "easting", "rlon")
_METRES = dict.fromkeys(("m", "metre", "metres", "meter", "meters"), 1.0)
_METRES |= dict.fromkeys(("km", "kilometre", "kilometres", "kilometer", "kilometers"), 1000.0)
_METRES["degree"] = 1.0
_IRREGULAR = 0.02
"""Of a pixel: coordinates that stray further from equal steps are no grid."""
_PROJ_ATTRIBUTES = (
    "proj4",
    "proj4_params",
    "proj4text",
    "proj4_string",
    "proj4string",
    "proj_string",
    "projection_proj4_params",
    "gdal_projection",
    "projdef",
    "projection",
)
_WKT_ATTRIBUTES = ("crs_wkt", "spatial_ref", "esri_pe_string", "wkt")
_PROJECTIONS = {
    "albers_conical_equal_area": "aea",
    "azimuthal_equidistant": "aeqd",
    "lambert_azimuthal_equal_area": "laea",
    "lambert_conformal_conic": "lcc",
    "lambert_cylindrical_equal_area": "cea",
    "mercator": "merc",
    "orthographic": "ortho",
    "polar_stereographic": "stere",
    "stereographic": "stere",
    "transverse_mercator": "tmerc",
}
_PARAMETERS = {
    "latitude_of_projection_origin": "lat_0",
    "longitude_of_projection_origin": "lon_0",
    "longitude_of_central_meridian": "lon_0",
    "straight_vertical_longitude_from_pole": "lon_0",
    "scale_factor_at_projection_origin": "k_0",
    "scale_factor_at_central_meridian": "k_0",
    "false_easting": "x_0",
    "false_northing": "y_0",
}
_EARTH = {
    "earth_radius": "R",
    "semi_major_axis": "a",
    "semi_minor_axis": "b",
    "inverse_flattening": "rf",
}


class Orientation(NamedTuple):
    """Which dimensions are rows and columns, and whether they run the wrong way."""

    y_dim: str
    x_dim: str
    flip_y: bool
    flip_x: bool
    y: NDArray[np.float64] | None
    """Coordinates of the rows as they are stored; None where there are none."""
    x: NDArray[np.float64] | None
    note: str = ""


def orientation(dataset: CFDataset, field: CFVariable, time_dim: str | None) -> Orientation:
    """Find rows and columns, and which of them must be turned so that row 0 is north.

    Raises:
        BadFileError: the field has further dimensions, such as levels or ensemble members.
    """
    y_dim, x_dim = _rows_and_columns(dataset, field, time_dim)
    if _axis(dataset, field, y_dim) == "x" or _axis(dataset, field, x_dim) == "y":
        y_dim, x_dim = x_dim, y_dim
    y, x = _coordinate(dataset, field, y_dim), _coordinate(dataset, field, x_dim)
    if y is None or x is None:
        flip_y, flip_x, note = _turned_by_latitude(dataset, field, y_dim, x_dim)
        return Orientation(y_dim, x_dim, flip_y, flip_x, None, None, note)
    return Orientation(y_dim, x_dim, bool(y[-1] > y[0]), bool(x[-1] < x[0]), y, x)


def cf_grid(
    dataset: CFDataset, field: CFVariable, turned: Orientation
) -> tuple[Grid, tuple[str, ...]]:
    """Return the grid of a field, without a place where the file gives none, and notes on it."""
    sizes = dict(zip(field.dims, field.shape, strict=True))
    height, width = sizes[turned.y_dim], sizes[turned.x_dim]
    units = {_unit(dataset, field, dim) for dim in (turned.y_dim, turned.x_dim)}
    unit = units.pop() if len(units) == 1 else ""
    mapping = _grid_mapping(dataset, field)
    projection = _projection(dataset, mapping, unit)
    unplaced = Grid(height=height, width=width, projection=projection)
    notes = (turned.note,) if turned.note else ()
    steps = (_step(turned.y), _step(turned.x))
    if turned.y is None or turned.x is None or unit not in _METRES:
        grid = _by_geotransform(dataset, mapping, unplaced)
        lack = "has no coordinates of rows and columns in metres or degrees"
        return (grid, notes) if grid else (unplaced, (*notes, f"The file {lack}."))
    if steps[0] is None or steps[1] is None:
        return unplaced, (*notes, "Rows or columns are not at equal distances; no place is given.")
    in_degrees = unit == "degree"
    turned_pole = projection is not None and "ob_tran" in projection
    if projection is not None and not turned_pole and is_geographic(projection) != in_degrees:
        return unplaced, (*notes, f"Coordinates in {unit} do not fit {projection}.")
    metres = _METRES[unit]
    return placed_grid(
        height,
        width,
        projection,
        unit="degree" if in_degrees else "m",
        left=(float(turned.x.min()) - steps[1] / 2) * metres,
        top=(float(turned.y.max()) + steps[0] / 2) * metres,
        pixel_width=steps[1] * metres,
        pixel_height=steps[0] * metres,
    ), notes


def _rows_and_columns(
    dataset: CFDataset, field: CFVariable, time_dim: str | None
) -> tuple[str, str]:
    """The two dimensions of a field that are neither time nor of size 1, in their order."""
    sizes = dict(zip(field.dims, field.shape, strict=True))
    space = [dim for dim in field.dims if dim != time_dim and sizes[dim] > 1]
    if len(space) > 2:
        extra = [dim for dim in space if _axis(dataset, field, dim) is None]
        extra = extra if len(space) - len(extra) == 2 else space[:-2]
        raise BadFileError(
            dataset.path,
            f"{field.name} has further dimensions: "
            + ", ".join(f"{dim} of {sizes[dim]}" for dim in extra)
            + "; one field a time is read, no ensembles or levels",
        )
    if len(space) < 2:  # a field of one row or column
        space = [dim for dim in field.dims if dim != time_dim][-2:]
    if len(space) < 2:
        raise BadFileError(dataset.path, f"{field.name} has no rows and columns: {field.dims}")
    return space[0], space[1]


def _coordinate_variable(dataset: CFDataset, field: CFVariable, dim: str) -> CFVariable | None:
    """The variable along one dimension that says where its rows or columns are."""
    found = dataset.near(field, dim)
    if found is not None and found.dims == (dim,) and found.dtype.kind in "iuf":
        return found
    along = (v for v in dataset.beside(field) if v.dims == (dim,) and v.dtype.kind in "iuf")
    return next((v for v in along if _axis_of(v) is not None), None)


def _coordinate(dataset: CFDataset, field: CFVariable, dim: str) -> NDArray[np.float64] | None:
    """Coordinates along a dimension, longitudes without a jump; None where they are no order."""
    variable = _coordinate_variable(dataset, field, dim)
    if variable is None or variable.shape[0] < 2:
        return None
    values = variable.values()
    if not np.isfinite(values).all() or values[0] == values[-1]:
        return None
    if _unit_of(variable) == "degree" and _axis_of(variable) == "x":
        values = np.unwrap(values, period=360)
    return values


def _axis(dataset: CFDataset, field: CFVariable, dim: str) -> str | None:
    variable = _coordinate_variable(dataset, field, dim)
    return _axis_by_name(dim) if variable is None else _axis_of(variable)


def _axis_of(variable: CFVariable) -> str | None:
    """Say "x" or "y" of a coordinate; None of any other variable."""
    standard_name = variable.text("standard_name").lower()
    by_axis = variable.text("axis").lower()
    if by_axis in ("x", "y"):
        return by_axis
    units = variable.text("units").lower()
    for axis, meaning in (("y", ("y_", "latitude", "north")), ("x", ("x_", "longitude", "east"))):
        if re.search(rf"(projection_{meaning[0]}|{meaning[1]})", standard_name):
            return axis
        if re.fullmatch(rf"degrees?_?{meaning[2]}", units):
            return axis
    return _axis_by_name(variable.short_name)


def _axis_by_name(name: str) -> str | None:
    name = name.rpartition("/")[2].lower()
    return "y" if name in _Y_NAMES else "x" if name in _X_NAMES else None


def _turned_by_latitude(
    dataset: CFDataset, field: CFVariable, y_dim: str, x_dim: str
) -> tuple[bool, bool, str]:
    """Say whether rows and columns must be turned, by latitudes and longitudes of every pixel."""
    ends: dict[str, float] = {}
    for variable in dataset.beside(field):
        if set(variable.dims) != {y_dim, x_dim} or len(variable.dims) != 2:
            continue
        axis = _axis_of(variable)
        if axis is None or _unit_of(variable) != "degree" or axis in ends:
            continue
        dim = y_dim if axis == "y" else x_dim
        middle = {d: variable.shape[variable.dims.index(d)] // 2 for d in (y_dim, x_dim)}
        first, last = (
            float(variable.values(tuple(end if d == dim else middle[d] for d in variable.dims)))
            for end in (0, -1)
        )
        ends[axis] = (last - first + 180) % 360 - 180
    if "y" not in ends:
        return False, False, "The file does not say which way rows run; row 0 was taken as north."
    return ends["y"] > 0, ends.get("x", 1.0) < 0, ""


def _unit(dataset: CFDataset, field: CFVariable, dim: str) -> str:
    variable = _coordinate_variable(dataset, field, dim)
    return "" if variable is None else _unit_of(variable)


def _unit_of(variable: CFVariable) -> str:
    """Unit of a coordinate: "degree", a key of _METRES, or "" if it is none of these."""
    units = variable.text("units").lower()
    if units.startswith("degree"):
        return "degree"
    if not units and re.search("^(lat|lon)", variable.short_name):
        return "degree"
    if not units and variable.text("standard_name").lower().startswith("projection_"):
        return "m"
    return units if units in _METRES else ""


def _step(values: NDArray[np.float64] | None) -> float | None:
    """Distance of neighbours; None where it changes."""
    if values is None:
        return None
    step = (values[-1] - values[0]) / (len(values) - 1)
    if np.abs(np.diff(values) - step).max() > _IRREGULAR * abs(step):
        return None
    return float(abs(step))


def _grid_mapping(dataset: CFDataset, field: CFVariable) -> CFVariable | None:
    """The variable that describes the projection: the named one, or the only one there is."""
    match = re.match(r"[\w/]+", field.text("grid_mapping"))
    if match and (named := dataset.near(field, match[0])) is not None:
        return named
    found = [v for v in dataset.beside(field) if v.text("grid_mapping_name")]
    return found[0] if len(found) == 1 else None


def _projection(dataset: CFDataset, mapping: CFVariable | None, unit: str) -> str | None:
    """PROJ string or WKT of the projection, with metres as its unit; None where nothing says."""
    holders = [mapping.attrs] if mapping is not None else []
    for attrs in (*holders, dataset.attrs):
        for name in _PROJ_ATTRIBUTES:
            text = attrs.get(name)
            if isinstance(text, str) and re.match(r"\+|EPSG:\d", text.strip()):
                return metric(text.strip())
    built = _projection_of(mapping, _METRES.get(unit, 1.0)) if mapping is not None else None
    for attrs in (*holders, dataset.attrs):
        for name in _WKT_ATTRIBUTES:
            text = attrs.get(name)
            if isinstance(text, str) and re.match(r"[A-Z]+\[", text.strip()):
                in_km = re.search("kilomet", text, re.I)
                return built if in_km and built else text.strip()
    return built or ("EPSG:4326" if unit == "degree" and mapping is None else None)


def _projection_of(mapping: CFVariable, metres: float) -> str | None:
    """PROJ string of CF's parameters; None of a projection that is not known here."""
    name = mapping.text("grid_mapping_name").lower()
    earth = [
        f"+{proj}={value:.10g}"
        for cf, proj in _EARTH.items()
        if (value := number(mapping.attrs.get(cf))) is not None and (proj != "rf" or value > 0)
    ]
    if name in ("latitude_longitude", "rotated_latitude_longitude"):
        if name == "latitude_longitude":
            return " ".join(["+proj=longlat", *earth, "+no_defs"]) if earth else "EPSG:4326"
        pole = [
            number(mapping.attrs.get(f"grid_north_pole_{n}")) for n in ("latitude", "longitude")
        ]
        turned = number(mapping.attrs.get("north_pole_grid_longitude")) or 0.0
        if pole[0] is None or pole[1] is None:
            return None
        where = f"+o_lat_p={pole[0]:.10g} +o_lon_p={turned:.10g} +lon_0={pole[1] + 180:.10g}"
        return " ".join(["+proj=ob_tran +o_proj=longlat", where, *earth, "+no_defs"])
    if name not in _PROJECTIONS:
        return None
    parameters: dict[str, float] = {}
    for cf, proj in _PARAMETERS.items():
        if (value := number(mapping.attrs.get(cf))) is not None:
            parameters[proj] = value * metres if proj in ("x_0", "y_0") else value
    parallels = [float(p) for p in np.ravel(mapping.attrs.get("standard_parallel", []))]
    if name in ("lambert_conformal_conic", "albers_conical_equal_area"):
        parameters |= {f"lat_{i}": p for i, p in enumerate((parallels * 2)[:2], start=1)}
    elif parallels:
        parameters["lat_ts"] = parallels[0]
    if name == "polar_stereographic":
        south = parameters.get("lat_0", parameters.get("lat_ts", 90.0)) < 0
        parameters["lat_0"] = -90.0 if south else 90.0
    placed = [f"+{proj}={value:.10g}" for proj, value in parameters.items()]
    return " ".join([f"+proj={_PROJECTIONS[name]}", *placed, *earth, "+units=m", "+no_defs"])


def _by_geotransform(dataset: CFDataset, mapping: CFVariable | None, unplaced: Grid) -> Grid | None:
    """Place a grid by GDAL's six numbers, of a field whose rows already run from the north."""
    table: Any = None
    for attrs in (*([mapping.attrs] if mapping is not None else []), dataset.attrs):
        table = attrs.get("GeoTransform", attrs.get("gdal_geotransform_table", table))
    if isinstance(table, str):
        table = [number(part) for part in table.replace(",", " ").split()]
    if table is None or len(np.ravel(table)) != 6 or any(item is None for item in table):
        return None
    left, width, turn_x, top, turn_y, height = (float(item) for item in table)
    if turn_x or turn_y or width <= 0 or height >= 0 or unplaced.projection is None:
        return None
    return placed_grid(
        unplaced.height,
        unplaced.width,
        unplaced.projection,
        unit=unit_of(unplaced.projection),
        left=left,
        top=top,
        pixel_width=width,
        pixel_height=-height,
    )
