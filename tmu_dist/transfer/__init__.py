"""Transfer methods, one file each, behind the contract of `base.TransferMethod`.

`make_method` is the only place that branches on a method's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tmu_dist.config import RunConfig
from tmu_dist.models.build import FrameShape
from tmu_dist.teachers.bank import ReplicatedBank
from tmu_dist.teachers.card import DataFacts, TeacherCard, check_fits
from tmu_dist.teachers.store import LoadedModel, load_model
from tmu_dist.transfer.base import TransferMethod
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
    loaded = [load_model(source, device=device) for source in config.transfer.teachers]
    for teacher in loaded:
        check_fits(teacher.card, frame=frame, model=config.model, data=data)
    method = _make_method(config, frame, loaded)
    resident = method.bank.parameters_per_teacher if isinstance(method, MemoryDistillation) else ()
    return PreparedTransfer(method, tuple(t.card for t in loaded), resident)


def _make_method(
    config: RunConfig, frame: FrameShape, teachers: list[LoadedModel]
) -> TransferMethod:
    transfer = config.transfer
    num_input_frames = config.window.num_input_frames
    reduction = config.training.loss_reduction
    if transfer.method == "tmu":
        return MemoryDistillation(
            frame,
            config.model,
            tmu=transfer.tmu,
            bank=ReplicatedBank([teacher.model for teacher in teachers]),
            beta=transfer.beta,
            teacher_input=transfer.teacher_input,
            num_input_frames=num_input_frames,
            reduction=reduction,
        )
    if transfer.method == "finetune":
        (start,) = teachers
        return Finetune(
            frame,
            config.model,
            num_input_frames=num_input_frames,
            reduction=reduction,
            start_name=start.card.name,
            start_weights=start.model.state_dict(),
        )
    return Scratch(
        frame,
        config.model,
        num_input_frames=num_input_frames,
        reduction=reduction,
        tmu=transfer.tmu,
        num_slots=transfer.num_slots,
    )
