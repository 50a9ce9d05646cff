"""Runs on Ray whose folder, with Ray's own files in it, lies in an S3 bucket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.e2e.test_kill import command, finish, start
from tests.s3_servers import moto
from tests.unit.test_training import assert_same
from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.data.loader import ShardError
from tmu_dist.data.storage import MissingObjectError, StorageError, list_paths
from tmu_dist.teachers.store import load_weights
from tmu_dist.training.launch import launch

pytestmark = [pytest.mark.ray]


@pytest.mark.usefixtures("ray_session")
def test_a_ray_run_in_a_bucket_equals_a_plain_one_on_a_disk(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster whose processes know nothing of the bucket but what the command tells them."""
    import ray

    local = launch(tiny_config)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    with moto() as server:
        server.use(monkeypatch)
        server.make_bucket("ray-runs")
        stored = replace(tiny_config, output="s3://ray-runs/run")
        one_worker = ["--launcher", "ray", "--scale.num-workers", "1"]
        shown = finish(start(command(stored, tmp_path, *one_worker)))
        assert "step 7: validation MSE/frame" in shown  # followed in the store
        assert_same(load_weights(stored.output)[1], load_weights(local.run)[1])
        assert list_paths(stored.output, "ray"), "Ray keeps its own files elsewhere"


@pytest.mark.parametrize(
    ("error", "repeats"),
    [
        (StorageError("timeout"), False),
        (ShardError("altered"), False),
        (MissingObjectError("no such archive"), True),
        (ConfigError("unknown"), True),
    ],
)
def test_workers_are_started_again_for_what_may_heal(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, error: Exception, repeats: bool
) -> None:
    from tmu_dist.training import ray_worker

    def fail(*given: object, **named: object) -> None:
        raise error

    def zero() -> int:
        return 0

    def one() -> int:
        return 1

    context: dict[str, Callable[[], int]] = {
        "get_world_rank": zero,
        "get_world_size": one,
        "get_local_rank": zero,
        "get_local_world_size": one,
    }
    monkeypatch.setattr(ray_worker.ray.train, "get_context", lambda: SimpleNamespace(**context))
    monkeypatch.setattr(ray_worker, "own_device", lambda: None)
    monkeypatch.setattr("tmu_dist.training.loop.train", fail)
    monkeypatch.setattr(ray_worker, "_check_folders", lambda *given: None)
    monkeypatch.setattr(ray_worker, "_PreemptionNotice", lambda rank: None)
    settings = {"config": asdict(tiny_config), "token": "", "folders": {}, "command": "tmu"}
    if repeats:
        assert ray_worker.train_worker(settings) is error
    else:
        with pytest.raises(type(error), match=str(error)):
            ray_worker.train_worker(settings)


def test_a_bucket_that_is_not_there_is_named_before_ray_starts(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ray = replace(tiny_config.launch, launcher="ray")
    with moto() as server:
        server.use(monkeypatch)
        with pytest.raises(StorageError, match=r"s3://no-such/run/config\.json.*bucket"):
            launch(replace(tiny_config, output="s3://no-such/run", launch=on_ray))


def test_a_store_that_ray_cannot_use_is_refused_before_ray_starts(tiny_config: RunConfig) -> None:
    from tmu_dist.training.ray_cluster import _check_store

    _check_store("/disk/run")
    _check_store("gs://bucket/run")
    with pytest.raises(ConfigError, match="with Ray, a run folder is on a disk"):
        _check_store("az://container/run")
