"""Which video frames become which sequences: splits by group, runs without gaps, windows.

`plan_video` is a pure function of the facts about the frames, the data set's reader and the
settings, in this order:

    1. frames of each series in order; runs of frames that follow each other without a gap
    2. a split for each group (person or recording), never for single frames or windows
    3. windows along the runs, by the data set's protocol
    4. a check that no two splits show the same pictures

Two exceptions to 2, each said in the report: a single clip is cut in time, with a gap of a whole
window between splits; and the Human3.6M protocol of the papers draws validation sequences from
those of training.
"""

from __future__ import annotations

import hashlib
import logging
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from data_prep.readers.video import VideoReader, WindowRule, natural_key
from data_prep.source import FrameRecord, Plan, SequencePlan
from data_prep.splits import keyed_uniform
from data_prep.video_splits import Splits, VideoPlanSettings, split_frames
from tmu_dist.data.manifest import SPLITS

MOST_LISTED = 1000
"""Rows of a list in the report; the number of all is beside it."""
_LONGEST_NAME = 40  # a tar member's name ends at 100 characters
_SPACING_TOLERANCE = 1e-6

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """Frames of one series that follow each other without a gap, in one split."""

    series: str
    split: str
    indices: tuple[int, ...]
    """Of the records."""


def plan_video(
    records: Sequence[FrameRecord],
    reader: VideoReader,
    settings: VideoPlanSettings,
    size: tuple[int, int],
) -> Plan:
    """Return which sequences an archive gets, and a report of what it does not get.

    Args:
        records: facts about all converted frames; their order plays no part.
        reader: of the data set: its window and split rules.
        settings: how to cut.
        size: height and width of the converted frames.

    Raises:
        ValueError: nothing is left, groups that do not exist, a split that stays empty although
            its groups were named, or splits that show the same pictures; says how many and which.
    """
    series = _series(records)
    if not series:
        raise ValueError("There is no frame to plan from: no file was converted.")
    spacings = {name: _spacing(records, own, reader, settings) for name, own in series.items()}
    everything = dict.fromkeys(range(len(records)), "train")
    runs = _runs(records, series, spacings, everything)
    sizes = _group_sizes(records, runs, settings)
    if not sizes:
        raise ValueError(_nothing_left(series, runs, settings))
    splits = split_frames(records, series, sizes, reader, settings)
    runs = _runs(records, series, spacings, splits.by_index)
    sequences = _sequences(records, series, runs, reader, settings)
    if not sequences:
        raise ValueError(_nothing_left(series, runs, settings))
    if settings.drawn_val_sequences:
        sequences = _draw_validation(sequences, settings)
    sequences.sort(key=lambda sequence: SPLITS.index(sequence.split))
    _check_named_splits(sequences, settings)
    shared = _shared_pictures(records, sequences, settings.frames)
    present = {sequence.split for sequence in sequences}
    absent = [split for split in SPLITS if split not in present]
    if absent:
        logger.warning("No sequence for %s: %s", " and ".join(absent), splits.rule)
    report = {
        "split_rule": splits.rule,
        "notes": [*splits.notes, *reader.notes()],
        "absent_splits": absent,
        "frames": _frame_counts(records, splits, sequences),
        "sequences": {"written": len(sequences)},
        "splits": _split_table(records, sequences),
        "gaps": _gaps(records, series, spacings),
        "duplicate_clips": _duplicate_series(records, series),
        "pictures_in_two_splits": shared,
    }
    return Plan(
        sequences=tuple(sequences),
        num_frames=settings.frames,
        height=size[0],
        width=size[1],
        report=report,
    )


def _series(records: Sequence[FrameRecord]) -> dict[str, list[int]]:
    """Return the records of each series in order.

    Raises:
        ValueError: a series has two frames at one place.
    """
    series: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        series.setdefault(record.series, []).append(index)
    for name, own in series.items():
        own.sort(key=lambda index: records[index].order)
        for before, after in pairwise(own):
            if records[before].order == records[after].order:
                raise ValueError(
                    f"Clip {name!r} has two frames number {records[after].order:g}: "
                    f"{records[before].file} and {records[after].file}. Remove one."
                )
    return {name: series[name] for name in sorted(series, key=natural_key)}


def _spacing(
    records: Sequence[FrameRecord],
    own: Sequence[int],
    reader: VideoReader,
    settings: VideoPlanSettings,
) -> float:
    """Return the difference of the numbers of two neighbours."""
    if reader.spacing is not None:
        return reader.spacing * settings.every
    orders = [records[index].order for index in own]
    steps = [after - before for before, after in pairwise(orders)]
    return statistics.median_low(steps) if steps else settings.every


