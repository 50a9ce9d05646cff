"""The loader measured beside the bare storage: the same samples, in the same order, in one run.

A part of the archive is measured: the first shards of an epoch, as many as the storage gives in the
time of one measurement. They are read whole once, which also warms the page cache of local disks.
Bare reading takes the samples' stored bytes, in the order of the loader's first epoch, and drops
them: nothing is checked or decoded and no batch is made. The loader then delivers batches of that
part, epoch after epoch. What is to be compared is measured in turns, so that a disturbance of the
machine meets all alike. Samples of a Zarr archive share chunks; there, bare reading takes pieces of
the shards one after the other, each byte once.

Not here: what follows from the numbers (bench_report.py); other libraries' loaders (benchmarks/).
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from tmu_dist.data import storage
from tmu_dist.data.archive import Archive, open_archive, shard_error
from tmu_dist.data.cache import NodeCache, node_cache, object_files
from tmu_dist.data.commands.bench_readers import (
    Contender,
    FileReads,
    LoaderRuns,
    Measurement,
    Part,
    RangeReads,
    Read,
    Watch,
    Way,
    WholeShards,
    pieces_of,
)
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.data.manifest import Shard, ZarrShard
from tmu_dist.data.order import global_batches
from tmu_dist.data.reading import Batch

_ROUNDS = 3
"""Turns of each measurement; their spread says how far to trust it."""
_RANGES_AT_A_TIME = (1, 4, 16, 64)
_SHARDS_AT_A_TIME = (1, 4)
_PART_BYTES = 2**31
_PART_SHARDS = 256
"""Bare reading has all of them open."""
_PIECE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure, and for how long."""

    url: str
    split: str = "train"
    batch_size: int = 8
    workers: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of reading processes to try."""
    seconds: float = 5.0
    """Of each measurement, which ends with the batch or object that passes them."""
    reading: Literal["auto", "cache", "range", "all"] = "auto"
    """auto: as `loader.open_archives`; all: every way in which this archive can be read."""
    cache_folder: str | None = None
    cache_gib: float | None = None

    def __post_init__(self) -> None:
        if not self.workers or min(self.workers) < 0:
            raise ValueError(f"--workers must be numbers of at least 0, got {list(self.workers)}.")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"--seconds must be positive and finite, got {self.seconds:g}.")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}.")
        if "cache" not in self.ways and (self.cache_folder, self.cache_gib) != (None, None):
            raise ValueError(
                "--cache-folder and --cache-gib have no effect where no copies are made: leave "
                "them out, or use --reading cache or all."
            )

    @property
    def is_local(self) -> bool:
        """Whether the archive is a folder that this machine sees."""
        return storage.local_path(self.url) is not None

    @property
    def ways(self) -> tuple[Way, ...]:
        """How the loader is to read."""
        if not self.is_local:
            remote: dict[str, tuple[Way, ...]] = {"range": ("range",), "all": ("cache", "range")}
            return remote.get(self.reading, ("cache",))
        if self.reading == "range":
            raise ValueError(
                f"{self.url} is a local folder, which is read in place: --reading range is for "
                "object stores. Use auto."
            )
        local: dict[str, tuple[Way, ...]] = {"cache": ("cache",), "all": ("in place", "cache")}
        return local.get(self.reading, ("in place",))


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What one run measured."""

    settings: BenchSettings
    num_cores: int
    num_samples: int
    """In the split."""
    num_bytes: int
    """Of its shards."""
    cache_limit_bytes: int | None
    """Of the node's cache, if copies were measured."""
    part_samples: int
    """In the shards that were measured."""
    part_shards: int
    part_bytes: int
    stored_bytes_per_sample: float
    decoded_bytes_per_sample: int
    measurements: list[Measurement]

    @property
    def ways(self) -> list[Way]:
        """Ways in which the loader read."""
        return list(dict.fromkeys(m.way for m in self.measurements if m.num_workers is not None))

    def stored_bytes_per_second(self, measurement: Measurement) -> float:
        """Return a rate of samples as bytes of the storage: of whole shards, all their bytes."""
        whole = measurement.way == "whole shards"
        per_sample = self.part_bytes / self.part_samples if whole else self.stored_bytes_per_sample
        return measurement.samples_per_second * per_sample

    def best_bare(self, way: Way) -> Measurement:
        """Return what the storage gave at best, read one way without the loader."""
        bare = [m for m in self.measurements if m.way == way and m.num_workers is None]
        return max(bare, key=lambda each: each.samples_per_second)

    def loaders(self, way: Way) -> list[Measurement]:
        """Return the loader's measurements of one way but the cold one."""
        of_way = [m for m in self.measurements if m.way == way and not m.is_cold]
        return [m for m in of_way if m.num_workers is not None]


