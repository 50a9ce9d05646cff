"""Which split each video frame belongs to: by group, and in time where there is only one clip.

Pure functions, like those of `data_prep.splits`, which draws the groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data_prep.readers.video import VideoReader, natural_key
from data_prep.source import FrameRecord
from data_prep.splits import assign_groups, check_proportions


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoPlanSettings:
    """How sequences are cut from video frames; numbers count frames of the files."""

    frames: int
    """Frames in a sequence."""
    frame_step: int
    """From one frame of a sequence to the next."""
    stride: int | None = None
    """From one start to the next; None: the data set's protocol."""
    every: int = 1
    """Only every n-th frame was converted; divides frame_step and stride."""
    groups: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    """Groups of each split as far as the user named them."""
    proportions: Mapping[str, float]
    """Shares of the splits, where neither the user nor a protocol names groups."""
    seed: int = 0
    """Of drawing groups, or validation sequences."""
    drawn_val_sequences: int = 0
    """Validation sequences to draw from those of training (Human3.6M, the papers' protocol)."""

    @property
    def step(self) -> int:
        """From one frame of a sequence to the next, in converted frames."""
        return self.frame_step // self.every

    @property
    def span(self) -> int:
        """Converted frames from the first to the last of a sequence, both included."""
        return (self.frames - 1) * self.step + 1

    @property
    def distance(self) -> int:
        """Converted frames from the start of a sequence to that of the next without overlap."""
        return self.frames * self.step


class Splits(NamedTuple):
    """Where frames go."""

    by_index: dict[int, str]
    """Split of each record; records that are left out are missing."""
    rule: str
    """How it was decided, in words."""
    notes: tuple[str, ...] = ()


def split_frames(
    records: Sequence[FrameRecord],
    series: Mapping[str, Sequence[int]],
    sizes: Mapping[str, float],
    reader: VideoReader,
    settings: VideoPlanSettings,
) -> Splits:
    """Decide where frames go: as named, by the protocol, by folder, in time, or drawn.

    Args:
        records: facts about all frames.
        series: the records of each series, in order.
        sizes: number of sequences of each group, without those that have none; not empty.
        reader: of the data set.
        settings: what the user wants.

    Raises:
        ValueError: groups that do not exist or cannot be told apart, or one in two splits.
    """
    groups = sorted({record.group for record in records}, key=natural_key)
    named = {split: names for split, names in settings.groups.items() if names is not None}
    default = reader.default_splits(groups)
    if named or default is not None:
        by_group = _named_splits(groups, named, default, reader.known_groups)
        left_out = [group for group in groups if group not in by_group]
        rule = "by group, as named" if named else f"by group, by the protocol of {reader.name}"
        notes = (f"In no split, left out: {', '.join(left_out)}.",) if left_out else ()
        return Splits(_by_group(records, by_group), rule, notes)
    if any(record.official_split for record in records):
        return _by_folder(records)
    wanted = check_proportions(settings.proportions)
    if len(series) == 1 and len(wanted) > 1:
        return _cut_in_time(next(iter(series.values())), wanted, settings)
    if len(sizes) == 1 and len(wanted) > 1:
        raise ValueError(
            f"All clips that are long enough belong to one group, {next(iter(sizes))!r}, and a "
            "group is never divided: choose a group_pattern that tells recordings apart, or ask "
            "for training alone with --proportions 1 0 0."
        )
    kept = dict(list(wanted.items())[: len(sizes)])
    notes = ()
    if len(kept) < len(wanted):
        notes = (f"There are only {len(sizes)} groups, so there is no {list(wanted)[-1]} split.",)
    by_group = assign_groups(sizes, kept, settings.seed)
    shares = ", ".join(f"{share:.0%} {split}" for split, share in kept.items())
    rule = f"by group, drawn with seed {settings.seed} ({shares}, by number of sequences)"
    return Splits(_by_group(records, by_group), rule, notes)


def _by_group(records: Sequence[FrameRecord], by_group: Mapping[str, str]) -> dict[int, str]:
    return {
        index: by_group[record.group]
        for index, record in enumerate(records)
        if record.group in by_group
    }


def _named_splits(
    groups: Sequence[str],
    named: Mapping[str, tuple[str, ...]],
    default: Mapping[str, str] | None,
    known: Sequence[str],
) -> dict[str, str]:
    """Give groups to the splits they were named for; the rest goes by the default, or trains.

    Raises:
        ValueError: a name that no group has, or one in two splits.
    """
    by_group: dict[str, str] = {}
    for split, names in named.items():
        for name in names:
            if name not in groups and name not in known:
                shown = ", ".join(groups[:20]) + (", ..." if len(groups) > 20 else "")
                raise ValueError(
                    f"There is no group {name!r}, which is named for {split}. Groups: {shown}."
                )
            if by_group.setdefault(name, split) != split:
                raise ValueError(
                    f"Group {name!r} is named for {by_group[name]} and for {split}: a group "
                    "belongs to one split."
                )
    for group in groups:
        if group in by_group:
            continue
        natural = default.get(group) if default is not None else "train"
        if natural in named:  # that split is complete as it was named
            natural = None if "train" in named else "train"
        if natural is not None:
            by_group[group] = natural
    return by_group


def _by_folder(records: Sequence[FrameRecord]) -> Splits:
    """Take the splits that the source states.

    Raises:
        ValueError: a group lies in two of them.
    """
    splits_of: dict[str, set[str]] = defaultdict(set)
    for record in records:
        splits_of[record.group].add(record.official_split or "")
    divided = sorted(group for group, splits in splits_of.items() if len(splits) > 1)
    if divided:
        folders = " and ".join(sorted(splits_of[divided[0]]))
        raise ValueError(
            f"Group {divided[0]!r} lies in the folders of {folders}: a person or recording belongs "
            "to one split. Move its clips, or correct group_pattern."
        )
    by_index = {i: record.official_split or "" for i, record in enumerate(records)}
    return Splits(by_index, "by folder")


def _cut_in_time(
    own: Sequence[int], wanted: Mapping[str, float], settings: VideoPlanSettings
) -> Splits:
    """Cut the only clip: first training, then validation, then test, a window apart.

    Every split has room for a sequence; where the clip is too short for that, the last ones go.
    """
    splits = list(wanted)
    gap = settings.distance
    while len(splits) > 1 and len(own) < len(splits) * settings.span + (len(splits) - 1) * gap:
        splits.pop()
    spare = len(own) - len(splits) * settings.span - (len(splits) - 1) * gap
    total = sum(wanted[split] for split in splits)
    sizes = [settings.span + max(0, int(spare * wanted[split] / total)) for split in splits]
    sizes[0] += len(own) - sum(sizes) - (len(splits) - 1) * gap
    by_index: dict[int, str] = {}
    start = 0
    for split, length in zip(splits, sizes, strict=True):
        by_index.update(dict.fromkeys(own[start : start + length], split))
        start += length + gap
    notes = []
    if len(splits) < len(wanted):
        dropped = " and ".join(split for split in wanted if split not in splits)
        notes.append(
            f"The clip of {len(own)} frames is too short for {dropped}: sequences span "
            f"{settings.span} frames. Lower frames or frame_step, or bring more clips."
        )
    if len(splits) > 1:
        notes.append(
            f"There is one clip: its frames are cut in time, {gap} frames apart. Splits of one "
            "recording are alike: scores on them say little about other recordings."
        )
    return Splits(by_index, f"in time, within the only clip ({', '.join(splits)})", tuple(notes))
