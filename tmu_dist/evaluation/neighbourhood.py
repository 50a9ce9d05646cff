"""The fractions skill score: is there rain at about the right place?

At every pixel, the fraction of the n x n neighbourhood that reaches a threshold is compared between
forecast F and truth O (Roberts and Lean 2008, Mon. Weather Rev. 136):

    FSS = 1 - sum (F - O)^2 / (sum F^2 + sum O^2)

The sums go over the observed pixels, and over sequences before the division, so they are kept and
merged like counts. 1 is perfect, 0 no skill; without any event in either field it is undefined.

Border: beyond the edge of the frame there is no rain, as in Roberts and Lean. Inside the frame,
pixels that were not observed are left out of the fraction. A neighbourhood of even n reaches one
pixel farther up and left than down and right, as scipy's filters do.

Shape letters: K thresholds, T lead time, C channels, H height, W width, S scales, N = T*C images,
X = 3 sums, P pixels of all images with their borders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmu_dist.evaluation.categorical import count_pixels, divide_or_nan
from tmu_dist.evaluation.windows import CHUNK_PIXELS, window_sums

FloatArray = NDArray[np.float64]
SUM_NAMES = ("forecast_squared", "product", "observed_squared")
"""What the last axis of sums holds."""


def fraction_sums(
    predicted_KTCHW: NDArray[np.bool_],
    observed_KTCHW: NDArray[np.bool_],
    valid_TCHW: NDArray[np.bool_] | None,
    scales: Sequence[int],
) -> FloatArray:
    """Sums of F^2, F O and O^2 over the pixels of each frame.

    Args:
        predicted_KTCHW: the forecast reaches each threshold.
        observed_KTCHW: the truth does.
        valid_TCHW: pixels that count; None means all.
        scales: rising sides n of the neighbourhood in pixels.

    Returns:
        [T, K, S, 3] in the order of `SUM_NAMES`.
    """
    num_thresholds, count, channels, height, width = predicted_KTCHW.shape
    if valid_TCHW is not None:
        predicted_KTCHW, observed_KTCHW = predicted_KTCHW & valid_TCHW, observed_KTCHW & valid_TCHW
    sums_TKSX = np.zeros((count, num_thresholds, len(scales), 3))
    num_frames = max(1, CHUNK_PIXELS // (channels * height * width))
    images = (-1, height, width)
    for first in range(0, count, num_frames):
        some = slice(first, first + num_frames)
        valid_NHW = None if valid_TCHW is None else valid_TCHW[some].reshape(images)
        weights = list(_weights(valid_NHW, scales))
        for k in range(num_thresholds):
            forecast_NHW = predicted_KTCHW[k, some].reshape(images)
            truth_NHW = observed_KTCHW[k, some].reshape(images)
            if forecast_NHW.any() or truth_NHW.any():  # the sums of others are 0
                sums_NSX = _sums_of_products(forecast_NHW, truth_NHW, weights, scales)
                sums_TKSX[some, k] = sums_NSX.reshape(-1, channels, *sums_NSX.shape[1:]).sum(axis=1)
    return sums_TKSX


def fractions_skill_score(sums: FloatArray) -> FloatArray:
    """FSS of sums [..., 3]; NaN where neither field has an event."""
    forecast_squared, product, observed_squared = np.moveaxis(sums, -1, 0)
    squares = forecast_squared + observed_squared
    return 1.0 - divide_or_nan(squares - 2.0 * product, squares)


def _sums_of_products(
    forecast_NHW: NDArray[np.bool_],
    truth_NHW: NDArray[np.bool_],
    weights: Sequence[FloatArray | float],
    scales: Sequence[int],
) -> FloatArray:
    """The three sums of each image and scale, [N, S, 3]."""
    count = len(forecast_NHW)
    sums_NSX = np.empty((count, len(scales), 3))
    both = _neighbours(np.concatenate([forecast_NHW, truth_NHW]), scales)
    for s, (n, events, weight) in enumerate(zip(scales, both, weights, strict=True)):
        if n == 1:  # fractions are 0 or 1, and their sums counts
            alone = (forecast_NHW, forecast_NHW & truth_NHW, truth_NHW)
            sums_NSX[:, s] = np.stack([count_pixels(a[:, None]) for a in alone], axis=1)
            continue
        f_NHW = np.multiply(events[:count], weight, dtype=np.float64)
        o_NHW = np.multiply(events[count:], weight, dtype=np.float64)
        for x, products in enumerate(((f_NHW, f_NHW), (f_NHW, o_NHW), (o_NHW, o_NHW))):
            sums_NSX[:, s, x] = np.vecdot(*products).sum(axis=1)
    return sums_NSX


def _weights(
    valid_NHW: NDArray[np.bool_] | None, scales: Sequence[int]
) -> Iterator[FloatArray | float]:
    """Of each scale: 1 / pixels of the neighbourhood that count; 0 at pixels that do not."""
    if valid_NHW is None:
        yield from (1 / n**2 for n in scales)
        return
    for n, missing_NHW in zip(scales, _neighbours(~valid_NHW, scales), strict=True):
        # None counts only where the pixel itself is missing, and has no part in the sums.
        yield valid_NHW / np.maximum(n**2 - missing_NHW.astype(np.int64), 1)


def _neighbours(events_NHW: NDArray[np.bool_], scales: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Events in the n x n neighbourhood of every pixel, [N, H, W], for one scale after another.

    Beyond the edge there are none.
    """
    count, height, width = events_NHW.shape
    before, border = scales[-1] // 2, scales[-1] - 1
    padded = (count, height + border, width + border)
    size, padded_width = math.prod(padded), width + border
    # One more border, so that windows that begin in the last image are all there.
    single_P = np.zeros(size + border * (padded_width + 1), np.min_scalar_type(scales[-1] ** 2))
    inside = single_P[:size].reshape(padded)[:, before : before + height, before : before + width]
    inside[...] = events_NHW
    sums_P, side = single_P, 1
    for n in scales:
        if n % side:  # else the last scale's windows make up this one's
            sums_P, side = single_P, 1
        for stride in (padded_width, 1):
            sums_P = window_sums(sums_P, n // side, side * stride)
        side, first = n, before - n // 2
        windows = sums_P[:size].reshape(padded)
        yield windows[:, first : first + height, first : first + width]
