"""A plain process, torchrun and Ray end in the same loop, with the same numbers, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_kill import command, finish, start
from tests.ray.conftest import on_ray
from tests.unit.test_training import assert_same, final_state
from tmu_dist.config import RunConfig
from tmu_dist.run_folder import read_log
from tmu_dist.training.launch import launch

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

_CLOCKS = ("samples_per_second", "data_wait_fraction", "seconds")


def numbers(run: str) -> list[dict[str, Any]]:
    """All of a run's log but what a clock gave."""
    return [{k: v for k, v in event.items() if k not in _CLOCKS} for event in read_log(run)]


def by_torchrun(config: RunConfig, ranks: int, folder: Path) -> RunConfig:
    config = replace(config, output=f"{config.output}-torchrun-{ranks}")
    python, *words = command(config, folder, "--launcher", "torchrun")
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    finish(start([python, *module, *words]))
    return config


@pytest.mark.parametrize("ranks", [1, 2])
def test_launchers_give_the_same_bits(tmu_config: RunConfig, tmp_path: Path, ranks: int) -> None:
    uneven = replace(tmu_config, training=replace(tmu_config.training, batch_size=3))
    runs = [by_torchrun(uneven, ranks, tmp_path).output]
    runs.append(launch(on_ray(uneven, ranks, "ray")).run)
    if ranks == 1:
        runs.append(launch(uneven).run)
    for run in runs[1:]:
        assert_same(final_state(run), final_state(runs[0]))
        assert numbers(run) == numbers(runs[0])
