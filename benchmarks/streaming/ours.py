"""This project's loader in the ways that the benchmark measures it, and the bare client of stores.

A place is a folder of data.py or the URL of one. What contenders are and how they are
asked for passes is in contenders.py.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c

from benchmarks.streaming.contenders import BATCH_SIZE, Passes
from tmu_dist.data.archive import Archive, open_archive
from tmu_dist.data.cache import node_cache
from tmu_dist.data.loader import SequenceLoader

_SHARDS_AT_ONCE = 4
"""As many as the loader copies into its cache at once."""


def tars(place: str) -> Passes:
    """The loader over tars: local files, or byte ranges of remote objects."""
    return _passes(open_archive(f"{place}/tars"))


def tars_first_pass(place: str) -> Passes:
    """The same, every pass the first over an archive just opened: it verifies all checksums."""
    return lambda number: tars(place)(number)


def tars_in_workers(place: str) -> Passes:
    """The same, read by two processes; one endless stream as in training, so they start once."""
    return _one_stream(_loader(open_archive(f"{place}/tars"), num_workers=2))


def tars_from_cache(place: str) -> Passes:
    """The loader over tars from a node cache that holds them after the first pass."""
    cache = node_cache(str(_temporary_folder()), None)
    return _passes(open_archive(f"{place}/tars", cache=cache))


def tars_into_cache(place: str) -> Passes:
    """The loader over tars by way of a node cache that is empty before every pass."""
    folder = _temporary_folder()

    def one_pass(number: int) -> Any:
        shutil.rmtree(folder)  # not timed: only the iteration is
        cache = node_cache(str(folder), None)
        return _passes(open_archive(f"{place}/tars", cache=cache))(number)

    return one_pass


def zarr(place: str) -> Passes:
    """The loader over a Zarr archive."""
    return _passes(open_archive(f"{place}/zarr"))


def without_checksums(contender: Callable[[str], Passes], place: str) -> Passes:
    """A contender with checksum functions that compute nothing and agree with any number."""
    calls = itertools.count()

    def nothing(*arguments: Any) -> _AnyNumber:
        next(calls)
        return _AnyNumber()

    google_crc32c.value = google_crc32c.extend = nothing
    passes = contender(place)
    for _ in passes(0):
        pass
    if next(calls) < BATCH_SIZE:
        raise RuntimeError("The loader no longer verifies its checksums by google_crc32c.")
    return passes


class _AnyNumber(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def bare_ranges(place: str, concurrency: int) -> Passes:
    """obstore alone: the byte ranges of the loader's order, so many at once, one batch held."""
    import obstore

    archive = open_archive(f"{place}/tars")
    loader = _loader(archive)
    store = _bare_store(f"{place}/tars")
    ranges = [
        (shard.path, offset, size)
        for shard in archive.manifest.shards("train")
        for offset, size in zip(shard.offsets, shard.sizes, strict=True)  # type: ignore[union-attr]
    ]

    def fetch(sample_id: int) -> Any:
        path, offset, size = ranges[sample_id]
        return obstore.get_range(store, path, start=offset, length=size)

    def one_pass(number: int) -> Iterator[list[Any]]:
        order = iter(loader.epoch(number).ids.tolist())
        with ThreadPoolExecutor(concurrency) as pool:
            ahead = [pool.submit(fetch, i) for i in itertools.islice(order, 2 * concurrency)]
            while ahead:
                batch, ahead = ahead[:BATCH_SIZE], ahead[BATCH_SIZE:]
                ahead += [pool.submit(fetch, i) for i in itertools.islice(order, BATCH_SIZE)]
                yield [future.result() for future in batch]

    return one_pass


def bare_objects(place: str) -> Passes:
    """obstore alone: every shard whole, some at once, thrown away."""
    import obstore

    shards = open_archive(f"{place}/tars").manifest.shards("train")
    store = _bare_store(f"{place}/tars")

    def fetch(shard: Any) -> range:
        obstore.get(store, shard.path).bytes()
        return range(shard.num_samples)

    def one_pass(number: int) -> Iterator[range]:
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            yield from pool.map(fetch, shards)

    return one_pass


CONTENDERS: Mapping[str, Callable[[str], Passes]] = {
    "tars": tars,
    "tars_first_pass": tars_first_pass,
    "tars_in_workers": tars_in_workers,
    "tars_from_cache": tars_from_cache,
    "tars_into_cache": tars_into_cache,
    "tars_without_checksums": functools.partial(without_checksums, tars),
    "tars_first_pass_without_checksums": functools.partial(without_checksums, tars_first_pass),
    "zarr": zarr,
    "bare_objects": bare_objects,
    "bare_ranges_8": functools.partial(bare_ranges, concurrency=8),
    "bare_ranges_64": functools.partial(bare_ranges, concurrency=64),
}


def _passes(archive: Archive) -> Passes:
    loader = _loader(archive)

    def one_pass(number: int) -> Iterator[Any]:
        batches = loader.stream(number * loader.num_samples)
        for batch in itertools.islice(batches, loader.steps_per_epoch):
            yield batch.frames_BTCHW

    return one_pass


def _one_stream(loader: SequenceLoader) -> Passes:
    """Passes that are epochs of one stream, as in training: what begins, begins once."""
    batches = loader.stream(0)
    return lambda number: (
        batch.frames_BTCHW for batch in itertools.islice(batches, loader.steps_per_epoch)
    )


def _loader(archive: Archive, num_workers: int = 0) -> SequenceLoader:
    return SequenceLoader(
        archive, "train", global_batch_size=BATCH_SIZE, seed=0, num_workers=num_workers
    )


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _bare_store(url: str) -> Any:
    from obstore.store import from_url

    return from_url(url, client_options={"allow_http": True})
