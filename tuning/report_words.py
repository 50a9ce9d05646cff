"""How the report of a search writes its numbers and names.

Deliberately not here: which numbers stand where (`report_parts`, `report`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tmu_dist.evaluation.tables import METRICS
from tmu_dist.ledger.words import NONE, signed, spread
from tuning.findings import Findings, Spread
from tuning.plan import Search
from tuning.records import TrialRecord

METHODS = {
    "scratch": "scratch",
    "tmu_scratch": "TMU network without teachers",
    "finetune": "finetune",
    "l2_sp": "L2-SP",
    "knowledge_flow": "Knowledge Flow",
    "art": "ART",
    "distillation": "feature distillation",
    "tmu": "TMU",
}
_UNITS = ("", " k", " M", " G", " T", " P", " E")
_REASON_LETTERS = 140


@dataclass(frozen=True, kw_only=True)
class ErrorWords:
    """How a search's errors are written: with four digits of its lowest one."""

    label: str
    """Of the error, such as MSE / frame."""
    decimals: int

    def error(self, value: float | None) -> str:
        """One error; a dash where there is none."""
        return NONE if value is None or math.isnan(value) else f"{value:.{self.decimals}f}"

    def spread(self, value: Spread | None) -> str:
        """Mean and standard deviation over seeds."""
        return NONE if value is None else spread([*value.by_seed.values()], self.decimals)

    def gain(self, value: Spread | None) -> str:
        """The same of a difference, with its sign."""
        if value is None:
            return NONE
        mean = signed(value.mean, self.decimals)
        return mean if value.deviation is None else f"{mean} ± {value.deviation:.{self.decimals}f}"


def error_words(search: Search, findings: Findings) -> ErrorWords:
    """How this search's errors are written."""
    errors = [
        report.error
        for point in findings.points
        for record in point.trials
        for report in record.reports
        if report.error > 0 and math.isfinite(report.error)
    ]
    return ErrorWords(
        label=METRICS[search.options.error].label, decimals=decimals_of(min(errors, default=1.0))
    )


def decimals_of(value: float) -> int:
    """Decimals with which a positive number has four digits."""
    return max(0, 3 - math.floor(math.log10(value)))


def paired_gain(worse: Spread, better: Spread) -> Spread | None:
    """How much lower the second error is, seed by seed; None without a common seed."""
    gains = {
        seed: error - better.by_seed[seed]
        for seed, error in worse.by_seed.items()
        if seed in better.by_seed
    }
    return Spread(by_seed=gains) if gains else None


def counted(count: int, thing: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listed(texts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(texts[:-1])] if texts[1:] else []), *texts[-1:]])


def format_operations(count: float | None) -> str:
    """A number of operations: 850, 84.1 G, 3.59 T."""
    if count is None:
        return NONE
    thousands = min(int(math.log10(count) / 3), len(_UNITS) - 1) if count >= 1 else 0
    return f"{count / 1000**thousands:.4g}{_UNITS[thousands]}"


def format_seconds(seconds: float) -> str:
    """A time in its largest sensible unit."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def state_in_words(search: Search, record: TrialRecord) -> str:
    """What became of a trial, where, and how often it had to be started again."""
    trial, level = record.trial, level_in_words(search, record)
    text = {
        "finished": "finished",
        "stopped": f"stopped at {level}",
        "failed": f"failed: {_first_line(trial.reason or 'no reason is known')}",
        "open": f"open, at {level}",
    }[trial.state]
    return f"{text} ({counted(trial.failures, 'restart')})" if trial.failures else text


def _first_line(text: str) -> str:
    """Its beginning, if it is long."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= _REASON_LETTERS else line[: _REASON_LETTERS - 1] + "…"


def level_in_words(search: Search, record: TrialRecord) -> str:
    """How far a trial came."""
    level = record.reports[-1].level if record.reports else 0
    if search.options.fidelity == "fraction":
        return f"{level:.4g} of the data"
    return f"{level:,.0f} of {record.num_steps:,}"


def states_in_words(counts: Mapping[str, int]) -> str:
    """How many trials there are of every state."""
    told = {
        "finished": "finished",
        "stopped": "stopped early",
        "failed": "failed",
        "open": "not ended yet",
    }
    return listed([f"{counts[name]:,} {text}" for name, text in told.items() if counts.get(name)])
