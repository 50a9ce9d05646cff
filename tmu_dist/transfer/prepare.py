"""From a run's settings to its transfer method: teachers loaded, compared and adapted.

The only place that branches on a method's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from tmu_dist.collectives import RankGroup
from tmu_dist.config import ConfigError, KLConfig, RunConfig, TrainingConfig, TransferConfig
from tmu_dist.models.build import backbones_with_zigzag, skeleton
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.adapter import StudentFacts, check_start, plan_teacher
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, TeacherBank, Wanted
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError
from tmu_dist.teachers.store import LoadedModel, load_model
from tmu_dist.transfer.art import AttentiveTransfer
from tmu_dist.transfer.base import Objective, Task, TaughtMethod, TransferMethod, annealed
from tmu_dist.transfer.controls import ShuffledBank, with_random_weights
from tmu_dist.transfer.distillation import Distillation
from tmu_dist.transfer.knowledge_flow import KnowledgeFlow
from tmu_dist.transfer.l2_sp import L2SP
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.start import Start, StartReport
from tmu_dist.transfer.tmu import MemoryDistillation


@dataclass(frozen=True, kw_only=True)
class PreparedTransfer:
    """A method, where its student starts, and the teachers that it was given."""

    method: TransferMethod
    start: Start | None
    teachers: tuple[TeacherCard, ...]
    resident_parameters: tuple[int, ...]
    """Frozen weights that stand beside the student during training alone, one number a teacher."""

    def build_student(self) -> tuple[Predictor, StartReport | None]:
        """The student with its first weights (under torch's global seed), and where they are from.

        Raises:
            TeacherError: its start does not fit.
        """
        student = self.method.build_student()
        if self.start is None:
            return student, None
        task = self.method.task
        names = frozenset(skeleton(task.frame, task.model).state_dict())
        return student, self.start.apply(self.method.plain_part(student), names)


def prepare_transfer(
    config: RunConfig,
    frame: FrameShape,
    data: DataFacts,
    device: torch.device,
    group: RankGroup | None = None,
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
    task = Task(
        frame=frame,
        model=config.model,
        objective=_objective(config.training, network),
        num_input_frames=config.window.num_input_frames,
    )
    start = None
    if transfer.starting_teacher is not None:
        first = loaded[transfer.starting_teacher]
        start = Start(
            name=first.card.name,
            weights=first.model.state_dict(),
            unmatched=transfer.start.unmatched,
        )
    if transfer.method in ("finetune", "l2_sp"):
        for each in loaded:
            check_start(each.card, data, transfer.adapter)
    if transfer.control == "random_weights":
        loaded = [
            with_random_weights(each, seed=config.training.seed, number=m)
            for m, each in enumerate(loaded)
        ]
    student = StudentFacts(
        frame=frame, memories=network.memory_shapes, data=data, taught=_taught_layers(transfer)
    )
    method = _make_method(config, task, loaded, student, start)
    resident = method.bank.parameters_per_teacher if isinstance(method, TaughtMethod) else ()
    return PreparedTransfer(
        method=method,
        start=start,
        teachers=tuple(each.card for each in loaded),
        resident_parameters=resident,
    )


def _taught_layers(transfer: TransferConfig) -> Literal["all"] | tuple[int, ...]:
    """The student's layers that a teacher's layers must fit."""
    layers = transfer.imitation.layers
    if transfer.method != "tmu" or transfer.tmu.layers == "all":
        return layers
    if layers == "all":
        return transfer.tmu.layers
    if missing := set(layers) - set(transfer.tmu.layers):
        raise ConfigError(
            f"transfer.imitation.layers={list(layers)}: {sorted(missing)} are no TMU layers "
            f"(transfer.tmu.layers={list(transfer.tmu.layers)})."
        )
    return layers


def _make_method(
    config: RunConfig,
    task: Task,
    teachers: Sequence[LoadedModel],
    student: StudentFacts,
    start: Start | None,
) -> TransferMethod:
    transfer = config.transfer

    def frozen(*wanted: Wanted) -> list[FrozenTeacher]:
        return [
            FrozenTeacher(
                _able_to_tell(each, wanted).model,
                plan_teacher(each.card, each.model.memory_shapes, student, transfer.adapter),
                wanted,
            )
            for each in teachers
        ]

    def taught(teachers: Sequence[FrozenTeacher]) -> dict[str, Any]:
        bank: TeacherBank = ReplicatedBank(teachers)
        if transfer.control == "shuffled":
            bank = ShuffledBank(bank)
        return {"bank": bank, "teacher_input": transfer.teacher_input}

    match transfer.method:
        case "tmu":
            states: tuple[Wanted, ...] = (
                ("memory", "zigzag") if transfer.tmu.zigzag else ("memory",)
            )
            return MemoryDistillation(
                task,
                tmu=transfer.tmu,
                imitation=transfer.imitation,
                beta=transfer.beta,
                beta_schedule=transfer.beta_schedule,
                **taught(frozen(*states)),
            )
        case "distillation":
            settings = transfer.distillation
            wanted: list[Wanted] = [settings.state] if settings.features else []
            wanted += ["predictions"] if settings.responses else []
            return Distillation(
                task, settings=settings, imitation=transfer.imitation, **taught(frozen(*wanted))
            )
        case "knowledge_flow":
            return KnowledgeFlow(
                task,
                settings=transfer.knowledge_flow,
                num_steps=config.training.num_steps,
                # Its student reads their states.
                **taught([teacher.hide_targets() for teacher in frozen("hidden")]),
            )
        case "art":
            return AttentiveTransfer(
                task,
                settings=transfer.art,
                adapter=transfer.adapter,
                teachers=list(zip([t.card for t in teachers], frozen("hidden", "memory"))),
            )
        case "l2_sp":
            assert start is not None
            return L2SP(task, settings=transfer.l2_sp, start=start)
        case "scratch" | "finetune" | "tmu_scratch":
            return Scratch(task, tmu=transfer.tmu, num_slots=transfer.num_slots)


def _able_to_tell(teacher: LoadedModel, wanted: Sequence[Wanted]) -> LoadedModel:
    """The teacher, unless its cells have not what it is asked for."""
    layers = [layer for layer in teacher.model.modules() if isinstance(layer, RecurrentLayer)]
    if "zigzag" in wanted and not all(layer.cell.has_zigzag for layer in layers):
        raise TeacherError(
            f"Teacher {teacher.card.name!r} (model.cell={teacher.card.model.cell}) has no memory M "
            "to teach: leave transfer.tmu.zigzag out, or choose teachers whose cells have it "
            f"({', '.join(backbones_with_zigzag())})."
        )
    return teacher


def _check_training(config: RunConfig, network: Predictor) -> None:
    """Refuse what has no effect, or no meaning, with this kind of network."""
    training, cell = config.training, config.model.cell
    if training.kl != KLConfig() and not network.latent_size:
        raise ConfigError(
            f"training.kl only has an effect on networks with latents, not on model.cell={cell}."
        )
    flow = config.transfer.knowledge_flow
    if flow.consistency and training.reverse_input == "average":
        raise ConfigError(
            "transfer.knowledge_flow.consistency compares with the iterate before the last update, "
            "and with training.reverse_input=average two passes share an update: use update or off."
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
