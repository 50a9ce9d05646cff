"""What CF (https://cfconventions.org, 1.11) calls the things of a Zarr archive: attributes only.

Values of other packages' conventions are added where they cost nothing: `spatial_ref` is what GDAL,
rasterio and rioxarray read.
"""

from __future__ import annotations

from typing import Any

from tmu_dist.data.manifest import Grid, SourceCard, Units

CONVENTIONS = "CF-1.11"

_STANDARD_NAMES = {
    "reflectivity": "equivalent_reflectivity_factor",
    "rain_rate": "rainfall_rate",
    "accumulation": "thickness_of_rainfall_amount",
}
_LONG_NAMES = {
    "reflectivity": "radar reflectivity",
    "rain_rate": "rain rate",
    "accumulation": "rain accumulated over one interval",
    "vil": "vertically integrated liquid",
    "intensity": "image intensity",
}

_PROJECTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "aea": (
        "albers_conical_equal_area",
        {
            "lat_0": "latitude_of_projection_origin",
            "lon_0": "longitude_of_central_meridian",
        },
    ),
    "aeqd": (
        "azimuthal_equidistant",
        {"lat_0": "latitude_of_projection_origin", "lon_0": "longitude_of_projection_origin"},
    ),
    "laea": (
        "lambert_azimuthal_equal_area",
        {"lat_0": "latitude_of_projection_origin", "lon_0": "longitude_of_projection_origin"},
    ),
    "latlong": ("latitude_longitude", {}),
    "longlat": ("latitude_longitude", {}),
    "lcc": (
        "lambert_conformal_conic",
        {"lat_0": "latitude_of_projection_origin", "lon_0": "longitude_of_central_meridian"},
    ),
    "merc": (
        "mercator",
        {
            "lon_0": "longitude_of_projection_origin",
            "lat_ts": "standard_parallel",
            "k": "scale_factor_at_projection_origin",
        },
    ),
    "stere": (
        "polar_stereographic",
        {
            "lat_0": "latitude_of_projection_origin",
            "lon_0": "straight_vertical_longitude_from_pole",
            "lat_ts": "standard_parallel",
            "k": "scale_factor_at_projection_origin",
        },
    ),
    "tmerc": (
        "transverse_mercator",
        {
            "lat_0": "latitude_of_projection_origin",
            "lon_0": "longitude_of_central_meridian",
            "k": "scale_factor_at_central_meridian",
        },
    ),
}
"""Of each PROJ projection: CF's name (Appendix F) and CF's names of PROJ's parameters."""

_COMMON_PARAMETERS = {
    "x_0": "false_easting",
    "y_0": "false_northing",
    "a": "semi_major_axis",
    "b": "semi_minor_axis",
    "rf": "inverse_flattening",
    "R": "earth_radius",
}
_ELLIPSOIDS = {
    "WGS84": (6378137.0, 298.257223563),
    "GRS80": (6378137.0, 298.257222101),
    "bessel": (6377397.155, 299.1528128),
    "intl": (6378388.0, 297.0),
}
"""Of each ellipsoid of PROJ: semi-major axis (m) and inverse flattening."""


def field_attributes(units: Units, grid: Grid | None, coordinates: str) -> dict[str, Any]:
    """Attributes of the array of frames; xarray unpacks values and masks by them.

    Args:
        units: what a stored number means.
        grid: where the frames lie, if that is known.
        coordinates: names of the variables, separated by blanks, that say what each frame is, other
            than the dimensions' own.
    """
    attributes: dict[str, Any] = {
        "long_name": _LONG_NAMES.get(units.quantity, units.quantity),
        "units": units.unit,
        "scale_factor": units.scale,
        "add_offset": units.offset,
        "coordinates": coordinates,
    }
    if units.quantity in _STANDARD_NAMES:
        attributes["standard_name"] = _STANDARD_NAMES[units.quantity]
    if units.missing_code is not None:
        attributes["_FillValue"] = units.missing_code
    if grid is not None and grid.projection:
        attributes["grid_mapping"] = "crs"
    return attributes


def axis_attributes(grid: Grid) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of y and x, of a grid whose place is known."""
    if grid.unit == "degree":
        return (
            {"axis": "Y", "standard_name": "latitude", "units": "degrees_north"},
            {"axis": "X", "standard_name": "longitude", "units": "degrees_east"},
        )
    return (
        {"axis": "Y", "standard_name": "projection_y_coordinate", "units": "m"},
        {"axis": "X", "standard_name": "projection_x_coordinate", "units": "m"},
    )


def crs_attributes(projection: str) -> dict[str, Any]:
    """Attributes of the grid mapping variable: the text as it is, and what CF makes of it.

    An EPSG code, or a PROJ string that CF has no words for, stays text.
    """
    if not projection.startswith("+"):
        is_code = projection.upper().startswith("EPSG:")
        return {"spatial_ref": projection} | ({} if is_code else {"crs_wkt": projection})
    attributes: dict[str, Any] = {"spatial_ref": projection, "proj4": projection}
    try:
        return attributes | _grid_mapping(_proj_parameters(projection))
    except ValueError:  # PROJ also takes angles such as 52d30'N
        return attributes


def _grid_mapping(parameters: dict[str, str]) -> dict[str, Any]:
    """Translate PROJ parameters, all or none, to CF's attributes."""
    name = parameters.get("proj", "")
    # Lengths are metres in CF: other units, and bodies of other sizes, stay text.
    in_metres = parameters.get("units", "m") == "m" and float(parameters.get("a", 1e7)) > 1e6
    is_oblique = name == "stere" and abs(float(parameters.get("lat_0", 0))) != 90
    if name not in _PROJECTIONS or is_oblique or not in_metres:
        return {}
    cf_name, own_names = _PROJECTIONS[name]
    attributes: dict[str, Any] = {"grid_mapping_name": cf_name}
    if name in ("aea", "lcc"):
        parallels = [float(parameters[n]) for n in ("lat_1", "lat_2") if n in parameters]
        attributes["standard_parallel"] = parallels
    ellipsoid = _ELLIPSOIDS.get(parameters.get("ellps", parameters.get("datum", "")))
    if ellipsoid:
        attributes |= {"semi_major_axis": ellipsoid[0], "inverse_flattening": ellipsoid[1]}
    for proj_name, cf_parameter in (_COMMON_PARAMETERS | own_names).items():
        if proj_name in parameters:
            attributes[cf_parameter] = float(parameters[proj_name])
    return attributes


def group_attributes(name: str, source: SourceCard | None) -> dict[str, Any]:
    """Attributes of a group: what it is, who made the data, under which terms."""
    attributes = {"Conventions": CONVENTIONS, "title": name}
    if source is not None:
        attributes |= {
            "source": source.name,
            "institution": source.provider,
            "license": source.licence,
            "references": source.citation,
        }
    return attributes


def _proj_parameters(text: str) -> dict[str, str]:
    """Split a PROJ string; "+no_defs" and the like have no value."""
    words = (word.removeprefix("+").partition("=") for word in text.split())
    return {{"k_0": "k"}.get(name, name): value for name, _, value in words}
