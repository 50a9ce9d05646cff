"""Requests to stop, or to save soon: signals, a file in the run folder, notices of the launcher.

SIGTERM, or a file named `stop` in the run folder, ends a run after the step at hand and a
checkpoint. SIGUSR1, or a notice that this node will be taken away, asks for a checkpoint at once;
the run goes on. Ranks agree on what they heard, so that all of them act after the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tmu_dist.collectives import Collectives

STOP_FILE = "stop"
"""Whoever puts it into a run folder ends the run; the next start removes it."""


class RunStoppedError(RuntimeError):
    """The run was asked to stop, and did, after a checkpoint."""


@dataclass(frozen=True)
class Request:
    """What some rank was asked for."""

    kind: Literal["save", "stop"]
    reason: str


class Requests:
    """What the ranks of a run are asked for from outside.

    Args:
        run: the run folder.
        collectives: the ranks.
        notice: called on every rank after every step; says why a checkpoint should be written
            soon, if it should. May use collectives of its own.
    """

    def __init__(
        self,
        run: str,
        collectives: Collectives,
        notice: Callable[[], str | None] | None = None,
    ) -> None:
        self._run = run
        self._collectives = collectives
        self._notice = notice

    def heard(self) -> Request | None:
        """What any rank was asked for before its last step; the same on every rank.

        Every rank calls this after every step.
        """
        return None

    def close(self) -> None:
        """Leave signals as they were found."""
