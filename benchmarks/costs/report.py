"""The record of the recipes' costs as tables; also made again from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
"""What was found of one recipe."""


def core_hours(row: Row) -> float:
    """Of the whole run, without validations."""
    learned = row["batch_size"] * row["updates"]
    return seconds_of_sequence(row) * learned / 3600


def seconds_of_sequence(row: Row) -> float:
    """Of a core, to learn from a sequence once."""
    return statistics.fmean(row["seconds"]) / row["sequences"]


def gpu_hours(operations: float, assumed: Mapping[str, float]) -> float:
    """What so many operations take on the assumed GPU."""
    return operations / (assumed["teraflops"] * 1e12 * assumed["utilisation"]) / 3600


def run_bytes(row: Row) -> float:
    """Of a finished run at most: checkpoints, a model for each and the offered one, and the log."""
    kept = row["kept_checkpoints"]
    log = sum(row["log_bytes"].get(event, 0) * number for event, number in row["lines"].items())
    return kept * row["checkpoint_bytes"] + (kept + 1) * row["model_bytes"] + log


def table(record: Mapping[str, Any]) -> str:
    """Markdown: time and memory, storage, archives, the other recipes."""
    parts = (_time, _storage, _archives, _others)
    return "\n\n".join("\n".join(part(record)) for part in parts) + "\n"


def _time(record: Mapping[str, Any]) -> list[str]:
    machine, assumed, recipes = record["machine"], record["assumed"], record["recipes"]
    on_core = [row["on_core"] for row in recipes.values()]
    about = (
        f"{machine['processor']}, one core a run, torch {record['versions']['torch']}. Runs had "
        f"their core {min(on_core):.0%} to {max(on_core):.0%} of the time: well below 100 %, "
        "others used the machine, and took some of its speed. GPU-hours are computed, not "
        f"measured: counted operations by {assumed['teraflops']:g} TFLOP/s x "
        f"{assumed['utilisation']:g}, both assumed."
    )
    rows = []
    for name, row in recipes.items():
        of_teachers = sum(recipes[teacher]["operations"] for teacher in row["teachers"])
        with_teachers = gpu_hours(row["operations"] + of_teachers, assumed)
        rows.append(
            [
                f"`{name}`",
                f"{row['steps']:,} x {row['batch_size']}"
                + (" x 2" if row["updates"] > row["steps"] else ""),
                _short(row["operations"] / row["batch_size"] / row["updates"] / 1e9),
                _short(seconds_of_sequence(row)),
                _short(core_hours(row)),
                _short(gpu_hours(row["operations"], assumed)),
                _short(with_teachers) if row["teachers"] else "",
                f"{row['peak_bytes'] / 1e6:,.0f} ({row['sequences']})",
            ]
        )
    heads = (
        *("recipe", "steps x batch (x directions)", "GFLOP a sequence", "core-s a sequence"),
        *("core-hours", "GPU-hours", "with its teachers", "peak memory [MB] of (sequences)"),
    )
    return [about, "", *_lines(heads, rows)]


def _storage(record: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            f"`{name}`",
            _short(row["checkpoint_bytes"] / 1e6),
            _short(row["model_bytes"] / 1e6),
            _short(run_bytes(row) / 1e6),
            "not possible" if row["memory_bytes"] is None else _short(row["memory_bytes"] / 1e6),
        ]
        for name, row in record["recipes"].items()
    ]
    heads = (
        *("recipe", "checkpoint [MB]", "model [MB]", "run folder [MB]"),
        "cached memories [MB a sequence, direction and teacher]",
    )
    return _lines(heads, rows)


def _archives(record: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, row in record["archives"].items():
        size, sequences = row["bytes_per_sequence"], row["sequences"]
        of_files = sequences is None
        rows.append(
            [
                f"`{name}`",
                f"{'at most ' if of_files else ''}{_short(size / 1e3)}",
                "as many as the files give" if of_files else f"{sequences:,}",
                "" if of_files else _short(size * sequences / 1e6),
            ]
        )
    return _lines(("archive", "KB a sequence", "sequences", "MB"), rows)


def _others(record: Mapping[str, Any]) -> list[str]:
    names = [name for name in next(iter(record["others"].values())) if name != "scratch"]
    rows = [
        [f"`{prefix}-*`", *(f"{found[name] / found['scratch']:.2f}" for name in names)]
        for prefix, found in record["others"].items()
    ]
    about = "Operations of an experiment's students, by those of its `scratch`:"
    return [about, "", *_lines(("recipes", *names), rows)]


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _short(value: float) -> str:
    """With three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
