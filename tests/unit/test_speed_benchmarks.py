"""The speed benchmarks compare like with like: same loss, same gradients, counted rightly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from benchmarks.speed import measure, reference, training, work
from benchmarks.speed.work import SETTINGS, SIZES, Ours, Reference, Work
from tmu_dist.evaluation.operations import count_operations
from tmu_dist.models.patches import patchify

ROOT = Path(__file__).parents[2]
TINY = SIZES["tiny"]
CPU = "cpu"


@pytest.mark.parametrize("peephole", ["channel", "none"])
@pytest.mark.parametrize("num_teachers", [0, 1, 2, 4])
def test_the_reference_computes_our_loss_and_gradients(
    num_teachers: int, peephole: Literal["channel", "none"]
) -> None:
    """With 4 teachers Eq. 5 is divided by 1 + M."""
    tried = work.with_peephole(TINY, peephole)._replace(num_teachers=num_teachers)
    ours = Ours(tried, CPU, SETTINGS["fp32"], dtype=torch.float64)
    other = Reference(tried, CPU, dtype=torch.float64)
    differences = work.agreement(ours.outcome(), other.outcome())
    assert max(differences.values()) < 1e-10
    assert measure.relative_difference([ours.forecast()], [other.forecast()]) < 1e-10


def test_they_stay_together_when_they_learn() -> None:
    ours, other = (
        Ours(TINY, CPU, SETTINGS["fp32"], dtype=torch.float64),
        Reference(TINY, CPU, dtype=torch.float64),
    )
    losses = []
    for _ in range(3):
        losses.append([ours.train()["loss/total"], other.train()])
    assert all(mine == pytest.approx(its, rel=1e-10) for mine, its in losses)
    assert losses[0][0] != pytest.approx(losses[2][0], rel=1e-3)


def test_a_difference_would_be_seen() -> None:
    """Other teachers, or peepholes that one of them has not, are not overlooked."""
    ours, other = Ours(TINY, CPU, SETTINGS["fp32"]), Reference(TINY, CPU)
    with torch.no_grad():
        other.teachers[1].output.weight.zero_()  # its own predictions are what it reads
    differences = work.agreement(ours.outcome(), other.outcome())
    assert differences["predictions"] < 1e-5 < 1e-4 < differences["gradients"]
    with pytest.raises(RuntimeError, match="peepholes"):
        reference.Network(TINY.dimensions._replace(peepholes=False), 2).load_state_dict(
            reference.weights_of(work.student_weights(TINY), 2)
        )


def test_patches_are_those_of_the_project() -> None:
    frames_BTCHW = torch.rand(2, 3, 2, 8, 12)
    assert torch.equal(reference.patches(frames_BTCHW, 4), patchify(frames_BTCHW, 4))


@pytest.mark.parametrize("num_teachers", [0, 2])
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_operations_are_those_that_run(size: str, num_teachers: int) -> None:
    tried = SIZES[size]._replace(num_teachers=num_teachers, batch=1)
    other, ours = Reference(tried, CPU), Ours(tried, CPU, SETTINGS["fp32"])
    assert count_operations(other.train) == tried.training_operations
    assert count_operations(ours.train) == tried.training_operations
    assert count_operations(other.forecast) == tried.forecast_operations
    if num_teachers:
        assert count_operations(ours.teach) == num_teachers * tried.teacher_operations


def test_weights_of_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stack\.layers\.0\.cell\.conv_x\.weight has no place"):
        reference.weights_of({"stack.layers.0.cell.conv_x.weight": torch.ones(1)})


def test_cached_memories_are_those_that_teachers_tell() -> None:
    cached = Ours(TINY, CPU, SETTINGS["fp32"]._replace(is_cached=True))
    told = Ours(TINY, CPU, SETTINGS["fp32"])
    differences = work.agreement(cached.outcome(), told.outcome())
    assert differences == {"loss": 0.0, "predictions": 0.0, "gradients": 0.0}
    teachers = TINY.num_teachers * TINY.teacher_operations
    assert count_operations(cached.train) == TINY.training_operations - teachers


def test_the_paper_has_the_papers_size() -> None:
    paper = SIZES["paper"]
    network = reference.Network(work.with_peephole(paper, "none").dimensions, 2)
    assert sum(weight.numel() for weight in network.parameters()) == 3_588_608  # Table 1: 3.6M
    assert paper.num_steps == 19 and paper.dimensions.height == 16


def test_runs_take_turns() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = measure.alternate(runs, CPU, rounds=3, seconds=0.0)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}


def test_ratios_are_those_of_a_round() -> None:
    assert measure.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert measure.spread([3.0, 1.0, 2.0], 1) == "1.0 (2.0, 3.0)"


def test_relative_differences_are_taken_over_all_tensors() -> None:
    expected = [torch.tensor([3.0]), torch.tensor([4.0])]
    found = [torch.tensor([3.0]), torch.tensor([4.5])]
    assert measure.relative_difference(found, expected) == pytest.approx(0.1)


def test_floors_keep_the_best_of_all_rounds() -> None:
    floors = measure.Floors(CPU, quick=True)
    floors.best["bf16"] = 1e30
    floors.measure()
    assert floors.best["bf16"] == 1e30 and floors.best["fp32"] > 1e6 < floors.best["copy"]


def test_matrix_precision_is_put_back() -> None:
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    with measure.matrix_precision("tf32"):
        assert backend.fp32_precision == "tf32"
    assert backend.fp32_precision == before


def hold(megabytes: int) -> measure.Run:
    """A run that holds so much for a moment, for a test of peaks."""
    return lambda: torch.ones(megabytes * 2**18).sum()


def test_peaks_are_those_of_a_call() -> None:
    small, large = (measure.peak_bytes(hold, size, device=CPU) for size in (8, 108))
    assert large - small == pytest.approx(100 * 2**20, rel=0.1)


def record_of(found: Any) -> Any:
    return {
        "command": "c",
        "git_revision": "r",
        "rounds": 2,
        "machine": {"processor": "CPU", "threads": 1},
        "versions": {"torch": "2"},
        "floors": {"per_second": {"fp32": 4e9, "bf16": 8e9, "copy": 1e9}},
        "cases": [{"work": TINY.facts(), "found": found}],
    }


def row(*seconds: float, operations: float = 2e9) -> Any:
    differences = dict.fromkeys(("loss", "predictions", "gradients", "next_loss"), 1e-6)
    return {
        "seconds": list(seconds),
        "operations": operations,
        "peak_bytes": 5_000_000,
        "agreement": differences,
    }


def test_a_line_tells_speed_by_the_reference_of_the_same_round() -> None:
    text = training.table(record_of({"reference": row(2.0, 4.0), "fast": row(1.0, 1.0)}))
    (line,) = [line for line in text.splitlines() if line.startswith("| fast")]
    columns = [column.strip() for column in line.split("|")[2:-1]]
    assert columns[:3] == ["1.000 (1.000, 1.000)", "2.00", "3.00 (2.00 - 4.00)"]
    assert columns[3:7] == ["2.0", "0.50", "0.25", "5"]


def run_script(name: str, out: Path, *arguments: str) -> Any:
    """Run a question in a process that has neither Ray, WebDataset nor Zarr; its record."""
    absent = ("ray", "webdataset", "zarr")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        f"sys.argv = {['-', '--quick', '--threads', '1', '--out', str(out), *arguments]}; "
        f"import runpy; runpy.run_module('benchmarks.speed.{name}', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text())


def test_training_is_measured(tmp_path: Path) -> None:
    record = run_script("training", tmp_path, "--settings", "bf16")
    (case,) = record["cases"]
    assert list(case["found"]) == ["reference", "bf16"]
    assert case["found"]["bf16"]["setting"]["training.precision"] == "bf16"
    assert 1e-5 < case["found"]["bf16"]["agreement"]["predictions"] < 0.1
    assert (tmp_path / "table.md").read_text() == training.table(record)


def test_teachers_of_a_work_differ() -> None:
    first, second = work.teacher_networks(TINY)
    assert not torch.equal(first.output.weight, second.output.weight)
    assert isinstance(TINY, Work)
