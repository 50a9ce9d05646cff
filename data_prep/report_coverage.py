"""Time coverage of radar archives, and groups of video archives, for the page about an archive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from data_prep.report_charts import (
    Lane,
    Stretch,
    event_chart,
    group_chart,
    overview_chart,
    parse_time,
)
from data_prep.report_html import section, split_name, table
from tmu_dist.data.manifest import SPLITS, Manifest
from tmu_dist.html_page import Html, element

_MOST_EVENTS, _MOST_SERIES, _MOST_GROUPS, _MOST_GAPS = 40, 16, 60, 50


def coverage_parts(manifest: Manifest, plan: Mapping[str, Any]) -> list[Html]:
    """Charts of when (or of whom) there are frames, by split, with gaps."""
    runs, events = (
        _rows(plan, "runs", "from", "to", "split"),
        _rows(plan, "events", "first", "last"),
    )
    if runs and events:
        return _time_parts(manifest, plan, runs, events)
    if groups := _groups(plan):
        return _group_parts(plan, groups)
    what = "the archive's report.json has neither times nor groups"
    if not plan:
        what = "the archive has no report.json"
    text = f"Time coverage and gaps: left out, because {what}."
    return [element("h2", "Coverage"), element("p", text, css="small")]


def _time_parts(
    manifest: Manifest,
    plan: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
) -> list[Html]:
    step = timedelta(minutes=manifest.frame_interval_minutes or 0)
    quality = section(plan, "quality")
    gaps = _rows(quality, "gaps", "from", "to")
    stretches = _stretches(runs, gaps, step)
    parts = [element("h2", "Time coverage and gaps"), _legend(runs, bool(gaps))]
    if len(events) > 1:
        lanes = _series_lanes(stretches)
        parts += [
            element("h3", "From the first to the last frame"),
            scrolled_chart(overview_chart(lanes)),
        ]
        if len(stretches) > _MOST_SERIES:
            parts.append(_more(len(stretches) - _MOST_SERIES, "series"))
    lanes = _event_lanes(events[:_MOST_EVENTS], stretches, step)
    title = "Event by event, from the first frame of each" if len(events) > 1 else "The event"
    if lanes:
        parts += [element("h3", title), scrolled_chart(event_chart(lanes))]
    events_number = plan["events"].get("number", len(events))
    if events_number > _MOST_EVENTS:
        parts.append(_more(events_number - _MOST_EVENTS, "events"))
    return [*parts, *_gap_table(gaps, section(quality, "gaps").get("number", len(gaps)))]


def _rows(record: Any, name: str, *needed: str) -> list[Mapping[str, Any]]:
    """The rows of a report's table that have what is needed; [] where there is no such table."""
    part = record.get(name) if isinstance(record, Mapping) else None
    rows = part.get("list") if isinstance(part, Mapping) else None
    if not isinstance(rows, list):
        return []
    return [row for row in rows if isinstance(row, Mapping) and row.keys() >= set(needed)]


def _stretches(
    runs: Sequence[Mapping[str, Any]], gaps: Sequence[Mapping[str, Any]], step: timedelta
) -> dict[str, list[Stretch]]:
    """Runs and gaps by series; a run lasts until the time that its next frame would have."""
    found: dict[str, list[Stretch]] = {}
    for run in runs:
        start, end = parse_time(run["from"]), parse_time(run["to"])
        text = f"{run['split']}: {_span_text(start, end)}, {run.get('frames', '?')} frames"
        stretch = Stretch(start, end + step, run["split"], text)
        found.setdefault(run.get("series", ""), []).append(stretch)
    for gap in gaps:
        start, end = parse_time(gap["from"]), parse_time(gap["to"])
        text = f"gap: {_span_text(start, end)}, {gap.get('missing', 0)} frames missing"
        # From when the first missing frame was due.
        stretch = Stretch(min(start + step, end), end, "gap", text)
        found.setdefault(gap.get("series", ""), []).append(stretch)
    return found


def _series_lanes(stretches: Mapping[str, Sequence[Stretch]]) -> list[Lane]:
    lanes = []
    for series, own in sorted(stretches.items())[:_MOST_SERIES]:
        start, end = min(one.start for one in own), max(one.end for one in own)
        lanes.append(Lane(_label(series) if series else "all frames", start, end, own))
    return lanes


