"""Training from scratch: the plain network, or the TMU network with unused slots."""

from __future__ import annotations

from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.transfer.base import Forward, LossTerms, Objective, TrainingBatch, TransferMethod


class Scratch(TransferMethod):
    """Random initialisation, prediction loss only (Table 1, first two rows).

    Args:
        num_slots: 0 for the plain network; M for the TMU network of M teachers, whose distillers
            and gates are then trained by the prediction loss alone.
    """

    def __init__(
        self,
        frame: FrameShape,
        model: ModelConfig,
        objective: Objective,
        *,
        num_input_frames: int,
        tmu: TMUConfig | None = None,
        num_slots: int = 0,
    ) -> None:
        super().__init__(objective, num_input_frames=num_input_frames)
        self.frame = frame
        self.model = model
        self.tmu = tmu
        self.num_slots = num_slots

    def build_student(self) -> Predictor:
        return build_predictor(self.frame, self.model, tmu=self.tmu, num_slots=self.num_slots)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        rollout = self.unroll(forward, batch)
        return LossTerms(terms=self.objective.terms(rollout, batch), rollout=rollout)