def _runs(
    records: Sequence[FrameRecord],
    series: Mapping[str, Sequence[int]],
    spacings: Mapping[str, float],
    split_of: Mapping[int, str],
) -> list[Run]:
    """Cut every series where a frame is missing, and where the split changes."""
    runs = []
    for name, own in series.items():
        current: list[int] = []
        for index in own:
            if current and (
                not _follows(records, current[-1], index, spacings[name])
                or split_of.get(current[-1]) != split_of.get(index)
            ):
                runs.append((name, current))
                current = []
            current.append(index)
        runs.append((name, current))
    return [
        Run(name, split_of[indices[0]], tuple(indices))
        for name, indices in runs
        if indices[0] in split_of
    ]


def _follows(records: Sequence[FrameRecord], one: int, other: int, spacing: float) -> bool:
    step = records[other].order - records[one].order
    return abs(step - spacing) <= _SPACING_TOLERANCE * spacing


def _group_sizes(
    records: Sequence[FrameRecord], runs: Sequence[Run], settings: VideoPlanSettings
) -> dict[str, float]:
    """Return how many sequences without overlap each group has; groups without any are missing."""
    sizes: Counter[str] = Counter()
    for run in runs:
        spare = len(run.indices) - settings.span
        if spare >= 0:
            sizes[records[run.indices[0]].group] += spare // settings.distance + 1
    return {group: float(number) for group, number in sizes.items()}


def _sequences(
    records: Sequence[FrameRecord],
    series: Mapping[str, Sequence[int]],
    runs: Sequence[Run],
    reader: VideoReader,
    settings: VideoPlanSettings,
) -> list[SequencePlan]:
    """Cut the runs into windows, in the order of series and time."""
    names = _names(series)
    sequences = []
    for run in runs:
        rule = reader.window_rule(run.series, len(series[run.series]), settings.distance, run.split)
        if settings.stride is not None:
            rule = WindowRule(settings.stride // settings.every, rule.backwards)
        for start in _starts(len(run.indices), settings.span, rule):
            frames = run.indices[start : start + settings.span : settings.step]
            first = records[frames[0]]
            sequences.append(
                SequencePlan(
                    split=run.split,
                    key=f"{reader.name}-{names[run.series]}-{first.order:04.0f}",
                    frames=frames,
                    meta={
                        "clip": run.series,
                        "group": first.group,
                        "file": first.file,
                        "first_frame": int(first.order),
                        "frame_step": settings.frame_step,
                    },
                )
            )
    return sequences


def _starts(num_frames: int, span: int, rule: WindowRule) -> Iterable[int]:
    """Return where windows start in a run, rising."""
    last = num_frames - span
    if last < 0:
        return ()
    if rule.backwards:
        return range(last % rule.stride, last + 1, rule.stride)
    return range(0, last + 1, rule.stride)


def _names(series: Iterable[str]) -> dict[str, str]:
    """Return series names that may stand in keys; one that had to be changed gets a hash."""
    names = {}
    for name in series:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:_LONGEST_NAME].strip("_-")
        if plain != name:
            plain = f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}".lstrip("-")
        names[name] = plain
    return names


def _draw_validation(
    sequences: Sequence[SequencePlan], settings: VideoPlanSettings
) -> list[SequencePlan]:
    """Move the drawn number of training sequences to validation, by a keyed hash of their keys."""
    training = [sequence for sequence in sequences if sequence.split == "train"]
    if len(training) <= settings.drawn_val_sequences:
        raise ValueError(
            f"{settings.drawn_val_sequences} validation sequences cannot be drawn from "
            f"{len(training)} training sequences: lower val_sequences."
        )
    training.sort(key=lambda sequence: keyed_uniform(settings.seed, "val", sequence.key))
    drawn = {sequence.key for sequence in training[: settings.drawn_val_sequences]}
    return [
        SequencePlan(split="val", key=one.key, frames=one.frames, meta=one.meta)
        if one.key in drawn
        else one
        for one in sequences
    ]


def _check_named_splits(sequences: Sequence[SequencePlan], settings: VideoPlanSettings) -> None:
    present = {sequence.split for sequence in sequences}
    for split, names in settings.groups.items():
        if names and split not in present:
            raise ValueError(
                f"No sequence for {split}: none of the groups named for it ({', '.join(names)}) "
                f"has a clip of {settings.span * settings.every} frames in a row."
            )


