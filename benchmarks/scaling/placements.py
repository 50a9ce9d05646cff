"""What placements of teachers really take on this machine: memory and time.

Ranks are processes on gloo; teachers have random weights, the same under every placement, so the
losses of all placements must be equal, which is part of the record.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling.collectives import on_ranks
from benchmarks.scaling.model import Kind
from benchmarks.scaling.networks import (
    SIZES,
    Size,
    make_batch,
    make_method,
    make_plan,
    make_teacher,
)
from tmu_dist.collectives import RankGroup
from tmu_dist.models.build import count_parameters, skeleton
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, TeacherBank, held_bytes
from tmu_dist.teachers.placed import FrameCodec, PlacedBank
from tmu_dist.teachers.placement import TeacherCost, plan_placement
from tmu_dist.teachers.sharded import ShardedBank
from tmu_dist.training.step import TrainingStep

MEASURED: tuple[Kind, ...] = ("replicated", "placed", "sharded")
_CPU = torch.device("cpu")


class Held(NamedTuple):
    """What the teachers of one rank take, in bytes."""

    weights: int
    grown: int
    """By which the process has grown since before they were made (resident, not of files)."""


class Timed(NamedTuple):
    """Steps of one placement, beside those of the others."""

    seconds: list[float]
    """Of every round, of the slowest rank."""
    losses: list[float]
    """Of every step, the mean over the ranks."""


def held(name: str, kinds: Sequence[Kind], counts: Sequence[int], ranks: int) -> dict[str, Any]:
    """Memory of placements by kind and number of teachers: of every rank."""
    by_rank = on_ranks(ranks, _hold, name, kinds, counts)
    return {
        kind: {str(count): [of_rank[kind, count] for of_rank in by_rank] for count in counts}
        for kind in kinds
    }


def timed(
    name: str, kinds: Sequence[Kind], *, teachers: int, ranks: int, sequences: int, rounds: int
) -> dict[Kind, Timed]:
    """Steps of all placements in turn, in an order of their own in every round."""
    found: dict[Kind, Timed] = on_ranks(ranks, _time, name, kinds, teachers, sequences, rounds)[0]
    return found


def make_bank(kind: Kind, size: Size, teachers: int, group: RankGroup) -> TeacherBank:
    """A bank of teachers with random weights; a rank makes those that it holds.

    Raises:
        ValueError: a kind that is not measured.
    """
    if kind not in MEASURED:
        raise ValueError(f"{kind} is not measured; choose one of {', '.join(MEASURED)}.")
    if kind == "replicated" or group.size == 1:
        return ReplicatedBank(_teachers(size, range(teachers)))
    if kind == "sharded":
        return ShardedBank(_teachers(size, range(teachers)), group, _CPU)
    network = skeleton(size.frame, size.teacher)
    weights = count_parameters(network)
    costs = [TeacherCost(name=str(m), weight_bytes=4 * weights, work=1.0) for m in range(teachers)]
    placement = plan_placement("placed", costs, group.size, None)
    own = placement.held_by(group.place)
    return PlacedBank(
        dict(zip(own, _teachers(size, own), strict=True)),
        holders=placement.holders,
        plans=[make_plan(size)] * teachers,
        parameters_per_teacher=[weights] * teachers,
        group=group,
        wanted=("memory",),
        codec=FrameCodec(255),
    )


def _teachers(size: Size, numbers: Iterable[int]) -> Iterable[FrozenTeacher]:
    """One after the other; each number has weights of its own."""
    for number in numbers:
        torch.manual_seed(number)
        yield make_teacher(size)


def _hold(
    group: RankGroup, name: str, kinds: Sequence[Kind], counts: Sequence[int]
) -> dict[tuple[Kind, int], Held]:
    found = {}
    # What a first bank needs besides its teachers is not theirs.
    for kind in kinds:
        make_bank(kind, SIZES[name], 1, group)
    for kind in kinds:
        for count in counts:
            gc.collect()
            before = _resident_bytes()
            bank = make_bank(kind, SIZES[name], count, group)
            found[kind, count] = Held(held_bytes(bank), _resident_bytes() - before)
            del bank
            dist.barrier()
    return found


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon: memory is measured on Linux only.")


def _time(
    group: RankGroup,
    name: str,
    kinds: Sequence[Kind],
    teachers: int,
    sequences: int,
    rounds: int,
) -> dict[Kind, Timed]:
    size = SIZES[name]
    batch = _own_batch(size, sequences, group)
    steps = {kind: make_step(size, make_bank(kind, size, teachers, group), group) for kind in kinds}
    found: dict[Kind, Timed] = {kind: Timed([], []) for kind in kinds}
    for number in range(rounds + 1):
        for kind in random.Random(number).sample(kinds, len(kinds)):
            dist.barrier()
            started = time.perf_counter()
            loss = steps[kind](batch)["loss/total"]
            facts = torch.tensor([time.perf_counter() - started, loss])
            by_rank = group.all_gather(facts)
            found[kind].losses.append(float(by_rank[:, 1].sum()))
            if number > 0:  # the first round warms up
                found[kind].seconds.append(float(by_rank[:, 0].max()))
    return found


def _own_batch(size: Size, sequences: int, group: RankGroup) -> Any:
    torch.manual_seed(1000 + group.place)
    return make_batch(size, sequences, group.size)


def make_step(size: Size, bank: TeacherBank, group: RankGroup) -> TrainingStep:
    """A training step of a student that starts the same with every bank."""
    method = make_method(size, bank)
    torch.manual_seed(0)
    student = method.build_student()
    trainee = method.trainee(student)
    forward: nn.Module = trainee
    if group.size > 1:
        forward = DistributedDataParallel(trainee, gradient_as_bucket_view=True)
    return TrainingStep(
        method,
        student,
        trainee,
        forward,
        device=_CPU,
        learning_rate=lambda step: 1e-3,
        reverse_input="off",
    )


def losses_differ(found: Mapping[Kind, Timed]) -> float:
    """Largest relative difference between a step's losses under two placements."""
    rows = zip(*(each.losses for each in found.values()), strict=True)
    return max((max(row) - min(row)) / abs(min(row)) for row in rows)
