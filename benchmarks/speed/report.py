"""What the tables of speed have in common; also made again from results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from benchmarks.provenance import median_and_range
from benchmarks.speed.measure import ratios, spread

Row: TypeAlias = Mapping[str, Any]
"""What was found of one way of computing: `seconds` by round, `operations` of a call."""


def about(record: Row) -> str:
    """Where a record was made, and what the machine could do while it was."""
    machine, floors = record["machine"], record["floors"]["per_second"]
    matrix = ", ".join(
        f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in floors.items() if name != "copy"
    )
    return (
        f"`{record['command']}`: {machine['processor']}, {machine['threads']} thread(s) of the "
        f"CPU, torch {record['versions']['torch']}, revision "
        f"{(record['git_revision'] or 'unknown')[:10]}, {record['rounds']} round(s). Best rates of "
        f"this machine in the same run: products of square matrices {matrix}; copies "
        f"{floors['copy'] / 1e9:,.1f} GB/s, read and written."
    )


def describe(work: Row) -> str:
    """A work in words."""
    return (
        f"Frames of {work['frame']}, patches of {work['patch_size']}, {work['num_layers']} layers "
        f"x {work['hidden_channels']} channels, {work['kernel_size']}x{work['kernel_size']} "
        f"kernels, peepholes: {work['peephole']}, {work['num_teachers']} teacher(s), "
        f"{work['num_input_frames']} frames seen and {work['num_target_frames']} predicted, batch "
        f"{work['batch']}"
    )


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = (f"| {' | '.join(row)} |" for row in rows)
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]


def time_columns(row: Row, base: Row, batch: int, *, unit: float = 1.0) -> list[str]:
    """Seconds times `unit`, sequences a second, and times faster than the base."""
    seconds = [unit * each for each in row["seconds"]]
    best = min(row["seconds"])
    faster = median_and_range(ratios(base["seconds"], row["seconds"]), 2)
    return [spread(seconds, 3 if unit == 1.0 else 1), f"{batch / best:,.2f}", faster]


def rate_columns(row: Row, floors: Mapping[str, float]) -> list[str]:
    """Operations a second, and as a part of the matrix rates in float32 and bfloat16."""
    rate = row["operations"] / min(row["seconds"])
    return [
        f"{rate / 1e9:,.1f}",
        f"{rate / floors['fp32']:.2f}",
        f"{rate / floors['bf16']:.2f}",
    ]


def megabytes(count: int | None) -> str:
    """Such as 1,234; nothing of what was not measured."""
    return "" if count is None else f"{count / 1e6:,.0f}"
