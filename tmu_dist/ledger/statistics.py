"""How sure differences between arms are, and what a ledger may conclude from them.

Runs are paired by seed and by test sequence. The interval of a difference is a two-way bootstrap:
seeds and sequences are resampled, both with replacement and crossed, so that a resampled seed is
scored on the resampled sequences (the pigeonhole bootstrap; Owen 2007, doi:10.1214/07-AOAS122).
With few seeds its seed part is coarse. Of three, each is the only one in 1 of 27 resamples, which
is more than the 2.5 % beyond an end: the part reaches from the lowest seed to the highest and never
further. Where differences vary over seeds alone that holds the truth in 3 of 4 cases, not in 19 of
20. So an interval over seeds alone by Student's t stands beside it: wide, right where differences
vary over seeds like normal numbers, and blind to the choice of test sequences. Nothing is concluded
but where both are on one side.

Deliberately not here: files and arms (`findings`), words for people (`page`).

Legend: S seeds, N sequences, R resamples, T lead time, X = 4 contingency counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # type: ignore[import-untyped]

FloatArray = NDArray[np.float64]
Flag = Literal["helps", "negative transfer", "undecided"]

NUM_RESAMPLES = 10_000
TAILS = (0.025, 0.975)
MIN_POINTS = 4
"""Fewer do not make a correlation."""
_SEED = 0
_CHUNK = 1000


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One score of one arm."""

    seeds: tuple[int, ...]
    score_S: FloatArray
    resampled_SR: FloatArray
    """Over each resample of the sequences; the r-th is the same for every arm."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(self.score_S.mean())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds, with S - 1; None for one."""
        return float(self.score_S.std(ddof=1)) if len(self.seeds) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean over seeds of one arm's score minus another's, and how sure it is (95 %)."""

    seeds: tuple[int, ...]
    """That both arms have."""
    by_seed: tuple[float, ...]
    mean: float
    low: float
    high: float
    """Ends of the two-way bootstrap; of one seed, of a bootstrap over sequences."""
    student: tuple[float, float] | None
    """Ends of the interval over seeds alone; None for one seed."""

    @property
    def flag(self) -> Flag:
        """Of a gain: on which side both whole intervals are; one seed decides nothing."""
        if self.student is None:
            return "undecided"
        if min(self.low, self.student[0]) > 0:
            return "helps"
        return "negative transfer" if max(self.high, self.student[1]) < 0 else "undecided"


def measure_mean(values: Mapping[int, FloatArray]) -> Measurement:
    """A score that is a mean over sequences.

    Args:
        values: by seed, the score of each sequence [N]. Sequences where it is not finite, as
            nothing was observed, are left out; they are the same in every arm.
    """
    values_SN = np.stack(list(values.values()))
    values_SN = values_SN[:, np.isfinite(values_SN).all(0)]
    count = values_SN.shape[1]
    return Measurement(
        seeds=tuple(values),
        score_S=values_SN.mean(1),
        resampled_SR=over_resamples(values_SN) / count,
    )


def measure_csi(counts: Mapping[int, NDArray[np.int64]]) -> Measurement:
    """The critical success index, which is taken of sums of counts and not a mean over sequences.

    Args:
        counts: by seed, hits, misses, false alarms and correct negatives [N, T, X] of one
            threshold. CSI is averaged over the lead times at which it is defined.
    """
    counts_SXTN = np.stack(list(counts.values())).transpose(0, 3, 2, 1)[:, :3].astype(np.float64)
    return Measurement(
        seeds=tuple(counts),
        score_S=_csi(counts_SXTN.sum(-1, keepdims=True))[:, 0],
        resampled_SR=_csi(over_resamples(counts_SXTN)),
    )


def _csi(counts_SXTR: FloatArray) -> FloatArray:
    """CSI [S, R] of hits, misses and false alarms."""
    with np.errstate(invalid="ignore"):
        csi_STR = counts_SXTR[:, 0] / counts_SXTR.sum(1)
    return np.nansum(csi_STR, axis=1) / np.isfinite(csi_STR).sum(1)


def difference(first: Measurement, second: Measurement) -> Difference | None:
    """First minus second, over the seeds that both have; None where there is none."""
    seeds = tuple(seed for seed in first.seeds if seed in second.seeds)
    if not seeds:
        return None
    rows, others = ([m.seeds.index(seed) for seed in seeds] for m in (first, second))
    by_seed_S = first.score_S[rows] - second.score_S[others]
    by_resample_SR = first.resampled_SR[rows] - second.resampled_SR[others]
    weights_RS = seed_counts(len(seeds)) / len(seeds)
    low, high = np.quantile((weights_RS.T * by_resample_SR).sum(0), TAILS)
    return Difference(
        seeds=seeds,
        by_seed=tuple(by_seed_S.tolist()),
        mean=float(by_seed_S.mean()),
        low=float(low),
        high=float(high),
        student=student_interval(by_seed_S),
    )


def gain(of: Measurement, over: Measurement, *, higher_is_better: bool) -> Difference | None:
    """By how much an arm is better than another: positive is better, whatever the score."""
    return difference(of, over) if higher_is_better else difference(over, of)


def student_interval(values_S: FloatArray) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for one value."""
    count = len(values_S)
    if count < 2:
        return None
    half = float(stdtrit(count - 1, TAILS[1])) * float(values_S.std(ddof=1)) / math.sqrt(count)
    mean = float(values_S.mean())
    return mean - half, mean + half


