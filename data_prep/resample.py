"""Fewer pixels: crops and exact area averages that know of missing pixels. Nothing is enlarged.

Sums run in one fixed order in float64, so results do not depend on processor or library.

Shape letters: H height, W width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.manifest import Grid


@dataclass(frozen=True, slots=True)
class Crop:
    """A rectangle of pixels."""

    top: int
    """First row."""
    left: int
    """First column."""
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.top, self.left) < 0 or min(self.height, self.width) < 1:
            raise ValueError(
                "A crop needs top and left of at least 0, height and width of at least 1, got "
                f"{self.top}, {self.left}, {self.height}, {self.width}."
            )


def crop(values_HW: NDArray[Any], rectangle: Crop) -> NDArray[Any]:
    """Return the rectangle of a field, as a view.

    Raises:
        ValueError: the rectangle does not lie inside the field.
    """
    _check_inside(rectangle, *values_HW.shape)
    return values_HW[
        rectangle.top : rectangle.top + rectangle.height,
        rectangle.left : rectangle.left + rectangle.width,
    ]


def area_average(
    values_HW: NDArray[np.float32], height: int, width: int, *, min_observed: float = 0.5
) -> NDArray[np.float32]:
    """Average a field onto fewer pixels, each source pixel weighted by the area it shares.

    Any size up to the field's own is possible, not whole factors only; the field's edges stay
    where they are. Values that must not be averaged as they are (decibels) are to be transformed
    before and after: `data_prep.physics.linear_for_average`.

    Args:
        values_HW: the field; NaN where nothing was observed.
        height: rows wanted.
        width: columns wanted.
        min_observed: part in [0, 1] of a target pixel's area that must have been observed. Then
            the target is the mean over the observed part, else NaN; it is NaN in any case where
            nothing was observed.

    Returns:
        averages: float32 of the size wanted; the field itself where that is its size already.

    Raises:
        ValueError: more rows or columns than the field has, or min_observed outside [0, 1].
    """
    rows, columns = values_HW.shape
    _check_target(rows, columns, height, width)
    if not 0 <= min_observed <= 1:
        raise ValueError(f"min_observed must be in [0, 1], got {min_observed}.")
    if (height, width) == (rows, columns):
        return values_HW.astype(np.float32, copy=False)
    missing_HW = np.isnan(values_HW)
    if not missing_HW.any():
        return (_area_sums(values_HW, height, width) / (rows * columns)).astype(np.float32)
    sums = _area_sums(np.where(missing_HW, np.float32(0), values_HW), height, width)
    # Areas are whole numbers, so the comparison with min_observed is exact.
    observed = _area_sums(~missing_HW, height, width)
    enough = observed >= max(min_observed * rows * columns, 1)
    return np.divide(sums, observed, out=np.full_like(sums, np.nan), where=enough).astype(
        np.float32
    )


def resampled_grid(grid: Grid, rectangle: Crop | None, height: int, width: int) -> Grid:
    """Return the grid of a field that was cropped (None: not) and then averaged to a size.

    Raises:
        ValueError: the crop does not lie inside the grid, or the size is larger than the crop.
    """
    whole = Crop(0, 0, grid.height, grid.width)
    part = rectangle or whole
    _check_inside(part, grid.height, grid.width)
    _check_target(part.height, part.width, height, width)
    resized = dataclasses.replace(grid, height=height, width=width)
    if grid.left is None or grid.top is None or not grid.pixel_width or not grid.pixel_height:
        return resized
    return dataclasses.replace(
        resized,
        left=grid.left + part.left * grid.pixel_width,
        top=grid.top - part.top * grid.pixel_height,
        pixel_width=grid.pixel_width * part.width / width,
        pixel_height=grid.pixel_height * part.height / height,
    )


def _area_sums(values_HW: NDArray[np.generic], height: int, width: int) -> NDArray[np.float64]:
    """Return sums over the target pixels in units of 1 / (height * width) source pixels.

    In these units every source pixel counts height * width, and a whole target pixel counts
    H * W: whole numbers, so that sums of whole numbers are exact.
    """
    rows = _row_sums(values_HW, height)
    return _row_sums(np.ascontiguousarray(rows.T), width).T


def _row_sums(values_HW: NDArray[np.generic], height: int) -> NDArray[np.float64]:
    """Return sums over target rows in units of 1 / height source rows."""
    rows, columns = values_HW.shape
    sums = np.empty((height, columns), np.float64)
    for target in range(height):
        # The target row covers source rows [first, end), the outer two of them in part.
        start, stop = target * rows, (target + 1) * rows
        first, end = start // height, -(-stop // height)
        np.add.reduce(values_HW[first:end], axis=0, dtype=np.float64, out=sums[target])
        sums[target] *= height
        if rows % height:  # by a whole factor, no row is shared
            sums[target] -= (start - first * height) * values_HW[first].astype(np.float64)
            sums[target] -= (end * height - stop) * values_HW[end - 1].astype(np.float64)
    return sums


def _check_inside(rectangle: Crop, height: int, width: int) -> None:
    bottom, right = rectangle.top + rectangle.height, rectangle.left + rectangle.width
    if bottom > height or right > width:
        raise ValueError(
            f"The crop of rows {rectangle.top}:{bottom} and columns {rectangle.left}:{right} does "
            f"not lie inside the field of {height} x {width} pixels."
        )


def _check_target(rows: int, columns: int, height: int, width: int) -> None:
    if not (1 <= height <= rows and 1 <= width <= columns):
        raise ValueError(
            f"A field of {rows} x {columns} pixels can be averaged to 1 x 1 up to its own size, "
            f"not to {height} x {width}: nothing is enlarged. Ask for fewer pixels, or crop less."
        )
