"""Ray Train around the loop: how many workers it takes, and what it refuses."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.test_kill import command
from tests.ray.conftest import on_ray
from tmu_dist.config import ConfigError, FaultConfig, LaunchConfig, RunConfig, ScaleConfig
from tmu_dist.data.manifest import MANIFEST_PATH
from tmu_dist.teachers.card import TeacherError
from tmu_dist.training.launch import launch

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_errors_that_would_only_repeat_are_raised_at_once(tmu_config: RunConfig) -> None:
    unfit = replace(tmu_config, model=replace(tmu_config.model, hidden_channels=6))
    with pytest.raises(TeacherError, match="hidden channels: teacher 4, student 6"):
        launch(on_ray(unfit, 1, "unfit"))
    with pytest.raises(ConfigError, match="Ray cluster has room for 2"):
        launch(on_ray(tmu_config, "3..8", "too-many"))


@pytest.mark.parametrize(
    ("cpus", "places", "fewest", "most", "expected"),
    [
        ([2], [2], 2, 2, 1),
        ([16], [16], 2, 2, 8),
        ([4, 4, 4], [4, 4, 4], 2, 2, 4),
        ([4, 4, 4], [4, 4, 4], 4, 4, 2),
        ([8, 2], [8, 2], 3, 3, 2),
        ([16, 16], [4, 4], 8, 8, 4),  # GPU nodes
        ([2], [4], 4, 4, 1),
        ([8, 8], [8, 8], 2, 4, 4),
        ([64, 8], [4, 4], 4, 4, 16),
        ([64, 8], [4, 4], 2, 4, 4),  # two still fit when the large node is lost
        ([64, 8], [4, 4], 2, 8, 2),
        ([8], [8], 2, 16, 1),  # room for 8 now
        ([4, 1], [4, 1], 2, 4, 1),  # the loss of the large node leaves no room in any case
    ],
)
def test_cpus_of_a_worker_fit_on_the_nodes(
    cpus: list[int], places: list[int], fewest: int, most: int, expected: int
) -> None:
    from tmu_dist.training.ray_places import cpus_per_worker

    assert cpus_per_worker(cpus, places, fewest, most) == expected


def test_a_range_of_workers_is_one_for_ray() -> None:
    from tmu_dist.training.ray_places import scaling

    on_cpus = LaunchConfig(launcher="ray", device="cpu")
    elastic = scaling(ScaleConfig(num_workers="1..8", resize_seconds=9.0), on_cpus)
    assert elastic.num_workers == (1, 8)
    assert elastic.elastic_resize_monitor_interval_s == 9.0
    assert scaling(ScaleConfig(num_workers="2..2"), on_cpus).num_workers == 2
    assert scaling(ScaleConfig(), on_cpus).num_workers == 2


def test_fault_settings_reach_ray_unless_the_user_has_set_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tmu_dist.training.ray_cluster import fault_settings

    start = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    health = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    monkeypatch.setenv(start, "7")
    monkeypatch.delenv(health, raising=False)
    faults = FaultConfig(start_timeout_seconds=11.0, collective_timeout_seconds=12.0)
    with fault_settings(faults):
        assert (os.environ[start], os.environ[health]) == ("7", "12.0")
    assert os.environ[start] == "7"
    assert health not in os.environ


def test_a_node_without_the_folders_of_the_command_is_named(
    tmu_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tmu_dist.folders import write_text
    from tmu_dist.training import ray_worker

    monkeypatch.setattr(ray_worker.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    run, archive = tmu_config.output, tmu_config.data.url
    folders = ray_worker.seen_folders(tmu_config)
    assert folders.keys() == {archive, *tmu_config.transfer.teachers}
    with pytest.raises(ConfigError, match=rf"Node 10\.0\.0\.7 does not see the run folder {run} "):
        ray_worker._check_folders(run, "token", folders)
    write_text(run, "ray/start.txt", "of another folder")
    with pytest.raises(ConfigError, match="does not see the run folder"):
        ray_worker._check_folders(run, "token", folders)
    write_text(run, "ray/start.txt", "token")
    ray_worker._check_folders(run, "token", folders)
    elsewhere = str(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"10\.0\.0\.7 does not see {elsewhere} as"):
        ray_worker._check_folders(run, "token", {**folders, elsewhere: MANIFEST_PATH})


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
