"""A folder of finished files, up to a size limit, that many processes fill at the same time.

There is no server and nothing is left behind but the files:

- While a file is written it is NAME.part, locked (flock) by the one who writes it. It gets its name
  by a rename when it is whole, so what has the name may be read.
- Locks die with their process. A NAME.part that nobody has locked was left by a killed process; it
  is never read, and goes when somebody needs room or wants to write the same file.
- Room is made and allocated, under a lock of the folder, before anything is written. Files that
  were called used up go first, then those used longest ago; the time of a file's last change says
  which. Removing a file does not disturb those who have it open.

The folder must lie on a disk of the machine's own: over a network flock is slow, missing, or does
not reach other machines. Nothing is flushed to the disk by force, so after a crash of the machine a
file may have lost its content: readers must be able to notice.

With two limits on one folder each process keeps its own whenever it writes something: the folder
grows to the larger one and is cut back to the smaller one by turns.

Not here: what the files are and where they come from (cache.py).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tmu_dist.files import WriteError

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{64}")
_PART = ".part"
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 30.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# Used-up files are dated back to January 1970, by a factor that keeps their order.
_DATED_BACK = 1000
_USED_UP_BEFORE_NS = 10 * 365 * 86_400 * 10**9


class CacheFolder:
    """Finished files by name; a name is a sha256, anything else in the folder is left alone.

    Args:
        path: made when it is needed.
        limit_bytes: all files together, finished or not, never take more. What is removed while
            somebody has it open takes disk until it is closed.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self._prefix = f"{path}/"  # joining with pathlib costs as much as opening a file

    def open(self, name: str, num_bytes: int) -> int | None:
        """Return a descriptor of a file, which becomes the one used last; None: not there."""
        try:
            file = os.open(self._prefix + name, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if os.fstat(file).st_size != num_bytes:  # another hand has been at it
            os.close(file)
            self.remove(name)
            return None
        _mark_used(file)
        return file

    def mark_used(self, name: str, *, unless_used_up: bool = False) -> bool:
        """Make a file the one used last, if it is there; say whether it is."""
        path = self.path / name
        try:
            if not unless_used_up or path.stat().st_mtime_ns > _USED_UP_BEFORE_NS:
                _mark_used(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def mark_used_up(self, name: str) -> None:
        """Make a file, if it is there, one of those to remove before all others."""
        dated_back = time.time_ns() // _DATED_BACK
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # as in _mark_used
            os.utime(self.path / name, ns=(dated_back, dated_back))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def add(
        self, name: str, num_bytes: int, what: str, write: Callable[[int], None]
    ) -> tuple[int, bool]:
        """Return a descriptor of a file that may have to be written; say whether this call did.

        Args:
            name: the file.
            num_bytes: its size, at most `limit_bytes`.
            what: it is, for messages.
            write: fills the file of a descriptor, which has its size already. If it raises, nothing
                is left. If another thread or process is writing the file, that one is waited for.

        Raises:
            WriteError: the disk is full, or the folder cannot be used; names the settings.
        """
        part = self.path / (name + _PART)
        try:
            while True:
                with self._own_part(part, what) as writing:
                    file = self.open(name, num_bytes)
                    if file is not None:
                        return file, False
                    self._make_room(writing, part, num_bytes, what)
                    write(writing)
                    if _is_at(writing, part):
                        # Opened before others see it, who may remove it at once to make room.
                        file = os.open(part, os.O_RDONLY)
                        part.rename(self.path / name)
                        return file, True
                _log.warning("%s was emptied by another hand; once more: %s", self.path, what)
        except OSError as error:
            raise self._write_error(error, num_bytes, what) from error

    def held_bytes(self) -> int:
        """Return the size of all files, finished or not."""
        return sum(file.num_bytes for file in (*self._parts(), *self._finished()))

    @contextmanager
    def _own_part(self, part: Path, what: str) -> Iterator[int]:
        """Yield a descriptor of an empty partial file that nobody else writes; remove it after."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            writing = _open_locked(part, os.O_RDWR | os.O_CREAT, f"others to finish {what}")
            if _is_at(writing, part):
                break
            _close_locked(writing)  # finished or swept while this one waited
        try:
            os.ftruncate(writing, 0)  # or others would wait for the room of a killed process
            yield writing
        finally:
            if _is_at(writing, part):
                part.unlink()
            _close_locked(writing)

    def _make_room(self, writing: int, part: Path, num_bytes: int, what: str) -> None:
        """Give a partial file its size on disk, at the cost of those files that should go first.

        Where others must finish first, they are waited for with the folder locked. They need no
        lock of it to finish, and nobody who comes later can take the room.
        """
        folder = _open_locked(self.path, os.O_RDONLY, f"others to make room in {self.path}")
        try:
            if not self._try_to_make_room(writing, part, num_bytes):
                with _told_when_slow(f"others to finish, for room for {what}"):
                    while not self._try_to_make_room(writing, part, num_bytes):
                        time.sleep(_POLL_SECONDS)
        finally:
            _close_locked(folder)

    def _try_to_make_room(self, writing: int, part: Path, num_bytes: int) -> bool:
        # Partial files first: what gets its name in between is seen twice then, and never missed.
        parts = [file for file in self._parts() if file.path != part and file.num_bytes]
        others = {file.path.stem: file for file in parts if not _sweep(file.path)}
        finished = sorted(self._finished(), key=lambda file: file.used_ns, reverse=True)
        for file in finished:
            others.pop(file.path.name, None)
        excess = sum(file.num_bytes for file in others.values()) + num_bytes - self.limit_bytes
        if excess > 0:
            return False
        excess += sum(file.num_bytes for file in finished)
        while excess > 0:
            oldest = finished.pop()
            oldest.path.unlink(missing_ok=True)
            excess -= oldest.num_bytes
        while True:
            try:
                _allocate(writing, num_bytes)
                return True
            except OSError as error:
                os.ftruncate(writing, 0)
                if error.errno not in _DISK_FULL or not (finished or others):
                    raise
            if not finished:
                return False
            finished.pop().path.unlink(missing_ok=True)

    def _parts(self) -> list[_File]:
        return self._files(_PART)

    def _finished(self) -> list[_File]:
        return self._files("")

    def _files(self, suffix: str) -> list[_File]:
        found = []
        with suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name[64:] == suffix and _NAME.match(entry.name):
                    with suppress(FileNotFoundError):
                        about = entry.stat(follow_symlinks=False)
                        path = self.path / entry.name
                        found.append(_File(path, about.st_size, about.st_mtime_ns))
        return found

    def _write_error(self, error: OSError, num_bytes: int, what: str) -> WriteError:
        if error.errno in _DISK_FULL:
            return WriteError(
                f"The disk of the cache {self.path} is full: {what} needs {gib(num_bytes)}, "
                f"{gib(free_bytes(self.path))} are free there, and no file of the cache is left "
                "that could go. Free space, choose another disk (data.cache_folder), or set a "
                "smaller data.cache_gib where others write to that disk as well."
            )
        return WriteError(
            f"The cache {self.path} cannot take {what}: {error.strerror or error}. It must be a "
            "folder on a disk of this machine, which you may write and lock: set data.cache_folder."
        )


class _File(NamedTuple):
    path: Path
    num_bytes: int
    used_ns: int
    """Time of its last change: when it was last used, or long ago if it is used up."""


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def gib(num_bytes: int) -> str:
    """Return a size as messages show it."""
    return f"{num_bytes / 2**30:.3g} GiB"


def _allocate(file: int, num_bytes: int) -> None:
    """Take the disk space of a whole file now, so that it cannot be missing later."""
    if num_bytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, num_bytes)
    else:
        os.ftruncate(file, num_bytes)


def _open_locked(path: Path, flags: int, waits_for: str) -> int:
    """Return a descriptor of a file or folder that this thread alone has locked."""
    file = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with _told_when_slow(waits_for):
                fcntl.flock(file, fcntl.LOCK_EX)
    except BaseException:
        os.close(file)
        raise
    return file


def _close_locked(file: int) -> None:
    # Unlocked by name: a forked child that has inherited the descriptor would keep the lock.
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Say whether the path still means the open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _sweep(part: Path) -> bool:
    """Remove a partial file whose process is gone; say whether none is left there."""
    try:
        file = os.open(part, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    if _is_at(file, part):
        part.unlink()
    _close_locked(file)
    return True


def _mark_used(file: Path | int) -> None:
    with suppress(PermissionError):  # another user's: readable, but only its owner may mark it
        os.utime(file)


@contextmanager
def _told_when_slow(waits_for: str) -> Iterator[None]:
    """Log what is waited for, once, if the block takes long."""
    timer = threading.Timer(_PATIENCE_SECONDS, _log.warning, ("Waiting for %s.", waits_for))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
