"""Finetuning: the plain network, started from one teacher's weights (Table 1)."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from tmu_dist.config import ModelConfig
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.store import load_state
from tmu_dist.transfer.base import Objective
from tmu_dist.transfer.scratch import Scratch

log = logging.getLogger(__name__)


class Finetune(Scratch):
    """All of the teacher's tensors, then trained as usual; a partial match is refused."""

    def __init__(
        self,
        frame: FrameShape,
        model: ModelConfig,
        objective: Objective,
        *,
        num_input_frames: int,
        start_name: str,
        start_weights: Mapping[str, Tensor],
    ) -> None:
        super().__init__(frame, model, objective, num_input_frames=num_input_frames)
        self.start_name = start_name
        self.start_weights = dict(start_weights)

    def build_student(self) -> Predictor:
        student = super().build_student()
        load_state(student, self.start_weights, where=f"teacher {self.start_name!r}")
        log.info(
            "finetune: all %d tensors initialised from %s", len(self.start_weights), self.start_name
        )
        return student
