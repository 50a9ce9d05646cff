"""Teachers that cannot know better: what transfer must beat to be transfer (transfer.control)."""

from __future__ import annotations

from tmu_dist.teachers.adapter import TeacherPlan
from tmu_dist.teachers.bank import TeacherBank, Teaching
from tmu_dist.teachers.store import LoadedModel


class ShuffledBank:
    """To be written."""

    def __init__(self, bank: TeacherBank) -> None:
        self._bank = bank

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        return self._bank.parameters_per_teacher

    @property
    def plans(self) -> tuple[TeacherPlan, ...]:
        return self._bank.plans

    def teach(self, *arguments: object, **more: object) -> tuple[Teaching, ...]:
        raise NotImplementedError


def with_random_weights(loaded: LoadedModel, *, seed: int, number: int) -> LoadedModel:
    """To be written."""
    raise NotImplementedError
