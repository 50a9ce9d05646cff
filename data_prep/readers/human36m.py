"""Human3.6M as stored for video prediction: every fifth frame of each camera as a JPEG.

Files are called SUBJECT_ACTION[_TAKE].CAMERA_FRAME.jpg (S1_Walking_1.54138969_000005.jpg), 1000 x
1000 pixels, frame numbers 5 apart. Subjects 1, 5, 6, 7 and 8 train, 9 and 11 test. Sequences take
every second stored frame and start 10 stored frames apart in training, 5 in the test; both ends
belong to the same take and camera, and no frame between them is missing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeAlias

from data_prep.readers.video import (
    IMAGE_PATTERNS,
    Clip,
    VideoDefaults,
    WindowRule,
    natural_key,
    visible_files,
)
from tmu_dist.data.manifest import SourceCard

HumanProtocol: TypeAlias = Literal["by-subject", "paper"]

TRAIN_SUBJECTS = ("S1", "S5", "S6", "S7", "S8")
TEST_SUBJECTS = ("S9", "S11")

_VAL_SUBJECT = "S8"
_STORED_STEP = 5
_TRAIN_STRIDE, _TEST_STRIDE = 10, 5
_NAME = re.compile(
    r"(?P<take>(?P<subject>S\d+)_(?P<action>[A-Za-z]+)(?:[_ ]\d+)?\.\d+)_(?P<number>\d+)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Human36mReader:
    """Stored frames of Human3.6M, by take and camera."""

    protocol: HumanProtocol = "by-subject"
    """by-subject: a training subject validates; paper: validation sequences are drawn from those
    of the training subjects (`data_prep.video_plan`)."""
    actions: tuple[str, ...] = ("Walking",)

    name: ClassVar[str] = "human36m"
    source: ClassVar[SourceCard] = SourceCard(
        name="Human3.6M",
        provider="Institute of Mathematics of the Romanian Academy (vision.imar.ro/human3.6m)",
        licence=(
            "academic use by registered users, not to be passed on, as commonly stated: see the "
            "data set's page. Persons are recognisable."
        ),
        citation=(
            "C. Ionescu, D. Papava, V. Olaru, C. Sminchisescu: Human3.6M: Large Scale Datasets and "
            "Predictive Methods for 3D Human Sensing in Natural Environments. IEEE TPAMI 36(7), "
            "2014."
        ),
    )
    defaults: ClassVar[VideoDefaults] = VideoDefaults(
        frames=8, frame_step=2, size=(128, 128), crop="middle-half", resize="bilinear", colour="rgb"
    )
    grey: ClassVar[bool] = False
    spacing: ClassVar[int | None] = _STORED_STEP
    known_groups: ClassVar[tuple[str, ...]] = (*TRAIN_SUBJECTS, *TEST_SUBJECTS)

    @property
    def by_time(self) -> bool:
        return False

    def clips(self, root: str, files: Sequence[str] | None = None) -> tuple[Clip, ...]:
        if files is None:
            files = visible_files(root, IMAGE_PATTERNS)
            if not files:
                raise ValueError(
                    f"{root} holds no image: this reader takes stored frames called "
                    "SUBJECT_ACTION_TAKE.CAMERA_FRAME.jpg. Check --source."
                )
        takes: dict[str, list[tuple[int, str]]] = {}
        strangers = []
        for file in files:
            if found := _NAME.fullmatch(file.rpartition("/")[2].rpartition(".")[0]):
                takes.setdefault(found["take"], []).append((int(found["number"]), file))
            else:
                problem = "not called SUBJECT_ACTION_TAKE.CAMERA_FRAME, as stored frames are"
                strangers.append(Clip(series=file, files=(file,), group="", problem=problem))
        clips = [self._clip(take, frames) for take, frames in takes.items()]
        return (*sorted(clips, key=lambda clip: natural_key(clip.series)), *strangers)

    def window_rule(self, series: str, num_frames: int, span: int, split: str) -> WindowRule:
        return WindowRule(_TEST_STRIDE if split == "test" else _TRAIN_STRIDE)

    def default_splits(self, groups: Sequence[str]) -> dict[str, str] | None:
        """The subjects' splits; one that the protocol does not name has none."""
        splits = dict.fromkeys(TRAIN_SUBJECTS, "train") | dict.fromkeys(TEST_SUBJECTS, "test")
        if self.protocol == "by-subject":
            splits[_VAL_SUBJECT] = "val"
        return {group: splits[group] for group in groups if group in splits}

    def record(self, root: str) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def notes(self) -> tuple[str, ...]:
        if self.protocol == "by-subject":
            return (f"Subject {_VAL_SUBJECT}, a training subject of the papers, validates.",)
        return (
            "The papers' validation: sequences drawn from those of the training subjects. "
            "Neighbouring sequences overlap (they start 10 stored frames apart and span 15), so "
            "training and validation share frames: validation scores are too good. The test "
            "shares nothing with either.",
        )

    def _clip(self, take: str, frames: list[tuple[int, str]]) -> Clip:
        found = re.match(r"(S\d+)_([A-Za-z]+)", take)
        assert found
        subject, action = found.groups()
        frames.sort()
        numbers = tuple(number for number, _ in frames)
        twice = next((b for a, b in pairwise(frames) if a[0] == b[0]), None)
        official = "train" if subject in TRAIN_SUBJECTS else None
        return Clip(
            series=take,
            files=tuple(file for _, file in frames),
            group=subject,
            official_split="test" if subject in TEST_SUBJECTS else official,
            numbers=numbers,
            divisible=True,
            left_out="" if action in self.actions else "another action than is wanted",
            problem=f"{twice[1]} has the number of another image" if twice else "",
        )
