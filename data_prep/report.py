"""The report of an archive: report.json, which is part of it, and a page (HTML) to look at.

Deliberately not here: what the page says (`report_page`, `report_coverage`, `report_losses`) and
how it is drawn (`report_charts`, `report_html`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.source import ArchiveFacts, BadFile, Plan
from tmu_dist.data import storage
from tmu_dist.data.manifest import REPORT_PATH, SPLITS, STATISTICS_PATH, Manifest

if TYPE_CHECKING:
    from tmu_dist.data.archive import Archive

_MOST_LISTED = 1000
"""Rows of a list in report.json; the number of all is beside it."""
_EXAMPLES_TRAIN, _EXAMPLES = 3, 2
"""Sequences that the page shows of the training split, and of each other split."""
_MOST_RECORDS = 50
"""Sequences of a split whose records are read for its mean wet fraction."""


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
    """Write a page (HTML) about an archive that needs nothing beside itself.

    Args:
        url: the archive, of either format; with or without report.json and statistics.json.
        out_path: the page; it appears whole or not at all.

    Returns:
        `out_path`.

    Raises:
        ValueError: no such archive, a damaged sample, or a damaged report or statistics.
    """
    from data_prep.report_html import STYLE
    from data_prep.report_page import PageData, page_parts
    from data_prep.show import read_examples
    from tmu_dist.data.archive import open_archive
    from tmu_dist.html_page import document

    archive = open_archive(url)
    manifest = archive.manifest
    splits = [split for split in SPLITS if split in manifest.splits]
    data = PageData(
        url=url,
        manifest=manifest,
        statistics=_read_json(url, manifest, STATISTICS_PATH),
        report=_read_json(url, manifest, REPORT_PATH),
        examples={
            split: read_examples(archive, split, _EXAMPLES_TRAIN if split == "train" else _EXAMPLES)
            for split in splits
        },
        wet_fractions=_wet_fractions(archive, splits),
    )
    text = document(f"{manifest.name}: archive report", page_parts(data), style=STYLE)
    storage.write_bytes(str(out_path.parent), out_path.name, text.encode())
    return out_path


def _read_json(url: str, manifest: Manifest, path: str) -> dict[str, Any]:
    """Return an object of the archive, {} where it has none."""
    if path not in {stored.path for stored in manifest.objects}:
        return {}
    try:
        record = json.loads(storage.read_text(url, path))
    except ValueError as error:
        if isinstance(error, storage.StorageError):
            raise
        raise ValueError(f"{storage.join_url(url, path)} is not valid JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{storage.join_url(url, path)} is no JSON object; verify the archive.")
    return record


def _wet_fractions(archive: Archive, splits: Sequence[str]) -> dict[str, float]:
    """Return the mean wet fraction of some sequences of each split, where records have it."""
    from data_prep.panels import spread

    found = {}
    for split in splits:
        ids = spread(archive.manifest.num_samples(split), _MOST_RECORDS)
        fractions = [archive.read_meta(split, number).get("wet_fraction") for number in ids]
        known = [fraction for fraction in fractions if isinstance(fraction, int | float)]
        if known:
            found[split] = sum(known) / len(known)
    return found