def run_bench(settings: BenchSettings, say: Callable[[str], None]) -> BenchResult:
    """Measure an archive's storage and the loader on this machine.

    Args:
        settings: what to measure.
        say: is told what is measured next.

    Raises:
        ValueError: settings that do not fit the archive; an archive that cannot be read.
    """
    archive = open_archive(settings.url)
    is_cached = "cache" in settings.ways
    cache = node_cache(settings.cache_folder, settings.cache_gib) if is_cached else None
    say("whole shards, once")
    part, first_pass = measured_part(archive, settings, cache)
    measurements = [first_pass]
    if not settings.is_local:
        whole = [WholeShards(part, at_a_time) for at_a_time in _SHARDS_AT_A_TIME]
        measurements += _in_turns(whole, settings.seconds, say)
    for way in settings.ways:
        with ExitStack() as stack:
            copies = None
            if cache is not None and way == "cache":
                copies = stack.enter_context(_empty_cache(cache))
                say("the loader with an empty cache")
                measurements.append(_cold(part, copies, settings))
                for shard in part.shards:
                    copies.fetch(part.url, shard.path, shard.num_bytes, shard.sha256)
            contenders = [*_bare(part, way, copies, stack), *_loaders(part, way, copies, settings)]
            measurements += _in_turns(contenders, settings.seconds, say)
    values = np.dtype(archive.manifest.dtype)
    return BenchResult(
        settings=settings,
        num_cores=_num_cores(),
        num_samples=archive.manifest.num_samples(settings.split),
        num_bytes=sum(shard.num_bytes for shard in archive.manifest.shards(settings.split)),
        cache_limit_bytes=None if cache is None else cache.limit_bytes,
        part_samples=part.num_samples,
        part_shards=len(part.shards),
        part_bytes=part.num_bytes,
        stored_bytes_per_sample=sum(read.size for read in part.reads) / part.num_samples,
        decoded_bytes_per_sample=math.prod(archive.manifest.sample_shape) * values.itemsize,
        measurements=measurements,
    )


