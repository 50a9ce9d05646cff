"""A run's numbers are among the metrics that its node offers to Prometheus, as its log has them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.ray.conftest import on_ray, until
from tests.unit.test_bundle import bundles
from tmu_dist.config import RunConfig, to_json
from tmu_dist.run_folder import newest_logs, read_log

pytestmark = pytest.mark.ray

_ROOT = Path(__file__).parents[2]
_DASHBOARD = _ROOT / "cluster" / "grafana.json"

_TRAIN = """
import sys, time, urllib.request
import tmu_dist.training.ray_cluster
import ray
from tmu_dist import bundle
from tmu_dist.config import from_dict
from tmu_dist.training import ray_worker
from tmu_dist.training.launch import launch
import yaml

file, port = sys.argv[1:]
ray.init(
    address="local",
    num_cpus=1,
    include_dashboard=False,
    _metrics_export_port=int(port),
    _system_config={"metrics_report_interval_ms": 1000},
)


class Patient(ray_worker.RunMetrics):
    def close(self):  # called when the last event was told
        time.sleep(8)
        url = f"http://127.0.0.1:{port}/metrics"
        sys.stdout.write(urllib.request.urlopen(url).read().decode())
        super().close()


ray_worker.RunMetrics = Patient
run = launch(from_dict(yaml.safe_load(open(file)))).run
bundle.main([run])
"""


def free_port() -> int:
    with socket.socket() as asking:
        asking.bind(("127.0.0.1", 0))
        return int(asking.getsockname()[1])


def ours(offered: str) -> dict[tuple[str, str, str], float]:
    """By name, run, and the value of a further tag ("" without)."""
    found = {}
    for name, tags, value in re.findall(r"^(ray_tmu_dist_\w+)\{(.*)\} (\S+)$", offered, re.M):
        of = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        found[name, of["run"], of.get("term", of.get("layer", ""))] = float(value)
    return found


def test_a_node_offers_the_numbers_of_the_log(tmu_config: RunConfig, tmp_path: Path) -> None:
    short = replace(tmu_config, training=replace(tmu_config.training, num_steps=3))
    config = on_ray(short, 1, "metrics")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(json.loads(to_json(config))))
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN, str(file), str(free_port())],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    offered = ours(done.stdout)
    run = Path(config.output).name
    events = {event["event"]: event for event in read_log(config.output)}
    expected = {
        ("ray_tmu_dist_step", run, ""): 3,
        ("ray_tmu_dist_num_steps", run, ""): 3,
        ("ray_tmu_dist_world_size", run, ""): 1,
        ("ray_tmu_dist_restarts", run, ""): 0,
    }
    for field in ("samples_per_second", "data_wait_fraction"):
        expected[f"ray_tmu_dist_{field}", run, ""] = events["train"][field]
    for name, value in events["train"].items():
        if name.startswith("loss/"):
            expected["ray_tmu_dist_loss", run, name[5:]] = value
    validation = events["validation"]
    expected["ray_tmu_dist_validation_mse_per_frame", run, ""] = validation["mse_per_frame"]
    persistence = validation["persistence_mse_per_frame"]
    expected["ray_tmu_dist_persistence_mse_per_frame", run, ""] = persistence
    for layer, means in enumerate(events["liveness"]["gate_means"]):
        expected["ray_tmu_dist_gate_mean", run, str(layer)] = sum(means) / len(means)
    assert sorted(offered) == sorted(expected)
    assert offered == pytest.approx(expected, rel=1e-6)

    drawn = set(re.findall(r"ray_tmu_dist_\w+", _DASHBOARD.read_text()))
    assert drawn == {name for name, _, _ in offered}, "panels show what runs export, all of it"

    ((path, parts),) = bundles(config.output).items()
    assert done.stdout.endswith(f"{config.output}/{path}\n")
    (node,) = json.loads(parts["ray.json"])["nodes"]
    assert node["Alive"] and node["Resources"]["CPU"] == 1

    (path,) = newest_logs(config.output)
    first = Path(config.output, path).read_text().splitlines()[0]
    assert re.search(r"rank 0 of 1 on .*Ray's own log of it is /\S+/worker-\S+\.err there$", first)


def test_restarts_and_ranks_are_those_of_the_run_s_starts(
    ray_settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tmu_dist.training import ray_metrics

    exported: dict[str, float] = {}

    class Kept:
        def __init__(self, name: str, **_: object) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            exported[self.name] = value
            assert tags["run"] == tmp_path.name

    def start(*world_sizes: int) -> None:
        starts = [{"world_size": size} for size in world_sizes]
        (tmp_path / "run.json").write_text(json.dumps({"starts": starts}))

    monkeypatch.setattr(ray_metrics, "Gauge", Kept)
    monkeypatch.setattr(ray_metrics, "_AGAIN_SECONDS", 0.05)
    metrics = ray_metrics.RunMetrics(str(tmp_path), 9)
    metrics({"event": "placement", "step": 0})
    assert "tmu_dist_restarts" not in exported, "run.json is not there yet"
    start(4, 4)
    metrics({"event": "resume", "step": 2})
    assert (exported["tmu_dist_restarts"], exported["tmu_dist_world_size"]) == (1, 4)
    metrics({"event": "checkpoint_failed", "step": 5})
    start(4, 4, 2)  # lost, with no checkpoint to continue from
    metrics({"event": "placement", "step": 0})
    assert (exported["tmu_dist_restarts"], exported["tmu_dist_world_size"]) == (2, 2)

    exported.clear()  # as Ray does with what is not set again
    until(lambda: len(exported) == 3)
    assert exported == {
        "tmu_dist_num_steps": 9,
        "tmu_dist_restarts": 2,
        "tmu_dist_world_size": 2,
    }
    metrics.close()


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    board = json.loads(_DASHBOARD.read_text())
    assert board["uid"] == "tmu-dist" and board["schemaVersion"] >= 36
    numbers = [panel["id"] for panel in board["panels"]]
    assert numbers == list(range(1, len(numbers) + 1))
    for panel in board["panels"]:
        assert {"type", "title", "gridPos", "datasource", "targets"} <= panel.keys()
        assert all('{run=~"$run"}' in target["expr"] for target in panel["targets"])
