"""Every trial of a search as a row of plain values: trials.csv and trials.parquet.

An axis is a column by its own name; `sources`, as an axis or not, is what the student uses. What is
undefined is empty.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TypeAlias

from tmu_dist.data.storage import join_url
from tmu_dist.files import atomic_file
from tuning.findings import Findings
from tuning.plan import Search
from tuning.records import TrialRecord
from tuning.space import SOURCES, Value, show

Plain: TypeAlias = str | int | float | bool | None


def trial_columns(search: Search, findings: Findings) -> dict[str, list[Plain]]:
    """Columns by name, each with a value for every trial, by number."""
    records = all_records(findings)
    axes = [axis.name for axis in search.space.axes if axis.name != SOURCES]
    sources = sorted({source for record in records for source in record.sources})
    return {
        "number": [record.trial.number for record in records],
        "point": [record.trial.point_number for record in records],
        **{name: _axis([record.trial.point.get(name) for record in records]) for name in axes},
        "seed": [record.trial.seed for record in records],
        "state": [record.trial.state for record in records],
        "reason": [record.trial.reason for record in records],
        "restarts": [record.trial.failures for record in records],
        "method": [record.method for record in records],
        "sources": [show(record.sources) for record in records],
        "fraction": [record.fraction for record in records],
        "error": [record.error for record in records],
        "level": [r.reports[-1].level if r.reports else None for r in records],
        "steps": [r.reports[-1].step if r.reports else None for r in records],
        "seconds": [r.reports[-1].seconds if r.reports else None for r in records],
        "operations": [record.operations for record in records],
        **{f"gate/{name}": [_gate(record, name) for record in records] for name in sources},
        "folder": [relative_folder(search, record) for record in records],
    }


def all_records(findings: Findings) -> list[TrialRecord]:
    """Every trial, by number."""
    records = [record for point in findings.points for record in point.trials]
    return sorted(records, key=lambda record: record.trial.number)


def relative_folder(search: Search, record: TrialRecord) -> str:
    """A trial's last run, seen from the search folder."""
    return record.folder.removeprefix(join_url(search.folder, ""))


def as_csv(columns: dict[str, list[Plain]]) -> str:
    """The table as text; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def write_parquet(columns: dict[str, list[Plain]], path: Path) -> None:
    """The table with types; None is null."""
    import pyarrow as pa  # type: ignore[import-untyped]  # with Ray Tune, which not all install
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with atomic_file(path) as staging:
        pq.write_table(pa.table(columns), staging)


def _axis(values: list[Value]) -> list[Plain]:
    """Of one type, as Parquet wants it: numbers, flags, or else text."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known):
        return [None if value is None else bool(value) for value in values]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        has_floats = any(isinstance(value, float) for value in known)
        return [
            None if not isinstance(value, int | float) else float(value) if has_floats else value
            for value in values
        ]
    return [None if value is None else show(value) for value in values]


def _gate(record: TrialRecord, source: str) -> float | None:
    gates = dict(zip(record.sources, record.gates))
    return gates.get(source)
