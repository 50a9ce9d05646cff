"""Transfer methods: do the teachers matter, and only when they should?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import TINY_MODEL
from tmu_dist.collectives import Ranks
from tmu_dist.config import TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank
from tmu_dist.transfer.base import (
    DeadDistillationError,
    LossTerms,
    Objective,
    Reduction,
    Task,
    Term,
    TrainingBatch,
)
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.tmu import MemoryDistillation

FRAME = FrameShape(channels=1, height=16, width=16)
INPUTS = 3


def batch(size: int = 2) -> TrainingBatch:
    generator = torch.Generator().manual_seed(5)
    return TrainingBatch(
        frames_BTCHW=torch.rand(size, 6, 1, 16, 16, generator=generator),
        observed_BTCHW=None,
        sampling_mask_BT=torch.rand(size, 2, generator=generator) < 0.5,
        weights_B=torch.full((size,), 1 / size),
    )


def part_of_batch(ranks: Ranks, step: int) -> TrainingBatch:
    """A rank's sequences of one global batch of four, in float64."""
    whole, share = batch(4), 4 // ranks.world_size
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    return TrainingBatch(
        frames_BTCHW=whole.frames_BTCHW[rows].double(),
        observed_BTCHW=None,
        sampling_mask_BT=whole.sampling_mask_BT[rows],
        weights_B=torch.full((share,), ranks.world_size / 4),
        step=step,
    )


def teacher(seed: int) -> Predictor:
    torch.manual_seed(seed)
    return build_predictor(FRAME, TINY_MODEL)


def task(reduction: Reduction = "mean") -> Task:
    return Task(
        frame=FRAME,
        model=TINY_MODEL,
        objective=Objective(reduction=reduction),
        num_input_frames=INPUTS,
    )


def tmu_method(
    *seeds: int,
    beta: float = 0.1,
    teacher_input: str = "own",
    reduction: Reduction = "mean",
    layers: tuple[int, ...] | str = "all",
) -> MemoryDistillation:
    return MemoryDistillation(
        task(reduction),
        tmu=TMUConfig(layers=layers),  # type: ignore[arg-type]
        bank=ReplicatedBank([FrozenTeacher(teacher(seed)) for seed in seeds]),
        beta=beta,
        teacher_input=teacher_input,  # type: ignore[arg-type]
    )


def student_of(method: Scratch | MemoryDistillation) -> Predictor:
    torch.manual_seed(0)
    return method.build_student()


