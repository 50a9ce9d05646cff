"""L2-SP: finetuning that is held near its start (Li, Grandvalet, Davoine, ICML 2018; Table 1)."""

from __future__ import annotations

from tmu_dist.config import L2SPConfig
from tmu_dist.transfer.base import Task
from tmu_dist.transfer.scratch import Scratch


class L2SP(Scratch):
    """To be written."""

    def __init__(self, task: Task, *, settings: L2SPConfig) -> None:
        super().__init__(task)
        self.settings = settings
