"""What a run writes down: log.jsonl, TensorBoard, and who made it (run.json).

`log.jsonl` holds one JSON object a line with at least `event` and `step`. A resumed run first
cuts off whatever was logged after its checkpoint, so that every step stands there once.

Objects of a store cannot grow, so the log of a run in a store is written to a local folder and
copied whole: every few seconds, before every checkpoint, and at the end. On a disk a later start
puts a new file in the old one's place, so what a process of an earlier one still has open is no
longer the log.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmu_dist.data.storage import MissingObjectError, local_path, read_bytes
from tmu_dist.files import WriteError
from tmu_dist.folders import PUBLISH_SECONDS, Mirror, write_text
from tmu_dist.provenance import git_revision, source_hash, versions
from tmu_dist.run_folder import LOG_FILE, PROVENANCE_FILE, Event, read_log

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

log = logging.getLogger(__name__)


class RunLog:
    """Appends events to log.jsonl and TensorBoard and shows them to a listener.

    A disk that is full for a while loses no line: it is written with the next one.

    Args:
        run: the run folder.
        resume_step: events after this step are cut off (0 starts an empty log).
        listener: called with every event, such as a progress display.
        before_put: called before a file of a store is replaced; what it raises forbids it.

    Raises:
        WriteError, StorageError: the run folder cannot be written.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        resume_step: int,
        listener: Callable[[Event], None] | None = None,
        before_put: Callable[[], None] = lambda: None,
    ) -> None:
        kept = [e for e in read_log(run) if e["step"] <= resume_step] if resume_step else []
        folder = local_path(str(run))
        self._mirror = None
        if folder is None:
            self._mirror = Mirror(str(run), before_put)
            folder = self._mirror.folder
        write_text(str(folder), LOG_FILE, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = (folder / LOG_FILE).open("ab", buffering=0)
        self._unwritten = b""
        self._one_at_a_time = threading.Lock()  # checkpoints are written by another thread
        self._board = _Board(folder / "tensorboard", first_step=resume_step + 1)
        self._listener = listener
        if self._mirror is not None:
            self._mirror.publish()
            self._mirror.start()

    def write(self, event: str, step: int, **values: Any) -> None:
        """Log one event; numbers also go to TensorBoard as `event/name`."""
        record: Event = {"event": event, "step": step, **values}
        try:
            self._append(json.dumps(record).encode() + b"\n")
        except OSError as error:
            log.warning("%s waits to be written: %s", self._file.name, error)
        for name, number in _numbers(values):
            self._board.draw(f"{event}/{name}", number, step)
        if self._listener is not None:
            self._listener(record)

    def flush(self) -> None:
        """Return when everything logged so far lies in the run folder for good.

        Raises:
            WriteError: the disk does not take it.
            StorageError: the store does not take it.
            Whatever `before_put` raises.
        """
        try:
            self._append(b"")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise WriteError(
                f"Could not write {self._file.name}: {error.strerror or error}. Free space there."
            ) from error
        if self._mirror is not None:
            self._board.flush()
            self._mirror.publish()

    def close(self) -> None:
        """Flush and close; a store that does not take the rest is only warned of."""
        self._file.close()
        self._board.close()
        if self._mirror is not None:
            self._mirror.close()

    def _append(self, content: bytes) -> None:
        with self._one_at_a_time:
            self._unwritten += content
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


class _Board:
    """TensorBoard's copy of the numbers, which a full disk ends until the next start.

    Its library takes longer to load than first steps of small runs, so the first numbers wait for
    it until they are due in the file.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        self._waiting: list[tuple[str, float, int, float]] = []
        """Arguments of `SummaryWriter.add_scalar`."""
        self._due = time.monotonic() + PUBLISH_SECONDS
        self._one_at_a_time = threading.Lock()
        self._is_broken = False

    def draw(self, name: str, number: float, step: int) -> None:
        self._unless_broken(lambda: self._draw(name, number, step))

    def flush(self) -> None:
        self._unless_broken(lambda: self._whole_writer().flush())

    def close(self) -> None:
        self._unless_broken(lambda: self._whole_writer().close())

    def _draw(self, *number: Any) -> None:
        self._waiting.append((*number, time.time()))
        if time.monotonic() >= self._due:
            self._whole_writer()

    def _whole_writer(self) -> SummaryWriter:
        """The writer, which has been told all numbers."""
        for number in self._waiting:
            self._writer.add_scalar(*number)
        self._waiting.clear()
        return self._writer

    @cached_property
    def _writer(self) -> SummaryWriter:
        from torch.utils.tensorboard.writer import SummaryWriter

        return SummaryWriter(
            str(self._folder), purge_step=self._first_step, flush_secs=int(PUBLISH_SECONDS)
        )

    def _unless_broken(self, action: Callable[[], None]) -> None:
        with self._one_at_a_time:
            if self._is_broken:
                return
            try:
                action()
            except OSError as error:
                self._is_broken = True
                log.warning("TensorBoard gets no more numbers until the next start: %s", error)


def write_provenance(run: str, command: str, **facts: Any) -> None:
    """Record who made this run: command, code, versions, hashes (run.json).

    Starting again adds an entry, so the file tells every command that worked on the run.
    """
    try:
        history = json.loads(read_bytes(run, PROVENANCE_FILE))["starts"]
    except MissingObjectError:
        history = []
    history.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "git_revision": git_revision(),
            "source": source_hash(),
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": versions(("tmu-dist", "torch", "ray", "numpy")),
            **facts,
        }
    )
    write_text(run, PROVENANCE_FILE, json.dumps({"starts": history}, indent=2) + "\n")


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
