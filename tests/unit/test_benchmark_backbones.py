"""The cost table of backbones: what it counts, and what it says of what was not measured."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.backbones.__main__ import Worker
from benchmarks.backbones.costs import (
    BATCH_SIZE,
    SIZES,
    Case,
    count_operations,
    parameters,
    prepare_forecast,
    prepare_training,
)
from benchmarks.backbones.report import table


def measured(*seconds: float, **facts: object) -> dict[str, Any]:
    return {"seconds": list(seconds), "flops": 2_000_000_000, **facts}


def network(*seconds: float, frames: int = 10) -> dict[str, Any]:
    return {
        "parameters": {"test": 1000, "train": 3000},
        "train": measured(*seconds, peak_bytes=2**30),
        "test": measured(*seconds, frames=frames),
    }


def record(size: str = "paper") -> dict[str, Any]:
    """Two rounds of the ConvLSTM."""
    return {
        "size": size,
        "target_frames": 10,
        "rounds": 2,
        "machine": {"processor": "GPU", "threads": 1},
        "versions": {"torch": "2"},
        "networks": {"convlstm": {"plain": network(1.0, 2.0), "tmu": network(1.5, 4.0)}},
        "absent": {},
    }


def columns(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [column.strip() for column in line.split("|")[2:-1]]


def test_a_line_has_every_cost_with_spread_and_the_ratio_of_the_rounds() -> None:
    shown = columns(table(record()), "convlstm, tmu")
    train, test = "2.750 (1.500 - 4.000)", "2,750.0 (1,500.0 - 4,000.0)"
    # The ratios of the rounds are 1.5 and 2.
    assert shown == ["1,000 / 3,000", "2.0", "2", "1,024", train, "1.75", test, "1.75"]


def test_the_paper_stands_beside_its_own_size_only() -> None:
    shown = columns(table(record()), "tmu, Table 1 of the paper, TITAN RTX")
    assert shown == ["3.6M / 9.5M", "0.43", "1.23", "17.7", "1.09"]
    assert "Table 1" not in table(record("small"))


def test_what_was_not_measured_says_why() -> None:
    run = record()
    run["absent"] = {"mim": "there is no tmu_dist.models.cells.mim"}
    run["networks"]["vpn"] = {"plain": network(8.0, 8.0, frames=1), "tmu": network(9.0)}
    run["networks"]["vpn"]["tmu"]["train"] = {"seconds": [], "stopped": "more than 9 s"}
    run["networks"]["vpn"]["tmu"]["test"]["stopped"] = "more than 9 s"
    text = table(run)
    assert "| mim | not measured: there is no tmu_dist.models.cells.mim |" in text
    forecast, ratio = columns(text, "vpn, plain")[-2:]
    assert (forecast, ratio) == ("8,000.0 (8,000.0 - 8,000.0), 1 of 10 frames", "")
    tmu = columns(text, "vpn, tmu")
    assert tmu[2:6] == ["not measured", "not measured", "not measured: more than 9 s", ""]
    assert tmu[6] == "9,000.0 (9,000.0 - 9,000.0, 1 round(s))"


@pytest.mark.parametrize("backbone", SIZES["paper"].models)
def test_training_keeps_the_teachers_beside_the_student(backbone: str) -> None:
    plain, tmu = (parameters(SIZES["small"], backbone, variant) for variant in ("plain", "tmu"))
    assert plain["train"] == plain["test"] < tmu["test"]
    assert tmu["train"] == tmu["test"] + 2 * plain["test"]


def test_the_papers_parameters_come_out() -> None:
    counts = parameters(SIZES["paper"], "convlstm", "tmu")
    assert counts == {"test": 3_589_376, "train": 9_534_208}


def test_operations_of_a_forecast_are_those_of_its_convolutions() -> None:
    _, facts = prepare_forecast(Case("small", "convlstm", "plain", "test", "cpu"))
    pixels, hidden, patch, steps = 8 * 8, 32, 16, 9
    gates = 25 * 4 * hidden * ((patch + hidden) + (hidden + hidden))
    assert facts == {"frames": 5, "flops": 2 * steps * pixels * (gates + hidden * patch)}


def test_attention_is_counted() -> None:
    query, past = torch.rand(2, 1, 30, 16), torch.rand(2, 1, 50, 16)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, query, past, past)
    assert count_operations(attend) == 2 * (2 * 30 * 50 * 16) * 2


def test_a_training_step_counts_teachers_and_both_directions() -> None:
    _, forecast = prepare_forecast(Case("small", "convlstm", "plain", "test", "cpu"))
    _, plain = prepare_training(Case("small", "convlstm", "plain", "train", "cpu"))
    step, tmu = prepare_training(Case("small", "convlstm", "tmu", "train", "cpu"))
    forward = BATCH_SIZE * forecast["flops"]
    # No gradient is needed of the true frames, nor of the zeros before the first one.
    assert 2 * forward < plain["flops"] < 3 * forward
    assert tmu["flops"] > plain["flops"] + 2 * forward
    assert set(step()) == {"loss/prediction", "loss/distillation", "loss/total"}  # type: ignore[call-overload]


def test_a_process_that_takes_too_long_is_stopped() -> None:
    worker = Worker(Case("small", "convlstm", "plain", "test", "cpu"), cap=0.01)
    worker.start()
    worker.time(0.01)
    assert worker.cell == {"seconds": [], "stopped": "more than 0.01 s"}


def test_a_process_times_and_one_that_fails_says_why() -> None:
    good = Worker(Case("small", "convlstm", "plain", "test", "cpu"), cap=60)
    bad = Worker(Case("small", "convlstm", "plain", "train", "cuda"), cap=60)
    for worker in (good, bad):
        worker.start()
        worker.time(0.01)
        worker.close()
    (seconds,) = good.cell["seconds"]
    assert 0 < seconds < 60 and good.cell["frames"] == 5
    if not torch.cuda.is_available():
        assert bad.cell["seconds"] == [] and bad.cell["stopped"]