def over_resamples(values_N: FloatArray) -> FloatArray:
    """Sums of values [..., N] over each resample of the sequences, [..., R]."""
    counts_RN = sequence_counts(values_N.shape[-1])
    parts = np.split(counts_RN, range(_CHUNK, NUM_RESAMPLES, _CHUNK))
    return np.concatenate([values_N @ part.T.astype(np.float64) for part in parts], axis=-1)


@lru_cache(maxsize=2)
def sequence_counts(count: int) -> NDArray[np.uint16]:
    """How often each sequence is in each resample, [R, N]."""
    return _multinomial(count, stream=1)


@lru_cache
def seed_counts(count: int) -> NDArray[np.uint16]:
    """How often each seed is in each resample, [R, S]."""
    return _multinomial(count, stream=2)


def _multinomial(count: int, stream: int) -> NDArray[np.uint16]:
    generator = np.random.default_rng((_SEED, stream))
    equal = np.full(count, 1 / count)
    return generator.multinomial(count, equal, size=NUM_RESAMPLES).astype(np.uint16)


class Relation(NamedTuple):
    """How two numbers of each source go together."""

    pearson: float
    spearman: float


def relation(first: Sequence[float], second: Sequence[float]) -> Relation | None:
    """Correlation of two numbers over sources; None of fewer than `MIN_POINTS`.

    NaN where all values of one are equal.
    """
    if len(first) < MIN_POINTS:
        return None
    a, b = np.array(first), np.array(second)
    return Relation(_pearson(a, b), _pearson(_ranks(a), _ranks(b)))


def _pearson(a: FloatArray, b: FloatArray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def _ranks(values: FloatArray) -> FloatArray:
    """Equal values share the mean of their ranks."""
    below = (values[:, None] > values).sum(1)
    return below + ((values[:, None] == values).sum(1) - 1) / 2


Answer = Literal[
    "knowledge", "open", "not shown", "no gain", "negative transfer", "undecided", "no answer"
]


def answer(
    over_scratch: Difference | None, over_controls: Mapping[str, Difference | None]
) -> Answer:
    """Knowledge or parameters? `VERDICT_RULE` in code.

    Args:
        over_scratch: gain of memory transfer over training from scratch.
        over_controls: its gain over every control by name; None for those without a run.
    """
    if over_scratch is None:
        return "no answer"
    if len(over_scratch.seeds) < 2:
        return "undecided"
    if over_scratch.flag != "helps":
        return "no gain" if over_scratch.flag == "undecided" else "negative transfer"
    if any(found is not None and found.flag != "helps" for found in over_controls.values()):
        return "not shown"
    return "open" if None in over_controls.values() else "knowledge"


VERDICT_RULE = (
    "The verdict is about the MSE per frame, and an arm counts as better only where the whole 95 %"
    " interval of the two-way bootstrap says so, and that over seeds alone, too. It is the "
    "teachers' knowledge that helps if memory transfer is better than training from scratch and "
    "than each of the controls, which all lack the knowledge and keep something else that could "
    "explain a gain: more iterations without teachers, the same network without teachers (twice: "
    "built without them, and with them at beta = 0), the same teachers shown another sequence, the"
    " same teachers before their training. As all of this has to hold at once, it needs no "
    "correction for the number of comparisons. If memory transfer is better than scratch and not "
    "shown to be better than some control, it is not shown that knowledge helps; if a control has "
    "no run, that is open. One seed decides nothing."
)
