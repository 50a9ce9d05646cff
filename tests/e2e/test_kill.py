"""A real process, killed with SIGKILL at any moment and started again, ends bit-equal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.unit.test_training import assert_same, final_state
from tmu_dist.config import RunConfig, to_json


def command(config: RunConfig, folder: Path, *extra: str) -> list[str]:
    file = folder / f"{Path(config.output).name}.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(to_json(config))))
    words = ["-m", "tmu_dist.train", "--recipe", "digits-scratch", "--config", str(file), *extra]
    return [sys.executable, *words]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    return shown


@pytest.mark.parametrize("moments", [(0.05, 0.4), (0.2,)])
def test_sigkill_and_the_same_command_again(
    tmu_config: RunConfig, tmp_path: Path, moments: tuple[float, ...]
) -> None:
    config = replace(tmu_config, training=replace(tmu_config.training, num_steps=40))
    straight = replace(config, output=str(tmp_path / "straight"))
    finish(start(command(straight, tmp_path)))

    log = Path(config.output, "log.jsonl")
    for seconds in moments:
        process = start(command(config, tmp_path))
        known = log.stat().st_size if log.exists() else 0
        checkpoints = Path(config.output, "checkpoints")
        while (
            not log.exists() or log.stat().st_size <= known or not any(checkpoints.glob("step-*"))
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not Path(config.output, "result.json").exists(), "killed too late to prove anything"
    shown = finish(start(command(config, tmp_path)))
    assert "continues at step" in shown
    assert_same(final_state(config.output), final_state(straight.output))


def test_sigterm_ends_with_a_checkpoint_and_the_same_command_continues(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    schedule = replace(tiny_config.schedule, checkpoint_every=100_000)
    training = replace(tiny_config.training, num_steps=100_000)
    config = replace(tiny_config, training=training, schedule=schedule)
    process = start(command(config, tmp_path))
    log = Path(config.output, "log.jsonl")
    while not log.exists() or '"train"' not in log.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, shown
    assert "the same command continues" in shown and "Traceback" not in shown
    (checkpoint,) = Path(config.output, "checkpoints").iterdir()
    done = int(checkpoint.name.rpartition("-")[2])
    shown = finish(start(command(config, tmp_path, "--training.num-steps", str(done + 1))))
    assert f"continues at step {done}" in shown


def test_torchrun_gives_the_losses_of_one_process(tiny_config: RunConfig, tmp_path: Path) -> None:
    outputs = {}
    for launcher in ("local", "torchrun"):
        config = replace(tiny_config, output=str(tmp_path / launcher))
        arguments = command(config, tmp_path, "--launcher", launcher)
        if launcher == "torchrun":
            run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            arguments = [arguments[0], *run, *arguments[1:]]
        finish(start(arguments))
        outputs[launcher] = final_state(config.output)["weights"]
    for name, value in outputs["local"].items():
        difference = (outputs["torchrun"][name] - value).abs().max()
        assert difference < 1e-4, name


def test_errors_end_with_one_line_and_code_2(tiny_config: RunConfig, tmp_path: Path) -> None:
    for extra, named in (
        (["--data.url", "nowhere"], "nowhere"),
        (["--transfer.method", "tmu", "--transfer.teachers", "ghost"], "ghost"),
        (["--launcher", "torchrun"], "torchrun --nproc-per-node"),
        (["--launch.device", "cuda"], "no CUDA device"),
    ):
        process = start(command(tiny_config, tmp_path, *extra))
        _, shown = process.communicate(timeout=120)
        assert process.returncode == 2
        assert named in shown and "Traceback" not in shown
