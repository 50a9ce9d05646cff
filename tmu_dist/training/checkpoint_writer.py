"""Checkpoints and offered weights, written beside the training steps that follow.

A snapshot is copied to memory of its own at once; a thread writes it. One snapshot is written at a
time, in order. What could not be written is told, and tried again with the next one: a run outlives
a full disk and a store that is out of reach for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from tmu_dist.data.storage import StorageError
from tmu_dist.files import WriteError
from tmu_dist.models.rollout import Predictor
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.training.checkpoint import CheckpointStore, Progress, Snapshot

_MAY_PASS = (WriteError, StorageError)


class CheckpointWriter:
    """Writes snapshots of a run on rank 0.

    A snapshot waits for the one before it to be written. A checkpoint follows the weights that were
    offered before it, so it never refers to any that are not there.

    Args:
        store: of the run folder.
        before: called before anything changes in the run folder, in the writing thread: what must
            lie there first, or forbid it.
        max_failed: checkpoints in a row that may fail.
    """

    def __init__(
        self, store: CheckpointStore, before: Callable[[], None], *, max_failed: int
    ) -> None:
        self._store = store
        self._before = before
        self._max_failed = max_failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._offering = self._saving = _done()
        self._of_offers, self._of_checkpoints = _Memory(), _Memory()
        self._offered: tuple[dict[str, Tensor], TeacherCard] | None = None
        """Weights that do not lie in the run folder yet."""
        self._num_failed = 0
        self._last_failure: Exception | None = None
        self._untold: SimpleQueue[str] = SimpleQueue()
        self._end: BaseException | None = None
        """What ended the writing for good."""

    def offer(self, model: Predictor, card: TeacherCard) -> None:
        """Make these weights the ones that the run offers, soon.

        Raises:
            As `save`.
        """
        self._wait_for(self._offering, self._saving)  # which may still need the earlier ones
        self._offered = self._of_offers.copied(model.state_dict()), card
        self._offering = self._submit(self._write_offer)

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
        """Write a checkpoint, soon.

        Args:
            model: the student.
            card: describes it.
            training_step: state of the training step (`TrainingStep.state_dict`).
            progress: how far the run is.
            data: what the data position depends on (`SequenceLoader.state`).
            rng_by_rank: every rank's `rng_state`.

        Raises:
            WriteError, StorageError: more than `max_failed` in a row could not be written.
            ResumeError: another process has taken over the run; nothing more is written.
        """
        self._wait_for(self._saving)
        state = {"weights": model.state_dict(), "training_step": training_step, "data": data}
        copied = self._of_checkpoints.copied(state)
        snapshot = Snapshot(
            card=card, progress=replace(progress), rng_by_rank=rng_by_rank, **copied
        )
        self._saving = self._submit(lambda: self._write_checkpoint(snapshot))

    def failures(self) -> list[str]:
        """What could not be written since this was last asked, and why."""
        return [self._untold.get() for _ in range(self._untold.qsize())]

    def finish(self) -> None:
        """Return when everything is written.

        Raises:
            WriteError, StorageError: the newest snapshot could not be.
            ResumeError: as in `save`.
        """
        self._wait_for(self._offering, self._saving)
        if self._last_failure is not None and (self._num_failed or self._offered is not None):
            raise self._last_failure

    def close(self) -> None:
        """Write what there is to write, if that is possible, and end the thread."""
        self._thread.shutdown()

    def _wait_for(self, *jobs: Future[None]) -> None:
        """Return when these are over and more may follow."""
        if self._end is None:
            for job in jobs:
                job.result()
        if self._end is not None:
            raise self._end
        if self._num_failed > self._max_failed:
            failure = self._last_failure
            raise type(failure)(  # type: ignore[misc]
                f"{failure} Checkpoints in a row that could not be written: {self._num_failed}, "
                f"and faults.max_failed_checkpoints={self._max_failed}. Older ones are whole: the "
                "same command continues from the newest."
            ) from failure

    def _submit(self, write: Callable[[], None]) -> Future[None]:
        def unless_ended() -> None:
            if self._end is None:
                try:
                    write()
                except BaseException as error:  # raised where training next asks for something
                    self._end = error

        return self._thread.submit(unless_ended)

    def _write_offer(self) -> None:
        try:
            self._offer()
        except _MAY_PASS as error:
            self._note(error, "The weights to offer were not written, and will be tried again.")

    def _write_checkpoint(self, snapshot: Snapshot) -> None:
        try:
            self._offer()
            self._store.save(snapshot, self._before)
            self._num_failed = 0
        except _MAY_PASS as error:
            self._num_failed += 1
            self._note(error, f"The checkpoint of step {snapshot.progress.step} was not written.")

    def _offer(self) -> None:
        if self._offered is not None:
            self._store.offer(*self._offered, self._before)
            self._offered = None

    def _note(self, error: Exception, consequence: str) -> None:
        self._last_failure = error
        self._untold.put(f"{error} {consequence}")


class _Memory:
    """Tensors on the CPU that are used again for every copy."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def copied(self, tree: dict[str, Any]) -> dict[str, Any]:
        """A copy of nested dicts, lists and tuples that shares no tensor; good until the next."""
        reused, self._tensors = iter(self._tensors), []
        copy: dict[str, Any] = self._copied(tree, reused)
        return copy

    def _copied(self, value: Any, reused: Iterator[Tensor]) -> Any:
        if isinstance(value, dict):
            return {key: self._copied(item, reused) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(item, reused) for item in value)
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        own = next(reused, None)
        if own is None or (own.shape, own.dtype) != (value.shape, value.dtype):
            own = torch.empty_like(value, device="cpu")
        self._tensors.append(own.copy_(value))
        return own


def _done() -> Future[None]:
    job: Future[None] = Future()
    job.set_result(None)
    return job
