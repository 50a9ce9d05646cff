"""On a GPU runs and networks give the same numbers, in float32 and close to it in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contracts import test_predictor as suite
from tests.transfer_methods import batch, teachers_of
from tmu_dist.backbones import BACKBONES
from tmu_dist.collectives import Collectives
from tmu_dist.config import ComputeConfig, PlacementConfig, RunConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.run_folder import read_log
from tmu_dist.training.loop import Run, train

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


def test_teachers_begin_while_the_student_learns(tmu_config: RunConfig) -> None:
    """Of two updates an iteration, the next one's teaching begins before the present one ends."""

    def trained(*, ahead: bool) -> tuple[dict[str, torch.Tensor], list[torch.cuda.Event]]:
        config = replace(
            tmu_config,
            placement=PlacementConfig(ahead=ahead),
            compute=ComputeConfig(batch_teachers="off"),  # the first one runs by itself: see `mark`
        )
        run = Run(config, Collectives(), torch.device("cuda"))
        events = []

        def mark(*_: object) -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        teachers_of(run)[0].register_forward_pre_hook(mark)
        given = [batch(step).on("cuda") for step in (1, 2)]
        run.training_step(given[0], given[1])
        mark()
        run.training_step(given[1])
        torch.cuda.synchronize()
        return run.student.state_dict(), events

    late, (first, backwards, end, *_) = trained(ahead=False)
    assert first.elapsed_time(end) > 0 and backwards.elapsed_time(end) > 0
    early, (backwards, first, following, end, *others) = trained(ahead=True)
    assert len(others) == 1  # nothing is taught twice
    assert following.elapsed_time(end) > 0
    torch.testing.assert_close(early, late, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cell", BACKBONES)
def test_every_backbone_predicts_like_the_cpu(cell: str) -> None:
    torch.manual_seed(0)
    network = build_predictor(suite.FRAME, suite.small(cell), tmu=TMUConfig(), num_slots=2)
    given, noise = suite.frames(), suite.noise(network)
    arguments = {
        "num_input_frames": 4,
        "num_frames": 7,
        "sampling_mask_BT": torch.ones(3, 2, dtype=torch.bool),
        "noise_BTZ": noise,
    }
    expected = network(given, **arguments)
    moved = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    found = network.cuda()(given.cuda(), **moved)
    torch.testing.assert_close(
        found.predictions_BTCHW.cpu(), expected.predictions_BTCHW, rtol=1e-3, atol=1e-4
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rough = network(given.cuda(), **moved)
    assert all(memory.dtype == torch.float32 for memory in rough.memories)
    difference = (rough.predictions_BTCHW.cpu() - expected.predictions_BTCHW).norm()
    assert difference <= 3e-2 * expected.predictions_BTCHW.norm()
