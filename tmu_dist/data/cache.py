"""Copies of an archive's objects on the node's own disk, shared by all processes of the node.

`NodeCache` fetches an object once for all processes and jobs of a machine, verifies it on the way,
and keeps as many as it may. A copy is named by its sha256: equal shards of two archives are one
file, and names cannot collide. `ObjectFiles` gives the objects of one archive as local files,
whether from a cache or from the archive itself.

A copy that changed after it was verified (a failing disk, a crash of the machine before it was
written out) is noticed by the readers, who check every sample; they call `discard`.

Not here: how files are shared, locked and removed (cache_folder.py); what is fetched ahead, and
when (prefetch.py); what is in the objects (archive.py).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tmu_dist.data import storage
from tmu_dist.data.cache_folder import CacheFolder, free_bytes, gib

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_RETRY_SECONDS = 0.5
_TOUCH_SECONDS = 1.0


class CacheLimitError(ValueError):
    """A size limit under which the cache cannot do what it is asked to."""


class AlteredObjectError(storage.StorageError):
    """An object that is not what its archive's manifest says."""


class CacheStats(NamedTuple):
    """What one process has had from a cache."""

    objects_fetched: int
    bytes_fetched: int
    hits: int
    """How often a copy was there, perhaps after waiting for another process that fetched it."""


