"""The cost table of transfer methods: exact counts, what a step does, and what the table says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks.backbones.costs import BATCH_SIZE, SIZES
from benchmarks.methods import METHODS, Prepared, Teachers, prepare, table
from tmu_dist.config.transfer import Method
from tmu_dist.evaluation.operations import count_operations

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = SIZES["small"]
PLAIN = 2_971_648
TRAINED_AT_TEST_IN_TRAINING = {
    "scratch": (PLAIN, PLAIN, PLAIN),
    "tmu_scratch": (3_588_608, 3_588_608, 3_588_608),
    "finetune": (PLAIN, PLAIN, PLAIN),
    "l2_sp": (PLAIN, PLAIN, PLAIN),
    # A mixture of 3 candidates and 8 transforms of 64x64; of 9 candidates and 32 of 64x64x3x3.
    "knowledge_flow": (PLAIN + 4 * 3 + 8 * 4096, PLAIN, 8_947_724),
    "knowledge_flow-table1": (PLAIN + 4 * 9 + 32 * 36_864, PLAIN, 10_094_628),
    "art": (9_323_024 - 2 * PLAIN, 9_323_024, 9_323_024),
    "art-table1": (10_192_128 - 2 * PLAIN, 10_192_128, 10_192_128),
    "distillation": (PLAIN + 8 * 4096, PLAIN, 3 * PLAIN + 8 * 4096),
    "tmu": (3_588_608, 3_588_608, 3_588_608 + 2 * PLAIN),
}


@pytest.fixture(scope="module")
def prepared() -> dict[str, Prepared]:
    teachers = Teachers(SMALL, CPU)
    return {name: prepare(name, SMALL, teachers, CPU) for name in METHODS}


@pytest.fixture(scope="module")
def training_flops(prepared: dict[str, Prepared]) -> dict[str, int]:
    names = ("scratch", "distillation", "l2_sp", "tmu", "tmu_scratch")
    return {name: count_operations(prepared[name].runs["train"]) for name in names}


def test_every_method_has_a_line() -> None:
    assert set(get_args(Method)) <= METHODS.keys() == TRAINED_AT_TEST_IN_TRAINING.keys()


@pytest.mark.parametrize("name", METHODS)
def test_the_papers_size_has_the_papers_parameters(name: str) -> None:
    with META:
        size = SIZES["paper"]
        counts = prepare(name, size, Teachers(size, META), META).parameters
    assert (counts["trained"], counts["test"], counts["train"]) == TRAINED_AT_TEST_IN_TRAINING[name]
    if (stated := METHODS[name].stated) is not None:
        # The paper counts Knowledge Flow's transforms at test.
        test = counts["trained" if name.startswith("knowledge_flow") else "test"]
        printed = [float(count[:-1]) for count in stated.parameters.split(" / ")]
        # 4.15M and 10.19M are printed as 4.1M and 10.1M.
        assert [test / 1e6, counts["train"] / 1e6] == pytest.approx(printed, abs=0.1)


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("scratch", set()),
        ("tmu_scratch", set()),
        ("finetune", set()),
        ("l2_sp", {"l2_sp_start"}),
        ("knowledge_flow", {"independence"}),
        ("knowledge_flow-table1", {"independence"}),
        ("art", set()),
        ("art-table1", set()),
        ("distillation", {"features"}),
        ("tmu", {"distillation"}),
    ],
)
def test_what_is_timed_is_a_whole_step_and_a_whole_forecast(
    prepared: dict[str, Prepared], name: str, terms: set[str]
) -> None:
    found: Any = prepared[name].runs["train"]()
    assert found.keys() == {f"loss/{term}" for term in terms | {"prediction", "total"}}
    forecast: Any = prepared[name].runs["test"]()
    assert forecast.shape == (1, SMALL.window.num_target_frames, 1, 32, 32)


def test_finetuning_starts_from_the_teacher_and_l2_sp_is_held_there() -> None:
    teachers = Teachers(SMALL, CPU)
    runs = {
        name: prepare(name, SMALL, teachers, CPU).runs for name in ("scratch", "finetune", "l2_sp")
    }
    forecasts: Any = {name: each["test"]() for name, each in runs.items()}
    assert torch.equal(forecasts["l2_sp"], forecasts["finetune"])
    assert not torch.equal(forecasts["scratch"], forecasts["finetune"])
    held: Any = runs["l2_sp"]["train"]()
    assert held["loss/l2_sp_start"] == 0 < runs["l2_sp"]["train"]()["loss/l2_sp_start"]  # type: ignore[index]


def test_a_step_counts_the_teachers_and_what_is_trained(
    prepared: dict[str, Prepared], training_flops: dict[str, int]
) -> None:
    forecast = count_operations(prepared["scratch"].runs["test"])
    teachers = 2 * BATCH_SIZE * forecast
    steps, pixels, channels, layers = SMALL.window.num_frames - 1, 8 * 8, 32, 2
    regressors = 2 * layers * 2 * channels**2 * pixels * steps * BATCH_SIZE
    extra = teachers + 3 * regressors  # forward, and the gradients of weights and of states
    assert training_flops["distillation"] == training_flops["scratch"] + extra
    assert training_flops["l2_sp"] == training_flops["scratch"]
    assert training_flops["tmu"] == training_flops["tmu_scratch"] + teachers


def test_art_alone_runs_its_teachers_at_test(prepared: dict[str, Prepared]) -> None:
    counts = {name: count_operations(each.runs["test"]) for name, each in prepared.items()}
    plain = counts["scratch"]
    same = {"scratch", "finetune", "l2_sp", "knowledge_flow", "knowledge_flow-table1"}
    assert {name for name, count in counts.items() if count == plain} == same | {"distillation"}
    assert {name for name, count in counts.items() if count > 3 * plain} == {"art", "art-table1"}


def measured(*seconds: float, flops: int = 2_000_000_000) -> dict[str, Any]:
    return {"seconds": list(seconds), "flops": flops}


def record(size: str) -> dict[str, Any]:
    counts = {"trained": 2000, "test": 1000, "train": 3000}
    return {
        "size": size,
        "repeats": 3,
        "machine": {"processor": "CPU", "threads": 1},
        "versions": {"torch": "2"},
        "methods": {
            "scratch": {
                "parameters": counts,
                "train": measured(1.0, 2.0, 4.0),
                "test": measured(0.1, 0.1, 0.2),
            },
            "tmu": {
                "parameters": counts,
                "train": measured(1.5, 4.0, 4.0, flops=3_000_000_000),
                "test": measured(0.1, 0.2, 0.2),
            },
        },
    }


def columns(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [column.strip() for column in line.split("|")[2:-1]]


def test_a_line_has_medians_and_ranges_of_times_and_of_their_ratios() -> None:
    """Ratios are taken within a repeat: 1.5, 2, 1 and 1, 2, 1."""
    costs = ["3.00", "1.50", "4.000 (1.500 - 4.000)", "1.50 (1.00 - 2.00)"]
    costs += ["2.00", "1.00", "200.0 (100.0 - 200.0)", "1.00 (1.00 - 2.00)"]
    assert columns(table(record("small")), "tmu") == ["2,000", "1,000 / 3,000", *costs]
    costs[3] += " [1.23]"
    costs[7] += " [1.09]"
    shown = columns(table(record("paper")), "tmu")
    assert shown == ["2,000", "1,000 / 3,000 [3.6M / 9.5M]", *costs]
    assert "Table 1" in table(record("paper")) and "Table 1" not in table(record("small"))


def test_stores_and_cluster_are_not_needed() -> None:
    absent = ("ray", "webdataset", "zarr")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "sys.argv = ['methods', '--help']; import runpy; "
        "runpy.run_module('benchmarks.methods', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "--size" in done.stdout, done.stderr
