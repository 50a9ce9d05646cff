"""What lies where in a run folder, and reading it. Writing is `tmu_dist.training`'s work.

RUN/config.json       resolved settings
RUN/run.json          who started it: command, git revision, versions, hashes
RUN/log.jsonl         one event a line: train, validation, liveness, resume
RUN/tensorboard/      the same numbers
RUN/checkpoints/      model folders with the training state beside them
RUN/models/           model folders that the run offers; selected.json points to one
RUN/result.json       written when the run is finished
RUN/logs/rank-0003/   what each rank's process said, a file for each of its last starts
RUN/crash/            what a run that failed left for a bug report
RUN/owner.json        which start of the run may write; .lock or lease.json: which process trains
RUN/stop              put there by anybody, ends the run after a checkpoint

RUN is a local path or the URL of a folder in an object store.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmu_dist.data.storage import MissingObjectError, join_url, list_paths, read_bytes

CONFIG_FILE = "config.json"
PROVENANCE_FILE = "run.json"
LOG_FILE = "log.jsonl"
RESULT_FILE = "result.json"
SELECTED_FILE = "selected.json"
LOGS_FOLDER = "logs"
CRASH_FOLDER = "crash"

FILE_TIME = "%Y%m%dT%H%M%SZ"
"""How the moment (UTC) stands in a file's name, so that names sort as moments do."""

Event = dict[str, Any]
"""A line of the log: at least `event` and `step`."""


class ResumeError(ValueError):
    """A checkpoint does not belong to what the command asks for."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run tells its caller."""

    run: str
    steps: int
    seconds: float
    """Time spent in training steps, over all starts."""
    seconds_per_batch: float
    """Of training, waiting for data included (a column of the paper's Table 1)."""
    best_step: int
    best_mse_per_frame: float
    """Lowest validation error, closed-loop."""
    predicted_peak_bytes: int | None = None
    """Memory of one rank at its peak, predicted at the last start; None: not near what there is, so
    that nobody looked, or of an earlier version."""
    measured_peak_bytes: int | None = None
    """What rank 0 took since then (`training/memory_room.py`); None: not known."""


def read_log(run: str | Path) -> list[Event]:
    """All events of a run so far, oldest first; a line that a crash cut short is left out.

    Raises:
        ValueError: a whole line is not JSON; names it.
        StorageError: the store cannot be reached.
    """
    events = []
    for number, line in enumerate(read_log_lines(run), start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            where = join_url(str(run), LOG_FILE)
            raise ValueError(f"{where}, line {number} is not JSON: {error}.") from None
    return events


def read_log_lines(run: str | Path) -> list[str]:
    """The whole lines of a run's log so far, without their ends; none if there is no log."""
    try:
        return read_bytes(str(run), LOG_FILE).decode().split("\n")[:-1]
    except MissingObjectError:
        return []


def newest_logs(run: str | Path) -> list[str]:
    """Paths of what every rank said since its last start, by rank.

    Raises:
        StorageError: the store cannot be reached.
    """
    newest = {path.rpartition("/")[0]: path for path in list_paths(str(run), LOGS_FOLDER)}
    return list(newest.values())


def read_json(run: str | Path, file: str) -> Any:
    """One of the run's JSON files.

    Raises:
        ValueError: it is not there; says what that means.
        StorageError: the store cannot be reached.
    """
    try:
        return json.loads(read_bytes(str(run), file))
    except MissingObjectError:
        raise ValueError(f"{run} has no {file}: it is not the folder of a finished run.") from None
