"""Teachers that differ from the student: what the differences are, and how each is bridged.

The paper compares memories element by element (Sec. 4, Implementation), so by default nothing may
differ but the kind of cell. `config.AdapterConfig` declares differences as wanted; `plan_teacher`
finds them, refuses the others, and says what is to be done. The doing is below it.

Legend: B batch, T time, C image channels, P memory channels, L time slices, H, W height and width,
N any axes in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tmu_dist.config import AdapterConfig
from tmu_dist.models.shapes import FrameShape, MemoryShape
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError, same_scale


@dataclass(frozen=True, kw_only=True)
class StudentFacts:
    """What teachers are compared with."""

    frame: FrameShape
    memories: tuple[MemoryShape, ...]
    """Of every layer that has a memory, from the input to the output."""
    data: DataFacts
    taught: Literal["all"] | tuple[int, ...] = "all"
    """The layers whose memories imitate others (transfer.tmu.layers); only these must fit."""


class LayerPlan(NamedTuple):
    """What one layer of the student is compared with."""

    teacher_layer: int
    teacher: MemoryShape
    """The memory as the teacher makes it."""
    student: MemoryShape
    """The student's; the teacher's is brought to its map size and number of time slices."""

    @property
    def is_projected(self) -> bool:
        """Whether an imitation must be brought to the teacher's number of channels."""
        return self.teacher.channels != self.student.channels


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """How one teacher is used."""

    frame: FrameShape | None
    """The frames that it reads; None: the student's, as they are."""
    layers: Mapping[int, LayerPlan]
    """By the number of the student's layer."""

    @classmethod
    def unchanged(cls, memories: Sequence[MemoryShape]) -> TeacherPlan:
        """For a teacher that reads and remembers as the student does, layer by layer."""
        return cls(frame=None, layers={k: LayerPlan(k, m, m) for k, m in enumerate(memories)})


class _Difference(NamedTuple):
    what: str
    teacher: object
    student: object
    bridge: str
    """The setting that declares it as wanted, or why none can."""


def plan_teacher(
    card: TeacherCard,
    memories: Sequence[MemoryShape],
    student: StudentFacts,
    adapter: AdapterConfig,
) -> TeacherPlan:
    """Decide how a teacher is used, or refuse it.

    Layers, their memories' channels and maps, frames, units, frame interval and normalisation
    must be the same, or their difference declared. The kind of cell and the patch size may differ
    by themselves, and so may where the pixels lie and whether some are missing.

    Args:
        card: of the teacher.
        memories: shapes of the teacher's memories.
        student: what they are compared with.
        adapter: the differences that are wanted.

    Raises:
        TeacherError: lists every other difference, and the setting that would bridge it.
    """
    layer_map, differences = _map_layers(adapter.layers, len(memories), len(student.memories))
    layers = {
        k: LayerPlan(teacher_layer, memories[teacher_layer], student.memories[k])
        for k, teacher_layer in enumerate(layer_map)
        if student.taught == "all" or k in student.taught
    }
    differences += _memory_differences(layers)
    differences += _frame_differences(card.frame, student.frame)
    differences += _data_differences(card.data, student.data)
    _refuse(card, differences, adapter)
    return TeacherPlan(frame=None if card.frame == student.frame else card.frame, layers=layers)


def check_start(card: TeacherCard, data: DataFacts, adapter: AdapterConfig) -> None:
    """Refuse weights that learned from numbers of another meaning; tensors speak for themselves.

    Raises:
        TeacherError: lists the differences.
    """
    unused = [entry.name for entry in fields(adapter) if entry.name != "units"]
    if any(getattr(adapter, name) != getattr(AdapterConfig(), name) for name in unused):
        raise TeacherError(
            f"Teacher {card.name!r} is only started from, so of transfer.adapter only units has an "
            "effect: leave the others out."
        )
    _refuse(card, _data_differences(card.data, data), adapter)


def _refuse(card: TeacherCard, differences: list[_Difference], adapter: AdapterConfig) -> None:
    declared = {f"transfer.adapter.{name}={value}" for name, value in asdict(adapter).items()}
    wrong = [
        f"{d.what}: teacher {d.teacher}, student {d.student} ({d.bridge})"
        for d in differences
        if d.bridge not in declared
    ]
    if wrong:
        raise TeacherError(
            f"Teacher {card.name!r} does not fit the student: {'; '.join(wrong)}. Memories are "
            "compared element by element (paper, Sec. 4): change the student's model.* settings "
            "or the archive to match, pretrain the teacher with the student's, or declare a "
            "difference as wanted by the setting beside it."
        )


