"""Scores of predicted frames, kept per sample and lead time so that every average is exact.

A `ScoreTable` holds one row of float64 numbers per sample and never a running mean: batches and
ranks only decide who fills in which row, and averages are taken once, over rows sorted by sample
id. One rank therefore equals N ranks bit for bit, given the same predictions.

Deliberately not here: who predicts (`runner`), scores of rain (categorical, ensemble), pictures.

Shape letters: B batch, N samples, T lead time, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from tmu_dist.data.transforms import to_uint8

FloatArray: TypeAlias = NDArray[np.float64]
SSIMMode: TypeAlias = Literal["uint8_7x7", "float_7x7_range1", "float_7x7_range2", "gauss_11"]

_AVERAGED = "averaged over sequences, then over lead times"
_TRUNCATED = "both images truncated to 8 bits, floor(255 v)"


class FramePair:
    """Predicted and true frames [T, C, H, W] of one sample, in the forms that metrics need.

    Everything is float64, the eight-bit forms too, so that differences cannot wrap.
    """

    def __init__(self, predicted_TCHW: Tensor, true_TCHW: Tensor) -> None:
        self.predicted_TCHW: FloatArray = predicted_TCHW.double().clamp(0, 1).numpy()
        self.true_TCHW: FloatArray = true_TCHW.double().numpy()
        self.predicted_8bit_TCHW: FloatArray = to_uint8(predicted_TCHW).double().numpy()
        self.true_8bit_TCHW: FloatArray = to_uint8(true_TCHW).double().numpy()

    @cached_property
    def error_TX(self) -> FloatArray:
        """Prediction minus truth, one row of C*H*W values per frame."""
        difference = self.predicted_TCHW - self.true_TCHW
        return difference.reshape(len(difference), -1)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named number per frame, with the words that define it in every output."""

    label: str
    """Column heading."""
    definition: str
    higher_is_better: bool
    score: Callable[[FramePair], FloatArray]
    """The value of each frame of a pair, shape [T]."""


def _mse_per_frame(pair: FramePair) -> FloatArray:
    return (pair.error_TX**2).sum(axis=1)


def _mse_mean(pair: FramePair) -> FloatArray:
    return (pair.error_TX**2).mean(axis=1)


def _mae_per_frame(pair: FramePair) -> FloatArray:
    return np.abs(pair.error_TX).sum(axis=1)


def _mae_mean(pair: FramePair) -> FloatArray:
    return np.abs(pair.error_TX).mean(axis=1)


def _psnr_db(pair: FramePair) -> FloatArray:
    error_TCHW = pair.predicted_8bit_TCHW - pair.true_8bit_TCHW
    mean_T = (error_TCHW**2).reshape(len(error_TCHW), -1).mean(axis=1)
    with np.errstate(divide="ignore"):  # identical images: infinite, averaged separately
        return 20.0 * np.log10(255.0) - 10.0 * np.log10(mean_T)


@dataclass(frozen=True, kw_only=True)
class _SSIMForm:
    """One published form of structural similarity."""

    description: str
    data_range: float
    eight_bit: bool = False
    gaussian: bool = False

    def score(self, pair: FramePair) -> FloatArray:
        """Mean over channels and the valid region of each frame, shape [T]."""
        window = 11 if self.gaussian else 7
        height, width = pair.true_TCHW.shape[-2:]
        if min(height, width) < window:
            raise ValueError(
                f"SSIM looks through a {window}x{window} window, but frames are {height}x{width}: "
                "leave out 'ssim', or evaluate larger frames."
            )
        weighting = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        frames = (
            zip(pair.true_8bit_TCHW, pair.predicted_8bit_TCHW, strict=True)
            if self.eight_bit
            else zip(pair.true_TCHW, pair.predicted_TCHW, strict=True)
        )
        return np.array(
            [
                structural_similarity(
                    true_CHW,
                    predicted_CHW,
                    data_range=self.data_range,
                    channel_axis=0,
                    **(weighting if self.gaussian else {}),
                )
                for true_CHW, predicted_CHW in frames
            ]
        )


_SSIM_FORMS: dict[SSIMMode, _SSIMForm] = {
    "uint8_7x7": _SSIMForm(
        description=f"{_TRUNCATED}; uniform 7x7 window, sample covariance, data range 255",
        data_range=255.0,
        eight_bit=True,
    ),
    "float_7x7_range1": _SSIMForm(
        description="images in [0, 1]; uniform 7x7 window, sample covariance, data range 1",
        data_range=1.0,
    ),
    "float_7x7_range2": _SSIMForm(
        description="images in [0, 1]; uniform 7x7 window, sample covariance, data range 2 (as "
        "older scikit-image assumed for float images; gives higher values)",
        data_range=2.0,
    ),
    "gauss_11": _SSIMForm(
        description="images in [0, 1]; Gaussian 11x11 window (sigma 1.5), population covariance, "
        "data range 1",
        data_range=1.0,
        gaussian=True,
    ),
}

