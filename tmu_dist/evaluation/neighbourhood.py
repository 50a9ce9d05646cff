"""The fractions skill score: is there rain at about the right place?

At every pixel, the fraction of the n x n neighbourhood that reaches a threshold is compared between
forecast F and truth O (Roberts and Lean 2008, Mon. Weather Rev. 136):

    FSS = 1 - sum (F - O)^2 / (sum F^2 + sum O^2)

The sums go over the observed pixels, and over sequences before the division, so they are kept and
merged like counts. 1 is perfect, 0 no skill; without any event in either field it is undefined.

Border: beyond the edge of the frame there is no rain, as in Roberts and Lean. Inside the frame,
pixels that were not observed are left out of the fraction. A neighbourhood of even n reaches one
pixel farther up and left than down and right, as scipy's filters do.

Shape letters: T lead time, C channels, H height, W width, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tmu_dist.evaluation.categorical import divide_or_nan

FloatArray = NDArray[np.float64]
SUM_NAMES = ("forecast_squared", "product", "observed_squared")
"""What the last axis of sums holds."""


def fraction_sums(
    predicted_TCHW: NDArray[np.bool_],
    observed_TCHW: NDArray[np.bool_],
    valid_TCHW: NDArray[np.bool_] | None,
    scales: Sequence[int],
) -> FloatArray:
    """Sums of F^2, F O and O^2 over the pixels of each frame.

    Args:
        predicted_TCHW: the forecast reaches the threshold.
        observed_TCHW: the truth does.
        valid_TCHW: pixels that count; None means all.
        scales: sides n of the neighbourhood in pixels.

    Returns:
        [T, S, 3] in the order of `SUM_NAMES`.
    """
    sums_TSX = np.zeros((len(predicted_TCHW), len(scales), 3))
    if valid_TCHW is not None:
        predicted_TCHW, observed_TCHW = predicted_TCHW & valid_TCHW, observed_TCHW & valid_TCHW
    active_T = (predicted_TCHW | observed_TCHW).any(axis=(1, 2, 3))  # the sums of others are 0
    if not active_T.any():
        return sums_TSX
    predicted_TCHW, observed_TCHW = predicted_TCHW[active_T], observed_TCHW[active_T]
    valid_TCHW = None if valid_TCHW is None else valid_TCHW[active_T]
    forecast, truth = _integral(predicted_TCHW), _integral(observed_TCHW)
    missing = None if valid_TCHW is None else _integral(~valid_TCHW)
    for s, n in enumerate(scales):
        weight: FloatArray | float = 1 / n**2
        if missing is not None:
            # 0 observed pixels only where the pixel itself is missing, and has no part in the sums.
            weight = valid_TCHW / np.maximum(n**2 - _window_sums(missing, n), 1)
        f_TCHW, o_TCHW = _window_sums(forecast, n) * weight, _window_sums(truth, n) * weight
        products = (f_TCHW * f_TCHW, f_TCHW * o_TCHW, o_TCHW * o_TCHW)
        sums_TSX[active_T, s] = np.stack([p.sum(axis=(1, 2, 3)) for p in products], axis=-1)
    return sums_TSX


def fractions_skill_score(sums: FloatArray) -> FloatArray:
    """FSS of sums [..., 3]; NaN where neither field has an event."""
    forecast_squared, product, observed_squared = np.moveaxis(sums, -1, 0)
    squares = forecast_squared + observed_squared
    return 1.0 - divide_or_nan(squares - 2.0 * product, squares)


def _integral(events_TCHW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Sums over all pixels above and left, with a row and a column of zeros before them."""
    sums = np.zeros((*events_TCHW.shape[:2], *(n + 1 for n in events_TCHW.shape[2:])), np.int32)
    np.cumsum(events_TCHW, axis=2, out=sums[:, :, 1:, 1:])
    np.cumsum(sums[:, :, 1:, 1:], axis=3, out=sums[:, :, 1:, 1:])
    return sums


def _window_sums(integral: NDArray[np.int32], n: int) -> NDArray[np.int32]:
    """Events in the n x n neighbourhood of every pixel; none beyond the edge."""
    before, after = n // 2, n - n // 2 - 1
    padding = ((0, 0), (0, 0), (before, after), (before, after))
    padded = np.pad(integral, padding, mode="edge")
    return padded[..., n:, n:] - padded[..., :-n, n:] - padded[..., n:, :-n] + padded[..., :-n, :-n]
