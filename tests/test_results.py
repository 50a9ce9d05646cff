"""Numbers in documents are those of the committed records, not typed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = sorted((ROOT / "docs" / "results").glob("*/results.json"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.parent.name)
def test_table_is_made_from_its_record(record: Path) -> None:
    script = ROOT / "benchmarks" / f"{record.parent.name.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = json.loads(record.read_text())
    table = module.table(results["persistence"], results["scores"])
    assert (record.parent / "table.md").read_text() == table


def test_readme_shows_the_recorded_table() -> None:
    table = (ROOT / "docs" / "results" / "digits-seeds" / "table.md").read_text()
    assert table in (ROOT / "README.md").read_text()
