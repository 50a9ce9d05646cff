"""How much memory a rank has, what it took at most, and whether what is predicted fits.

Deliberately not here: the prediction (`memory`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.training.memory import ACTIVATIONS, TEACHERS, TrainingMemory

log = logging.getLogger(__name__)

_CLEARLY_TOO_MUCH = 1.1
"""Times all memory there is: from there on nothing is tried. A prediction is no measurement."""
_GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60
"""Bytes; what the first version of control groups tells where there is no limit is more."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory that a rank can have."""

    total_bytes: int
    """Of its GPU; of a CPU its part of the machine's, or of the container's that has a limit."""
    free_bytes: int
    """What of it nobody has now."""


def room_of(device: torch.device, sharers: int = 1) -> Room | None:
    """What a device has for one rank; None where the system does not tell.

    Args:
        device: of the rank.
        sharers: ranks on this machine, which share the memory of a CPU.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Room(total_bytes=total, free_bytes=free + kept)
    machine = _kilobytes("meminfo", "MemTotal:"), _kilobytes("meminfo", "MemAvailable:")
    if not machine[0]:
        return None
    limits = [machine, *_limits()]
    return Room(
        total_bytes=min(total for total, _ in limits) // sharers,
        free_bytes=min(free for _, free in limits) // sharers,
    )


class MemoryMeter:
    """What this process takes from now on, at most.

    Args:
        device: of the rank. Of a GPU tensors count; otherwise what of the process lies in memory,
            libraries included that are loaded only now.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = self._highest = torch.cuda.memory_allocated(device)
        else:
            self._before = _kilobytes("self/status", "VmRSS:")
            self._highest = _kilobytes("self/status", "VmHWM:")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is taken meanwhile, and stays, was there at first."""
        if self._device.type == "cuda":
            yield
            return
        before = _kilobytes("self/status", "VmRSS:")
        yield
        self._before += _kilobytes("self/status", "VmRSS:") - before
        self._highest = _kilobytes("self/status", "VmHWM:")

    def peak_bytes(self) -> int | None:
        """Beyond what there was at first; None: less than something before that took."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        highest = _kilobytes("self/status", "VmHWM:")
        return highest - self._before if highest > self._highest else None


def process_peak(device: torch.device) -> int:
    """The most memory of this process so far: of a GPU what torch reserved since it was last asked
    to forget, as a `MemoryMeter` does; otherwise all of it, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _kilobytes("self/status", "VmHWM:")


def check_fits(memory: TrainingMemory, room: Room, config: RunConfig, world_size: int) -> None:
    """Warn if the prediction is more than is free, and refuse what is clearly impossible.

    Args:
        memory: that is predicted for a rank.
        room: that it has.
        config: of the run.
        world_size: ranks of the run.

    Raises:
        ConfigError: there is far less memory in all; names what to change.
    """
    if memory.peak_bytes <= room.free_bytes:
        return
    is_hopeless = memory.peak_bytes > _CLEARLY_TOO_MUCH * room.total_bytes
    has = (
        f"has {gib(room.total_bytes)} in all"
        if is_hopeless
        else f"has {gib(room.free_bytes)} free of {gib(room.total_bytes)}"
    )
    told = (
        f"A rank is predicted to need {gib(memory.peak_bytes)} of memory at its peak, and "
        f"{has}. Mostly {_told_parts(memory)}. {_advice(memory, room, config, world_size)}"
    )
    if is_hopeless:
        raise ConfigError(told)
    log.warning("%s", told)


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.3g} GiB"
    return f"{num_bytes / 2**20:.3g} MiB"


def _told_parts(memory: TrainingMemory, least: float = 0.1) -> str:
    """The largest parts, and those that are worth naming."""
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    named = parts[:1] + [part for part in parts[1:] if part[1] >= least * memory.peak_bytes]
    return ", ".join(f"{name} ({gib(size)})" for name, size in named)


def _advice(memory: TrainingMemory, room: Room, config: RunConfig, world_size: int) -> str:
    """What to change, the most helpful first."""
    ways = []
    by_sequence = memory.parts[ACTIVATIONS]
    of_rank = -(-config.training.batch_size // world_size)
    at_once = config.scale.sequences_at_once or of_rank
    if memory.parts[TEACHERS] > by_sequence:
        ways.append(
            "spread the teachers over the ranks or take them from files (placement.kind=placed, "
            "sharded or cached), or run them in placement.precision=bf16"
        )
    elif at_once > 1:
        left = room.free_bytes - (memory.peak_bytes - by_sequence)
        fitting = min(max(int(at_once * left / by_sequence), 1), at_once - 1)
        with suppress(ConfigError):  # not with every objective
            replace(config, scale=replace(config.scale, sequences_at_once=fitting))
            ways.append(f"learn from fewer sequences at once (scale.sequences_at_once={fitting})")
    if not config.compute.recompute:
        ways.append("keep less (compute.recompute=true)")
    if config.training.precision in ("fp32", "tf32"):
        ways.append("halve what convolutions keep (training.precision=bf16)")
    if config.launch.launcher != "local":
        ways.append("use more ranks")
    return f"To need less, {', or '.join(ways)}." if ways else "Use a smaller training.batch_size."


def _limits() -> Iterator[tuple[int, int]]:
    """Of the control groups that this process is in: bytes in all, and what is left of them."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":
                yield from _limits_above(_GROUPS, path, "memory.max", "memory.current")
            elif "memory" in kinds.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                yield from _limits_above(_GROUPS / "memory", path, *names)


def _limits_above(root: Path, path: str, limit: str, used: str) -> Iterator[tuple[int, int]]:
    """Of a group and of those that it lies in; within a container the path may not be there."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        with suppress(OSError, ValueError):  # "max": no limit
            total = int((folder / limit).read_text())
            if total < _NO_LIMIT:
                taken = int((folder / used).read_text()) - _of_files(folder)
                yield total, max(total - taken, 0)


def _of_files(group: Path) -> int:
    """What a group holds of files that were read, which it gives back when memory is wanted."""
    with suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0


def _kilobytes(file: str, name: str) -> int:
    """A value of one of the tables in /proc, in bytes; 0 on other systems than Linux."""
    with suppress(OSError):
        for line in (Path("/proc") / file).read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return 0
