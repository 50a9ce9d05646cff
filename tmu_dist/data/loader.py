"""Batches of one or several archives for training and evaluation, the same for any number of
readers.

Which samples make up each global batch is decided in order.py; reading.py asks the archives for one
rank's part. Batches arrive in order whatever the number of reading processes, and each one carries
the position after it, so a checkpoint needs no state of the loader but that number.

Not here: checks of what is read (archive.py), copies on the node (cache.py), scaling and
augmentation (transforms.py, training).
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from tmu_dist.data.archive import Archive, ShardError, open_archive
from tmu_dist.data.cache import NodeCache, node_cache
from tmu_dist.data.manifest import Manifest, Shard, ZarrShard
from tmu_dist.data.order import (
    ORDER_VERSION,
    DataSet,
    EpochOrder,
    ShardUses,
    counts_of_epoch,
    epoch_order,
    global_batches,
    rank_slice,
    shard_uses,
)
from tmu_dist.data.prefetch import ShardPrefetcher, Use, working_set
from tmu_dist.data.reading import (
    Batch,
    ReadingProcesses,
    Request,
    SplitReader,
    read_here,
    with_lookahead,
)
from tmu_dist.data.storage import is_process_local, join_url, local_path

__all__ = ["Archive", "Batch", "SequenceLoader", "ShardError", "open_archive", "open_archives"]

_STEPS_AT_ONCE = 512
"""Steps whose samples are worked out together: one by one, this would cost more than reading."""


class SequenceLoader:
    """This rank's batches of one split.

    Args:
        archives: from `open_archive`: one, or several of the same kind of frames that are mixed.
        split: "train", "val" or "test".
        global_batch_size: samples per step over all ranks; where it is no multiple of `world_size`,
            some ranks get repeats of weight 0.
        rank: this process, in [0, world_size).
        world_size: number of processes that share each global batch.
        node_ranks: the ranks on this rank's node, which share its cache; None: all ranks.
        seed: of the order; which samples a fraction has does not depend on it.
        fraction: samples of the first archive to use, as a multiple of the manifest's
            `full_train_samples` in the training split (None: of all), of all elsewhere; smaller
            subsets lie in larger ones. Of the other archives 1 is used.
        mix_weights: each archive's share of an epoch; empty: every sample exactly once.
        shuffle: whether `stream` shuffles each epoch; without, it follows the sample ids.
        shuffle_window, shuffle_lanes: `window` and `lanes` of `order.epoch_order`: larger ones
            shuffle better, smaller ones need fewer shards at a time.
        num_workers: reading processes of this rank; 0 reads in this process. Started with
            "forkserver", so a script that uses them needs its `if __name__ == "__main__"`.
        pin_memory: page-lock batches, so that copies to a GPU can run beside computation.

    Raises:
        ValueError: an argument out of range, or one that does not fit the archives; archives that
            differ in what their numbers mean; a cache too small for this order.
    """

    def __init__(
        self,
        archives: Archive | Sequence[Archive],
        split: str,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        node_ranks: range | None = None,
        seed: int = 0,
        fraction: float = 1.0,
        mix_weights: Sequence[float] = (),
        shuffle: bool = True,
        shuffle_window: int = 4096,
        shuffle_lanes: int = 16,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._archives = [archives] if isinstance(archives, Archive) else list(archives)
        _check_shares(global_batch_size, rank, world_size)
        _check_same_frames(self._archives)
        _check_workers(num_workers, self._archives)
        self._data_sets = [
            DataSet(
                shard_sizes=tuple(shard.num_samples for shard in archive.manifest.shards(split)),
                fraction=1.0 if number else fraction,
                full=archive.manifest.full_train_samples if split == "train" else None,
            )
            for number, archive in enumerate(self._archives)
        ]
        self.num_samples = sum(counts_of_epoch(self._data_sets, mix_weights))
        """Samples per epoch, after the fraction."""
        self.steps_per_epoch = -(-self.num_samples // global_batch_size)
        self.global_batch_size = global_batch_size
        self._split = split
        self._rank = rank
        self._world_size = world_size
        self._node_ranks = range(world_size) if node_ranks is None else node_ranks
        self._seed = seed
        self._mix_weights = tuple(mix_weights)
        self._shuffle = shuffle
        self._window, self._lanes = shuffle_window, shuffle_lanes
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        # Of no method of this object, which would be a circle that keeps reading processes alive.
        settings = {"seed": seed, "window": shuffle_window, "lanes": shuffle_lanes}
        self._order = lru_cache(maxsize=2)(
            partial(_order_of, self._data_sets, self._mix_weights, settings)
        )
        self._reader = SplitReader(self._archives, split)
        self._processes: ReadingProcesses | None = None
        self._ahead_bytes = self._checked_room_ahead()

    def stream(self, start: int) -> Iterator[Batch]:
        """Return the endless batches of a run from a position on, epoch after epoch.

        Args:
            start: samples consumed so far in the whole run, 0 or the `consumed` of a batch. It may
                come from a run with another world size, worker count or batch size.
        """
        if start < 0:
            raise ValueError(f"A run starts at position 0 or later, got {start}.")
        epochs = range(start // self.num_samples, sys.maxsize)
        return self._read(start, epochs, shuffle=self._shuffle)

    def one_pass(self) -> Iterator[Batch]:
        """Return the split once in the order of its ids; all ranks take equally many steps."""
        return self._read(0, range(1), shuffle=False)

    def state(self) -> dict[str, Any]:
        """Return what a position depends on, as JSON values: keep it beside the position."""
        return {
            "manifest_hashes": [archive.manifest.content_hash for archive in self._archives],
            "split": self._split,
            "seed": self._seed,
            "fraction": self._data_sets[0].fraction,
            "full_samples": self._data_sets[0].full,
            "mix_weights": list(self._mix_weights),
            "shuffle": self._shuffle,
            "shuffle_window": self._window,
            "shuffle_lanes": self._lanes,
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

    def epoch(self, number: int) -> EpochOrder:
        """Return the order of one epoch of `stream`, over all ranks."""
        return self._order(number, self._shuffle)

    def uses(self, number: int, ranks: range, start: int = 0) -> ShardUses:
        """Return which shards some ranks use when in one epoch of `stream`."""
        return self._uses(self.epoch(number), ranks, start)

    def shard(self, number: int) -> tuple[Archive, Shard | ZarrShard]:
        """Return one of the shards that `uses` counts, and the archive that it belongs to."""
        for archive in self._archives:
            shards = archive.manifest.shards(self._split)
            if number < len(shards):
                return archive, shards[number]
            number -= len(shards)
        raise ValueError("There are not so many shards.")

    def _uses(self, order: EpochOrder, ranks: range, start: int) -> ShardUses:
        return shard_uses(
            order,
            [size for data_set in self._data_sets for size in data_set.shard_sizes],
            start=start,
            global_batch_size=self.global_batch_size,
            ranks=ranks,
            world_size=self._world_size,
        )

    def _read(self, start: int, epochs: range, *, shuffle: bool) -> Iterator[Batch]:
        """Yield this rank's batches of some epochs, the first one from `start` on."""
        requests = self._requests_of(start, epochs, shuffle)
        if any(_is_read_by_ranges(archive) for archive in self._archives):
            requests = with_lookahead(requests, max(1, self._num_workers))
        prefetcher = self._prefetcher(start, epochs, shuffle)
        try:
            position = start
            for batch in self._batches(requests):
                position += batch.global_count
                if batch.consumed != position:
                    raise RuntimeError(
                        f"The batches up to position {batch.consumed} hold {position} samples. "
                        "This is an error of the loader; please report it."
                    )
                if prefetcher is not None:
                    prefetcher.advance(position)
                yield batch
                del batch  # its memory may be used for the next one
        finally:
            if prefetcher is not None:
                prefetcher.close()

    def _batches(self, requests: Iterator[Request]) -> Iterator[Batch]:
        batch_size = -(-self.global_batch_size // self._world_size)
        if not self._num_workers:
            return read_here(
                self._reader, requests, batch_size=batch_size, pin_memory=self._pin_memory
            )
        if self._processes is None:
            self._processes = ReadingProcesses(
                self._reader,
                self._num_workers,
                batch_size=batch_size,
                pin_memory=self._pin_memory,
            )
        return self._processes.read(requests)

    def _requests_of(self, start: int, epochs: range, shuffle: bool) -> Iterator[Request]:
        ranks = range(self._rank, self._rank + 1)
        for epoch in epochs:
            order = self._order(epoch, shuffle)
            before = epoch * len(order.ids)
            block = max(0, start - before)
            while block < len(order.ids):
                steps = global_batches(order, block, _STEPS_AT_ONCE, self.global_batch_size)
                part = rank_slice(steps, ranks, self._world_size)
                for ids, weights, count in zip(
                    part.ids.tolist(), part.weights, part.counts.tolist(), strict=True
                ):
                    block += count
                    yield Request(ids, weights, count, before + block)

    @property
    def _cache(self) -> NodeCache | None:
        """The node's cache, if any of the archives is read through it."""
        return next((each.cache for each in self._archives if each.cache is not None), None)

    def _prefetcher(self, start: int, epochs: range, shuffle: bool) -> ShardPrefetcher | None:
        """Begin to copy the shards that this rank needs next; None without a cache."""
        cache = self._cache
        if cache is None:
            return None

        def uses() -> Iterator[Use]:
            for epoch in epochs:
                order = self._order(epoch, shuffle)
                before = epoch * len(order.ids)
                ranks = range(self._rank, self._rank + 1)
                found = self._uses(order, ranks, max(0, start - before))
                for number, first, last in zip(*(values.tolist() for values in found), strict=True):
                    archive, shard = self.shard(number)
                    if archive.cache is not None:
                        object_ = _Object(archive.url, shard.path, shard.num_bytes, shard.sha256)
                        yield Use(object_, shard.num_bytes, before + first, before + last)

        def fetch(key: Hashable) -> bool:
            return cache.fetch(*cast(_Object, key))

        def keep(key: Hashable) -> bool:
            return cache.keep(cast(_Object, key).sha256)

        def release(key: Hashable) -> None:
            cache.release(cast(_Object, key).sha256)

        prefetcher = ShardPrefetcher(fetch, keep, release, uses(), ahead_bytes=self._ahead_bytes)
        prefetcher.advance(start)
        return prefetcher

    def _checked_room_ahead(self) -> int:
        """Return how many bytes this rank may copy ahead; refuse a cache that is too small."""
        cache = self._cache
        if cache is None:
            return 0
        uses = self._uses(self._order(0, self._shuffle), self._node_ranks, 0)
        shards = [self.shard(number) for number in uses.shards.tolist()]
        sizes = np.array([shard.num_bytes if each.cache else 0 for each, shard in shards])
        needed = working_set(sizes, uses.first, uses.last)
        cache.check_working_set(needed)
        # Not more than an epoch ahead: a large cache would only be told again what it has.
        return min((cache.limit_bytes - needed) // len(self._node_ranks), int(sizes.sum()))


def _order_of(
    data_sets: Sequence[DataSet],
    mix_weights: Sequence[float],
    settings: Mapping[str, Any],
    epoch: int,
    shuffle: bool,
) -> EpochOrder:
    weights = mix_weights if shuffle else ()
    return epoch_order(data_sets, epoch=epoch, weights=weights, shuffle=shuffle, **settings)


class _Object(NamedTuple):
    """A shard to fetch ahead."""

    url: str
    path: str
    num_bytes: int
    sha256: str

    def __str__(self) -> str:
        return join_url(self.url, self.path)


def open_archives(
    urls: Sequence[str],
    *,
    reading: Literal["auto", "cache", "range"] = "auto",
    cache_folder: str | None = None,
    cache_gib: float | None = None,
) -> list[Archive]:
    """Open archives for training or evaluation.

    Args:
        urls: their folders.
        reading: "cache" copies shards to this node's disk before they are read, "range" fetches
            samples by byte ranges; "auto" reads local archives in place and others by the cache.
        cache_folder, cache_gib: as in `cache.node_cache`.

    Raises:
        StorageError, ManifestError: as `open_archive`.
        ValueError: a local archive that is to be read by ranges.
    """
    cache = None if reading == "range" else node_cache(cache_folder, cache_gib)
    archives = []
    for url in urls:
        is_local = local_path(url) is not None
        if reading == "range" and is_local:
            raise ValueError(
                f"{url} is a local folder, which is read in place: data.reading=range is for "
                "object stores. Use auto."
            )
        in_place = is_process_local(url) or (is_local and reading == "auto")
        archives.append(open_archive(url, cache=None if in_place else cache))
    return archives


def _is_read_by_ranges(archive: Archive) -> bool:
    return archive.cache is None and local_path(archive.url) is None


def _check_shares(global_batch_size: int, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}.")
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}.")


def _check_workers(num_workers: int, archives: Sequence[Archive]) -> None:
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}.")
    for archive in archives:
        if num_workers and is_process_local(archive.url):
            raise ValueError(
                f"{archive.url} exists in this process only: use num_workers=0, not {num_workers}."
            )


def _check_same_frames(archives: Sequence[Archive]) -> None:
    """Refuse archives whose frames cannot stand in one batch."""
    if not archives:
        raise ValueError("There must be an archive to load from.")

    def facts(manifest: Manifest) -> dict[str, Any]:
        return {
            "sample shape": manifest.sample_shape,
            "dtype": manifest.dtype,
            "units": manifest.units,
            "frame interval in minutes": manifest.frame_interval_minutes,
        }

    wanted = facts(archives[0].manifest)
    for archive in archives[1:]:
        for name, value in facts(archive.manifest).items():
            if value != wanted[name]:
                raise ValueError(
                    f"{archive.url} cannot be mixed with {archives[0].url}: its {name} is {value}, "
                    f"not {wanted[name]}. Prepare both with the same settings of data_prep."
                )
