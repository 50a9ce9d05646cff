"""Samples of tar shards, found by the manifest's byte offsets, every read checked.

Not here: which samples are read when (order.py), Zarr (zarr_archive.py).

Shape letters: B samples, T time, C channels, H height, W width.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import google_crc32c
import numpy as np
import zstandard

from tmu_dist.data import storage
from tmu_dist.data.archive import Codes, SampleIndex, ShardError, shard_error
from tmu_dist.data.manifest import TAR_BLOCK_BYTES, Manifest, Shard

if TYPE_CHECKING:
    from tmu_dist.data.cache import NodeCache

_MAX_OPEN_FILES = 128


class TarReader:
    """Samples of tar shards, by byte ranges."""

    def __init__(
        self, url: str, manifest: Manifest, index: SampleIndex, cache: NodeCache | None
    ) -> None:
        self._index = index
        self._files: dict[str, int] = {}  # open local shards
        self._sized: set[str] = set()  # remote shards whose size is known to be right
        self._url = url
        self._manifest = manifest
        self._folder = storage.local_path(url)
        self._decompressor = zstandard.ZstdDecompressor()

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, split: str, sample_ids: Sequence[int], frames_BTCHW: Codes) -> None:
        """As `ShardReader.read`; the ranges of one shard are asked for together."""
        rows_by_shard: dict[int, list[tuple[int, int]]] = {}
        for row, sample_id in enumerate(sample_ids):
            shard_number, in_shard = self._index.locate(split, sample_id)
            rows_by_shard.setdefault(shard_number, []).append((row, in_shard))
        for number, rows in rows_by_shard.items():
            shard = self._shard(split, number)
            ranges = [(shard.offsets[index], shard.sizes[index]) for _, index in rows]
            payloads = self._fetch(shard, rows[0][1], ranges)
            for (row, index), payload in zip(rows, payloads, strict=True):
                frames_BTCHW[row] = self._decode(shard, index, payload)

    def expect(self, split: str, sample_ids: Sequence[int]) -> None:
        """As `ShardReader.expect`."""

    def read_meta(self, split: str, sample_id: int) -> Any:
        """As `ShardReader.read_meta`: the tar member that follows the frames."""
        number, index = self._index.locate(split, sample_id)
        shard = self._shard(split, number)
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