def _map_layers(
    chosen: Literal["same", "stretch"] | tuple[int, ...], teachers: int, students: int
) -> tuple[list[int], list[_Difference]]:
    """A teacher's layer for each of the student's, and what is wrong with that.

    Stretched, the lowest layer teaches the lowest and the top one the top one, which is all that
    a student of one layer has.
    """
    last = students - 1
    stretched = [
        (2 * k * (teachers - 1) + last) // (2 * last) if last else teachers - 1
        for k in range(students)
    ]
    if isinstance(chosen, str):
        bridge = "transfer.adapter.layers=stretch"
        same = teachers == students
        return stretched, [] if same else [_Difference("layers", teachers, students, bridge)]
    if len(chosen) == students and all(0 <= k < teachers for k in chosen):
        return list(chosen), []
    needed = (
        f"transfer.adapter.layers={list(chosen)} must name one of the teacher's layers 0 to "
        f"{teachers - 1} for each of the student's {students} layers"
    )
    return stretched, [_Difference("layers", teachers, students, needed)]


def _memory_differences(layers: Mapping[int, LayerPlan]) -> list[_Difference]:
    """Differences of the memories; one that is the same in all layers is named once."""
    found = []
    for what, bridge, of in (
        ("hidden channels", "channels=project", lambda shape: shape.channels),
        ("memory grid", "grid=resample", lambda shape: f"{shape.height}x{shape.width}"),
        ("time slices", "grid=resample", lambda shape: shape.slices),
    ):
        pairs = {
            f"{what} of layer {k}": (of(plan.teacher), of(plan.student))
            for k, plan in layers.items()
        }
        if len(set(pairs.values())) == 1:
            pairs = {what: next(iter(pairs.values()))}
        found += [
            _Difference(name, teacher, student, f"transfer.adapter.{bridge}")
            for name, (teacher, student) in pairs.items()
            if teacher != student
        ]
    return found


def _frame_differences(teacher: FrameShape, student: FrameShape) -> list[_Difference]:
    if teacher == student:
        return []
    bridge = "transfer.adapter.frames=resize"
    if teacher.channels != student.channels and {teacher.channels, student.channels} != {1, 3}:
        bridge = "only grey and RGB can be converted to each other"
    return [_Difference("frames", teacher, student, bridge)]


def _data_differences(teacher: DataFacts, student: DataFacts) -> list[_Difference]:
    """Whether the same number means the same thing in both archives, and the same time passes."""
    bridge = "transfer.adapter.units=any"
    compared = (
        ("normalisation", teacher.normalisation, student.normalisation),
        (
            "frame interval [min]",
            teacher.frame_interval_minutes,
            student.frame_interval_minutes,
        ),
    )
    found = [_Difference(what, a, b, bridge) for what, a, b in compared if a != b]
    if not same_scale(teacher.units, student.units):
        found.append(_Difference("units", teacher.units, student.units, bridge))
    return found


def adapt_frames(frames_BTCHW: Tensor, frame: FrameShape) -> Tensor:
    """Frames in another size and number of channels, [B, T, C, H, W].

    RGB becomes luma (ITU-R BT.601), grey is repeated. A missing pixel is 0 here as it is for the
    student.
    """
    maps_NCHW = frames_BTCHW.flatten(0, 1)
    if maps_NCHW.shape[1] > frame.channels:
        red, green, blue = maps_NCHW.split(1, dim=1)
        maps_NCHW = 0.299 * red + 0.587 * green + 0.114 * blue
    maps_NCHW = resize(maps_NCHW, frame.height, frame.width)
    return maps_NCHW.expand(-1, frame.channels, -1, -1).unflatten(0, frames_BTCHW.shape[:2])


def adapt_memory(memory_BTPHW: Tensor, teacher: MemoryShape, student: MemoryShape) -> Tensor:
    """A teacher's memory on the student's maps; its channels stay.

    Slices of time are resized each by itself. Where the student has another number of them, the
    teacher's newest slice, which alone is as new as the student's memory, stands for all.
    """
    if teacher[1:] == student[1:]:
        return memory_BTPHW
    maps_BTPLHW = memory_BTPHW.unflatten(3, (teacher.slices, teacher.height))
    if teacher.slices != student.slices:
        maps_BTPLHW = maps_BTPLHW[:, :, :, -1:].expand(-1, -1, -1, student.slices, -1, -1)
    maps_NLHW = resize(maps_BTPLHW.flatten(0, 2), student.height, student.width)
    return maps_NLHW.flatten(1, 2).unflatten(0, memory_BTPHW.shape[:3])


def resize(maps_NCHW: Tensor, height: int, width: int) -> Tensor:
    """Area means along an axis that shrinks, bilinear interpolation along one that grows."""
    size = min(maps_NCHW.shape[2], height), min(maps_NCHW.shape[3], width)
    if size != maps_NCHW.shape[2:]:
        maps_NCHW = F.adaptive_avg_pool2d(maps_NCHW, size)
    if size != (height, width):
        maps_NCHW = F.interpolate(maps_NCHW, (height, width), mode="bilinear", align_corners=False)
    return maps_NCHW
