"""Random access to the samples of an archive, every read checked.

Both formats look the same from outside. Tar samples are found by the manifest's byte offsets
(`os.pread` for local shards, range requests for URLs); Zarr is in zarr_archive.py, which is loaded
when an archive needs it. Nothing is cached but open files. No torch here; the loader turns arrays
into tensors.

Shape letters: B samples, T time, C channels, H height, W width.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from tmu_dist.data import storage
from tmu_dist.data.manifest import (
    MANIFEST_PATH,
    TAR_BLOCK_BYTES,
    Manifest,
    ManifestError,
    Shard,
)

Codes: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]
"""Frames as they are stored; what the numbers mean is in the manifest (`Units`)."""

_MAX_OPEN_FILES = 128


class ShardError(ValueError):
    """A shard that is missing, truncated or altered, or a sample that is not what it should be."""


def open_archive(url: str) -> Archive:
    """Open a finished archive of either format: read and check its manifest.

    Raises:
        StorageError: nothing there, unreachable, or no manifest (written last, so the archive
            was not finished).
        ManifestError: the manifest is of another schema or contradicts itself.
    """
    try:
        text = storage.read_text(url, MANIFEST_PATH)
    except storage.MissingObjectError as error:
        raise storage.MissingObjectError(
            f"{url} is not a finished archive: it has no {MANIFEST_PATH}. Check the URL, or run "
            "the `python -m data_prep` command that writes it to its end."
        ) from error
    try:
        return Archive(url, Manifest.from_json(text))
    except ManifestError as error:
        raise ManifestError(f"{storage.join_url(url, MANIFEST_PATH)}: {error}") from error


class Place(NamedTuple):
    """Where a sample is."""

    shard: int
    """Number of its shard in the manifest's list."""
    in_shard: int
    """Number of the sample in that shard."""
    sample_id: int


class ShardReader(Protocol):
    """How samples of one format are read; opens what it needs when it needs it."""

    def read(self, split: str, places: Sequence[Place], frames_BTCHW: Codes) -> None:
        """Fill `frames_BTCHW` with the samples at the places.

        Raises:
            ShardError: names the shard and the sample.
        """
        ...

    def read_meta(self, split: str, place: Place) -> Any:
        """Return a sample's record, not yet checked.

        Raises:
            ShardError: names the shard and the sample.
        """
        ...


