"""Scores computed plainly: frame by frame with scikit-image, threshold by threshold.

What this project did before its scores were made fast, re-stated; independent of
`tmu_dist.evaluation`. Every function takes the frames of one sequence as a forecast gives them, and
pays for its own conversions.

Shape letters: T lead time, D draws, C channels, H height, W width, X = C*H*W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter  # type: ignore[import-untyped]
from skimage.metrics import structural_similarity

Floats = NDArray[np.float64]


class Sequences(NamedTuple):
    """Frames [T, C, H, W] of one sequence."""

    predicted_TCHW: NDArray[np.float32]
    true_TCHW: NDArray[np.float32]
    observed_TCHW: NDArray[np.bool_] | None
    """False where nothing was observed; None: observed everywhere."""

    def clean(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Prediction and truth, 0 where nothing was observed."""
        if self.observed_TCHW is None:
            return self.predicted_TCHW, self.true_TCHW
        return (
            np.where(self.observed_TCHW, self.predicted_TCHW, 0),
            np.where(self.observed_TCHW, self.true_TCHW, 0),
        )

    def floats(self) -> tuple[Floats, Floats]:
        """In [0, 1] and float64."""
        predicted_TCHW, true_TCHW = self.clean()
        return predicted_TCHW.astype(np.float64).clip(0, 1), true_TCHW.astype(np.float64)

    def eight_bits(self) -> tuple[Floats, Floats]:
        """Whole numbers from 0 to 255, in float64."""
        predicted_TCHW, true_TCHW = (frames.clip(0, 1) * 255 for frames in self.clean())
        return np.floor(predicted_TCHW.astype(np.float64)), np.floor(true_TCHW.astype(np.float64))

    def count_T(self) -> NDArray[Any]:
        """Observed values of each frame."""
        if self.observed_TCHW is None:
            return np.full(len(self.true_TCHW), self.true_TCHW[0].size)
        return self.observed_TCHW.sum(axis=(1, 2, 3))


def errors(pair: Sequences) -> Floats:
    """Squared and absolute errors, summed and mean, and PSNR, [5, T]."""
    predicted_TCHW, true_TCHW = pair.floats()
    error_TX = (predicted_TCHW - true_TCHW).reshape(len(true_TCHW), -1)
    predicted_TCHW, true_TCHW = pair.eight_bits()
    error_8bit_TX = (predicted_TCHW - true_TCHW).reshape(len(true_TCHW), -1)
    count_T, size = pair.count_T(), error_TX.shape[1]
    return np.stack(
        [
            (error_TX**2).sum(axis=1) * (size / count_T),
            (error_TX**2).sum(axis=1) / count_T,
            np.abs(error_TX).sum(axis=1) * (size / count_T),
            np.abs(error_TX).sum(axis=1) / count_T,
            20 * np.log10(255.0) - 10 * np.log10((error_8bit_TX**2).sum(axis=1) / count_T),
        ]
    )


