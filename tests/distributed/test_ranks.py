"""Several gloo processes: data-parallel training equals one process, and failures are shared."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.unit.test_training import MODELS, final_state
from tests.unit.test_transfer import batch, student_of, tmu_method
from tmu_dist.backbones import BACKBONES
from tmu_dist.collectives import Collectives, Ranks, joined_ranks, torchrun_here
from tmu_dist.config import (
    AdversarialConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    WindowConfig,
)
from tmu_dist.files import WriteError
from tmu_dist.models.build import skeleton
from tmu_dist.models.shapes import FrameShape
from tmu_dist.run_folder import read_log
from tmu_dist.training.build import build_step
from tmu_dist.training.loop import train
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import Objective, Task, TrainingBatch
from tmu_dist.transfer.scratch import Scratch

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")
FRAME = FrameShape(channels=1, height=16, width=16)


def _enter(rank: int, variables: list[dict[str, str]], job: Callable[..., None], args: Any) -> None:
    os.environ.update(variables[rank])
    torch.set_num_threads(1)
    with joined_ranks("torchrun") as collectives:
        job(collectives, *args)


def spawn(world_size: int, job: Callable[..., None], *args: Any) -> None:
    """Run `job(collectives, *args)` on that many processes; errors of any of them fail the test."""
    variables = torchrun_here(world_size)
    torch.multiprocessing.spawn(_enter, (variables, job, args), nprocs=world_size)


def _double_batch(rows: slice, scale: float, padding: int, masked: bool) -> TrainingBatch:
    """Some rows of one global batch of four in float64; the last `padding` rows weigh nothing.

    With masks, each row lacks other pixels, the second lacks all, and the third lacks none.
    """
    whole = batch(4)
    generator = torch.Generator().manual_seed(6)
    observed = torch.rand(whole.frames_BTCHW.shape, generator=generator) < 0.5
    observed[0, :, :, :8] = False
    observed[1], observed[2] = False, True
    frames = whole.frames_BTCHW * observed if masked else whole.frames_BTCHW
    weights = torch.ones(4).double()
    weights[4 - padding :] = 0
    return TrainingBatch(
        frames_BTCHW=frames[rows].double(),
        observed_BTCHW=observed[rows] if masked else None,
        sampling_mask_BT=whole.sampling_mask_BT[rows],
        weights_B=weights[rows] * scale / weights.sum(),
    )


def _one_update(
    rows: slice, scale: float, padding: int, masked: bool, *, wrap: bool
) -> dict[str, torch.Tensor]:
    method = tmu_method(1, 2)
    for teacher in method.bank.own:
        teacher.double()
    student = student_of(method).double()
    step = TrainingStep(
        method,
        student,
        student,
        DistributedDataParallel(student) if wrap else student,
        device=CPU,
        learning_rate=lambda step: 1e-2,
        reverse_input="update",
        grad_clip_norm=0.5,
    )
    step(_double_batch(rows, scale, padding, masked))
    return student.state_dict()


def _data_parallel_update(
    collectives: Collectives, padding: int, masked: bool, folder: str
) -> None:
    rank, world_size = collectives.ranks.rank, collectives.ranks.world_size
    share = 4 // world_size
    rows = slice(rank * share, (rank + 1) * share)
    state = _one_update(rows, world_size, padding, masked, wrap=True)
    torch.save(state, f"{folder}/{rank}.pt")


@pytest.mark.parametrize(("padding", "masked"), [(0, False), (1, False), (3, False), (0, True)])
def test_two_ranks_equal_one_process(padding: int, masked: bool, tmp_path: Path) -> None:
    spawn(2, _data_parallel_update, padding, masked, str(tmp_path))
    expected = _one_update(slice(None), 1.0, padding, masked, wrap=False)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10)


def _backbone_update(collectives: Collectives, cell: str, folder: str) -> None:
    """One iteration of a backbone's own kind of step, in float64, on this rank's sequences."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    adversarial = AdversarialConfig(
        video_weight=0.1, image_weight=0.1, feature_weight=1.0, base_channels=2
    )
    if cell in ("vpn", "savp-learned-prior"):
        adversarial = AdversarialConfig()
    if cell in BACKBONES:
        model = MODELS.get(cell) or ModelConfig(
            cell=cell, num_layers=2, hidden_channels=4, kernel_size=3
        )
    else:
        model = replace(MODELS["savp"], savp=replace(MODELS["savp"].savp, prior="learned"))
    config = RunConfig(
        window=WindowConfig(num_input_frames=3, num_target_frames=2),
        model=model,
        training=TrainingConfig(sampling="always", adversarial=adversarial),
    )
    kl_weight = 0.5 if cell in BACKBONES else 0.0
    objective = Objective(skeleton(FRAME, model).frame_loss, kl_weight=lambda step: kl_weight)
    method = Scratch(Task(frame=FRAME, model=model, objective=objective, num_input_frames=3))
    student = method.build_student()
    step = build_step(config, method, student, student, CPU, collectives)
    ranks = collectives.ranks
    share = 4 // ranks.world_size
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(4, 5, FRAME.channels, FRAME.height, FRAME.width, generator=generator)
    noise = torch.randn(4, 4, student.noise_size, generator=generator)
    step(
        TrainingBatch(
            frames_BTCHW=frames[rows],
            observed_BTCHW=None,
            sampling_mask_BT=torch.ones(share, 1, dtype=torch.bool),
            weights_B=torch.full((share,), ranks.world_size / 4),
            noise_BTZ=noise[rows] if student.noise_size else None,
            step=1,
        )
    )
    state = {"student": student.state_dict(), "step": step.state_dict()}
    torch.save(state, f"{folder}/{ranks.world_size}-{ranks.rank}.pt")


