"""The page of a study and its table, and whether what they say is what the runs predicted.

FOLDER/report.html      self-contained, for people
FOLDER/table.md         the same tables as text
FOLDER/results.json     every number (`record`), of which both are made

Deliberately not here: tables and charts (`tables`), numbers (`verdicts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tmu_dist.evaluation.page import STYLE
from tmu_dist.evaluation.result import MODEL, EvaluationResult
from tmu_dist.evaluation.tables import markdown
from tmu_dist.files import atomic_write_text
from tmu_dist.html_page import bullet_list, definition_list, document, element
from tmu_dist.ledger.page import recheck_runs
from tmu_dist.ledger.records import ArmRecord, read_seed
from tmu_dist.ledger.statistics import NUM_RESAMPLES
from tmu_dist.study.design import PAGE_FILE, TABLE_FILE, in_words
from tmu_dist.study.record import StudyRecord
from tmu_dist.study.studies import get_study
from tmu_dist.study.tables import all_parts, lead
from tmu_dist.study.verdicts import RULE

_NOTES = "In what this is not the paper's experiment"
_STYLE = f"""{STYLE}
body {{ max-width: 78rem; }}
th:first-child {{ white-space: normal; min-width: 11rem; }}
td.text, th.text {{ min-width: 4.5rem; }}
.charts {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }}
"""
_WEIGHTS = {
    "chosen": "those with the least error on the validation split",
    "last": "those of the last iteration",
}
_TOLERANCE = 1e-6


def write_study(folder: Path, record: StudyRecord) -> None:
    """Write numbers, table and page, each of which appears whole or not at all."""
    record.save(folder)
    atomic_write_text(folder / TABLE_FILE, as_markdown(record))
    atomic_write_text(folder / PAGE_FILE, _as_html(record))


def as_markdown(record: StudyRecord) -> str:
    """The tables as text."""
    blocks = [
        f"# {_title(record)}",
        f"{record.question} {lead(record)}",
    ]
    for part in all_parts(get_study(record.study), record):
        blocks += [f"## {part.heading}", *part.texts]
        for data, caption in part.tables:
            blocks += [markdown(data).rstrip("\n"), *([caption] if caption else [])]
    blocks += [f"## {_NOTES}", _bullets(record.notes)]
    if failed := _failures(record):
        blocks += ["## Failed and missing runs", _bullets(failed)]
    blocks += ["## How to repeat this", f"    {record.command}"]
    return "\n\n".join(blocks) + "\n"


def _title(record: StudyRecord) -> str:
    parts = [f"{record.scale} scale", *in_words(record.settings)]
    if record.weights == "last":
        parts.append("weights of the last iteration")
    return f"{record.title} ({', '.join(parts)})"


def _bullets(lines: tuple[str, ...]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _as_html(record: StudyRecord) -> str:
    title = _title(record)
    body = [
        element("h1", title),
        element("p", record.question, css="lead"),
        element("p", lead(record)),
        definition_list(_facts(record), css="facts"),
    ]
    for part in all_parts(get_study(record.study), record):
        body += part.as_html()
    body += [element("h2", _NOTES), bullet_list(list(record.notes))]
    if failed := _failures(record):
        body += [element("h2", "Failed and missing runs"), bullet_list(list(failed))]
    body += [
        element("h2", "How the numbers are defined"),
        definition_list(
            [
                ("verdict", RULE),
                ("95 % interval", f"two-way bootstrap: {NUM_RESAMPLES:,} times, as many seeds and "
                 "as many test sequences as there are, both drawn with replacement and crossed; "
                 "of transfer gates, which have no values of single sequences, over seeds alone"),
                ("over seeds alone", "Student's t on the mean differences of the seeds, 95 %"),
            ],
            css="terms",
        ),
        element("h2", "How to repeat this"),
        element(
            "pre",
            f"{record.command}\n"
            "python -m tmu_dist.study page FOLDER     # this page again, from the record\n"
            "python -m tmu_dist.study check FOLDER    # every score again, from the predictions",
        ),
    ]  # fmt: skip
    return document(title, body, style=_STYLE)


def _facts(record: StudyRecord) -> list[tuple[str, str]]:
    seeds = ", ".join(map(str, record.seeds)) or "none"
    known = [
        ("Made", f"{record.finished}, git revision {record.git_revision}"),
        ("Command", record.command),
        ("Scale", record.scale),
        ("Weights", _WEIGHTS[record.weights]),
        ("Task", f"{record.window[0]} frames in, {record.window[1]} predicted"),
        ("Networks", "; ".join(record.networks)),
        ("Training", "; ".join(record.trainings)),
        ("Evaluated on", f"{record.test_sequences:,} test sequences"),
        ("Seeds", seeds),
        ("Machine", record.machine),
        ("Software", ", ".join(f"{name} {version}" for name, version in record.software.items())),
    ]
    if record.selection:
        known.append(("Stochastic networks", f"scores are of the {record.selection}"))
    return known


def _failures(record: StudyRecord) -> tuple[str, ...]:
    """Failed runs with their errors; rows of which none was tried."""
    lines = [
        f"{row.key}, seed {seed}: {why}"
        for row in record.rows
        for seed, why in row.failures.items()
    ]
    untried = [row.key for row in record.rows if not row.seeds and not row.failures]
    return (*lines, *([f"Not run yet: {', '.join(untried)}"] if untried else []))


def check_study(folder: Path) -> list[str]:
    """Compare the record and the table with the scores that the saved predictions give.

    Scores of sequences are taken again by code of their own (`recheck_runs`); every row's scores in
    the record must be the means of these, and the table the one that the record gives. CSI and
    gates are not taken again; runs of stochastic networks keep no predictions and are named in the
    log.

    Returns:
        What does not agree, a line each; empty where all does.

    Raises:
        ValueError: there is no record, or a run of it is gone.
    """
    record = StudyRecord.load(folder)
    arms = tuple(
        ArmRecord(
            name=row.key,
            label=row.label,
            group="memory",
            sources=row.teachers,
            method=row.method,
            seeds={
                seed: read_seed(folder, facts.run, record.weights)
                for seed, facts in row.seeds.items()
            },
            failures={},
        )
        for row in record.rows
    )
    found, checked = recheck_runs(folder, arms)
    found += _record_problems(record, checked)
    file = folder / TABLE_FILE
    if not file.is_file() or file.read_text() != as_markdown(record):
        found.append(f"{file} is not of this record: python -m tmu_dist.study page {folder}")
    return found


def _record_problems(record: StudyRecord, checked: Mapping[str, EvaluationResult]) -> list[str]:
    """Scores of rows that are not what the recomputed ones of their sequences give."""
    found = []
    for row in record.rows:
        for seed, facts in row.seeds.items():
            again = checked[facts.run].overall[MODEL]
            found += [
                f"{row.key}, seed {seed}: {name} {value:.9g} in the record, {again[name]:.9g} by "
                "its run"
                for name, value in facts.scores.items()
                if name in again and not np.isclose(value, again[name], rtol=_TOLERANCE, atol=0)
            ]
    return found
