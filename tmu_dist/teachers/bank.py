"""The memory bank: every teacher's memories for the frames that the student sees (Eq. 1).

`ReplicatedBank` holds all teachers on every rank. Other placements give the same memories from
elsewhere and keep this interface.

Legend: B batch, T time, C channels, P hidden channels, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tmu_dist.models.build import count_parameters
from tmu_dist.models.rollout import Predictor

Memories = tuple[tuple[Tensor, ...], ...]
"""By teacher, by layer: memories [B, T, P, h, w] of every step, detached."""


class TeacherBank(Protocol):
    """Who computes which teacher's memory, where."""

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        """Number of frozen weights of each teacher."""

    def memories(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor,
    ) -> Memories:
        """Run every teacher over the frames; arguments as in `Predictor.forward`."""


class ReplicatedBank:
    """All teachers on this rank, one after the other, frozen and in eval mode."""

    def __init__(self, teachers: Sequence[Predictor]) -> None:
        self._teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        return tuple(count_parameters(teacher) for teacher in self._teachers)

    @torch.no_grad()
    def memories(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor,
    ) -> Memories:
        return tuple(
            teacher(
                frames_BTCHW,
                num_input_frames=num_input_frames,
                num_frames=num_frames,
                sampling_mask_BT=sampling_mask_BT,
            ).memories
            for teacher in self._teachers
        )
