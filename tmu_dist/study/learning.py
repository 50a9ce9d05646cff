"""Whether the runs of a study were long enough: their errors on the validation split.

Deliberately not here: the other parts of the page (`tables`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from tmu_dist.evaluation.page import Chart, Part
from tmu_dist.evaluation.plots import Curve, Theme, learning_curves
from tmu_dist.evaluation.tables import Cell, Row, TableData
from tmu_dist.ledger.words import NONE, in_three_digits
from tmu_dist.study.record import RowFacts, StudyRecord

_PARTS = {"¼": 0.25, "½": 0.5, "¾": 0.75, "all": 1.0}
_MOST_CURVES = 5
"""As many as there are colours."""
_CAPTION = (
    "MSE per frame on the validation split: the least until then, mean over seeds, and by seed the "
    "iteration with the least of all. A run that is best at its last iteration may still be "
    "learning."
)


def learning(record: StudyRecord) -> Part:
    """Validation errors after parts of the iterations, and as curves where there are few rows."""
    by_group: dict[str, list[RowFacts]] = {}
    for row in record.distinct_rows:
        if row.validations:
            by_group.setdefault(row.group, []).append(row)
    rows = [
        Row(row.label, [Cell(row.sources, is_text=True), *_cells(row)])
        for own in by_group.values()
        for row in own
    ]
    charts = tuple(
        Chart(
            draw=partial(_draw, list(map(_curve, own, _colours(own)))),
            alt="Validation MSE per frame against the iteration; the table has numbers of it",
        )
        for own in by_group.values()
        if len(own) <= _MOST_CURVES
    )
    headings = ["Row", "Sources", "iterations", *(f"after {part}" for part in _PARTS), "least at"]
    tables = ((TableData(headings, rows), _CAPTION),) if rows else ()
    return Part(heading="Were the runs long enough?", charts=charts, tables=tables)


def _cells(row: RowFacts) -> list[Cell]:
    runs = row.validations
    after = [[_least(run, part * row.num_steps) for run in runs] for part in _PARTS.values()]
    best = ", ".join(f"{min(run, key=lambda step: run[step]):,}" for run in runs)
    return [Cell(f"{row.num_steps:,}"), *map(_mean, after), Cell(best)]


def _least(run: Mapping[int, float], until: float) -> float | None:
    return min((error for step, error in run.items() if step <= until), default=None)


def _mean(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return Cell(in_three_digits([statistics.fmean(known)], 1) if whole else NONE)


def _colours(rows: Sequence[RowFacts]) -> list[int]:
    """That of each row's method, and where an earlier row has it, one that no method needs."""
    wanted = [row.series for row in rows]
    free = [i for i in range(_MOST_CURVES) if i not in wanted]
    return [own if own not in wanted[:n] else free.pop(0) for n, own in enumerate(wanted)]


def _curve(row: RowFacts, series: int) -> Curve:
    """The mean over seeds, at the iterations that all of them have."""
    runs = row.validations
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    errors = [statistics.fmean(run[step] for run in runs) for step in steps]
    return Curve(label=row.name, x=steps, y=errors, series=series)


def _draw(curves: Sequence[Curve], theme: Theme) -> Figure:
    return learning_curves(curves, theme=theme)
