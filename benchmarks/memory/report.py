"""The record of predicted and measured memory as a table; also made again from results.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
"""What was found of one run: `recipe`, `changes` of its settings, `sequences` of a batch, bytes
that were predicted, their `parts`, and bytes that were measured (None: not known)."""

NEAR = 0.25
"""Of what was measured: so near a prediction should be."""


def table(record: Mapping[str, Any]) -> str:
    """Markdown: what it says in short, then a line for every run."""
    return "\n".join([*_summary(record), "", *_rows(record["rows"])]) + "\n"


def _summary(record: Mapping[str, Any]) -> list[str]:
    ratios = sorted(ratio for row in record["rows"] if (ratio := ratio_of(row)) is not None)
    near = sum(abs(ratio - 1) <= NEAR for ratio in ratios)
    return [
        f"{record['machine']['processor']}, torch {record['versions']['torch']}. {near} of "
        f"{len(ratios)} predictions are within {NEAR:.0%} of what was measured; predicted by "
        f"measured is {statistics.median(ratios):.2f} in the middle, {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}."
    ]


def ratio_of(row: Row) -> float | None:
    """Predicted by measured; None where nothing was measured."""
    measured = row["measured_bytes"]
    return row["predicted_bytes"] / measured if measured else None


def _rows(rows: Sequence[Row]) -> list[str]:
    heads = ("recipe", "sequences", "predicted [MB]", "measured [MB]", "ratio", "mostly")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        ratio, measured = ratio_of(row), row["measured_bytes"]
        changes = ", ".join(f"{name}={value}" for name, value in row["changes"].items())
        cells = (
            f"`{row['recipe']}`" + (f" {changes}" if changes else ""),
            str(row["sequences"]),
            f"{row['predicted_bytes'] / 1e6:,.0f}",
            f"{measured / 1e6:,.0f}" if measured else "",
            f"{ratio:.2f}" if ratio else "",
            _mostly(row),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mostly(row: Row) -> str:
    """The two largest parts."""
    parts = sorted(row["parts"].items(), key=lambda part: -part[1])[:2]
    return ", ".join(f"{name} {size / row['predicted_bytes']:.0%}" for name, size in parts)
