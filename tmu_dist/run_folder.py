"""What lies where in a run folder, and reading it. Writing is `tmu_dist.training`'s work.

RUN/config.json       resolved settings
RUN/run.json          who started it: command, git revision, versions, hashes
RUN/log.jsonl         one event a line: train, validation, liveness, resume
RUN/tensorboard/      the same numbers
RUN/checkpoints/      model folders with the training state beside them
RUN/models/           model folders that the run offers; selected.json points to one
RUN/result.json       written when the run is finished
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
PROVENANCE_FILE = "run.json"
LOG_FILE = "log.jsonl"
RESULT_FILE = "result.json"
SELECTED_FILE = "selected.json"

Event = dict[str, Any]
"""A line of the log: at least `event` and `step`."""


def read_log(run: Path) -> list[Event]:
    """All events of a run so far, oldest first; a line that a crash cut short is left out.

    Raises:
        ValueError: a whole line is not JSON; names it.
    """
    path = run / LOG_FILE
    if not path.is_file():
        return []
    events = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from None
    return events


def read_json(run: Path, file: str) -> Any:
    """One of the run's JSON files.

    Raises:
        ValueError: it is not there; says what that means.
    """
    path = run / file
    if not path.is_file():
        raise ValueError(f"{run} has no {file}: it is not the folder of a finished run.")
    return json.loads(path.read_text())
