"""Attentive recurrent transfer (Cui et al., ICLR 2019; Table 1): teachers stay at test time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from tmu_dist.config import AdapterConfig, ARTConfig
from tmu_dist.models.attention import Merged, StateMerge
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.bank import FrozenTeacher
from tmu_dist.teachers.card import TeacherCard, TeacherError
from tmu_dist.teachers.sourced import SourcedPredictor
from tmu_dist.transfer.base import (
    DeadDistillationError,
    Forward,
    Liveness,
    LossTerms,
    Task,
    TrainingBatch,
    TransferMethod,
    gradient_norm,
    is_negligible,
)


class AttentiveTransfer(TransferMethod):
    """A plain student whose states are merged with its teachers' before every step.

    It minimises the prediction error alone; the teachers are frozen parts of the network.

    Args:
        task: what the student learns.
        settings: of the merges.
        adapter: the differences between teachers and student that are wanted.
        teachers: the sources and their cards, which the student's card keeps.

    Raises:
        TeacherError: a teacher's states have another number of channels.
    """

    def __init__(
        self,
        task: Task,
        *,
        settings: ARTConfig,
        adapter: AdapterConfig,
        teachers: Sequence[tuple[TeacherCard, FrozenTeacher]],
    ) -> None:
        super().__init__(task)
        self.settings = settings
        self.adapter = adapter
        self.teachers = tuple(teachers)
        for card, teacher in self.teachers:
            _check_channels(card, teacher)

    @property
    def unsteady(self) -> str | None:
        if any(card.model.cell == "vpn" for card, _ in self.teachers):
            return "a teacher with model.cell=vpn decides its pixels one after the other"
        return self.task.objective.unsteady

    def build_student(self) -> Predictor:
        network = build_predictor(self.task.frame, self.task.model)
        return SourcedPredictor(network, [source for _, source in self.teachers], self.settings)

    def plain_part(self, student: Predictor) -> nn.Module:
        return _sourced(student).network

    def describe(self, card: TeacherCard) -> TeacherCard:
        sources = tuple(card for card, _ in self.teachers)
        return replace(card, sources=sources, art=self.settings, adapter=self.adapter)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        rollout = self.unroll(forward, batch)
        return self.own_terms(rollout, batch)

    def liveness(self, trainee: nn.Module, batch: TrainingBatch) -> Liveness | None:
        """How much the merges change, and the gradient of the weights that read the sources.

        Those weights have none if the sources say nothing but zeros, or nobody listens. A batch
        from which nothing at all is learned, as where nothing was observed, is passed over.
        """
        student = _sourced(trainee)
        readers = [merge.of_source.weight for layer in _by_layer(student) for merge in layer]
        with _updates(student) as means:
            total = self.loss(trainee, batch).total()
        read = gradient_norm(total, readers)
        predicted = gradient_norm(total, student.network.parameters())
        if predicted == 0:
            return None
        if is_negligible(read, predicted):
            raise DeadDistillationError(
                f"The weights that read the teachers' states have a gradient of norm {read:.3g} "
                f"(the student's own: {predicted:.3g}), so nothing is transferred. Check that the "
                "teachers are trained networks, and that training.rates does not freeze the merges."
            )
        return ARTLiveness(
            teaching_gradient_norm=read,
            prediction_gradient_norm=predicted,
            merge_means=[sum(layer) / len(layer) for layer in means],
        )


@dataclass(frozen=True, kw_only=True)
class ARTLiveness(Liveness):
    """What the merges do; the teaching gradient is that of the weights that read the sources."""

    merge_means: list[float]
    """By layer, the mean of z: how much of a merged state is new (0: the student's own)."""


def _check_channels(card: TeacherCard, teacher: FrozenTeacher) -> None:
    wrong = [
        f"layer {k}: teacher {plan.teacher.channels}, student {plan.student.channels}"
        for k, plan in teacher.plan.layers.items()
        if plan.is_projected
    ]
    if wrong:
        raise TeacherError(
            f"Teacher {card.name!r} has other hidden channels ({'; '.join(wrong)}), and "
            "transfer.method=art takes its states into the student's as they are: change "
            "model.hidden_channels, or transfer.method (transfer.adapter.channels=project works "
            "with tmu and distillation)."
        )


def _sourced(student: nn.Module) -> SourcedPredictor:
    assert isinstance(student, SourcedPredictor)
    return student


def _by_layer(student: SourcedPredictor) -> list[list[StateMerge]]:
    return [[merge for chain in each.values() for merge in chain] for each in student.merges]


@contextmanager
def _updates(student: SourcedPredictor) -> Iterator[list[list[float]]]:
    """By layer, the mean z of every merge that is done meanwhile."""
    means: list[list[float]] = [[] for _ in student.merges]
    handles = [
        merge.register_forward_hook(partial(_note, means[k]))
        for k, merges in enumerate(_by_layer(student))
        for merge in merges
    ]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


def _note(means: list[float], merge: nn.Module, seen: object, merged: Merged) -> None:
    """A hook after a merge."""
    means.append(float(merged.update_BPHW.detach().mean()))
