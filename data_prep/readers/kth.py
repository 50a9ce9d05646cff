"""KTH human actions: 25 persons, 6 actions, 4 scenes; 599 clips of 160 x 120 grey pixels at 25 fps.

Clips are called personNN_ACTION_dS_uncomp.avi. The data set's own list, 00sequences.txt, says in
which frames of a clip the action is shown: usually four ranges, and outside of them the picture is
often empty. Video prediction trains on persons 1 to 16 and tests on 17 to 25 (not the split of the
action recognition paper), and starts sequences of the three actions in place and of walking one
length apart, of jogging and running 3 frames apart, counted from the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from data_prep.files import list_files, local_file
from data_prep.readers.radar import BadFileError
from data_prep.readers.video import (
    VIDEO_PATTERNS,
    Clip,
    VideoDefaults,
    WindowRule,
    check_actions,
    visible_files,
    without_twins,
)
from data_prep.readers.video_decoding import probe_video
from tmu_dist.data import storage
from tmu_dist.data.manifest import SourceCard

KthRanges: TypeAlias = Literal["apart", "joined", "whole"]
KthSplits: TypeAlias = Literal["persons", "repetitions"]

ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
LIST_NAME = "00sequences.txt"

_FAST_ACTIONS = ("jogging", "running")
_FAST_STRIDE = 3
_NUM_TRAIN_PERSONS, _NUM_PERSONS = 16, 25
_VAL_PERSONS = (15, 16)
_SPLIT_OF_REPETITION = {"earlier": "train", "last-but-one": "val", "last": "test"}
_NAME = re.compile(rf"person(\d\d)_({'|'.join(ACTIONS)})(?:_d([1-4]))?(?:_uncomp)?", re.IGNORECASE)
_LISTED = re.compile(r"(person\d\d_[a-z]+_d\d)\s+(?:frames\s+([\d\s,-]+)|\*missing\*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class KthReader:
    """Clips of KTH, cut to the listed ranges."""

    ranges: KthRanges = "apart"
    """apart: no sequence leaves a range of 00sequences.txt; joined: ranges without a frame between
    them are one, as in the published loaders; whole: all frames, without the list."""
    split_by: KthSplits = "persons"
    """persons: nobody is in two splits; repetitions: of every clip the last range tests, the one
    before validates, and the earlier ones train."""
    actions: tuple[str, ...] = ACTIONS

    name: ClassVar[str] = "kth"
    source: ClassVar[SourceCard] = SourceCard(
        name="KTH human actions",
        provider="KTH Royal Institute of Technology, Stockholm (csc.kth.se/cvap/actions)",
        licence=(
            "non-commercial use with citation, as commonly stated: see the data set's page. "
            "Persons are recognisable."
        ),
        citation=(
            "C. Schuldt, I. Laptev, B. Caputo: Recognizing Human Actions: A Local SVM Approach. "
            "ICPR 2004."
        ),
    )
    defaults: ClassVar[VideoDefaults] = VideoDefaults(
        frames=20, frame_step=1, size=(128, 128), crop="whole", resize="bilinear", colour="grey"
    )
    grey: ClassVar[bool] = True
    spacing: ClassVar[int | None] = 1
    known_groups: ClassVar[tuple[str, ...]] = tuple(
        f"person{number:02d}" for number in range(1, _NUM_PERSONS + 1)
    )

    def __post_init__(self) -> None:
        check_actions("KTH", self.actions, ACTIONS)
        if self.split_by == "repetitions" and self.ranges != "apart":
            raise ValueError(
                f"Repetitions are ranges of {LIST_NAME}, and ranges={self.ranges!r} does not keep "
                "them apart: leave ranges out, or split by persons."
            )

    @property
    def by_time(self) -> bool:
        return False

    def clips(self, root: str, files: Sequence[str] | None = None) -> tuple[Clip, ...]:
        if files is None:
            files = visible_files(root, VIDEO_PATTERNS)
            if not files:
                raise ValueError(
                    f"{root} holds no video: KTH's clips are called personNN_ACTION_dS_uncomp.avi. "
                    "Check --source."
                )
        listed = {} if self.ranges == "whole" else read_ranges(root)
        return without_twins([self._clip(root, file, listed) for file in files])

    def window_rule(self, series: str, num_frames: int, span: int, split: str) -> WindowRule:
        fast = series.split("_")[1] in _FAST_ACTIONS
        return WindowRule(_FAST_STRIDE if fast else span, backwards=True)

    def default_splits(self, groups: Sequence[str]) -> dict[str, str] | None:
        if self.split_by == "repetitions":
            return {group: _SPLIT_OF_REPETITION[group] for group in groups}
        return {group: _split_of(int(group[-2:])) for group in groups}

    def record(self, root: str) -> dict[str, Any]:
        listed = "" if self.ranges == "whole" else json.dumps(read_ranges(root), sort_keys=True)
        digest = hashlib.sha256(listed.encode()).hexdigest()
        return {**dataclasses.asdict(self), "listed_ranges_sha256": digest if listed else None}

    def notes(self) -> tuple[str, ...]:
        rule = {
            "apart": "Sequences lie inside one range of 00sequences.txt.",
            "joined": "Ranges of 00sequences.txt without a frame between them count as one.",
            "whole": "All frames are used, also empty ones outside the ranges of 00sequences.txt.",
        }
        split = {
            "persons": "The field's split knows no validation: persons 15 and 16 of the 16 "
            "training persons are taken for it unless other groups are given.",
            "repetitions": "Every person and scene is in all splits, other repetitions in each: "
            "scores say nothing about people and scenes that were never seen.",
        }
        return (
            rule[self.ranges],
            split[self.split_by],
            "Where ranges overlap (slips of the list), a frame belongs to the one that starts "
            "first.",
        )

    def _clip(self, root: str, file: str, listed: dict[str, tuple[tuple[int, int], ...]]) -> Clip:
        """Read a clip's name, and find its ranges."""
        stem = file.rpartition("/")[2].rpartition(".")[0]
        found = _NAME.fullmatch(stem)
        if found is None:
            problem = "no clip of KTH: those are called personNN_ACTION_dS_uncomp.avi"
            return Clip(series=stem, files=(file,), group="", problem=problem)
        number, action, scene = found.groups()
        base = f"person{number}_{action.lower()}"
        try:
            series = f"{base}_d{scene}" if scene else _by_length(root, file, base, listed)
        except BadFileError as error:
            return Clip(series=stem, files=(file,), group="", problem=error.reason)
        ranges, problem = None, ""
        if self.ranges != "whole":
            ranges = listed.get(series, ())
            if not ranges:
                problem = f"{LIST_NAME} has no ranges of {series}: --ranges whole does without"
            elif self.ranges == "joined":
                ranges = joined(ranges)
        return Clip(
            series=series,
            files=(file,),
            group=f"person{number}",
            official_split="train" if int(number) <= _NUM_TRAIN_PERSONS else "test",
            ranges=ranges,
            range_groups=_repetitions(ranges or ()) if self.split_by == "repetitions" else (),
            left_out="" if action.lower() in self.actions else "another action than is wanted",
            problem=problem,
        )