_PLAIN_METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "mse_per_frame": Metric(
            label="MSE / frame",
            definition="squared error summed over the channels and pixels of a frame, as in the "
            f"paper's tables; prediction clipped to [0, 1]; {_AVERAGED}",
            higher_is_better=False,
            score=_mse_per_frame,
        ),
        "mse_mean": Metric(
            label="MSE, mean",
            definition="squared error averaged over the channels and pixels of a frame; "
            f"prediction clipped to [0, 1]; {_AVERAGED}",
            higher_is_better=False,
            score=_mse_mean,
        ),
        "mae_per_frame": Metric(
            label="MAE / frame",
            definition="absolute error summed over the channels and pixels of a frame; "
            f"prediction clipped to [0, 1]; {_AVERAGED}",
            higher_is_better=False,
            score=_mae_per_frame,
        ),
        "mae_mean": Metric(
            label="MAE, mean",
            definition="absolute error averaged over the channels and pixels of a frame; "
            f"prediction clipped to [0, 1]; {_AVERAGED}",
            higher_is_better=False,
            score=_mae_mean,
        ),
        "psnr_db": Metric(
            label="PSNR [dB]",
            definition="20 log10(255) - 10 log10(mean squared error over channels and pixels), "
            f"{_TRUNCATED}; {_AVERAGED}; identical images (infinite) are left out and counted in "
            "identical_frames",
            higher_is_better=True,
            score=_psnr_db,
        ),
    }
)

METRIC_NAMES: tuple[str, ...] = (*_PLAIN_METRICS, "ssim")
ERROR_METRIC_NAMES: tuple[str, ...] = ("mse_per_frame", "mae_per_frame")
"""Cheap enough for every validation."""
SSIM_MODES: tuple[SSIMMode, ...] = get_args(SSIMMode)


def select_metrics(
    names: Sequence[str] = METRIC_NAMES, *, ssim_mode: SSIMMode = "uint8_7x7"
) -> dict[str, Metric]:
    """The named metrics, in the order given.

    Args:
        names: some of `METRIC_NAMES`.
        ssim_mode: which published form of SSIM `ssim` means; values of different forms must
            never stand in one table.
    """
    unknown = [name for name in names if name not in METRIC_NAMES]
    if unknown:
        raise ValueError(f"Unknown metrics {unknown}: choose from {', '.join(METRIC_NAMES)}.")
    if ssim_mode not in SSIM_MODES:
        raise ValueError(f"Unknown ssim_mode {ssim_mode!r}: choose from {', '.join(SSIM_MODES)}.")
    form = _SSIM_FORMS[ssim_mode]
    ssim = Metric(
        label="SSIM",
        definition=f"structural similarity, form {ssim_mode}: {form.description}; valid "
        f"region, K1 0.01, K2 0.03, averaged over channels; {_AVERAGED}",
        higher_is_better=True,
        score=form.score,
    )
    return {name: ssim if name == "ssim" else _PLAIN_METRICS[name] for name in names}


class SampleRows:
    """One float64 array per sample id; a mean over samples waits until all rows are there."""

    def __init__(self) -> None:
        self._rows: dict[int, FloatArray] = {}

    def add(self, sample_id: int, row: FloatArray) -> None:
        """Enter the row of a sample.

        Raises:
            ValueError: the sample is known with another row, so two passes were mixed.
        """
        known = self._rows.setdefault(sample_id, row)
        if not np.array_equal(known, row):
            raise ValueError(
                f"Sample {sample_id} was scored twice with different values: merge only tables "
                "of one model, one pass and one order of samples."
            )

    def merge(self, other: SampleRows) -> None:
        """Take over the other's rows: the union by sample id."""
        for sample_id, row in other._rows.items():
            self.add(sample_id, row)

    def stacked(self) -> tuple[NDArray[np.int64], FloatArray]:
        """Sample ids [N] in rising order, and their rows [N, ...]."""
        if not self._rows:
            raise ValueError("No sample was scored: the split is empty or every weight was 0.")
        ids_N = np.array(sorted(self._rows), dtype=np.int64)
        return ids_N, np.stack([self._rows[i] for i in ids_N.tolist()])


