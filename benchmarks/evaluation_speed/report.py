"""The table of the record. Needs nothing that is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.provenance import median_and_range


def table(record: Mapping[str, Any]) -> str:
    """Markdown: frames a second of every score, and what part of an evaluation scores take."""
    machine = record["machine"]
    cases = record["cases"]
    lines = [
        f"{machine['cpu']}, {record['rounds']} round(s): median (least - most). Networks on "
        f"{machine['processor']}, {machine['threads']} thread(s) of the CPU.",
        "",
        "| frames | score | plain [frames/s] | now [frames/s] | × | difference |",
        "|---" * 6 + "|",
    ]
    for name, case in cases.items():
        shown = f"{name}, {case['size']}x{case['size']}" + (", masked" if case["missing"] else "")
        for score, row in case["scores"].items():
            rates = [[row["frames"] / s for s in row[way]] for way in ("plain", "now")]
            columns = [
                shown,
                score,
                *(median_and_range(values, 0) for values in rates),
                median_and_range(_ratios(row["plain"], row["now"]), 1),
                f"{row['difference']:.0e}",
            ]
            lines.append(f"| {' | '.join(columns)} |")
    lines += [
        "",
        "| evaluation | forecast [s/batch] | scores, plain [s/batch] | now [s/batch] | × "
        "| scores' share, plain | now |",
        "|---" * 7 + "|",
    ]
    for name, case in cases.items():
        row = case["evaluation"]
        columns = [
            f"{name}, {row['sequences']} sequences",
            *(median_and_range(row[way], 3) for way in ("forecast", "plain", "now")),
            median_and_range(_ratios(row["plain"], row["now"]), 1),
            *(f"{_share(row, way):.0%}" for way in ("plain", "now")),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _ratios(plain: Sequence[float], now: Sequence[float]) -> list[float]:
    """How many times as fast, round by round."""
    return [before / after for before, after in zip(plain, now, strict=True)]


def _share(row: Mapping[str, Any], way: str) -> float:
    """Of scores in the time of an evaluation."""
    scored = median(row[way])
    return scored / (scored + median(row["forecast"]))