class NodeCache:
    """Copies of objects in a folder, those used last, up to a limit. May be sent to processes.

    Jobs of one machine may share the folder; they should set the same limit (cache_folder.py says
    what happens otherwise).

    Args:
        folder: on a disk of this machine, not of a network; made when it is needed.
        limit_bytes: what all copies in the folder may take together.

    Raises:
        CacheLimitError: the limit is not positive.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise CacheLimitError(f"A cache needs a positive limit, got {limit_bytes} bytes.")
        self._copies = CacheFolder(folder.expanduser().absolute(), limit_bytes)
        self._touched: dict[str, float] = {}
        self._counting = threading.Lock()
        self._stats = CacheStats(0, 0, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return NodeCache, (self.folder, self.limit_bytes)

    @property
    def folder(self) -> Path:
        """Where the copies are."""
        return self._copies.path

    @property
    def limit_bytes(self) -> int:
        """What they may take."""
        return self._copies.limit_bytes

    def open(self, url: str, path: str, num_bytes: int, sha256: str) -> int:
        """Return a descriptor, which the caller closes, of a whole and verified copy of an object.

        What is not there is fetched, or waited for where another thread or process fetches it.

        Args:
            url: the archive.
            path: the object in it.
            num_bytes: its size, as the manifest says.
            sha256: its hash, as the manifest says.

        Raises:
            StorageError: the object is missing or cannot be reached.
            AlteredObjectError: it has another size or hash.
            CacheLimitError: it is larger than the cache may be.
            WriteError: the disk is full, or the folder cannot be used; names the settings.
        """
        return self._open(url, path, num_bytes, sha256)[0]

    def fetch(self, url: str, path: str, num_bytes: int, sha256: str) -> bool:
        """Do as `open`, without opening; say whether this call had to fetch the object."""
        file, fetched = self._open(url, path, num_bytes, sha256)
        os.close(file)
        return fetched

    def touch(self, sha256: str) -> bool:
        """Mark a copy that is being read, so that others are removed first; say if it is there.

        Cheap enough to be called for every batch: it goes to the disk once a second at most, and
        for so long takes it that the copy is still there. What was released stays released.
        """
        now = time.monotonic()
        if now - self._touched.get(sha256, -math.inf) < _TOUCH_SECONDS:
            return True
        self._touched[sha256] = now
        if self._copies.mark_used(sha256, unless_used_up=True):
            return True
        self._touched.pop(sha256, None)
        return False

    def keep(self, sha256: str) -> bool:
        """Mark a copy that will be needed, even if somebody released it; say if it is there."""
        return self._copies.mark_used(sha256)

    def release(self, sha256: str) -> None:
        """Mark a copy as not needed in the near future: it is removed before others."""
        self._copies.mark_used_up(sha256)

    def discard(self, sha256: str) -> None:
        """Remove a copy that was found damaged: the next `open` fetches the object again."""
        self._touched.pop(sha256, None)
        self._copies.remove(sha256)

    def check_working_set(self, num_bytes: int) -> None:
        """Refuse an order that needs more bytes at a time than the cache may hold.

        Args:
            num_bytes: from `tmu_dist.data.prefetch.working_set`, for all ranks of this node.

        Raises:
            CacheLimitError: says what to set.
        """
        if num_bytes > self.limit_bytes:
            raise CacheLimitError(
                f"The cache {self.folder} may hold {gib(self.limit_bytes)}, but this order has "
                f"{gib(num_bytes)} of shards in use at once and would fetch them again and again: "
                f"raise data.cache_gib to at least {cache_gib_for(num_bytes):g}, or lower "
                "data.shuffle_lanes or data.shuffle_window."
            )

    def stats(self) -> CacheStats:
        """Return what this process has had so far."""
        return self._stats

    def _open(self, url: str, path: str, num_bytes: int, sha256: str) -> tuple[int, bool]:
        """Return a descriptor of the copy, and whether it had to be fetched."""
        file, fetched = self._copies.open(sha256, num_bytes), False
        if file is None:
            name = storage.join_url(url, path)
            if num_bytes > self.limit_bytes:
                raise CacheLimitError(
                    f"{name} has {gib(num_bytes)}, but the cache {self.folder} may hold "
                    f"{gib(self.limit_bytes)} at most: raise data.cache_gib."
                )
            file, fetched = self._copies.add(
                sha256, num_bytes, name, lambda copy: _download(url, path, copy, num_bytes, sha256)
            )
        self._touched[sha256] = time.monotonic()
        with self._counting:
            objects, num_fetched, hits = self._stats
            self._stats = (
                CacheStats(objects + 1, num_fetched + num_bytes, hits)
                if fetched
                else CacheStats(objects, num_fetched, hits + 1)
            )
        return file, fetched


class ObjectFiles(Protocol):
    """The objects of one archive as local files."""

    def open(self, path: str, num_bytes: int, sha256: str) -> int:
        """Return a descriptor of an object, which the caller closes.

        Raises:
            StorageError: the object is missing or cannot be read.
            CacheLimitError, WriteError: as `NodeCache.open`.
        """
        ...

    def touch(self, sha256: str) -> None:
        """Take note that an open object is still in use; may be called for every batch."""
        ...

    def discard(self, sha256: str) -> bool:
        """Take note that an object is damaged; say whether opening it again may help."""
        ...


class LocalFiles:
    """Objects read where they are. Nothing is verified."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, path: str, num_bytes: int, sha256: str) -> int:
        """As `ObjectFiles.open`."""
        try:
            return os.open(self._folder / path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise storage.MissingObjectError(f"{self._folder / path} does not exist.") from error
        except OSError as error:
            reason = error.strerror or error
            raise storage.StorageError(f"Could not open {self._folder / path}: {reason}") from error

    def touch(self, sha256: str) -> None:
        """As `ObjectFiles.touch`: nobody removes these."""

    def discard(self, sha256: str) -> bool:
        """As `ObjectFiles.discard`: there is no other copy."""
        return False


class CachedFiles:
    """Objects read from copies in the node's cache."""

    def __init__(self, cache: NodeCache, url: str) -> None:
        self._cache = cache
        self._url = url

    def open(self, path: str, num_bytes: int, sha256: str) -> int:
        """As `ObjectFiles.open`."""
        return self._cache.open(self._url, path, num_bytes, sha256)

    def touch(self, sha256: str) -> None:
        """As `ObjectFiles.touch`: other copies are removed first."""
        self._cache.touch(sha256)

    def discard(self, sha256: str) -> bool:
        """As `ObjectFiles.discard`: the copy is removed."""
        self._cache.discard(sha256)
        return True


def object_files(url: str, cache: NodeCache | None) -> ObjectFiles | None:
    """Return the objects of an archive as files; None if it is remote and there is no cache."""
    if cache is not None:
        return CachedFiles(cache, url)
    folder = storage.local_path(url)
    return None if folder is None else LocalFiles(folder)


def cache_gib_for(num_bytes: int) -> float:
    """Return the least `data.cache_gib`, of two decimals, that holds so many bytes."""
    return math.ceil(num_bytes / 2**30 * 100) / 100


def default_cache_folder() -> Path:
    """Return $TMU_DIST_CACHE, else tmu_dist in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("TMU_DIST_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmu_dist"


def node_cache(folder: str | None, limit_gib: float | None) -> NodeCache:
    """Return the cache that settings describe.

    Args:
        folder: None for `default_cache_folder`.
        limit_gib: None for four fifths of what is free on that disk or held by the cache already.

    Raises:
        CacheLimitError: the limit is not positive and finite, or the disk is full.
    """
    place = default_cache_folder() if folder is None else Path(folder).expanduser().absolute()
    if limit_gib is None:
        limit_bytes = (free_bytes(place) + CacheFolder(place, 0).held_bytes()) * 4 // 5
        if not limit_bytes:
            raise CacheLimitError(
                f"The disk of the cache {place} is full: free space, or choose another disk "
                "(data.cache_folder)."
            )
        return NodeCache(place, limit_bytes)
    if not 0 < limit_gib < math.inf:
        raise CacheLimitError(f"data.cache_gib must be positive and finite, got {limit_gib}.")
    return NodeCache(place, math.ceil(limit_gib * 2**30))


def _download(url: str, path: str, copy: int, num_bytes: int, sha256: str) -> None:
    """Write an object into the file of a descriptor and verify it; a cut transfer is repeated."""
    name = storage.join_url(url, path)
    for attempt in range(_ATTEMPTS):
        if attempt:
            _log.warning("%s came altered or cut short; fetching it again.", name)
            time.sleep(_RETRY_SECONDS * 2**attempt * random.uniform(0.5, 1))
        came, digest = _write_object(url, path, copy, num_bytes)
        if (came, digest) == (num_bytes, sha256):
            return
    what_came = f"more than {num_bytes:,} bytes" if came > num_bytes else f"{came:,} bytes"
    raise AlteredObjectError(
        f"{name} is not what the manifest says: {_ATTEMPTS} times {what_came} came, at last with "
        f"sha256 {digest}; the manifest says {num_bytes:,} bytes, sha256 {sha256}. Run `python -m "
        f"data_prep verify {url}` for the whole damage; write or copy the archive again."
    )


def _write_object(url: str, path: str, copy: int, num_bytes: int) -> tuple[int, str]:
    """Write an object into a file; return its size and sha256, hashed on the way.

    Of one that is too long only so much is read that this is seen.
    """
    digest, came = hashlib.sha256(), 0
    with open(copy, "wb", closefd=False) as file:
        file.seek(0)
        for chunk in storage.stream_bytes(url, path):
            came += len(chunk)
            digest.update(chunk)
            if came > num_bytes:
                break
            file.write(chunk)
    return came, digest.hexdigest()