def read_ranges(root: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the frames of each clip's ranges, half-open, from 0, rising and without overlap.

    Raises:
        ValueError: no 00sequences.txt below the folder, or it lists nothing.
    """
    name = LIST_NAME
    if not storage.exists(root, name):
        name = next(iter(list_files(root, [LIST_NAME])[0]), "")
        if not name.lower().endswith(LIST_NAME):
            raise ValueError(
                f"{root} has no {LIST_NAME}, the data set's list of the frames that count: put it "
                "there, or take whole clips with --ranges whole."
            )
    listed = {}
    for clip, numbers in _LISTED.findall(storage.read_text(root, name)):
        pairs = re.findall(r"(\d+)\s*-\s*(\d+)", numbers)
        listed[clip] = _without_overlap([(int(first) - 1, int(last)) for first, last in pairs])
    if not listed:
        raise ValueError(f"{storage.join_url(root, name)} lists no clip: it is not KTH's list.")
    return listed


def joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join ranges that have no frame between them."""
    result = [ranges[0]]
    for start, end in ranges[1:]:
        if start == result[-1][1]:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return tuple(result)


def _without_overlap(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sort ranges, and let each start where the one before ends.

    The list has 2 clips with ranges out of order and 7 with ranges that overlap, by few frames or
    by a slip of a digit (225-365, 266-500); this repairs them all.
    """
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        start = max(start, result[-1][1] if result else 0)
        if start < end:
            result.append((start, end))
    return tuple(result)


def _by_length(
    root: str, file: str, base: str, listed: dict[str, tuple[tuple[int, int], ...]]
) -> str:
    """Find the scene of a clip whose name lacks it: the listed one of the same length.

    Raises:
        BadFileError: no scene has the length, or several have.
    """
    with local_file(root, file) as path:
        num_frames = probe_video(path).num_frames
    lengths = {clip: ranges[-1][1] for clip, ranges in listed.items() if ranges}
    fitting = [clip for clip in lengths if clip[:-3] == base and lengths[clip] == num_frames]
    if len(fitting) != 1:
        raise BadFileError(
            file,
            f"its name does not say which scene (_d1 to _d4) it is, and its {num_frames} frames "
            f"fit {len(fitting)} of the listed ones: rename it",
        )
    return fitting[0]


def _repetitions(ranges: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Name the ranges of a clip as groups, counted from the last."""
    names = list(reversed(_SPLIT_OF_REPETITION))
    return tuple(names[min(after, len(names) - 1)] for after in reversed(range(len(ranges))))


def _split_of(person: int) -> str:
    if person > _NUM_TRAIN_PERSONS:
        return "test"
    return "val" if person in _VAL_PERSONS else "train"
