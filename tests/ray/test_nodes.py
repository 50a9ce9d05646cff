"""A run whose nodes come and go: it shrinks, grows and goes on, and no notice is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_kill import command
from tests.ray.conftest import on_ray, until
from tmu_dist.config import FaultConfig, RunConfig
from tmu_dist.run_folder import Event, read_log

pytestmark = [pytest.mark.ray]


@pytest.fixture
def cluster(ray_settings: None) -> Iterator[Any]:
    """A head with one CPU; nodes are processes of this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


def world_sizes(run: str) -> list[int]:
    return [event["world_size"] for event in read_log(run) if event["event"] == "resume"]


def last(run: str, kind: str) -> Event:
    return [event for event in read_log(run) if event["event"] == kind][-1]


def drain(cluster: Any, node: Any, seconds: int) -> None:
    """Tell Ray that a node will be taken away, as clouds do."""
    where = ["--address", cluster.address, "--node-id", node.node_id]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    when = ["--deadline-remaining-seconds", str(seconds)]
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    subprocess.run([*ray, "drain-node", *where, *why, *when], check=True, capture_output=True)


def test_a_run_outlives_its_nodes(tmu_config: RunConfig, tmp_path: Path, cluster: Any) -> None:
    """A node is taken away after a notice, and another one comes; no failure is counted."""
    node = cluster.add_node(num_cpus=1)
    faults = FaultConfig(start_timeout_seconds=4.0)
    config = on_ray(tmu_config, "1..2", "elastic", faults=faults, max_failures=0)
    config = replace(
        config,
        scale=replace(config.scale, resize_seconds=2.0),
        training=replace(config.training, num_steps=1_000_000),
        schedule=replace(config.schedule, checkpoint_every=1_000_000, validate_every=1_000_000),
    )
    checkpoints = Path(config.output, "checkpoints")
    shown = tmp_path / "shown.txt"
    with shown.open("w") as file:
        driver = subprocess.Popen(
            command(config, tmp_path),
            stderr=file,
            stdout=file,
            env={**os.environ, "RAY_ADDRESS": cluster.address},
        )
    try:
        until(lambda: any(event["step"] >= 3 for event in read_log(config.output)))
        assert not list(checkpoints.glob("step-*"))
        drain(cluster, node, 10)
        until(lambda: list(checkpoints.glob("step-*")), 30)  # at once, not when it is gone
        (saved,) = checkpoints.glob("step-*")
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: world_sizes(config.output) == [1])
        assert last(config.output, "resume")["step"] == int(saved.name.removeprefix("step-"))

        cluster.add_node(num_cpus=1)
        until(lambda: world_sizes(config.output)[-1] == 2)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 143
    finally:
        driver.kill()
    assert last(config.output, "stop")["step"] > 0
    told = shown.read_text()
    assert " lost, 1 left\n" in told and " joined, 2 now\n" in told
    assert "(its node was taken away): started again, continues at step" in told
    assert "Traceback" not in told and "raylet" not in told, told