def gradients(method: Scratch | MemoryDistillation) -> dict[str, Tensor]:
    student = student_of(method)
    method.loss(student, batch()).total().backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_teachers_change_what_the_student_learns() -> None:
    """The published TMU code computed the distillation loss and dropped it; ours must not."""
    one, other = gradients(tmu_method(1, 2)), gradients(tmu_method(1, 3))
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_beta_zero_equals_the_same_network_without_teachers_bit_for_bit() -> None:
    alone = Scratch(task(), tmu=TMUConfig(), num_slots=2)
    weights = []
    for method in (tmu_method(1, 2, beta=0.0), alone):
        student = student_of(method)
        optimizer = torch.optim.Adam(student.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            method.loss(student, batch()).total().backward()
            optimizer.step()
        weights.append(student.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_teachers_stay_frozen() -> None:
    method = tmu_method(1)
    (frozen,) = method.bank.own
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    gradients(method)
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layers", ["all", (1,)])
def test_distillation_is_eq_4_over_teachers_layers_and_time(
    reduction: Reduction, layers: tuple[int, ...] | str
) -> None:
    method = tmu_method(1, 2, reduction=reduction, layers=layers)
    student = student_of(method)
    given = batch()
    terms = method.loss(student, given)
    arguments = {
        "num_input_frames": INPUTS,
        "num_frames": 6,
        "sampling_mask_BT": given.sampling_mask_BT,
    }
    rollout = student(given.frames_BTCHW, **arguments)
    expected = 0.0
    for m, seed in enumerate((1, 2)):
        memories = teacher(seed)(given.frames_BTCHW, **arguments).memories
        for k in range(2) if layers == "all" else layers:
            error = rollout.imitations[k][m] - memories[k]
            squares = error.square().mean() if reduction == "mean" else error.square().sum() / 2
            expected += squares.item()
    assert terms.terms["distillation"].value.item() == pytest.approx(expected, rel=1e-5)
    frame_error = (rollout.predictions_BTCHW - given.frames_BTCHW[:, 1:]).square()
    frame_loss = frame_error.mean() if reduction == "mean" else frame_error.sum() / 2
    assert terms.terms["prediction"].value.item() == pytest.approx(frame_loss.item(), rel=1e-5)
    assert terms.total().item() == pytest.approx(frame_loss.item() + 0.1 * expected, rel=1e-5)


def test_what_teachers_see_is_a_choice() -> None:
    losses = {
        choice: method.loss(student_of(method), batch()).terms["distillation"].value.item()
        for choice in ("own", "student", "truth")
        for method in [tmu_method(1, teacher_input=choice)]
    }
    assert len(set(losses.values())) == 3
    # A teacher that is shown what the student read needs no prediction of its own.
    method = tmu_method(1, teacher_input="student")
    student = student_of(method)
    rollout = method.unroll(student, batch())
    memories = teacher(1)(rollout.inputs_BTCHW, num_input_frames=5, num_frames=6).memories
    expected = sum(
        (rollout.imitations[k][0] - memories[k]).square().mean().item() for k in range(2)
    )
    assert losses["student"] == pytest.approx(expected, rel=1e-5)


def test_padding_counts_for_nothing() -> None:
    given = batch(3)
    padded = TrainingBatch(
        frames_BTCHW=torch.cat([given.frames_BTCHW, torch.ones(1, 6, 1, 16, 16)]),
        observed_BTCHW=None,
        sampling_mask_BT=torch.cat([given.sampling_mask_BT, torch.ones(1, 2, dtype=torch.bool)]),
        weights_B=torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]),
    )
    method = tmu_method(1)
    student = student_of(method)
    torch.testing.assert_close(
        method.loss(student, padded).total(), method.loss(student, given).total()
    )


def test_liveness_reports_and_leaves_no_trace() -> None:
    method = tmu_method(1, 2)
    student = student_of(method)
    report = method.liveness(student, batch())
    assert report is not None
    assert report.teaching_gradient_norm > 0
    assert len(report.gate_means) == len(report.memory_correlation) == 2
    assert all(0 < gate < 1 for layer in report.gate_means for gate in layer)
    assert all(-1 <= c <= 1 for layer in report.memory_correlation for c in layer)
    assert all(p.grad is None for p in student.parameters())


def test_dead_distillation_is_an_error() -> None:
    method = tmu_method(1)
    student = student_of(method)
    # A distiller whose normalisation has gain 0 imitates a constant: nothing flows back.
    for layer in student.stack.layers:
        layer.transfer.distiller_norm.gain.requires_grad_(False).zero_()
        layer.transfer.distiller_norm.shift.requires_grad_(False)
    with pytest.raises(DeadDistillationError, match="teach nothing"):
        method.liveness(student, batch())


def test_loss_terms_cannot_be_forgotten() -> None:
    one = torch.tensor(1.0)
    method = tmu_method(1)
    rollout = method.unroll(student_of(method), batch())
    terms = LossTerms(terms={"prediction": Term(one), "a": Term(one, 0.5)}, rollout=rollout)
    assert terms.total().item() == 1.5
    assert terms.to_log() == {"loss/prediction": 1.0, "loss/a": 1.0, "loss/total": 1.5}
    more = terms.with_terms({"b": Term(one, 2.0), "unused": Term(one * torch.nan, 0.0)})
    assert more.total().item() == 3.5 and more.rollout is rollout
    assert set(terms.terms) == {"prediction", "a"}
