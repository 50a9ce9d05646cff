"""Weizmann actions: 9 persons, 10 actions, about 90 clips of 180 x 144 colour pixels.

Clips are called PERSON_ACTION.avi; some actions have two parts (lena_walk1.avi, lena_walk2.avi).
The rate is given as 25 frames a second, or as 50 after deinterlacing: `frame_step` takes every
n-th frame. The papers use the set as a source only and publish no split; here the first six persons
in alphabetical order train and the other three validate.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data_prep.readers.video import (
    VIDEO_PATTERNS,
    Clip,
    VideoDefaults,
    WindowRule,
    check_actions,
    natural_key,
    visible_files,
    without_twins,
)
from tmu_dist.data.manifest import SourceCard

PERSONS = ("daria", "denis", "eli", "ido", "ira", "lena", "lyova", "moshe", "shahar")
ACTIONS = ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")

_NUM_TRAIN_PERSONS = 6
_SHORT_CLIP_FRAMES = 60
_NAME = re.compile(rf"([a-z]+)_({'|'.join(ACTIONS)})([12])?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeizmannReader:
    """Clips of Weizmann."""

    actions: tuple[str, ...] = ACTIONS

    name: ClassVar[str] = "weizmann"
    source: ClassVar[SourceCard] = SourceCard(
        name="Weizmann actions as space-time shapes",
        provider="Weizmann Institute of Science, Rehovot",
        licence=(
            "research use with citation, as commonly stated: see the data set's page. Persons are "
            "recognisable."
        ),
        citation=(
            "L. Gorelick, M. Blank, E. Shechtman, M. Irani, R. Basri: Actions as Space-Time "
            "Shapes. IEEE TPAMI 29(12), 2007."
        ),
    )
    defaults: ClassVar[VideoDefaults] = VideoDefaults(
        frames=8, frame_step=1, size=(128, 128), crop="centre", resize="bilinear", colour="rgb"
    )
    grey: ClassVar[bool] = False
    spacing: ClassVar[int | None] = 1
    known_groups: ClassVar[tuple[str, ...]] = PERSONS

    def __post_init__(self) -> None:
        check_actions("Weizmann", self.actions, ACTIONS)

    @property
    def by_time(self) -> bool:
        return False

    def clips(self, root: str, files: Sequence[str] | None = None) -> tuple[Clip, ...]:
        if files is None:
            files = visible_files(root, VIDEO_PATTERNS)
            if not files:
                raise ValueError(
                    f"{root} holds no video: Weizmann's clips are called PERSON_ACTION.avi. Check "
                    "--source."
                )
        return without_twins([self._clip(file) for file in files])

    def window_rule(self, series: str, num_frames: int, span: int, split: str) -> WindowRule:
        return WindowRule(1 if num_frames < _SHORT_CLIP_FRAMES else span)

    def default_splits(self, groups: Sequence[str]) -> dict[str, str] | None:
        num_train = _NUM_TRAIN_PERSONS
        order: Sequence[str] = PERSONS
        if not set(groups) <= set(PERSONS):
            order = sorted(groups, key=natural_key)
            num_train = -(-len(order) * _NUM_TRAIN_PERSONS // len(PERSONS))
        return {group: "train" if order.index(group) < num_train else "val" for group in groups}

    def record(self, root: str) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def notes(self) -> tuple[str, ...]:
        return (
            "Persons 1 to 6 in alphabetical order train, 7 to 9 validate; of other persons than "
            "the nine of the data set, the first two thirds train.",
            f"In clips of fewer than {_SHORT_CLIP_FRAMES} frames a sequence starts at every frame.",
        )

    def _clip(self, file: str) -> Clip:
        stem = file.rpartition("/")[2].rpartition(".")[0]
        found = _NAME.fullmatch(stem)
        if found is None:
            problem = f"no clip of Weizmann: those are called PERSON_ACTION, {', '.join(ACTIONS)}"
            return Clip(series=stem, files=(file,), group="", problem=problem)
        person, action, _ = found.groups()
        wanted = action.lower() in self.actions
        return Clip(
            series=stem.lower(),
            files=(file,),
            group=person.lower(),
            left_out="" if wanted else "another action than is wanted",
        )