def _shared_pictures(
    records: Sequence[FrameRecord], sequences: Sequence[SequencePlan], most: int
) -> dict[str, int]:
    """Count different pictures that two splits show, by pair of splits.

    Raises:
        ValueError: groups of different splits share as many as a sequence has; names both.
    """
    places: dict[str, set[tuple[str, str]]] = defaultdict(set)
    files: dict[tuple[str, str], str] = {}
    for sequence in sequences:
        for index in sequence.frames:
            place = sequence.split, records[index].group
            places[records[index].digest].add(place)
            files.setdefault(place, records[index].file)
    by_groups: Counter[tuple[tuple[str, str], tuple[str, str]]] = Counter()
    by_splits: Counter[str] = Counter()
    for shared in places.values():
        if len(shared) == 1:
            continue
        ordered = sorted(shared, key=lambda place: (SPLITS.index(place[0]), place[1]))
        pairs = [(a, b) for a, b in combinations(ordered, 2) if a[0] != b[0]]
        by_splits.update({f"{a[0]} and {b[0]}" for a, b in pairs})
        by_groups.update(pair for pair in pairs if pair[0][1] != pair[1][1])
    for (one, other), number in by_groups.most_common(1):
        if number >= most:
            raise ValueError(
                f"{one[0]} and {other[0]} would show the same {number} pictures: groups "
                f"{one[1]!r} (such as {files[one]}) and {other[1]!r} (such as {files[other]}) "
                "have them in common. Remove the copy, or make them one group (group_pattern), or "
                "name them for the same split (train_groups, val_groups, test_groups)."
            )
    return dict(by_splits)


def _frame_counts(
    records: Sequence[FrameRecord], splits: Splits, sequences: Sequence[SequencePlan]
) -> dict[str, Any]:
    used = {index for sequence in sequences for index in sequence.frames}
    return {
        "found": len(records),
        "used": len(used),
        "left_out": {
            "in_no_split": len(records) - len(splits.by_index),
            "in_no_sequence": len(splits.by_index) - len(used),
        },
    }


def _split_table(
    records: Sequence[FrameRecord], sequences: Sequence[SequencePlan]
) -> dict[str, Any]:
    """Return numbers and groups (with their sequences) of each split."""
    table = {}
    for split in SPLITS:
        own = [sequence for sequence in sequences if sequence.split == split]
        if not own:
            continue
        groups = Counter(str(sequence.meta["group"]) for sequence in own)
        ordered = sorted(groups.items(), key=lambda item: natural_key(item[0]))
        table[split] = {
            "sequences": len(own),
            "frames_in_sequences": len({i for sequence in own for i in sequence.frames}),
            "clips": len({sequence.meta["clip"] for sequence in own}),
            "groups": {"number": len(groups), "sequences": dict(ordered[:MOST_LISTED])},
        }
    return table


def _gaps(
    records: Sequence[FrameRecord],
    series: Mapping[str, Sequence[int]],
    spacings: Mapping[str, float],
) -> dict[str, Any]:
    """Return where frames are missing inside a series."""
    rows = [
        {"clip": name, "after": records[one].order, "before": records[other].order}
        for name, own in series.items()
        for one, other in pairwise(own)
        if not _follows(records, one, other, spacings[name])
    ]
    return {"number": len(rows), "list": rows[:MOST_LISTED]}


def _duplicate_series(
    records: Sequence[FrameRecord], series: Mapping[str, Sequence[int]]
) -> list[list[str]]:
    """Return the names of series that have exactly the same pictures in the same order."""
    same: dict[str, list[str]] = defaultdict(list)
    for name, own in series.items():
        digests = "".join(records[index].digest for index in own)
        same[hashlib.sha256(digests.encode()).hexdigest()].append(name)
    return [names for names in same.values() if len(names) > 1]


def _nothing_left(
    series: Mapping[str, Sequence[int]], runs: Sequence[Run], settings: VideoPlanSettings
) -> str:
    longest = max((len(run.indices) for run in runs), default=0)
    total = sum(len(own) for own in series.values())
    return (
        f"No sequence is left: {total} frames of {len(series)} clips make {len(runs)} runs without "
        f"a gap, of at most {longest} frames, and {settings.frames} frames at a step of "
        f"{settings.frame_step} need {settings.span}. Lower frames or frame_step; where numbers in "
        "image names or times in videos do not say what follows what, use --numbering counted."
    )
