"""Every transfer method on two gloo ranks learns what it learns in one process.

All methods share a group of processes; a method is built from its run's settings on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.test_ranks import spawn
from tests.transfer_methods import CASES, CPU, STEPS, batch, case_of, masked
from tmu_dist.collectives import Collectives, Ranks
from tmu_dist.config import RunConfig
from tmu_dist.training.loop import Run
from tmu_dist.transfer.base import TrainingBatch

pytestmark = pytest.mark.distributed


def _share(step: int, ranks: Ranks) -> TrainingBatch:
    """This rank's rows of one global batch of four, in float64.

    Sequences of the second iteration have missing pixels, and the last two of the third are
    padding, so that one of two ranks has nothing else.
    """
    whole = masked(batch(step)) if step == 2 else batch(step)
    weights = torch.ones(4)
    weights[2:] = 0 if step == 3 else 1
    rows = slice(ranks.rank * 4 // ranks.world_size, (ranks.rank + 1) * 4 // ranks.world_size)
    observed = whole.observed_BTCHW
    return replace(
        whole,
        frames_BTCHW=whole.frames_BTCHW[rows],
        observed_BTCHW=None if observed is None else observed[rows],
        sampling_mask_BT=whole.sampling_mask_BT[rows],
        weights_B=(weights / weights.sum() * ranks.world_size)[rows],
    )


def _learn(collectives: Collectives, configs: dict[str, RunConfig], folder: str) -> None:
    """A few iterations of two updates each, the last one in a method's last phase."""
    torch.set_default_dtype(torch.float64)
    ranks = collectives.ranks
    for name, config in configs.items():
        run = Run(config, collectives, CPU)
        try:
            for step in (1, 2, 3, STEPS):
                run.training_step(_share(step, ranks))
        except Exception as error:
            error.add_note(f"while {name} learned on rank {ranks.rank}")
            raise
        state = {"student": run.student.state_dict(), "step": run.training_step.state_dict()}
        torch.save(state, f"{folder}/{name}-{ranks.world_size}-{ranks.rank}.pt")


def test_two_ranks_equal_one_process_with_every_method(
    tiny_config: RunConfig, teacher_runs: tuple[str, str], tmp_path: Path
) -> None:
    configs = {name: case_of(tiny_config, name, teacher_runs) for name in CASES}
    for world_size in (1, 2):
        spawn(world_size, _learn, configs, str(tmp_path))
    for name in configs:
        one, *two = (
            torch.load(tmp_path / f"{name}-{ranks}.pt", weights_only=True)
            for ranks in ("1-0", "2-0", "2-1")
        )
        for rank, state in enumerate(two):
            torch.testing.assert_close(
                {f"{name} on rank {rank}": state},
                {f"{name} on rank {rank}": one},
                rtol=1e-9,
                atol=1e-9,
            )
