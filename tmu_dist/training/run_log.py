"""What a run writes down: log.jsonl, TensorBoard, and who made it (run.json).

`log.jsonl` holds one JSON object a line with at least `event` and `step`. A resumed run first
cuts off whatever was logged after its checkpoint, so that every step stands there once.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from tmu_dist.files import atomic_write_text
from tmu_dist.run_folder import LOG_FILE, PROVENANCE_FILE, Event, read_log


class RunLog:
    """Appends events to log.jsonl and TensorBoard and shows them to a listener.

    Args:
        run: the run folder.
        resume_step: events after this step are cut off (0 starts an empty log).
        listener: called with every event, such as a progress display.
    """

    def __init__(
        self, run: Path, *, resume_step: int, listener: Callable[[Event], None] | None = None
    ) -> None:
        path = run / LOG_FILE
        kept = [e for e in read_log(run) if e["step"] <= resume_step] if resume_step else []
        atomic_write_text(path, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)
        self._listener = listener

    def write(self, event: str, step: int, **values: Any) -> None:
        """Log one event; numbers also go to TensorBoard as `event/name`."""
        record: Event = {"event": event, "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        for name, number in _numbers(values):
            self._board.add_scalar(f"{event}/{name}", number, step)
        if self._listener is not None:
            self._listener(record)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()


def write_provenance(run: Path, **facts: Any) -> None:
    """Record who made this run: command, git revision, versions, hashes (run.json).

    Starting again adds an entry, so the file tells every command that worked on the run.
    """
    path = run / PROVENANCE_FILE
    history = json.loads(path.read_text())["starts"] if path.is_file() else []
    history.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "git_revision": git_revision(),
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": _versions("tmu-dist", "torch", "ray", "numpy"),
            **facts,
        }
    )
    atomic_write_text(path, json.dumps({"starts": history}, indent=2) + "\n")


def git_revision() -> str:
    """Commit of the code that runs, with "+changes" if files differ from it; or "unknown"."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _numbers(values: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested lists and dicts with its path, such as `gate_means/0/1`."""
    if isinstance(values, dict):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list):
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        if isinstance(values, int | float):
            yield prefix, float(values)
        return
    for key, value in items:
        yield from _numbers(value, f"{prefix}/{key}" if prefix else key)
