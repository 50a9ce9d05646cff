"""What a rank saw of itself and of the others: plain values, which travel and become JSON.

`ranks.py` gathers them, rank_findings.py judges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["exchange", "loader", "teachers", "step"]
"""Of a look, in order; each is a check of findings.py."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a part of a look did not come to its end on a rank."""

    text: str
    kind: str
    """Name of the error's class."""
    may_follow: bool
    """Whether it may only be what this rank met because another one failed."""


@dataclass(frozen=True, kw_only=True)
class ExchangeFacts:
    """All-reduce over all ranks, where gradients lie."""

    backend: str
    latency_seconds: float
    """Of a few bytes."""
    bytes_per_second: float
    """That a rank sends, of a large message of s bytes: 2 (n - 1) / n * s for n ranks."""


@dataclass(frozen=True, kw_only=True)
class LoaderFacts:
    """This rank's part of the first batches, read as fast as it goes, with nothing else to do."""

    processes: int
    """That read (data.num_workers); 0: the rank itself, between its steps."""
    first_seconds: float
    """Until the first batch was there: starting processes, copying the first shards."""
    seconds_per_batch: float
    batches: int
    sequences: float
    """This rank's part of a batch."""


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """Where the teachers lie, and what their weights take."""

    count: int
    kind: str
    """The placement that the run takes."""
    predicted_bytes: Mapping[str, int]
    """By placement: the most weights at a time on this rank, from the teachers' cards."""
    held_bytes: int
    """Weights on this rank between steps; of sharded teachers its shards alone, while predicted are
    those and the largest teacher whole."""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """The first training steps on the run's first batches."""

    first_seconds: float
    seconds: float
    """Median of the steps after the first one, without waiting for data; ranks wait for the slowest
    one in every step. Of a run with one step: that one."""
    forward_seconds: float
    """Of a forward pass of the student alone, the quickest of some: what this rank can do."""
    losses: tuple[float, ...]
    """Of this rank, step by step."""
    exchanges: int
    """Of all gradients, in a step."""
    gradient_bytes: int
    peak_bytes: int
    """On a GPU what torch reserved at most since the look began; otherwise the most that the whole
    process ever had, with all its libraries."""
    total_bytes: int
    """Of the GPU, or of the node (of the container, if it has a limit): its ranks share it. 0: the
    system does not tell."""
    taken_bytes: int | None
    """Of the peak what came with the run; None: something before it took more."""
    predicted_bytes: int
    """What a run takes of a rank's memory at most, by its settings (`training/memory.py`). Looking
    whether teachers teach is in it, which was not done here."""


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank saw; plain values."""

    rank: int = 0
    world_size: int = 1
    node: str
    """Address, or name, of the machine."""
    device: str
    """What computes: cpu, or the name of the GPU."""
    interface: str = ""
    """Over which ranks talk, as far as it is named (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."""
    link_bits_per_second: float | None = None
    """Of that interface, if the system knows it."""
    part: Part | Literal["end"] = "exchange"
    """Where the look is, or where it was when nothing more was heard."""
    failures: Mapping[Part, Failure] = field(default_factory=dict)
    seconds: Mapping[Part, float] = field(default_factory=dict)
    exchange: ExchangeFacts | None = None
    """None, as with the others: not looked at, or failed."""
    loader: LoaderFacts | None = None
    teachers: TeacherFacts | None = None
    step: StepFacts | None = None


@dataclass(frozen=True, kw_only=True)
class RanksSeen:
    """What came of a look at all ranks."""

    ranks: tuple[RankFacts, ...] = ()
    """Those that were heard of, by rank."""
    error: str = ""
    """Why not all of them were, or did not come to the end; empty: they did."""
