"""Is everything in order for a run, before it is paid for?

    python -m tmu_dist.doctor [--here] [--json [FILE]] [flags of the training]

The flags are those of `python -m tmu_dist.train`. Looks at this machine (what `ray job submit`
would send, the cluster's address, the token), at every node (versions, GPUs, clock, cache, stores),
and at the ranks together (exchange, teachers, real training steps, reading). With launcher local or
torchrun there are no nodes but this one. Nothing is trained, and nothing stays behind.

Exit code: 0 healthy (there may be warnings), 1 faults, 2 wrong flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tmu_dist.commands import command_errors
from tmu_dist.doctor.examination import Report, examine
from tmu_dist.doctor.findings import Finding, Status, in_order, is_healthy
from tmu_dist.train import parse_command

_MIN_WIDTH = 120
"""Columns of a table where no terminal says how many there are."""
_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "fault": ("FAULT", "bold red"),
    "skipped": ("-", "dim"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.doctor`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    chosen, flags = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    recipe = parse_command(
        flags,
        prog="python -m tmu_dist.doctor [--here] [--json [FILE]]",
        summary="Is everything in order for this run? --here: look only at this machine, as the "
        "one where jobs are submitted from. --json: for machines, to FILE or instead of the table.",
    )
    from tmu_dist.collectives import joined_ranks  # loads torch, which --help does not need

    launcher = recipe.config.launch.launcher
    with command_errors(), joined_ranks(launcher, timeout_seconds=60.0) as collectives:
        with redirect_stdout(sys.stderr):
            report = examine(recipe, collectives, only_here=chosen.here)
        if collectives.ranks.is_main:
            tell(report, chosen.json)
        try:
            report = collectives.broadcast_object(report)
        except RuntimeError:  # an exchange of ranks has failed: nothing more goes over it
            raise SystemExit(1) from None
        if not is_healthy(report.findings):
            raise SystemExit(1)


def tell(report: Report, json_file: str | None) -> None:
    """Show what was found, as a table, or as JSON where there is no file for that."""
    if json_file is not None:
        text = json.dumps(report.as_record(), indent=2) + "\n"
        if json_file == "-":
            sys.stdout.write(text)
            return
        Path(json_file).write_text(text)
    show(report)


def show(report: Report) -> None:
    """A line a finding, what to change below it, and what it comes to."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_MIN_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "check", "where", "found"):
        table.add_column(name, overflow="fold")
    for finding in in_order(report.findings):
        mark, style = _MARKS[finding.status]
        table.add_row(Text(mark, style=style), finding.check, Text(finding.where), _said(finding))
    console.print(table)
    console.print(Text(_closing(report)))


def _said(finding: Finding) -> Text:
    text = Text(finding.found, style="dim" if finding.status == "skipped" else "")
    if finding.advice:
        text.append(f"\n-> {finding.advice}", style="bold")
    return text


def _closing(report: Report) -> str:
    def count(status: Status, word: str) -> str:
        number = sum(finding.status == status for finding in report.findings)
        return f"{number} {word}{'' if number == 1 else 's'}"

    verdict = "Healthy" if is_healthy(report.findings) else "Not ready to train"
    nodes = {0: "this machine", 1: "1 node"}.get(report.num_nodes, f"{report.num_nodes} nodes")
    return (
        f"{verdict}: {count('fault', 'fault')}, {count('warning', 'warning')}; {nodes} looked at "
        f"in {sum(report.seconds.values()):.0f} s."
    )


if __name__ == "__main__":
    main()
