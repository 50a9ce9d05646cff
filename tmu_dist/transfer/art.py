"""Attentive recurrent transfer (Cui et al., ICLR 2019; Table 1): teachers stay at test time."""

from __future__ import annotations

from collections.abc import Sequence

from tmu_dist.config import AdapterConfig, ARTConfig
from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.bank import FrozenTeacher
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.transfer.base import Forward, LossTerms, Task, TrainingBatch, TransferMethod


class AttentiveTransfer(TransferMethod):
    """To be written."""

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

    def build_student(self) -> Predictor:
        raise NotImplementedError

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        raise NotImplementedError
