"""Ranks, and the few collectives that the project uses; all are the identity in one process.

Deliberately not here: process-group creation by a launcher, gradient averaging (that is
DistributedDataParallel's work, in `tmu_dist.training`), and anything about Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the run; tests make one by hand."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and shows progress."""
        return self.rank == 0


class Collectives:
    """What ranks tell each other. Every rank must make the same calls in the same order."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        if self.ranks.world_size > 1 and not dist.is_initialized():
            raise ValueError(
                f"{self.ranks.world_size} ranks need torch.distributed: call "
                "init_process_group first (launchers do), or use one rank."
            )

    def all_gather_objects(self, item: Item) -> list[Item]:
        """The given object of every rank, in rank order, on every rank."""
        if self.ranks.world_size == 1:
            return [item]
        gathered: list[Item | None] = [None] * self.ranks.world_size
        dist.all_gather_object(gathered, item)
        return gathered  # type: ignore[return-value]

    def broadcast_object(self, item: Item) -> Item:
        """Rank 0's object, on every rank."""
        if self.ranks.world_size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], Item]) -> Item:
        """Run `action` on rank 0 alone; every rank returns its result or raises its error.

        So a full disk on rank 0 ends all ranks with the same message instead of leaving the
        others waiting in the next collective.
        """
        outcome: tuple[Item | None, Exception | None] = (None, None)
        if self.ranks.is_main:
            try:
                outcome = (action(), None)
            except Exception as error:
                outcome = (None, error)
        result, failure = self.broadcast_object(outcome)
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        """Return when every rank has arrived."""
        if self.ranks.world_size > 1:
            dist.barrier()
