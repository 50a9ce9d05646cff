"""Crops and sizes of video frames, in exact integer arithmetic: the same bytes on every machine.

Pixels are squares that touch each other, and a picture keeps its edges when it is resized (half-
pixel centres). Radar fields, which have missing pixels and are never enlarged, have their own
module (`data_prep.resample`).

Shape letters: H height, W width, C channels.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.video import CropRule, Resize
from data_prep.resample import Crop

CropSetting: TypeAlias = CropRule | tuple[int, int, int, int]

RESIZE_NOTES: dict[Resize, str] = {
    "bilinear": (
        "bilinear between the 2 x 2 nearest pixel centres, half-pixel centres, edges repeated, no "
        "antialiasing: pixels in between are skipped when a picture shrinks (as OpenCV's "
        "INTER_LINEAR does, to which it is equal within 1 of 255)"
    ),
    "area": (
        "mean over the area of the new pixel, parts of pixels by their share; without effect on "
        "sharpness where a picture is enlarged"
    ),
}
"""Both round halves up."""


def crop_rectangle(rule: CropSetting, height: int, width: int, size: tuple[int, int]) -> Crop:
    """Return the part of a frame that is used.

    Args:
        rule: "whole"; "centre", the largest centred rectangle of the shape of `size`;
            "middle-half", the middle half of the rows and of the columns; or top, left, height
            and width in pixels.
        height: of the frame.
        width: of the frame.
        size: height and width that it will be resized to.

    Raises:
        ValueError: the rectangle does not lie inside the frame.
    """
    match rule:
        case "whole":
            return Crop(0, 0, height, width)
        case "middle-half":
            top, left = height // 4, width // 4
            return Crop(top, left, max(height - 2 * top, 1), max(width - 2 * left, 1))
        case "centre":
            rows = min(height, max(1, width * size[0] // size[1]))
            columns = min(width, max(1, height * size[1] // size[0]))
            return Crop((height - rows) // 2, (width - columns) // 2, rows, columns)
        case (top, left, rows, columns):
            if top + rows > height or left + columns > width:
                raise ValueError(
                    f"the crop of rows {top}:{top + rows} and columns {left}:{left + columns} does "
                    f"not lie inside its {height} x {width} pixels"
                )
            return Crop(top, left, rows, columns)


def resize(
    image_HWC: NDArray[np.uint8], size: tuple[int, int], method: Resize
) -> NDArray[np.uint8]:
    """Return the picture with another height and width; itself where it has them.

    Args:
        image_HWC: uint8.
        size: height and width.
        method: see `RESIZE_NOTES`.
    """
    if image_HWC.shape[:2] == size:
        return image_HWC
    one_axis = _bilinear_rows if method == "bilinear" else _area_rows
    (height, width), (old_height, old_width, channels) = size, image_HWC.shape
    # No sum is larger than this; half the bits take half the time or less.
    largest = 255 * (max(old_height, height) + height) * (max(old_width, width) + width)
    kind = np.int32 if largest < 2**30 else np.int64
    # Two axes at a time, rows first: numpy is many times faster on long rows.
    rows, row_unit = one_axis(image_HWC.reshape(old_height, -1), height, kind)
    turned = rows.reshape(height, old_width, channels).swapaxes(0, 1).reshape(old_width, -1)
    columns, column_unit = one_axis(turned, width, kind)
    unit = row_unit * column_unit
    columns += unit // 2
    columns //= unit
    resized = columns.astype(np.uint8).reshape(width, height, channels).swapaxes(0, 1)
    return np.ascontiguousarray(resized)


def _bilinear_rows(
    values: NDArray[Any], size: int, kind: type[np.signedinteger[Any]]
) -> tuple[NDArray[Any], int]:
    """Interpolate along the first axis; returns whole numbers and the unit they count in."""
    first, second, share, unit = _bilinear_places(len(values), size)
    share = share.astype(kind)
    whole = values[first] * (unit - share)
    whole += values[second] * share
    return whole, unit


@cache
def _bilinear_places(
    rows: int, size: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int64], int]:
    """For each target row its two source rows, the second one's share, and the unit of shares."""
    unit = 2 * size
    # Centre of target row i, in units of 1 / (2 * size) source rows from the centre of row 0.
    centres = (2 * np.arange(size) + 1) * rows - size
    centres = np.clip(centres, 0, (rows - 1) * unit)
    first, share = np.divmod(centres, unit)
    second = np.minimum(first + 1, rows - 1)
    return first, second, share[:, None], unit


def _area_rows(
    values: NDArray[Any], size: int, kind: type[np.signedinteger[Any]]
) -> tuple[NDArray[Any], int]:
    """Sum along the first axis; returns whole numbers and the unit they count in."""
    rows = len(values)
    # Target row i covers source rows edges[i] / size to edges[i + 1] / size.
    edges = np.arange(size + 1) * rows
    first, share = edges // size, (edges % size)[:, None].astype(kind)
    sums: NDArray[Any] = np.add.reduceat(values, first[:-1], axis=0, dtype=kind)
    sums[first[1:] == first[:-1]] = 0  # reduceat takes an empty stretch for its first row
    # What each edge cuts off the source row that it lies in; the last edge cuts nothing.
    cut = values[np.minimum(first, rows - 1)] * share
    sums *= size
    sums += cut[1:] - cut[:-1]
    return sums, rows
