"""From a run's settings to its transfer method: teachers loaded, compared and adapted.

The only place that branches on a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from tmu_dist.collectives import RankGroup
from tmu_dist.config import (
    ConfigError,
    DataConfig,
    KLConfig,
    RunConfig,
    TrainingConfig,
    TransferConfig,
)
from tmu_dist.data.cache import node_cache
from tmu_dist.models.build import skeleton
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.adapter import StudentFacts, check_start
from tmu_dist.teachers.ahead import TeachingAhead
from tmu_dist.teachers.bank import ReplicatedBank, TeacherBank, Wanted
from tmu_dist.teachers.batched import run_together
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError
from tmu_dist.teachers.placed import FrameCodec
from tmu_dist.teachers.placement import Placement
from tmu_dist.teachers.planned import (
    LoadNetwork,
    PlannedTeacher,
    TeacherUse,
    build_bank,
    plan_use,
)
from tmu_dist.teachers.store import LoadedModel, build_network, load_card, load_model
from tmu_dist.transfer.art import AttentiveTransfer
from tmu_dist.transfer.base import Objective, Task, TaughtMethod, TransferMethod, annealed
from tmu_dist.transfer.controls import ShuffledBank, with_random_weights
from tmu_dist.transfer.distillation import Distillation
from tmu_dist.transfer.knowledge_flow import KnowledgeFlow
from tmu_dist.transfer.l2_sp import L2SP
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.start import Start, StartReport
from tmu_dist.transfer.tmu import MemoryDistillation

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class PreparedTransfer:
    """A method, where its student starts, and the teachers that it was given."""

    method: TransferMethod
    start: Start | None
    teachers: tuple[TeacherCard, ...]
    resident_parameters: tuple[int, ...]
    """Frozen weights that stand beside the student during training alone, one number a teacher."""
    placement: Placement | None = None
    """Of those teachers; None: there are none."""

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
    """Compare the teachers that a run names, load those that this rank holds, build the method.

    Every rank knows all teachers by their cards. No collectives are used.

    Args:
        config: of the run.
        frame: of its archive.
        data: of its archive.
        device: of this rank.
        group: the ranks that share teachers; None: this rank alone.

    Raises:
        ConfigError: settings of the training that do not go with the backbone, or teachers that do
            not fit into memory.
        TeacherError: a teacher is missing, damaged or does not fit.
    """
    transfer = config.transfer
    network = skeleton(frame, config.model)
    _check_training(config, network)
    sources = _sources(config)
    start = None
    if transfer.starting_teacher is not None:
        first = _model(config.data, transfer.teachers[transfer.starting_teacher], device)
        start = Start(
            name=first.card.name,
            weights=first.model.state_dict(),
            unmatched=transfer.start.unmatched,
        )
    if transfer.method in ("finetune", "l2_sp"):
        for card, _ in sources:
            check_start(card, data, transfer.adapter)
    planned = _planned(config, sources, frame, data)
    bank, placement = None, None
    if transfer.runs_teachers_beside:
        bank, placement = _bank(config, planned, data, device, group or RankGroup(range(1), 0))
    elif config.compute.batch_teachers == "on":
        raise ConfigError(
            "compute.batch_teachers=on has no effect: with transfer.method="
            f"{transfer.method} no teacher runs beside its student. Leave it out."
        )
    task = _task(config, frame, network)
    method = _make_method(config, task, planned, bank, start, device)
    if isinstance(method, TaughtMethod) and config.placement.ahead and device.type == "cuda":
        method.ahead = TeachingAhead(device)
    return PreparedTransfer(
        method=method,
        start=start,
        teachers=tuple(card for card, _ in sources),
        resident_parameters=() if bank is None else bank.parameters_per_teacher,
        placement=placement,
    )


def outline_method(
    config: RunConfig,
    frame: FrameShape,
    teachers: Sequence[TeacherCard],
    *,
    device: torch.device = _META,
    make_bank: Callable[[Sequence[PlannedTeacher]], TeacherBank] | None = None,
) -> TransferMethod:
    """A run's method as its teachers' cards describe it, without numbers in its weights.

    Args:
        config: of the run; what lies at the addresses of its teachers is not looked at.
        frame: of its archive.
        teachers: their cards.
        device: "meta", or where tensors without numbers pretend to lie.
        make_bank: makes the bank of teachers that run beside the student; None: all of them here.

    Raises:
        ConfigError, TeacherError: they do not fit.
    """
    transfer = config.transfer
    with torch.random.fork_rng(devices=[]), device:
        sources = [_Source(card, partial(_outline, card)) for card in teachers]
        # Where the numbers of student and teachers differ in meaning, that is declared.
        planned = _planned(config, sources, frame, teachers[0].data) if teachers else ()
        bank = start = None
        if transfer.runs_teachers_beside:
            bank = (make_bank or partial(_all_here, device=device))(planned)
        if transfer.starting_teacher is not None:
            first = teachers[transfer.starting_teacher]
            start = Start(
                name=first.name,
                weights=build_network(first).state_dict(),
                unmatched=transfer.start.unmatched,
            )
        task = _task(config, frame, skeleton(frame, config.model))
        return _make_method(config, task, planned, bank, start, device)


def _all_here(teachers: Sequence[PlannedTeacher], *, device: torch.device) -> TeacherBank:
    return ReplicatedBank(teacher.load(device) for teacher in teachers)


def planned_teachers(
    config: RunConfig, frame: FrameShape, data: DataFacts
) -> tuple[PlannedTeacher, ...]:
    """The teachers that a run's method runs, without their weights; arguments as above.

    Raises:
        TeacherError: a teacher is missing or does not fit.
    """
    return _planned(config, _sources(config), frame, data)


def _task(config: RunConfig, frame: FrameShape, network: Predictor) -> Task:
    return Task(
        frame=frame,
        model=config.model,
        objective=_objective(config.training, network),
        num_input_frames=config.window.num_input_frames,
    )


class _Source(NamedTuple):
    """A teacher that a run names, with the weights that it is to have."""

    card: TeacherCard
    load: LoadNetwork


def _sources(config: RunConfig) -> list[_Source]:
    found = []
    for number, address in enumerate(config.transfer.teachers):
        card = load_card(address)
        source = _Source(card, partial(_load, config.data, address, card))
        if config.transfer.control == "random_weights":
            source = _untrained(card, seed=config.training.seed, number=number)
        found.append(source)
    return found


def _load(data: DataConfig, address: str, card: TeacherCard, device: torch.device) -> Predictor:
    loaded = _model(data, address, device)
    if loaded.card != card:
        raise TeacherError(
            f"{address} changed while it was read: a run that is still trained offers other "
            "weights from time to time. Start again, or name one of its model folders."
        )
    return loaded.model


def _model(data: DataConfig, address: str, device: torch.device) -> LoadedModel:
    """A trained network; of a URL, all ranks and runs of a node fetch the weights once."""
    cache = None if data.reading == "range" else node_cache(data.cache_folder, data.cache_gib)
    return load_model(address, device=device, cache=cache)


def _outline(card: TeacherCard, device: torch.device) -> Predictor:
    """A network that was never given any weights."""
    return build_network(card).to(device)


def _untrained(card: TeacherCard, *, seed: int, number: int) -> _Source:
    # Built once for its card, which has the weights' hash, and again where they are needed.
    untrained = with_random_weights(card, seed=seed, number=number).card
    return _Source(
        untrained,
        lambda device: with_random_weights(card, seed=seed, number=number, device=device).model,
    )


def _planned(
    config: RunConfig, sources: Sequence[_Source], frame: FrameShape, data: DataFacts
) -> tuple[PlannedTeacher, ...]:
    transfer = config.transfer
    wanted = _wanted(transfer)
    if wanted is None:
        return ()
    student = StudentFacts(
        frame=frame,
        memories=skeleton(frame, config.model).memory_shapes,
        data=data,
        taught=_taught_layers(transfer),
    )
    use = TeacherUse(
        wanted=wanted,
        # Knowledge Flow's student reads their states.
        hides_targets=transfer.method == "knowledge_flow",
        precision=config.placement.precision,
        memories=config.placement.memories,
        compute=config.compute,
    )
    return tuple(plan_use(card, load, use, student, transfer.adapter) for card, load in sources)


def _wanted(transfer: TransferConfig) -> tuple[Wanted, ...] | None:
    """What a method learns from; None: it runs no teachers."""
    match transfer.method:
        case "tmu":
            return ("memory", "zigzag") if transfer.tmu.zigzag else ("memory",)
        case "distillation":
            settings = transfer.distillation
            features: tuple[Wanted, ...] = (settings.state,) if settings.features else ()
            return (*features, "predictions") if settings.responses else features
        case "knowledge_flow":
            return ("hidden",)
        case "art":
            return ("hidden", "memory")
        case "scratch" | "finetune" | "l2_sp" | "tmu_scratch":
            return None


def _bank(
    config: RunConfig,
    planned: Sequence[PlannedTeacher],
    data: DataFacts,
    device: torch.device,
    group: RankGroup,
) -> tuple[TeacherBank, Placement]:
    transfer, batch = config.transfer, config.compute.batch_teachers
    if config.placement.kind == "cached":
        placement = Placement(kind="cached", resident_bytes=(0,) * group.size)
        run_together(batch, [teacher.likeness for teacher in planned], placement, device)
        bank = _cached(config, planned)
    else:
        # What a student has predicted is no code of its archive.
        is_coded = transfer.teacher_input != "student"
        codec = FrameCodec(data.units.max_code) if is_coded else None
        bank, placement = build_bank(planned, config.placement, group, device, codec, batch)
    if transfer.control == "shuffled":
        bank = ShuffledBank(bank)
    return bank, placement


def _cached(config: RunConfig, planned: Sequence[PlannedTeacher]) -> TeacherBank:
    from tmu_dist.teachers.memories.bank import CachedBank, Lesson, training_samples

    assert config.placement.cache is not None
    lessons = [
        Lesson(teacher=teacher, window=config.window, precision=config.training.precision)
        for teacher in planned
    ]
    samples = training_samples([config.data.url, *config.data.mix_with], config.data.fraction)
    directions = (False,) if config.training.reverse_input == "off" else (False, True)
    return CachedBank(config.placement.cache, lessons, samples, directions=directions)


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
    planned: Sequence[PlannedTeacher],
    bank: TeacherBank | None,
    start: Start | None,
    device: torch.device,
) -> TransferMethod:
    transfer = config.transfer
    taught: dict[str, Any] = {"bank": bank, "teacher_input": transfer.teacher_input}
    match transfer.method:
        case "tmu":
            return MemoryDistillation(
                task,
                tmu=transfer.tmu,
                imitation=transfer.imitation,
                beta=transfer.beta,
                beta_schedule=transfer.beta_schedule,
                starts_from_memories=transfer.imitation_start == "memories",
                **taught,
            )
        case "distillation":
            return Distillation(
                task, settings=transfer.distillation, imitation=transfer.imitation, **taught
            )
        case "knowledge_flow":
            return KnowledgeFlow(
                task,
                settings=transfer.knowledge_flow,
                num_steps=config.training.num_steps,
                **taught,
            )
        case "art":
            return AttentiveTransfer(
                task,
                settings=transfer.art,
                adapter=transfer.adapter,
                teachers=[(teacher.card, teacher.load(device)) for teacher in planned],
            )
        case "l2_sp":
            assert start is not None
            return L2SP(task, settings=transfer.l2_sp, start=start)
        case "scratch" | "finetune" | "tmu_scratch":
            return Scratch(task, tmu=transfer.tmu, num_slots=transfer.num_slots)


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
        # The first iteration is 1.
        anneals=network.latent_size > 0 and kl.weight > 0 and kl.anneal_until > 1,
        reduction=training.loss_reduction,
    )
