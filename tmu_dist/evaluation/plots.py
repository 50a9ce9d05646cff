"""Charts in one house style: little ink, names at the lines, colours safe for colour-blind eyes.

Every function returns a matplotlib `Figure` of the caller's own (no pyplot, no global state), in a
light or a dark theme. `write_figure` and `svg_text` turn figures into files and text.

Deliberately not here: pictures of frames (`pictures`), choosing what to show (`report`).
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from tmu_dist.files import atomic_file

SCREEN_DPI = 160
FONT_POINTS = 9.0
LETTER_INCHES = 0.57 * FONT_POINTS / 72
"""Width of an average letter, to leave room for labels."""
_LABEL_LETTERS = 28
"""Longer labels are broken into lines, so that they leave room for what they name."""
_WIDTH_INCHES, _HEIGHT_INCHES = 4.8, 3.0
_REFERENCE_DASHES = ((0, (4, 3)), (0, (1, 2)))


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a figure; the series colours differ under colour-vision deficiency too."""

    background: str
    ink: str
    muted: str
    hairline: str
    series: tuple[str, ...]

    def colour(self, index: int) -> str:
        """Colour of the n-th series; beyond the last they repeat, and only labels differ."""
        return self.series[index % len(self.series)]


LIGHT = Theme(
    background="#ffffff",
    ink="#1d2327",
    muted="#667078",
    hairline="#dfe3e6",
    series=("#1a6ad0", "#b83a08", "#0a5a44", "#b050a0", "#4a3c10"),
)
DARK = Theme(
    background="#181c20",
    ink="#e8ecef",
    muted="#9aa5ad",
    hairline="#30373d",
    series=("#5aa2ff", "#f2763e", "#6fe3b4", "#d889bd", "#f0e26a"),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int | None = None
    """Index of its colour; None draws a reference, grey and dashed (a second one dotted)."""

    def colour(self, theme: Theme) -> str:
        """The curve's colour in a theme."""
        return theme.muted if self.series is None else theme.colour(self.series)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One row of an interval chart."""

    label: str
    mean: float
    low: float
    high: float
    series: int
    """Index of its colour."""


def learning_curves(curves: Sequence[Curve], *, theme: Theme = LIGHT) -> Figure:
    """Validation MSE per frame against training step, of several runs and of persistence."""
    values = [y for curve in curves for y in curve.y]
    title, log_y = error_title("Validation MSE per frame", values)
    return _line_chart(curves, x_label="training step", title=title, log_y=log_y, theme=theme)


def lead_time_curves(
    curves: Sequence[Curve], *, metric_label: str, higher_is_better: bool, theme: Theme = LIGHT
) -> Figure:
    """One metric against lead time (frames after the last input), of several forecasts."""
    return _line_chart(
        curves,
        x_label="lead time [frames]",
        title=f"{metric_label} by lead time, {'higher' if higher_is_better else 'lower'} is better",
        theme=theme,
    )


def scale_curves(
    curves: Sequence[Curve], *, title: str, x_label: str, theme: Theme = LIGHT
) -> Figure:
    """A score against the side of its neighbourhood, on an axis that doubles from tick to tick."""
    figure = _line_chart(curves, x_label=x_label, title=title, theme=theme, log_x=True)
    sides = sorted({x for curve in curves for x in curve.x})
    figure.axes[0].set_xticks(sides, [f"{side:g}" for side in sides])
    return figure


def setting_curves(
    curves: Sequence[Curve],
    spreads: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    is_log: bool,
    theme: Theme = LIGHT,
) -> Figure:
    """A score against a setting of the runs, with a bar of its spread at every point.

    Args:
        curves: one a method; references go from one end to the other.
        spreads: half the length of each bar, by the curve's label.
        title: what is shown.
        x_label: the setting, with its unit.
        is_log: whether the setting's axis is logarithmic.
        theme: colours.
    """
    figure = _line_chart(curves, x_label=x_label, title=title, theme=theme, log_x=is_log)
    axes = figure.axes[0]
    values = sorted({x for curve in curves if curve.series is not None for x in curve.x})
    axes.set_xticks(values, [f"{x:g}" for x in values])
    for curve in curves:
        for x, y, half in zip(curve.x, curve.y, spreads.get(curve.label, ())):
            axes.plot((x, x), (y - half, y + half), color=curve.colour(theme), linewidth=1.1)
    axes.margins(x=0.03)
    return figure


def interval_chart(intervals: Sequence[Interval], *, title: str, theme: Theme = LIGHT) -> Figure:
    """A dot and its confidence interval per row, around a line at zero.

    Args:
        intervals: top to bottom.
        title: what is shown, with its unit.
        theme: colours.
    """
    if not intervals:
        raise ValueError("An interval chart needs at least one interval.")
    labels = [fill(row.label, _LABEL_LETTERS) for row in intervals]
    num_lines = max(label.count("\n") + 1 for label in labels)
    row_inches = max(0.34, 1.3 * FONT_POINTS / 72 * num_lines)
    width, height = _WIDTH_INCHES, 0.95 + row_inches * len(intervals)
    label_inches = width_of(labels)
    figure = Figure(figsize=(width, height), facecolor=theme.background)
    text_in_inches(figure, 0.1, height - 0.2, title, color=theme.ink, fontsize=FONT_POINTS + 1)
    axes = axes_in_inches(figure, label_inches, 0.5, width - label_inches - 0.2, height - 0.9)
    strip_axes(axes, theme)
    axes.grid(visible=False)
    axes.axvline(0, color=theme.muted, linewidth=1.0)
    for i, row in enumerate(intervals):
        colour = theme.colour(row.series)
        axes.plot((row.low, row.high), (i, i), color=colour, linewidth=2.2)
        axes.plot(row.mean, i, "o", color=colour, markersize=6)
    colours = [theme.colour(row.series) for row in intervals]
    name_rows(axes, range(len(intervals)), labels, colours)
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's suffix names."""
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=SCREEN_DPI)


