"""The studies of networks: what the cost table of backbones counts, and what both tables say, also
of what was not measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
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
from benchmarks.many_teachers import Student, student_config, teacher_configs, teacher_folders
from benchmarks.many_teachers import table as teachers_table


def measured(*seconds: float, **facts: object) -> dict[str, Any]:
    return {"seconds": list(seconds), "flops": 2_000_000_000, **facts}


def network(*seconds: float) -> dict[str, Any]:
    return {
        "parameters": {"test": 1000, "train": 3000},
        "train": measured(*seconds, peak_bytes=2**30),
        "test": measured(*seconds),
    }


def record(size: str = "paper") -> dict[str, Any]:
    """Two rounds of the ConvLSTM."""
    return {
        "size": size,
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
    run["networks"]["vpn"] = {"tmu": network(9.0)}
    run["networks"]["vpn"]["tmu"]["train"] = {"seconds": [], "stopped": "more than 9 s"}
    run["networks"]["vpn"]["tmu"]["test"]["stopped"] = "more than 9 s"
    text = table(run)
    assert "| mim | not measured: there is no tmu_dist.models.cells.mim |" in text
    training, forecast = columns(text, "vpn, tmu")[3:6], columns(text, "vpn, tmu")[6]
    assert training == ["not measured", "not measured: more than 9 s", ""]
    assert forecast == "9,000.0 (9,000.0 - 9,000.0, 1 round(s))"


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
    assert facts == {"flops": 2 * steps * pixels * (gates + hidden * patch)}


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
    assert 0 < seconds < 60 and good.cell["flops"] > 0
    if not torch.cuda.is_available():
        assert bad.cell["seconds"] == [] and bad.cell["stopped"]


def student(combine: str, seed: int, *errors: float, stopped: str | None = None) -> dict[str, Any]:
    """A run with two teachers in the record of many teachers."""
    return {
        **Student(2, combine, None, seed)._asdict(),
        "memory_rms": [[1.0, 2.0 + seed], [3.0, 9.0], [1.5, 1.0]][: len(errors)],
        "gradient_norms": {"prediction": [0.1, 7.0], "distillation": [0.5, 0.2]},
        "validation_mse_per_frame": list(errors),
        "stopped": stopped,
    }


def test_paper_and_mean_are_compared_by_seed() -> None:
    runs = [student("paper", seed, 50.0, 40.0, 41.0 + seed) for seed in (0, 1)]
    runs += [student("mean", seed, 50.0, 40.0, 40.0) for seed in (0, 1)]
    text = teachers_table({"runs": runs})
    rms = "1 / 2.5 | 3 / 9 | 1.5 / 1 | 7"
    assert f"| 2 | paper | off | {rms} | 41.50 ± 0.71 | 40.00 ± 0.00 | 0 of 2 |" in text
    assert "| 2 | off | +1.50 ± 0.71 | +1.00, +2.00 |" in text
    assert "No run was given up." in text


def test_a_run_that_was_given_up_says_why_and_has_no_score() -> None:
    runs = [student("paper", 0, stopped="NonFiniteLossError: NaN at step 20")]
    runs += [student("paper", 1, 50.0, 40.0, 43.0), student("mean", 0, 50.0, 40.0, 40.0)]
    text = teachers_table({"runs": runs})
    assert "| 43.00 | 40.00 | 1 of 2 |" in text
    assert "- 2 teachers, paper, clip None, seed 0: NonFiniteLossError: NaN at step 20" in text
    assert "| 2 | off |  |  |" in text  # no seed has both


def test_the_first_teachers_are_the_longest_trained_and_all_differ(tmp_path: Path) -> None:
    folders = teacher_folders(tmp_path, 70)
    assert len(set(folders)) == len(folders) == 42
    assert all(folder.endswith("checkpoints/step-00000070") for folder in folders[:6])
    kept = {
        f"{config.output}/checkpoints/step-{step:08d}"
        for config in teacher_configs(tmp_path, 70)
        for step in range(config.schedule.checkpoint_every, 71, config.schedule.checkpoint_every)
    }
    assert kept == set(folders)
    config = student_config(tmp_path, Student(41, "mean", 1.0, 2), folders, 100)
    assert (len(config.transfer.teachers), config.transfer.tmu.combine) == (41, "mean")
    assert (config.training.grad_clip_norm, config.training.seed) == (1.0, 2)
