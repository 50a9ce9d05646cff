"""Plain distillation of features and responses: a control (Hinton et al. 2015; FitNets 2015)."""

from __future__ import annotations

from typing import Literal

from tmu_dist.config import DistillationConfig, ImitationConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.bank import TeacherBank
from tmu_dist.transfer.base import Forward, LossTerms, Task, TaughtMethod, TrainingBatch


class Distillation(TaughtMethod):
    """To be written."""

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
        self.imitation = imitation

    def build_student(self) -> Predictor:
        return build_predictor(self.task.frame, self.task.model)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        raise NotImplementedError
