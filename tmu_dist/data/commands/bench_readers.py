"""What bench.py measures: bare reading of a part of an archive, and the loader over it.

Each contender delivers the samples of the part again and again, and counts them.
"""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypeVar, cast

from tmu_dist.data import storage
from tmu_dist.data.archive import Archive
from tmu_dist.data.cache import NodeCache, ObjectFiles
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.data.manifest import Manifest, Shard, ZarrShard
from tmu_dist.data.reading import Batch

_CHUNK_BYTES = 8 * 2**20

_Item = TypeVar("_Item")

Way: TypeAlias = Literal["whole shards", "in place", "cache", "range"]
"""How stored bytes come: shards from end to end, or samples from local shards where they are, from
copies on this node, or as byte ranges."""


class Round(NamedTuple):
    """One turn of a measurement."""

    num_samples: float
    """Of pieces of shards, the share that they hold."""
    seconds: float
    cpu_seconds: float | None
    """Of all threads of this process; None where others worked for it."""


@dataclass(kw_only=True)
class Measurement:
    """How fast samples came in one way."""

    way: Way
    what: str
    num_workers: int | None = None
    """Reading processes of the loader; None: bare storage."""
    is_cold: bool = False
    """Whether nothing had been copied before."""
    first_batch_seconds: float | None = None
    """Of a new loader, from the call to its first batch: processes start, stores are opened."""
    rounds: list[Round] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Samples per second of each round."""
        return [turn.num_samples / turn.seconds for turn in self.rounds]

    @property
    def samples_per_second(self) -> float:
        """Of the median round."""
        return statistics.median(self.rates)

    @property
    def cpu_ms_per_sample(self) -> float | None:
        """Milliseconds of one core for a sample, over all rounds."""
        used = [turn.cpu_seconds for turn in self.rounds if turn.cpu_seconds is not None]
        if len(used) < len(self.rounds):
            return None
        return 1e3 * sum(used) / sum(turn.num_samples for turn in self.rounds)


class Watch:
    """Time since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._cpu = time.process_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def round(self, num_samples: float, *, is_alone: bool = True) -> Round:
        """Return what was done until now; `is_alone`: by this process."""
        cpu = time.process_time() - self._cpu
        return Round(num_samples, self.seconds, cpu if is_alone else None)


