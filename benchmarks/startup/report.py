"""The record of starts as a table; also made again from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.provenance import median_and_range

GOALS = {"local": 6.0, "ray": 20.0}
"""Seconds to the end of the first step, by launcher."""
COMMAND = {"begins launch": "Python, settings, command"}
RANK = {
    "begins Run.__init__": "torch, the training loop",
    "ends open_loaders": "archive",
    "ends prepare_transfer": "teachers",
    "ends Run._prepare_parts": "student, memory that will be needed",
    "ends build_step": "optimiser, data-parallel training",
    "ends Run.start": "run folder, log",
    "ends Run._check_liveness": "do teachers reach the student",
    "ends Run.advance": "first step",
}
STAGES: Mapping[str, Mapping[str, str]] = {
    "local": COMMAND | RANK,
    "ray": COMMAND
    | {
        "ends connect_for": "Ray",
        "begins train_on_ray": "Ray Train",
        "begins _join": "workers",
        "ends _join": "torch and the group of ranks",
    }
    | RANK
    | {"begins Run.__init__": "the training loop"},
}
"""What ends with a mark (`marks.py`), in order, by launcher."""


def stages(launcher: str, marks: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each stage of one start.

    Args:
        launcher: of the run.
        marks: seconds since the command was given, of each mark.
    """
    times = [0.0, *(marks[mark] for mark in STAGES[launcher])]
    spent = (after - before for before, after in pairwise(times))
    return dict(zip(STAGES[launcher].values(), spent, strict=True))


def table(record: Mapping[str, Any]) -> str:
    """Markdown: seconds to the first step by launcher, then by stage."""
    machine, versions = record["machine"], record["versions"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}, Ray "
        f"{versions['ray']}. {_disk(record)} Load of the machine by others before a start: at most "
        f"{max(record['loads']):.1f}; well above 0, others used it, and all of this took longer. "
        "Seconds from the command to the end of the first training step.",
        "",
        "| launcher | starts | least | median | wanted |",
        "|---" * 5 + "|",
    ]
    for launcher, starts in record["starts"].items():
        ends = [start["ends Run.advance"] for start in starts]
        lines.append(
            f"| `{launcher}` | {len(ends)} | {min(ends):.1f} | {statistics.median(ends):.1f} "
            f"| {GOALS[launcher]:g} |"
        )
    for launcher, starts in record["starts"].items():
        lines += ["", *_stages(launcher, starts)]
    commands = (f"`{command}`" for command in record["commands"].values())
    return "\n".join([*lines, "", "Commands: " + "; ".join(commands) + "."]) + "\n"


def _disk(record: Mapping[str, Any]) -> str:
    if record["disk"] == "cold":
        return "Before a start the system was made to forget all files of Python and its libraries."
    return "The system may have files of Python and its libraries in memory."


def _stages(launcher: str, starts: Sequence[Mapping[str, float]]) -> list[str]:
    """Rows of one launcher: median (least - most) of each stage."""
    found = [stages(launcher, start) for start in starts]
    names = list(STAGES[launcher].values())
    return [
        f"| `{launcher}`: stage | seconds |",
        "|---|---|",
        *(f"| {name} | {median_and_range([each[name] for each in found], 2)} |" for name in names),
    ]
