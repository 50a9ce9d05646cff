"""The memory bank: what every teacher remembers of the frames that the student sees (Eq. 1).

`ReplicatedBank` holds all teachers on every rank; `batched` runs those that are alike together.
Other placements give the same from elsewhere (`placed`, `sharded`, `cached`) and keep this
interface.

Legend: B batch, T time, C channels, P memory channels, Z noise, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tmu_dist import arithmetic
from tmu_dist.models.build import count_parameters
from tmu_dist.models.convolution import Convolution
from tmu_dist.models.rollout import Predictor, Rollout, StateName
from tmu_dist.teachers.adapter import TeacherPlan, adapt_frames, adapt_memory

Wanted = StateName | Literal["predictions"]
"""What a method learns from: states of the teachers' layers, or the frames that they predict."""
Told = tuple[Wanted, int | None]
"""Which tensor of a teaching: the state and the student's layer; predictions have none."""
Precision = Literal["student", "fp32", "bf16"]
"""Of a teacher's own arithmetic (config.PlacementConfig)."""
Memories = Literal["full", "bf16", "fp16"]
"""Of what a teacher tells (config.PlacementConfig)."""


class Teaching(NamedTuple):
    """What one teacher makes of the student's frames, at every step, detached."""

    states: Mapping[StateName, Mapping[int, Tensor]]
    """Those that were wanted, by number of the student's layer: [B, T, P, h, w] on its maps, in the
    teacher's channels."""
    predictions_BTCHW: Tensor | None = None
    """Of frames 2..T, at the size of the frames that the teacher reads; None: not wanted."""

    @classmethod
    def of(cls, tensors: Mapping[Told, Tensor]) -> Teaching:
        """Inverse of `tensors`, in any order."""
        states: dict[StateName, dict[int, Tensor]] = {}
        predictions = None
        for (name, layer), values in tensors.items():
            if name == "predictions":
                predictions = values
            else:
                states.setdefault(name, {})[cast(int, layer)] = values
        return cls(states, predictions)

    def tensors(self) -> dict[Told, Tensor]:
        """All of it, state by state, by layer, predictions last."""
        found: dict[Told, Tensor] = {
            (name, layer): by_layer[layer]
            for name, by_layer in self.states.items()
            for layer in sorted(by_layer)
        }
        if self.predictions_BTCHW is not None:
            found["predictions", None] = self.predictions_BTCHW
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> Teaching:
        """The same with every tensor changed."""
        return Teaching.of({told: change(values) for told, values in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> Teaching:
        """The same numbers in another precision."""
        return self.map(lambda values: values.to(dtype))


class SampleKey(NamedTuple):
    """Which sequences a batch is made of, for banks that know them by name."""

    ids_B: Tensor
    """int64 on the CPU: positions in the training split, counted on from archive to archive
    (`data.loader.Batch.sample_ids_B`)."""
    is_backwards: bool = False
    """Whether the frames run backwards in time."""


class Shown(NamedTuple):
    """A batch as teachers are shown it; the first five are arguments of `Predictor.forward`."""

    frames_BTCHW: Tensor
    num_input_frames: int
    num_frames: int
    sampling_mask_BT: Tensor
    noise_BTZ: Tensor | None = None
    key: SampleKey | None = None
    """Which sequences these are; only needed by banks that keep what teachers tell."""


class TeacherBank(Protocol):
    """Who runs which teacher, where."""

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        """Number of frozen weights of each teacher."""

    @property
    def plans(self) -> tuple[TeacherPlan, ...]:
        """How each teacher is used."""

    @property
    def own(self) -> tuple[FrozenTeacher, ...]:
        """Those whose weights, or a part of each, lie on this rank."""

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        """What every teacher makes of the student's frames, in their precision.

        Banks that span ranks must be asked by all members of the group, in the same order, and
        for batches of one size.
        """


class FrozenTeacher(nn.Module):
    """A network in eval mode, without gradients, and the plan by which it teaches.

    Args:
        network: any predictor.
        plan: what is adapted; None: nothing, layer k teaches layer k.
        wanted: what it is to tell.
        precision: of its arithmetic; "student" leaves it to whoever runs it. With bf16 its
            convolutions' weights are kept in bfloat16, as autocast would round them at every use.
        memories: precision of what it tells; full: that of the frames.

    Raises:
        ValueError: when it runs, if its cells have not the states that are wanted.
    """

    def __init__(
        self,
        network: Predictor,
        plan: TeacherPlan | None = None,
        wanted: Iterable[Wanted] = ("memory",),
        *,
        precision: Precision = "student",
        memories: Memories = "full",
    ) -> None:
        super().__init__()
        self.wanted = tuple(wanted)
        self.network = network
        self.plan = plan or TeacherPlan.unchanged(network.memory_shapes)
        self.precision = precision
        self.memories = memories
        if precision == "bf16":
            for convolution in rounded_convolutions(network):
                convolution.to(torch.bfloat16)
        self.eval().requires_grad_(False)

    def hide_targets(self) -> Self:
        """Show it no true next frame, also where it learned with one (SAVP's posterior, VPN).

        For students that read its states: they would be told what they are to predict.
        """
        self.network.learns_from_targets = False
        return self

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, also as a part of something that is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor | None,
        noise_BTZ: Tensor | None,
    ) -> Teaching:
        """What it makes of the student's frames; arguments as in `Predictor.forward`.

        Where the mask hides a frame, the network reads its own prediction, which never leaves its
        own size. It shares the student's noise if it makes use of as many numbers a step.
        """
        told_as = told_dtype(self.memories, frames_BTCHW.dtype)
        frames_BTCHW, noise_BTZ = self.reads(frames_BTCHW, noise_BTZ)
        with self.arithmetic(frames_BTCHW.device):
            rollout = self.network(
                frames_BTCHW,
                num_input_frames=num_input_frames,
                num_frames=num_frames,
                sampling_mask_BT=sampling_mask_BT,
                noise_BTZ=noise_BTZ,
            )
        return self.tells(self.keeps(rollout)).to(told_as)

    def reads(self, frames_BTCHW: Tensor, noise_BTZ: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What its network is given of the student's frames and noise."""
        if self.plan.frame is not None:
            frames_BTCHW = adapt_frames(frames_BTCHW, self.plan.frame)
        if noise_BTZ is not None and noise_BTZ.shape[-1] != self.network.noise_size:
            noise_BTZ = None
        return frames_BTCHW, noise_BTZ

    def arithmetic(self, device: torch.device) -> AbstractContextManager[object]:
        """The precision in which its network runs."""
        if self.precision == "student":
            return nullcontext()
        return arithmetic.arithmetic(self.precision, device)

    def keeps(self, rollout: Rollout) -> dict[Told, Tensor]:
        """What is wanted of a rollout of its network, by that network's own layers."""
        taught = sorted({layer.teacher_layer for layer in self.plan.layers.values()})
        kept: dict[Told, Tensor] = {}
        for name in self.wanted:
            if name == "predictions":
                kept[name, None] = rollout.predictions_BTCHW
                continue
            own = rollout.states(name)
            kept |= {(name, layer): own[layer] for layer in taught}
        return kept

    def tells(self, kept: Mapping[Told, Tensor]) -> Teaching:
        """That, by the student's layers and on its maps."""
        states: dict[StateName, dict[int, Tensor]] = {
            name: {
                k: adapt_memory(kept[name, layer], teacher, student)
                for k, (layer, teacher, student) in self.plan.layers.items()
            }
            for name in self.wanted
            if name != "predictions"
        }
        # In one order in memory, as from every bank: sums over them are then the same bits.
        return Teaching(states, kept.get(("predictions", None))).map(Tensor.contiguous)


class ReplicatedBank:
    """All teachers on this rank, one after the other."""

    def __init__(self, teachers: Iterable[FrozenTeacher]) -> None:
        self.own = tuple(teachers)

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        return tuple(count_parameters(teacher) for teacher in self.own)

    @property
    def plans(self) -> tuple[TeacherPlan, ...]:
        return tuple(teacher.plan for teacher in self.own)

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        return tuple(
            teacher(
                shown.frames_BTCHW,
                num_input_frames=shown.num_input_frames,
                num_frames=shown.num_frames,
                sampling_mask_BT=shown.sampling_mask_BT,
                noise_BTZ=shown.noise_BTZ,
            ).to(shown.frames_BTCHW.dtype)
            for teacher in self.own
        )


def held_bytes(bank: TeacherBank) -> int:
    """Of the teachers' weights that lie on this rank: of sharded ones, its shards."""
    # Imported here: it takes as long as half of torch, and training does not ask for this.
    from torch.distributed.tensor import DTensor

    weights = (each for own in bank.own for each in (*own.parameters(), *own.buffers()))
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in weights)


def convolutions(network: nn.Module) -> list[nn.Module]:
    """The convolutions of a network, of any dimension."""
    return [module for module in network.modules() if isinstance(module, _ConvNd)]


def rounded_convolutions(network: nn.Module) -> list[nn.Module]:
    """Those whose weights may as well be kept in half precision, as they are always rounded to it.

    Not matrix products (`Convolution.is_pointwise`): on CPUs these stay float32, and on GPUs
    autocast rounds them at every use.
    """
    return [
        module
        for module in convolutions(network)
        if not (isinstance(module, Convolution) and module.is_pointwise)
    ]


def told_dtype(memories: Memories, frames: torch.dtype) -> torch.dtype:
    """In which numbers a teacher tells; fp16 ends at 65,504, and what is larger becomes infinite.

    Args:
        memories: the precision that was chosen.
        frames: dtype of the frames that it reads.
    """
    return {"full": frames, "bf16": torch.bfloat16, "fp16": torch.float16}[memories]
