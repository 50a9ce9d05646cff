"""Which rank of a group holds which teacher: a pure function of sizes, ranks and memory.

Nothing here runs teachers or talks to other ranks. Every rank computes the same plan from the
teachers' cards alone.

Sharded teachers never need less memory than placed ones: S bytes of teachers on g ranks, the
largest of L bytes, take S/g + L sharded, and placed by greedy balance less than that. Sharding is
for teachers that tell more bytes than they weigh, because it moves weights instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tmu_dist.config import ConfigError

Kind = Literal["replicated", "placed", "sharded", "cached"]
_KINDS: tuple[Kind, ...] = ("replicated", "sharded", "placed")
"""What `auto` tries. Sharded keeps the work of all members equal, and sends less than placed from
about three sequences a pass on (docs/scaling.md); placed never needs more memory, because a member
of sharded holds the largest teacher whole beside its part of all."""


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """What a teacher takes, known from its card."""

    name: str
    weight_bytes: int
    work: float
    """Of a forward pass, up to a factor that all teachers share."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the teachers of a group of ranks lie."""

    kind: Kind
    holders: tuple[int, ...] = ()
    """placed: the place in the group of each teacher's holder; empty otherwise."""
    resident_bytes: tuple[int, ...]
    """Most teacher weights at a time, by place in the group."""

    def held_by(self, place: int) -> tuple[int, ...]:
        """placed: numbers of the teachers that a member runs."""
        return tuple(m for m, holder in enumerate(self.holders) if holder == place)


def plan_placement(
    kind: Literal["auto", "replicated", "placed", "sharded"],
    costs: Sequence[TeacherCost],
    group_size: int,
    budget_bytes: int | None,
) -> Placement:
    """Decide who holds the teachers.

    Args:
        kind: a placement; auto: the first of replicated, sharded and placed that fits.
        costs: of the teachers, in their order.
        group_size: ranks that share them. One rank alone holds all of them: replicated.
        budget_bytes: of a rank, for teachers' weights; None: no limit.

    Raises:
        ConfigError: it does not fit; says what each placement would need.
    """
    possible = _KINDS if group_size > 1 else _KINDS[:1]
    wanted = possible if kind == "auto" or group_size == 1 else (kind,)
    for each in wanted:
        placement = _placement(each, costs, group_size, budget_bytes)
        if budget_bytes is None or max(placement.resident_bytes) <= budget_bytes:
            return placement
    assert budget_bytes is not None
    needed = {
        each: max(_placement(each, costs, group_size, budget_bytes).resident_bytes)
        for each in possible
    }
    fitting = [each for each, size in needed.items() if size <= budget_bytes]
    raise ConfigError(
        f"placement.kind={kind}: the weights of {len(costs)} teachers do not fit into the "
        f"{_gib(budget_bytes)} that a rank has for them. In a group of {group_size} a rank needs "
        + ", ".join(f"{_gib(size)} {each}" for each, size in needed.items())
        + ". "
        + (f"Set placement.kind={fitting[0]}, or choose " if fitting else "Choose ")
        + "placement.precision=bf16 (half the memory of convolutions), a larger group "
        "(placement.group, more ranks), fewer teachers, or a larger placement.memory_gib."
    )


def _placement(
    kind: Kind, costs: Sequence[TeacherCost], group_size: int, budget_bytes: int | None
) -> Placement:
    sizes = [cost.weight_bytes for cost in costs]
    if kind == "placed":
        return _placed(costs, group_size, budget_bytes)
    if kind == "sharded":
        shards = sum(-(-size // group_size) for size in sizes)
        return Placement(kind=kind, resident_bytes=(shards + max(sizes),) * group_size)
    return Placement(kind=kind, resident_bytes=(sum(sizes),) * group_size)


def _placed(costs: Sequence[TeacherCost], group_size: int, budget_bytes: int | None) -> Placement:
    """Members with as equal work as is simple; if they do not all fit then, with equal memory."""
    by_work = _balanced([cost.work for cost in costs], costs, group_size, budget_bytes)
    if budget_bytes is None or max(by_work.resident_bytes) <= budget_bytes:
        return by_work
    sizes = [float(cost.weight_bytes) for cost in costs]
    return _balanced(sizes, costs, group_size, budget_bytes)


def _balanced(
    loads: Sequence[float],
    costs: Sequence[TeacherCost],
    group_size: int,
    budget_bytes: int | None,
) -> Placement:
    """The heaviest teacher that is left goes to the member with the least load that has room.

    (Longest processing time first: at most 4/3 of the best makespan, Graham 1969.) Where none has
    room, to the one that has the least load.
    """
    limit = float("inf") if budget_bytes is None else budget_bytes
    holders, load, held = [0] * len(costs), [0.0] * group_size, [0] * group_size
    for m in sorted(range(len(costs)), key=lambda m: (-loads[m], m)):
        size = costs[m].weight_bytes
        place = min(range(group_size), key=lambda p: (held[p] + size > limit, load[p], p))
        holders[m] = place
        load[place] += loads[m]
        held[place] += size
    return Placement(kind="placed", holders=tuple(holders), resident_bytes=tuple(held))


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
