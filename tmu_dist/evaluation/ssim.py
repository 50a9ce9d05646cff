"""Structural similarity of many pairs of images at once.

The numbers are those of scikit-image, image by image, to about 1e-15 (`tests/unit/test_ssim.py`);
it costs a fifth to a tenth of its time, because windows are summed over many images in one go
(`windows`), and each core's share stays in its cache.

With means m, (co)variances v in a window of the images x and y (Wang et al. 2004,
https://doi.org/10.1109/TIP.2003.819861, eq. 13), and K1 = 0.01, K2 = 0.03, data range L:

    S = (2 m_x m_y + C1) (2 v_xy + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2)),  Ci = (Ki L)^2

Four window sums are enough, those of a = x + y, b = x - y and their squares. With n the sum of the
window's weights, k the factor from the plain to the wanted covariance, A = sum(a)^2, B = sum(b)^2:

    P = A + 2 n^2 C1             U = n sum(a^2) - A + 2 n^2 C2 / k
    S = (P - B) (U - V) / ((P + B) (U + V)),    V = n sum(b^2) - B

Deliberately not here: which form is used where, and what of frames with missing pixels (`metrics`).

Shape letters: N images, H height, W width, P pixels of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tmu_dist.evaluation.windows import CHUNK_PIXELS, weighted_sums, window_sums

FloatArray: TypeAlias = NDArray[np.float64]
Images: TypeAlias = NDArray[np.uint8] | NDArray[np.floating[Any]]

_K1, _K2 = 0.01, 0.03
_SIGMA = 1.5
"""Of the Gaussian window in pixels."""


@dataclass(frozen=True, kw_only=True)
class SimilarityWindow:
    """The window that similarity is seen through."""

    side: int
    """Pixels; odd."""
    gaussian: bool
    """True: Gaussian weights and population covariance; False: uniform ones, sample covariance."""

    @cached_property
    def weights(self) -> FloatArray:
        """Of the Gaussian along one axis; their sum is 1."""
        distances = np.arange(self.side) - self.side // 2
        weights = np.exp(-0.5 / _SIGMA**2 * distances**2)
        return weights / weights.sum()

    @property
    def total_weight(self) -> float:
        """Sum of all weights of the window."""
        return 1.0 if self.gaussian else float(self.side**2)

    @property
    def covariance_factor(self) -> float:
        """From the plain covariance to the one that is meant."""
        count = self.side**2
        return 1.0 if self.gaussian else count / (count - 1)

    def working_type(self, images: Images) -> type[np.floating[Any]]:
        """What sums are computed in: of bytes under uniform weights, float32 holds all exactly."""
        whole = images.dtype == np.uint8 and not self.gaussian and self.side <= 8
        return np.float32 if whole else np.float64

    def sums(self, values_P: NDArray[Any], width: int) -> NDArray[Any]:
        """Over the windows of flat images that are `width` wide, by their first pixel."""
        for stride in (width, 1):
            values_P = (
                weighted_sums(values_P, self.weights, stride)
                if self.gaussian
                else window_sums(values_P, self.side, stride)
            )
        return values_P


def mean_similarity(
    first_NHW: Images,
    second_NHW: Images,
    window: SimilarityWindow,
    *,
    data_range: float,
    observed_NHW: NDArray[np.bool_] | None = None,
) -> FloatArray:
    """Mean over the windows that lie in the image and hold no missing pixel, shape [N].

    Args:
        first_NHW, second_NHW: at least as large as the window; 0 where missing.
        window: what to look through.
        data_range: L.
        observed_NHW: False where a pixel is missing; None: nowhere.

    Returns:
        NaN where every window has a missing pixel.
    """
    count, height, width = first_NHW.shape
    inset = window.side - 1
    # Means are of sums of rows, so that they don't depend on how images are cut into chunks.
    sums_NH = np.empty((count, height - inset))
    counts_NH = np.full(sums_NH.shape, float(width - inset))
    kind = window.working_type(first_NHW)
    for images, rows in _chunks(first_NHW, inset):
        taller = slice(rows.start, rows.stop + inset)
        first = first_NHW[images, taller].astype(kind, copy=False)
        second = second_NHW[images, taller].astype(kind, copy=False)
        map_NHW = _similarity(first, second, window, data_range)
        if observed_NHW is not None:
            whole_NHW = _whole_windows(observed_NHW[images, taller], window.side)
            map_NHW = map_NHW * whole_NHW
            counts_NH[images, rows] = whole_NHW.sum(axis=2)
        sums_NH[images, rows] = map_NHW.sum(axis=2)
    with np.errstate(invalid="ignore"):
        return sums_NH.sum(axis=1) / counts_NH.sum(axis=1)


def _chunks(images_NHW: Images, inset: int) -> Iterator[tuple[slice, slice]]:
    """Images and rows of windows to look at together: whole images, or some rows of a large one."""
    count, height, width = images_NHW.shape
    num_images = max(1, CHUNK_PIXELS // (height * width))
    # Rows of pixels at the edge of a chunk are summed twice; of wide images they must not be all.
    num_rows = max(4 * inset, CHUNK_PIXELS // width - inset)
    for image in range(0, count, num_images):
        for row in range(0, height - inset, num_rows):
            yield (
                slice(image, min(image + num_images, count)),
                slice(row, min(row + num_rows, height - inset)),
            )


def _similarity(
    first_NHW: NDArray[Any], second_NHW: NDArray[Any], window: SimilarityWindow, data_range: float
) -> FloatArray:
    """S of every window, by its first pixel."""
    _, _, width = first_NHW.shape
    inset = window.side - 1
    total, factor = window.total_weight, window.covariance_factor
    luminance = 2 * total**2 * (_K1 * data_range) ** 2
    structure = 2 * total**2 * (_K2 * data_range) ** 2 / factor
    sum_P, difference_P = (first_NHW + second_NHW).reshape(-1), (first_NHW - second_NHW).reshape(-1)

    def squared_sums(values_P: NDArray[Any]) -> FloatArray:
        sums_P = window.sums(values_P, width)
        return np.multiply(sums_P, sums_P, dtype=np.float64)

    def sums_of_squares(values_P: NDArray[Any]) -> FloatArray:
        values_P *= values_P
        return np.multiply(window.sums(values_P, width), total, dtype=np.float64)

    a_P, b_P = squared_sums(sum_P), squared_sums(difference_P)
    u_P, v_P = sums_of_squares(sum_P), sums_of_squares(difference_P)
    u_P -= a_P
    u_P += structure
    v_P -= b_P
    a_P += luminance
    # From here on in place: every further array would have to be fetched from beyond the cache.
    whole_P = np.empty(first_NHW.size)
    map_P = whole_P[: len(a_P)]
    np.subtract(a_P, b_P, out=map_P)
    a_P += b_P
    np.subtract(u_P, v_P, out=b_P)
    u_P += v_P
    map_P *= b_P
    a_P *= u_P
    map_P /= a_P
    return whole_P.reshape(first_NHW.shape)[:, :-inset, :-inset]


def _whole_windows(observed_NHW: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Which windows hold no missing pixel, by their first pixel."""
    _, _, width = observed_NHW.shape
    inset = side - 1
    missing_P = (~observed_NHW).reshape(-1).view(np.uint8)
    counts_P = window_sums(window_sums(missing_P, side, width), side, 1)
    whole_P = np.empty(observed_NHW.size, np.bool_)
    np.equal(counts_P, 0, out=whole_P[: len(counts_P)])
    return whole_P.reshape(observed_NHW.shape)[:, :-inset, :-inset]
