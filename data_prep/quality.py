"""What is wrong with a series of radar frames: duplicates, stuck radars, gaps, odd intervals.

Pure functions of the facts about the frames (`data_prep.source.FrameRecord`). Nothing is repaired:
frames are left out or named, and everything is counted for the report.

Records are spoken of by their index in the list that was given, in the order of `in_order`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from data_prep.source import FrameRecord
from data_prep.splits import iso_time

TOLERANCE_MINUTES = 5 / 60
"""Times of products differ from their nominal ones by seconds; up to this they count as equal."""

MOST_LISTED = 1000
"""Entries of a list in a report; what is beyond is in its count."""

_MOST_NAMED = 5


class DuplicateError(ValueError):
    """Different frames for one time of one series."""


def in_order(records: Sequence[FrameRecord]) -> list[int]:
    """Return the records' indices by series, time and origin: the same for any permutation."""

    def key(index: int) -> tuple[object, ...]:
        record = records[index]
        return record.series, record.order, record.file, record.key, record.digest

    return sorted(range(len(records)), key=key)


class Deduplicated(NamedTuple):
    """Frames of which each series has one at a time."""

    kept: list[int]
    """In order."""
    identical: list[tuple[int, int]]
    """Left out, with the kept frame that it equals."""
    different: list[tuple[int, int]]
    """Left out, with the kept frame of the same time that it does not equal."""


def without_duplicates(
    records: Sequence[FrameRecord], *, keep_first_of_different: bool = False
) -> Deduplicated:
    """Leave out all but the first of several frames of one time in one series.

    Args:
        records: the frames.
        keep_first_of_different: where they differ in content, too, keep the first by file name;
            otherwise that is an error, because nobody but the user can know which one is right.

    Raises:
        DuplicateError: names up to five pairs of files.
    """
    kept: list[int] = []
    identical: list[tuple[int, int]] = []
    different: list[tuple[int, int]] = []
    for index in in_order(records):
        record = records[index]
        first = records[kept[-1]] if kept else None
        if first is None or (first.series, first.order) != (record.series, record.order):
            kept.append(index)
        elif first.digest == record.digest:
            identical.append((index, kept[-1]))
        else:
            different.append((index, kept[-1]))
    if different and not keep_first_of_different:
        pairs = [
            f"{iso_time(records[index].order)}: {origin(records[first])} and "
            f"{origin(records[index])}"
            for index, first in different[:_MOST_NAMED]
        ]
        more = f"; and {len(different) - len(pairs)} more" if len(different) > len(pairs) else ""
        raise DuplicateError(
            f"{len(different)} frames differ from another one of the same time and series: "
            f"{'; '.join(pairs)}{more}. If they are two products or places, give them names of "
            "their own (series); if one replaces the other, remove the files that do not count."
        )
    return Deduplicated(kept, identical, different)


def frozen_stretches(records: Sequence[FrameRecord], kept: Sequence[int]) -> list[dict[str, Any]]:
    """Return stretches of successive, equal frames with rain: a radar or a product got stuck.

    Rain never shows the same pixels twice. Dry frames do, so only frames with some wet pixel, or
    of unknown wetness, are looked at. The frames stay in the archive; the report names them.
    """
    stretches: list[list[FrameRecord]] = []
    for before, after in pairwise(records[index] for index in kept):
        wet = before.wet_fraction is None or before.wet_fraction > 0
        if wet and before.series == after.series and before.digest == after.digest:
            if stretches and stretches[-1][-1] is before:
                stretches[-1].append(after)
            else:
                stretches.append([before, after])
    return [
        {
            "series": stretch[0].series,
            "from": iso_time(stretch[0].order),
            "to": iso_time(stretch[-1].order),
            "frames": len(stretch),
        }
        for stretch in stretches
    ]


@dataclass(frozen=True, slots=True)
class SeriesInterval:
    """Time from one frame of a series to the next."""

    interval_minutes: float
    """The declared one, or else the step that occurs most often."""
    common_minutes: float | None
    """The step that occurs most often; None of a single frame."""
    steps: Mapping[float, int]
    """How often each step occurs, in minutes rounded to whole seconds."""

    def most_frequent(self, number: int) -> list[tuple[float, int]]:
        """Return the most frequent steps and how often they occur, of equal ones the shortest."""
        return sorted(self.steps.items(), key=lambda item: (-item[1], item[0]))[:number]

    @property
    def differs(self) -> bool:
        """Whether the frames come at another interval than the declared one."""
        return (
            self.common_minutes is not None
            and abs(self.common_minutes - self.interval_minutes) > TOLERANCE_MINUTES
        )


def intervals_by_series(
    records: Sequence[FrameRecord],
    kept: Sequence[int],
    declared_minutes: float | None,
) -> dict[str, SeriesInterval]:
    """Return the interval of every series; of equally frequent steps the shortest.

    Args:
        records: the frames.
        kept: those that count, in order.
        declared_minutes: what the product says; None: estimate it.

    Raises:
        ValueError: nothing is declared and no series has two frames.
    """
    times: dict[str, list[float]] = {}
    for index in kept:
        times.setdefault(records[index].series, []).append(records[index].order)
    steps = {
        series: Counter(round((after - before) * 60) / 60 for before, after in pairwise(orders))
        for series, orders in times.items()
    }
    common = {series: most_common_step(counter) for series, counter in steps.items()}
    # A series of one frame says nothing of its own.
    known = sorted(step for step in common.values() if step is not None)
    if declared_minutes is None and not known:
        raise ValueError(
            "The time between frames is unknown: the files do not declare it, and no series has "
            f"two frames ({len(kept)} frames in {len(times)} series). Give the interval, or look "
            "whether times and series are read from the right place."
        )
    found = {}
    for series, counter in steps.items():
        interval = declared_minutes or common[series] or known[0]
        found[series] = SeriesInterval(interval, common[series], dict(sorted(counter.items())))
    return found


