"""Training by the prediction loss alone: the plain network, or the TMU network with unused slots.

From a random start this is training from scratch; with a `start`, it is finetuning.
"""

from __future__ import annotations

from tmu_dist.config import TMUConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.transfer.base import Forward, LossTerms, Task, TrainingBatch, TransferMethod


class Scratch(TransferMethod):
    """Prediction loss only (Table 1: scratch, and with a start finetune).

    Args:
        task: what the student learns.
        tmu: settings of the TMU layers; None: none.
        num_slots: 0 for the plain network; M for the TMU network of M teachers, whose distillers
            and gates are then trained by the prediction loss alone.
    """

    def __init__(self, task: Task, *, tmu: TMUConfig | None = None, num_slots: int = 0) -> None:
        super().__init__(task)
        self.tmu = tmu
        self.num_slots = num_slots

    @property
    def unsteady(self) -> str | None:
        return self.task.objective.unsteady

    def build_student(self) -> Predictor:
        task = self.task
        return build_predictor(task.frame, task.model, tmu=self.tmu, num_slots=self.num_slots)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        rollout = self.unroll(forward, batch)
        return self.own_terms(rollout, batch)
