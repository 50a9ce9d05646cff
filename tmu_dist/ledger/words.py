"""How a ledger writes its numbers: differences, intervals, spreads over seeds.

Deliberately not here: which numbers stand where (`parts`, `page`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tmu_dist.evaluation.tables import Cell
from tmu_dist.ledger.findings import Score
from tmu_dist.ledger.records import ArmRecord, Ledger
from tmu_dist.ledger.statistics import Difference, Measurement

NONE = "–"
BETTER = {"helps": "better", "negative transfer": "worse", "undecided": "undecided"}
"""Flags of a difference, where it is not about what a source is worth."""


def called(arm: ArmRecord, ledger: Ledger) -> str:
    """An arm's label, with its sources where several arms have that label."""
    shared = sum(other.label == arm.label for other in ledger.arms) > 1
    return f"{arm.label} ({', '.join(arm.sources)})" if shared else arm.label


def signed(value: float, decimals: int) -> str:
    """A difference, with a real minus sign; a dash where it is undefined."""
    return NONE if math.isnan(value) else f"{value:+.{decimals}f}".replace("-", "−")


def spread(values: Measurement | Sequence[float], decimals: int) -> str:
    """Mean and standard deviation over seeds; of one seed, its value."""
    scores = values.score_S.tolist() if isinstance(values, Measurement) else list(values)
    mean = f"{statistics.fmean(scores):.{decimals}f}"
    return mean if len(scores) < 2 else f"{mean} ± {statistics.stdev(scores):.{decimals}f}"


def in_three_digits(values: Sequence[float], least: int) -> str:
    """As `spread`, the mean with three digits at least, and `least` decimals at least."""
    mean, decimals = statistics.fmean(values), least
    if mean and math.isfinite(mean):
        decimals = max(least, 2 - math.floor(math.log10(abs(mean))))
    return spread(values, decimals)


def between(ends: tuple[float, float] | None, decimals: int) -> str:
    """An interval; a dash where there is none."""
    return NONE if ends is None else " to ".join(signed(end, decimals) for end in ends)


def in_short(found: Difference | None, score: Score) -> str:
    """Mean and interval in one cell."""
    if found is None:
        return NONE
    decimals = score.decimals + 1
    ends = between((found.low, found.high), decimals)
    return f"{signed(found.mean, decimals)} ({ends})"


def with_arrow(score: Score) -> str:
    return f"{score.label}\u00a0{'↑' if score.higher_is_better else '↓'}"


def difference_cells(found: Difference, score: Score) -> list[Cell]:
    """Mean, both intervals, and every seed."""
    decimals = score.decimals + 1
    return [
        Cell(signed(found.mean, decimals)),
        Cell(between((found.low, found.high), decimals)),
        Cell(between(found.student, decimals)),
        Cell(", ".join(signed(value, decimals) for value in found.by_seed)),
    ]
