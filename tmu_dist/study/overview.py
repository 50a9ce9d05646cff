"""One picture of all tables: errors in parts of training from scratch, the paper's and ours.

At another size than the paper's only such parts can be set side by side. Rows whose first score is
no error, that the paper gives no number of, or that have no finished run, are left out.

Deliberately not here: claims and verdicts (`summary`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tmu_dist.evaluation.plots import (
    FONT_POINTS,
    LIGHT,
    Theme,
    axes_in_inches,
    name_rows,
    strip_axes,
    text_in_inches,
    width_of,
)
from tmu_dist.study.design import MSE
from tmu_dist.study.record import RowFacts, StudyRecord
from tmu_dist.study.studies import get_study

_ROW_INCHES, _CHART_INCHES, _HEAD_INCHES, _FOOT_INCHES = 0.2, 4.2, 0.6, 0.55
_GAP = 0.5
"""Between tables, in rows."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One row beside the row of its table without transfer."""

    label: str
    paper: float
    ours: float
    deviation: float
    """Over seeds, of ours; 0 of a single one."""
    last: float | None
    """Ours with the weights of the last iteration, if there is a record of them."""
    series: int


def marks(record: StudyRecord, last: StudyRecord | None = None) -> list[Mark]:
    """The rows of a study that the picture shows, in the order of the table.

    Args:
        record: of the weights that validation chose.
        last: of the same runs' weights of the last iteration.
    """
    if record.scores[0].name != MSE:
        return []
    found = []
    for row in record.rows:
        reference = get_study(record.study).reference_of(row.group)
        if reference is None or reference.key == row.key:
            continue
        base = record.row(reference.key)
        if all(MSE in own.published and own.values(MSE) for own in (row, base)):
            lasts = () if last is None else _parts(last.row(row.key), last.row(base.key))
            found.append(_mark(row, base, statistics.fmean(lasts) if lasts else None))
    return found


def _title(record: StudyRecord) -> str:
    clips = ", other clips standing in" if record.has_stand_ins else ""
    return f"{record.title} ({record.scale} scale{clips})"


def _parts(row: RowFacts, base: RowFacts) -> list[float]:
    """The errors of a row's seeds in parts of another row's mean; empty without runs of both."""
    if not base.values(MSE):
        return []
    of = statistics.fmean(base.values(MSE))
    return [value / of for value in row.values(MSE)]


def _mark(row: RowFacts, base: RowFacts, last: float | None) -> Mark:
    parts = _parts(row, base)
    return Mark(
        label=row.name,
        paper=row.published[MSE] / base.published[MSE],
        ours=statistics.fmean(parts),
        deviation=statistics.stdev(parts) if len(parts) > 1 else 0.0,
        last=last,
        series=row.series,
    )


Table: TypeAlias = tuple[str, Sequence[Mark]]
"""A title, and the rows below it."""


def tables(records: Sequence[StudyRecord]) -> list[Table]:
    """What of all records the picture shows; the two records of the same runs are one table.

    Args:
        records: of studies without settings of their own.
    """
    lasts = {(each.study, each.scale): each for each in records if each.weights == "last"}
    return [
        (_title(each), own)
        for each in records
        if each.weights == "chosen" and (own := marks(each, lasts.get((each.study, each.scale))))
    ]


def overview(shown: Sequence[Table], *, theme: Theme = LIGHT) -> Figure:
    """Draw the rows of one table or more below each other."""
    lines = sum(len(own) + 1 + _GAP for _, own in shown) - _GAP
    label_inches = width_of([mark.label for _, own in shown for mark in own])
    height = _HEAD_INCHES + _FOOT_INCHES + _ROW_INCHES * lines
    figure = Figure(
        figsize=(label_inches + _CHART_INCHES + 0.2, height), facecolor=theme.background
    )
    axes = axes_in_inches(
        figure, label_inches, _FOOT_INCHES, _CHART_INCHES, height - _HEAD_INCHES - _FOOT_INCHES
    )
    strip_axes(axes, theme)
    axes.grid(visible=False)
    axes.axvline(1, color=theme.muted, linewidth=1.0)
    place = 0.0
    places = {}
    for title, own in shown:
        axes.annotate(
            title, xy=(-label_inches / _CHART_INCHES + 0.02, place),
            xycoords=("axes fraction", "data"), va="center", color=theme.ink, weight="bold",
            fontsize=FONT_POINTS, annotation_clip=False,
        )  # fmt: skip
        for mark in own:
            place += 1
            places[place] = mark
            _draw_mark(axes, mark, place, theme)
        place += 1 + _GAP
    colours = [theme.colour(mark.series) for mark in places.values()]
    name_rows(axes, list(places), [mark.label for mark in places.values()], colours)
    axes.set_ylim(lines - 0.5, -0.5)
    axes.margins(x=0.05)
    axes.set_xlabel(
        "MSE per frame in parts of training from scratch", color=theme.muted, fontsize=FONT_POINTS
    )
    legend = "○ the paper; ● here, with one standard deviation over seeds"
    if any(mark.last is not None for mark in places.values()):
        legend += "; | here, weights of the last iteration"
    text_in_inches(figure, 0.1, height - 0.2, legend, color=theme.ink, fontsize=FONT_POINTS + 1)
    meaning = "Left of the line: better than training from scratch"
    text_in_inches(figure, 0.1, height - 0.42, meaning, color=theme.muted, fontsize=FONT_POINTS)
    return figure


def _draw_mark(axes: Axes, mark: Mark, place: float, theme: Theme) -> None:
    """The paper's ring, our dot with its spread, and our weights of the last iteration."""
    colour = theme.colour(mark.series)
    axes.plot((mark.paper, mark.ours), (place, place), color=theme.hairline, linewidth=1.0)
    axes.plot(
        mark.paper, place, "o", color=theme.muted, markerfacecolor=theme.background, markersize=5
    )
    ends = (mark.ours - mark.deviation, mark.ours + mark.deviation)
    axes.plot(ends, (place, place), color=colour, linewidth=1.6)
    axes.plot(mark.ours, place, "o", color=colour, markersize=5)
    if mark.last is not None:
        axes.plot(mark.last, place, "|", color=colour, markersize=8, markeredgewidth=1.6)
