"""What each rank's process says, in a file of its own: RUN/logs/rank-0003/20261122T030101Z.txt.

Its first line tells where the process is. Then come the log records of the project (INFO, where
the process logs that) and of everything else (WARNING), and how the rank ended, with the trace of
an error. Each start of a rank is a new file; of a run that is refused before it begins there is
none. On a disk lines are there at once; in a store the file is put anew every few seconds while it
grows, and at the end, so a rank that is killed there loses its last lines.

Nothing that goes wrong with these files disturbs the run.
"""

from __future__ import annotations

import logging
import os
import platform
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from tmu_dist.collectives import Ranks, own_address_towards
from tmu_dist.data.storage import (
    StorageError,
    delete,
    delete_many,
    exists,
    join_url,
    list_paths,
    local_path,
)
from tmu_dist.folders import Mirror
from tmu_dist.run_folder import CONFIG_FILE, FILE_TIME, LOGS_FOLDER
from tmu_dist.training.stopping import RunStoppedError

log = logging.getLogger(__name__)

_KEPT_STARTS = 5
_THE_WORLD = "192.0.2.1"
"""An address that nobody has, to see which way leads out of this machine; nothing is sent."""
_PROJECT = ("tmu_dist", "data_prep", "tuning")


@contextmanager
def rank_log(run: str, ranks: Ranks, place: str = "") -> Iterator[None]:
    """Keep what this process says while the block runs, and the error that ends it.

    Args:
        run: the run folder; a folder or store that cannot be written is only warned of.
        ranks: this process's place in the run.
        place: what else the first line tells of where this process is.
    """
    folder = join_url(run, f"{LOGS_FOLDER}/rank-{ranks.rank:04d}")
    started = datetime.now(UTC)
    file = None
    try:
        file = _RankFile(folder, f"{started.strftime(FILE_TIME)}.txt")
    except OSError as error:
        log.warning("What rank %d says is not kept in %s: %s", ranks.rank, folder, error)
    if file is None:
        yield
        return
    address = own_address_towards(os.environ.get("MASTER_ADDR", _THE_WORLD)) or "no address"
    file.say(
        f"rank {ranks.rank} of {ranks.world_size} on {platform.node()} ({address}), process "
        f"{os.getpid()}, started {started.isoformat(timespec='seconds')}" + (place and f"; {place}")
    )
    try:
        with _listening(file):
            try:
                yield
                file.say("ended well")
            except RunStoppedError as error:
                file.say(str(error))
                raise
            except BaseException:
                file.say(f"ended by an error\n{traceback.format_exc()}")
                raise
    except ValueError:
        with suppress(OSError, StorageError):
            _forget_refused(run, folder, file.name_in_folder)
        raise


@contextmanager
def _listening(handler: logging.Handler) -> Iterator[None]:
    """Hand it all log records of this process; close it in the end."""
    root = logging.getLogger()
    # Where nobody else listens, Python shows warnings through this one; now it no longer would.
    others = [] if root.handlers or logging.lastResort is None else [logging.lastResort]
    for listener in (handler, *others):
        root.addHandler(listener)
    try:
        yield
    finally:
        for listener in (handler, *others):
            root.removeHandler(listener)
        handler.close()


class _RankFile(logging.FileHandler):
    """Appends records to a file that lies in the folder, or is copied there."""

    def __init__(self, folder: str, name: str) -> None:
        self.name_in_folder = name
        on_disk = local_path(folder)
        self._mirror = Mirror(folder) if on_disk is None else None
        here = self._mirror.folder if self._mirror is not None else Path(str(on_disk))
        here.mkdir(parents=True, exist_ok=True)
        super().__init__(here / name, encoding="utf-8")
        form = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s", _CLOCK)
        form.converter = time.gmtime
        self.setFormatter(form)
        self.addFilter(_is_worth_it)
        with suppress(OSError, StorageError):
            _forget_old(folder, name)
        if self._mirror is not None:
            self._mirror.start()

    def say(self, text: str) -> None:
        """Write a line that is no record of a logger."""
        self.emit(logging.LogRecord("rank", logging.INFO, "", 0, text.rstrip(), None, None))

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk costs the line, not a page of standard error for each."""

    def close(self) -> None:
        """Close the file; a store gets the rest if it takes it."""
        super().close()
        if self._mirror is not None:
            with suppress(OSError):
                self._mirror.close()
            self._mirror = None


_CLOCK = "%Y-%m-%dT%H:%M:%S"


def _is_worth_it(record: logging.LogRecord) -> bool:
    is_ours = record.name.partition(".")[0] in _PROJECT
    return record.levelno >= (logging.INFO if is_ours else logging.WARNING)


def _forget_refused(run: str, folder: str, name: str) -> None:
    """Leave no trace of a run that never began: its error says all."""
    if exists(run, CONFIG_FILE):
        return
    delete(folder, name)
    here, top = local_path(folder), local_path(run)
    while here is not None and top is not None and here != top.parent:
        here.rmdir()  # or an OSError, if there is something else in it
        here = here.parent


def _forget_old(folder: str, newest: str) -> None:
    """Remove the files of all but the last starts; this one's may not be there yet."""
    others = [path for path in list_paths(folder) if path != newest]
    if doomed := others[: -(_KEPT_STARTS - 1)]:
        delete_many(folder, doomed)
