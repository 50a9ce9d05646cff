"""Batches of an archive for training and evaluation, the same for any number of readers.

A stock torch `DataLoader` asks an `Archive` for one rank's part of each global batch; which samples
those are is decided in order.py. Batches arrive in order whatever the worker count, and each one
carries the position after it, so a checkpoint needs no state of the loader but that number.

Not here: reading and its checks (archive.py), scaling and augmentation (transforms.py, training).

Shape letters: B samples of this rank, T time, C channels, H height, W width.
"""

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tmu_dist.data.archive import Archive, ShardError, open_archive
from tmu_dist.data.order import (
    ORDER_VERSION,
    EpochOrder,
    GlobalBatch,
    count_of_fraction,
    epoch_order,
    global_batch,
    rank_slice,
)
from tmu_dist.data.storage import is_process_local

__all__ = ["Archive", "Batch", "SequenceLoader", "ShardError", "open_archive"]


class Batch(NamedTuple):
    """One rank's part of one step."""

    frames_BTCHW: Tensor
    """uint8 or uint16, as stored."""
    sample_ids_B: Tensor
    """int64, positions in the split."""
    weights_B: Tensor
    """float32: 1 for a sample, 0 for a repeat that only fills up the epoch's last batch."""
    global_count: int
    """Real samples of the step over all ranks; the same number on every rank."""
    consumed: int
    """Position after this batch: samples consumed by all ranks since position 0."""


class _Request(NamedTuple):
    """What the main process asks a reading process for."""

    part: GlobalBatch
    consumed: int


class SequenceLoader:
    """This rank's batches of one split.

    Args:
        archive: from `open_archive`.
        split: "train", "val" or "test".
        global_batch_size: samples per step over all ranks, a multiple of `world_size`.
        rank: this process, in [0, world_size).
        world_size: number of processes that share each global batch.
        seed: of the order; which samples a fraction has does not depend on it.
        fraction: samples to use, as a multiple of the manifest's `full_train_samples` in the
            training split (None: of all), of all elsewhere; smaller subsets lie in larger ones.
        shuffle: whether `stream` shuffles each epoch; without, it follows the sample ids.
        num_workers: reading processes of this rank; 0 reads in this process. Started with
            "forkserver", so a script that uses them needs its `if __name__ == "__main__"`.
        pin_memory: page-lock batches for faster copies to a GPU.

    Raises:
        ValueError: an argument out of range, or one that does not fit the archive.
    """

    def __init__(
        self,
        archive: Archive,
        split: str,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        fraction: float = 1.0,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}.")
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} cannot be dealt evenly to "
                f"{world_size} ranks: choose a positive multiple of {world_size}."
            )
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}.")
        if num_workers and is_process_local(archive.url):
            raise ValueError(
                f"{archive.url} exists in this process only: use num_workers=0, not {num_workers}."
            )
        self._full = archive.manifest.full_train_samples if split == "train" else None
        self.num_samples = count_of_fraction(
            archive.manifest.num_samples(split), fraction, self._full
        )
        """Samples per epoch, after the fraction."""
        self.steps_per_epoch = -(-self.num_samples // global_batch_size)
        self.global_batch_size = global_batch_size
        self._archive = archive
        self._split = split
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._fraction = fraction
        self._shuffle = shuffle
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def stream(self, start: int) -> Iterator[Batch]:
        """Return the endless batches of a run from a position on, epoch after epoch.

        Args:
            start: samples consumed so far in the whole run, 0 or the `consumed` of a batch. It may
                come from a run with another world size, worker count or batch size.
        """
        if start < 0:
            raise ValueError(f"A run starts at position 0 or later, got {start}.")
        return self._read(self._stream_requests(start))

    def one_pass(self) -> Iterator[Batch]:
        """Return the split once in the order of its ids; all ranks take equally many steps."""
        return self._read(self._epoch_requests(self._order(0, shuffle=False), 0, 0))

    def state(self) -> dict[str, Any]:
        """Return what a position depends on, as JSON values: keep it beside the position."""
        return {
            "manifest_hash": self._archive.manifest.content_hash,
            "split": self._split,
            "seed": self._seed,
            "fraction": self._fraction,
            "full_samples": self._full,
            "shuffle": self._shuffle,
            "order_version": ORDER_VERSION,
        }

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Refuse a saved state in whose order this loader would not continue.

        Raises:
            ValueError: names each difference.
        """
        here = self.state()
        differences = [
            f"{key} was {saved.get(key)!r} and is {here.get(key)!r}"
            for key in sorted(here.keys() | saved.keys())
            if saved.get(key) != here.get(key)
        ]
        if differences:
            raise ValueError(
                f"The data position cannot be resumed: {'; '.join(differences)}. Use the same data "
                "and settings as the checkpoint, or start a new run."
            )

    def _order(self, epoch: int, *, shuffle: bool) -> EpochOrder:
        return epoch_order(
            [shard.num_samples for shard in self._archive.manifest.shards(self._split)],
            seed=self._seed,
            epoch=epoch,
            fraction=self._fraction,
            full=self._full,
            shuffle=shuffle,
        )

    def _stream_requests(self, start: int) -> Iterator[_Request]:
        epoch, position = divmod(start, self.num_samples)
        while True:
            order = self._order(epoch, shuffle=self._shuffle)
            yield from self._epoch_requests(order, position, epoch * self.num_samples)
            epoch, position = epoch + 1, 0

    def _epoch_requests(
        self, order: EpochOrder, position: int, consumed_before: int
    ) -> Iterator[_Request]:
        for step_start in range(position, self.num_samples, self.global_batch_size):
            step = global_batch(order, step_start, self.global_batch_size)
            part = rank_slice(step, self._rank, self._world_size)
            yield _Request(part, consumed_before + step_start + step.global_count)

    def _read(self, requests: Iterable[_Request]) -> Iterator[Batch]:
        loader: DataLoader[Batch | ShardError] = DataLoader(
            _Reader(self._archive, self._split),
            sampler=requests,  # with batch_size=None, one "index" is one request
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self._num_workers,
            multiprocessing_context=_worker_context() if self._num_workers else None,
            pin_memory=self._pin_memory,
            # Its own: without, starting a loader would draw from the model's global generator.
            generator=torch.Generator(),
        )
        for answer in loader:
            if isinstance(answer, ShardError):
                raise answer
            yield answer


class _Reader(Dataset[Batch | ShardError]):
    """Answers requests; lives in the reading processes.

    A damaged shard is an answer, not an exception: torch would bury the message under a worker's
    traceback, and keep the failed iterator in a reference cycle that takes seconds to clean up.
    """

    def __init__(self, archive: Archive, split: str) -> None:
        self._archive = archive
        self._split = split

    def __getitem__(self, request: _Request) -> Batch | ShardError:
        ids, weights, global_count = request.part
        try:
            frames_BTCHW = self._archive.read(self._split, ids.tolist())
        except ShardError as error:
            return error
        return Batch(
            frames_BTCHW=torch.from_numpy(frames_BTCHW),
            sample_ids_B=torch.from_numpy(ids),
            weights_B=torch.from_numpy(weights),
            global_count=global_count,
            consumed=request.consumed,
        )


def _worker_context() -> BaseContext:
    """Return how reading processes start: never forked from this one (see storage.py)."""
    context = multiprocessing.get_context("forkserver")
    # Imported once in the server, not seconds long in every worker of every pass.
    context.set_forkserver_preload([__name__])
    return context


def _unchanged(batch: Any) -> Any:
    return batch