def measured_part(
    archive: Archive, settings: BenchSettings, cache: NodeCache | None
) -> tuple[Part, Measurement]:
    """Read whole shards in the order of an epoch until the time is over: they are the part."""
    loader = SequenceLoader(archive, settings.split, global_batch_size=settings.batch_size)
    room = min(_PART_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
    if cache is not None:
        room = min(room, cache.limit_bytes // 2)
    chosen: list[int] = []
    num_bytes = 0
    watch = Watch()
    for number in loader.uses(0, range(1)).shards.tolist()[:_PART_SHARDS]:
        shard = loader.shard(number)[1]
        num_bytes += shard.num_bytes
        if chosen and (num_bytes > room or watch.seconds >= settings.seconds):
            break
        came = sum(pieces_of(archive.url, shard.path))
        if came != shard.num_bytes:
            problem = f"has {came:,} bytes, the manifest says {shard.num_bytes:,}"
            raise shard_error(archive.url, shard.path, "the shard", problem)
        chosen.append(number)
    elapsed = watch.round(0)
    part = _cut(archive, settings, sorted(chosen))
    rounds = [elapsed._replace(num_samples=part.num_samples)]
    return part, Measurement(way="whole shards", what="first pass", rounds=rounds)


def _cut(archive: Archive, settings: BenchSettings, numbers: Sequence[int]) -> Part:
    """Return the part of these shards."""
    manifest, split = archive.manifest, settings.split
    all_shards: Sequence[Shard | ZarrShard] = manifest.shards(split)
    shards = [all_shards[number] for number in numbers]
    left = tuple(shards)
    if manifest.format == "zarr":  # the others stay: samples that start here may end there
        left = tuple(
            shard if number in numbers else dataclasses.replace(cast(ZarrShard, shard), origins=())
            for number, shard in enumerate(all_shards)
        )
    cut = dataclasses.replace(
        manifest,
        splits=cast(dict[str, tuple[Shard, ...]], {**manifest.splits, split: left}),
        full_train_samples=None,
    )
    return Part(
        url=archive.url,
        manifest=cut,
        split=split,
        shards=shards,
        num_samples=cut.num_samples(split),
        reads=_reads(Archive(archive.url, cut), settings, shards),
    )


def _reads(
    archive: Archive, settings: BenchSettings, shards: Sequence[Shard | ZarrShard]
) -> list[Read]:
    """Return what bare reading reads."""
    if archive.manifest.format == "zarr":
        return [
            Read(shard, offset, min(_PIECE_BYTES, shard.num_bytes - offset))
            for shard in shards
            for offset in range(0, shard.num_bytes, _PIECE_BYTES)
        ]
    loader = SequenceLoader(archive, settings.split, global_batch_size=settings.batch_size)
    steps = global_batches(loader.epoch(0), 0, loader.steps_per_epoch, settings.batch_size)
    reads = []
    for sample_id in steps.ids[steps.weights > 0].tolist():
        number, index = archive.index.locate(settings.split, sample_id)
        shard = cast(Shard, shards[number])
        reads.append(Read(shard, shard.offsets[index], shard.sizes[index]))
    return reads


def _in_turns(
    contenders: Sequence[Contender], seconds: float, say: Callable[[str], None]
) -> list[Measurement]:
    for number in range(_ROUNDS):
        for contender in contenders:
            measurement = contender.measurement
            say(f"{measurement.way}: {measurement.what}, round {number + 1} of {_ROUNDS}")
            measurement.rounds.append(contender.run(seconds / _ROUNDS))
    return [contender.measurement for contender in contenders]


def _bare(part: Part, way: Way, copies: NodeCache | None, stack: ExitStack) -> list[Contender]:
    files = object_files(part.url, copies)
    if files is None:
        return [RangeReads(part, at_a_time) for at_a_time in _RANGES_AT_A_TIME]
    return [FileReads(part, way, files, stack)]


def _loaders(
    part: Part, way: Way, copies: NodeCache | None, settings: BenchSettings
) -> list[Contender]:
    return [
        LoaderRuns(_loader(part, copies, settings, num_workers), way, num_workers)
        for num_workers in sorted(set(settings.workers))
    ]


def _loader(
    part: Part, copies: NodeCache | None, settings: BenchSettings, num_workers: int
) -> SequenceLoader:
    return SequenceLoader(
        part.archive(copies),
        part.split,
        global_batch_size=settings.batch_size,
        num_workers=num_workers,
    )


def _cold(part: Part, copies: NodeCache, settings: BenchSettings) -> Measurement:
    """Read the part once, or until the time is over, while it is copied."""
    num_workers = min(settings.workers)
    loader = _loader(part, copies, settings, num_workers)
    measurement = LoaderRuns(loader, "cache", num_workers).measurement
    measurement.is_cold = True
    watch, count = Watch(), 0
    stream = cast(Generator[Batch, None, None], loader.stream(0))
    with closing(stream):
        for batch in stream:
            if not count:
                measurement.first_batch_seconds = watch.seconds
            count += batch.global_count
            if watch.seconds >= settings.seconds or count >= part.num_samples:
                break
        measurement.rounds.append(watch.round(count, is_alone=not num_workers))
    return measurement


@contextmanager
def _empty_cache(cache: NodeCache) -> Iterator[NodeCache]:
    """Yield a cache of its own on the same disk, which does not stay."""
    cache.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="bench-", dir=cache.folder, ignore_cleanup_errors=True
    ) as folder:
        yield NodeCache(Path(folder), cache.limit_bytes)


def _num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
