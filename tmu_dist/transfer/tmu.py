"""Memory transfer: the paper's method (Eqs. 3-6).

Legend: B batch, T time, L TMU layers, M teachers, K layers, C channels, H, W height, width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from tmu_dist.config import BetaSchedule, ImitationConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.rollout import Predictor, Rollout, StateName
from tmu_dist.models.tmu import MemoryTransfer
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
)
from tmu_dist.transfer.imitation import Comparison, Projections, teaching_norms


class MemoryDistillation(TaughtMethod):
    """A TMU student whose memories imitate those of M frozen teachers, of any kind.

    The objective is Eq. 6: prediction error plus beta times the distance between imitations and
    teacher memories, summed over teachers and layers (Eq. 4). With beta = 0 the teachers are not
    run, and training equals the same network without teachers bit for bit.

    Args:
        task, bank, teacher_input: as in `TaughtMethod`.
        tmu: settings of the TMU layers.
        beta: weight of the distillation.
        beta_schedule: how that weight changes with the iterations; None: not at all.
        imitation: what counts how much in Eq. 4; None: everything alike.
        starts_from_memories: whether the distillers' normalisations begin with the statistics of
            the teachers' memories (`begin`).

    Raises:
        ConfigError: layers to compare that the student has not.
    """

    def __init__(
        self,
        task: Task,
        *,
        tmu: TMUConfig,
        bank: TeacherBank,
        teacher_input: Literal["own", "student", "truth"],
        beta: float,
        beta_schedule: BetaSchedule | None = None,
        imitation: ImitationConfig | None = None,
        starts_from_memories: bool = False,
    ) -> None:
        super().__init__(task, bank=bank, teacher_input=teacher_input)
        self.tmu = tmu
        self.beta = beta
        self.beta_schedule = beta_schedule or BetaSchedule()
        self.starts_from_memories = starts_from_memories
        self.comparison = Comparison(
            imitation or ImitationConfig(), bank.plans, task.objective.reduction
        )
        self._projected = {
            (k, m): layer
            for m, plan in enumerate(bank.plans)
            for k, layer in plan.layers.items()
            if layer.is_projected and k in self.comparison.shapes
        }

    @property
    def teaches(self) -> bool:
        """Whether there is any distillation at any time."""
        return self.beta > 0 or self.beta_schedule.final > 0

    @property
    def unsteady(self) -> str | None:
        if self.beta_schedule.shape != "constant":
            return "transfer.beta_schedule changes the weight of the distillation"
        return self.task.objective.unsteady

    def build_student(self) -> Predictor:
        num_slots = len(self.bank.plans)
        task = self.task
        return build_predictor(task.frame, task.model, tmu=self.tmu, num_slots=num_slots)

    def trainee(self, student: Predictor) -> nn.Module:
        """The student, and a projection for each teacher and layer whose channels differ."""
        # Without distillation they would be parameters without a gradient.
        if not self.teaches or not self._projected:
            return student
        return ProjectedStudent(student, self._projected, zigzag=self.tmu.zigzag)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        rollout = self.unroll(forward, batch)
        terms = self.own_terms(rollout, batch)
        if not self.teaches_at(batch):
            return terms
        distillation = self._distillation(rollout, self.teach(batch, rollout), batch)
        return terms.with_terms({"distillation": Term(distillation, self._beta(batch))})

    def teaches_at(self, batch: TrainingBatch) -> bool:
        # While beta is 0 only projections need the teachers, for a gradient of zeros.
        return self._beta(batch) > 0 or (self.teaches and bool(self._projected))

    def _beta(self, batch: TrainingBatch) -> float:
        return self.beta_schedule.at(batch.step, self.beta)

    def begin(self, trainee: nn.Module, batch: TrainingBatch) -> None:
        """Give imitations the means and the spread of the teachers' memories of a batch.

        With random weights a normalisation makes them as large as 1, whatever a teacher's are, and
        the first updates go into bringing them there.
        """
        if not (self.starts_from_memories and self.teaches):
            return
        counts_B = batch.weights_B > 0
        teachings = self.teach(batch, self.unroll(trainee, batch))
        for layer in trainee.modules():
            if not isinstance(layer, RecurrentLayer) or layer.number not in self.comparison.shapes:
                continue
            transfers: dict[StateName, MemoryTransfer | None] = {
                "memory": layer.transfer,
                "zigzag": layer.transfer_zigzag,
            }
            for state, transfer in transfers.items():
                if transfer is not None:
                    taught = [teaching.states[state][layer.number] for teaching in teachings]
                    transfer.start_from([each[counts_B].flatten(0, 1) for each in taught])

    def _distillation(
        self, rollout: Rollout, teachings: Sequence[Teaching], batch: TrainingBatch
    ) -> Tensor:
        """Eq. 4, summed over layers and teachers; the same of ST-LSTM's M where it is imitated."""
        distance = self.comparison.distance(rollout.imitations, teachings, "memory", batch)
        if not self.tmu.zigzag:
            return distance
        return distance + self.comparison.distance(
            rollout.zigzag_imitations, teachings, "zigzag", batch
        )

    def liveness(self, trainee: nn.Module, batch: TrainingBatch) -> Liveness | None:
        beta = self._beta(batch)
        if not (beta and self.comparison.counts(batch)):
            return None
        rollout = self.unroll(trainee, batch, diagnostics=True)
        teachings = self.teach(batch, rollout)
        own = self.own_terms(rollout, batch)
        distilled, predicted = teaching_norms(
            beta * self._distillation(rollout, teachings, batch),
            own.total(),
            trainee.student if isinstance(trainee, ProjectedStudent) else trainee,
            weights=f"transfer.beta={beta:g} (at iteration {batch.step})",
        )
        diagnostics = rollout.diagnostics
        assert diagnostics is not None and diagnostics.transfer_gates_BTLM is not None
        correlations = self.comparison.correlations
        return MemoryLiveness(
            teaching_gradient_norm=distilled,
            prediction_gradient_norm=predicted,
            gate_means=diagnostics.transfer_gates_BTLM.mean((0, 1)).tolist(),
            memory_correlation=correlations(rollout.imitations, teachings, "memory", batch),
            zigzag_correlation=correlations(rollout.zigzag_imitations, teachings, "zigzag", batch)
            if self.tmu.zigzag
            else [],
            forget_gate_means=[
                None if math.isnan(mean) else mean
                for mean in diagnostics.forget_gates_BTK.mean((0, 1)).tolist()
            ],
            memory_rms=diagnostics.memory_rms_BTK.square().mean((0, 1)).sqrt().tolist(),
        )


