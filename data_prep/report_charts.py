"""Charts of an archive's report as inline SVG: histogram, colour bar, time coverage, groups.

Colours are the page's CSS variables, so the charts follow light and dark mode and print.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np

from data_prep.report_html import SPLIT_COLOURS
from tmu_dist.colours import MISSING, MISSING_LINE, OUTLINE, ColourScale, tick_label
from tmu_dist.data.manifest import SPLITS, Units
from tmu_dist.html_page import Html

_WIDTH, _HISTOGRAM_WIDTH = 1080, 740
"""About as wide as they are on a screen, so that letters have their size."""
_MOST_BARS = 70
_LETTER_PX = 6.6
_TICK_HOURS = (0.25, 0.5, 1, 2, 3, 6, 12, 24, 48, 120, 240, 720, 2160, 8760, 43_800, 87_600)


class Stretch(NamedTuple):
    """A stretch of time in one split, or of missing frames."""

    start: datetime
    end: datetime
    split: str
    """A split's name, or "gap"."""
    text: str
    """What a reader sees who points at it."""


class Lane(NamedTuple):
    """One row of a coverage chart."""

    label: str
    start: datetime
    end: datetime
    stretches: Sequence[Stretch]
    note: str = ""


def histogram_chart(statistics: Mapping[str, Any], units: Units, scale: ColourScale) -> Html:
    """Percentages of the observed pixels by value, on a logarithmic axis, in the colours shown."""
    counts = np.asarray(statistics["histogram"]["counts"], np.float64)
    codes_per_bin = int(statistics["histogram"]["codes_per_bin"])
    group = -(-len(counts) // _MOST_BARS)
    starts = np.arange(0, len(counts), group)
    shares = np.add.reduceat(counts, starts) / max(counts.sum(), 1)
    edges = units.offset + units.scale * np.minimum(
        np.append(starts, len(counts)) * codes_per_bin, units.max_code + 1
    )
    lowest = min((share for share in shares if share > 0), default=0.01)
    decades = min(6, max(2, math.ceil(-math.log10(lowest))))
    left, top, width, height = 64, 12, _HISTOGRAM_WIDTH - 84, 230
    parts = []
    for power in range(decades + 1):
        y = top + height * power / decades
        percent = np.format_float_positional(100 / 10**power, trim="-")
        parts.append(_line(left, y, left + width, y, "var(--line)"))
        parts.append(_text(left - 8, y + 4, f"{percent} %", anchor="end"))
    low, high = float(edges.min()), float(edges.max())

    def x_of(value: float) -> float:
        return left + width * (value - low) / (high - low)

    for share, one, other in zip(shares, edges, edges[1:], strict=False):
        if share <= 0:
            continue
        tall = height * max(0.02, 1 + math.log10(share) / decades)
        x, end = sorted((x_of(float(one)), x_of(float(other))))
        title = f"{min(one, other):.4g} to {max(one, other):.4g}: {100 * share:.3g} %"
        wide = max(0.8, end - x - 0.6)
        parts.append(
            f'<rect x="{x:.1f}" y="{top + height - tall:.1f}" width="{wide:.1f}" '
            f'height="{tall:.1f}" {_bar_paint(scale, float(min(one, other)))}>'
            f"<title>{html.escape(title)}</title></rect>"
        )
    bottom = top + height
    for tick in _round_ticks(low, high):
        parts.append(_line(x_of(tick), bottom, x_of(tick), bottom + 4, "var(--muted)"))
        parts.append(_text(x_of(tick), bottom + 18, f"{tick:g}"))
    parts.append(_line(left, bottom, left + width, bottom, "var(--muted)"))
    parts.append(_text(left + width / 2, bottom + 38, scale.label))
    what = f"Histogram of {scale.label}: percentage of observed pixels, logarithmic"
    return _svg(parts, bottom + 48, what, width=_HISTOGRAM_WIDTH)


def colour_bar(scale: ColourScale, *, shows_missing: bool) -> Html:
    """A lying colour bar with its name, its numbers and the look of missing areas."""
    width, top, height = 540, 22, 14
    right = width - (100 if shows_missing else 14)
    blocks = (scale.below_colour, *scale.colours)
    step = right / len(blocks)
    parts = [_text(0, 13, scale.label, anchor="start", css="ink")]
    for number, colour in enumerate(blocks):
        parts.append(
            f'<rect x="{number * step:.2f}" y="{top}" width="{step + 0.3:.2f}" height="{height}" '
            f'fill="{colour}"/>'
        )
    parts.append(_frame(0, top, right, height))
    if scale.is_continuous:
        low, high = scale.ticks[0], scale.ticks[-1]
        places = {tick: right * (tick - low) / (high - low) for tick in scale.ticks}
    else:
        places = {tick: step * (number + 1) for number, tick in enumerate(scale.bounds)}
    for tick, x in places.items():
        anchor = "start" if x < 4 else "end" if x > right - 4 else "middle"
        parts.append(_text(x, top + height + 15, tick_label(tick), anchor=anchor))
    if shows_missing:
        parts.append(_hatching("bar-hatch"))
        x = right + 26
        parts.append(
            f'<rect x="{x}" y="{top}" width="44" height="{height}" fill="url(#bar-hatch)"/>'
        )
        parts.append(_frame(x, top, 44, height))
        parts.append(_text(x + 22, top + height + 15, "no data"))
    return _svg(parts, top + height + 20, f"Colour bar: {scale.label}", width=width)


def overview_chart(lanes: Sequence[Lane]) -> Html:
    """Stretches on one time axis from the first to the last time, one lane a series."""
    start, end = min(lane.start for lane in lanes), max(lane.end for lane in lanes)
    left = _label_width([lane.label for lane in lanes])
    width = _WIDTH - left - 20
    span = max((end - start).total_seconds(), 1)

    def x_of(time: datetime) -> float:
        return left + width * (time - start).total_seconds() / span

    parts: list[str] = []
    for number, lane in enumerate(lanes):
        _draw_lane(parts, lane, 6 + 24 * number, x_of, left, left + width)
    bottom = 6 + 24 * len(lanes)
    for time, label in _calendar_ticks(start, end):
        parts.append(_line(x_of(time), bottom - 4, x_of(time), bottom, "var(--muted)"))
        parts.append(_text(x_of(time), bottom + 14, label))
    return _svg(parts, bottom + 20, "Time coverage from the first to the last frame, by split")


def event_chart(lanes: Sequence[Lane]) -> Html:
    """Stretches of each event, all events from their own first frame on one scale of hours."""
    left = _label_width([lane.label for lane in lanes])
    right = max(len(lane.note) for lane in lanes) * _LETTER_PX + 14
    width = _WIDTH - left - right
    hours = max((lane.end - lane.start).total_seconds() for lane in lanes) / 3600 or 1.0
    step = next((tick for tick in _TICK_HOURS if hours / tick <= 9), 876_000)
    parts: list[str] = []
    bottom = 6 + 24 * len(lanes)
    for number in range(int(hours / step) + 1):
        x = left + width * number * step / hours
        parts.append(_line(x, 4, x, bottom, "var(--line)"))
        value = number * step
        label = f"+{value:g} h" if step < 48 else f"+{value / 24:g} d"
        parts.append(_text(x, bottom + 14, label if number else "0"))
    for number, lane in enumerate(lanes):

        def x_of(time: datetime, start: datetime = lane.start) -> float:
            return left + width * (time - start).total_seconds() / 3600 / hours

        y = 6 + 24 * number
        _draw_lane(parts, lane, y, x_of, left, x_of(lane.end))
        if lane.note:
            parts.append(_text(_WIDTH, y + 13, lane.note, anchor="end"))
    what = "Events by the time since their first frame: splits in colours, gaps outlined"
    return _svg(parts, bottom + 20, what)


def group_chart(rows: Sequence[tuple[str, str, int]]) -> Html:
    """Bars of numbers of sequences, each row a group, a split and its number."""
    left = _label_width([group for group, _, _ in rows])
    most = max(number for _, _, number in rows)
    width = _WIDTH - left - 60
    parts = []
    for place, (group, split, number) in enumerate(rows):
        y = 4 + 22 * place
        long = max(1.5, width * number / most)
        parts.append(_text(left - 10, y + 12, _cut(group, left), anchor="end", css="ink"))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{long:.1f}" height="15" rx="2" '
            f'fill="{_split_fill(split)}"><title>{html.escape(group)}: {number} sequences of '
            f"{html.escape(split)}</title></rect>"
        )
        parts.append(_text(left + long + 8, y + 12, f"{number:,}", anchor="start"))
    return _svg(parts, 10 + 22 * len(rows), "Sequences by group, in the colours of the splits")