@pytest.mark.parametrize("cell", [*BACKBONES, "savp-learned-prior"])
def test_two_ranks_equal_one_process_with_every_backbone(cell: str, tmp_path: Path) -> None:
    """Discriminators and their optimiser, too; and a prior whose divergence weighs 0 for now."""
    for world_size in (1, 2):
        spawn(world_size, _backbone_update, cell, str(tmp_path))
    one, *two = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    for state in two:
        torch.testing.assert_close(state, one, rtol=1e-9, atol=1e-9)


def _train(collectives: Collectives, config: RunConfig, stop: int | None) -> None:
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == stop:
            os._exit(3)

    train(config, collectives, CPU, listener=kill)


def test_two_ranks_train_stop_and_continue(tmu_config: RunConfig) -> None:
    """22 training sequences in batches of 4: the last batch of an epoch is padded."""
    one = replace(tmu_config, output=tmu_config.output + "-one")
    train(one, Collectives(), CPU)
    two = replace(tmu_config, output=tmu_config.output + "-two")
    spawn(2, _train, two, None)
    stopped = replace(tmu_config, output=tmu_config.output + "-stopped")
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        spawn(2, _train, stopped, 5)
    spawn(2, _train, stopped, None)

    weights = [final_state(config.output)["weights"] for config in (one, two, stopped)]
    for name, value in weights[1].items():
        assert torch.equal(weights[2][name], value)
        torch.testing.assert_close(weights[0][name], value, rtol=1e-3, atol=1e-4)
    validations = [
        [e["mse_per_frame"] for e in read_log(Path(c.output)) if e["event"] == "validation"]
        for c in (one, two)
    ]
    assert validations[0] == pytest.approx(validations[1], rel=1e-4)


def test_continue_on_another_number_of_ranks(tmu_config: RunConfig) -> None:
    straight = replace(tmu_config, output=tmu_config.output + "-straight")
    train(straight, Collectives(), CPU)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        spawn(2, _train, tmu_config, 5)
    train(tmu_config, Collectives(), CPU)
    expected, weights = (final_state(c.output)["weights"] for c in (straight, tmu_config))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def _fail_on_main(collectives: Collectives, folder: str) -> None:
    def full_disk() -> None:
        raise WriteError("the disk is full")

    try:
        collectives.on_main(full_disk)
    except WriteError as error:
        Path(folder, str(collectives.ranks.rank)).write_text(str(error))
    assert collectives.on_main(lambda: 7) == 7
    with pytest.raises(WriteError, match="only rank 1"):
        collectives.on_all(lambda: _fail_on_rank_1(collectives))
    assert collectives.on_all(lambda: collectives.ranks.rank) == [0, 1]
    assert collectives.all_gather_objects(collectives.ranks.rank) == [0, 1]


def _fail_on_rank_1(collectives: Collectives) -> None:
    if collectives.ranks.rank == 1:
        raise WriteError("only rank 1")


def test_failure_of_one_rank_reaches_all_ranks(tmp_path: Path) -> None:
    spawn(2, _fail_on_main, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["the disk is full"] * 2


def test_ranks_without_a_process_group_are_refused() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        Collectives(Ranks(world_size=2))