def _event_lanes(
    events: Sequence[Mapping[str, Any]],
    stretches: Mapping[str, Sequence[Stretch]],
    step: timedelta,
) -> list[Lane]:
    lanes = []
    for event in events:
        start, end = parse_time(event["first"]), parse_time(event["last"])
        for series, own in sorted(stretches.items()):
            inside = [one for one in own if start <= one.start <= end]
            if not inside:
                continue
            label = f"{start:%Y-%m-%d %H:%M}"
            if len(stretches) > 1 and series:
                label = f"{_label(series)}  {label}"
            note = f"{event.get('frames', 0):,} frames"
            lanes.append(Lane(label, start, end + step, inside, note))
    return lanes[:_MOST_EVENTS]


def _label(series: str) -> str:
    return series if len(series) <= 18 else f"{series[:17]}…"


def _legend(runs: Sequence[Mapping[str, Any]], has_gaps: bool) -> Html:
    present = {run.get("split") for run in runs}
    names = [element("span", split_name(split), css="key") for split in SPLITS if split in present]
    if has_gaps:
        box = "border: 1px solid var(--gap); border-radius: 0"
        names.append(
            element("span", element("span", "", css="swatch", style=box), "gap", css="key")
        )
    text = "Grey: no frame, or one that is in no split. Times are UTC."
    return element("p", *names, element("span", text), css="small")


def _gap_table(gaps: Sequence[Mapping[str, Any]], number: int) -> list[Html]:
    if not gaps:
        return [element("p", "No gap inside any event.")]
    rows = [
        [
            _span_text(parse_time(gap["from"]), parse_time(gap["to"])),
            str(gap.get("series", "")),
            f"{gap.get('missing', 0):,}",
        ]
        for gap in gaps[:_MOST_GAPS]
    ]
    headings = ["Gap (last frame before, first frame after)", "Series", "Frames missing"]
    if not any(row[1] for row in rows):
        rows, headings = [[row[0], row[2]] for row in rows], [headings[0], headings[2]]
    parts = [table(headings, rows, words=len(headings) - 1)]
    if number > _MOST_GAPS:
        parts.append(_more(number - _MOST_GAPS, "gaps"))
    return parts


def _groups(plan: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Group, split and number of sequences, split by split."""
    rows: list[tuple[str, str, int]] = []
    splits = plan.get("splits")
    for split in SPLITS:
        table_of = splits.get(split) if isinstance(splits, Mapping) else None
        groups = table_of.get("groups") if isinstance(table_of, Mapping) else None
        sequences = groups.get("sequences") if isinstance(groups, Mapping) else None
        if isinstance(sequences, Mapping):
            rows += [(str(group), split, int(number)) for group, number in sequences.items()]
    return rows


def _group_parts(plan: Mapping[str, Any], groups: list[tuple[str, str, int]]) -> list[Html]:
    legend = [
        element("span", split_name(split), css="key")
        for split in SPLITS
        if split in {row[1] for row in groups}
    ]
    parts = [
        element("h2", "Groups and gaps"),
        element("p", *legend, element("span", "Sequences of each group."), css="small"),
        scrolled_chart(group_chart(groups[:_MOST_GROUPS])),
    ]
    if len(groups) > _MOST_GROUPS:
        parts.append(_more(len(groups) - _MOST_GROUPS, "groups"))
    gaps = _rows(plan, "gaps")
    if not gaps:
        return [*parts, element("p", "No frame is missing inside any clip.")]
    rows = [
        [str(gap.get("clip", "")), f"{gap.get('after', 0):g}", f"{gap.get('before', 0):g}"]
        for gap in gaps[:_MOST_GAPS]
    ]
    parts.append(table(["Gap in clip", "After frame", "Before frame"], rows))
    number = plan["gaps"].get("number", len(gaps))
    if number > _MOST_GAPS:
        parts.append(_more(number - _MOST_GAPS, "gaps"))
    return parts


def scrolled_chart(chart: Html) -> Html:
    """A chart that scrolls sideways on a narrow screen instead of getting too small to read."""
    return element("div", element("div", chart, css="chart"), css="scroll")


def _more(number: int, what: str) -> Html:
    return element("p", f"And {number:,} more {what}; see report.json.", css="small")


def _span_text(start: datetime, end: datetime) -> str:
    same_day = start.date() == end.date()
    return f"{start:%Y-%m-%d %H:%M} to {end:{'%H:%M' if same_day else '%Y-%m-%d %H:%M'}}"
