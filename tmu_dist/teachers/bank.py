"""The memory bank: every teacher's memories for the frames that the student sees (Eq. 1).

`ReplicatedBank` holds all teachers on every rank. Other placements give the same memories from
elsewhere and keep this interface.

Legend: B batch, T time, C channels, P memory channels, Z noise, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from tmu_dist.models.build import count_parameters
from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.adapter import TeacherPlan, adapt_frames, adapt_memory

Memories = tuple[dict[int, Tensor], ...]
"""By teacher, by number of the student's layer: memories [B, T, P, h, w] of every step on the
student's maps, detached."""


class TeacherBank(Protocol):
    """Who computes which teacher's memory, where."""

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        """Number of frozen weights of each teacher."""

    @property
    def plans(self) -> tuple[TeacherPlan, ...]:
        """How each teacher is used."""

    def memories(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor,
        noise_BTZ: Tensor | None = None,
    ) -> Memories:
        """Run every teacher over the student's frames; arguments as in `Predictor.forward`."""


class FrozenTeacher(nn.Module):
    """A network in eval mode, without gradients, and the plan by which it teaches.

    Args:
        network: any predictor.
        plan: what is adapted; None: nothing, layer k teaches layer k.
    """

    def __init__(self, network: Predictor, plan: TeacherPlan | None = None) -> None:
        super().__init__()
        self.network = network
        self.plan = plan or TeacherPlan.unchanged(network.memory_shapes)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor,
        noise_BTZ: Tensor | None,
    ) -> dict[int, Tensor]:
        """Memories for the student's layers; arguments as in `Predictor.forward`.

        Where the mask hides a frame, the network reads its own prediction, which never leaves its
        own size. It shares the student's noise if it makes use of as many numbers a step.
        """
        if self.plan.frame is not None:
            frames_BTCHW = adapt_frames(frames_BTCHW, self.plan.frame)
        if noise_BTZ is not None and noise_BTZ.shape[-1] != self.network.noise_size:
            noise_BTZ = None
        memories = self.network(
            frames_BTCHW,
            num_input_frames=num_input_frames,
            num_frames=num_frames,
            sampling_mask_BT=sampling_mask_BT,
            noise_BTZ=noise_BTZ,
        ).memories
        return {
            k: adapt_memory(memories[layer], teacher, student)
            for k, (layer, teacher, student) in self.plan.layers.items()
        }


class ReplicatedBank:
    """All teachers on this rank, one after the other."""

    def __init__(self, teachers: Sequence[FrozenTeacher]) -> None:
        self._teachers = tuple(teachers)

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        return tuple(count_parameters(teacher) for teacher in self._teachers)

    @property
    def plans(self) -> tuple[TeacherPlan, ...]:
        return tuple(teacher.plan for teacher in self._teachers)

    def memories(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor,
        noise_BTZ: Tensor | None = None,
    ) -> Memories:
        return tuple(
            teacher(
                frames_BTCHW,
                num_input_frames=num_input_frames,
                num_frames=num_frames,
                sampling_mask_BT=sampling_mask_BT,
                noise_BTZ=noise_BTZ,
            )
            for teacher in self._teachers
        )
