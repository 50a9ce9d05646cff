"""How many operations training takes, counted as its iterations would run, without any numbers.

Deliberately not here: networks alone (`operations`), which need neither teachers nor stores.

Legend: B batch, T time, C channels, Z noise, H, W height, width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tmu_dist.config import PlacementConfig, RunConfig, TransferConfig, WindowConfig
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.transfer.base import TaughtMethod, TrainingBatch
from tmu_dist.transfer.prepare import outline_method

_BACKWARD = 2
"""A backward pass in forward passes: gradients of the inputs, and of the weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingOperations:
    """What a run's iterations take on one sequence each, gradients included.

    A method asks its teachers in all iterations, up to some one, or from some one on.
    """

    first: int
    """Operations of the first iteration."""
    num_first: int
    """Iterations like that one, from the first."""
    later: int
    """Operations of each one after them."""

    def until(self, step: int) -> int:
        """Of all iterations up to one."""
        return self.first * min(step, self.num_first) + self.later * max(step - self.num_first, 0)


def training_operations(
    config: RunConfig, frame: FrameShape, teachers: Sequence[TeacherCard]
) -> TrainingOperations:
    """Count what training takes, whatever the method; no weights are read, nothing is computed.

    A backward pass counts as two forward passes. What runs without gradients, as teachers do,
    runs forwards only; teachers count where they stand beside the student, also if a cache has
    what they tell. With reverse input a sequence is read in both directions. The optimiser, the
    losses and what adversarial training adds are not counted.

    Args:
        config: of the run.
        frame: of its archive.
        teachers: their cards.

    Raises:
        ConfigError, TeacherError: the student cannot be built.
    """
    config = replace(config, placement=PlacementConfig())  # autocast does not know "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        method = outline_method(config, frame, teachers)
        student = method.build_student()
        trainee = method.trainee(student)
        batch = _batch(config.window, frame, student.latent_size)
    directions = 1 if config.training.reverse_input == "off" else 2

    def asks(step: int) -> bool:
        return isinstance(method, TaughtMethod) and method.teaches_at(replace(batch, step=step))

    def count(step: int) -> int:
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), _TrainingCounter() as counter:
            method.loss(trainee, replace(batch, step=step))
        return directions * counter.operations

    last = config.training.num_steps
    num_first = bisect_left(range(1, last + 1), True, key=lambda step: asks(step) != asks(1))
    first = count(1)
    later = first if num_first == last else count(last)
    return TrainingOperations(first=first, num_first=num_first, later=later)


def cost_of_transfer(
    config: RunConfig, frame: FrameShape, teachers: Sequence[TeacherCard]
) -> float:
    """Operations of memory transfer in those of the plain network, over as many iterations.

    Args:
        config: of the TMU student.
        frame: of its archive.
        teachers: cards of those beside it.
    """
    plain = replace(config, transfer=TransferConfig(), placement=PlacementConfig())
    last = config.training.num_steps
    taught = training_operations(config, frame, teachers).until(last)
    return taught / training_operations(plain, frame, ()).until(last)


class _TrainingCounter(TorchDispatchMode):
    """Counts operations with those of the backward passes to come."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if (count := flop_registry.get(operation.overloadpacket)) is not None:
            passes = 1 + _BACKWARD if torch.is_grad_enabled() else 1
            self.operations += passes * count(*args, **(kwargs or {}), out_val=result)
        return result


def _batch(window: WindowConfig, frame: FrameShape, noise_size: int) -> TrainingBatch:
    """One sequence, on the default device."""
    return TrainingBatch(
        frames_BTCHW=torch.zeros(1, window.num_frames, frame.channels, frame.height, frame.width),
        observed_BTCHW=None,
        sampling_mask_BT=torch.ones(1, window.num_target_frames - 1, dtype=torch.bool),
        weights_B=torch.ones(1),
        noise_BTZ=torch.zeros(1, window.num_frames - 1, noise_size) if noise_size else None,
    )
