"""The contract of transfer methods notices what it is for: each broken method fails its check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contracts import test_transfer_method as contract
from tests.transfer_methods import CASES, case_of
from tmu_dist.config import RunConfig
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.teachers.bank import Teaching
from tmu_dist.transfer import prepare
from tmu_dist.transfer.base import (
    Forward,
    LossTerms,
    Term,
    TrainingBatch,
    TransferMethod,
    reduce_squares,
    weighted,
)
from tmu_dist.transfer.distillation import Distillation
from tmu_dist.transfer.knowledge_flow import KnowledgeFlow
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.tmu import MemoryDistillation


class DropsItsTerm(MemoryDistillation):
    """The distillation is computed and then forgotten."""

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        terms = super().loss(forward, batch)
        return replace(terms, terms={"prediction": terms.terms["prediction"]})


class DetachesItsTerm(MemoryDistillation):
    """The distillation is in the log, and has no gradient."""

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        terms = super().loss(forward, batch)
        value, weight = terms.terms["distillation"]
        return terms.with_terms({"distillation": Term(value.detach(), weight)})


class LeaksMissingPixels(MemoryDistillation):
    """A term that forgets the mask."""

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        return super().loss(forward, replace(batch, observed_BTCHW=None))


class CountsMissingPixels(Scratch):
    """A term of all that is predicted, with no eye for what can be known."""

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        terms = super().loss(forward, batch)
        sizes_B = reduce_squares(terms.rollout.predictions_BTCHW, "mean")
        return terms.with_terms({"size": Term(weighted(sizes_B, batch))})


class LearnsFromPadding(MemoryDistillation):
    """All sequences count alike."""

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        return super().loss(forward, replace(batch, weights_B=torch.ones(4) / 4))


class KnowsTheFuture(Scratch):
    """Every step is shown the frame that it is to predict."""

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        return super().loss(forward, replace(batch, frames_BTCHW=batch.frames_BTCHW.roll(-1, 1)))


class TrainsItsTeachers(MemoryDistillation):
    """The teachers are trained beside the student."""

    def trainee(self, student: Predictor) -> nn.Module:
        teachers = nn.ModuleList(self.bank.own)
        return Beside(student, teachers.requires_grad_(True))


class TrainsCopiesOfItsTeachers(MemoryDistillation):
    """The same with copies, which identity does not show."""

    def trainee(self, student: Predictor) -> nn.Module:
        teachers = nn.ModuleList(self.bank.own)
        return Beside(student, copy.deepcopy(teachers).requires_grad_(True))


class ChangesItsTeachers(MemoryDistillation):
    """A teacher forgets a little whenever it teaches."""

    def teach(self, batch: TrainingBatch, rollout: Rollout | None = None) -> tuple[Teaching, ...]:
        first = next(self.bank.own[0].parameters())
        first.mul_(0.999)
        return super().teach(batch, rollout)


class KeepsItsTeachers(MemoryDistillation):
    """The tested network still holds a teacher."""

    def build_student(self) -> Predictor:
        student = super().build_student()
        student.kept = self.bank.own[0]
        return student


class FlowKeepsItsTeachers(KnowledgeFlow):
    """The same where the tested network should be the plain one."""

    def build_student(self) -> Predictor:
        student = super().build_student()
        student.kept = self.bank.own[0]
        return student


class IgnoresItsTeachers(MemoryDistillation):
    """Whatever a teacher remembers, the student is taught the same."""

    def teach(self, batch: TrainingBatch, rollout: Rollout | None = None) -> tuple[Teaching, ...]:
        return tuple(map(_constant, super().teach(batch, rollout)))


class IgnoresTheSecond(MemoryDistillation):
    """The first teacher teaches in the second one's place."""

    def teach(self, batch: TrainingBatch, rollout: Rollout | None = None) -> tuple[Teaching, ...]:
        taught = super().teach(batch, rollout)
        return (taught[0],) * len(taught)


class Draws(MemoryDistillation):
    """Random numbers are drawn, if only to multiply them by a weight of 0."""

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        torch.rand(())
        return super().loss(forward, batch)


class RunsItsTeachersForNothing(MemoryDistillation):
    """The teachers run with beta 0, too."""

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        terms = super().loss(forward, batch)
        self.teach(batch, terms.rollout)
        return terms


class DrawsFirst(Distillation):
    """The plain network is not the first thing that is initialised."""

    def build_student(self) -> Predictor:
        torch.rand(())
        return super().build_student()


class IsNeverOff(MemoryDistillation):
    """With beta 0 the student starts from other weights than its twin."""

    def build_student(self) -> Predictor:
        torch.rand(())
        return super().build_student()


class Forgets(Scratch):
    """What it counts beside the student does not reach the checkpoint."""

    def trainee(self, student: Predictor) -> nn.Module:
        return Counting(student)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        assert isinstance(forward, Counting)
        forward.count += 1
        rollout = self.unroll(forward, batch)
        terms = self.task.objective.terms(rollout, batch)
        return LossTerms(
            terms={k: Term(v.value, 1 + float(forward.count)) for k, v in terms.items()},
            rollout=rollout,
        )


class HasAnIdleParameter(Scratch):
    """A parameter that nothing depends on, which data-parallel training would wait for."""

    def trainee(self, student: Predictor) -> nn.Module:
        return Beside(student, nn.Linear(1, 1))


