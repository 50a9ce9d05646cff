"""How long collectives really take between processes of this machine, and whether latency and
bandwidth explain it.

Ranks are processes on gloo that talk over the loopback device: they share the machine's cores and
memory, not links. So what all ranks send together goes through one pipe: seconds = latency x
messages one after the other + bytes of all ranks / bandwidth. Both numbers are fitted for each
collective and number of ranks, on every second size only; the sizes between are predicted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.scaling.model import all_gather_bytes, all_reduce_bytes, all_to_all_bytes
from tmu_dist.collectives import Collectives, RankGroup, Ranks

SIZES = tuple(2**power for power in range(12, 25, 2))
"""Bytes: of what is reduced, of what every rank has when all is gathered, of what a rank sends."""
COLLECTIVES: Mapping[str, Callable[[float, int], float]] = {
    "all_reduce fp32": all_reduce_bytes,
    "all_gather uint8": lambda size, ranks: all_gather_bytes(size / ranks, ranks),
    "all_to_all fp32": all_to_all_bytes,
    "all_to_all bf16": all_to_all_bytes,
}
"""By name: bytes that a rank sends, of size and ranks."""


class Timing(NamedTuple):
    """One collective, once measured."""

    name: str
    ranks: int
    size: int
    seconds: float
    """Median over the repeats of the slowest rank's time."""

    @property
    def sent(self) -> float:
        """Bytes that all ranks send together."""
        return self.ranks * COLLECTIVES[self.name](self.size, self.ranks)

    @property
    def messages(self) -> int:
        """That a rank sends one after the other."""
        return (2 if self.name == "all_reduce fp32" else 1) * (self.ranks - 1)


class Fit(NamedTuple):
    """What a collective costs on this machine."""

    latency: float
    """Seconds a message."""
    bandwidth: float
    """Bytes a second, of all ranks together."""

    def seconds(self, timing: Timing) -> float:
        """What the model says of a measurement."""
        return self.latency * timing.messages + timing.sent / self.bandwidth


def fit(timings: Sequence[Timing]) -> Fit:
    """Least squares of the relative errors, so that small messages count as much as large ones.

    Raises:
        ValueError: fewer than two measurements, or none with a second rank.
    """
    if len(timings) < 2 or any(timing.ranks < 2 for timing in timings):
        raise ValueError(f"A fit needs two or more timings of two or more ranks, got {timings}.")
    seconds = np.array([timing.seconds for timing in timings])
    causes = np.array([(timing.messages, timing.sent) for timing in timings])
    latency, per_byte = _not_negative(causes / seconds[:, None])
    return Fit(latency, np.inf if per_byte == 0 else 1 / per_byte)


def _not_negative(causes: np.ndarray) -> tuple[float, float]:
    """The two coefficients, at least 0, whose combination of the columns is nearest to 1."""
    ones = np.ones(len(causes))
    both, *_ = np.linalg.lstsq(causes, ones, rcond=None)
    if both.min() >= 0:
        return float(both[0]), float(both[1])
    alone = [column @ ones / (column @ column) for column in causes.T]
    errors = [np.square(a * column - 1).sum() for a, column in zip(alone, causes.T, strict=True)]
    best = int(np.argmin(errors))
    return (float(alone[0]), 0.0) if best == 0 else (0.0, float(alone[1]))


def fitted(timings: Sequence[Timing]) -> list[Timing]:
    """Every second size, from the smallest."""
    sizes = sorted({timing.size for timing in timings})[::2]
    return [timing for timing in timings if timing.size in sizes]


def held_out(timings: Sequence[Timing]) -> list[Timing]:
    """The sizes between."""
    sizes = sorted({timing.size for timing in timings})[1::2]
    return [timing for timing in timings if timing.size in sizes]


def measure(ranks: int, sizes: Sequence[int], repeats: int) -> list[Timing]:
    """Time every collective of every size on so many processes."""
    return on_ranks(ranks, _time_all, sizes, repeats)[0]


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: object) -> list[Any]:
    """Run `work(group, *arguments)` on so many new processes; its results, by rank.

    Raises:
        Exception: a rank failed; says which and why.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, folder, work, arguments)
        mp.start_processes(_rank, given, nprocs=ranks, start_method="spawn")
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    """Become one of the ranks of this machine, with one thread."""
    warnings.simplefilter("ignore", FutureWarning)  # newer names, which older torch has not
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    here = Ranks(rank=rank, world_size=ranks, local_rank=rank, local_world_size=ranks)
    result = work(Collectives(here).group("all"), *arguments)
    torch.save(result, _result(folder, rank))
    dist.barrier()
    dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.pt"


def _time_all(group: RankGroup, sizes: Sequence[int], repeats: int) -> list[Timing]:
    return [
        Timing(name, group.size, size, _timed(_call(group, name, size), repeats))
        for name in COLLECTIVES
        for size in sizes
    ]


def _call(group: RankGroup, name: str, size: int) -> Callable[[], object]:
    """One collective as the project uses it, on `size` bytes."""
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    numbers = torch.ones(size // dtype.itemsize, dtype=dtype)
    if name == "all_reduce fp32":
        return lambda: dist.all_reduce(numbers, dist.ReduceOp.AVG)  # the same numbers again
    if name == "all_gather uint8":
        pixels = torch.ones(size // group.size, dtype=torch.uint8)
        gathered = pixels.new_empty(len(pixels) * group.size)
        return lambda: dist.all_gather_into_tensor(gathered, pixels)
    share, rest = divmod(len(numbers), group.size)
    parts = [share + (place < rest) for place in range(group.size)]
    return lambda: group.all_to_all(numbers, parts, [parts[group.place]] * group.size)


def _timed(call: Callable[[], object], repeats: int) -> float:
    """Median over the repeats of the slowest rank's seconds; the first call is not counted."""
    call()
    found: list[float] = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        call()
        slowest = torch.tensor(time.perf_counter() - started)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(float(slowest))
    return statistics.median(found)
