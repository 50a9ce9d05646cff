"""Reading batches of archives, in this process or in others that stay.

Not here: which samples make up a batch (loader.py, order.py), checks of what is read (archive.py).

Shape letters: B samples of one rank, T time, C channels, H height, W width.
"""

from __future__ import annotations

import bisect
import itertools
import math
import mmap
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tmu_dist.data.archive import Archive, Codes, ShardError

_SAMPLES_AHEAD = 512
"""How far ahead of its batch a reader hears of samples that it will fetch by ranges. More than are
under way at a time: while one request pauses after a failure, the others must have work to do."""

_AHEAD = 2
"""Batches that each reading process is asked for in advance."""

_MOST_KEPT = 4
"""Batches whose memory is kept for others."""

_DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16}


class Batch(NamedTuple):
    """One rank's part of one step."""

    frames_BTCHW: Tensor
    """uint8 or uint16, as stored."""
    sample_ids_B: Tensor
    """int64, positions in the split; of several archives, counted on from one to the next."""
    weights_B: Tensor
    """float32: 1 for a sample, 0 for a repeat that only fills up the epoch's last batch."""
    global_count: int
    """Real samples of the step over all ranks; the same number on every rank."""
    consumed: int
    """Position after this batch: samples consumed by all ranks since position 0."""


class Request(NamedTuple):
    """What a reader is asked for."""

    ids: list[int]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    global_count: int
    consumed: int
    soon: list[int] = []  # noqa: RUF012 - never changed
    """Samples that the same reader will be asked for later: it may begin to fetch them."""

    def answered(self, frames_BTCHW: Tensor) -> Batch:
        """Return the batch that was asked for."""
        return Batch(
            frames_BTCHW=frames_BTCHW,
            sample_ids_B=torch.tensor(self.ids),
            weights_B=torch.from_numpy(self.weights),
            global_count=self.global_count,
            consumed=self.consumed,
        )


class SplitReader:
    """The samples of one split of one or several archives. May be sent to other processes."""

    def __init__(self, archives: Sequence[Archive], split: str) -> None:
        self._archives = archives
        self._split = split
        sizes = [archive.manifest.num_samples(split) for archive in archives]
        self._first_ids = [0, *itertools.accumulate(sizes)][:-1]
        self.sample_shape = archives[0].manifest.sample_shape
        self.dtype = archives[0].manifest.dtype

    def read(self, request: Request, codes_BTCHW: Codes) -> None:
        """Fill `codes_BTCHW` with the samples of a request.

        Raises:
            ShardError: names the shard and the sample.
        """
        if len(self._archives) == 1:
            (archive,) = self._archives
            if request.soon:
                archive.expect(self._split, request.soon)
            archive.read(self._split, request.ids, codes_BTCHW)
            return
        for archive, _, ids in self._by_archive(request.soon):
            archive.expect(self._split, ids)
        for archive, rows, ids in self._by_archive(request.ids):
            codes_BTCHW[rows] = archive.read(self._split, ids)

    def _by_archive(self, ids: Sequence[int]) -> Iterator[tuple[Archive, list[int], list[int]]]:
        """Yield archives with the rows of a batch that are theirs, and their own ids."""
        numbers = [bisect.bisect_right(self._first_ids, sample_id) - 1 for sample_id in ids]
        for number in sorted(set(numbers)):
            rows = [row for row, other in enumerate(numbers) if other == number]
            own = [ids[row] - self._first_ids[number] for row in rows]
            yield self._archives[number], rows, own


def read_here(
    reader: SplitReader, requests: Iterator[Request], *, batch_size: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the batches that are asked for, read in this process.

    Raises:
        ShardError: names the shard and the sample.
    """
    memory = _Memory((batch_size, *reader.sample_shape), reader.dtype, pin=pin_memory)
    for request in requests:
        yield memory.filled(request, partial(reader.read, request))


class ReadingProcesses:
    """Processes that read for one loader, from its first stream or pass to its end.

    Batches come through memory that is shared from the beginning: torch would share each tensor of
    each batch anew, which takes some milliseconds.

    Args:
        reader: sent to each of them; opens its files and stores there.
        count: how many.
        batch_size: the most samples of a request.
        pin_memory: page-lock what comes from them.
    """

    def __init__(
        self, reader: SplitReader, count: int, *, batch_size: int, pin_memory: bool
    ) -> None:
        # All that is under way, and the one that is being copied.
        shape = (batch_size, *reader.sample_shape)
        self._slots = _Slots(_AHEAD * count + 1, shape, reader.dtype)
        self._memory = _Memory(shape, reader.dtype, pin=pin_memory)
        self._pending = _Pending()
        self._loader: DataLoader[int | ShardError] = DataLoader(
            _SlotReader(reader, self._slots),
            sampler=self._pending,  # with batch_size=None, one "index" is one task
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=count,
            prefetch_factor=_AHEAD,
            multiprocessing_context=_worker_context(),
            persistent_workers=True,
            # Its own: without, starting would draw from the model's global generator.
            generator=torch.Generator(),
        )

    def read(self, requests: Iterator[Request]) -> Iterator[Batch]:
        """Yield the batches that are asked for, in that order; earlier requests are forgotten.

        Raises:
            ShardError: names the shard and the sample.
        """
        asked: deque[_Task] = deque()
        num_slots = len(self._slots.batches)

        def tasks() -> Generator[_Task]:
            for number, request in enumerate(requests):
                asked.append(_Task(request, number % num_slots))
                yield asked[-1]

        self._pending.tasks = pending = tasks()
        try:
            for answer in self._loader:
                request, slot = asked.popleft()
                if isinstance(answer, ShardError):
                    raise answer
                if answer != request.consumed:
                    raise RuntimeError(
                        f"A reading process answered for position {answer} instead of "
                        f"{request.consumed}. This is an error of the loader; please report it."
                    )
                # A copy: the slot will be filled again.
                found_BTCHW = self._slots.batches[slot, : len(request.ids)]
                yield self._memory.filled(request, partial(np.copyto, src=found_BTCHW))
        finally:
            # Torch keeps it, and through it all that it refers to, this object among them. Such a
            # circle is broken by the garbage collector only, which would end the queues before the
            # processes and then wait five seconds for each of them.
            pending.close()


class _Task(NamedTuple):
    """A request, and where its answer goes."""

    request: Request
    slot: int


class _Slots:
    """Memory for some batches that this process and its reading processes share.

    Not a file below /dev/shm, which has little room in many containers.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: str) -> None:
        self._facts = (count, *shape), dtype
        self._descriptor = os.memfd_create("tmu-dist-batches")
        os.ftruncate(self._descriptor, math.prod(self._facts[0]) * np.dtype(dtype).itemsize)
        self._map()

    def _map(self) -> None:
        shape, dtype = self._facts
        memory = mmap.mmap(self._descriptor, 0)
        self.batches: Codes = np.frombuffer(memory, dtype).reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"_facts": self._facts, "shared": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._facts = state["_facts"]
        self._descriptor = state["shared"].detach()
        self._map()

    def __del__(self) -> None:
        os.close(self._descriptor)


