"""Numbers in documents are those of the committed records, not typed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "digits-seeds": "seeds",
    "radar-seeds": "seeds",
    "radar-conversion": "radar_conversion",
    "streaming": "streaming/report",
    "backbones": "backbones/report",
    "backbones-digits": "backbones/learning",
    "backbones-paper": "backbones/report",
    "many-teachers": "many_teachers",
}
"""Which benchmark made which record."""
RECORDS = sorted((ROOT / "docs" / "results").glob("*/results.json"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.parent.name)
def test_table_is_made_from_its_record(record: Path) -> None:
    script = ROOT / "benchmarks" / f"{SCRIPTS[record.parent.name]}.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.table(json.loads(record.read_text()))
    assert (record.parent / "table.md").read_text() == table


@pytest.mark.parametrize("name", ["digits-seeds", "radar-seeds"])
@pytest.mark.parametrize("document", ["README.md", "docs/lab_log.md"])
def test_documents_show_the_recorded_table(document: str, name: str) -> None:
    table = (ROOT / "docs" / "results" / name / "table.md").read_text()
    assert table in (ROOT / document).read_text()


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("backbones-digits", "README.md"),
        ("backbones-digits", "docs/lab_log.md"),
        ("many-teachers", "docs/lab_log.md"),
        ("backbones", "docs/backbones.md"),
        ("backbones-paper", "docs/backbones.md"),
    ],
)
def test_documents_show_what_backbones_learn_and_cost(name: str, document: str) -> None:
    table = (ROOT / "docs" / "results" / name / "table.md").read_text()
    assert table in (ROOT / document).read_text()


def test_the_lab_log_shows_the_speed_of_conversion() -> None:
    table = (ROOT / "docs" / "results" / "radar-conversion" / "table.md").read_text()
    assert table in (ROOT / "docs" / "lab_log.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/streaming.md"])
def test_documents_show_what_streaming_reached(document: str) -> None:
    table = (ROOT / "docs" / "results" / "streaming" / "table.md").read_text()
    reached, *_ = table.split("\n\n")
    assert reached in (ROOT / document).read_text()
