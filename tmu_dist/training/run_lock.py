"""One process at a time trains in a run folder.

On a disk that is the operating system's lock, which dies with its holder. (Linux passes it on to
NFS servers; one that lost a client keeps its locks for its lease time, often 90 s, and a mount with
`nolock` or `local_lock=flock` locks out processes of the same machine only.) A store has no locks:
there the holder keeps a lease, an object that it rewrites every few seconds. A lease that stands
still was left by a dead process, and so was one of a process of this machine that is gone. Who
finds no lease, or a dead one, writes its own, waits a moment, and holds the run if the lease is
still its own then: of several that try at once, the last one to write.

The lease needs no clock in common and no conditional writes, which not every store has. Neither it
nor the lock is proof: a process that was stopped or cut off, and then goes on, may find that
another one has taken over, and workers outlive the launcher that held the lock. So whoever is to
write puts a token of its own into the folder (`claim_run`) before it reads what is there, and looks
for it (`RunLock.check`) before it changes anything that readers rely on. What is left to chance is
the moment between that look and one rename, or one object.
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
from tmu_dist.folders import write_text
from tmu_dist.run_folder import ResumeError

log = logging.getLogger(__name__)

LEASE_FILE = "lease.json"
LOCK_FILE = ".lock"
OWNER_FILE = "owner.json"
_BEAT_SECONDS = 5.0
_DEAD_AFTER_SECONDS = 40.0
"""Longer than a beat whose requests are retried through a short outage."""
_SETTLE_SECONDS = 1.0
_LOOK_SECONDS = 0.5


class RunLock(Protocol):
    """The right to write a run."""

    def check(self) -> None:
        """Make sure that nobody has taken over.

        Raises:
            ResumeError: another process has.
            StorageError: the folder cannot be read.
        """
        ...

    def close(self) -> None:
        """Let others train in the folder."""
        ...


def claim_run(run: str) -> RunLock:
    """Take a run over from workers of an earlier start; the launcher holds its lock.

    Raises:
        WriteError, StorageError: the run folder cannot be written.
    """
    return _Claim(run)


def lock_run(run: str, *, patience_seconds: float = 10.0) -> RunLock:
    """Make this process the only one that trains in a run folder, until the lock is closed.

    Args:
        run: the run folder.
        patience_seconds: how long to wait for one that is alive: it may have been told to end, or
            its death may not have been noticed yet.

    Raises:
        ResumeError: another process is training there.
        WriteError, StorageError: the run folder cannot be written.
    """
    folder = local_path(run)
    keeper = _Lease(run, patience_seconds) if folder is None else _Lock(folder, patience_seconds)
    try:
        return _Claim(run, keeper)
    except BaseException:
        keeper.close()
        raise


def holder(run: str) -> str | None:
    """Who trains in a run folder, as messages name it; None: nobody. Changes nothing there.

    In a store it may take as long as a lease must stand still to be taken for dead.

    Raises:
        StorageError: the store cannot be reached.
    """
    folder = local_path(run)
    return _lease_holder(run) if folder is None else _lock_holder(folder)


def _lock_holder(run: Path) -> str | None:
    try:
        file = (run / LOCK_FILE).open()
    except FileNotFoundError:
        return None
    with file:
        try:
            # Shared, so that several may look, and for a moment that those who wait do not notice.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _named_in(file)
    return None


def _lease_holder(run: str) -> str | None:
    seen = lease = _read_lease(run)
    deadline = time.monotonic() + _DEAD_AFTER_SECONDS
    while lease is not None and not _has_ended(lease) and time.monotonic() < deadline:
        if lease != seen:
            return _name(lease)
        time.sleep(_LOOK_SECONDS)
        lease = _read_lease(run)
    return None


class _Claim:
    """A token that the next one to claim the run replaces; see the module's docstring."""

    def __init__(self, run: str, keeper: _Lock | _Lease | None = None) -> None:
        self._run = run
        self._keeper = keeper
        self._own = {"token": secrets.token_hex(8), **_this_process()}
        write_text(run, OWNER_FILE, json.dumps(self._own) + "\n")

    def check(self) -> None:
        try:
            owner = json.loads(read_bytes(self._run, OWNER_FILE))
        except MissingObjectError:
            raise ResumeError(
                f"{self._run} is no longer there, or not whole: {OWNER_FILE} has been removed. "
                "This process stops here and writes nothing more."
            ) from None
        if owner["token"] != self._own["token"]:
            raise ResumeError(
                f"{_name(owner)} has taken over {self._run}. This one stops here and leaves the "
                "run to the other one."
            )

    def close(self) -> None:
        """Leave the token: it says whose the newest checkpoint is."""
        if self._keeper is not None:
            self._keeper.close()


class _Lock:
    """A lock of the operating system, on a file that says who holds it."""

    def __init__(self, run: Path, patience_seconds: float) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (run / LOCK_FILE).open("a+")  # "w" would empty another one's
        deadline, has_told = time.monotonic() + patience_seconds, False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                other = _named_in(self._file)
                if time.monotonic() > deadline:
                    self._file.close()
                    raise _busy(run, other) from None
                if not has_told:
                    _tell_waiting(run, other, patience_seconds)
                    has_told = True
                time.sleep(_LOOK_SECONDS)
        self._file.truncate(0)
        self._file.write(json.dumps(_this_process()) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Lease:
    """An object that its holder rewrites; see the module's docstring."""

    def __init__(self, run: str, patience_seconds: float) -> None:
        self._run = run
        self._own: dict[str, Any] = {
            "owner": secrets.token_hex(8),
            **_this_process(),
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
        seen, has_moved = _read_lease(self._run), False
        if seen is not None and not _has_ended(seen):
            _tell_waiting(self._run, _name(seen), max(patience_seconds, _DEAD_AFTER_SECONDS))
        while (lease := _read_lease(self._run)) is not None and not _has_ended(lease):
            now = time.monotonic()
            if lease != seen:
                seen, since, has_moved = lease, now, True
            elif now - since > _DEAD_AFTER_SECONDS:
                return
            if has_moved and now - started > patience_seconds:
                raise _busy(self._run, _name(lease))
            time.sleep(_LOOK_SECONDS)

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            try:
                if not self._is_own():
                    return  # the claim tells
                self._own["beat"] += 1
                self._write()
            except StorageError as error:  # an outage stops everybody; the claim tells who is left
                log.debug("%s", error)

    def _is_own(self) -> bool:
        lease = _read_lease(self._run)
        return lease is not None and lease["owner"] == self._own["owner"]

    def _write(self) -> None:
        write_bytes(self._run, LEASE_FILE, json.dumps(self._own).encode())


def _named_in(file: IO[str]) -> str:
    """The holder of a lock, as it has written itself down."""
    file.seek(0)
    try:
        return _name(json.loads(file.read()))
    except json.JSONDecodeError:  # it has only just got the lock
        return "Another process"


def _read_lease(run: str) -> dict[str, Any] | None:
    """The lease that somebody holds."""
    try:
        lease = json.loads(read_bytes(run, LEASE_FILE))
    except MissingObjectError:
        return None
    return None if lease["is_free"] else lease


def _busy(run: str | Path, holder: str) -> ResumeError:
    return ResumeError(
        f"{holder} is training in {run}: wait for it, or use another `output` folder."
    )


def _tell_waiting(run: str | Path, holder: str, seconds: float) -> None:
    log.info("%s holds %s: waiting up to %.0f s for it to end", holder, run, seconds)


def _this_process() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid()}


def _name(process: dict[str, Any]) -> str:
    return f"Process {process['pid']} on {process['host']}"


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
