"""Teachers that each lie on one rank of a group, which runs them for the whole group.

Frames travel to the teachers, and what they tell travels back: weights stay where they are.

Legend: B batch, T time, C channels, Z noise, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from tmu_dist.collectives import RankGroup
from tmu_dist.teachers.adapter import TeacherPlan
from tmu_dist.teachers.bank import (
    FrozenTeacher,
    Memories,
    Shown,
    Teaching,
    Told,
    Wanted,
    told_dtype,
)
from tmu_dist.teachers.batched import TeacherGroup, apart, together


class FrameCodec(NamedTuple):
    """True frames as the codes that their archive stores: a byte or two a pixel, without loss.

    Only for frames as `data.transforms.to_unit_interval` makes them; what a network predicts is no
    code.
    """

    max_code: int
    """The largest code that is a measurement; frames are codes divided by it."""

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 or uint16 codes; a missing pixel, which is 0 to a network, becomes 0."""
        dtype = torch.uint8 if self.max_code <= torch.iinfo(torch.uint8).max else torch.uint16
        return (frames.to(torch.float32) * self.max_code).round().to(dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The frames, bit for bit: the same division as when they were read."""
        return (codes.to(torch.float32) / self.max_code).to(dtype)


_Shapes = dict[Told, torch.Size]
"""Of the tensors of a teaching, in the order in which they travel."""
_Member = tuple[Tensor, Tensor, Tensor | None]
"""The frames of one member, its sampling mask and its noise."""


class PlacedBank:
    """Each teacher on one rank of a group.

    All members' frames are gathered; a holder runs its teachers over one member's frames at a time,
    which keeps a rank's peak memory that of its own batch, and makes what a teacher tells the same
    bits wherever it lies. Each member runs one teacher in a turn, and then all get what was told.
    With `batch` it runs those that are alike in the turn of the first, and keeps what they tell all
    members until the turns of the others: faster for more memory.

    Args:
        own: the teachers that this rank holds, by their number among all; may be none.
        holders: place in the group of each teacher's holder, the same on every member.
        plans: how each teacher is used.
        parameters_per_teacher: number of frozen weights of each.
        group: the ranks that share them.
        wanted: what every teacher is to tell.
        memories: precision in which that travels.
        codec: how frames travel; None: as they are, which student's predictions need.
        batch: whether the rank's own teachers that are alike run as one network.
    """

    def __init__(
        self,
        own: Mapping[int, FrozenTeacher],
        *,
        holders: Sequence[int],
        plans: Sequence[TeacherPlan],
        parameters_per_teacher: Sequence[int],
        group: RankGroup,
        wanted: Sequence[Wanted],
        memories: Memories = "full",
        codec: FrameCodec | None = None,
        batch: bool = False,
    ) -> None:
        self.plans = tuple(plans)
        self.parameters_per_teacher = tuple(parameters_per_teacher)
        self.own = tuple(teacher for _, teacher in sorted(own.items()))
        groups = together(own) if batch else apart(own)
        self._groups = {m: group for group in groups for m in group.numbers}
        self._holders = tuple(holders)
        self._group = group
        self._wanted = tuple(wanted)
        self._memories = memories
        self._codec = codec
        self._is_codec_checked = False

    @torch.no_grad()
    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        """As `TeacherBank.teach`.

        Raises:
            ValueError: the first frames are not what the codec is for, or a teacher tells something
                else than its plan says.
        """
        frames_BTCHW = shown.frames_BTCHW
        frame = frames_BTCHW.shape[2:]
        shapes = [
            _shapes(plan, self._wanted, (len(frames_BTCHW), shown.num_frames - 1), frame)
            for plan in self.plans
        ]
        sizes = [sum(shape.numel() for shape in each.values()) for each in shapes]
        told_as = told_dtype(self._memories, frames_BTCHW.dtype)
        gathered = self._gathered(frames_BTCHW, shown.sampling_mask_BT, shown.noise_BTZ)
        values: dict[int, Tensor] = {}
        waiting: dict[int, list[Tensor]] = {}
        for turn in self._turns():
            told = [frames_BTCHW.new_empty(0, dtype=told_as)]
            if (own := turn[self._group.place]) is not None:
                if own not in waiting:
                    waiting |= self._run(self._groups[own], shown, gathered, shapes)
                told += waiting.pop(own)
            received = [0 if m is None else sizes[m] for m in turn]
            sent = [received[self._group.place]] * self._group.size
            incoming = self._group.all_to_all(torch.cat(told), sent, received)
            for m, value in zip(turn, incoming.split(received), strict=True):
                if m is not None:
                    values[m] = value.to(frames_BTCHW.dtype)
        return tuple(_teaching(values[m], each) for m, each in enumerate(shapes))

    def _run(
        self,
        group: TeacherGroup,
        shown: Shown,
        gathered: Sequence[_Member],
        shapes: Sequence[_Shapes],
    ) -> dict[int, list[Tensor]]:
        """What a group of teachers tells all members, one after the other, by teacher."""
        told_as = told_dtype(self._memories, shown.frames_BTCHW.dtype)
        told: dict[int, list[Tensor]] = {m: [] for m in group.numbers}
        for frames, mask, noise in gathered:
            teachings = group.teach(
                frames,
                num_input_frames=shown.num_input_frames,
                num_frames=shown.num_frames,
                sampling_mask_BT=mask,
                noise_BTZ=noise,
            )
            for m, taught in zip(group.numbers, teachings, strict=True):
                told[m] += _flat(taught.to(told_as), shapes[m])
        return told

    def _turns(self) -> Iterator[tuple[int | None, ...]]:
        """Which teacher each member runs in a turn, by place; None: it has no more.

        What was told is exchanged after every turn, so that a rank never keeps what all of its
        teachers tell all members.
        """
        held = [
            [m for m, holder in enumerate(self._holders) if holder == place]
            for place in range(self._group.size)
        ]
        return zip_longest(*held)

    def _gathered(
        self, frames_BTCHW: Tensor, mask_BT: Tensor, noise_BTZ: Tensor | None
    ) -> list[_Member]:
        """Every member's frames, mask and noise, by place; they travel together, as bytes."""
        codec, dtype = self._codec, frames_BTCHW.dtype
        sent = [frames_BTCHW if codec is None else self._codes(codec, frames_BTCHW), mask_BT]
        sent += [] if noise_BTZ is None else [noise_BTZ]
        bytes_by_place = self._group.all_gather(torch.cat([_bytes(each) for each in sent]))
        gathered = []
        for row in bytes_by_place:
            parts = row.split([each.nbytes for each in sent])
            # Copies, because a view of wider numbers must begin at a multiple of their size.
            frames, mask, *noise = (
                part.clone().view(like.dtype).view(like.shape)
                for part, like in zip(parts, sent, strict=True)
            )
            frames = frames if codec is None else codec.decode(frames, dtype)
            gathered.append((frames, mask, noise[0] if noise else None))
        return gathered

    def _codes(self, codec: FrameCodec, frames_BTCHW: Tensor) -> Tensor:
        codes_BTCHW = codec.encode(frames_BTCHW)
        if not self._is_codec_checked:  # once: on a GPU it waits for the frames
            if not torch.equal(codec.decode(codes_BTCHW, frames_BTCHW.dtype), frames_BTCHW):
                raise ValueError(
                    f"These frames are not codes of 0 to {codec.max_code} divided by "
                    f"{codec.max_code}, so they cannot travel as codes: give the bank no codec."
                )
            self._is_codec_checked = True
        return codes_BTCHW


def _shapes(
    plan: TeacherPlan, wanted: Sequence[Wanted], steps_BT: tuple[int, int], frame: Sequence[int]
) -> _Shapes:
    """What a teacher tells of a batch, known before it runs and without its weights.

    Args:
        plan: how it is used.
        wanted: what it is to tell.
        steps_BT: sequences, and steps of time.
        frame: channels, height and width of the student's frames.
    """
    found: _Shapes = {}
    for name in wanted:
        if name == "predictions":
            own = plan.frame
            size = tuple(frame) if own is None else (own.channels, own.height, own.width)
            found[name, None] = torch.Size((*steps_BT, *size))
            continue
        for k, (_, teacher, student) in plan.layers.items():
            maps = teacher.channels, student.slices * student.height, student.width
            found[name, k] = torch.Size((*steps_BT, *maps))
    return found


def _flat(taught: Teaching, shapes: _Shapes) -> list[Tensor]:
    """The tensors of a teaching, each as a vector, in order."""
    tensors, found = taught.tensors(), []
    for (name, layer), shape in shapes.items():
        values = tensors[name, layer]
        if values.shape != shape:
            raise ValueError(
                f"A teacher's {name} (layer {layer}) is {tuple(values.shape)}, and its plan says "
                f"{tuple(shape)}: its memory_shapes are not those of these frames."
            )
        found.append(values.flatten())
    return found


def _teaching(values: Tensor, shapes: _Shapes) -> Teaching:
    """Inverse of `_flat`."""
    parts = values.split([shape.numel() for shape in shapes.values()])
    return Teaching.of(
        {told: part.view(shapes[told]) for told, part in zip(shapes, parts, strict=True)}
    )


def _bytes(values: Tensor) -> Tensor:
    return values.flatten().view(torch.uint8)
