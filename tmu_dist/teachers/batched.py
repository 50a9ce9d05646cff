"""Teachers of one architecture run as one network (`joined`), in groups as large as can be.

What a teacher tells stays its own, predictions that it reads again included.

Legend: B batch, T time, C channels, Z noise, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.config import ConfigError
from tmu_dist.config.compute import Choice
from tmu_dist.teachers.adapter import TeacherPlan
from tmu_dist.teachers.bank import (
    FrozenTeacher,
    Memories,
    Precision,
    ReplicatedBank,
    Shown,
    Teaching,
    Wanted,
    told_dtype,
)
from tmu_dist.teachers.joined import JoinedNetworks, unjoinable
from tmu_dist.teachers.placement import Placement

Teach = Callable[..., tuple[Teaching, ...]]
"""Called as a `FrozenTeacher` is; tells what every teacher of a group makes of the frames."""

_AUTO = ("cuda",)
"""Kinds of devices where `auto` runs teachers together. On GPUs, where a step is many small
operations, M times fewer are launched; that was not measured. On CPUs it costs more than it saves:
on one core 2 to 8 ConvLSTM teachers of the paper's size took 1.1 to 1.4 times as long as one after
the other (what convolutions give is put together, and gates are not computed in one pass), with
the library's convolutions 0.98 to 1.02 times. Only for 4 channels on 4x4 maps it was half."""
_GROUPED = ("cuda",)
"""Kinds of devices where their convolutions are one grouped convolution."""


class Likeness(NamedTuple):
    """What teachers must have in common to run as one network."""

    modules: tuple[Any, ...]
    """Name, class, settings, and shapes and dtypes of the weights, of every module."""
    plan: TeacherPlan
    wanted: tuple[Wanted, ...]
    precision: Precision
    memories: Memories
    unjoinable: tuple[str, ...]
    """Classes of modules for which it must run alone."""

    @classmethod
    def of(cls, teacher: FrozenTeacher) -> Likeness:
        """Of a teacher, with weights or without numbers in them, on any device."""
        return cls(
            tuple((name, *_facts(each)) for name, each in teacher.network.named_modules()),
            teacher.plan,
            teacher.wanted,
            teacher.precision,
            teacher.memories,
            unjoinable(teacher.network),
        )


class BatchedTeachers:
    """Teachers that are alike, run as one network.

    Args:
        teachers: at least two.
        grouped: whether their convolutions are one grouped convolution (`JoinedNetworks`); None:
            where that is chosen for their device.

    Raises:
        ValueError: they are not alike, are one and the same, or must run alone.
    """

    def __init__(self, teachers: Sequence[FrozenTeacher], *, grouped: bool | None = None) -> None:
        self.teachers = tuple(teachers)
        if reasons := _reasons([Likeness.of(teacher) for teacher in teachers]):
            raise ValueError(f"These teachers cannot run as one network: {'; '.join(reasons)}.")
        networks = [teacher.network for teacher in teachers]
        if len({id(network) for network in networks}) < len(networks):
            raise ValueError("A network cannot be joined with itself: load it once a teacher.")
        if grouped is None:
            grouped = next(networks[0].parameters()).device.type in _GROUPED
        self.networks = JoinedNetworks(networks, grouped=grouped)

    @torch.no_grad()
    def __call__(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor | None,
        noise_BTZ: Tensor | None,
    ) -> tuple[Teaching, ...]:
        """What each makes of the student's frames; arguments as of `FrozenTeacher.forward`."""
        any_of_them = self.teachers[0]
        told_as = told_dtype(any_of_them.memories, frames_BTCHW.dtype)
        frames_BTCHW, noise_BTZ = any_of_them.reads(frames_BTCHW, noise_BTZ)
        with any_of_them.arithmetic(frames_BTCHW.device):
            rollout = self.networks(
                frames_BTCHW,
                num_input_frames=num_input_frames,
                num_frames=num_frames,
                sampling_mask_BT=sampling_mask_BT,
                noise_BTZ=noise_BTZ,
            )
        told = any_of_them.tells(any_of_them.keeps(rollout)).to(told_as).tensors()
        parts = zip(*(values.chunk(len(self.teachers)) for values in told.values()), strict=True)
        return tuple(Teaching.of(dict(zip(told, part, strict=True))) for part in parts)


class BatchedBank(ReplicatedBank):
    """All teachers on this rank, those that are alike as one network."""

    def __init__(self, teachers: Sequence[FrozenTeacher]) -> None:
        super().__init__(teachers)
        self._groups = together(dict(enumerate(self.own)))

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        told: dict[int, Teaching] = {}
        for numbers, teach in self._groups:
            taught = teach(
                shown.frames_BTCHW,
                num_input_frames=shown.num_input_frames,
                num_frames=shown.num_frames,
                sampling_mask_BT=shown.sampling_mask_BT,
                noise_BTZ=shown.noise_BTZ,
            )
            told |= zip(numbers, taught, strict=True)
        return tuple(told[m].to(shown.frames_BTCHW.dtype) for m in range(len(self.own)))


