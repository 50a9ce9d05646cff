"""What a check found, and what to change: the one thing that all checks return.

Facts are gathered where they are (a node, a rank); findings follow from them by pure functions, so
that every judgement can be tested without the fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "fault", "skipped"]
"""warning: the run will work, but not as it could; fault: it will not, or not safely."""

CHECKS = {
    "working directory": "what `ray job submit` would send fits, and holds no data",
    "address": "the cluster's dashboard answers, with the same version of Ray",
    "token": "the cluster asks for a token, and we have it",
    "nodes": "every node answers, and can import the project",
    "versions": "Python, torch, Ray and the project are the same on all nodes",
    "gpus": "every GPU that Ray promises is seen by torch and computes",
    "clock": "the nodes agree on the time",
    "cache": "copies of shards have room on every node",
    "storage": "what is read can be read, what is written can be written, and how fast",
    "exchange": "ranks reach each other, and how fast",
    "teachers": "they load and fit the student and the memory, as predicted",
    "step": "one real training step on every rank: time, memory, a finite loss",
    "loader": "sequences are read as fast as they are learned from",
}
"""Names of all checks, in the order in which they are shown, and what holds when they are ok."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One answer of one check."""

    check: str
    """A name of `CHECKS`."""
    status: Status
    found: str
    """What was seen, in a sentence, with numbers and names."""
    advice: str = ""
    """What to change; there for every warning and fault."""
    where: str = ""
    """Address of a node, `rank 3`, or nothing if it is of all of them."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by names that tell the unit: bytes_per_second, free_bytes."""

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"check={self.check!r} is none of {', '.join(CHECKS)}.")
        if self.status in ("warning", "fault") and not self.advice:
            raise ValueError(f"{self.check}: a {self.status} needs advice.")


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """By check, in the order of `CHECKS`; those of one check as they came."""
    places = {check: place for place, check in enumerate(CHECKS)}
    return sorted(findings, key=lambda finding: places[finding.check])


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether there is no fault."""
    return all(finding.status != "fault" for finding in findings)


def as_record(findings: Sequence[Finding]) -> dict[str, Any]:
    """For machines: whether all is well, and every finding."""
    return {
        "healthy": is_healthy(findings),
        "findings": [asdict(finding) for finding in in_order(findings)],
    }
