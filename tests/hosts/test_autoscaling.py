"""A cluster whose nodes come when somebody needs them: Ray's own autoscaler, in one namespace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_kill import command
from tests.hosts.machines import RAY, machines, why_not
from tmu_dist.config import LaunchConfig, RunConfig, ScaleConfig
from tmu_dist.data.storage import exists
from tmu_dist.run_folder import PROVENANCE_FILE, RESULT_FILE, read_json

pytestmark = pytest.mark.hosts

_SECONDS = 300.0
_HEAD_ID = "f" * 51 + "00000"
"""What Ray's autoscaler for tests calls the head's node."""
_MOST_NODES = 2


def autoscaling_head(folder: Path, address: str) -> tuple[list[str], dict[str, str]]:
    """`ray start` of a head that trains nothing, whose autoscaler starts nodes of one CPU each."""
    config = {
        "cluster_name": "grows",
        "max_workers": _MOST_NODES,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",  # the wheel lacks what its own name for it needs
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": 1, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": _MOST_NODES,
            },
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 10,
        "auth": {},
        "file_mounts": {},
        **{
            f"{who}{what}_commands": []
            for who in ("", "head_", "worker_")
            for what in ("setup", "start_ray")
            if who or what == "setup"
        },
        "initialization_commands": [],
        "cluster_synced_files": [],
    }
    (folder / "autoscaler.yaml").write_text(yaml.safe_dump(config))
    words = [RAY, "start", "--head", "--port=6379", "--num-cpus=0", "--disable-usage-stats"]
    words += ["--object-store-memory=100000000", "--include-dashboard=false"]
    words += [f"--node-ip-address={address}"]
    return [*words, f"--autoscaling-config={folder / 'autoscaler.yaml'}"], {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
    }


def test_a_run_waits_for_the_nodes_that_it_needs(tmu_config: RunConfig, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    patient = replace(
        tmu_config,
        launch=LaunchConfig(launcher="ray"),
        scale=ScaleConfig(num_workers=_MOST_NODES, patience_seconds=_SECONDS),
    )
    impatient = replace(
        patient, output=f"{patient.output}-none", scale=ScaleConfig(num_workers=_MOST_NODES)
    )
    with machines(1, tmp_path / "machines") as (head,):
        words, variables = autoscaling_head(tmp_path, head.address)
        head.run(words, **variables)

        def outcome(run: RunConfig, name: str) -> tuple[int, str]:
            (tmp_path / name).mkdir()
            said = tmp_path / name / "said.txt"
            begun = head.begin(
                command(run, tmp_path / name), said, RAY_ADDRESS=f"{head.address}:6379"
            )
            return begun.wait(_SECONDS), begun.said

        status, said = outcome(impatient, "impatient")
        assert status == 2 and "room for 0" in said and "scale.patience_seconds" in said, said
        status, said = outcome(patient, "patient")
        assert status == 0 and "0 of 2 workers have a place: waiting for nodes" in said, said
    assert exists(patient.output, RESULT_FILE)
    assert read_json(patient.output, PROVENANCE_FILE)["starts"][-1]["world_size"] == _MOST_NODES
