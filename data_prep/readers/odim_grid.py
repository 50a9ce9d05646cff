"""Where the pixels of an ODIM composite lie: `where` as a grid in projected metres."""

from __future__ import annotations

from typing import Any

from data_prep.readers.hdf5 import number
from data_prep.readers.projection import metric, placed_grid, project, unit_of
from tmu_dist.data.manifest import Grid

_CORNERS = ("LL", "UR", "UL", "LR")
_UNPLACED = "The file does not place its grid on the earth"


def odim_grid(shape: tuple[int, ...], where: dict[str, Any]) -> tuple[Grid, list[str]]:
    """Build the grid of a field.

    Args:
        shape: (height, width) of the field.
        where: attributes of the `where` groups, names in lower case: projdef; xscale and yscale;
            longitude and latitude of the outer corners, at least lower left and upper right, or
            the projected UL_x and UL_y.

    Returns:
        The grid, without a place where the file gives none, and notes on it.
    """
    height, width = shape
    text = where.get("projdef")
    if not isinstance(text, str) or not text:
        return Grid(height=height, width=width), [f"{_UNPLACED} (no projdef)."]
    projection = metric(text)
    unplaced = Grid(height=height, width=width, projection=projection)
    scales = [abs(number(where.get(name)) or 0.0) or None for name in ("xscale", "yscale")]
    edges = _edges(projection, where)
    if edges is None:
        return _from_upper_left(unplaced, where, scales)
    left, bottom, right, top = edges
    spans = (right - left, top - bottom)
    if min(spans) <= 0:
        return unplaced, [f"{_UNPLACED} (its corners are not in order)."]
    notes: list[str] = []
    pixels = []
    for axis, (span, count, scale) in enumerate(zip(spans, (width, height), scales, strict=True)):
        pixel, shift, note = _pixel(span, count, scale)
        pixels.append(pixel)
        left, top = (left - shift, top) if axis == 0 else (left, top + shift)
        notes += [f"{'xy'[axis]}scale {note}."] if note else []
    return placed_grid(
        height,
        width,
        projection,
        unit=unit_of(projection),
        left=left,
        top=top,
        pixel_width=pixels[0],
        pixel_height=pixels[1],
    ), notes


def _edges(projection: str, where: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """Left, bottom, right and top edge in the projection, from the corners that the file gives."""
    corners = {}
    for corner in _CORNERS:
        lon, lat = (number(where.get(f"{corner.lower()}_{name}")) for name in ("lon", "lat"))
        if lon is not None and lat is not None:
            corners[corner] = (lon, lat)
    if "LL" not in corners or "UR" not in corners:
        return None
    projected = project(projection, tuple(corners.values()))
    if projected is None:
        return None
    places = dict(zip(corners, projected, strict=True))
    return (
        min(x for corner, (x, _) in places.items() if corner[1] == "L"),
        min(y for corner, (_, y) in places.items() if corner[0] == "L"),
        max(x for corner, (x, _) in places.items() if corner[1] == "R"),
        max(y for corner, (_, y) in places.items() if corner[0] == "U"),
    )


def _pixel(span: float, count: int, scale: float | None) -> tuple[float, float, str]:
    """Return the size of a pixel, how far the first edge lies outside the corner, and a note.

    The corners decide. A scale may be in kilometres, and the corners of some producers are centres
    of pixels.
    """
    pixel = span / count
    for size in (scale, scale * 1000) if scale is not None else ():
        if abs(pixel - size) <= 0.2 * size / count:
            return size, 0.0, ""
        if count > 1 and abs(span / (count - 1) - size) <= 0.2 * size / count:
            return size, size / 2, "fits corners that are the centres of pixels, so they were taken"
    if scale is None:
        return pixel, 0.0, ""
    return pixel, 0.0, f"is {scale:g}, but the corners lie {count} pixels of {pixel:g} apart"


def _from_upper_left(
    unplaced: Grid, where: dict[str, Any], scales: list[float | None]
) -> tuple[Grid, list[str]]:
    """Place the grid by UL_x and UL_y, which some files have beside or instead of corners."""
    left, top = number(where.get("ul_x")), number(where.get("ul_y"))
    width, height = scales
    if left is None or top is None or width is None or height is None:
        return unplaced, [f"{_UNPLACED}, or rasterio is missing to project its corners."]
    assert unplaced.projection is not None
    return placed_grid(
        unplaced.height,
        unplaced.width,
        unplaced.projection,
        unit=unit_of(unplaced.projection),
        left=left,
        top=top,
        pixel_width=width,
        pixel_height=height,
    ), []
