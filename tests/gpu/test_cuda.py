"""On a GPU the same run gives the same losses, in float32 and close to it in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tmu_dist.collectives import Collectives
from tmu_dist.config import RunConfig
from tmu_dist.run_folder import read_log
from tmu_dist.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def losses(config: RunConfig, device: str, precision: str) -> list[float]:
    config = replace(
        config,
        output=f"{config.output}-{device}-{precision}",
        training=replace(config.training, precision=precision),  # type: ignore[arg-type]
    )
    run = train(config, Collectives(), torch.device(device)).run
    return [e["loss/total"] for e in read_log(Path(run)) if e["event"] == "train"]


def test_cuda_trains_like_the_cpu(tmu_config: RunConfig) -> None:
    expected = losses(tmu_config, "cpu", "fp32")
    assert losses(tmu_config, "cuda", "fp32") == pytest.approx(expected, rel=1e-3)
    assert losses(tmu_config, "cuda", "bf16") == pytest.approx(expected, rel=3e-2)