@dataclass(frozen=True)
class Scores:
    """Every score of N samples at T lead times, in rising order of sample id."""

    sample_ids_N: NDArray[np.int64]
    values_NT: Mapping[str, FloatArray]

    def per_sequence(self, name: str) -> FloatArray:
        """One metric of each sample [N], averaged over its lead times."""
        return _mean_of_finite(self.values_NT[name], axis=1)

    def per_lead_time(self) -> dict[str, FloatArray]:
        """Each metric [T], averaged over samples.

        Infinite PSNR (identical images) is left out of the average and counted beside it, as
        `identical_frames`; where all are identical the average is infinite.
        """
        means = {name: _mean_of_finite(v, axis=0) for name, v in self.values_NT.items()}
        if "psnr_db" in self.values_NT:
            means["identical_frames"] = np.isinf(self.values_NT["psnr_db"]).sum(axis=0) * 1.0
        return means

    def overall(self) -> dict[str, float]:
        """Each metric averaged over lead times; `identical_frames` is a total."""
        return {
            name: float(v_T.sum() if name == "identical_frames" else _mean_of_finite(v_T, axis=0))
            for name, v_T in self.per_lead_time().items()
        }


def _mean_of_finite(values: FloatArray, *, axis: int) -> FloatArray:
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.inf)


class ScoreTable:
    """Scores one prediction after another: update / merge / compute."""

    def __init__(
        self, names: Sequence[str] = METRIC_NAMES, *, ssim_mode: SSIMMode = "uint8_7x7"
    ) -> None:
        self.metrics = select_metrics(names, ssim_mode=ssim_mode)
        self._rows = SampleRows()

    @property
    def definitions(self) -> dict[str, str]:
        """What every number that `compute` returns means."""
        texts = {name: metric.definition for name, metric in self.metrics.items()}
        if "psnr_db" in self.metrics:
            texts["identical_frames"] = "frames whose prediction equals the truth in all 8 bits"
        return texts

    def update(
        self,
        prediction_BTCHW: Tensor,
        truth_BTCHW: Tensor,
        sample_ids_B: Tensor,
        weights_B: Tensor,
    ) -> None:
        """Score a batch; samples of weight 0 (padding) are skipped.

        Args:
            prediction_BTCHW: predicted target frames, unbounded, nominally in [0, 1].
            truth_BTCHW: true target frames in [0, 1], same shape.
            sample_ids_B: position of each sample in its split.
            weights_B: 1 for a sample, 0 for padding.

        Raises:
            ValueError: shapes differ, truth is not in [0, 1], a prediction is not finite, or a
                sample is already known with other scores.
        """
        if prediction_BTCHW.shape != truth_BTCHW.shape or prediction_BTCHW.ndim != 5:
            raise ValueError(
                "Prediction and truth must have one shape [B, T, C, H, W], got "
                f"{list(prediction_BTCHW.shape)} and {list(truth_BTCHW.shape)}."
            )
        predictions = prediction_BTCHW.detach().cpu().contiguous()
        truths = truth_BTCHW.detach().cpu().contiguous()
        kept = (weights_B > 0).tolist()
        # Sample by sample: the order of every sum is then the same in any batch.
        for position, sample_id in enumerate(sample_ids_B.tolist()):
            if kept[position]:
                _check_range(predictions[position], truths[position], sample_id)
                pair = FramePair(predictions[position], truths[position])
                self._rows.add(sample_id, np.stack([m.score(pair) for m in self.metrics.values()]))

    def merge(self, other: ScoreTable) -> None:
        """Take over the rows of another rank's table of the same metrics."""
        if self.definitions != other.definitions:
            raise ValueError(
                f"Tables of different metrics cannot be merged: {list(self.definitions)} and "
                f"{list(other.definitions)}, or another ssim_mode."
            )
        self._rows.merge(other._rows)

    def compute(self) -> Scores:
        """All rows so far, sorted by sample id."""
        ids_N, rows_NXT = self._rows.stacked()
        return Scores(ids_N, {name: rows_NXT[:, i] for i, name in enumerate(self.metrics)})


def _check_range(predicted_TCHW: Tensor, true_TCHW: Tensor, sample_id: int) -> None:
    if not predicted_TCHW.isfinite().all():
        raise ValueError(
            f"The prediction of sample {sample_id} holds NaN or infinite values: the model has "
            "diverged, and no score would mean anything."
        )
    low, high = true_TCHW.min().item(), true_TCHW.max().item()
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"True frames must lie in [0, 1], but sample {sample_id} spans [{low:g}, {high:g}]: "
            "bring stored values to the unit interval first (tmu_dist.data.transforms)."
        )
