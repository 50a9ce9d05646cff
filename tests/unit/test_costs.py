"""The costs of the recipes: what is measured of a run, and what is computed from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.costs.__main__ import SEQUENCES, of_few_sequences
from benchmarks.costs.report import core_hours, gpu_hours, run_bytes, table
from benchmarks.costs.runs import count_others, facts_of, measure, shortened
from data_prep.__main__ import main as data_prep
from tmu_dist.config import RunConfig
from tmu_dist.data.archive import open_archive
from tmu_dist.recipes import EXPERIMENTS, get_recipe
from tmu_dist.run_folder import read_log
from tmu_dist.workspace import WORKSPACE
from tuning.records import Operations

ROW: dict[str, Any] = {
    "archive": "digits-3",
    "teachers": [],
    "steps": 900,
    "batch_size": 8,
    "updates": 1800,
    "lines": {"train": 90, "validation": 9, "liveness": 10},
    "kept_checkpoints": 2,
    "memory_bytes": 1_000_000,
    "operations": 3.6e15,
    "sequences": 4,
    "seconds": [1.0, 3.0],
    "on_core": 0.5,
    "peak_bytes": 5e8,
    "checkpoint_bytes": 100,
    "model_bytes": 10,
    "log_bytes": {"train": 1.0, "validation": 2.0},
}
ASSUMED = {"teraflops": 10.0, "utilisation": 0.1}


def test_hours_and_bytes_of_a_run() -> None:
    assert core_hours(ROW) == 0.5 * 8 * 1800 / 3600
    assert gpu_hours(3.6e15, ASSUMED) == pytest.approx(1.0)
    assert run_bytes(ROW) == 2 * 100 + 3 * 10 + 90 + 18


def test_a_students_teachers_are_paid_for() -> None:
    student = {**ROW, "teachers": ["teacher", "teacher"], "operations": 7.2e15}
    record = {
        "machine": {"processor": "Some"},
        "versions": {"torch": "2"},
        "assumed": ASSUMED,
        "recipes": {"teacher": ROW, "student": {**student, "memory_bytes": None}},
        "others": {"digits": {"scratch": 2.0, "tmu": 3.0}},
        "archives": {"digits-3": {"bytes_per_sequence": 2000, "sequences": 500}},
    }
    text = table(record)
    assert "core 50% to 50% of the time" in text
    assert "| `teacher` | 900 x 8 x 2 | 250 | 0.5 | 2 | 1 |  | 500 (4) |" in text
    assert "| `student` | 900 x 8 x 2 | 500 | 0.5 | 2 | 2 | 4 | 500 (4) |" in text
    assert "| `student` | 0.0001 | 1e-05 | 0.000338 | not possible |" in text
    assert "| `digits-3` | 2 | 500 | 1 |" in text
    assert "| `digits-*` | 1.50 |" in text


@pytest.mark.parametrize(
    ("name", "side", "frames"), [("digits-tmu", 32, 10), ("radar-tmu", 64, 12)]
)
def test_archives_of_few_sequences_have_the_recipes_frames(
    name: str, side: int, frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, str(tmp_path))
    ((url, arguments),) = get_recipe(name).archives.items()
    assert data_prep([*of_few_sequences(arguments), "--workers", "1"]) == 0
    manifest = open_archive(url).manifest
    assert (manifest.height, manifest.width, manifest.num_frames) == (side, side, frames)
    assert len(manifest.shards("train")) == 1
    assert manifest.num_samples("train") == SEQUENCES["--train"]


def test_a_measured_run(tmu_config: RunConfig) -> None:
    operations = Operations()
    whole = replace(tmu_config, training=replace(tmu_config.training, num_steps=500))
    total = operations(whole, 500)
    assert total is not None
    short = shortened(whole, total)
    assert (short.training.batch_size, short.training.num_steps) == (4, 21)  # cheap ones: all of it
    assert short.training.reverse_input == "off"
    assert shortened(whole, total * 1e9).training.batch_size == 1
    row = measure(short)
    assert row["sequences"] == 4
    assert len(row["seconds"]) == 20
    assert min(row["seconds"]) > 0
    assert 0 < row["on_core"] < 1.1
    folder = Path(short.output)
    checkpoint = folder / "checkpoints" / "step-00000021"
    assert row["checkpoint_bytes"] == sum(file.stat().st_size for file in checkpoint.iterdir())
    assert row["log_bytes"].keys() == {event["event"] for event in read_log(folder)}
    facts = facts_of(whole)
    assert facts["updates"] == 2 * 500
    # Two layers of 4 channels on 4x4 maps, 5 steps, floats.
    assert facts["memory_bytes"] == 5 * 2 * 4 * 4 * 4 * 4


def test_every_experiment_has_the_students_that_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.costs.runs.count", lambda _, config: config.output)
    for prefix in EXPERIMENTS:
        counted = {Path(str(output)).name for output in count_others(prefix).values()}
        assert f"{prefix}-scratch" in counted
        assert counted <= {f"{prefix}-{name}" for name in EXPERIMENTS[prefix]}
        assert len(counted) == 9
