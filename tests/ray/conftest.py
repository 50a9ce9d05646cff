"""One small Ray for all Ray tests of a session, and what its tests share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tmu_dist.config import FaultConfig, LaunchConfig, RunConfig, ScaleConfig

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "2")  # a local Ray inherits it


@pytest.fixture(scope="session")
def ray_settings() -> None:
    """The variables that Ray reads when it is imported."""
    import tmu_dist.training.ray_cluster  # noqa: F401


@pytest.fixture(scope="session")
def ray_session(ray_settings: None) -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def on_ray(
    config: RunConfig,
    num_workers: int | str,
    name: str,
    *,
    faults: FaultConfig | None = None,
    **launch: Any,
) -> RunConfig:
    """The run as one on Ray, in a folder of its own."""
    return replace(
        config,
        output=f"{config.output}-{name}",
        scale=ScaleConfig(num_workers=num_workers),
        faults=faults or FaultConfig(),
        launch=LaunchConfig(launcher="ray", **launch),
    )


def until(happened: Callable[[], object], seconds: float = 300) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def train_workers() -> list[int]:
    """Process ids of Ray Train workers, by the title that Ray gives them."""
    found = []
    for title in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone since
            if b"RayTrainWorker" in title.read_bytes():
                found.append(int(title.parent.name))
    return sorted(found)