@dataclass(frozen=True, kw_only=True)
class MemoryLiveness(Liveness):
    """What the distillation term does to a TMU student."""

    gate_means: list[list[float]]
    """Mean transfer gate by TMU layer, then by teacher."""
    memory_correlation: list[list[float]]
    """Pearson correlation of imitation and teacher memory, by compared layer, then by teacher."""
    zigzag_correlation: list[list[float]] = field(default_factory=list)
    """The same of ST-LSTM's M; empty where it is not imitated."""
    forget_gate_means: list[float | None]
    """By layer; None where the cell has no such gate."""
    memory_rms: list[float]
    """By layer; Eq. 5 lets it grow with the number of teachers and time."""


class ProjectedStudent(nn.Module):
    """A student whose imitations are compared in the teachers' own channels.

    A projection stands behind the distiller of every teacher and layer whose memory has another
    number of channels. It changes the imitation for the loss alone: what the transfer gates let
    into the student's memory stays in the student's channels.

    Args:
        student: the network, which is trained and offered.
        layers: what is projected, by layer of the student and teacher.
        zigzag: whether ST-LSTM's M is imitated, too; it has projections of its own.
    """

    def __init__(
        self, student: Predictor, layers: Mapping[tuple[int, int], LayerPlan], *, zigzag: bool
    ) -> None:
        super().__init__()
        self.student = student
        self.projections = Projections(layers)
        self.zigzag_projections = Projections(layers) if zigzag else None

    def forward(self, frames_BTCHW: Tensor, **arguments: Any) -> Rollout:
        """The student's rollout with its imitations projected; as `Predictor.forward`."""
        rollout: Rollout = self.student(frames_BTCHW, **arguments)
        rollout = rollout._replace(imitations=self.projections(rollout.imitations))
        if self.zigzag_projections is None:
            return rollout
        projected = self.zigzag_projections(rollout.zigzag_imitations)
        return rollout._replace(zigzag_imitations=projected)
