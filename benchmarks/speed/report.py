"""What the tables of speed have in common; also made again from results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from benchmarks.provenance import median_and_range
from benchmarks.speed.measure import ratios, spread

Row: TypeAlias = Mapping[str, Any]
"""What was found of one way of computing: `seconds` by round, `operations` of a call."""


def about(record: Row) -> str:
    """Where a record was made, and what the machine could do while it was, if that was measured."""
    machine = record["machine"]
    made = (
        f"`{record['command']}`: {machine['processor']}, {machine['threads']} thread(s) of the "
        f"CPU, torch {record['versions']['torch']}, revision "
        f"{(record['git_revision'] or 'unknown')[:10]}."
    )
    if "floors" not in record:
        return made
    floors = record["floors"]["per_second"]
    matrix = ", ".join(
        f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in floors.items() if name != "copy"
    )
    return (
        f"{made} {record['rounds']} round(s). Best rates of this machine in the same run: products "
        f"of square matrices {matrix}; copies {floors['copy'] / 1e9:,.1f} GB/s, read and written."
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


def time_columns(row: Row, base: Row, batch: int) -> list[str]:
    """Seconds, sequences a second, and times faster than the base in the same round."""
    faster = median_and_range(ratios(base["seconds"], row["seconds"]), 2)
    return [spread(row["seconds"], 4), f"{batch / min(row['seconds']):,.2f}", faster]


def rate_columns(row: Row, floors: Mapping[str, float]) -> list[str]:
    """Operations a second, and as a part of the matrix rates in float32 and bfloat16."""
    rate = row["operations"] / min(row["seconds"])
    return [
        f"{rate / 1e9:,.1f}",
        f"{rate / floors['fp32']:.2f}",
        f"{rate / floors['bf16']:.2f}",
    ]


def floor_seconds(operations: float, moved: float | None, floors: Mapping[str, float]) -> str:
    """The least time of so many operations and of so many bytes, at the machine's rates."""
    text = (
        f"{operations / 1e9:,.1f} GFLOP: at the rates of products at least "
        f"{operations / floors['fp32']:.3g} s in fp32 and {operations / floors['bf16']:.3g} s in "
        "bf16"
    )
    if moved is None:
        return f"{text}."
    return (
        f"{text}; {moved / 1e9:,.2f} GB of maps that must be read and written: at the rate of "
        f"copies {moved / floors['copy']:.3g} s."
    )


def megabytes(count: int | None) -> str:
    """Such as 1,234; nothing of what was not measured."""
    return "" if count is None else f"{count / 1e6:,.0f}"


def cases(record: Row, call: str, differences: Mapping[str, str]) -> list[str]:
    """Lines of a table for every work of a record.

    Args:
        record: with `cases`.
        call: what is timed.
        differences: head of a column and name in `agreement`.
    """
    heads = (
        *("setting", f"s/{call}: least (median, most)", "sequences/s", "× reference"),
        *("GFLOP/s", "of fp32", "of bf16", "peak MB", *differences),
    )
    lines: list[str] = []
    for case in record["cases"]:
        found, batch = case["found"], case["work"]["batch"]
        base = found["reference"]
        rows = [
            [
                name,
                *time_columns(row, base, batch),
                *rate_columns(row, record["floors"]["per_second"]),
                megabytes(row["peak_bytes"]),
                *(f"{row['agreement'][part]:.1e}" for part in differences.values()),
            ]
            for name, row in found.items()
        ]
        floors = record["floors"]["per_second"]
        amounts = floor_seconds(base["operations"], case.get("bytes"), floors)
        lines += ["", f"{describe(case['work'])}. {amounts}", ""]
        lines += markdown(heads, rows)
    return lines