class Beside(nn.Module):
    """A student with something beside it that does not take part."""

    def __init__(self, student: Predictor, other: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.other = other

    def forward(self, *arguments: Any, **more: Any) -> Rollout:
        rollout: Rollout = self.student(*arguments, **more)
        return rollout


class Counting(Beside):
    """A student with a counter that is not saved."""

    count: Tensor

    def __init__(self, student: Predictor) -> None:
        super().__init__(student, nn.Identity())
        self.register_buffer("count", torch.zeros(()), persistent=False)


def _constant(taught: Teaching) -> Teaching:
    return taught.map(torch.zeros_like)


Check = Callable[[RunConfig], None]


@pytest.fixture
def broken(
    monkeypatch: pytest.MonkeyPatch, tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> Callable[..., RunConfig]:
    """Put a broken method in the place of the one that it is made of; the run of a case with it."""

    def put(kind: type[TransferMethod], name: str = "tmu", **changes: Any) -> RunConfig:
        monkeypatch.setattr(prepare, kind.__mro__[1].__name__, kind)
        return case_of(tiny_config, name, teacher_runs, **changes)

    return put


def test_terms_that_do_not_count(broken: Callable[..., RunConfig]) -> None:
    with pytest.raises(AssertionError, match="distillation"):
        contract.check_every_term_counts(broken(DropsItsTerm), CASES["tmu"])
    with pytest.raises(AssertionError, match="changes nothing"):
        contract.check_every_term_counts(broken(DetachesItsTerm), CASES["tmu"])


@pytest.mark.parametrize(
    ("kind", "place"),
    [(DropsItsTerm, 0), (DetachesItsTerm, 0), (IgnoresItsTeachers, 0), (IgnoresTheSecond, 1)],
)
def test_teachers_that_do_not_matter(
    kind: type[TransferMethod],
    place: int,
    broken: Callable[..., RunConfig],
    teacher_runs: tuple[str, str],
) -> None:
    with pytest.raises(AssertionError, match=f"teacher {place} does not matter"):
        contract.check_every_teacher_matters(broken(kind), teacher_runs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TrainsItsTeachers, "an optimiser holds a teacher"),
        (TrainsCopiesOfItsTeachers, "an optimiser holds a teacher's weights"),
        (ChangesItsTeachers, "training changes a teacher"),
    ],
)
def test_teachers_that_are_not_frozen(
    kind: type[TransferMethod], message: str, broken: Callable[..., RunConfig]
) -> None:
    with pytest.raises(AssertionError, match=message):
        contract.check_teachers_stay_frozen(broken(kind))


@pytest.mark.parametrize(
    ("kind", "name"), [(KeepsItsTeachers, "tmu"), (FlowKeepsItsTeachers, "knowledge_flow")]
)
def test_teachers_that_stay_in_the_tested_network(
    kind: type[TransferMethod], name: str, broken: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="not what it should be"):
        contract.check_test_network(broken(kind, name), CASES[name], tmp_path / "gone")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(RunsItsTeachersForNothing, "are run all the same"), (IsNeverOff, "not the twin's")],
)
def test_transfer_that_cannot_be_switched_off(
    kind: type[TransferMethod],
    message: str,
    broken: Callable[..., RunConfig],
    tiny_config: RunConfig,
    teacher_runs: tuple[str, str],
) -> None:
    twin = case_of(tiny_config, "tmu_scratch", teacher_runs)
    with pytest.raises(AssertionError, match=message):
        contract.check_off_is_the_twin(broken(kind, beta=0.0), twin)


def test_random_draws(broken: Callable[..., RunConfig]) -> None:
    with pytest.raises(AssertionError, match="draws random numbers"):
        contract.check_nothing_is_drawn(broken(Draws, beta=0.0))


def test_state_beside_the_student_that_is_not_saved(broken: Callable[..., RunConfig]) -> None:
    with pytest.raises(AssertionError):
        contract.check_resume(broken(Forgets, "scratch"))


def test_parameters_without_a_gradient(broken: Callable[..., RunConfig]) -> None:
    with pytest.raises(AssertionError, match="no gradient at step 2"):
        contract.check_every_parameter_learns(broken(HasAnIdleParameter, "scratch"))


def test_missing_pixels_that_are_learned_from(broken: Callable[..., RunConfig]) -> None:
    with pytest.raises(AssertionError, match="learned from"):
        contract.check_missing_pixels_leave_no_trace(broken(LeaksMissingPixels))
    with pytest.raises(AssertionError, match="missing pixels count"):
        contract.check_missing_pixels_leave_no_trace(broken(CountsMissingPixels, "scratch"))


def test_padding_that_is_learned_from(broken: Callable[..., RunConfig]) -> None:
    with pytest.raises(AssertionError, match="padding is learned from"):
        contract.check_padding_leaves_no_trace(broken(LearnsFromPadding))


def test_frames_that_are_known_too_early(broken: Callable[..., RunConfig]) -> None:
    with pytest.raises(AssertionError, match="later frames are known"):
        contract.check_nothing_comes_from_later_frames(broken(KnowsTheFuture, "scratch"))


def test_other_first_weights(
    broken: Callable[..., RunConfig], tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    scratch = case_of(tiny_config, "scratch", teacher_runs)
    with pytest.raises(AssertionError, match="other first weights"):
        contract.check_plain_part_starts_like_scratch(broken(DrawsFirst, "distillation"), scratch)