def parse_time(text: str) -> datetime:
    """Read an ISO time as UTC."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _draw_lane(
    parts: list[str], lane: Lane, y: float, x_of: Any, track_start: float, track_end: float
) -> None:
    parts.append(_text(track_start - 10, y + 13, lane.label, anchor="end", css="ink"))
    long = max(1, track_end - track_start)
    parts.append(
        f'<rect x="{track_start:.1f}" y="{y + 3}" width="{long:.1f}" height="12" '
        'fill="var(--panel)"/>'
    )
    # Gaps last: they must not vanish under the stretches around them.
    for stretch in sorted(lane.stretches, key=lambda one: (one.split == "gap", one.start)):
        x, end = x_of(stretch.start), x_of(stretch.end)
        title = f"<title>{html.escape(stretch.text)}</title>"
        if stretch.split == "gap":
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max(2, end - x):.2f}" height="18" '
                f'fill="var(--paper)" stroke="var(--gap)">{title}</rect>'
            )
        else:
            parts.append(
                f'<rect x="{x:.2f}" y="{y + 1}" width="{max(1.5, end - x):.2f}" height="16" '
                f'fill="{_split_fill(stretch.split)}">{title}</rect>'
            )


def _bar_paint(scale: ColourScale, value: float) -> str:
    if scale.is_continuous:
        return 'fill="var(--bar)"'
    step = int(np.searchsorted(scale.bounds, value, side="right"))
    colour = (scale.below_colour, *scale.colours)[step]
    return f'fill="{colour}" stroke="{OUTLINE}" stroke-width="0.5"'


def _split_fill(split: str) -> str:
    return f"var({SPLIT_COLOURS[split]})" if split in SPLITS else "var(--muted)"


def _label_width(labels: Sequence[str]) -> float:
    return min(240.0, max(len(label) for label in labels) * _LETTER_PX + 16)


def _cut(text: str, width_px: float) -> str:
    most = max(4, int((width_px - 16) / _LETTER_PX))
    return text if len(text) <= most else "…" + text[1 - most :]


def _round_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _calendar_ticks(start: datetime, end: datetime) -> list[tuple[datetime, str]]:
    """Round times of the calendar, at most about eight."""
    hours = (end - start).total_seconds() / 3600
    if hours <= 24 * 60:
        step_hours = next(step for step in (1, 2, 3, 6, 12, 24, 48, 120, 240) if hours / step <= 8)
        time = start.replace(hour=0, minute=0, second=0, microsecond=0)
        ticks = []
        while time <= end:
            if time >= start:
                ticks.append((time, f"{time:%d %b}" if step_hours >= 24 else f"{time:%d %b %H:%M}"))
            time += timedelta(hours=step_hours)
        return ticks
    months = hours / 24 / 30.4
    step_months = next((step for step in (1, 3, 6, 12, 24, 60) if months / step <= 8), 120)
    first = start.year * 12 // step_months * step_months
    ticks = []
    for month in range(first, end.year * 12 + end.month, step_months):
        time = datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC)
        if start <= time <= end:
            ticks.append((time, f"{time:%Y}" if step_months >= 12 else f"{time:%b %Y}"))
    return ticks


def _svg(parts: Sequence[str], height: float, what: str, width: float = _WIDTH) -> Html:
    return Html(
        f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{html.escape(what)}">'
        + "".join(parts)
        + "</svg>"
    )


def _line(x: float, y: float, end_x: float, end_y: float, stroke: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end_x:.1f}" y2="{end_y:.1f}" stroke="{stroke}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", css: str = "") -> str:
    style = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(text)}</text>'


def _frame(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{width - 1:.1f}" '
        f'height="{height - 1:.1f}" fill="none" stroke="{OUTLINE}"/>'
    )


def _hatching(name: str) -> str:
    return (
        f'<defs><pattern id="{name}" width="5" height="5" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="5" height="5" fill="{MISSING}"/>'
        f'<rect width="1.2" height="5" fill="{MISSING_LINE}"/></pattern></defs>'
    )
