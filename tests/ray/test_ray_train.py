"""Ray Train around the loop: the same numbers as without it, and lost workers are replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.test_kill import command
from tests.unit.test_training import assert_same, final_state
from tmu_dist.config import ConfigError, LaunchConfig, RunConfig
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.card import TeacherError
from tmu_dist.training.launch import launch

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def on_ray(config: RunConfig, num_workers: int, name: str, **launch: int) -> RunConfig:
    return replace(
        config,
        output=f"{config.output}-{name}",
        launch=LaunchConfig(launcher="ray", num_workers=num_workers, **launch),  # type: ignore[arg-type]
    )


def test_one_ray_worker_equals_a_plain_process_bit_for_bit(tmu_config: RunConfig) -> None:
    local = launch(tmu_config)
    ray = launch(on_ray(tmu_config, 1, "ray"))
    assert_same(final_state(ray.run), final_state(local.run))
    assert (ray.best_step, ray.best_mse_per_frame) == (local.best_step, local.best_mse_per_frame)


def kill_a_worker_at_step(run: Path, step: int) -> None:
    while not any(event["step"] >= step for event in read_log(run)):
        time.sleep(0.02)
    os.kill(max(_train_workers()), signal.SIGKILL)


def _train_workers() -> list[int]:
    """Process ids of Ray Train workers, by the title that Ray gives them."""
    found = []
    for title in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone since
            if b"RayTrainWorker" in title.read_bytes():
                found.append(int(title.parent.name))
    return found


def test_killed_worker_is_replaced_and_nothing_changes(
    tmu_config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    longer = replace(tmu_config, training=replace(tmu_config.training, num_steps=60))
    straight = launch(on_ray(longer, 2, "straight"))
    stopped = on_ray(longer, 2, "stopped")
    killer = threading.Thread(target=kill_a_worker_at_step, args=(Path(stopped.output), 11))
    killer.start()
    result = launch(stopped)
    killer.join()
    assert any(event["event"] == "resume" for event in read_log(Path(result.run)))
    assert "continues at step" in capfd.readouterr().err
    assert_same(final_state(result.run), final_state(straight.run))


def test_errors_that_would_only_repeat_are_raised_at_once(tmu_config: RunConfig) -> None:
    unfit = replace(tmu_config, model=replace(tmu_config.model, hidden_channels=6))
    with pytest.raises(TeacherError, match="hidden channels: teacher 4, student 6"):
        launch(on_ray(unfit, 1, "unfit"))
    with pytest.raises(ConfigError, match="Ray cluster has 2"):
        launch(on_ray(tmu_config, 3, "too-many"))
    odd = replace(tmu_config, training=replace(tmu_config.training, batch_size=3))
    with pytest.raises(ConfigError, match="cannot be split over 2 workers"):
        launch(on_ray(odd, 2, "odd"))


@pytest.mark.parametrize(
    ("cpus", "places", "num_workers", "expected"),
    [
        ([2], [2], 2, 1),
        ([16], [16], 2, 8),
        ([4, 4, 4], [4, 4, 4], 2, 4),
        ([4, 4, 4], [4, 4, 4], 4, 2),
        ([8, 2], [8, 2], 3, 2),
        ([16, 16], [4, 4], 8, 4),  # GPU nodes
        ([2], [4], 4, 1),
    ],
)
def test_cpus_of_a_worker_fit_on_the_nodes(
    cpus: list[int], places: list[int], num_workers: int, expected: int
) -> None:
    from tmu_dist.training.ray_worker import cpus_per_worker

    assert cpus_per_worker(cpus, places, num_workers) == expected


def test_cluster_that_does_not_answer_is_named(tiny_config: RunConfig, tmp_path: Path) -> None:
    process = subprocess.run(
        command(tiny_config, tmp_path, "--launcher", "ray"),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"},
        timeout=60,
    )
    assert process.returncode == 2
    assert "No Ray cluster answers at RAY_ADDRESS=127.0.0.1:9" in process.stderr
