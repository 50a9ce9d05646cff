"""Structural similarity of many images at once is scikit-image's of each.

Shape letters: N images, H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter
from skimage.metrics import structural_similarity

from tmu_dist.evaluation import ssim
from tmu_dist.evaluation.ssim import SimilarityWindow, mean_similarity
from tmu_dist.evaluation.windows import weighted_sums, window_sums

UNIFORM = SimilarityWindow(side=7, gaussian=False)
GAUSSIAN = SimilarityWindow(side=11, gaussian=True)
SIZES = [(3, 16, 20), (2, 11, 11), (1, 64, 64), (2, 13, 301), (1, 201, 15)]


def images(shape: tuple[int, ...], *, eight_bit: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two alike images, flat in one corner, where the variance is 0."""
    rng = np.random.default_rng(1)
    first = rng.integers(0, 256, shape).astype(np.float64)
    first[:, :9, :9] = 40
    second = np.clip(first + rng.normal(0, 40, shape), 0, 255).astype(np.uint8)
    second[:, :8, :9] = 200
    if eight_bit:
        return first.astype(np.uint8), second
    return first / 255, second / 255


def reference(
    first_HW: NDArray[Any], second_HW: NDArray[Any], window: SimilarityWindow, data_range: float
) -> tuple[float, NDArray[np.float64]]:
    """scikit-image's mean, and its map of all pixels."""
    weighting = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(
        first_HW.astype(np.float64),
        second_HW.astype(np.float64),
        data_range=data_range,
        full=True,
        **(weighting if window.gaussian else {}),
    )


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(
    ("window", "eight_bit", "data_range"),
    [
        (UNIFORM, True, 255.0),
        (UNIFORM, False, 1.0),
        (UNIFORM, False, 2.0),
        (GAUSSIAN, False, 1.0),
        (GAUSSIAN, True, 255.0),
    ],
)
def test_it_is_the_similarity_of_scikit_image(
    shape: tuple[int, ...], window: SimilarityWindow, eight_bit: bool, data_range: float
) -> None:
    first_NHW, second_NHW = images(shape, eight_bit=eight_bit)
    found_N = mean_similarity(first_NHW, second_NHW, window, data_range=data_range)
    expected_N = [reference(a, b, window, data_range)[0] for a, b in zip(first_NHW, second_NHW)]
    np.testing.assert_allclose(found_N, expected_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [UNIFORM, GAUSSIAN])
def test_windows_with_missing_pixels_are_left_out(window: SimilarityWindow) -> None:
    shape = (4, 40, 33)
    first_NHW, second_NHW = images(shape, eight_bit=False)
    rng = np.random.default_rng(2)
    observed_NHW = rng.random(shape) > np.array([0.003, 0.01, 0.0, 0.5])[:, None, None]
    first_NHW[~observed_NHW] = second_NHW[~observed_NHW] = 0
    found_N = mean_similarity(
        first_NHW, second_NHW, window, data_range=1.0, observed_NHW=observed_NHW
    )
    for n, observed_HW in enumerate(observed_NHW):
        _, map_HW = reference(first_NHW[n], second_NHW[n], window, 1.0)
        whole_HW = minimum_filter(observed_HW, size=window.side, mode="constant", cval=False)
        if n == 3:
            assert not whole_HW.any() and np.isnan(found_N[n])
        else:
            assert found_N[n] == pytest.approx(map_HW[whole_HW].mean(), abs=1e-12)


@pytest.mark.parametrize("window", [UNIFORM, GAUSSIAN])
def test_how_images_are_cut_changes_no_bit(
    window: SimilarityWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_NHW, second_NHW = images((5, 90, 31), eight_bit=False)
    observed_NHW = np.random.default_rng(3).random(first_NHW.shape) > 0.002

    def means(pixels: int, number: slice = slice(None)) -> NDArray[np.float64]:
        monkeypatch.setattr(ssim, "CHUNK_PIXELS", pixels)
        pair = first_NHW[number], second_NHW[number]
        whole = mean_similarity(*pair, window, data_range=1.0)
        masked = mean_similarity(*pair, window, data_range=1.0, observed_NHW=observed_NHW[number])
        return np.stack([whole, masked])

    at_once = means(2**20)
    for pixels in (1, 1500, 90 * 31, 2 * 90 * 31):
        np.testing.assert_array_equal(means(pixels), at_once)
    np.testing.assert_array_equal(means(2**14, slice(2, 3)), at_once[:, 2:3])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 16, 50])
@pytest.mark.parametrize("stride", [1, 4])
def test_window_sums_are_sums(length: int, stride: int) -> None:
    values = np.random.default_rng(4).integers(0, 9, 300).astype(np.uint16)
    count = 300 - (length - 1) * stride
    expected = [values[i : i + length * stride : stride][:length].sum() for i in range(count)]
    np.testing.assert_array_equal(window_sums(values, length, stride), expected)
    if length % 2:
        weights = np.hanning(length + 2)[1:-1]
        weighted = [(values[i::stride][:length] * weights).sum() for i in range(count)]
        found = weighted_sums(values.astype(np.float64), weights, stride)
        np.testing.assert_allclose(found, weighted, rtol=1e-12)
