"""From a run's settings to its transfer method: teachers loaded, compared and adapted.

The only place that branches on a method's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from tmu_dist.config import ConfigError, KLConfig, RunConfig, TrainingConfig
from tmu_dist.models.build import skeleton
from tmu_dist.models.rollout import Predictor
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
        ConfigError: settings of the training that do not go with the backbone.
        TeacherError: a teacher is missing, damaged or does not fit.
    """
    transfer = config.transfer
    network = skeleton(frame, config.model)
    _check_training(config, network)
    loaded = [load_model(source, device=device) for source in transfer.teachers]
    student = StudentFacts(
        frame=frame,
        memories=network.memory_shapes,
        data=data,
        taught=transfer.tmu.layers,
    )
    adapter = transfer.adapter if transfer.method == "tmu" else None
    plans = [plan_teacher(t.card, t.model.memory_shapes, student, adapter) for t in loaded]
    method = _make_method(config, frame, _objective(config.training, network), loaded, plans)
    resident = method.bank.parameters_per_teacher if isinstance(method, MemoryDistillation) else ()
    return PreparedTransfer(method, tuple(t.card for t in loaded), resident)


def _make_method(
    config: RunConfig,
    frame: FrameShape,
    objective: Objective,
    teachers: list[LoadedModel],
    plans: list[TeacherPlan],
) -> TransferMethod:
    transfer = config.transfer
    num_input_frames = config.window.num_input_frames
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


def _check_training(config: RunConfig, network: Predictor) -> None:
    """Refuse what has no effect, or no meaning, with this kind of network."""
    training, cell = config.training, config.model.cell
    if training.kl != KLConfig() and not network.latent_size:
        raise ConfigError(
            f"training.kl only has an effect on networks with latents, not on model.cell={cell}."
        )
    if network.frame_loss != "likelihood":
        return
    if training.sampling != "always" or training.frame_loss != "backbone":
        raise ConfigError(
            f"model.cell={cell} learns the likelihood of true frames only: set "
            "training.sampling=always and leave training.frame_loss=backbone."
        )
    if training.adversarial.is_on:
        raise ConfigError(
            f"model.cell={cell} has no differentiable forecasts: training.adversarial cannot have "
            "an effect."
        )


def _objective(training: TrainingConfig, network: Predictor) -> Objective:
    chosen, kl = training.frame_loss, training.kl
    return Objective(
        network.frame_loss if chosen == "backbone" else chosen,
        frame_weight=training.frame_weight,
        kl_weight=partial(annealed, kl.weight, start=kl.anneal_from, stop=kl.anneal_until),
        reduction=training.loss_reduction,
    )
