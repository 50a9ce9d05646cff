"""Teachers known before their weights are here, and the bank that a placement makes of them.

Everything about a teacher but its weights follows from its card: how it is used, what it tells, how
much memory and work it takes. So every rank plans with all teachers and loads only those it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tmu_dist.collectives import RankGroup
from tmu_dist.config import AdapterConfig, ComputeConfig, PlacementConfig
from tmu_dist.config.compute import Choice
from tmu_dist.models.arrange import arrange
from tmu_dist.models.build import backbones_with_zigzag, count_parameters
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.adapter import StudentFacts, TeacherPlan, plan_teacher
from tmu_dist.teachers.bank import (
    FrozenTeacher,
    Memories,
    Precision,
    ReplicatedBank,
    TeacherBank,
    Wanted,
    convolutions,
)
from tmu_dist.teachers.batched import BatchedBank, Likeness, run_together
from tmu_dist.teachers.card import TeacherCard, TeacherError
from tmu_dist.teachers.placed import FrameCodec, PlacedBank
from tmu_dist.teachers.placement import Placement, TeacherCost, plan_placement
from tmu_dist.teachers.sharded import ShardedBank
from tmu_dist.teachers.store import build_network

LoadNetwork = Callable[[torch.device], Predictor]
"""Gets a network with its weights, on a device."""


@dataclass(frozen=True, kw_only=True)
class TeacherUse:
    """What a method wants of its teachers, the same of all."""

    wanted: tuple[Wanted, ...]
    hides_targets: bool = False
    """As in `FrozenTeacher.hide_targets`."""
    precision: Precision = "student"
    memories: Memories = "full"
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How the numbers of their networks are computed."""


@dataclass(frozen=True, kw_only=True)
class PlannedTeacher:
    """A teacher without its weights; `plan_use` makes it."""

    card: TeacherCard
    plan: TeacherPlan
    use: TeacherUse
    parameters: int
    """Number of frozen weights."""
    noise_size: int
    """Random numbers that its network reads a step; 0: it always tells the same of a sequence."""
    cost: TeacherCost
    likeness: Likeness
    load_network: LoadNetwork

    def load(self, device: torch.device) -> FrozenTeacher:
        """The teacher itself.

        Raises:
            TeacherError: its weights are missing or damaged.
        """
        return _frozen(self.load_network(device), self.plan, self.use)


def plan_use(
    card: TeacherCard,
    load_network: LoadNetwork,
    use: TeacherUse,
    student: StudentFacts,
    adapter: AdapterConfig,
) -> PlannedTeacher:
    """Decide how a teacher is used, and find what it takes, from its card.

    Raises:
        TeacherError: it does not fit the student, or its cells have not what it is asked for.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        outline = build_network(card)  # without numbers in its weights
    _check_states(card, outline, use.wanted)
    plan = plan_teacher(card, outline.memory_shapes, student, adapter)
    parameters = count_parameters(outline)
    frozen = _frozen(outline, plan, use)
    weights = [*frozen.parameters(), *frozen.buffers()]
    cost = TeacherCost(
        name=card.name, weight_bytes=sum(each.nbytes for each in weights), work=_work(outline)
    )
    return PlannedTeacher(
        card=card,
        plan=plan,
        use=use,
        parameters=parameters,
        noise_size=outline.noise_size,
        cost=cost,
        likeness=Likeness.of(frozen),
        load_network=load_network,
    )


def plan_bank(
    teachers: Sequence[PlannedTeacher],
    placement: PlacementConfig,
    group_size: int,
    device: torch.device,
) -> Placement:
    """Where the teachers of a group of ranks are to lie; arguments as of `build_bank`.

    Raises:
        ConfigError: they do not fit.
    """
    assert placement.kind != "cached"
    return plan_placement(
        placement.kind,
        [teacher.cost for teacher in teachers],
        group_size,
        _budget(placement.memory_gib, device),
    )


def build_bank(
    teachers: Sequence[PlannedTeacher],
    placement: PlacementConfig,
    group: RankGroup,
    device: torch.device,
    codec: FrameCodec | None,
    batch: Choice = "auto",
) -> tuple[TeacherBank, Placement]:
    """Load the teachers that this rank holds; no collectives.

    Args:
        teachers: all of them; they tell the same kinds of things.
        placement: any but cached.
        group: the ranks that share them.
        device: of this rank.
        codec: how frames travel (`PlacedBank`).
        batch: whether teachers of one architecture run as one network (compute.batch_teachers).

    Raises:
        ConfigError: they do not fit, or there are none to run as one network.
        TeacherError: weights that are needed here are missing or damaged.
    """
    plan = plan_bank(teachers, placement, group.size, device)
    is_batched = run_together(batch, [teacher.likeness for teacher in teachers], plan, device)
    if plan.kind == "placed":
        use = teachers[0].use
        bank: TeacherBank = PlacedBank(
            {m: teachers[m].load(device) for m in plan.held_by(group.place)},
            holders=plan.holders,
            plans=[teacher.plan for teacher in teachers],
            parameters_per_teacher=[teacher.parameters for teacher in teachers],
            group=group,
            wanted=use.wanted,
            memories=use.memories,
            codec=codec,
            batch=is_batched,
        )
    elif plan.kind == "sharded":
        cpu = torch.device("cpu")
        bank = ShardedBank((teacher.load(cpu) for teacher in teachers), group, device)
    else:
        kind = BatchedBank if is_batched else ReplicatedBank
        bank = kind([teacher.load(device) for teacher in teachers])
    return bank, plan


def _frozen(network: Predictor, plan: TeacherPlan, use: TeacherUse) -> FrozenTeacher:
    arrange(network, use.compute)
    teacher = FrozenTeacher(
        network, plan, use.wanted, precision=use.precision, memories=use.memories
    )
    return teacher.hide_targets() if use.hides_targets else teacher


def _check_states(card: TeacherCard, network: Predictor, wanted: Sequence[Wanted]) -> None:
    """Refuse a teacher whose cells have not what it is asked for."""
    layers = [layer for layer in network.modules() if isinstance(layer, RecurrentLayer)]
    if "zigzag" in wanted and not all(layer.cell.has_zigzag for layer in layers):
        raise TeacherError(
            f"Teacher {card.name!r} (model.cell={card.model.cell}) has no memory M to teach: leave "
            "transfer.tmu.zigzag out, or choose teachers whose cells have it "
            f"({', '.join(backbones_with_zigzag())})."
        )


def _work(network: Predictor) -> float:
    """Weights of convolutions times the places where they are applied: about what a step costs.

    The places are those of a mean memory map. Normalisations and attention are not counted.
    """
    places = [shape.slices * shape.height * shape.width for shape in network.memory_shapes]
    weights = sum(count_parameters(each) for each in convolutions(network))
    return weights * sum(places) / len(places)


def _budget(memory_gib: float | None, device: torch.device) -> int | None:
    """Bytes for teachers' weights. Of a GPU half of all: what is free differs between ranks, which
    must all come to the same plan."""
    if memory_gib is not None:
        return int(memory_gib * 2**30)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    return None
