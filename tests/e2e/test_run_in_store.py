"""A whole run in an S3 bucket: killed, continued, evaluated, kept in a zoo and taught with."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.test_kill import command, finish, start
from tests.e2e.test_recipes import MINIATURE
from tests.unit.test_training import assert_same
from tmu_dist import evaluate, recipes, zoo
from tmu_dist.config import RunConfig
from tmu_dist.data.storage import exists, list_paths, read_text
from tmu_dist.demo import EXPERIMENTS, run_demo
from tmu_dist.folders import list_folders
from tmu_dist.recipes import digits
from tmu_dist.recipes.base import by_whole_name
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.store import load_card, load_weights
from tmu_dist.training.launch import launch


def newest_step(run: str) -> int:
    found = list_folders(run, "checkpoints", "training.json")
    return int(found[-1].rpartition("-")[2]) if found else 0


def test_sigkill_and_the_same_command_again(
    tmu_config: RunConfig, archive_url: str, tmp_path: Path, bucket: str
) -> None:
    training = replace(tmu_config.training, num_steps=40)
    straight = replace(tmu_config, training=training, output=str(tmp_path / "straight"))
    launch(straight)

    config = replace(straight, output=f"{bucket}/runs/stored")
    process = start(command(config, tmp_path))
    while newest_step(config.output) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not exists(config.output, "result.json"), "killed too late to prove anything"
    shown = finish(start(command(config, tmp_path)))
    assert "continues at step" in shown
    checkpoint = "checkpoints/step-00000040"
    for model in ("", checkpoint):
        stored, local = (load_weights(f"{run.output}/{model}") for run in (config, straight))
        assert_same(stored[1], local[1])
    losses = [
        [(e["step"], e["loss/total"]) for e in read_log(run.output) if e["event"] == "train"]
        for run in (config, straight)
    ]
    assert losses[0] == losses[1]

    evaluate.main([config.output, "--data", archive_url])
    zoo.main(["--zoo", f"{bucket}/zoo", "add", config.output, "--name", "kept"])
    kept = [f"zoo/kept/{file}" for file in ("card.json", "weights.safetensors")]
    assert list_paths(bucket, "zoo") == kept
    student = replace(
        config,
        output=f"{bucket}/runs/student",
        transfer=replace(config.transfer, teachers=(config.output, f"{bucket}/zoo/kept")),
        training=replace(training, num_steps=2),
    )
    launch(student)
    assert load_card(student.output).teachers == ("stored", "kept")


def test_a_whole_experiment_in_a_bucket(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Archives, teachers, students, scores and the page: recipes need no disk of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMU_DIST_HOME", f"{bucket}/home/")
    monkeypatch.setattr(digits, "SMALL", MINIATURE)
    monkeypatch.setattr(recipes, "RECIPES", by_whole_name(digits.experiments()))
    monkeypatch.setattr("tmu_dist.training.run_lock._SETTLE_SECONDS", 0.01)
    page = run_demo("digits", "local")
    assert page == f"{bucket}/home/runs/demo/report.html"
    content = read_text(f"{bucket}/home", "runs/demo/report.html")
    assert all(label in content for label in EXPERIMENTS["digits"].students)
    card = load_card(f"{bucket}/home/runs/digits-tmu")
    assert card.teachers == ("digits-teacher-1", "digits-teacher-2")
    assert not list(tmp_path.iterdir())
