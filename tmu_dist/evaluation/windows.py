"""Sums over sliding windows of many images at once.

Images lie one after another in one flat array of P pixels. A window along a row has stride 1, one
down a column has the width of the images as stride. Every operation then runs over one long stretch
of memory, which is several times as fast as row by row. The price: a window that starts in the last
columns of a row goes on in the next row; its sum means nothing, and callers leave it out.

Deliberately not here: what the sums are of (`ssim`, `neighbourhood`).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[Any]
"""Of any type, kept in results."""

CHUNK_PIXELS = 2**14
"""That callers work on at a time, in whole images or rows: arrays of them, and what is computed of
them, stay in a core's cache, and the allocator keeps their memory instead of asking the system for
new pages each time (which took three quarters of the time at twice as many pixels)."""


def window_sums(values_P: Numbers, length: int, stride: int) -> Numbers:
    """Sums of `length` values that lie `stride` apart, one for every start.

    In the values' own type: of integers, and of whole numbers as floats, they are exact as long as
    the type holds them.

    Returns:
        `(length - 1) * stride` fewer values than there are; for length 1 the values themselves.
    """
    # Sums of 1, 2, 4, ... values make up any length, in about 2 log2(length) additions.
    total_P: Numbers | None = None
    offset, width, sums_P = 0, 1, values_P
    while True:
        if length & 1:
            if total_P is None:
                total_P = sums_P
            else:
                size = len(sums_P) - offset
                total_P = total_P[:size] + sums_P[offset:]
            offset += width * stride
        length >>= 1
        if not length:
            assert total_P is not None
            return total_P
        sums_P = sums_P[: -width * stride] + sums_P[width * stride :]
        width *= 2


def weighted_sums(
    values_P: NDArray[np.float64], weights: NDArray[np.float64], stride: int
) -> NDArray[np.float64]:
    """Like `window_sums`, with weights that are the same from both ends; an odd number of them."""
    middle = len(weights) // 2
    size = len(values_P) - 2 * middle * stride

    def value(k: int) -> NDArray[np.float64]:
        return values_P[k * stride : k * stride + size]

    total_P = value(middle) * weights[middle]
    for k in range(middle):
        both_P = value(k) + value(2 * middle - k)
        both_P *= weights[k]
        total_P += both_P
    return total_P