def svg_text(figure: Figure) -> str:
    """The figure as SVG whose text uses the reader's own fonts; the same figure, the same text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tmu-dist"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Room was measured for DejaVu Sans, which is wider than any of these.
    return buffer.getvalue().replace(
        "'DejaVu Sans'", "system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
    )


def _line_chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    title: str,
    theme: Theme,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Lines with their names at the right end; undefined points (NaN) are gaps."""
    if not curves or not all(len(curve.x) for curve in curves):
        raise ValueError("A chart needs at least one curve, and every curve at least one point.")
    figure, axes = empty_chart(
        title, x_label=x_label, names=[_line_label(curve) for curve in curves], theme=theme
    )
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_formatter(NullFormatter())
    dashes = itertools.cycle(_REFERENCE_DASHES)
    for curve in curves:
        is_reference = curve.series is None
        axes.plot(
            curve.x,
            curve.y,
            color=curve.colour(theme),
            linewidth=1.3 if is_reference else 1.9,
            linestyle=next(dashes) if is_reference else "-",
            marker="o" if len(curve.x) == 1 or not np.isfinite(curve.y).all() else None,
            markersize=4,
        )
    axes.margins(x=0.0, y=0.06)
    scale_heights(axes, is_log=log_y)
    if not log_x:
        few_steps = max(curve.x[-1] for curve in curves) <= 12
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12 if few_steps else 5, integer=True))
    name_lines(axes, curves, theme)
    return figure


def error_title(title: str, values: Sequence[float]) -> tuple[str, bool]:
    """The title with what the vertical axis is, and whether that is logarithmic.

    It is where errors span more than a factor of four.
    """
    known = [value for value in values if math.isfinite(value)]
    is_log = bool(known) and 0 < 4 * min(known) < max(known)
    return f"{title}{' (log scale)' if is_log else ''}, lower is better", is_log


def empty_chart(
    title: str, *, x_label: str, names: Sequence[str] = (), theme: Theme
) -> tuple[Figure, Axes]:
    """A figure and the axes of one chart, with room on the right for names."""
    label_inches = width_of([fill(name, _LABEL_LETTERS) for name in names]) if names else 0.2
    width, height = _WIDTH_INCHES, _HEIGHT_INCHES
    figure = Figure(figsize=(width, height), facecolor=theme.background)
    text_in_inches(figure, 0.1, height - 0.2, title, color=theme.ink, fontsize=FONT_POINTS + 1)
    axes = axes_in_inches(figure, 0.5, 0.5, width - label_inches - 0.5, height - 0.9)
    strip_axes(axes, theme)
    axes.set_xlabel(x_label, color=theme.muted, fontsize=FONT_POINTS)
    return figure, axes


