"""A part of a batch learned from by replaying a recording, instead of launching each kernel anew.

A step of a recurrent network is thousands of small kernels, and launching them takes longer than
running them. A CUDA graph is such a sequence, recorded once and launched as one: the same kernels
on the same addresses. So everything that changes from part to part lies in buffers that are filled
before each replay, and nothing that a recording cannot hold may change (`TransferMethod.unsteady`).

Deliberately not here: updates, which stay as they are, and exchanges between ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tmu_dist.transfer.base import TrainingBatch

Terms = dict[str, Tensor]
Learn = Callable[[TrainingBatch, float], Terms]
"""Adds the gradient of so many times the objective of a part, and returns the objective's terms."""
Found = TypeVar("Found")

REHEARSALS = 3
"""Parts that are learned from before one is recorded: libraries set themselves up, compilers
compile, and gradients get their places in memory."""


class Recorder(Protocol):
    """Records what a device is told to do."""

    def rehearse(self, run: Callable[[], Found]) -> Found:
        """Do what is to be recorded later, where it will be recorded."""

    def record(self, run: Callable[[], Found]) -> tuple[Found, Callable[[], object]]:
        """Go through it without its being done.

        Returns:
            What it returns, whose tensors have no numbers yet; and what does it, as often as
            wanted, with these tensors as results.
        """


class CUDARecorder:
    """Records CUDA graphs, in a stream of its own as capturing needs it.

    Args:
        device: the card.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def rehearse(self, run: Callable[[], Found]) -> Found:
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            found = run()
        outside.wait_stream(self.stream)
        return found

    def record(self, run: Callable[[], Found]) -> tuple[Found, Callable[[], object]]:
        gc.collect()  # nothing of earlier backward passes may be left, or it is waited for
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            # Other threads pin batches and write checkpoints meanwhile.
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            found = run()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return found, replay


class RecordedParts:
    """Learns from parts of batches: the first few as ever, later ones by replaying a recording.

    There is one recording, of parts like the first: as many sequences that weigh as much, with
    masks or without. Any other part, such as a smaller last one, is learned from without it.

    Gradients are added to those that the parameters have; they must never be set to None, since
    the recording knows their places.

    Args:
        learn: what is recorded. Whatever it reads beside the part's tensors must never change its
            place, nor, if it lies on the host, its value.
        recorder: of the device.
    """

    def __init__(self, learn: Learn, recorder: Recorder) -> None:
        self._learn = learn
        self._recorder = recorder
        self._kind: tuple[object, ...] | None = None
        self._rehearsals_left = REHEARSALS
        self._recording: _Recording | None = None

    def __call__(self, part: TrainingBatch, scale: float) -> Terms:
        """As `Learn`; the terms are the caller's."""
        kind = _kind(part, scale)
        self._kind = self._kind or kind
        if kind != self._kind:
            return self._learn(part, scale)
        if self._rehearsals_left:
            self._rehearsals_left -= 1
            return self._recorder.rehearse(lambda: self._learn(part, scale))
        if self._recording is None:
            self._recording = self._record(part, scale)
        return self._recording.replayed(part)

    def _record(self, part: TrainingBatch, scale: float) -> _Recording:
        buffers: dict[str, Any] = {name: value.clone() for name, value in _tensors(part)}
        given = replace(part, sample_ids_B=None, **buffers)
        terms, replay = self._recorder.record(lambda: self._learn(given, scale))
        return _Recording(given, terms, replay)


class _Recording(NamedTuple):
    """What was recorded, with the places of what it reads and tells."""

    given: TrainingBatch
    terms: Terms
    replay: Callable[[], object]

    def replayed(self, part: TrainingBatch) -> Terms:
        """The terms of another part, after its gradients were added."""
        for (_, buffer), (_, value) in zip(_tensors(self.given), _tensors(part), strict=True):
            buffer.copy_(value, non_blocking=True)
        self.replay()
        # The next replay writes to the same places.
        return {name: value.clone() for name, value in self.terms.items()}


def _tensors(part: TrainingBatch) -> Iterator[tuple[str, Tensor]]:
    """What the device reads of a part, by name; which sequences they are stays on the host."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and field.name != "sample_ids_B":
            yield field.name, value


def _kind(part: TrainingBatch, scale: float) -> tuple[object, ...]:
    """What a recording is made for."""
    tensors = [(name, value.shape, value.dtype) for name, value in _tensors(part)]
    return (*tensors, part.share, scale)
