"""What can make training blow up: many teachers, and frames without anything in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank
from tmu_dist.transfer.base import Objective, Task, TrainingBatch
from tmu_dist.transfer.tmu import MemoryDistillation

FRAME = FrameShape(channels=1, height=16, width=16)
TINY = ModelConfig(num_layers=2, hidden_channels=4, kernel_size=3)


def largest_gradient(network: Predictor, frames: torch.Tensor) -> float:
    rollout = network(
        frames,
        num_input_frames=frames.shape[1] // 2,
        num_frames=frames.shape[1],
        sampling_mask_BT=torch.ones(len(frames), frames.shape[1] // 2 - 1, dtype=torch.bool),
    )
    (rollout.predictions_BTCHW - frames[:, 1:]).square().mean().backward()
    gradients = [p.grad.abs().max() for p in network.parameters() if p.grad is not None]
    return float(torch.stack(gradients).max())


def rain_after_dry_frames(count: int = 20) -> torch.Tensor:
    frames = torch.rand(2, count, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    frames[1, : count // 2] = 0.0
    return frames


@pytest.mark.parametrize(
    "model",
    [{}, {"cell": "predrnn", "bias": True}, {"cell": "mim", "bias": True}, {"cell": "e3d_lstm"}],
    ids=lambda model: model.get("cell", "convlstm"),
)
def test_empty_frames_before_the_first_rain_are_harmless_with_biases(model: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = ModelConfig(num_layers=2, hidden_channels=4, kernel_size=3, **model)
    network = build_predictor(FRAME, settings, tmu=TMUConfig(combine="mean"), num_slots=2)
    assert largest_gradient(network, rain_after_dry_frames()) < 10


def test_empty_frames_break_gradients_without_biases() -> None:
    """The hazard that docs/backbones.md names: the norm of a map of zeros is infinitely steep."""
    torch.manual_seed(0)
    settings = ModelConfig(cell="predrnn", num_layers=2, hidden_channels=4, kernel_size=3)
    network = build_predictor(FRAME, settings, tmu=TMUConfig(combine="mean"), num_slots=2)
    assert not largest_gradient(network, rain_after_dry_frames()) < 1e6


@pytest.mark.parametrize("combine", ["paper", "mean"])
def test_a_student_of_forty_one_teachers_takes_a_step(combine: str) -> None:
    """The paper's number for a card of 24 GB (Sec. 4.1)."""
    torch.manual_seed(0)
    teachers = [FrozenTeacher(build_predictor(FRAME, TINY)) for _ in range(41)]
    method = MemoryDistillation(
        Task(frame=FRAME, model=TINY, objective=Objective(), num_input_frames=3),
        tmu=TMUConfig(combine=combine),  # type: ignore[arg-type]
        bank=ReplicatedBank(teachers),
        beta=0.1,
        teacher_input="own",
    )
    student = method.build_student()
    batch = TrainingBatch(
        frames_BTCHW=torch.rand(2, 6, 1, 16, 16),
        observed_BTCHW=None,
        sampling_mask_BT=torch.ones(2, 2, dtype=torch.bool),
        weights_B=torch.full((2,), 0.5),
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        terms = method.loss(student, batch)
        terms.total().backward()
        optimizer.step()
        losses.append(terms.to_log())
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert losses[-1]["loss/distillation"] < losses[0]["loss/distillation"]
    report = method.liveness(student, batch)
    assert report is not None and [len(gates) for gates in report.gate_means] == [41, 41]
