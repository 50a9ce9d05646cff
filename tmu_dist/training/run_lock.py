"""One process at a time trains in a run folder.

On a disk that is the operating system's lock, which dies with its holder. A store has no locks:
there the holder keeps a lease, an object that it rewrites every few seconds. A lease that stands
still was left by a dead process, and so was one of a process of this machine that is gone. Who
finds no lease, or a dead one, writes its own, waits a moment, and holds the run if the lease is
still its own then: of several that try at once, the last one to write.

The lease needs no clock in common and no conditional writes, which not every store has. It is no
proof: a process that stops for longer than the moment between two requests, and then goes on, may
find that another one has taken over. So it asks (`RunLock.check`) before it writes a checkpoint;
until then, its log may have replaced the other one's.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from tmu_dist.data.storage import (
    MissingObjectError,
    StorageError,
    local_path,
    read_bytes,
    write_bytes,
)
from tmu_dist.training.checkpoint import ResumeError

log = logging.getLogger(__name__)

LEASE_FILE = "lease.json"
_BEAT_SECONDS = 5.0
_DEAD_AFTER_SECONDS = 40.0
"""Longer than a beat whose requests are retried through a short outage."""
_SETTLE_SECONDS = 1.0
_LOOK_SECONDS = 0.5


class RunLock(Protocol):
    """The right to train in a run folder."""

    def check(self) -> None:
        """Make sure that nobody has taken over.

        Raises:
            ResumeError: another process has.
            StorageError: the store cannot be reached.
        """
        ...

    def close(self) -> None:
        """Let others train in the folder."""
        ...


def claim_run(run: str) -> RunLock:
    """Take a run over from workers of an earlier start, whose launcher holds its lock now.

    Raises:
        StorageError: the store cannot be reached.
    """
    raise NotImplementedError


def lock_run(run: str, *, patience_seconds: float = 10.0) -> RunLock:
    """Make this process the only one that trains in a run folder, until the lock is closed.

    A process that was just killed, or is about to end, gets a moment to let go.

    Raises:
        ResumeError: another process is training there.
        StorageError: the store cannot be reached.
    """
    folder = local_path(run)
    return _Lease(run, patience_seconds) if folder is None else _FileLock(folder, patience_seconds)


def _busy(run: str | Path, holder: str = "Another process") -> ResumeError:
    return ResumeError(
        f"{holder} is training in {run}: wait for it, or use another `output` folder."
    )


class _FileLock:
    """A lock of the operating system."""

    def __init__(self, run: Path, patience_seconds: float) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (run / ".lock").open("w")
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.close()
                    raise _busy(run) from None
                time.sleep(0.2)

    def check(self) -> None:
        """Nobody can take over while the file is open."""

    def close(self) -> None:
        self._file.close()


class _Lease:
    """An object that its holder rewrites; see the module's docstring."""

    def __init__(self, run: str, patience_seconds: float) -> None:
        self._run = run
        self._own: dict[str, Any] = {
            "owner": secrets.token_hex(8),
            "host": platform.node(),
            "pid": os.getpid(),
            "pid_space": _pid_space(),
            "beat": 0,
            "is_free": False,
        }
        while True:
            self._wait_until_free(patience_seconds)
            self._write()
            time.sleep(_SETTLE_SECONDS)
            if self._is_own():
                break
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if not self._is_own():
            raise ResumeError(
                f"Another process has taken over {self._run}: this one was not heard of for "
                f"{_DEAD_AFTER_SECONDS:.0f} s. It stops here and leaves the run to the other one."
            )

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        with suppress(StorageError):  # then it stands still and is taken for dead
            if self._is_own():
                # Written, not deleted: not every account that may write may delete.
                self._own["is_free"] = True
                self._write()

    def _wait_until_free(self, patience_seconds: float) -> None:
        """Return when there is no lease, or one of a dead process.

        Raises:
            ResumeError: the lease still moves after so many seconds.
        """
        started = since = time.monotonic()
        seen, has_moved = self._read(), False
        if seen is not None and not _has_ended(seen):
            log.info("%s was left by %s: waiting to see if it lives", self._run, _holder(seen))
        while (lease := self._read()) is not None and not _has_ended(lease):
            now = time.monotonic()
            if lease != seen:
                seen, since, has_moved = lease, now, True
            elif now - since > _DEAD_AFTER_SECONDS:
                return
            if has_moved and now - started > patience_seconds:
                raise _busy(self._run, _holder(lease))
            time.sleep(_LOOK_SECONDS)

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            try:
                if not self._is_own():
                    return  # `check` tells
                self._own["beat"] += 1
                self._write()
            except StorageError as error:  # an outage stops everybody; `check` tells who is left
                log.debug("%s", error)

    def _is_own(self) -> bool:
        lease = self._read()
        return lease is not None and lease["owner"] == self._own["owner"]

    def _read(self) -> dict[str, Any] | None:
        """The lease that somebody holds."""
        try:
            lease = json.loads(read_bytes(self._run, LEASE_FILE))
        except MissingObjectError:
            return None
        return None if lease["is_free"] else lease

    def _write(self) -> None:
        write_bytes(self._run, LEASE_FILE, json.dumps(self._own).encode())


def _holder(lease: dict[str, Any]) -> str:
    return f"Process {lease['pid']} on {lease['host']}"


def _has_ended(lease: dict[str, Any]) -> bool:
    """Whether the holder is known to be gone: only of processes that this one could see."""
    if lease["pid_space"] is None or lease["pid_space"] != _pid_space():
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        return False
    return False


def _pid_space() -> str | None:
    """What must be the same for a process number to mean the same process; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