class Read(NamedTuple):
    """Stored bytes that bare reading takes at once."""

    shard: Shard | ZarrShard
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """The shards that are measured."""

    url: str
    manifest: Manifest
    """Of an archive in which no other shard of the split has samples."""
    split: str
    shards: list[Shard | ZarrShard]
    num_samples: int
    reads: list[Read]
    """Each sample in the order of an epoch; of Zarr archives, pieces of the shards."""

    @property
    def num_bytes(self) -> int:
        """Of the shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def archive(self, cache: NodeCache | None) -> Archive:
        """Return the part as an archive."""
        return Archive(self.url, self.manifest, cache=cache)


class Contender(Protocol):
    """Something that delivers samples of the part again and again."""

    measurement: Measurement

    def run(self, seconds: float) -> Round:
        """Work for about so long, from where the last run ended."""
        ...


class LoaderRuns:
    """Batches of the loader, which nobody uses."""

    def __init__(self, loader: SequenceLoader, way: Way, num_workers: int) -> None:
        what = f"loader, num_workers={num_workers}"
        self.measurement = Measurement(way=way, what=what, num_workers=num_workers)
        self._loader = loader
        self._position = 0

    def run(self, seconds: float) -> Round:
        """As `Contender.run`; the first batch of each run, which nothing is ahead of, is free."""
        watch, count = Watch(), 0
        stream = cast(Generator[Batch, None, None], self._loader.stream(self._position))
        with closing(stream):
            self._position = next(stream).consumed
            if self.measurement.first_batch_seconds is None:
                self.measurement.first_batch_seconds = watch.seconds
            watch = Watch()
            for batch in stream:
                count += batch.global_count
                self._position = batch.consumed
                if watch.seconds >= seconds:
                    break
            return watch.round(count, is_alone=not self.measurement.num_workers)


class FileReads:
    """Stored bytes of local files, into memory that is used again for each sample."""

    def __init__(self, part: Part, way: Way, files: ObjectFiles, stack: ExitStack) -> None:
        what = "pread" + ("" if part.manifest.format == "webdataset" else " of pieces")
        self.measurement = Measurement(way=way, what=what)
        self._samples_per_read = part.num_samples / len(part.reads)
        opened = {}
        for shard in part.shards:
            opened[shard.path] = files.open(shard.path, shard.num_bytes, shard.sha256)
            stack.callback(os.close, opened[shard.path])
        memory = memoryview(bytearray(max(read.size for read in part.reads)))
        self._reads = itertools.cycle(
            (opened[read.shard.path], [memory[: read.size]], read.offset) for read in part.reads
        )

    def run(self, seconds: float) -> Round:
        """As `Contender.run`."""
        watch, count = Watch(), 0
        for file, target, offset in self._reads:
            os.preadv(file, target, offset)
            count += 1
            if watch.seconds >= seconds:
                break
        return watch.round(count * self._samples_per_read)


class RangeReads:
    """Stored bytes of remote shards, so many requests at a time."""

    def __init__(self, part: Part, at_a_time: int) -> None:
        self.measurement = Measurement(way="range", what=f"{at_a_time} at a time")
        self._samples_per_read = part.num_samples / len(part.reads)
        self._at_a_time = at_a_time
        self._url = part.url
        self._reads = itertools.cycle(part.reads)

    def run(self, seconds: float) -> Round:
        """As `Contender.run`."""
        return _at_a_time(self._at_a_time, seconds, self._reads, self._take)

    def _take(self, read: Read) -> Iterator[float]:
        storage.read_range(self._url, read.shard.path, read.offset, read.size)
        yield self._samples_per_read


class WholeShards:
    """Remote shards from end to end, so many at a time."""

    def __init__(self, part: Part, at_a_time: int) -> None:
        self.measurement = Measurement(way="whole shards", what=f"{at_a_time} at a time")
        self._samples_per_byte = part.num_samples / part.num_bytes
        self._at_a_time = at_a_time
        self._url = part.url
        self._paths = itertools.cycle([shard.path for shard in part.shards])

    def run(self, seconds: float) -> Round:
        """As `Contender.run`; shards are cut off when the time is over."""
        return _at_a_time(self._at_a_time, seconds, self._paths, self._take)

    def _take(self, path: str) -> Iterator[float]:
        for num_bytes in pieces_of(self._url, path):
            yield num_bytes * self._samples_per_byte


def _at_a_time(
    count: int,
    seconds: float,
    items: Iterator[_Item],
    take: Callable[[_Item], Iterator[float]],
) -> Round:
    """Let threads take items until the time is over; `take` yields samples as they come."""
    watch, one_at_a_time = Watch(), threading.Lock()

    def work() -> float:
        num_samples = 0.0
        while True:
            with one_at_a_time:
                item = next(items)
            for part in take(item):
                num_samples += part
                if watch.seconds >= seconds:
                    return num_samples

    with ThreadPoolExecutor(count) as threads:
        working = [threads.submit(work) for _ in range(count)]
        return watch.round(sum(each.result() for each in working))


def pieces_of(url: str, path: str) -> Iterator[int]:
    """Read an object from end to end and drop it; yield the sizes of its pieces."""
    folder = storage.local_path(url)
    if folder is None:
        yield from map(len, storage.stream_bytes(url, path))
        return
    memory = bytearray(_CHUNK_BYTES)
    try:
        with (folder / path).open("rb", buffering=0) as file:
            while num_bytes := file.readinto(memory):
                yield num_bytes
    except OSError as error:
        reason = error.strerror or error
        raise storage.StorageError(f"Could not read {folder / path}: {reason}") from error