class _SlotReader(Dataset[int | ShardError]):
    """Does tasks in a reading process; answers with the position after the batch.

    A damaged shard is an answer, not an exception: torch would bury the message under a worker's
    traceback, and keep the failed iterator in a reference cycle that takes seconds to clean up.
    """

    def __init__(self, reader: SplitReader, slots: _Slots) -> None:
        self._reader = reader
        self._slots = slots

    def __getitem__(self, task: _Task) -> int | ShardError:
        request, slot = task
        try:
            self._reader.read(request, self._slots.batches[slot, : len(request.ids)])
        except ShardError as error:
            return error
        return request.consumed


class _Pending(Sampler[_Task]):
    """What the processes are to do next."""

    def __init__(self) -> None:
        self.tasks: Iterator[_Task] = iter(())

    def __iter__(self) -> Iterator[_Task]:
        return self.tasks


class _Memory:
    """Memory for batches, used again once nobody holds what was in it.

    Pages that are new to a process cost about as much as filling them.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, *, pin: bool) -> None:
        self._shape = shape
        self._dtype = dtype
        self._pin = pin
        self._arrays: list[Codes] = []

    def filled(self, request: Request, fill: Callable[[Codes], None]) -> Batch:
        """Return the batch that was asked for; `fill` puts the samples into its memory.

        Made here, so that no generator that waits has another hold on the memory.
        """
        frames_BTCHW, codes_BTCHW = self._batch(len(request.ids))
        fill(codes_BTCHW)
        return request.answered(frames_BTCHW)

    def _batch(self, count: int) -> tuple[Tensor, Codes]:
        """Return memory for so many samples, as a tensor and as an array."""
        if self._pin:  # torch uses its page-locked memory again by itself
            shape = (count, *self._shape[1:])
            frames = torch.empty(shape, dtype=_DTYPES[self._dtype], pin_memory=True)
            return frames, frames.numpy()
        for array in self._arrays:
            # The list's, this loop's and the call's own: no tensor and no view of one holds it.
            if sys.getrefcount(array) == 3:
                break
        else:
            array = np.empty(self._shape, self._dtype)
            self._arrays = [*self._arrays[-_MOST_KEPT + 1 :], array]
        codes: Codes = array[:count]
        return torch.from_numpy(codes), codes


def with_lookahead(requests: Iterator[Request], num_readers: int) -> Iterator[Request]:
    """Tell each reader with every request what it will be asked for next.

    Readers are asked in turn. Each sample is told once, as soon as it is near enough.
    """
    waiting: deque[Request] = deque()
    told: deque[list[int]] = deque([] for _ in range(num_readers))  # of the next readers in turn
    distance = 0

    def next_told() -> Request:
        soon = told.popleft()
        told.append([])
        return waiting.popleft()._replace(soon=soon)

    for request in requests:
        if not distance:
            distance = num_readers * max(1, -(-_SAMPLES_AHEAD // len(request.ids)))
        waiting.append(request)
        # The reader of this request is the one that is asked next but (len(waiting) - 1).
        told[(len(waiting) - 1) % num_readers].extend(request.ids)
        if len(waiting) > distance:
            yield next_told()
    while waiting:
        yield next_told()


def _worker_context() -> BaseContext:
    """Return how reading processes start: never forked from this one (see storage.py)."""
    context = multiprocessing.get_context("forkserver")
    # Imported once in the server, not seconds long in every worker of every pass.
    context.set_forkserver_preload([__name__])
    return context


def _unchanged(batch: Any) -> Any:
    return batch