def scale_heights(axes: Axes, *, is_log: bool) -> None:
    """A few ticks on the vertical axis, linear or logarithmic."""
    if not is_log:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def axes_in_inches(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the figure's lower left corner."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes(
        (left / total_width, bottom / total_height, width / total_width, height / total_height)
    )


def text_in_inches(figure: Figure, left: float, bottom: float, text: str, **style: Any) -> Text:
    """Vertically centred text at a place given in inches from the figure's lower left corner."""
    width, height = figure.get_size_inches()
    return figure.text(left / width, bottom / height, text, va="center", **style)


def strip_axes(axes: Axes, theme: Theme) -> None:
    """Horizontal hairlines and the bottom axis only."""
    axes.set_facecolor("none")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.hairline)
    axes.grid(axis="y", color=theme.hairline, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=FONT_POINTS, length=0, pad=5)


def name_rows(
    axes: Axes, places: Sequence[float], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Write a label on the left of each row, in the row's colour."""
    axes.set_yticks(places, labels)
    for colour, label in zip(colours, axes.get_yticklabels(), strict=True):
        label.set_color(colour)


def name_lines(axes: Axes, curves: Sequence[Curve], theme: Theme) -> None:
    """Write each curve's label beside its last point, moved apart where they would overlap."""
    axes.autoscale_view()  # fixes the limits, which transData needs
    ends = [_last_point(curve) or (curve.x[-1], axes.get_ylim()[0]) for curve in curves]
    heights = [axes.transData.transform(end)[1] for end in ends]
    rising = sorted(range(len(curves)), key=heights.__getitem__)
    line = 1.3 * FONT_POINTS * axes.figure.dpi / 72
    num_lines = max(_line_label(curve).count("\n") + 1 for curve in curves)
    gap, highest = num_lines * line, axes.bbox.y1 - (num_lines - 1) * line / 2
    places = spread_apart([heights[i] for i in rising], gap)
    for n, i in enumerate(rising):
        place = max(places[n], (n + 0.5) * gap)  # inside the figure, and clear of its title
        place = min(place, highest - (len(rising) - 1 - n) * gap)
        axes.annotate(
            _line_label(curves[i]),
            xy=ends[i],
            xytext=(1.03, (place - axes.bbox.y0) / axes.bbox.height),
            textcoords="axes fraction",
            va="center",
            color=curves[i].colour(theme),
            fontsize=FONT_POINTS,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": curves[i].colour(theme), "linewidth": 0.6,
                "shrinkA": 2, "shrinkB": 1, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _line_label(curve: Curve) -> str:
    text = curve.label if _last_point(curve) else f"{curve.label} (undefined)"
    return fill(text, _LABEL_LETTERS)


def width_of(labels: Sequence[str]) -> float:
    """Inches that labels of one or more lines take, with some air."""
    return LETTER_INCHES * max(len(line) for text in labels for line in text.split("\n")) + 0.25


def _last_point(curve: Curve) -> tuple[float, float] | None:
    """The last point that is defined; None if there is none."""
    defined = [(x, y) for x, y in zip(curve.x, curve.y) if math.isfinite(y)]
    return defined[-1] if defined else None


def spread_apart(rising: Sequence[float], gap: float) -> list[float]:
    """The positions nearest to the given rising ones that lie at least `gap` apart.

    Least squares: subtracting i * gap turns "apart" into "not falling", whose best fit replaces
    each falling stretch by its mean (pool adjacent violators).
    """
    pools: list[tuple[float, int]] = []  # mean, count
    for i, position in enumerate(rising):
        mean, count = position - i * gap, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean = (mean * count + other * others) / (count + others)
            count += others
        pools.append((mean, count))
    level = [mean for mean, count in pools for _ in range(count)]
    return [value + i * gap for i, value in enumerate(level)]
