"""The tars of an archive as open files: how many, for how long, and what is known of them.

A memory map of a file that was cut short ends the process by a signal, where other reads fail. So
whoever copies from `OpenShard.memory` compares the size of the file just before, and takes from
there only what was read otherwise at least once. A file that was written to is noticed within a
second; what it holds is then checked again.

Not here: what is in a tar, and whether it is right (tar_archive.py).
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.archive import SampleIndex
from tmu_dist.data.manifest import Manifest, Shard
from tmu_dist.data.ranges import WrongSizeError

if TYPE_CHECKING:
    from tmu_dist.data.cache import ObjectFiles

_MOST_OPEN_FILES = 128
_LOOK_SECONDS = 1.0


class OpenShard:
    """A tar that is open, and what `TarReader` needs of it for each sample."""

    __slots__ = (
        "crc32c",
        "descriptor",
        "first_id",
        "identity",
        "is_checked",
        "is_used",
        "memory",
        "num_bytes",
        "offsets",
        "path",
        "sha256",
        "sizes",
    )

    def __init__(self, shard: Shard, first_id: int, descriptor: int) -> None:
        self.path = shard.path
        self.num_bytes = shard.num_bytes
        self.sha256 = shard.sha256
        self.offsets = shard.offsets
        self.sizes = shard.sizes
        self.crc32c = shard.crc32c
        self.first_id = first_id
        self.descriptor = descriptor
        self.memory: NDArray[np.uint8] | None = None
        """The tar's bytes, mapped."""
        self.identity: tuple[int, ...] = ()
        """What changes with the bytes on disk."""
        self.is_checked = bytearray()
        """By number in the shard: 1 where they were found right."""
        self.is_used = True
        """Since `ShardFiles.look_after` was there."""

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the tar.

        Raises:
            WrongSizeError: it was cut short since it was opened.
            OSError: it cannot be read.
        """
        self.is_used = True
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size:  # as a network disk may do
            more = os.pread(self.descriptor, size - len(data), offset + len(data))
            if not more:
                raise WrongSizeError(self.path, os.fstat(self.descriptor).st_size)
            data += more
        return data


class ShardFiles:
    """The tars of an archive that are open, not more than some at a time.

    Args:
        files: where they are.
        manifest: of the archive.
        index: of its samples.
        are_copies: in a cache, which may remove them.
    """

    def __init__(
        self, files: ObjectFiles, manifest: Manifest, index: SampleIndex, *, are_copies: bool
    ) -> None:
        self.opened: dict[str, dict[int, OpenShard]] = {split: {} for split in manifest.splits}
        """By split and number, to be looked up for each sample."""
        self._in_turn: dict[tuple[str, int], OpenShard] = {}  # the same, oldest first
        self._checked: dict[tuple[str, int], tuple[tuple[int, ...], bytearray]] = {}
        self._files = files
        self._manifest = manifest
        self._index = index
        self._are_copies = are_copies
        self._looked = time.monotonic()

    def __del__(self) -> None:
        for file in self._in_turn.values():
            os.close(file.descriptor)

    def open(self, split: str, number: int) -> OpenShard:
        """Return a shard that is open, or open it and close others if they are too many.

        Raises:
            StorageError: missing or out of reach.
            WrongSizeError: truncated or replaced.
            OSError: cannot be opened or, of a copy, written.
        """
        if file := self.opened[split].get(number):
            return file
        if self._are_copies:
            self._close_changed()  # the disk that a removed copy takes is free when it is closed
        while len(self._in_turn) >= _MOST_OPEN_FILES:
            self._close(*next(iter(self._in_turn)))
        shard = cast(Shard, self._manifest.splits[split][number])
        first_id = self._index.ends(split)[number] - shard.num_samples
        descriptor = self._files.open(shard.path, shard.num_bytes, shard.sha256)
        file = OpenShard(shard, first_id, descriptor)
        self.opened[split][number] = self._in_turn[split, number] = file
        if (num_bytes := os.fstat(descriptor).st_size) != shard.num_bytes:
            self._close(split, number)
            raise WrongSizeError(shard.path, num_bytes)
        file.identity = self._identity(file)
        if self._checked.get((split, number), ((),))[0] != file.identity:
            self._checked[split, number] = file.identity, bytearray(shard.num_samples)
        file.is_checked = self._checked[split, number][1]
        if self._manifest.compression == "none":
            with suppress(OSError):  # not every file system can: read on, not as fast
                mapped = mmap.mmap(descriptor, shard.num_bytes, prot=mmap.PROT_READ)
                file.memory = np.frombuffer(mapped, np.uint8)
        return file

    def discard(self, split: str, number: int) -> bool:
        """Close a damaged shard; say whether it was a copy, which then is removed."""
        self._checked.pop((split, number), None)
        if (split, number) in self._in_turn:
            self._close(split, number)
        return self._files.discard(self._manifest.splits[split][number].sha256)

    def look_after(self) -> None:
        """Once a second: close what changed, and tell the cache which copies are in use."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        self._close_changed()
        for file in self._in_turn.values():
            if file.is_used:
                self._files.touch(file.sha256)
                file.is_used = False

    def _close_changed(self) -> None:
        """Close files that were removed, replaced or written to: to be opened and checked anew."""
        for (split, number), file in list(self._in_turn.items()):
            if self._identity(file) != file.identity:
                self._close(split, number)

    def _identity(self, file: OpenShard) -> tuple[int, ...]:
        status = os.fstat(file.descriptor)
        # The time of a copy's change says when it was last used; nobody writes to it.
        changed_ns = 0 if self._are_copies else status.st_mtime_ns
        return status.st_dev, status.st_ino, status.st_size, status.st_nlink, changed_ns

    def _close(self, split: str, number: int) -> None:
        del self.opened[split][number]
        os.close(self._in_turn.pop((split, number)).descriptor)
