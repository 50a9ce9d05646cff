"""How much memory a rank's training takes at its peak, before it begins: from settings and cards.

The run's own step, and its look at whether teachers teach, run on tensors without numbers
(`memory_trace`). Nothing is loaded or computed.

Deliberately not here: how much memory there is, and what was taken (`memory_room`).

Legend: B batch, T time, C channels, Z noise, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tmu_dist.collectives import Collectives, RankGroup
from tmu_dist.config import RunConfig, WindowConfig
from tmu_dist.models.arrange import arrange
from tmu_dist.models.build import count_parameters, skeleton
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.ahead import TeachingAhead
from tmu_dist.teachers.bank import (
    FrozenTeacher,
    ReplicatedBank,
    Shown,
    TeacherBank,
    Teaching,
)
from tmu_dist.teachers.batched import run_together
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.planned import PlannedTeacher, build_bank, plan_bank
from tmu_dist.teachers.store import build_network
from tmu_dist.training.build import build_step
from tmu_dist.training.memory_trace import GRADIENTS, Tracing
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import TaughtMethod, TrainingBatch
from tmu_dist.transfer.prepare import outline_method

WEIGHTS, OPTIMIZER, BATCH, TEACHERS, ACTIVATIONS = (
    "weights",
    "optimizer",
    "batch",
    "teachers",
    "activations",
)
PARTS = (WEIGHTS, OPTIMIZER, GRADIENTS, BATCH, TEACHERS, ACTIVATIONS)
"""What memory is for: weights of the trainee; Adam's state; gradients, and what a backward pass
needs on its way; frames of batches; teachers' weights, their work, and what they tell; what the
student keeps for its backward pass."""
_LOOK_BACK = ("e3d_lstm", "e3d_openstl")
"""Backbones whose steps read all earlier ones, so that one more step takes more than the last."""
_MAPS_OF_A_STEP, _COPIES_OF_WEIGHTS = 500, 100
"""More than any network here keeps of a step, in its memories and frames; and of its weights."""
_SHORT, _LONGER = (
    WindowConfig(num_input_frames=1, num_target_frames=2),
    WindowConfig(num_input_frames=2, num_target_frames=3),
)
"""Of others two windows tell what the whole one takes: each step adds the same."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one rank's tensors when they are most."""

    parts: Mapping[str, int]
    """By what they are for (`PARTS`)."""

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def training_memory(
    config: RunConfig,
    frame: FrameShape,
    teachers: Sequence[TeacherCard],
    *,
    device: torch.device,
    world_size: int = 1,
    group: RankGroup | None = None,
    has_missing: bool = False,
) -> TrainingMemory:
    """Predict the peak of one rank's tensors.

    Args:
        config: of the run.
        frame: of its archive.
        teachers: their cards.
        device: of the rank: a GPU's convolutions keep other things than a CPU's.
        world_size: ranks of the run, which share its batches.
        group: those that share teachers; None: this rank alone.
        has_missing: whether pixels can be missing.

    Raises:
        ConfigError, TeacherError: the student cannot be built, or teachers do not fit.
    """
    rank = _Rank(
        config=_traceable(config),
        frame=frame,
        teachers=tuple(teachers),
        device=device,
        group=group or RankGroup(range(1), 0),
        sequences=-(-config.training.batch_size // world_size),
        has_missing=has_missing,
    )
    wanted = config.window
    if _is_even(config) and wanted.num_frames > _LONGER.num_frames:
        peak = _extended(_traced(rank, _SHORT), _traced(rank, _LONGER), wanted)
    else:
        peak = _traced(rank, wanted)
    return TrainingMemory(parts={part: peak.get(part, 0) for part in PARTS})


def memory_at_most(
    config: RunConfig, frame: FrameShape, num_teachers: int, world_size: int = 1
) -> int:
    """Bytes that one rank certainly does not need, found in no time: many times too many.

    Args:
        config: of the run.
        frame: of its archive.
        num_teachers: beside the student.
        world_size: ranks of the run.
    """
    network = skeleton(frame, config.model)
    at_once = -(-config.training.batch_size // world_size)
    steps = config.window.num_frames - 1
    maps = sum(s.channels * s.slices * s.height * s.width for s in network.memory_shapes)
    pixels = frame.channels * frame.height * frame.width
    numbers = at_once * steps * _MAPS_OF_A_STEP * (maps + pixels)
    if not _is_even(config):
        numbers *= steps
    weights = _COPIES_OF_WEIGHTS * count_parameters(network)
    return 4 * (1 + num_teachers) * (numbers + weights)


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """Whose memory is traced."""

    config: RunConfig
    frame: FrameShape
    teachers: tuple[TeacherCard, ...]
    device: torch.device
    group: RankGroup
    sequences: int
    """Of its part of a batch."""
    has_missing: bool


def _traceable(config: RunConfig) -> RunConfig:
    """The run without what cannot be traced: fusion and recording. One update tells of both."""
    compute = replace(config.compute, cuda_graph="off")
    if compute.arithmetic == "compiled":
        compute = replace(compute, arithmetic="plain")
    training = replace(config.training, reverse_input=_one_update(config))
    return replace(config, compute=compute, training=training)


def _one_update(config: RunConfig) -> Literal["average", "off"]:
    """Both directions in one update hold gradients while the second one runs."""
    return "average" if config.training.reverse_input == "average" else "off"


def _is_even(config: RunConfig) -> bool:
    """Whether every step takes as much as the one before, so that two short windows tell all."""
    looks_back = config.model.cell in _LOOK_BACK or config.transfer.method == "art"
    # Discriminators see clips of a fixed length.
    return not looks_back and not config.training.adversarial.is_on


def _extended(
    short: Mapping[str, int], longer: Mapping[str, int], wanted: WindowConfig
) -> Mapping[str, int]:
    """What a window takes whose bytes grow as between `_SHORT` and `_LONGER`, by part."""
    added = _LONGER.num_frames - _SHORT.num_frames
    steps = wanted.num_frames - _SHORT.num_frames
    return {
        part: short.get(part, 0) + (longer.get(part, 0) - short.get(part, 0)) * steps // added
        for part in {*short, *longer}
    }


def _traced(rank: _Rank, window: WindowConfig) -> Mapping[str, int]:
    """The peak of a rank in a window, by part."""
    config, device = replace(rank.config, window=window), rank.device
    with Tracing(device) as tracing:
        tracing.hold(WEIGHTS, _start_bytes(config, rank.teachers))
        with tracing.of(WEIGHTS):
            banks = _Banks(rank, tracing)
            method = outline_method(
                config, rank.frame, rank.teachers, device=device, make_bank=banks.build
            )
            student = method.build_student()
            arrange(student, config.compute)
            trainee = method.trainee(student)
            step = build_step(config, method, student, trainee, device, Collectives())
        if isinstance(method, TaughtMethod) and config.placement.ahead and device.type == "cuda":
            method.ahead = TeachingAhead(torch.device("cpu"))  # without a stream, but as long
        with tracing.of(OPTIMIZER):
            _update_once(step)
        return _peak(rank, tracing, step, student.latent_size, window)


def _peak(
    rank: _Rank, tracing: Tracing, step: TrainingStep, noise_size: int, window: WindowConfig
) -> Mapping[str, int]:
    """The most that is held while a batch is learned from, and before.

    Looking whether teachers teach keeps all that a backward pass lets go. So where that is done an
    iteration takes less, unless it has more on its hands.
    """
    method, at_once = step.method, slice(rank.config.scale.sequences_at_once)
    with tracing.of(BATCH):
        # The last batch is kept for liveness, and the next one is prepared ahead.
        last, batch, following = (_batch(rank, window, noise_size) for _ in range(3))
    if isinstance(method, TaughtMethod) and not method.teaches_at(batch):
        last_step = rank.config.training.num_steps  # a schedule may let them wait
        last, batch, following = (replace(b, step=last_step) for b in (last, batch, following))
    tracing.forget_peak()
    with tracing.of(ACTIVATIONS):
        looks = step.look(last.rows(at_once)) is not None
        has_more = isinstance(method, TaughtMethod) and method.ahead is not None
        if not looks or has_more or rank.config.training.adversarial.is_on:
            step(batch, following)
    return tracing.peak


def _start_bytes(config: RunConfig, teachers: Sequence[TeacherCard]) -> int:
    """Of the weights that a student started from, which a run keeps; L2-SP's method has its own."""
    number = config.transfer.starting_teacher
    if number is None or config.transfer.method == "l2_sp":
        return 0
    return sum(values.nbytes for values in build_network(teachers[number]).state_dict().values())


def _update_once(step: TrainingStep) -> None:
    """Let optimisers make their state, which the second iteration finds."""
    for optimizer in vars(step).values():
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _batch(rank: _Rank, window: WindowConfig, noise_size: int) -> TrainingBatch:
    frame, sequences = rank.frame, rank.sequences
    size = sequences, window.num_frames, frame.channels, frame.height, frame.width
    observed = torch.ones(size, dtype=torch.bool) if rank.has_missing else None
    return TrainingBatch(
        frames_BTCHW=torch.empty(size),
        observed_BTCHW=observed,
        sampling_mask_BT=torch.ones(sequences, window.num_target_frames - 1, dtype=torch.bool),
        weights_B=torch.ones(sequences),
        noise_BTZ=torch.empty(sequences, window.num_frames - 1, noise_size) if noise_size else None,
        step=1,
    )


class _Banks:
    """Makes the bank of teachers that a rank has, whose memory is counted as theirs."""

    def __init__(self, rank: _Rank, tracing: Tracing) -> None:
        self._rank = rank
        self._tracing = tracing

    def build(self, teachers: Sequence[PlannedTeacher]) -> TeacherBank:
        """For `outline_method`."""
        config, group, device = self._rank.config, self._rank.group, self._rank.device
        kind, choice = config.placement.kind, config.compute.batch_teachers
        likenesses = [teacher.likeness for teacher in teachers]
        with self._tracing.of(""):
            if kind == "cached":
                return _AlikeBank(teachers, device, self._tracing, is_cached=True)
            plan = plan_bank(teachers, config.placement, group.size, device)
            self._tracing.hold(TEACHERS, plan.resident_bytes[group.place])
            if plan.kind != "placed" and not run_together(choice, likenesses, plan, device):
                return _AlikeBank(teachers, device, self._tracing)
            members = _AbsentMembers(group.ranks, group.place)
            bank, _ = build_bank(teachers, config.placement, members, device, None, choice)
        return _TracedBank(bank, self._tracing)


class _TracedBank:
    """A bank whose memory is counted as teachers'."""

    def __init__(self, bank: TeacherBank, tracing: Tracing) -> None:
        self._bank = bank
        self._tracing = tracing
        self.parameters_per_teacher = bank.parameters_per_teacher
        self.plans = bank.plans
        self.own: tuple[FrozenTeacher, ...] = bank.own

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        """As `TeacherBank.teach`."""
        with self._tracing.of(TEACHERS):
            return self._bank.teach(shown)


class _AlikeBank:
    """Teachers that run one after the other: of those that are alike one runs for all.

    Args:
        teachers: all of them.
        device: of the rank.
        tracing: to which their memory is told.
        is_cached: nothing but what they tell is ever on the rank.
    """

    def __init__(
        self,
        teachers: Sequence[PlannedTeacher],
        device: torch.device,
        tracing: Tracing,
        *,
        is_cached: bool = False,
    ) -> None:
        likenesses = [teacher.likeness for teacher in teachers]
        self._first = [likenesses.index(each) for each in likenesses]
        self._running = {m: teachers[m].load(device) for m in sorted(set(self._first))}
        self._tracing = tracing
        self._is_cached = is_cached
        self._has_run = is_cached
        self.parameters_per_teacher = tuple(teacher.parameters for teacher in teachers)
        self.plans = tuple(teacher.plan for teacher in teachers)
        self.own = tuple(self._running[m] for m in self._first)

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        """As `TeacherBank.teach`."""
        told: dict[int, Teaching] = {}
        for m, teacher in self._running.items():
            before = self._tracing.live[TEACHERS]
            with self._tracing.of("" if self._is_cached else TEACHERS):
                (told[m],) = ReplicatedBank([teacher]).teach(shown)
            if not self._has_run:  # what it keeps for the next time, the others keep, too
                size = sum(values.nbytes for values in told[m].tensors().values())
                kept = self._tracing.live[TEACHERS] - before - size
                self._tracing.hold(TEACHERS, max(kept, 0) * (self._first.count(m) - 1))
        self._has_run = True
        with self._tracing.of(TEACHERS):
            return tuple(
                told[first].map(torch.empty_like) if self._is_cached or m != first else told[m]
                for m, first in enumerate(self._first)
            )


class _AbsentMembers(RankGroup):
    """A group whose other members tell nothing, but as much as they would."""

    def all_gather(self, values: Tensor) -> Tensor:
        return values.new_empty((self.size, *values.shape))

    def all_to_all(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return values.new_empty(sum(received))
