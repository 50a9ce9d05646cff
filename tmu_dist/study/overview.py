"""One picture of all tables: errors in parts of training from scratch, the paper's and ours.

At another size than the paper's only such parts can be set side by side. Rows whose first score is
no error, that the paper gives no number of, or that have no finished run, are left out.

Deliberately not here: claims and verdicts (`summary`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from tmu_dist.evaluation.plots import (
    FONT_POINTS,
    LIGHT,
    Theme,
    axes_in_inches,
    strip_axes,
    text_in_inches,
    width_of,
)
from tmu_dist.study.record import RowFacts, StudyRecord
from tmu_dist.study.studies import get_study

_SCORE = "mse_per_frame"
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
    series: int


def marks(record: StudyRecord) -> list[Mark]:
    """The rows of a study that the picture shows, in the order of the table."""
    if record.scores[0].name != _SCORE:
        return []
    found = []
    for row in record.rows:
        reference = get_study(record.study).reference_of(row.group)
        if reference is None or reference.key == row.key:
            continue
        base = record.row(reference.key)
        if all(_SCORE in own.published and own.values(_SCORE) for own in (row, base)):
            found.append(_mark(row, base))
    return found


def _title(record: StudyRecord) -> str:
    clips = ", other clips standing in" if record.has_stand_ins else ""
    return f"{record.title} ({record.variant}{clips})"


def _mark(row: RowFacts, base: RowFacts) -> Mark:
    of = statistics.fmean(base.values(_SCORE))
    parts = [value / of for value in row.values(_SCORE)]
    return Mark(
        label=row.name,
        paper=row.published[_SCORE] / base.published[_SCORE],
        ours=statistics.fmean(parts),
        deviation=statistics.stdev(parts) if len(parts) > 1 else 0.0,
        series=row.series,
    )


def overview(records: Sequence[StudyRecord], *, theme: Theme = LIGHT) -> Figure:
    """Draw the rows of all records below each other, table by table.

    Raises:
        ValueError: no record has such a row.
    """
    tables = [(_title(record), own) for record in records if (own := marks(record))]
    if not tables:
        raise ValueError("No record has a row with an error that the paper gives, too.")
    lines = sum(len(own) + 1 + _GAP for _, own in tables) - _GAP
    labels = [mark.label for _, own in tables for mark in own]
    label_inches, height = width_of(labels), _HEAD_INCHES + _FOOT_INCHES + _ROW_INCHES * lines
    figure = Figure(
        figsize=(label_inches + _CHART_INCHES + 0.2, height), facecolor=theme.background
    )
    axes = axes_in_inches(
        figure, label_inches, _FOOT_INCHES, _CHART_INCHES, height - _HEAD_INCHES - _FOOT_INCHES
    )
    strip_axes(axes, theme)
    axes.grid(visible=False)
    axes.axvline(1, color=theme.muted, linewidth=1.0)
    places: list[tuple[float, str, str]] = []
    place = 0.0
    for title, own in tables:
        axes.annotate(
            title, xy=(-label_inches / _CHART_INCHES + 0.02, place),
            xycoords=("axes fraction", "data"), va="center", color=theme.ink, weight="bold",
            fontsize=FONT_POINTS, annotation_clip=False,
        )  # fmt: skip
        for mark in own:
            place += 1
            colour = theme.colour(mark.series)
            places.append((place, mark.label, colour))
            axes.plot((mark.paper, mark.ours), (place, place), color=theme.hairline, linewidth=1.0)
            axes.plot(mark.paper, place, "o", color=theme.muted, markerfacecolor=theme.background,
                      markersize=5)  # fmt: skip
            ends = (mark.ours - mark.deviation, mark.ours + mark.deviation)
            axes.plot(ends, (place, place), color=colour, linewidth=1.6)
            axes.plot(mark.ours, place, "o", color=colour, markersize=5)
        place += 1 + _GAP
    axes.set_yticks([place for place, *_ in places], [label for _, label, _ in places])
    for (_, _, colour), label in zip(places, axes.get_yticklabels(), strict=True):
        label.set_color(colour)
    axes.set_ylim(lines - 0.5, -0.5)
    axes.margins(x=0.05)
    axes.set_xlabel(
        "MSE per frame in parts of training from scratch", color=theme.muted, fontsize=FONT_POINTS
    )
    legend = "○ the paper; ● here, with one standard deviation over seeds"
    text_in_inches(figure, 0.1, height - 0.2, legend, color=theme.ink, fontsize=FONT_POINTS + 1)
    meaning = "Left of the line: better than training from scratch"
    text_in_inches(figure, 0.1, height - 0.42, meaning, color=theme.muted, fontsize=FONT_POINTS)
    return figure
