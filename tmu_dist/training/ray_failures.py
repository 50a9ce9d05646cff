"""Why workers of a Ray run were lost: told in one line, to those who go on and to the user."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError
from ray.train import UserCallback
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from tmu_dist.config import RunConfig
from tmu_dist.data.storage import StorageError, delete, exists, read_text
from tmu_dist.files import WriteError
from tmu_dist.folders import write_text
from tmu_dist.run_folder import Event
from tmu_dist.training.progress import ProgressDisplay

_LOSS_FILE = "ray/lost.txt"
"""Why the last worker group ended, for the line that says that the next one goes on."""
_HANGS = "WorkerHealthCheckTimeoutError"
"""Ray's name for the failure of a worker that does not answer; it has no public place."""
_LESS_MEMORY = (
    "train fewer sequences at once (scale.sequences_at_once), in training.precision=bf16, or with "
    "teachers spread over the ranks (placement.kind=placed or sharded)"
)


class LossRecord(UserCallback):
    """Writes down, where Ray starts workers again, why it has to."""

    def __init__(self, run: str) -> None:
        self._run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray; see there."""
        with suppress(WriteError, StorageError):  # then the line will do without
            write_text(self._run, _LOSS_FILE, told_failure(worker_exceptions))


class RestartDisplay(ProgressDisplay):
    """Shows of a restart why, where, and with how many workers."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(PurePosixPath(config.output).name, config.training.num_steps)
        self._run = config.output
        self._take_reason()  # of an earlier start

    def __call__(self, event: Event) -> None:
        if event["event"] == "resume" and (reason := self._take_reason()) is not None:
            ranks = event["world_size"]
            self._say(
                f"{reason}: started again, continues at step {event['step']} with {ranks} "
                f"rank{'s' * (ranks > 1)}"
            )
        else:
            super().__call__(event)

    def _take_reason(self) -> str | None:
        with suppress(StorageError):
            if exists(self._run, _LOSS_FILE):
                reason = read_text(self._run, _LOSS_FILE)
                delete(self._run, _LOSS_FILE)
                return reason
        return None


def explain(error: TrainingFailedError, config: RunConfig) -> str:
    """What happened, and what may help."""
    from torch import OutOfMemoryError  # not earlier: workers start without this process's torch

    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    told = told_failure(failures) if failures else str(error)
    advice = ""
    if any(isinstance(e, OutOfMemoryError | MemoryError) for e in failures.values()):
        advice = f"It was out of memory: {_LESS_MEMORY}. "
    elif "out of memory" in told or "process died" in told:
        advice = f"If it was killed for memory: {_LESS_MEMORY}. "
    elif "hangs" in told or "imed out" in told:
        advice = (
            "A rank was waited for longer than faults.collective_timeout_seconds="
            f"{config.faults.collective_timeout_seconds:g}: it hangs, or that is too short. "
        )
    return (
        f"{config.output}: the workers failed, and launch.max_failures="
        f"{config.launch.max_failures} restarts did not help: {told}. {advice}The newest "
        "checkpoint is whole: the same command continues from it."
    )


def told_failure(failures: Mapping[int, Exception]) -> str:
    """Who failed first, and why, in one line. What the others met because of it is left out."""
    causes = {
        rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()
    }
    rank = min(causes, key=lambda rank: (_suspicion(causes[rank]), rank))
    cause = causes[rank]
    if _suspicion(cause) == 0:
        return f"rank {rank} lost ({_told_loss(cause)})"
    return f"rank {rank} failed ({type(cause).__name__}: {' '.join(str(cause).split())[:300]})"


def _suspicion(cause: Exception) -> int:
    """The lower, the more likely that it came first; an exchange with a lost rank fails, too."""
    if isinstance(cause, RayError) or type(cause).__name__ == _HANGS:
        return 0
    return 2 if type(cause).__module__ == "torch.distributed" or type(cause) is RuntimeError else 1


def _told_loss(cause: Exception) -> str:
    if type(cause).__name__ == _HANGS:
        return "it hangs"
    if isinstance(cause, OutOfMemoryError) or "low on memory" in str(cause):
        return "its node ran out of memory"
    if isinstance(cause, RayActorError) and cause.preempted:
        return "its node was taken away"
    if isinstance(cause, ActorUnavailableError):
        return "it is out of reach"
    return "its node is gone" if "its node" in str(cause) else "its process died"
