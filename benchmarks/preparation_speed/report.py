"""The table of the record. Needs nothing that is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.provenance import median_and_range


def table(record: Mapping[str, Any]) -> str:
    """Markdown: throughput by number of processes, and where one process spends its time."""
    machine = record["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {record['rounds']} round(s): median (least - "
        "most).",
        "",
        "| archive | processes | sequences/s | MB/s, uncompressed | processor, ms/sequence "
        "| manifest |",
        "|---" * 6 + "|",
    ]
    for way, row in record["ways"].items():
        for workers, runs in row["runs"].items():
            columns = [
                way,
                workers,
                median_and_range([run["sequences"] / run["seconds"] for run in runs], 0),
                median_and_range([run["bytes"] / 1e6 / run["seconds"] for run in runs], 0),
                median_and_range([1e3 * run["cpu_seconds"] / run["sequences"] for run in runs], 2),
                ", ".join(sorted({run["hash"][:12] for run in runs})),
            ]
            lines.append(f"| {' | '.join(columns)} |")
    lines += [
        "",
        *dict.fromkeys(
            f"- {way.partition(',')[0]}: {text}" for way, text in record["sources"].items()
        ),
        "",
        "Own parts of the processor time in one process, under a profiler, which makes small "
        "functions look larger than they are:",
        "",
        "| archive | where |",
        "|---|---|",
    ]
    for way, row in record["ways"].items():
        shown = ", ".join(f"`{name}` {part:.0%}" for name, part in row["profile"])
        lines.append(f"| {way} | {shown} |")
    return "\n".join(lines) + "\n"