def ssim(pair: Sequences, *, eight_bit: bool, gaussian: bool) -> Floats:
    """Structural similarity of each frame by scikit-image, [T]."""
    predicted_TCHW, true_TCHW = pair.eight_bits() if eight_bit else pair.floats()
    side = 11 if gaussian else 7
    options: dict[str, Any] = {"data_range": 255.0 if eight_bit else 1.0, "channel_axis": 0}
    if gaussian:
        options |= {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    means_T = np.empty(len(true_TCHW))
    for t, (true_CHW, predicted_CHW) in enumerate(zip(true_TCHW, predicted_TCHW, strict=True)):
        if pair.observed_TCHW is None:
            means_T[t] = structural_similarity(true_CHW, predicted_CHW, **options)
            continue
        whole_CHW = minimum_filter(
            pair.observed_TCHW[t], size=(1, side, side), mode="constant", cval=False
        )
        _, map_CHW = structural_similarity(true_CHW, predicted_CHW, full=True, **options)
        maps = zip(map_CHW, whole_CHW, strict=True)
        means_T[t] = np.mean([map_HW[whole_HW].mean() for map_HW, whole_HW in maps])
    return means_T


def events(pair: Sequences, numbers: Sequence[float]) -> list[tuple[NDArray[np.bool_], ...]]:
    """Where forecast and truth reach each number."""
    predicted_TCHW, true_TCHW = pair.floats()
    observed = True if pair.observed_TCHW is None else pair.observed_TCHW
    least = [number - 2.0**-23 for number in numbers]
    return [((predicted_TCHW >= n) & observed, (true_TCHW >= n) & observed) for n in least]


def counts(pair: Sequences, numbers: Sequence[float]) -> NDArray[np.int64]:
    """Hits, misses, false alarms and correct negatives, [T, K, 4]."""
    found = []
    for predicted_TCHW, true_TCHW in events(pair, numbers):
        hits_T = (predicted_TCHW & true_TCHW).sum(axis=(1, 2, 3))
        forecast_T, happened_T = (a.sum(axis=(1, 2, 3)) for a in (predicted_TCHW, true_TCHW))
        neither_T = pair.count_T() - forecast_T - happened_T + hits_T
        found.append(np.stack([hits_T, happened_T - hits_T, forecast_T - hits_T, neither_T], 1))
    return np.stack(found, axis=1)


def fss(pair: Sequences, numbers: Sequence[float], scales: Sequence[int]) -> Floats:
    """Sums of F^2, F O and O^2 of the fractions skill score, [T, K, S, 3]."""
    found = np.zeros((len(pair.true_TCHW), len(numbers), len(scales), 3))
    for k, fields in enumerate(events(pair, numbers)):
        active_T = (fields[0] | fields[1]).any(axis=(1, 2, 3))  # the sums of others are 0
        forecast, truth = (_integral(events_TCHW[active_T]) for events_TCHW in fields)
        valid_TCHW = None if pair.observed_TCHW is None else pair.observed_TCHW[active_T]
        missing = None if valid_TCHW is None else _integral(~valid_TCHW)
        for s, n in enumerate(scales):
            weight: Any = 1 / n**2
            if missing is not None:
                weight = valid_TCHW / np.maximum(n**2 - _window_sums(missing, n), 1)
            f_TCHW, o_TCHW = _window_sums(forecast, n) * weight, _window_sums(truth, n) * weight
            products = (f_TCHW * f_TCHW, f_TCHW * o_TCHW, o_TCHW * o_TCHW)
            found[active_T, k, s] = np.stack([p.sum(axis=(1, 2, 3)) for p in products], axis=-1)
    return found


def _integral(events_TCHW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Sums over all pixels above and left, after a row and a column of zeros."""
    sums = np.zeros((*events_TCHW.shape[:2], *(n + 1 for n in events_TCHW.shape[2:])), np.int32)
    np.cumsum(events_TCHW, axis=2, out=sums[:, :, 1:, 1:])
    np.cumsum(sums[:, :, 1:, 1:], axis=3, out=sums[:, :, 1:, 1:])
    return sums


def _window_sums(integral: NDArray[np.int32], n: int) -> NDArray[np.int32]:
    """Events in the n x n neighbourhood of every pixel."""
    before, after = n // 2, n - n // 2 - 1
    padding = ((0, 0), (0, 0), (before, after), (before, after))
    padded = np.pad(integral, padding, mode="edge")
    return padded[..., n:, n:] - padded[..., :-n, n:] - padded[..., n:, :-n] + padded[..., :-n, :-n]


def crps(pair: Sequences, draws_DTCHW: NDArray[np.float32]) -> Floats:
    """CRPS and diversity of all draws, summed over each frame, [2, T]; nothing missing."""
    count = len(draws_DTCHW)
    weights_D1 = (2.0 * np.arange(count) - count + 1)[:, None] / (count * (count - 1))
    sums_T2 = []
    for t, true_CHW in enumerate(pair.true_TCHW):
        draws_DX = draws_DTCHW[:, t].reshape(count, -1).astype(np.float64).clip(0, 1)
        error_X = np.abs(draws_DX - true_CHW.reshape(-1)).mean(axis=0)
        crps_X = error_X - (weights_D1 * np.sort(draws_DX, axis=0)).sum(axis=0)
        sums_T2.append([crps_X.sum(), 2.0 * draws_DX.var(axis=0, ddof=1).sum()])
    return np.array(sums_T2).T
