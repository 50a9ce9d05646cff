"""Memory transfer: the paper's method (Eqs. 3-6).

Legend: B batch, T time, M teachers, P hidden channels, H, W height, width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tmu_dist.config import BetaSchedule, ImitationConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.teachers.adapter import LayerPlan
from tmu_dist.teachers.bank import TeacherBank, Teaching
from tmu_dist.transfer.base import (
    DeadDistillationError,
    Forward,
    Liveness,
    LossTerms,
    Task,
    TaughtMethod,
    Term,
    TrainingBatch,
    observed_share,
    reduce_squares,
    weighted,
)


class MemoryDistillation(TaughtMethod):
    """A TMU student whose memories imitate those of M frozen teachers, of any kind.

    The objective is Eq. 6: prediction error plus beta times the distance between imitations and
    teacher memories, summed over teachers and layers (Eq. 4). With beta = 0 the teachers are not
    run, and training equals the same network without teachers bit for bit.

    Args:
        task, bank, teacher_input: as in `TaughtMethod`.
        tmu: settings of the TMU layers.
        beta: weight of the distillation.
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
    ) -> None:
        super().__init__(task, bank=bank, teacher_input=teacher_input)
        self.tmu = tmu
        self.beta = beta
        self.beta_schedule = beta_schedule or BetaSchedule()
        self.imitation = imitation or ImitationConfig()

    @property
    def teaches(self) -> bool:
        """Whether there is any distillation at any time."""
        return self.beta > 0 or self.beta_schedule.final > 0

    def _beta(self, batch: TrainingBatch) -> float:
        return self.beta_schedule.at(batch.step, self.beta)

    def build_student(self) -> Predictor:
        num_slots = len(self.bank.plans)
        task = self.task
        return build_predictor(task.frame, task.model, tmu=self.tmu, num_slots=num_slots)

    def trainee(self, student: Predictor) -> nn.Module:
        """The student, and a projection for each teacher and layer whose channels differ."""
        shapes = {
            (k, m): layer
            for m, plan in enumerate(self.bank.plans)
            for k, layer in plan.layers.items()
            if layer.is_projected
        }
        # Without distillation they would be parameters without a gradient.
        if not self.teaches or not shapes:
            return student
        return ProjectedStudent(student, shapes)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        rollout = self.unroll(forward, batch)
        terms = LossTerms(terms=self.task.objective.terms(rollout, batch), rollout=rollout)
        if not self.teaches:
            return terms
        distillation = self._distillation(rollout, self.teach(batch, rollout), batch)
        return terms.with_terms({"distillation": Term(distillation, self._beta(batch))})

    def _distillation(
        self, rollout: Rollout, teachings: Sequence[Teaching], batch: TrainingBatch
    ) -> Tensor:
        """Eq. 4, summed over TMU layers and teachers; time is reduced like pixels are.

        An element of a memory counts as much as its patch was observed (`observed_share`).
        """
        reduction = self.task.objective.reduction
        per_sequence_B = torch.stack(
            [
                reduce_squares(
                    imitation - taught.states["memory"][k],
                    reduction,
                    self._share(batch, imitation, k),
                )
                for k, imitations in rollout.imitations.items()
                for imitation, taught in zip(imitations, teachings, strict=True)
            ]
        ).sum(0)
        return weighted(per_sequence_B, batch)

    def _share(self, batch: TrainingBatch, memory_BTPHW: Tensor, layer: int) -> Tensor | None:
        """What each memory element of steps 1..T-1 counts, [B, T-1, 1, h, w]; None: 1."""
        if batch.observed_BTCHW is None:
            return None
        shape = self.bank.plans[0].layers[layer].student
        return observed_share(batch.observed_BTCHW[:, :-1], memory_BTPHW, shape)

    def liveness(self, trainee: nn.Module, batch: TrainingBatch) -> Liveness | None:
        if not self._beta(batch) or _nothing_counts(batch):
            return None
        rollout = self.unroll(trainee, batch, diagnostics=True)
        teachings = self.teach(batch, rollout)
        distillation = self._beta(batch) * self._distillation(rollout, teachings, batch)
        # Of the student alone: projections could learn from imitations that are constant.
        student = trainee.student if isinstance(trainee, ProjectedStudent) else trainee
        parameters = [p for p in student.parameters() if p.requires_grad]
        distilled = _gradient_norm(distillation, parameters)
        own = LossTerms(terms=self.task.objective.terms(rollout, batch), rollout=rollout).total()
        predicted = _gradient_norm(own, parameters)
        # A gradient this far below the other one cannot move a float32 weight any more.
        if not distilled > 1e-7 * predicted:
            raise DeadDistillationError(
                f"The distillation term gives the student a gradient of norm {distilled:.3g} "
                f"(the prediction term: {predicted:.3g}), so the teachers teach nothing. Check "
                f"that transfer.beta={self.beta:g} is not too small, that the teachers are trained "
                "networks, and that no loss term was dropped."
            )
        diagnostics = rollout.diagnostics
        assert diagnostics is not None and diagnostics.transfer_gates_BTLM is not None
        return MemoryLiveness(
            teaching_gradient_norm=distilled,
            prediction_gradient_norm=predicted,
            gate_means=diagnostics.transfer_gates_BTLM.mean((0, 1)).tolist(),
            memory_correlation=[
                [
                    _correlation(
                        imitation, taught.states["memory"][k], self._share(batch, imitation, k)
                    )
                    for imitation, taught in zip(imitations, teachings, strict=True)
                ]
                for k, imitations in rollout.imitations.items()
            ],
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
    """Pearson correlation of imitation and teacher memory, by TMU layer, then by teacher."""
    forget_gate_means: list[float | None]
    """By layer; None where the cell has no such gate."""
    memory_rms: list[float]
    """By layer; Eq. 5 lets it grow with the number of teachers and time."""


class ProjectedStudent(nn.Module):
    """A student whose imitations are compared in the teachers' own channels.

    A learned 1x1 convolution without bias stands behind the distiller of every teacher and layer
    whose memory has another number of channels. It changes the imitation for the loss alone: what
    the transfer gates let into the student's memory stays in the student's channels. Were the
    teacher's memory projected instead, projecting everything to 0 would be a solution.

    Args:
        student: the network, which is trained and offered.
        layers: what is compared, by layer of the student and teacher.
    """

    def __init__(self, student: Predictor, layers: Mapping[tuple[int, int], LayerPlan]) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleDict(
            {
                _name(k, m): nn.Conv2d(plan.student.channels, plan.teacher.channels, 1, bias=False)
                for (k, m), plan in layers.items()
            }
        )

    def forward(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        sampling_mask_BT: Tensor | None = None,
        noise_BTZ: Tensor | None = None,
        diagnostics: bool = False,
    ) -> Rollout:
        """The student's rollout with its imitations projected; as `Predictor.forward`."""
        rollout = self.student(
            frames_BTCHW,
            num_input_frames=num_input_frames,
            num_frames=num_frames,
            sampling_mask_BT=sampling_mask_BT,
            noise_BTZ=noise_BTZ,
            diagnostics=diagnostics,
        )
        projected = {
            k: tuple(self._project(imitation, _name(k, m)) for m, imitation in enumerate(each))
            for k, each in rollout.imitations.items()
        }
        return rollout._replace(imitations=projected)

    def _project(self, imitation_BTPHW: Tensor, name: str) -> Tensor:
        if name not in self.projections:
            return imitation_BTPHW
        projected_NPHW = self.projections[name](imitation_BTPHW.flatten(0, 1))
        return projected_NPHW.unflatten(0, imitation_BTPHW.shape[:2])


def _name(layer: int, teacher: int) -> str:
    return f"layer{layer}_teacher{teacher}"


def _gradient_norm(loss: Tensor, parameters: list[torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _nothing_counts(batch: TrainingBatch) -> bool:
    """Whether no frame that is read has an observed pixel, so that nothing can be distilled."""
    observed = batch.observed_BTCHW
    if observed is None:
        return False
    return not weighted(observed[:, :-1].flatten(1).sum(1), batch) > 0


def _correlation(first: Tensor, second: Tensor, weights: Tensor | None) -> float:
    """Pearson correlation over all elements; NaN when one of them is constant."""
    a, b = first.detach().double(), second.double()
    w = torch.ones_like(a) if weights is None else weights.double().expand_as(a)
    a, b = ((x - (w * x).sum() / w.sum()) * w.sqrt() for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()))
