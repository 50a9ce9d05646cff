"""The speed benchmarks compare like with like: same loss, same gradients, counted rightly."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from benchmarks.speed import curves, measure, reference, teachers, training, work
from benchmarks.speed.work import SETTINGS, SIZES, Ours, Reference
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
        losses.append([float(ours.train()["loss/total"]), other.train()])
    assert all(mine == pytest.approx(its, rel=1e-10) for mine, its in losses)
    assert losses[0][0] != pytest.approx(losses[2][0], rel=1e-3)


@pytest.mark.parametrize("name", ["fp32", "fp32, winograd, fused", "defaults"])
def test_settings_learn_what_the_reference_learns(name: str) -> None:
    """Whatever is kept from one update to the next is made anew when weights have changed."""
    ours, other = Ours(TINY, CPU, SETTINGS[name]), Reference(TINY, CPU)
    for _ in range(3):
        ours.train()
        other.train()
        assert float(ours.outcome().loss) == pytest.approx(float(other.outcome().loss), rel=1e-4)


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
    # Ours leaves out a gradient or two of the zeros before the first step.
    assert 0.995 < count_operations(ours.train) / tried.training_operations <= 1
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
    saved = count_operations(told.train) - count_operations(cached.train)
    assert saved == TINY.num_teachers * TINY.teacher_operations


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
    assert columns[:3] == ["1.0000 (1.0000, 1.0000)", "2.00", "3.00 (2.00 - 4.00)"]
    assert columns[3:7] == ["2.0", "0.50", "0.25", "5"]


def ask(question: str, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> Any:
    """What a question's command leaves, with --quick."""
    monkeypatch.setattr(sys, "argv", ["-", "--quick", "--out", str(out), *options])
    module = importlib.import_module(f"benchmarks.speed.{question}")
    module.main()
    record = json.loads((out / "results.json").read_text())
    assert (out / "table.md").read_text() == module.table(record)
    return record


def test_training_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (case,) = ask("training", monkeypatch, tmp_path, "--settings", "bf16")["cases"]
    assert list(case["found"]) == ["reference", "bf16"]
    found = case["found"]["bf16"]
    assert found["setting"]["training.precision"] == "bf16" and len(found["seconds"]) == 1
    assert 1e-5 < found["agreement"]["predictions"] < 0.1


def test_inference_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--settings", "fp32", "fp32, winograd, fused, cached", "--batches", "1", "3")
    cases = ask("inference", monkeypatch, tmp_path, *options)["cases"]
    assert [case["work"]["batch"] for case in cases] == [1, 3]
    assert list(cases[0]["found"]) == ["reference", "fp32"]  # nothing is cached in a forecast
    one, three = (case["found"]["fp32"]["operations"] for case in cases)
    assert three == 3 * one


def test_teachers_are_priced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--counts", "0", "1", "2", "--settings", "fp32")
    (case,) = ask("teachers", monkeypatch, tmp_path, *options)["cases"]
    assert list(case["found"]) == ["0", "1", "2"]
    assert case["found"]["0"]["teachers_seconds"] is None
    operations = [row["operations"] for row in case["found"].values()]
    assert operations[2] - operations[1] > case["teacher_operations"]


def test_the_price_of_a_teacher_is_by_round_and_beyond_the_plain_step() -> None:
    found = {"0": {"seconds": [1.0, 2.0]}, "4": {"seconds": [3.0, 10.0]}}
    assert teachers.added(found, 4) == [0.5, 2.0]
    case = {"setting": "bf16", "teacher_operations": 8e9, "found": found}
    floors = {"fp32": 1e9, "bf16": 10e9}
    assert teachers.bound(case, floors) == pytest.approx(1.0 + 0.03 * 1.5)
    assert teachers.bound({**case, "setting": "fp32"}, floors) == pytest.approx(10.0 + 0.03 * 1.5)


def test_shapes_are_varied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = ask("shapes", monkeypatch, tmp_path, "--settings", "fp32")
    assert [case["varied"] for case in record["cases"]] == ["frames", "frames", "layers", "batch"]
    small, large = (case["found"]["fp32"]["operations"] for case in record["cases"][:2])
    assert large / small == pytest.approx(20**2 / 16**2)


def test_starts_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (case,) = ask("compile", monkeypatch, tmp_path, "--settings", "fp32")["cases"]
    assert {kind: len(each["later"]) for kind, each in case["found"]["fp32"].items()} == {
        "cold": 5,
        "kept": 5,
    }


def test_curves_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--settings", "bf16", "--processes", "1")
    found = ask("curves", monkeypatch, tmp_path, *options)["curves"]
    assert list(found) == ["fp32", "fp32, nudged", "bf16"]
    plain, *others = (each["0"]["losses"]["loss/total"] for each in found.values())
    assert len(plain) == 3 and plain[0] != plain[-1]
    assert all(other != plain and other == pytest.approx(plain, rel=1e-2) for other in others)


def test_a_curve_is_shown_by_tenths() -> None:
    assert curves.tenths(range(30)) == [3 * k + 1.0 for k in range(10)]
    assert curves.tenths([1.0, 5.0]) == [1.0, 5.0]


def test_updates_see_the_same_in_every_setting() -> None:
    course = curves.Course(TINY, updates=4, seed=3, device=CPU)
    first, second = (list(curves.batches(course, digits=1)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.frames_BTCHW, other.frames_BTCHW)
        assert torch.equal(one.sampling_mask_BT, other.sampling_mask_BT)
    assert first[0].sampling_mask_BT.all()  # sampling begins at 1
    assert not torch.equal(first[0].frames_BTCHW, first[1].frames_BTCHW)
    assert 0 <= first[0].frames_BTCHW.min() < 0.5 < first[0].frames_BTCHW.max() <= 1


QUESTIONS = ("training", "inference", "teachers", "shapes", "compile", "curves")


def test_neither_cluster_nor_data_formats_are_needed() -> None:
    """All questions are asked in one process that has neither Ray, WebDataset nor Zarr."""
    absent = ("ray", "webdataset", "zarr")
    code = (
        f"import sys, importlib; sys.modules.update(dict.fromkeys({absent}))\n"
        f"for name in {QUESTIONS}: importlib.import_module('benchmarks.speed.' + name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_teachers_of_a_work_differ() -> None:
    first, second = work.all_teacher_weights(TINY)
    assert not torch.equal(first["output.weight"], second["output.weight"])
