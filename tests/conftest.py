"""Fixtures shared by all tests: one tiny archive of real digits, and a config that fits it."""

from __future__ import annotations

import os

# Tests run side by side with others on few cores; one thread each also makes sums reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from tests.s3_servers import moto
from tmu_dist.config import (
    DataConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    WindowConfig,
)
from tmu_dist.data import storage

torch.set_num_threads(1)

_CLUSTERS = ("tests/hosts/", "tests/ray/")
"""They find processes by name, and machines of namespaces are seen from outside."""
TINY_MODEL = ModelConfig(num_layers=2, hidden_channels=4, kernel_size=3, patch_size=4)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes of pytest, a file is one's alone; and all that start clusters are."""
    from xdist.scheduler import LoadScopeScheduling

    class ClustersInTurn(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "clusters" if file.startswith(_CLUSTERS) else file

    return ClustersInTurn(config, log)


@pytest.fixture(scope="session", autouse=True)
def folders_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own node cache and workspace are left alone."""
    os.environ.pop("TMU_DIST_HOME", None)
    os.environ["TMU_DIST_CACHE"] = str(tmp_path_factory.mktemp("node-cache"))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is asked for of stores: path, offset and size."""
    asked: list[tuple[str, int, int]] = []
    read_range = storage.read_range

    def recorded(url: str, path: str, offset: int, size: int) -> memoryview:
        asked.append((path, offset, size))
        return read_range(url, path, offset, size)

    monkeypatch.setattr(storage, "read_range", recorded)
    return asked


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of an S3 server on this machine."""
    with moto() as server:
        server.use(monkeypatch)
        name = f"bucket-{uuid4().hex}"
        server.make_bucket(name)
        yield f"s3://{name}"


@pytest.fixture(scope="session")
def archive_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sequences of 6 frames of 16x16 pixels: 22 for training, 5 each to validate and test."""
    url = str(tmp_path_factory.mktemp("archives") / "tiny")
    settings = MovingMNISTConfig(
        digits=2,
        train=22,
        val=5,
        test=5,
        frames=6,
        frame_size=16,
        digit_size=7,
        speed=(1.0, 2.0),
        samples_per_shard=8,
    )
    write_moving_mnist(settings, url, workers=1, show_progress=False)
    return url


@pytest.fixture
def tiny_config(archive_url: str, tmp_path: Path) -> RunConfig:
    """A run of 7 steps that takes about a second in this process."""
    return RunConfig(
        output=str(tmp_path / "run"),
        window=WindowConfig(num_input_frames=3, num_target_frames=3),
        data=DataConfig(url=archive_url),
        model=TINY_MODEL,
        training=TrainingConfig(num_steps=7, batch_size=4, sampling_stop_step=10),
        schedule=ScheduleConfig(log_every=1, validate_every=3, checkpoint_every=2),
        launch=LaunchConfig(launcher="local"),
    )


@pytest.fixture(scope="session")
def teacher_runs(archive_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two trained (a little) teachers that fit `tiny_config`."""
    from tmu_dist.training.launch import launch

    folder = tmp_path_factory.mktemp("teachers")
    runs = []
    for seed in (1, 2):
        config = RunConfig(
            output=str(folder / f"teacher-{seed}"),
            window=WindowConfig(num_input_frames=3, num_target_frames=3),
            data=DataConfig(url=archive_url),
            model=TINY_MODEL,
            training=TrainingConfig(num_steps=2, batch_size=4, seed=seed),
            launch=LaunchConfig(launcher="local"),
        )
        runs.append(launch(config).run)
    return runs[0], runs[1]


@pytest.fixture
def tmu_config(tiny_config: RunConfig, teacher_runs: tuple[str, str]) -> RunConfig:
    """`tiny_config` with memory transfer from both teachers."""
    transfer = replace(tiny_config.transfer, method="tmu", teachers=teacher_runs)
    return replace(tiny_config, transfer=transfer)
