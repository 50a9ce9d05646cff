"""Plain distillation of features and responses: a control (Hinton et al. 2015; FitNets 2015).

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tmu_dist.config import ConfigError, DistillationConfig, ImitationConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor, Rollout, StateName
from tmu_dist.teachers.adapter import LayerPlan
from tmu_dist.teachers.bank import TeacherBank, Teaching
from tmu_dist.transfer.base import (
    Forward,
    Liveness,
    LossTerms,
    Task,
    TaughtMethod,
    Term,
    TrainingBatch,
    reduce_squares,
    weighted,
)
from tmu_dist.transfer.imitation import (
    Comparison,
    Projections,
    any_observed,
    correlation,
    teaching_norms,
)


class Distillation(TaughtMethod):
    """The plain network, pulled towards its teachers' states and predictions; no new unit.

    Features (FitNets, Eq. 3): the squared distance of the student's states, regressed to each
    teacher's channels, from the teacher's. Responses: that of the student's predictions from each
    teacher's, which is the divergence of their outputs (Hinton et al. 2015) for frames that are
    Gaussian with one variance. With both weights 0 the teachers are not run, and training equals
    `scratch` bit for bit.

    Args:
        task, bank, teacher_input: as in `TaughtMethod`.
        settings: the two weights, and which states are compared.
        imitation: layers and teachers of the comparison, and missing pixels of the features.

    Raises:
        ConfigError: layers that the student has not; responses that cannot be compared.
    """

    def __init__(
        self,
        task: Task,
        *,
        settings: DistillationConfig,
        imitation: ImitationConfig,
        bank: TeacherBank,
        teacher_input: Literal["own", "student", "truth"],
    ) -> None:
        super().__init__(task, bank=bank, teacher_input=teacher_input)
        self.settings = settings
        self.comparison = Comparison(imitation, bank.plans, task.objective.reduction)
        if settings.responses:
            self._check_responses()

    @property
    def unsteady(self) -> str | None:
        return self.task.objective.unsteady

    def build_student(self) -> Predictor:
        return build_predictor(self.task.frame, self.task.model)

    def trainee(self, student: Predictor) -> nn.Module:
        """The student, and a regressor for each teacher and compared layer."""
        if not self.settings.features:
            return student
        layers = {
            (k, m): plan.layers[k]
            for m, plan in enumerate(self.bank.plans)
            for k in self.comparison.shapes
        }
        return RegressedStudent(student, layers, self.settings.state)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        rollout = self.unroll(forward, batch)
        terms = self.own_terms(rollout, batch)
        if not self.teaches_at(batch):
            return terms
        return terms.with_terms(self._taught(rollout, self.teach(batch, rollout), batch))

    def teaches_at(self, batch: TrainingBatch) -> bool:
        return self.settings.features > 0 or self.settings.responses > 0

    def _taught(
        self, rollout: Rollout, teachings: Sequence[Teaching], batch: TrainingBatch
    ) -> dict[str, Term]:
        settings, found = self.settings, {}
        if settings.features:
            distance = self.comparison.distance(
                rollout.imitations, teachings, settings.state, batch
            )
            found["features"] = Term(distance, settings.features)
        if settings.responses:
            found["responses"] = Term(
                self._response_distance(rollout, teachings, batch), settings.responses
            )
        return found

    def _response_distance(
        self, rollout: Rollout, teachings: Sequence[Teaching], batch: TrainingBatch
    ) -> Tensor:
        """Squared distance of frames 2..T from the teachers', masked like the frame loss."""
        observed = batch.observed_targets_BTCHW
        parts_B = [
            weight
            * reduce_squares(
                rollout.predictions_BTCHW - _response(taught), self.comparison.reduction, observed
            )
            for taught, weight in zip(teachings, self.comparison.weights, strict=True)
        ]
        return weighted(torch.stack(parts_B).sum(0), batch)

    def liveness(self, trainee: nn.Module, batch: TrainingBatch) -> Liveness | None:
        settings = self.settings
        features = settings.features > 0 and self.comparison.counts(batch)
        responses = settings.responses > 0 and any_observed(batch, slice(1, None))
        if not (features or responses):
            return None
        rollout = self.unroll(trainee, batch)
        teachings = self.teach(batch, rollout)
        taught = LossTerms(terms=self._taught(rollout, teachings, batch), rollout=rollout)
        own = self.own_terms(rollout, batch)
        teaching_norm, own_norm = teaching_norms(
            taught.total(),
            own.total(),
            trainee.student if isinstance(trainee, RegressedStudent) else trainee,
            weights=f"transfer.distillation.features={settings.features:g} or "
            f"responses={settings.responses:g}",
        )
        observed = batch.observed_targets_BTCHW
        return DistillationLiveness(
            teaching_gradient_norm=teaching_norm,
            prediction_gradient_norm=own_norm,
            feature_correlation=self.comparison.correlations(
                rollout.imitations, teachings, settings.state, batch
            )
            if features
            else [],
            response_correlation=[
                correlation(rollout.predictions_BTCHW, _response(taught), observed)
                for taught in teachings
            ]
            if responses
            else [],
        )

    def _check_responses(self) -> None:
        if self.task.objective.frame_loss == "likelihood":
            raise ConfigError(
                f"model.cell={self.task.model.cell} has no differentiable forecasts: "
                "transfer.distillation.responses cannot have an effect. Leave it 0 and use "
                "transfer.distillation.features."
            )
        if others := [m for m, plan in enumerate(self.bank.plans) if plan.frame is not None]:
            raise ConfigError(
                f"The teachers {others} (from 0) predict frames of another shape than the "
                f"student's {self.task.frame} (transfer.adapter.frames=resize), so "
                "transfer.distillation.responses cannot compare them: set it to 0, or use "
                "teachers of the student's frames."
            )


@dataclass(frozen=True, kw_only=True)
class DistillationLiveness(Liveness):
    """How near a student is to its teachers."""

    feature_correlation: list[list[float]]
    """Pearson correlation of regressed and teacher's state, by compared layer, then by teacher;
    empty without features."""
    response_correlation: list[float]
    """Of the student's and each teacher's predictions; empty without responses."""


class RegressedStudent(nn.Module):
    """A student beside the regressors that bring its states to each teacher's channels.

    Args:
        student: the network, which is trained and offered.
        layers: what is compared, by layer of the student and teacher.
        state: of the student that is regressed.
    """

    def __init__(
        self, student: Predictor, layers: Mapping[tuple[int, int], LayerPlan], state: StateName
    ) -> None:
        super().__init__()
        self.student = student
        self.regressors = Projections(layers)
        self.state = state
        self._num_teachers = Counter(k for k, _ in layers)

    def forward(self, frames_BTCHW: Tensor, **arguments: Any) -> Rollout:
        """The student's rollout, with its regressed states as imitations of each teacher's."""
        rollout: Rollout = self.student(frames_BTCHW, **arguments)
        states = rollout.states(self.state)
        imitations = {k: (states[k],) * count for k, count in self._num_teachers.items()}
        return rollout._replace(imitations=self.regressors(imitations))


def _response(taught: Teaching) -> Tensor:
    assert taught.predictions_BTCHW is not None
    return taught.predictions_BTCHW