def most_common_step(steps: Mapping[float, int]) -> float | None:
    """Return the step in minutes that occurs most often, of equally frequent ones the shortest."""
    return min(steps, key=lambda step: (-steps[step], step)) if steps else None


class Gap(NamedTuple):
    """Frames that should be there and are not."""

    series: str
    before: float
    """Time of the last frame before the gap."""
    after: float
    """Time of the first frame after it."""
    missing: int
    """Frames that would fill the gap; 0 where the step is irregular, and too short for one."""


def gaps_of(
    records: Sequence[FrameRecord],
    kept: Sequence[int],
    intervals: Mapping[str, SeriesInterval],
    pause_minutes: float = math.inf,
) -> list[Gap]:
    """Return every step of a series longer than its interval and shorter than a pause.

    Args:
        records: the frames.
        kept: those that count, in order.
        intervals: of every series.
        pause_minutes: steps of this length or longer lie between events; nothing is missing there.
    """
    gaps = []
    for before, after in pairwise(records[index] for index in kept):
        if before.series != after.series:
            continue
        interval = intervals[before.series].interval_minutes
        step = after.order - before.order
        if interval + TOLERANCE_MINUTES < step < pause_minutes:
            missing = max(0, round(step / interval) - 1)
            gaps.append(Gap(before.series, before.order, after.order, missing))
    return gaps


class Run(NamedTuple):
    """A longest stretch of frames that follow each other at exactly the interval."""

    series: str
    frames: tuple[int, ...]
    """Indices of the records, in order."""


def runs_of(
    records: Sequence[FrameRecord],
    kept: Sequence[int],
    interval_minutes: float | Mapping[str, float],
) -> list[Run]:
    """Return the runs at an interval (one for all series, or each series' own).

    Where the frames come more often than the interval (a series every 5 minutes, an interval of
    10), every frame starts a run or continues the one whose last frame is one interval before it:
    there are several interleaved runs, and a missing frame breaks one of them only. Ordered by
    series and first time; frames without a neighbour are runs of one.
    """
    runs: list[list[int]] = []
    waiting: list[list[int]] = []  # runs of this series that may go on, by their last time
    for index in kept:
        record = records[index]
        if waiting and records[waiting[0][-1]].series != record.series:
            waiting.clear()
        interval = (
            interval_minutes[record.series]
            if isinstance(interval_minutes, Mapping)
            else interval_minutes
        )
        wanted = record.order - interval
        while waiting and records[waiting[0][-1]].order < wanted - TOLERANCE_MINUTES:
            waiting.pop(0)
        if waiting and records[waiting[0][-1]].order <= wanted + TOLERANCE_MINUTES:
            run = waiting.pop(0)
            run.append(index)
        else:
            run = [index]
            runs.append(run)
        waiting.append(run)
    return [Run(records[run[0]].series, tuple(run)) for run in runs]


def quality_report(
    records: Sequence[FrameRecord],
    unique: Deduplicated,
    intervals: Mapping[str, SeriesInterval],
    pause_minutes: float = math.inf,
) -> dict[str, Any]:
    """Return what was found, as JSON values; `pause_minutes` as in `gaps_of`.

    `duplicates` (numbers and the first files), `frozen`, `gaps` (number, missing frames, list),
    `above_range` (pixels, frames, the worst frames), and `intervals` by series.
    """
    frozen = frozen_stretches(records, unique.kept)
    gaps = gaps_of(records, unique.kept, intervals, pause_minutes)
    above = [records[index] for index in unique.kept if records[index].above_range]
    worst = sorted(above, key=lambda record: (-record.above_range, origin(record)))
    return {
        "duplicates": {
            "identical": len(unique.identical),
            "different": len(unique.different),
            "files": [
                {"left_out": origin(records[index]), "kept": origin(records[first])}
                for index, first in sorted(
                    unique.identical + unique.different, key=lambda pair: origin(records[pair[0]])
                )[:MOST_LISTED]
            ],
        },
        "frozen": {
            "stretches": len(frozen),
            "frames": sum(item["frames"] for item in frozen),
            "list": frozen[:MOST_LISTED],
        },
        "gaps": {
            "number": len(gaps),
            "missing_frames": sum(gap.missing for gap in gaps),
            "list": [
                {
                    "series": gap.series,
                    "from": iso_time(gap.before),
                    "to": iso_time(gap.after),
                    "missing": gap.missing,
                }
                for gap in gaps[:MOST_LISTED]
            ],
        },
        "above_range": {
            "pixels": sum(record.above_range for record in above),
            "frames": len(above),
            "worst": [
                {"file": origin(record), "pixels": record.above_range}
                for record in worst[:_MOST_NAMED]
            ],
        },
        "intervals": [
            {
                "series": series,
                "interval_minutes": interval.interval_minutes,
                "common_minutes": interval.common_minutes,
                "differs_from_declared": interval.differs,
                "steps": [
                    {"minutes": step, "number": number}
                    for step, number in interval.most_frequent(_MOST_NAMED)
                ],
            }
            for series, interval in sorted(intervals.items())[:MOST_LISTED]
        ],
    }


def origin(record: FrameRecord) -> str:
    """Return file and key of a frame, for messages."""
    return f"{record.file} [{record.key}]" if record.key else record.file
