"""The report of an archive: report.json, which is part of it, and a page (HTML) to look at.

Deliberately not here: what the page says and how it is drawn (`report_page`, `report_charts`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.source import ArchiveFacts, BadFile, Plan

_MOST_LISTED = 1000
"""Rows of a list in report.json; the number of all is beside it."""


def compose_report(
    *, facts: ArchiveFacts, plan: Plan, bad_files: Sequence[BadFile], num_files: int
) -> dict[str, Any]:
    """Return the content of report.json: how the archive came about.

    Args:
        facts: of the source; their notes are kept.
        plan: of the sequences; its report is kept.
        bad_files: what could not be converted, and what the settings left out.
        num_files: all files that were to be converted.

    Returns:
        JSON values that depend on the arguments alone: `files` (number), `bad_files` and
        `left_out_files` (each with `number`, numbers by `reasons`, and a `list` of at most 1,000),
        `facts` and `plan`.
    """
    return {
        "files": num_files,
        "bad_files": _file_table([file for file in bad_files if not file.by_design]),
        "left_out_files": _file_table([file for file in bad_files if file.by_design]),
        "facts": dict(facts.notes),
        "plan": dict(plan.report),
    }


def _file_table(files: Sequence[BadFile]) -> dict[str, Any]:
    reasons = Counter(file.reason for file in files)
    return {
        "number": len(files),
        "reasons": dict(sorted(reasons.most_common(_MOST_LISTED))),
        "list": [{"file": file.file, "reason": file.reason} for file in files[:_MOST_LISTED]],
    }


def write_report(url: str, out_path: Path) -> Path:
    """Write the page of an archive and return its path."""
    raise NotImplementedError
