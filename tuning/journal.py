"""The trials of a search: which there are, and how each ended (trials.json).

What a trial found is not here but in its runs (`records`); the journal and the runs together are
all that a search remembers, so a driver that was killed goes on from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from tmu_dist.data.storage import MissingObjectError, join_url, read_text
from tmu_dist.folders import write_text
from tuning.space import Point

JOURNAL_FILE = "trials.json"

State: TypeAlias = Literal["open", "finished", "stopped", "failed"]
"""open: waits, runs, or was running when the driver ended; stopped: by the scheduler."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point with one seed."""

    number: int
    """From 0, in the order in which trials were thought of; names its folder."""
    point_number: int
    """Trials of one point share it."""
    point: Point
    seed: int
    state: State = "open"
    reason: str | None = None
    """Why it was stopped or failed."""
    failures: int = 0
    """How often it was started again."""


class Journal:
    """The trials of a search folder. One process writes it; every change is on disk at once.

    Raises:
        ValueError: the file is not one of this version.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._trials = list(read_trials(folder))

    @property
    def trials(self) -> Sequence[Trial]:
        """All of them, by number."""
        return self._trials

    def add(self, point_number: int, point: Point, seed: int) -> Trial:
        """Write a new trial down, before it is started."""
        trial = Trial(
            number=len(self._trials), point_number=point_number, point=dict(point), seed=seed
        )
        self._trials.append(trial)
        self._write()
        return trial

    def note(self, number: int, **changes: Any) -> Trial:
        """Write down what became of a trial: `state`, `reason`, `failures`."""
        self._trials[number] = replace(self._trials[number], **changes)
        self._write()
        return self._trials[number]

    def _write(self) -> None:
        rows = [_as_json(trial) for trial in self._trials]
        text = json.dumps({"trials": rows}, indent=1) + "\n"
        write_text(self._folder, JOURNAL_FILE, text)


def read_trials(folder: str) -> tuple[Trial, ...]:
    """What a search has tried so far; nothing where there is no search.

    Raises:
        ValueError: the file is not one of this version.
        StorageError: the store cannot be reached.
    """
    try:
        text = read_text(folder, JOURNAL_FILE)
    except MissingObjectError:
        return ()
    try:
        return tuple(_from_json(row) for row in json.loads(text)["trials"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        where = join_url(folder, JOURNAL_FILE)
        raise ValueError(
            f"{where} is not a journal of this version ({error}): choose another --out."
        ) from None


def missing_seeds(
    of_point: Sequence[Trial], seeds: Sequence[int], *, has_scheduler: bool
) -> list[int]:
    """Seeds that a point is to be trained with and was not yet, as far as it is known now.

    Where a scheduler stops trials, its first trial alone is judged, and the other seeds follow when
    that one was trained to its end.
    """
    left = [seed for seed in seeds if seed not in {trial.seed for trial in of_point}]
    if not has_scheduler or (of_point and of_point[0].state == "finished"):
        return left
    return [] if of_point else left[:1]


def _as_json(trial: Trial) -> dict[str, Any]:
    return {**vars(trial), "point": dict(trial.point)}


def _from_json(row: Mapping[str, Any]) -> Trial:
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in row["point"].items()}
    return Trial(**{**row, "point": values})