class Archive:
    """The samples of an archive by split and id. May be sent to other processes."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self.url = url
        self.manifest = manifest
        self._ends = {
            split: list(itertools.accumulate(shard.num_samples for shard in shards))
            for split, shards in manifest.splits.items()
        }
        self._reader = _shard_reader(url, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        # Open files and stores belong to one process.
        return Archive, (self.url, self.manifest)

    def read(self, split: str, sample_ids: Sequence[int]) -> Codes:
        """Return frames_BTCHW of the given samples, in their order, of the manifest's dtype.

        Raises:
            ValueError: no such split or sample.
            ShardError: names the shard and the sample.
        """
        places = [self._locate(split, int(sample_id)) for sample_id in sample_ids]
        shape = (len(places), *self.manifest.sample_shape)
        frames_BTCHW: Codes = np.empty(shape, self.manifest.dtype)
        self._reader.read(split, places, frames_BTCHW)
        return frames_BTCHW

    def read_meta(self, split: str, sample_id: int) -> dict[str, Any]:
        """Return the record that was written beside a sample.

        Raises:
            ValueError: no such split or sample.
            ShardError: the record is missing, altered or another sample's.
        """
        place = self._locate(split, sample_id)
        record = self._reader.read_meta(split, place)
        if not isinstance(record, dict) or record.get("sample_id") != sample_id:
            path = self.manifest.shards(split)[place.shard].path
            where = f"sample {place.in_shard}"
            raise shard_error(self.url, path, where, f"its record is not of sample_id {sample_id}")
        return record

    def _locate(self, split: str, sample_id: int) -> Place:
        self.manifest.shards(split)  # refuses an unknown split by name
        ends = self._ends[split]
        if not 0 <= sample_id < ends[-1]:
            raise ValueError(f"Split {split!r} has samples 0..{ends[-1] - 1}, not {sample_id}.")
        number = bisect.bisect_right(ends, sample_id)
        return Place(number, sample_id - (ends[number - 1] if number else 0), sample_id)


def shard_error(url: str, path: str, where: str, problem: str) -> ShardError:
    """Say what is wrong where, and what to do."""
    return ShardError(
        f"{storage.join_url(url, path)}, {where}: {problem}. Run `python -m data_prep verify "
        f"{url}` for the whole damage; write or copy the archive again."
    )


def _shard_reader(url: str, manifest: Manifest) -> ShardReader:
    if manifest.format == "webdataset":
        return _TarReader(url, manifest)
    from tmu_dist.data.zarr_archive import ZarrReader

    return ZarrReader(url, manifest)


class _TarReader:
    """Samples of tar shards, by byte ranges."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self._files: dict[str, int] = {}  # open local shards
        self._sized: set[str] = set()  # remote shards whose size is known to be right
        self._url = url
        self._manifest = manifest
        self._folder = storage.local_path(url)
        self._decompressor = zstandard.ZstdDecompressor()

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, split: str, places: Sequence[Place], frames_BTCHW: Codes) -> None:
        """As `ShardReader.read`; the ranges of one shard are asked for together."""
        rows_by_shard: dict[int, list[tuple[int, int]]] = {}
        for row, place in enumerate(places):
            rows_by_shard.setdefault(place.shard, []).append((row, place.in_shard))
        for number, rows in rows_by_shard.items():
            shard = self._shard(split, number)
            ranges = [(shard.offsets[index], shard.sizes[index]) for _, index in rows]
            payloads = self._fetch(shard, rows[0][1], ranges)
            for (row, index), payload in zip(rows, payloads, strict=True):
                frames_BTCHW[row] = self._decode(shard, index, payload)

    def read_meta(self, split: str, place: Place) -> Any:
        """As `ShardReader.read_meta`: the tar member that follows the frames."""
        shard = self._shard(split, place.shard)
        index = place.in_shard
        end = shard.offsets[index] + shard.sizes[index]
        header = -(-end // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        last = index + 1 == shard.num_samples
        stop = shard.num_bytes if last else shard.offsets[index + 1] - TAR_BLOCK_BYTES
        try:
            (data,) = self._fetch(shard, index, [(header, stop - header)])
            member = tarfile.TarInfo.frombuf(data[:TAR_BLOCK_BYTES], "utf-8", "strict")
            return json.loads(data[TAR_BLOCK_BYTES : TAR_BLOCK_BYTES + member.size])
        except (tarfile.HeaderError, ValueError) as error:
            if isinstance(error, ShardError):
                raise
            raise self._error(shard, index, f"its record cannot be read: {error}") from error

    def _shard(self, split: str, number: int) -> Shard:
        return cast(Shard, self._manifest.shards(split)[number])

    def _fetch(self, shard: Shard, index: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return (offset, size) ranges of one shard; errors name sample `index`."""
        try:
            if self._folder is None:
                self._check_remote_size(shard, index)
                offsets, sizes = zip(*ranges, strict=True)
                return storage.read_ranges(self._url, shard.path, offsets, sizes)
            file = self._open_file(self._folder, shard.path)
            self._check_size(shard, index, os.fstat(file).st_size)
            return [os.pread(file, size, offset) for offset, size in ranges]
        except (FileNotFoundError, storage.MissingObjectError) as error:
            raise self._error(shard, index, "the shard is missing") from error
        except (OSError, storage.StorageError) as error:
            raise self._error(shard, index, f"cannot be read: {error}") from error

    def _open_file(self, folder: Path, path: str) -> int:
        """Return an open local shard; when too many are open, the one opened first is closed."""
        if path not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(folder / path, os.O_RDONLY)
        return self._files[path]

    def _check_remote_size(self, shard: Shard, index: int) -> None:
        """Check a remote shard's size before its first range is asked for."""
        if shard.path not in self._sized:
            self._check_size(shard, index, storage.object_size(self._url, shard.path))
            self._sized.add(shard.path)

    def _check_size(self, shard: Shard, index: int, num_bytes: int) -> None:
        if num_bytes != shard.num_bytes:
            raise self._error(
                shard,
                index,
                f"the shard is truncated or replaced: it has {num_bytes} bytes, "
                f"the manifest says {shard.num_bytes}",
            )

    def _decode(self, shard: Shard, index: int, payload: bytes) -> Codes:
        """Check one sample's stored bytes against the manifest and decode them to frames_TCHW."""
        checksum = google_crc32c.value(payload)
        if checksum != shard.crc32c[index]:
            raise self._error(
                shard,
                index,
                f"the bytes were altered: crc32c is {checksum:08x}, "
                f"the manifest says {shard.crc32c[index]:08x}",
            )
        try:
            frames_TCHW = np.load(
                io.BytesIO(self._decompressor.decompress(payload)), allow_pickle=False
            )
        except (zstandard.ZstdError, ValueError, EOFError) as error:
            raise self._error(shard, index, f"is no zstd-compressed npy array: {error}") from error
        expected = self._manifest.sample_shape, self._manifest.dtype
        if (frames_TCHW.shape, frames_TCHW.dtype) != expected:
            raise self._error(
                shard,
                index,
                f"holds {frames_TCHW.dtype} frames of shape {frames_TCHW.shape}, the manifest "
                f"says {self._manifest.dtype} {self._manifest.sample_shape}",
            )
        return frames_TCHW

    def _error(self, shard: Shard, index: int, problem: str) -> ShardError:
        where = f"sample {index} at byte {shard.offsets[index]}"
        return shard_error(self._url, shard.path, where, problem)
