"""Teachers whose weights are spread over a group of ranks (FSDP2) and gathered while each runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.device_mesh import DeviceMesh

from tmu_dist.collectives import RankGroup
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank


class ShardedBank(ReplicatedBank):
    """Every member runs all teachers on its own batch, and keeps its part of each one's weights.

    A teacher is one unit: before it runs its weights are gathered, once for all steps of time, and
    afterwards they are let go. So a rank needs its shards, and the largest teacher whole.

    Args:
        teachers: one after the other; each is sharded before the next one is asked for, so that
            they can be loaded as they come. On the CPU, also for a GPU.
        group: of at least two ranks.
        device: of the student.
    """

    def __init__(
        self, teachers: Iterable[FrozenTeacher], group: RankGroup, device: torch.device
    ) -> None:
        assert group.process_group is not None
        mesh = DeviceMesh.from_group(group.process_group, device.type)
        super().__init__(_sharded(teacher, mesh) for teacher in teachers)


def _sharded(teacher: FrozenTeacher, mesh: DeviceMesh) -> FrozenTeacher:
    # Imported here: it takes as long as half of torch, and other placements do not need it.
    from torch.distributed.fsdp import fully_shard

    # Nothing runs backwards through a teacher, so its weights must not wait for that.
    fully_shard(teacher.network, mesh=mesh, reshard_after_forward=True)
    return teacher
