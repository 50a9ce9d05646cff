"""Several evaluated runs side by side: may they be compared, and how sure is a difference.

Deliberately not here: tables, pages and figures (`report`).

Shape letters: N sequences, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmu_dist.data.storage import exists, join_url
from tmu_dist.evaluation.rain import RadarSettings
from tmu_dist.evaluation.result import (
    FLOW,
    FORECAST_LABELS,
    MODEL,
    PERSISTENCE,
    EvaluationResult,
)
from tmu_dist.evaluation.score_table import Scores
from tmu_dist.run_folder import LOG_FILE, read_log


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One evaluated run of a comparison."""

    label: str
    """Short name, unique in the comparison: "scratch", "TMU, 2 teachers"."""
    result: EvaluationResult
    run_directory: str | Path | None = None
    """Where its log.jsonl lies; without one it has no learning curve."""
    seconds_per_batch: float | None = None
    """Of training, as the run's result.json has it; None where it is not known."""

    @property
    def scored(self) -> str:
        """What its scores are of: the run, and of a stochastic network which of the samples."""
        ensemble = self.result.ensemble
        return self.label if ensemble is None else f"{self.label}, {ensemble.selection}"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One forecast of a comparison: a baseline, or the model of a run."""

    label: str
    result: EvaluationResult
    forecast: str
    """Its name in `result.overall`."""
    series: int | None
    """Index of the run's colour in charts; None for a baseline."""


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Validation errors of one run, by rising training step."""

    steps: tuple[int, ...]
    mse_per_frame: tuple[float, ...]
    persistence_mse_per_frame: float


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean over sequences of (method - reference), and how sure it is."""

    mean: float
    low: float
    high: float
    """Ends of the 95 % bootstrap confidence interval over sequences."""
    fraction_lower: float
    """Part of the sequences on which the method has the lower value."""
    num_sequences: int


def check_comparable(entries: Sequence[RunEntry]) -> None:
    """Refuse to put numbers side by side that do not mean the same.

    A stochastic network beside a deterministic one is allowed, as in the paper's Table 3: labels
    say which sample its scores are of.

    Raises:
        ValueError: no runs, a label twice, or runs that differ in sequences, window, definition
            of a metric or number of samples; names the runs and the difference.
    """
    if not entries:
        raise ValueError("A comparison needs at least one evaluated run.")
    labels = [entry.label for entry in entries]
    if len(set(labels)) != len(labels):
        raise ValueError(f"Every run of a comparison needs a label of its own, got {labels}.")
    first = entries[0]
    for entry in entries[1:]:
        for what, mine, theirs in (
            ("archive", entry.result.data.manifest_hash, first.result.data.manifest_hash),
            ("split", entry.result.data.split, first.result.data.split),
            ("number of sequences", entry.result.data.num_sequences,
             first.result.data.num_sequences),
            ("window", _window(entry.result), _window(first.result)),
            ("metrics", _metric_definitions(entry.result), _metric_definitions(first.result)),
            ("thresholds and scales", _radar_settings(entry.result), _radar_settings(first.result)),
        ):  # fmt: skip
            if mine != theirs:
                raise ValueError(
                    f"{first.label!r} and {entry.label!r} cannot be compared, their {what} "
                    f"differ: {theirs} and {mine}. Evaluate both in the same way."
                )
    ensembles = {e.label: e.result.ensemble for e in entries if e.result.ensemble is not None}
    counts = {label: ensemble.num_samples for label, ensemble in ensembles.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"Runs cannot be compared by the best of different numbers of samples, {counts}: "
            "evaluate all with one --num-samples."
        )


def contenders(entries: Sequence[RunEntry]) -> list[Contender]:
    """What stands side by side: the baselines, then every run.

    Baselines are the same in every run; optical flow is shown if any run was evaluated with it.
    """
    found = []
    for name in (PERSISTENCE, FLOW):
        holders = [entry.result for entry in entries if name in entry.result.overall]
        if holders:
            label = FORECAST_LABELS[name]
            found.append(Contender(label=label, result=holders[0], forecast=name, series=None))
    for i, entry in enumerate(entries):
        found.append(Contender(label=entry.scored, result=entry.result, forecast=MODEL, series=i))
    return found


def read_learning_curve(run_directory: str | Path) -> LearningCurve:
    """Read the validations of a run from its log; a step logged again after a resume counts once.

    Raises:
        ValueError: there is no log, a line of it is broken, or it has no validation.
    """
    if not exists(str(run_directory), LOG_FILE):
        raise ValueError(f"{run_directory} is not a run folder: it has no {LOG_FILE}.")
    validations = {e["step"]: e for e in read_log(run_directory) if e["event"] == "validation"}
    if not validations:
        where = join_url(str(run_directory), LOG_FILE)
        raise ValueError(f"{where} has no validation yet: train longer.")
    steps = sorted(validations)
    return LearningCurve(
        steps=tuple(steps),
        mse_per_frame=tuple(validations[step]["mse_per_frame"] for step in steps),
        persistence_mse_per_frame=validations[steps[-1]]["persistence_mse_per_frame"],
    )


def paired_difference(
    method: Scores, reference: Scores, metric: str, *, num_resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compare two models sequence by sequence.

    Resampling sequences says how much the mean depends on which test sequences were drawn. It
    says nothing about another training seed.

    Args:
        method: scores of the method.
        reference: scores of the run that it is compared with, on the same sequences.
        metric: which score; each sequence's mean over lead times is compared.
        num_resamples: bootstrap resamples (R).
        seed: of the resampling.
    """
    if not np.array_equal(method.sample_ids_N, reference.sample_ids_N):
        raise ValueError("Paired differences need scores of the same sequences in both runs.")
    difference_N = method.per_sequence(metric) - reference.per_sequence(metric)
    rng = np.random.default_rng(seed)
    count = len(difference_N)
    means_R = np.array(
        [difference_N[rng.integers(count, size=count)].mean() for _ in range(num_resamples)]
    )
    low, high = np.quantile(means_R, (0.025, 0.975))
    return PairedDifference(
        mean=float(difference_N.mean()),
        low=float(low),
        high=float(high),
        fraction_lower=float((difference_N < 0).mean()),
        num_sequences=count,
    )


def difference_from(reference: RunEntry, entry: RunEntry, metric: str) -> PairedDifference:
    """The paired difference of two runs.

    Raises:
        ValueError: a result was loaded without its per-sequence scores.
    """
    for run in (reference, entry):
        if run.result.per_sequence is None:
            raise ValueError(
                f"{run.label!r} has no per-sequence scores: load its evaluation together with "
                "per_sequence.npz, or evaluate it again."
            )
    assert entry.result.per_sequence is not None and reference.result.per_sequence is not None
    return paired_difference(
        entry.result.per_sequence[MODEL], reference.result.per_sequence[MODEL], metric
    )


def _window(result: EvaluationResult) -> tuple[int, int]:
    return result.model.num_input_frames, result.model.num_target_frames


def _metric_definitions(result: EvaluationResult) -> dict[str, str]:
    return {name: result.definitions[name] for name in result.overall[MODEL]}


def _radar_settings(result: EvaluationResult) -> RadarSettings | None:
    return None if result.radar is None else result.radar.settings
