"""Knowledge Flow (Liu, Peng, Schwing, ICLR 2019; Table 1)."""

from __future__ import annotations

from typing import Literal

from tmu_dist.config import KnowledgeFlowConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.bank import TeacherBank
from tmu_dist.transfer.base import Forward, LossTerms, Task, TaughtMethod, TrainingBatch


class KnowledgeFlow(TaughtMethod):
    """To be written."""

    def __init__(
        self,
        task: Task,
        *,
        settings: KnowledgeFlowConfig,
        num_steps: int,
        bank: TeacherBank,
        teacher_input: Literal["own", "student", "truth"],
    ) -> None:
        super().__init__(task, bank=bank, teacher_input=teacher_input)
        self.settings = settings
        self.num_steps = num_steps

    def build_student(self) -> Predictor:
        return build_predictor(self.task.frame, self.task.model)

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        raise NotImplementedError
