"""What a radar plan leaves behind for report.json: numbers of frames and sequences, and tables.

Every frame that was found is in one of the numbers of `frames`: used, or left out for one reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_prep.quality import MOST_LISTED, Run
from data_prep.source import FrameRecord
from data_prep.splits import iso_time
from data_prep.windows import FilteredSamples
from tmu_dist.data.manifest import SPLITS


class PlannedSplit(NamedTuple):
    """What happens to one split on the way."""

    near_another: int
    """Frames left out because they are close to another split."""
    frames: list[int]
    """The others, in order."""
    runs: list[Run]
    windows: int
    result: FilteredSamples


def split_report(
    records: Sequence[FrameRecord],
    splits: Mapping[str, PlannedSplit],
    events: Mapping[int, str],
    *,
    num_unique: int,
) -> dict[str, Any]:
    """Return JSON values: `frames` and `sequences` (written, left out by reason), tables.

    The tables are `splits` by name, `events` and `runs` by time (for charts of time coverage); the
    last two have at most 1,000 rows in `list` and say in `number` how many there are.

    Args:
        records: facts about all frames.
        splits: what became of each split.
        events: the event of each frame in which something was observed.
        num_unique: frames that are no duplicates.
    """
    staying = sum(len(split.frames) for split in splits.values())
    used = sum(len(_frames_used(split)) for split in splits.values())
    results = [split.result for split in splits.values()]
    return {
        "frames": {
            "found": len(records),
            "used": used,
            "left_out": {
                "duplicates": len(records) - num_unique,
                "nothing_observed": num_unique - len(events),
                "near_another_split": sum(split.near_another for split in splits.values()),
                "in_no_sequence": staying - used,
            },
        },
        "sequences": {
            "written": sum(len(result.samples) for result in results),
            "dry_written": sum(result.dry_kept for result in results),
            "left_out": {
                "too_little_observed": sum(result.too_little_observed for result in results),
                "too_dry": sum(result.dry - result.dry_kept for result in results),
            },
        },
        "splits": _split_table(records, splits, events),
        "events": _event_table(records, splits, events),
        "runs": _run_table(records, splits),
    }


def _frames_used(split: PlannedSplit) -> set[int]:
    return {index for sample in split.result.samples for index in sample.frames}


def _split_table(
    records: Sequence[FrameRecord], splits: Mapping[str, PlannedSplit], events: Mapping[int, str]
) -> dict[str, Any]:
    """Return one row for each split that has frames; times are those of its frames in sequences."""
    table = {}
    for name, split in splits.items():
        used = _frames_used(split)
        if not split.frames and not split.near_another:
            continue
        orders = [records[index].order for index in used]
        table[name] = {
            "frames": len(split.frames),
            "near_another_split": split.near_another,
            "frames_in_sequences": len(used),
            "sequences": len(split.result.samples),
            "too_little_observed": split.result.too_little_observed,
            "too_dry": split.result.dry - split.result.dry_kept,
            "dry_kept": split.result.dry_kept,
            "events": len({events[index] for index in used}),
            "first": iso_time(min(orders)) if orders else None,
            "last": iso_time(max(orders)) if orders else None,
        }
    return table


def _event_table(
    records: Sequence[FrameRecord], splits: Mapping[str, PlannedSplit], events: Mapping[int, str]
) -> dict[str, Any]:
    """Return the events in order of time, and how many frames of each go to which split."""
    times: dict[str, list[float]] = {}
    for index, event in events.items():
        times.setdefault(event, []).append(records[index].order)
    counts = {event: dict.fromkeys(SPLITS, 0) for event in times}
    for name, split in splits.items():
        for index in split.frames:
            counts[events[index]][name] += 1
    rows = [
        {
            "event": event,
            "first": iso_time(min(orders)),
            "last": iso_time(max(orders)),
            "frames": len(orders),
            "splits": {split: count for split, count in counts[event].items() if count},
        }
        for event, orders in sorted(times.items(), key=lambda item: min(item[1]))
    ]
    return {"number": len(rows), "list": rows[:MOST_LISTED]}


def _run_table(
    records: Sequence[FrameRecord], splits: Mapping[str, PlannedSplit]
) -> dict[str, Any]:
    """Return the runs of all splits in order of time."""
    runs = sorted(
        (records[run.frames[0]].order, run.series, name, run)
        for name, split in splits.items()
        for run in split.runs
    )
    rows = [
        {
            "series": series,
            "split": name,
            "from": iso_time(start),
            "to": iso_time(records[run.frames[-1]].order),
            "frames": len(run.frames),
        }
        for start, series, name, run in runs
    ]
    return {"number": len(rows), "list": rows[:MOST_LISTED]}
