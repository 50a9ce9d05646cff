"""Forecasts kept on disk, and their scores once more by other code.

`predictions.npy` holds what a network forecast of every sequence of a split, so that its scores can
be taken again without it: `recompute` reads that file and the true frames, and shares no code with
`metrics`, so that an error in one does not hide in the other.

Shape letters: B batch, N sequences, T lead time, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tmu_dist.data.archive import Archive
from tmu_dist.data.manifest import Units
from tmu_dist.evaluation.result import EvaluationResult
from tmu_dist.files import atomic_file

PREDICTIONS_NAME = "predictions.npy"
RECOMPUTED = ("mse_per_frame", "mae_per_frame", "ssim")
"""Scores that `recompute` takes."""

FloatArray = NDArray[np.float64]
Keep = Callable[[Tensor, Tensor, Tensor], None]
"""Takes forecasts of a batch [B, T, C, H, W], the sequences' ids and their weights (0: padding)."""

_WINDOW = 7
_SSIM_FORM = "form uint8_7x7"
_BATCH = 16


@contextmanager
def saved_predictions(path: Path, shape_NTCHW: tuple[int, ...]) -> Iterator[Keep]:
    """Yield what keeps forecasts, batch by batch; the file appears when the block ends well.

    Args:
        path: the file: float32 [N, T, C, H, W], unclipped, in the order of the sequences' ids.
        shape_NTCHW: of all forecasts.

    Raises:
        ValueError: a sequence of the split was not forecast.
        WriteError: the disk is full or the folder cannot be written.
    """
    with atomic_file(path) as staging:
        frames_NTCHW = np.lib.format.open_memmap(staging, "w+", np.float32, shape_NTCHW)
        is_kept_N = np.zeros(len(frames_NTCHW), bool)

        def keep(forecast_BTCHW: Tensor, sample_ids_B: Tensor, weights_B: Tensor) -> None:
            is_real_B = (weights_B > 0).cpu()
            ids = sample_ids_B[is_real_B].numpy()
            frames_NTCHW[ids] = forecast_BTCHW.cpu()[is_real_B].float().numpy()
            is_kept_N[ids] = True

        yield keep
        if not is_kept_N.all():
            raise ValueError(
                f"{path} was not written: {(~is_kept_N).sum()} of {len(is_kept_N)} sequences were "
                "not forecast. Predictions are kept of whole splits, by one process."
            )
        frames_NTCHW.flush()


def recompute(folder: Path, archive: Archive) -> dict[str, FloatArray]:
    """The scores of `RECOMPUTED` from saved predictions and true frames alone, each [N, T].

    Args:
        folder: of an evaluation whose predictions were kept; evaluation.json there says which
            split and window they are of, and nothing else of it is used.
        archive: that it was evaluated on.

    Raises:
        ValueError: no predictions there, another archive, predictions of another shape, or an
            SSIM of a form that is not taken here.
    """
    result = EvaluationResult.load(folder)
    if not (folder / PREDICTIONS_NAME).is_file():
        raise ValueError(
            f"{folder} holds no {PREDICTIONS_NAME}: evaluate again with --keep-predictions."
        )
    if archive.manifest.content_hash != result.data.manifest_hash:
        raise ValueError(
            f"{folder} was evaluated on an archive of manifest {result.data.manifest_hash[:12]}, "
            f"but {archive.url} has {archive.manifest.content_hash[:12]}: name that archive."
        )
    if _SSIM_FORM not in result.definitions["ssim"]:
        raise ValueError(f"{folder}: SSIM is taken again in its {_SSIM_FORM} only.")
    predicted_NTCHW = np.load(folder / PREDICTIONS_NAME, mmap_mode="r")
    first, count = result.model.num_input_frames, result.model.num_target_frames
    expected = (result.data.num_sequences, count, *archive.manifest.sample_shape[1:])
    if predicted_NTCHW.shape != expected:
        raise ValueError(
            f"{folder / PREDICTIONS_NAME} holds {list(predicted_NTCHW.shape)} numbers, but "
            f"evaluation.json tells of {list(expected)}: they are of different evaluations. "
            "Evaluate again with --keep-predictions."
        )
    parts: list[dict[str, FloatArray]] = []
    for start in range(0, len(predicted_NTCHW), _BATCH):
        predicted_BTCHW = predicted_NTCHW[start : start + _BATCH]
        ids = range(start, start + len(predicted_BTCHW))
        codes_BTCHW = archive.read(result.data.split, ids)[:, first : first + count]
        parts.append(_scores(predicted_BTCHW, codes_BTCHW, archive.manifest.units))
    return {name: np.concatenate([part[name] for part in parts]) for name in RECOMPUTED}


def _scores(
    predicted_BTCHW: NDArray[np.float32], codes_BTCHW: NDArray[Any], units: Units
) -> dict[str, FloatArray]:
    """Scores of a batch, [B, T]; NaN where nothing was observed."""
    observed = codes_BTCHW != (-1 if units.missing_code is None else units.missing_code)
    predicted = np.clip(predicted_BTCHW, 0, 1)
    true = codes_BTCHW.astype(np.float32) / np.float32(units.max_code)
    error = np.where(observed, predicted.astype(np.float64) - true, 0.0)
    pixels = (-3, -2, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale_BT = error[0, 0].size / observed.sum(pixels)
        return {
            "mse_per_frame": (error**2).sum(pixels) * scale_BT,
            "mae_per_frame": np.abs(error).sum(pixels) * scale_BT,
            "ssim": _ssim(_to_8_bits(predicted, observed), _to_8_bits(true, observed), observed),
        }


def _to_8_bits(frames: NDArray[np.float32], observed: NDArray[np.bool_]) -> NDArray[np.int64]:
    # float32 all the way: in it, 255 (k / 255) is k for each of the 256 values.
    return np.where(observed, np.floor(frames * np.float32(255)), 0).astype(np.int64)


def _ssim(a: NDArray[np.int64], b: NDArray[np.int64], observed: NDArray[np.bool_]) -> FloatArray:
    """Mean SSIM (Wang et al. 2004) of 8-bit frames [B, T, C, H, W] over windows, then channels.

    Uniform 7x7 windows inside the frame that hold no missing pixel, sample covariance, K1 0.01,
    K2 0.03. Sums of integers are exact, so that differences of cumulative sums are, too.
    """
    n = _WINDOW**2
    sum_a, sum_b = _window_sums(a), _window_sums(b)
    variances = (_window_sums(a * a + b * b) - (sum_a**2 + sum_b**2) / n) / (n - 1)
    covariance = (_window_sums(a * b) - sum_a * sum_b / n) / (n - 1)
    mean_a, mean_b = sum_a / n, sum_b / n
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    values /= (mean_a**2 + mean_b**2 + c1) * (variances + c2)
    is_whole = _window_sums((~observed).astype(np.int64)) == 0
    count_BTC = is_whole.sum((-2, -1))
    means_BTC = np.where(is_whole, values, 0.0).sum((-2, -1)) / np.maximum(count_BTC, 1)
    return means_BTC.sum(-1) / (count_BTC > 0).sum(-1)


def _window_sums(images: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums over every 7x7 window inside images [..., H, W]: [..., H - 6, W - 6]."""
    edges = [(0, 0)] * (images.ndim - 2) + [(1, 0), (1, 0)]
    total = np.pad(images.cumsum(-1).cumsum(-2), edges)
    columns = total[..., _WINDOW:] - total[..., :-_WINDOW]
    return columns[..., _WINDOW:, :] - columns[..., :-_WINDOW, :]
