"""Numbers in documents are those of the committed records, not typed."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
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
    "extensions": "extensions",
    "methods": "methods",
    "methods-paper": "methods",
    "checkpoints": "checkpoints",
    "convolutions": "convolutions",
    "data-parallel": "data_parallel",
    "recovery": "recovery",
    "costs": "costs/report",
    "memory": "memory/report",
    "scaling": "scaling/report",
    "killed-search": "killed_search",
    "search-curves": "search_curves",
    "search-simulation": "search_simulation/report",
    "evaluation-speed": "evaluation_speed/report",
    "loader-share": "loader_share",
    "preparation-speed": "preparation_speed/report",
    "startup": "startup/report",
    **{
        f"speed-{question}{device}": f"speed/{question}"
        for question in ("training", "inference", "teachers", "shapes", "compile", "curves")
        for device in ("", "-cuda")
    },
}
"""Which benchmark made which record."""
LEDGERS, SEARCHES = {"ledger-digits"}, {"search-digits"}
"""Who write their own, as studies do (tests/unit/test_study_page.py)."""
RECORDS = [
    path
    for path in sorted((ROOT / "docs" / "results").glob("*/results.json"))
    if path.parent.name not in LEDGERS | SEARCHES and not path.parent.name.startswith("study-")
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.parent.name)
def test_table_is_made_from_its_record(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "benchmarks" / f"{SCRIPTS[record.parent.name]}.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
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


@pytest.mark.parametrize("name", sorted(LEDGERS))
def test_the_documents_show_the_ledgers_table(name: str) -> None:
    """The score table in documents is the ledger's, and its means are those of the record."""
    folder = ROOT / "docs" / "results" / name
    record = json.loads((folder / "results.json").read_text())
    blocks = (folder / "table.md").read_text().split("\n\n")
    scores = next(block for block in blocks if block.startswith("| Method | Sources | Weights"))
    for document in ("README.md", "docs/lab_log.md"):
        assert scores in (ROOT / document).read_text()
    shown: dict[str, str] = {}
    for arm in record["arms"].values():
        runs = " ".join(run["run"] for run in arm["runs"].values())
        if runs in shown.values():  # of two sources, one left out is the other alone
            continue
        values = [run["scores"]["mse_per_frame"] for run in arm["runs"].values()]
        mean = f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
        row = next(row for row in scores.splitlines() if arm["label"] in row and mean in row)
        shown[row] = runs
    assert len(shown) == len(scores.splitlines()) - 3  # all rows but headings and persistence


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("extensions", "docs/lab_log.md"),
        ("methods", "docs/methods.md"),
        ("checkpoints", "docs/many_machines.md"),
        ("costs", "docs/operations.md"),
        ("data-parallel", "docs/many_machines.md"),
        ("recovery", "docs/faults.md"),
        ("scaling", "docs/scaling.md"),
    ],
)
def test_documents_show_what_was_measured(name: str, document: str) -> None:
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
