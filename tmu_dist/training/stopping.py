"""Requests to stop, or to save soon: signals, a file in the run folder, notices of the launcher.

SIGTERM, or a file named `stop` in the run folder, ends a run after the step at hand and a
checkpoint. SIGUSR1, or a notice that this node will be taken away, asks for a checkpoint at once;
the run goes on. Ranks agree on what they heard, so that all of them act after the same step.

Nobody waits for that: what ranks heard is exchanged while the next step runs, and looked at after
it. Once there is something, they also tell each other why.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from tmu_dist.collectives import Collectives
from tmu_dist.data.storage import StorageError, delete, exists, join_url, local_path, read_text
from tmu_dist.files import WriteError
from tmu_dist.folders import write_text

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

log = logging.getLogger(__name__)

STOP_FILE = "stop"
"""Whoever puts it into a run folder ends the run; it may say why. The next start removes it."""

ASK_AGAIN_SECONDS = 2.0
_LOOK_SECONDS = 2.0
_LOOK_STORE_SECONDS = 10.0
_SAME_SECONDS = 2.0
"""A second signal within this time is the first one, passed on by a launcher that got it, too."""


Kind = Literal["save", "stop"]


class Signals:
    """Hears signals until it is closed; in another than the main thread, which gets none, none.

    Args:
        numbers: of the signals.
        heard: called with the name of one, between two instructions of the main thread.
        once: only the first one is heard; another one, seconds later, acts as if nobody listened.
    """

    def __init__(
        self, numbers: Sequence[int], heard: Callable[[str], None], *, once: bool = True
    ) -> None:
        self._heard = heard
        self._once = once
        self._heard_at: float | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in numbers}

    def close(self) -> None:
        """Leave the signals as they were found."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._heard_at is None or not self._once:
            self._heard_at = now
            self._heard(signal.Signals(number).name)
        elif now - self._heard_at > _SAME_SECONDS:
            self.close()
            signal.raise_signal(number)


class RunStoppedError(RuntimeError):
    """The run was asked to stop, and did, after a checkpoint."""

    exit_code = 143
    """Of a command: what shells and schedulers show of a process that SIGTERM ended (128 + 15)."""


@dataclass(frozen=True)
class Request:
    """What some rank was asked for."""

    kind: Kind
    reason: str


class Requests:
    """What the ranks of a run are asked for from outside.

    Every rank makes one at once. Where this is the main thread, it handles SIGTERM and SIGUSR1
    until it is closed; a second SIGTERM, seconds later, ends the process as it would without.

    Args:
        run: the run folder. Rank 0 looks for the stop file; on NFS it may take a minute to see one
            of another machine.
        collectives: the ranks.
        notice: called on every rank after every step; says why a checkpoint should be written
            soon, if it should. May use collectives of its own. While it says the same, that is one
            notice.

    Raises:
        StorageError: the stop file of an earlier start cannot be removed.
    """

    def __init__(
        self,
        run: str,
        collectives: Collectives,
        notice: Callable[[], str | None] | None = None,
    ) -> None:
        self._run = run
        self._collectives = collectives
        self._notice = notice or (lambda: None)
        self._noticed: set[str] = set()
        self._wanted: dict[Kind, str] = {}
        """Reasons that other ranks were not told yet."""
        self._told: dict[Kind, str] = {}
        self._exchange: tuple[dist.Work, Tensor] | None = None
        self._closed = threading.Event()
        collectives.on_main(self._remove_stop_file)
        if collectives.ranks.is_main:
            threading.Thread(target=self._look_for_file, name="stop-file", daemon=True).start()
        self._signals = [
            Signals([signal.SIGTERM], partial(self._want, "stop")),
            Signals([signal.SIGUSR1], partial(self._want, "save"), once=False),
        ]

    def heard(self) -> Request | None:
        """What any rank was asked for before its last step; the same on every rank.

        Every rank calls this after every step. What came before one checkpoint asks for one.
        """
        if (notice := self._notice()) is not None and notice not in self._noticed:
            self._noticed.add(notice)
            self._wanted["save"] = notice
        if self._collectives.ranks.world_size == 1:
            return _strongest([self._take_wanted()])
        import torch  # here: the command that starts Ray's workers only asks them to stop
        import torch.distributed as dist

        request = self._agreed()
        if request is not None:
            self._noticed.add(request.reason)
            self._wanted.pop("save", None)  # the checkpoint that comes now answers it
        self._told = self._take_wanted()
        level = torch.tensor([2 if "stop" in self._told else len(self._told)])
        work = dist.all_reduce(level, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None  # only ranks outside the group get none
        self._exchange = work, level
        return request

    def close(self) -> None:
        """Leave signals as they were found."""
        self._closed.set()
        for each in self._signals:
            each.close()

    def _agreed(self) -> Request | None:
        """What the ranks told each other one step ago."""
        if self._exchange is None:
            return None
        work, level = self._exchange
        work.wait()
        return _strongest(self._collectives.all_gather_objects(self._told)) if level else None

    def _take_wanted(self) -> dict[Kind, str]:
        taken = dict(self._wanted)
        for kind in taken:  # what a signal or thread adds meanwhile stays for the next time
            del self._wanted[kind]
        return taken

    def _want(self, kind: Kind, reason: str) -> None:
        self._wanted[kind] = reason

    def _remove_stop_file(self) -> None:
        if exists(self._run, STOP_FILE):
            delete(self._run, STOP_FILE)

    def _look_for_file(self) -> None:
        pause = _LOOK_STORE_SECONDS if local_path(self._run) is None else _LOOK_SECONDS
        while not self._closed.wait(pause):
            with suppress(StorageError):  # out of reach: no request
                if exists(self._run, STOP_FILE):
                    why = read_text(self._run, STOP_FILE).strip()
                    self._wanted["stop"] = why or join_url(self._run, STOP_FILE)
                    return


def ask_to_stop(run: str, reason: str) -> None:
    """Put the stop file into a run folder, if it is not there; a store out of reach is warned of.

    A run that is just being started takes the file for an old one: until the run has ended, ask
    again every `ASK_AGAIN_SECONDS`.
    """
    try:
        if not exists(run, STOP_FILE):
            write_text(run, STOP_FILE, f"{reason}\n")
    except (WriteError, StorageError) as error:
        log.warning("cannot ask %s to stop: %s", run, error)


def _strongest(by_rank: Sequence[dict[Kind, str]]) -> Request | None:
    """Of what ranks were asked for; None if nothing."""
    kinds: tuple[Kind, Kind] = ("stop", "save")
    return next((Request(k, each[k]) for k in kinds for each in by_rank if k in each), None)
