"""Teachers of several kinds at once, and the projections that training has beside the student."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_MODEL
from tests.unit.test_adapters import (
    ANY,
    DIFFERENCES,
    E3D,
    MIM,
    PREDRNN,
    RAIN,
    RGB,
    SAVP,
    SMALL,
    VPN,
    card_of,
    classroom,
    gradients_of,
    trainee_of,
)
from tests.unit.test_training import assert_same, final_state, run, run_until
from tests.unit.test_transfer import FRAME, batch, student_of
from tmu_dist.config import ModelConfig, RunConfig
from tmu_dist.models.build import count_parameters, skeleton
from tmu_dist.models.rollout import Predictor
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.card import TeacherError
from tmu_dist.teachers.store import load_model, load_weights
from tmu_dist.transfer.base import DeadDistillationError
from tmu_dist.transfer.tmu import ProjectedStudent

MIXED = (
    card_of(RGB, replace(PREDRNN, hidden_channels=3)),
    card_of(SMALL, replace(MIM, patch_size=2), RAIN),
    card_of(FRAME, replace(E3D, num_layers=3)),
    card_of(FRAME, VPN),
    card_of(FRAME, SAVP),
)


@pytest.mark.parametrize(
    "student", [TINY_MODEL, PREDRNN, MIM, E3D, SAVP, VPN], ids=lambda model: model.cell
)
@pytest.mark.parametrize("count", [1, 5])
def test_teachers_of_different_kinds_at_once(student: ModelConfig, count: int) -> None:
    method = classroom(MIXED[-count:], model=student)
    gradients = gradients_of(method)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    report = method.liveness(trainee_of(method), batch())
    assert report is not None
    num_layers = len(skeleton(FRAME, student).memory_shapes)
    assert [len(layer) for layer in report.gate_means] == [count] * num_layers
    assert all(-1 <= c <= 1 for layer in report.memory_correlation for c in layer)
    other = classroom(
        MIXED[-count:], model=student, seeds=[*range(1, count), 99]
    )  # another last teacher
    changed = gradients_of(other)
    assert changed.keys() == gradients.keys()
    assert any(not torch.equal(changed[name], gradients[name]) for name in changed)


def test_projections_are_trained_and_kept_but_not_part_of_the_student() -> None:
    method = classroom([MIXED[0], MIXED[2]])
    trainee = trainee_of(method)
    alone = student_of(method)
    assert isinstance(trainee, ProjectedStudent)
    assert_same(dict(trainee.student.state_dict()), dict(alone.state_dict()))
    extra = {name for name in trainee.state_dict() if not name.startswith("student.")}
    assert extra == {f"projections.layer{k}_teacher0.weight" for k in range(2)}
    assert trainee.projections["layer0_teacher0"].weight.shape == (3, 4, 1, 1)

    optimizer = torch.optim.Adam(trainee.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        terms = method.loss(trainee, batch())
        terms.total().backward()
        optimizer.step()
        losses.append(terms.terms["distillation"].value.item())
    assert losses[-1] < 0.9 * losses[0]

    torch.manual_seed(123)
    again = method.trainee(method.build_student())
    again.load_state_dict(trainee.state_dict())
    assert torch.equal(method.loss(again, batch()).total(), method.loss(trainee, batch()).total())
    # Without distillation they would be parameters that never get a gradient.
    assert isinstance(trainee_of(classroom([MIXED[0], MIXED[2]], beta=0.0)), Predictor)


def test_liveness_is_measured_on_the_student_through_its_projections() -> None:
    method = classroom([DIFFERENCES["channels"][0]])
    trainee = trainee_of(method)
    assert isinstance(trainee, ProjectedStudent)
    rollout = method.unroll(trainee, batch())
    loss = method.beta * method._distillation(rollout, method.teach(batch(), rollout), batch())
    of_student = list(trainee.student.parameters())
    found = torch.autograd.grad(loss, of_student, allow_unused=True)
    norm = torch.cat([g.flatten() for g in found if g is not None]).norm()
    report = method.liveness(trainee, batch())
    assert report is not None
    assert report.teaching_gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    # Imitations that are constant teach projections, and only those.
    for layer in trainee.student.stack.layers:
        layer.transfer.distiller_norm.gain.requires_grad_(False).zero_()
        layer.transfer.distiller_norm.shift.requires_grad_(False).fill_(1.0)
    with pytest.raises(DeadDistillationError, match="teach nothing"):
        method.liveness(trainee, batch())


def test_projections_run_in_half_precision_and_compare_in_single() -> None:
    method = classroom(MIXED)
    trainee = trainee_of(method)
    losses = []
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
            losses.append(method.loss(trainee, batch()).terms["distillation"].value)
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=3e-2, atol=0)


# Whole runs


def test_a_run_with_projections_continues_bit_for_bit(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    model = replace(TINY_MODEL, hidden_channels=3, num_layers=3, patch_size=2)
    transfer = replace(tiny_config.transfer, method="tmu", teachers=teacher_runs)
    refused = replace(tiny_config, model=model, transfer=transfer)
    with pytest.raises(TeacherError, match=r"channels: teacher 4, student 3 \(transfer.adapter"):
        run(refused)
    config = replace(refused, transfer=replace(transfer, adapter=ANY))
    straight = replace(config, output=config.output + "-straight")
    expected = run(straight)
    run_until(config, 5)
    result = run(config)
    assert result.best_mse_per_frame == expected.best_mse_per_frame
    states = [final_state(r.run) for r in (result, expected)]
    assert_same(*states)
    card, weights = load_weights(result.run)
    assert not any("projection" in name for name in weights)
    assert card.teacher_parameters == tuple(
        count_parameters(load_model(run).model) for run in teacher_runs
    )
    liveness = [e for e in read_log(Path(result.run)) if e["event"] == "liveness"]
    assert liveness and all(e["teaching_gradient_norm"] > 0 for e in liveness)
