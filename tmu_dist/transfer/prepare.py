"""From a run's settings to its transfer method: teachers loaded, compared and adapted.

The only place that branches on a method's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from tmu_dist.config import RunConfig
from tmu_dist.models.build import frame_loss_of, memory_shapes
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.adapter import StudentFacts, TeacherPlan, plan_teacher
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import LoadedModel, load_model
from tmu_dist.transfer.base import Objective, TransferMethod, annealed
from tmu_dist.transfer.finetune import Finetune
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.tmu import MemoryDistillation


@dataclass(frozen=True)
class PreparedTransfer:
    """A method, the cards of the teachers it was given, and what they cost during training."""

    method: TransferMethod
    teachers: tuple[TeacherCard, ...]
    resident_parameters: tuple[int, ...]
    """Frozen weights that stay beside the student during training, one number a teacher."""


def prepare_transfer(
    config: RunConfig, frame: FrameShape, data: DataFacts, device: torch.device
) -> PreparedTransfer:
    """Load the teachers that a run names, check that they fit, and build its method.

    Raises:
        TeacherError: a teacher is missing, damaged or does not fit.
    """
    transfer = config.transfer
    loaded = [load_model(source, device=device) for source in transfer.teachers]
    student = StudentFacts(
        frame=frame,
        memories=memory_shapes(frame, config.model),
        data=data,
        taught=transfer.tmu.layers,
    )
    adapter = transfer.adapter if transfer.method == "tmu" else None
    plans = [plan_teacher(t.card, t.model.memory_shapes, student, adapter) for t in loaded]
    method = _make_method(config, frame, loaded, plans)
    resident = method.bank.parameters_per_teacher if isinstance(method, MemoryDistillation) else ()
    return PreparedTransfer(method, tuple(t.card for t in loaded), resident)


def _make_method(
    config: RunConfig,
    frame: FrameShape,
    teachers: list[LoadedModel],
    plans: list[TeacherPlan],
) -> TransferMethod:
    transfer = config.transfer
    num_input_frames = config.window.num_input_frames
    objective = _objective(config)
    if transfer.method == "tmu":
        return MemoryDistillation(
            frame,
            config.model,
            objective,
            tmu=transfer.tmu,
            bank=ReplicatedBank(
                [FrozenTeacher(t.model, plan) for t, plan in zip(teachers, plans, strict=True)]
            ),
            beta=transfer.beta,
            teacher_input=transfer.teacher_input,
            num_input_frames=num_input_frames,
        )
    if transfer.method == "finetune":
        (start,) = teachers
        return Finetune(
            frame,
            config.model,
            objective,
            num_input_frames=num_input_frames,
            start_name=start.card.name,
            start_weights=start.model.state_dict(),
        )
    return Scratch(
        frame,
        config.model,
        objective,
        num_input_frames=num_input_frames,
        tmu=transfer.tmu,
        num_slots=transfer.num_slots,
    )


def _objective(config: RunConfig) -> Objective:
    training = config.training
    chosen = training.frame_loss
    kl = training.kl
    return Objective(
        frame_loss_of(config.model) if chosen == "backbone" else chosen,
        frame_weight=training.frame_weight,
        kl_weight=partial(annealed, kl.weight, start=kl.anneal_from, stop=kl.anneal_until),
        reduction=training.loss_reduction,
    )
