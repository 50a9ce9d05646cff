"""Teaching that begins when a batch is announced, and is taken when the student learns from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tmu_dist.teachers.bank import Teaching

Teach = Callable[[], tuple[Teaching, ...]]


class TeachingAhead:
    """Runs teachers before they are asked for, on a GPU in a stream of their own.

    There all teaching runs in that stream, announced or not: what teachers do for one batch never
    overlaps what they do for another, and banks that need all ranks are asked in the order of the
    announcements, the same on every rank. On the CPU, where student and teachers share their
    cores, it is done at once.

    Args:
        device: of student and teachers.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: list[_Begun] = []

    def begin(self, batch: object, teach: Teach) -> None:
        """Start on a batch, unless it is started on already.

        What was begun for the batch before it is kept, in case it is not taken yet; older is not.

        Args:
            batch: for which it is; told from others by being the very same object.
            teach: asks the teachers; called now.
        """
        if any(begun.batch is batch for begun in self._begun):
            return
        while len(self._begun) > 1:
            self._finish(self._begun[0])
        self._begun.append(self._started(batch, teach))

    def take(self, batch: object, teach: Teach) -> tuple[Teaching, ...]:
        """What teachers make of a batch, begun before or only now; arguments as in `begin`."""
        self.begin(batch, teach)
        return self._finish(next(begun for begun in self._begun if begun.batch is batch))

    def _started(self, batch: object, teach: Teach) -> _Begun:
        if self.stream is None:
            return _Begun(batch, teach(), None)
        # The batch itself may still be on its way to the device.
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            return _Begun(batch, teach(), self.stream.record_event())

    def _finish(self, begun: _Begun) -> tuple[Teaching, ...]:
        """Let the student's stream wait for it, and own what it found."""
        # The batch is held until here: no memory of it is used again while teachers read it.
        self._begun = [each for each in self._begun if each is not begun]
        if self.stream is not None and begun.done is not None:
            students = torch.cuda.current_stream(self.stream.device)
            students.wait_event(begun.done)
            for taught in begun.teachings:
                for values in taught.tensors().values():
                    values.record_stream(students)
        return begun.teachings


class _Begun(NamedTuple):
    """What teachers make of one batch, perhaps not computed yet."""

    batch: object
    teachings: tuple[Teaching, ...]
    done: torch.cuda.Event | None
    """None where it is computed."""
