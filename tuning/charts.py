"""The charts of a search: errors along an axis, fronts of skill against cost, every trial's curve.

They look as those of evaluations do (`tmu_dist.evaluation.plots`), in a light or a dark theme.

Deliberately not here: which charts a search has (`report_parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tmu_dist.evaluation.plots import (
    FONT_POINTS,
    LETTER_INCHES,
    Curve,
    Theme,
    empty_chart,
    error_title,
    name_lines,
    scale_heights,
)
from tuning.findings import Line
from tuning.journal import State

_BAND, _FAINT = 0.16, 0.45
"""Opacity of a spread and of single seeds."""
_STATES: dict[State, tuple[int | None, str]] = {
    "finished": (0, "-"),
    "stopped": (1, "-"),
    "failed": (3, "--"),
    "open": (None, "-"),
}
"""Colour and dashes of trials by state; None is grey."""


def _few_digits(value: float) -> str:
    return f"{value:g}"


@dataclass(frozen=True, kw_only=True)
class Priced:
    """One point of the space in a chart of skill against cost."""

    label: str
    cost: float
    error: float
    is_on_front: bool


@dataclass(frozen=True, kw_only=True)
class TrialCurve:
    """What one trial reported, level by level."""

    levels: Sequence[float]
    errors: Sequence[float]
    state: State
    is_best: bool
    """It is a trial of the best point."""


def spread_chart(
    lines: Sequence[Line],
    theme: Theme,
    *,
    title: str,
    x_label: str,
    is_log: bool = False,
    is_scatter: bool = False,
    best: tuple[float, float] | None = None,
) -> Figure:
    """Errors along an axis: means as lines, one standard deviation as a band, seeds as small dots.

    Args:
        lines: with one x at least, each in rising order of x.
        theme: colours.
        title: what is shown.
        x_label: the axis.
        is_log: the horizontal axis is logarithmic, if all x are positive.
        is_scatter: dots and bars in place of lines and bands.
        best: x and mean of the point with a ring around it.
    """
    names = [line.label for line in lines if line.label]
    curves = [
        Curve(label=line.label, x=line.xs, y=[error.mean for error in line.errors], series=i)
        for i, line in enumerate(lines)
    ]
    seeds = [value for line in lines for error in line.errors for value in error.by_seed.values()]
    title, log_y = error_title(title, seeds)
    figure, axes = empty_chart(title, x_label=x_label, names=names, theme=theme)
    for i, (curve, line) in enumerate(zip(curves, lines, strict=True)):
        colour = curve.colour(theme)
        _draw_spread(axes, line, colour, is_scatter=is_scatter)
        is_joined = not is_scatter and len(curve.x) > 1
        # Beyond the last colour they begin again, dashed.
        is_again = i >= len(theme.series)
        style: Any = "none" if not is_joined else (0, (3, 1.5)) if is_again else "-"
        axes.plot(
            *(curve.x, curve.y), marker="o", linestyle=style, color=colour, markersize=4,
            linewidth=1.9,
        )  # fmt: skip
    if best is not None:
        axes.plot(*best, "o", markersize=11, markerfacecolor="none", markeredgecolor=theme.ink)
    xs = sorted({x for line in lines for x in line.xs})
    axes.margins(x=0.05, y=0.08)
    scale_heights(axes, is_log=log_y)
    _scale_along(axes, xs, is_log=is_log and xs[0] > 0)
    if names:
        name_lines(axes, curves, theme)
    return figure


def front_chart(
    points: Sequence[Priced],
    theme: Theme,
    *,
    title: str,
    x_label: str,
    is_log: bool = False,
    write: Callable[[float], str] = _few_digits,
) -> Figure:
    """Error against cost: the points that no other one beats in both as steps with their labels.

    Args:
        points: with one at least on the front.
        theme: colours.
        title: what is shown.
        x_label: the cost.
        is_log: the horizontal axis is logarithmic, if all costs are positive.
        write: costs as text.
    """
    title, log_y = error_title(title, [point.error for point in points])
    figure, axes = empty_chart(title, x_label=x_label, theme=theme)
    others = [point for point in points if not point.is_on_front]
    front = sorted((p for p in points if p.is_on_front), key=lambda p: (p.cost, -p.error))
    axes.plot(
        [p.cost for p in others], [p.error for p in others], "o", color=theme.muted, alpha=_FAINT,
        markersize=4, markeredgewidth=0,
    )  # fmt: skip
    axes.plot(
        [p.cost for p in front], [p.error for p in front], "o-", color=theme.colour(0),
        drawstyle="steps-post", markersize=6, linewidth=1.9,
    )  # fmt: skip
    for point in front:
        axes.annotate(
            point.label,
            xy=(point.cost, point.error),
            xytext=(5, 5),
            textcoords="offset points",
            color=theme.colour(0),
            fontsize=FONT_POINTS,
        )
    costs = sorted({point.cost for point in points})
    axes.margins(x=0.08, y=0.14)
    scale_heights(axes, is_log=log_y)
    _scale_along(axes, costs, is_log=is_log and costs[0] > 0, write=write)
    return figure


def trial_chart(curves: Sequence[TrialCurve], theme: Theme, *, title: str, x_label: str) -> Figure:
    """Every trial's error so far: faint lines in the colour of what became of it.

    Stopped trials end with a cross. Those of the best point are drawn in ink, above the others.
    """
    title, log_y = error_title(title, [error for curve in curves for error in curve.errors])
    states = [curve.state for curve in curves]
    names = {
        state: f"{states.count(state)} {state}{' ×' if state == 'stopped' else ''}"
        for state in _STATES
        if state in states
    }
    figure, axes = empty_chart(title, x_label=x_label, names=[*names.values()], theme=theme)
    opacity = min(_FAINT, max(0.15, 20 / len(curves)))
    for curve in sorted(curves, key=lambda curve: curve.is_best):
        colour, dashes = _state_style(curve.state, theme)
        axes.plot(
            curve.levels,
            curve.errors,
            color=theme.ink if curve.is_best else colour,
            linestyle=dashes,
            linewidth=1.9 if curve.is_best else 0.9,
            alpha=1.0 if curve.is_best else opacity,
            marker="o" if len(curve.levels) == 1 else None,
            markersize=3,
        )
        if curve.state == "stopped":
            end = curve.levels[-1], curve.errors[-1]
            axes.plot(*end, "x", color=colour, markersize=4, alpha=0.8)
    axes.margins(x=0.03, y=0.08)
    scale_heights(axes, is_log=log_y)
    _scale_along(axes, sorted({level for curve in curves for level in curve.levels}), is_log=False)
    _write_legend(axes, names, theme)
    return figure


def _draw_spread(axes: Axes, line: Line, colour: str, *, is_scatter: bool) -> None:
    """One standard deviation on both sides of the mean, and every seed."""
    xs = np.array(line.xs)
    means = np.array([error.mean for error in line.errors])
    deviations = np.array([error.deviation or 0.0 for error in line.errors])
    if is_scatter or len(xs) == 1:
        axes.errorbar(
            xs, means, deviations, fmt="none", ecolor=colour, elinewidth=1.0, alpha=_FAINT
        )
    else:
        axes.fill_between(
            xs, means - deviations, means + deviations, color=colour, alpha=_BAND, linewidth=0
        )
    dots = [
        (x, value) for x, error in zip(xs, line.errors) for value in error.by_seed.values()
        if len(error.by_seed) > 1
    ]  # fmt: skip
    if dots:
        axes.plot(*zip(*dots), "o", color=colour, markersize=2.5, alpha=_FAINT, markeredgewidth=0)


def _write_legend(axes: Axes, names: Mapping[State, str], theme: Theme) -> None:
    """What became of the trials, in its colours, on the right."""
    for i, (state, name) in enumerate(names.items()):
        axes.annotate(
            name,
            xy=(1.03, 1.0),
            xytext=(0, -1.5 * FONT_POINTS * (i + 0.5)),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=_state_style(state, theme)[0],
            fontsize=FONT_POINTS,
        )


def _state_style(state: State, theme: Theme) -> tuple[str, str]:
    series, dashes = _STATES[state]
    return theme.muted if series is None else theme.colour(series), dashes


def _scale_along(
    axes: Axes,
    values: Sequence[float],
    *,
    is_log: bool,
    write: Callable[[float], str] = _few_digits,
) -> None:
    """The horizontal axis: a tick at every value where there is room, a few round ones if not."""
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
    axes.autoscale_view()  # fixes the limits, which transData needs
    labels = [write(value) for value in values]
    inches = [axes.transData.transform((v, 1.0))[0] / axes.figure.dpi for v in values]
    needed = [LETTER_INCHES * (len(a) + len(b)) / 2 + 0.1 for a, b in pairwise(labels)]
    if all(b - a >= room for (a, b), room in zip(pairwise(inches), needed, strict=True)):
        axes.set_xticks(values)
    elif is_log:
        span = values[-1] / values[0]
        subs = (1.0,) if span > 300 else (1.0, 3.0) if span > 10 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
