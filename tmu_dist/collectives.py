"""Ranks, groups of them, and the few collectives that the project uses; all are the identity in one
process.

Deliberately not here: gradient averaging (that is DistributedDataParallel's work, in
`tmu_dist.training`), and anything about Ray, whose workers come with a process group.

torch is loaded where ranks talk, not with this module: a process that is alone, such as the command
that starts Ray's workers, gets along without.
"""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

from tmu_dist.config import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

Item = TypeVar("Item")

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_GET_ADDRESS = 0x8915
"""SIOCGIFADDR: what Linux calls asking an interface for its IPv4 address."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the run; tests make one by hand."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    """Ranks on this node; they are numbered one after the other."""

    @property
    def on_node(self) -> range:
        """The ranks on this rank's node."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and shows progress."""
        return self.rank == 0


class Collectives:
    """What ranks tell each other. Every rank must make the same calls in the same order."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        if self.ranks.world_size == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            raise ValueError(
                f"{self.ranks.world_size} ranks need torch.distributed: call "
                "init_process_group first (launchers do), or use one rank."
            )

    def all_gather_objects(self, item: Item) -> list[Item]:
        """The given object of every rank, in rank order, on every rank."""
        if self.ranks.world_size == 1:
            return [item]
        import torch.distributed as dist

        gathered: list[Item | None] = [None] * self.ranks.world_size
        dist.all_gather_object(gathered, item)
        return gathered  # type: ignore[return-value]

    def broadcast_object(self, item: Item) -> Item:
        """Rank 0's object, on every rank."""
        if self.ranks.world_size == 1:
            return item
        import torch.distributed as dist

        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], Item]) -> Item:
        """Run `action` on rank 0 alone; every rank returns its result or raises its error.

        So a full disk on rank 0 ends all ranks with the same message instead of leaving the
        others waiting in the next collective.
        """
        return self._of_main(self._attempt(action) if self.ranks.is_main else (None, None))

    def on_all(self, action: Callable[[], Item]) -> list[Item]:
        """Run `action` on every rank and gather the results, in rank order.

        If it fails on any rank, all ranks raise (the first failing rank's error), so that none is
        left waiting. `action` itself must not use collectives.
        """
        result, error = self._attempt(action)
        outcomes = self.all_gather_objects((result, error))
        if error is not None:
            raise error
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def together(self, action: Callable[[], Item]) -> Item:
        """Run `action`, which uses collectives itself, on every rank; all return or raise rank 0's.

        What it finds on other ranks is not looked at: they are only needed for the collectives,
        which every rank must make before it can fail.
        """
        return self._of_main(self._attempt(action))

    def group(self, size: Literal["node", "all"] | int) -> RankGroup:
        """This rank's group of neighbours; every rank must call this at once.

        Args:
            size: ranks of one node, all ranks, or so many neighbours (the last group may be
                smaller).
        """
        ranks = self.ranks
        if ranks.world_size == 1:
            return RankGroup(range(1), 0)
        import torch.distributed as dist

        everyone = range(ranks.world_size)
        if size == "all":
            groups = [everyone]
        elif size == "node":
            groups = sorted(set(self.all_gather_objects(ranks.on_node)), key=lambda g: g.start)
        else:
            groups = [everyone[start : start + size] for start in everyone[::size]]
        own = RankGroup(range(ranks.rank, ranks.rank + 1), 0)
        for members in groups:  # every rank takes part in making every group
            made = dist.new_group(list(members)) if len(members) > 1 else None
            if ranks.rank in members:
                own = RankGroup(members, ranks.rank - members.start, made)
        return own

    def _of_main(self, outcome: tuple[Item | None, Exception | None]) -> Item:
        """Rank 0's result, or its error, on every rank."""
        result, failure = self.broadcast_object(outcome)
        if failure is not None:
            raise failure  # on rank 0 the error itself, with its trace; elsewhere a copy
        return result  # type: ignore[return-value]

    @staticmethod
    def _attempt(action: Callable[[], Item]) -> tuple[Item | None, Exception | None]:
        try:
            return action(), None
        except Exception as error:  # nothing is hidden: whoever asked raises it
            return None, error


@dataclass(frozen=True)
class RankGroup:
    """Neighbouring ranks that share something. Each makes the same calls in the same order."""

    ranks: range
    """Its members, in the numbers of the whole run."""
    place: int
    """Of this rank in it, from 0."""
    process_group: dist.ProcessGroup | None = None
    """None for a group of one."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    def all_gather(self, values: Tensor) -> Tensor:
        """Every member's tensor, all of one shape, by place: [size, ...]."""
        if self.size == 1:
            return values.unsqueeze(0)
        import torch.distributed as dist

        gathered = values.new_empty((self.size, *values.shape))
        dist.all_gather(list(gathered), values.contiguous(), group=self.process_group)
        return gathered

    def all_to_all(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send each member its part of a vector; return the parts from each, in order.

        Args:
            values: [sum of `sent`], the parts by place.
            sent: numbers for each member.
            received: numbers from each member.
        """
        if self.size == 1:
            return values
        import torch.distributed as dist

        incoming = values.new_empty(sum(received))
        dist.all_to_all_single(
            incoming, values, list(received), list(sent), group=self.process_group
        )
        return incoming


def process_group_backend(on_gpu: bool) -> str:
    """NCCL for GPU tensors, gloo for everything on the CPU."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def talk_over(address: str) -> None:
    """Let gloo use the network interface that has an address of this machine.

    By itself gloo takes what the machine's own name resolves to, which on many systems is a
    loopback address that no other machine reaches. A choice of the user's (GLOO_SOCKET_IFNAME)
    stays, and so does gloo's where no interface has the address (IPv6, other systems than Linux).
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not sys.platform.startswith("linux"):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(asking, _GET_ADDRESS, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


def torchrun_here(size: int) -> list[dict[str, str]]:
    """What torchrun would tell the ranks of a job on this machine alone: variables, rank by rank.

    The port is free now, and nobody holds it: start soon.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(size)
    ]


def own_address_towards(host: str) -> str:
    """This machine's own address on the way to another; nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, 1))
        return str(way.getsockname()[0])
    return ""


@contextmanager
def joined_ranks(launcher: str, *, timeout_seconds: float = 600.0) -> Iterator[Collectives]:
    """The ranks that this process belongs to: those of a torchrun job, or this process alone.

    Ray's workers are ranks of their own; the process that starts them is alone.

    Args:
        launcher: of the run.
        timeout_seconds: a rank that others wait for this long counts as hung.

    Raises:
        ConfigError: torchrun is named, but did not start this process.
    """
    if launcher != "torchrun":
        yield Collectives()
        return
    import torch
    import torch.distributed as dist

    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise ConfigError(
            f"The launcher is torchrun, but {', '.join(missing)} not set: start with "
            "`torchrun --nproc-per-node N -m MODULE --launcher torchrun ...`."
        )
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    talk_over(own_address_towards(os.environ["MASTER_ADDR"]))
    dist.init_process_group(
        process_group_backend(torch.cuda.is_available()), timeout=timedelta(seconds=timeout_seconds)
    )
    try:
        yield Collectives(ranks)
        # Without this and the collection below, 11 of 50 small runs on gloo aborted while the
        # process ended: one rank hung up first, and a wrapped model, part of reference cycles,
        # kept the group's threads alive.
        dist.barrier()
    finally:
        gc.collect()
        dist.destroy_process_group()
