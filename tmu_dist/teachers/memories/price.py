"""What it costs to keep what teachers tell, and from which epoch on that pays.

Every epoch each sequence is taught once in each direction of time: by running the teacher, or by
reading a record. Making the records costs one run and one write of each. So they pay as soon as
epochs times what reading saves exceeds what making cost; if reading is slower than running, never.

Times are of one process and are measured at the place that the records would have.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.storage import delete_many, list_objects, local_path
from tmu_dist.teachers.memories.files import (
    RECORDS_FILE,
    MemoryFolder,
    MemoryReader,
    Plan,
    RecordLayout,
    key_of,
    shard_name,
)


@dataclass(frozen=True, kw_only=True)
class TeacherPrice:
    """Of one teacher."""

    name: str
    record_bytes: int
    """Of one sequence in one direction of time."""
    num_records: int
    """That an epoch asks for: sequences times directions."""
    num_made: int
    """Of these, records that are there already."""
    run_seconds: float
    """Of the teacher, for one record."""
    write_seconds: float
    read_seconds: float

    @property
    def total_bytes(self) -> int:
        """On the disk when all are made."""
        return self.record_bytes * self.num_records

    @property
    def bytes_to_make(self) -> int:
        return self.record_bytes * (self.num_records - self.num_made)

    @property
    def seconds_to_make(self) -> float:
        return (self.run_seconds + self.write_seconds) * (self.num_records - self.num_made)

    @property
    def seconds_saved(self) -> float:
        """By an epoch; negative where reading is slower than running."""
        return (self.run_seconds - self.read_seconds) * self.num_records


@dataclass(frozen=True, kw_only=True)
class Price:
    """Of all teachers of a run."""

    teachers: tuple[TeacherPrice, ...]
    free_bytes: int | None
    """At the cache's address; None: a store, which does not tell."""
    num_epochs: float
    """Of the run."""

    @property
    def total_bytes(self) -> int:
        return sum(teacher.total_bytes for teacher in self.teachers)

    @property
    def bytes_to_make(self) -> int:
        return sum(teacher.bytes_to_make for teacher in self.teachers)

    @property
    def seconds_to_make(self) -> float:
        return sum(teacher.seconds_to_make for teacher in self.teachers)

    @property
    def seconds_saved(self) -> float:
        """By an epoch."""
        return sum(teacher.seconds_saved for teacher in self.teachers)

    @property
    def fits(self) -> bool:
        """Whether there is room for what is not made yet."""
        return self.free_bytes is None or self.bytes_to_make <= self.free_bytes

    @property
    def break_even_epoch(self) -> int | None:
        """The epoch by whose end the records have saved what they cost; None: never."""
        if self.seconds_saved <= 0:
            return None
        return max(1, math.ceil(self.seconds_to_make / self.seconds_saved))

    def verdict(self) -> str:
        """What to do, in a sentence."""
        if not self.fits:
            assert self.free_bytes is not None
            return (
                f"It does not fit: {gib(self.bytes_to_make)} are needed and {gib(self.free_bytes)} "
                "are free. placement.memories=bf16 halves it; fewer teachers, layers "
                "(transfer.imitation.layers) or samples (data.fraction) shrink it, too."
            )
        epoch = self.break_even_epoch
        if epoch is None:
            return (
                "It never pays: reading what the teachers told takes longer than running them. Use "
                "another placement.kind, a faster disk, or placement.memories=bf16."
            )
        saved = self.seconds_saved * self.num_epochs - self.seconds_to_make
        if epoch > self.num_epochs:
            return (
                f"It does not pay in this run: it would from epoch {epoch:,} on, and the run has "
                f"{self.num_epochs:,.1f}. Other runs with these teachers and data could share it."
            )
        return (
            f"It pays from epoch {epoch:,} on: of the run's {self.num_epochs:,.1f} epochs it saves "
            f"{duration(saved)} of the teachers' time, making included."
        )


def free_bytes(address: str) -> int | None:
    """Room on the disk of a folder that need not exist yet; None: a store."""
    folder = local_path(address)
    if folder is None:
        return None
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(parent).free


def measure_storage(
    address: str, layout: RecordLayout, records_BN: NDArray[np.uint8], sample_ids: Sequence[int]
) -> tuple[float, float]:
    """Write some records there, read them again as training would, and remove them.

    Returns:
        Seconds a record for writing and for reading. On a disk the system's copy in memory is
        dropped between them, where the system can, so that it is the disk that is measured.

    Raises:
        WriteError, StorageError: it cannot be written there.
    """
    count = len(records_BN)
    facts = {"probe": secrets.token_hex(8)}
    folder = MemoryFolder(address, facts)
    plan = Plan(facts=facts, about={}, layout=layout, num_records=count, records_per_shard=count)
    try:
        started = time.perf_counter()
        folder.write_shard(0, records_BN)
        write_seconds = time.perf_counter() - started
        folder.begin(plan)
        folder.finish(plan)
        _forget(folder.url)
        reader = MemoryReader(address, facts, {})
        started = time.perf_counter()
        layout.decode(reader.read(range(count), sample_ids))
        read_seconds = time.perf_counter() - started
    finally:
        delete_many(address, list(list_objects(address, key_of(facts))))
    return write_seconds / count, read_seconds / count


def gib(num_bytes: float) -> str:
    """Bytes as people say them."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**30:,.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _forget(url: str) -> None:
    """Let the system drop its copy of the probe, which would be read instead of the disk."""
    folder = local_path(url)
    if folder is None or not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(folder / shard_name(0) / RECORDS_FILE, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
