"""Memory transfer: the paper's method (Eqs. 3-6).

Legend: B batch, T time, M teachers, P hidden channels, H, W height, width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import FrameShape, build_predictor
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.teachers.bank import Memories, TeacherBank
from tmu_dist.transfer.base import (
    DeadDistillationError,
    Forward,
    Liveness,
    LossTerms,
    Reduction,
    TrainingBatch,
    TransferMethod,
    observed_share,
    reduce_squares,
    weighted,
)


class MemoryDistillation(TransferMethod):
    """A TMU student whose memories imitate those of M frozen teachers.

    The objective is Eq. 6: prediction error plus beta times the distance between imitations and
    teacher memories, summed over teachers and layers (Eq. 4). With beta = 0 the teachers are not
    run, and training equals the same network without teachers bit for bit.

    Args:
        bank: the frozen teachers' memories.
        teacher_input: what a teacher reads where the sampling mask hides the true frame: its
            "own" prediction, the "student"'s input, or the "truth" all the same.
    """

    def __init__(
        self,
        frame: FrameShape,
        model: ModelConfig,
        *,
        tmu: TMUConfig,
        bank: TeacherBank,
        beta: float,
        teacher_input: Literal["own", "student", "truth"],
        num_input_frames: int,
        reduction: Reduction,
    ) -> None:
        super().__init__(num_input_frames=num_input_frames, reduction=reduction)
        self.frame = frame
        self.model = model
        self.tmu = tmu
        self.bank = bank
        self.beta = beta
        self.teacher_input = teacher_input

    def build_student(self) -> Predictor:
        num_slots = len(self.bank.parameters_per_teacher)
        return build_predictor(self.frame, self.model, tmu=self.tmu, num_slots=num_slots)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        rollout = self.unroll(forward, batch)
        prediction = self.prediction_loss(rollout, batch)
        if not self.beta:
            return LossTerms(prediction=prediction)
        return LossTerms(
            prediction=prediction,
            extra={"distillation": self._distillation(rollout, self._teach(rollout, batch), batch)},
            weights={"distillation": self.beta},
        )

    def _teach(self, rollout: Rollout, batch: TrainingBatch) -> Memories:
        """The teachers' memories for this batch."""
        frames, mask = batch.frames_BTCHW, batch.sampling_mask_BT
        if self.teacher_input == "student":
            frames = rollout.inputs_BTCHW.detach()
        if self.teacher_input != "own":
            mask = torch.ones_like(mask)
        return self.bank.memories(
            frames,
            num_input_frames=self.num_input_frames,
            num_frames=batch.frames_BTCHW.shape[1],
            sampling_mask_BT=mask,
        )

    def _distillation(self, rollout: Rollout, memories: Memories, batch: TrainingBatch) -> Tensor:
        """Eq. 4, summed over TMU layers and teachers; time is reduced like pixels are.

        An element of a memory counts as much as its patch was observed (`observed_share`).
        """
        share_BT1HW = self._observed_share(batch)
        per_sequence_B = torch.stack(
            [
                reduce_squares(imitations_BTMPHW[:, :, m] - memory[k], self.reduction, share_BT1HW)
                for k, imitations_BTMPHW in rollout.imitations.items()
                for m, memory in enumerate(memories)
            ]
        ).sum(0)
        return weighted(per_sequence_B, batch)

    def _observed_share(self, batch: TrainingBatch) -> Tensor | None:
        """What each memory element of steps 1..T-1 counts, [B, T-1, 1, h, w]; None: 1."""
        if batch.observed_BTCHW is None:
            return None
        dtype = batch.frames_BTCHW.dtype
        return observed_share(batch.observed_BTCHW[:, :-1], self.model.patch_size, dtype)

    def liveness(self, student: Predictor, batch: TrainingBatch) -> Liveness | None:
        share_BT1HW = self._observed_share(batch)
        if not self.beta or _nothing_counts(share_BT1HW, batch):
            return None
        rollout = self.unroll(student, batch, diagnostics=True)
        memories = self._teach(rollout, batch)
        distillation = self.beta * self._distillation(rollout, memories, batch)
        parameters = [p for p in student.parameters() if p.requires_grad]
        distilled = _gradient_norm(distillation, parameters)
        predicted = _gradient_norm(self.prediction_loss(rollout, batch), parameters)
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
        return Liveness(
            distillation_gradient_norm=distilled,
            prediction_gradient_norm=predicted,
            gate_means=diagnostics.transfer_gates_BTLM.mean((0, 1)).tolist(),
            memory_correlation=[
                [
                    _correlation(imitations[:, :, m], memory[k], share_BT1HW)
                    for m, memory in enumerate(memories)
                ]
                for k, imitations in rollout.imitations.items()
            ],
            forget_gate_means=diagnostics.forget_gates_BTK.mean((0, 1)).tolist(),
            memory_rms=diagnostics.memory_rms_BTK.square().mean((0, 1)).sqrt().tolist(),
        )


def _gradient_norm(loss: Tensor, parameters: list[torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _nothing_counts(share_BT1HW: Tensor | None, batch: TrainingBatch) -> bool:
    """Whether no frame that is read has an observed pixel, so that nothing can be distilled."""
    return share_BT1HW is not None and not weighted(share_BT1HW.flatten(1).sum(1), batch) > 0


def _correlation(first: Tensor, second: Tensor, weights: Tensor | None) -> float:
    """Pearson correlation over all elements; NaN when one of them is constant."""
    a, b = first.detach().double(), second.double()
    w = torch.ones_like(a) if weights is None else weights.double().expand_as(a)
    a, b = ((x - (w * x).sum() / w.sum()) * w.sqrt() for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()))
