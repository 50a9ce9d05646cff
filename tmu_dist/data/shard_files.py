"""The shards of an archive as open files: how many, for how long, and what is known of them.

A file that was removed, replaced or written to is noticed within a second and closed, so that what
is read next is what is there.

Not here: what is in a shard, and whether it is right (tar_archive.py, zarr_archive.py).
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from tmu_dist.data.manifest import Manifest, Shard, ZarrShard
from tmu_dist.data.ranges import WrongSizeError

if TYPE_CHECKING:
    from tmu_dist.data.cache import ObjectFiles

_MOST_OPEN_FILES = 128
_LOOK_SECONDS = 1.0

Identity: TypeAlias = tuple[int, ...]
"""What changes with the bytes on disk."""


class OpenShard:
    """A shard that is open."""

    __slots__ = ("descriptor", "identity", "is_used", "num_bytes", "path", "sha256")

    def __init__(self, shard: Shard | ZarrShard, descriptor: int, identity: Identity) -> None:
        self.path = shard.path
        self.num_bytes = shard.num_bytes
        self.sha256 = shard.sha256
        self.descriptor = descriptor
        self.identity = identity
        self.is_used = True
        """Since `ShardFiles.look_after` was there."""

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the shard.

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


_File = TypeVar("_File", bound=OpenShard)


class ShardFiles(ABC, Generic[_File]):
    """The shards of an archive that are open, not more than some at a time.

    Args:
        files: where they are.
        manifest: of the archive.
        are_copies: in a cache, which may remove them.
    """

    def __init__(self, files: ObjectFiles, manifest: Manifest, *, are_copies: bool) -> None:
        self.opened: dict[str, dict[int, _File]] = {split: {} for split in manifest.splits}
        """By split and number, to be looked up for each sample."""
        self._in_turn: dict[tuple[str, int], _File] = {}  # the same, oldest first
        self._files = files
        self._manifest = manifest
        self._are_copies = are_copies
        self._looked = time.monotonic()

    def __del__(self) -> None:
        for file in self._in_turn.values():
            os.close(file.descriptor)

    @abstractmethod
    def _described(self, split: str, number: int, descriptor: int, identity: Identity) -> _File:
        """Return what is kept of a shard while it is open."""

    def open(self, split: str, number: int) -> _File:
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
        shard = self._manifest.splits[split][number]
        descriptor = self._files.open(shard.path, shard.num_bytes, shard.sha256)
        if (num_bytes := os.fstat(descriptor).st_size) != shard.num_bytes:
            os.close(descriptor)
            raise WrongSizeError(shard.path, num_bytes)
        file = self._described(split, number, descriptor, self._identity(descriptor))
        self.opened[split][number] = self._in_turn[split, number] = file
        return file

    def discard(self, split: str, number: int) -> bool:
        """Close a damaged shard; say whether it was a copy, which then is removed."""
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
        """Close files that were removed, replaced or written to: to be opened anew."""
        for (split, number), file in list(self._in_turn.items()):
            if self._identity(file.descriptor) != file.identity:
                self._close(split, number)

    def _identity(self, descriptor: int) -> Identity:
        status = os.fstat(descriptor)
        # The time of a copy's change says when it was last used; nobody writes to it.
        changed_ns = 0 if self._are_copies else status.st_mtime_ns
        return status.st_dev, status.st_ino, status.st_size, status.st_nlink, changed_ns

    def _close(self, split: str, number: int) -> None:
        del self.opened[split][number]
        os.close(self._in_turn.pop((split, number)).descriptor)
