"""How a run is spread over processes and nodes, where its teachers lie, and what it survives.

None of it changes what is learned, but for the two settings of `PlacementConfig` that say so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tmu_dist.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Ranks of a data-parallel run. The global batch is the same for any number of them."""

    num_workers: int | str | None = None
    """Ray only: ranks, or the fewest and the most of them, "2..8": the run shrinks when nodes are
    lost and grows when there are more. None: one per GPU of the cluster, or two without GPUs."""
    cpus_per_worker: int | None = None
    """Ray only: CPUs that each worker holds; None: as many as there are for it, if nothing else
    runs on the cluster."""
    sequences_at_once: int | None = None
    """Most sequences of one forward pass of a rank; gradients of more are accumulated, so that few
    ranks need no more memory than many. None: all of a rank's at once."""
    patience_seconds: float = 0.0
    """Ray only, where an autoscaler starts nodes when they are asked for: how long to wait for the
    nodes that the fewest workers need. Starting a machine in a cloud takes minutes: 1200."""
    resize_seconds: float = 60.0
    """Ray only, with a range of workers: how often it looks for nodes to grow onto. A resize
    starts again from the newest checkpoint, so this should be many times `checkpoint_every`."""

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, str):
            require(
                re.fullmatch(r"[1-9]\d*(\.\.[1-9]\d*)?", self.num_workers) is not None,
                f"scale.num_workers={self.num_workers!r} must be a number such as 4, or the fewest "
                "and the most, such as 2..8.",
            )
        fewest, most = self.worker_range or (1, 1)
        require(
            1 <= fewest <= most,
            f"scale.num_workers={self.num_workers} must be at least 1, and in a range the fewest "
            "come first.",
        )
        for name in ("cpus_per_worker", "sequences_at_once"):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"scale.{name} must be >= 1 or left out, got {value}."
            )
        require(
            self.resize_seconds > 0, f"scale.resize_seconds must be > 0, got {self.resize_seconds}."
        )
        require(
            self.patience_seconds >= 0,
            f"scale.patience_seconds must be >= 0, got {self.patience_seconds}.",
        )

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """The fewest and the most ranks; None: as many as the cluster has room for."""
        if self.num_workers is None:
            return None
        fewest, _, most = str(self.num_workers).partition("..")
        return int(fewest), int(most or fewest)


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Which rank runs which frozen teacher. Every placement teaches the same."""

    kind: Literal["auto", "replicated", "placed", "sharded", "cached"] = "auto"
    """replicated: all teachers on every rank; placed: each on one rank of a group, which runs it
    for the whole group; sharded: the weights of each spread over the group (FSDP2) and gathered
    while it runs; cached: read from files made before (`python -m tmu_dist.memories`); auto:
    the first of replicated, sharded and placed that fits into `memory_gib`."""
    group: Literal["node", "all"] | int = "node"
    """Ranks that share teachers: those of a node, all, or so many neighbours. What teachers tell
    travels within a group only."""
    memory_gib: float | None = None
    """Of a rank, for teachers' weights; None: on a GPU half of its memory, else no limit."""
    precision: Literal["student", "fp32", "bf16"] = "student"
    """Of the teachers' own arithmetic; bf16 also halves the memory of their convolutions' weights.
    student: `training.precision`. Changes what is learned, in the last digits."""
    memories: Literal["full", "bf16", "fp16"] = "full"
    """In which precision what teachers tell travels between ranks, or lies in files. full: as it
    is computed. Changes what is learned, in the last digits."""
    ahead: bool = True
    """On a GPU: let teachers begin the next batch while the student learns the present one."""
    cache: str | None = None
    """cached: the folder or URL where `python -m tmu_dist.memories` put them."""

    def __post_init__(self) -> None:
        require(
            not isinstance(self.group, int) or self.group >= 1,
            f"placement.group must be node, all, or a number >= 1, got {self.group}.",
        )
        require(
            self.memory_gib is None or self.memory_gib > 0,
            f"placement.memory_gib must be > 0 or left out, got {self.memory_gib}.",
        )
        require(
            (self.cache is not None) == (self.kind == "cached"),
            "placement.cache goes with placement.kind=cached, and only with it, got "
            f"kind={self.kind} and cache={self.cache!r}.",
        )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """How soon a failure counts as one, and how many are survived."""

    max_failed_checkpoints: int = 3
    """Checkpoints in a row that may fail (disk full, store out of reach) before the run stops."""
    collective_timeout_seconds: float = 600.0
    """A rank that the others have waited for this long is hung: all of them stop with an error, and
    on Ray start again. Must be longer than the slowest single step, validation or start."""
    start_timeout_seconds: float = 15.0
    """Ray only: places for workers that are not free by then are given up; with a range of workers
    Ray then tries with those that there are."""

    def __post_init__(self) -> None:
        require(
            self.max_failed_checkpoints >= 0,
            f"faults.max_failed_checkpoints must be >= 0, got {self.max_failed_checkpoints}.",
        )
        for name in ("collective_timeout_seconds", "start_timeout_seconds"):
            value = getattr(self, name)
            require(value > 0, f"faults.{name} must be > 0, got {value}.")
