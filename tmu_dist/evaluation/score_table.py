"""Scores kept per sample and lead time, so that every average is exact.

A `ScoreTable` holds one row of float64 numbers per sample and never a running mean: batches and
ranks only decide who fills in which row, and averages are taken once, over rows sorted by sample
id. One rank therefore equals N ranks bit for bit, given the same predictions.

Deliberately not here: what is scored (`metrics`), who predicts (`runner`), scores of rain at
thresholds (`rain`).

Shape letters: B batch, N samples, T lead time, C channels, H height, W width, Y metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tmu_dist.data.manifest import Units
from tmu_dist.evaluation.metrics import (
    METRIC_NAMES,
    FloatArray,
    FramePair,
    SSIMMode,
    select_metrics,
)

COUNTS = {
    "identical_frames": "frames whose prediction equals the truth in all 8 bits",
    "unobserved_frames": "frames without a single observed pixel: they have no score and are left "
    "out of every average",
    "frames_without_ssim": "observed frames in which no window of SSIM is without missing pixels: "
    "left out of its average",
}
"""Totals that stand beside the averages, and what they count."""


class SampleRows:
    """One array per sample id; a mean over samples waits until all rows are there."""

    def __init__(self) -> None:
        self._rows: dict[int, NDArray[Any]] = {}

    def add(self, sample_id: int, row: NDArray[Any]) -> None:
        """Enter the row of a sample.

        Raises:
            ValueError: the sample is known with another row, so two passes were mixed.
        """
        known = self._rows.setdefault(sample_id, row)
        if not np.array_equal(known, row, equal_nan=True):
            raise ValueError(
                f"Sample {sample_id} was scored twice with different values: merge only tables "
                "of one model, one pass and one order of samples."
            )

    def merge(self, other: SampleRows) -> None:
        """Take over the other's rows: the union by sample id."""
        for sample_id, row in other._rows.items():
            self.add(sample_id, row)

    def stacked(self) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Sample ids [N] in rising order, and their rows [N, ...]."""
        if not self._rows:
            raise ValueError("No sample was scored: the split is empty or every weight was 0.")
        ids_N = np.array(sorted(self._rows), dtype=np.int64)
        return ids_N, np.stack([self._rows[i] for i in ids_N.tolist()])


@dataclass(frozen=True)
class Scores:
    """Every score of N samples at T lead times, in rising order of sample id.

    A frame without observed pixels has NaN; identical images have an infinite PSNR. Averages
    leave out both, and count them (`COUNTS`). Where nothing else is left, the average is
    infinite or NaN itself.
    """

    sample_ids_N: NDArray[np.int64]
    values_NT: Mapping[str, FloatArray]

    def per_sequence(self, name: str) -> FloatArray:
        """One metric of each sample [N], averaged over its lead times."""
        return mean_of_finite(self.values_NT[name], axis=1)

    def per_lead_time(self) -> dict[str, FloatArray]:
        """Each metric [T], averaged over samples, and the counts of what was left out."""
        values = self.values_NT
        means = {name: mean_of_finite(v, axis=0) for name, v in values.items()}
        for name, left_out_NT in self._left_out().items():
            means[name] = left_out_NT.sum(axis=0) * 1.0
        return means

    def overall(self) -> dict[str, float]:
        """Each metric averaged over lead times; counts are totals."""
        return {
            name: float(v_T.sum() if name in COUNTS else mean_of_finite(v_T, axis=0))
            for name, v_T in self.per_lead_time().items()
        }

    def _left_out(self) -> dict[str, NDArray[np.bool_]]:
        """Which frames each count means."""
        values, left_out = self.values_NT, {}
        if "psnr_db" in values:
            left_out["identical_frames"] = np.isinf(values["psnr_db"])
        if "observed_fraction" in values:
            unobserved_NT = values["observed_fraction"] == 0
            left_out["unobserved_frames"] = unobserved_NT
            if "ssim" in values:
                left_out["frames_without_ssim"] = np.isnan(values["ssim"]) & ~unobserved_NT
        return left_out


def mean_of_finite(values: FloatArray, *, axis: int) -> FloatArray:
    """Mean that leaves out NaN and infinity; infinite, or NaN, where nothing is left."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0).sum(axis=axis)
    nothing = np.where(np.isinf(values).any(axis=axis), np.inf, np.nan)
    return np.where(count > 0, total / np.maximum(count, 1), nothing)


