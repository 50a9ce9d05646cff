"""The doctor finds, on machines of their own, what is wrong with one of them and names it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts.machines import RAY, Cluster
from tmu_dist.config import LaunchConfig, RunConfig, ScaleConfig
from tmu_dist.config.run import to_json

pytestmark = pytest.mark.hosts

_SECONDS = 300.0
_LATE_SECONDS = 120.0
_SHIFT = f"import time\n_time = time.time\ntime.time = lambda: _time() - {_LATE_SECONDS}\n"
"""What every Python process of a machine runs first whose clock is to be late."""


def looked_at(cluster: Cluster, config: RunConfig, folder: Path) -> tuple[int, list[Any]]:
    """Exit code and findings of the doctor, asked on the head."""
    settings, record = folder / "run.yaml", folder / "doctor.json"
    settings.write_text(yaml.safe_dump(json.loads(to_json(config))))
    words = [sys.executable, "-m", "tmu_dist.doctor", "--json", str(record)]
    words += ["--recipe", "digits-scratch", "--config", str(settings)]
    doctor = cluster.head.begin(words, folder / "doctor.txt", RAY_ADDRESS=cluster.address)
    code = doctor.wait(_SECONDS)
    assert record.exists(), doctor.said
    return code, json.loads(record.read_text())["findings"]


def faults(findings: list[Any]) -> dict[tuple[str, str], str]:
    """What is said of each, by check and place."""
    assert all(each["advice"] for each in findings if each["status"] == "fault")
    return {
        (each["check"], each["where"]): each["found"]
        for each in findings
        if each["status"] == "fault"
    }


def test_each_machine_is_told_what_is_wrong_with_it(
    cluster: Cluster, tmu_config: RunConfig, tmp_path: Path
) -> None:
    head, (skewed, late) = cluster.head, cluster.nodes
    private = "/tmp/ray/archive"  # every machine has a folder /tmp/ray of its own
    shutil.copytree(tmu_config.data.url, head.folder / "ray/archive")
    config = replace(
        tmu_config,
        data=replace(tmu_config.data, url=private),
        launch=LaunchConfig(launcher="ray"),
        scale=ScaleConfig(num_workers=2),
    )
    other = tmp_path / "other"
    (other / "torch-0.0.1.dist-info").mkdir(parents=True)
    (other / "torch-0.0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n"
    )
    (tmp_path / "late").mkdir()
    (tmp_path / "late/sitecustomize.py").write_text(_SHIFT)
    project = str(Path(__file__).parents[2])
    for node in cluster.nodes:
        node.run([RAY, "stop", "--force"])
    cluster.join(skewed, "--num-gpus=1", PYTHONPATH=f"{other}:{project}")
    cluster.join(late, PYTHONPATH=f"{tmp_path / 'late'}:{project}")
    code, findings = looked_at(cluster, config, tmp_path)
    found = faults(findings)
    assert code == 1
    assert f"torch 0.0.1, not {version('torch')}" in found["versions", skewed.address]
    assert "GPU" in found["gpus", skewed.address]
    assert f"{_LATE_SECONDS:.0f}" in found["clock", late.address]
    assert private in found["storage", f"{skewed.address}, {late.address}"]
    assert "asks for no token" in found["token", ""]
    assert len(found) == 5, found


def test_a_rank_that_others_do_not_reach_is_named(
    cluster: Cluster, tmu_config: RunConfig, tmp_path: Path
) -> None:
    lonely = cluster.nodes[1]
    lonely.run([RAY, "stop", "--force"])
    cluster.join(lonely, GLOO_SOCKET_IFNAME="eth77")
    config = replace(
        tmu_config, launch=LaunchConfig(launcher="ray"), scale=ScaleConfig(num_workers=2)
    )
    code, findings = looked_at(cluster, config, tmp_path)
    found = {check: said for (check, _), said in faults(findings).items()}
    assert code == 1
    assert found.keys() == {"token", "exchange"}
    assert lonely.address in found["exchange"], found
    assert not Path(config.output).exists()
