"""Map projections as files write them: kilometres made metres, corners projected.

PROJ itself comes with rasterio, which the extra "radar" brings; without it a grid that is given by
the longitude and latitude of its corners stays without a place.
"""

from __future__ import annotations

import importlib
import math
import re
from functools import lru_cache

from tmu_dist.data.manifest import Grid

_SMALLEST_EARTH_M = 100_000.0
"""A smaller radius of the earth is one in kilometres."""
_LENGTHS = ("a", "b", "R", "x_0", "y_0")
_GEODETIC = ("a", "b", "R", "ellps", "datum", "rf", "f", "pm", "towgs84", "nadgrids")


def metric(projection: str) -> str:
    """Return a projection whose coordinates are metres.

    PROJ strings in kilometres exist in two spellings: "+units=km", and an earth of 6378 "metres".
    WKT and EPSG codes are returned as they are.
    """
    projection = re.sub(r"(?<![+\w])(?=[xy]_0=)", "+", " ".join(projection.split()))
    if not projection.startswith("+"):
        return projection
    parts = _parts(projection)
    radius = _float(parts.get("a", parts.get("R", "")))
    if radius is not None and radius < _SMALLEST_EARTH_M:
        for name in _LENGTHS:
            if (length := _float(parts.get(name, ""))) is not None:
                parts[name] = f"{length * 1000:.10g}"
    if parts.get("units") == "km":  # x_0 and y_0 are metres whatever the unit
        parts["units"] = "m"
    return " ".join(f"+{name}={value}" if value else f"+{name}" for name, value in parts.items())


def is_geographic(projection: str) -> bool:
    """Say whether coordinates of a projection are longitude and latitude in degrees."""
    if projection.startswith("+"):
        return _parts(projection).get("proj") in ("longlat", "latlong", "latlon", "lonlat")
    return projection.startswith("GEOG") or projection in ("EPSG:4326", "OGC:CRS84")


def unit_of(projection: str) -> str:
    """The unit of a projection's coordinates, as a `Grid` has it."""
    return "degree" if is_geographic(projection) else "m"


@lru_cache(maxsize=64)
def project(
    projection: str, points: tuple[tuple[float, float], ...]
) -> tuple[tuple[float, float], ...] | None:
    """Project (longitude, latitude) in degrees to (x, y) in the projection's unit.

    Both are on the projection's own ellipsoid, as `pyproj.Proj` does it. None where rasterio is
    not installed, the projection is not understood or a point has no place in it.
    """
    if is_geographic(projection):
        return points
    try:
        warp = importlib.import_module("rasterio.warp")
        crs = importlib.import_module("rasterio.crs").CRS
        errors = importlib.import_module("rasterio.errors")
    except ImportError:
        return None
    try:
        xs, ys = warp.transform(
            crs.from_string(_geographic_of(projection)),
            crs.from_string(projection),
            [lon for lon, _ in points],
            [lat for _, lat in points],
        )
    except (ValueError, errors.RasterioError):
        return None
    if not all(map(math.isfinite, (*xs, *ys))):
        return None
    return tuple(zip(xs, ys, strict=True))


def placed_grid(
    height: int,
    width: int,
    projection: str | None,
    *,
    unit: str,
    left: float,
    top: float,
    pixel_width: float,
    pixel_height: float,
) -> Grid:
    """A grid whose numbers are rounded to a millimetre, so that noise of the last bit is gone."""
    digits = 3 if unit == "m" else 9
    return Grid(
        height=height,
        width=width,
        projection=projection,
        unit=unit,
        left=round(left, digits) + 0.0,  # no -0.0
        top=round(top, digits) + 0.0,
        pixel_width=round(pixel_width, digits + 3),
        pixel_height=round(pixel_height, digits + 3),
    )


def _geographic_of(projection: str) -> str:
    """Longitude and latitude on the earth of a PROJ string; WGS 84 for WKT and EPSG codes."""
    if not projection.startswith("+"):
        return "EPSG:4326"
    earth = {name: value for name, value in _parts(projection).items() if name in _GEODETIC}
    if not earth:
        return "EPSG:4326"
    return " ".join(["+proj=longlat", *(f"+{n}={v}" for n, v in earth.items()), "+no_defs"])


def _parts(projection: str) -> dict[str, str]:
    """Parameters of a PROJ string by name, in its order."""
    return dict(re.findall(r"\+(\w+)(?:\s*=\s*([^\s]+))?", projection))


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