class TeacherGroup(NamedTuple):
    """Teachers that run together: all that are alike, or one alone."""

    numbers: tuple[int, ...]
    teach: Teach


def together(teachers: Mapping[int, FrozenTeacher]) -> tuple[TeacherGroup, ...]:
    """Teachers, by number, in groups that are as large as can be."""
    likenesses = {m: Likeness.of(teacher) for m, teacher in teachers.items()}
    groups: list[TeacherGroup] = []
    for numbers in _alike(likenesses):
        if len(numbers) == 1:
            groups += apart({m: teachers[m] for m in numbers})
        else:
            groups.append(TeacherGroup(numbers, BatchedTeachers([teachers[m] for m in numbers])))
    return tuple(groups)


def apart(teachers: Mapping[int, FrozenTeacher]) -> tuple[TeacherGroup, ...]:
    """Teachers, by number, each a group by itself."""
    return tuple(
        TeacherGroup((m,), partial(_teach_alone, teacher)) for m, teacher in teachers.items()
    )


def run_together(
    choice: Choice, teachers: Sequence[Likeness], placement: Placement, device: torch.device
) -> bool:
    """Whether teachers that are alike run as one network (compute.batch_teachers).

    `auto` leaves placed teachers apart: what those of a group tell must be kept until their turns.

    Args:
        choice: the setting.
        teachers: all of them.
        placement: where they lie.
        device: that they run on.

    Raises:
        ConfigError: `on`, and there is nothing to run together.
    """
    if choice != "on":
        return choice == "auto" and placement.kind == "replicated" and device.type in _AUTO
    if placement.kind in ("sharded", "cached"):
        reason = {
            "sharded": "gathers the weights of one teacher at a time",
            "cached": "runs no teachers",
        }[placement.kind]
        raise ConfigError(
            f"compute.batch_teachers=on has no effect with placement.kind={placement.kind}, which "
            f"{reason}: leave it out, or choose placement.kind=replicated or placed."
        )
    held = [placement.held_by(place) for place in range(len(placement.resident_bytes))]
    own = held if placement.kind == "placed" else [tuple(range(len(teachers)))]
    if not any(_pairs({m: teachers[m] for m in numbers}) for numbers in own):
        reasons = _reasons(teachers) or ["those that are alike lie on different ranks"]
        raise ConfigError(
            "compute.batch_teachers=on: no two teachers of a rank can run as one network: "
            f"{'; '.join(reasons)}. Leave it out."
        )
    return True


def _alike(teachers: Mapping[int, Likeness]) -> list[tuple[int, ...]]:
    """Numbers of teachers, by group, in the order of each group's first."""
    groups: list[list[int]] = []
    for m, likeness in teachers.items():
        can = not likeness.unjoinable
        group = next((each for each in groups if can and teachers[each[0]] == likeness), None)
        if group is None:
            groups.append([m])
        else:
            group.append(m)
    return [tuple(group) for group in groups]


def _pairs(teachers: Mapping[int, Likeness]) -> bool:
    """Whether any can run together."""
    return any(len(numbers) > 1 for numbers in _alike(teachers))


def _reasons(teachers: Sequence[Likeness]) -> list[str]:
    """What keeps teachers from running as one network; empty: nothing."""
    if len(teachers) < 2:
        return [f"there is only {len(teachers)}"]
    kinds = sorted({name for each in teachers for name in each.unjoinable})
    reasons = [f"{name} has no form for many networks" for name in kinds]
    free = [each for each in teachers if not each.unjoinable]
    for field in Likeness._fields:
        if any(getattr(each, field) != getattr(free[0], field) for each in free):
            what = {"modules": "architecture", "plan": "frames, or the layers that they teach"}
            return [*reasons, f"they differ in their {what.get(field, field)}"]
    return reasons


def _teach_alone(
    teacher: FrozenTeacher, frames_BTCHW: Tensor, **shown: Any
) -> tuple[Teaching, ...]:
    return (teacher(frames_BTCHW, **shown),)


def _facts(module: nn.Module) -> tuple[Any, ...]:
    """What makes a module do what it does, but for its submodules and numbers."""
    settings = {
        name: _comparable(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    }
    weights = [
        (name, value.shape, value.dtype)
        for values in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, value in values
    ]
    return type(module), settings, weights


def _comparable(value: Any) -> Any:
    """What equals another's only if both mean the same; of unknown kinds nothing does."""
    if value is None or isinstance(value, bool | int | float | str | type | torch.dtype):
        return value
    if isinstance(value, tuple | list):
        return type(value), [_comparable(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _comparable(each) for name, each in value.items()}
    if is_dataclass(value):
        return type(value), [_comparable(getattr(value, field.name)) for field in fields(value)]
    return object()
