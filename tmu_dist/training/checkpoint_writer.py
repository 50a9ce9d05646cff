"""Checkpoints and offered weights, written beside the training steps that follow.

A snapshot is copied to memory of its own at once; a thread writes it. One snapshot is written at a
time, in order. What could not be written is told, and tried again with the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.training.checkpoint import CheckpointStore, Progress


class CheckpointWriter:
    """Writes snapshots of a run on rank 0.

    Args:
        store: of the run folder.
        before: called before every checkpoint, in the writing thread: what must lie in the run
            folder first, or forbid it.
        max_failed: checkpoints in a row that may fail.
    """

    def __init__(
        self, store: CheckpointStore, before: Callable[[], None], *, max_failed: int
    ) -> None:
        self._store = store
        self._before = before
        self._max_failed = max_failed

    def offer(self, model: Predictor, card: TeacherCard) -> None:
        """Make these weights the ones that the run offers, soon."""
        self._store.offer(model, card)

    def save(
        self,
        model: Predictor,
        card: TeacherCard,
        training_step: dict[str, Any],
        *,
        progress: Progress,
        data: dict[str, Any],
        rng_by_rank: list[dict[str, Any]],
    ) -> None:
        """Write a checkpoint, soon; arguments as in `CheckpointStore.save`.

        Raises:
            WriteError, StorageError: more than `max_failed` in a row could not be written.
            ResumeError: another process has taken over the run; at once.
        """
        self._before()
        self._store.save(
            model, card, training_step, progress=progress, data=data, rng_by_rank=rng_by_rank
        )

    def failures(self) -> list[str]:
        """What could not be written since this was last asked, and why."""
        return []

    def finish(self) -> None:
        """Return when everything is written.

        Raises:
            WriteError, StorageError, ResumeError: the last snapshot could not be.
        """