class RowTable:
    """Named numbers per lead time, one row a sample: enter / merge / compute.

    Args:
        definitions: what every number that `compute` returns means.
        names: of the numbers in the order of the rows; None: those of the definitions.
    """

    def __init__(self, definitions: Mapping[str, str], names: Sequence[str] | None = None) -> None:
        self.definitions = dict(definitions)
        self.names = tuple(definitions if names is None else names)
        self._rows = SampleRows()

    def enter(self, sample_id: int, row_YT: FloatArray) -> None:
        """Enter the numbers of one sample."""
        self._rows.add(sample_id, row_YT)

    def merge(self, other: RowTable) -> None:
        """Take over the rows of another rank's table of the same numbers."""
        if self.definitions != other.definitions:
            raise ValueError(
                f"Tables of different metrics cannot be merged: {list(self.definitions)} and "
                f"{list(other.definitions)}, or another ssim_mode."
            )
        self._rows.merge(other._rows)

    def compute(self) -> Scores:
        """All rows so far, sorted by sample id."""
        ids_N, rows_NYT = self._rows.stacked()
        return Scores(ids_N, {name: rows_NYT[:, i] for i, name in enumerate(self.names)})


class ScoreTable(RowTable):
    """Scores one prediction after another: update / merge / compute.

    Args:
        names, ssim_mode, units: as in `select_metrics`.
    """

    def __init__(
        self,
        names: Sequence[str] = METRIC_NAMES,
        *,
        ssim_mode: SSIMMode = "uint8_7x7",
        units: Units | None = None,
    ) -> None:
        self.metrics = select_metrics(names, ssim_mode=ssim_mode, units=units)
        texts = {name: metric.definition for name, metric in self.metrics.items()}
        needs = {
            "identical_frames": {"psnr_db"},
            "unobserved_frames": {"observed_fraction"},
            "frames_without_ssim": {"observed_fraction", "ssim"},
        }
        counts = {n: text for n, text in COUNTS.items() if needs[n] <= set(self.metrics)}
        super().__init__(texts | counts, tuple(self.metrics))

    def update(
        self,
        prediction_BTCHW: Tensor,
        truth_BTCHW: Tensor,
        sample_ids_B: Tensor,
        weights_B: Tensor,
        *,
        observed_BTCHW: Tensor | None = None,
    ) -> None:
        """Score a batch; samples of weight 0 (padding) are skipped.

        Args:
            prediction_BTCHW: predicted target frames, unbounded, nominally in [0, 1].
            truth_BTCHW: true target frames in [0, 1], same shape.
            sample_ids_B: position of each sample in its split.
            weights_B: 1 for a sample, 0 for padding.
            observed_BTCHW: False where the truth was not observed; None: observed everywhere.

        Raises:
            ValueError: shapes differ, truth is not in [0, 1], a prediction is not finite, or a
                sample is already known with other scores.
        """
        batch = (prediction_BTCHW, truth_BTCHW, sample_ids_B, weights_B, observed_BTCHW)
        for sample_id, pair in frame_pairs(*batch):
            self.add(sample_id, pair)

    def add(self, sample_id: int, pair: FramePair) -> None:
        """Score one sample."""
        self.enter(sample_id, self.score(pair))

    def score(self, pair: FramePair) -> FloatArray:
        """Every metric of every frame of one sample, [Y, T], entering nothing."""
        return np.stack([metric.score(pair) for metric in self.metrics.values()])


def frame_pairs(
    prediction_BTCHW: Tensor,
    truth_BTCHW: Tensor,
    sample_ids_B: Tensor,
    weights_B: Tensor,
    observed_BTCHW: Tensor | None,
) -> Iterator[tuple[int, FramePair]]:
    """The samples of a batch that are not padding, one by one: id and frames, checked.

    Sample by sample, so that the order of every sum is the same in any batch. Arguments and
    errors are those of `ScoreTable.update`.
    """
    if prediction_BTCHW.shape != truth_BTCHW.shape or prediction_BTCHW.ndim != 5:
        raise ValueError(
            "Prediction and truth must have one shape [B, T, C, H, W], got "
            f"{list(prediction_BTCHW.shape)} and {list(truth_BTCHW.shape)}."
        )
    if observed_BTCHW is not None and observed_BTCHW.shape != truth_BTCHW.shape:
        raise ValueError(
            f"The mask must have the shape of the frames, {list(truth_BTCHW.shape)}, got "
            f"{list(observed_BTCHW.shape)}."
        )
    predictions, truths = in_numpy(prediction_BTCHW), in_numpy(truth_BTCHW)
    masks = None if observed_BTCHW is None else observed_BTCHW.cpu().numpy()
    kept = (weights_B > 0).tolist()
    for position, sample_id in enumerate(sample_ids_B.tolist()):
        if kept[position]:
            _check_range(predictions[position], truths[position], sample_id)
            observed_TCHW = None if masks is None else masks[position]
            yield sample_id, FramePair(predictions[position], truths[position], observed_TCHW)


def in_numpy(frames: Tensor) -> NDArray[np.floating[Any]]:
    """The same numbers, of any half precision in float32: NumPy has no bfloat16."""
    wide_enough = torch.promote_types(frames.dtype, torch.float32)
    return frames.detach().to("cpu", wide_enough).numpy()


def _check_range(predicted_TCHW: NDArray[Any], true_TCHW: NDArray[Any], sample_id: int) -> None:
    if not np.isfinite(predicted_TCHW).all():
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
