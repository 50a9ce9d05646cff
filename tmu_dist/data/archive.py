"""Random access to the samples of an archive, every read checked.

Samples are found by the manifest's byte offsets: `os.pread` for local shards, range requests for
URLs. Nothing is cached but open files. No torch here; the loader turns arrays into tensors.

Shape letters: B samples, T time, C channels, H height, W width.
"""

from __future__ import annotations

import bisect
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from tmu_dist.data import storage
from tmu_dist.data.manifest import MANIFEST_PATH, Manifest, ManifestError, Shard

_MAX_OPEN_FILES = 128


class ShardError(ValueError):
    """A shard that is missing, truncated or altered, or a sample that is not what it should be."""


def open_archive(url: str) -> Archive:
    """Open a finished archive: read and check its manifest.

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


class Archive:
    """The samples of an archive by split and id. May be sent to other processes."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self._files: dict[str, int] = {}  # open local shards
        self._sized: set[str] = set()  # remote shards whose size is known to be right
        self.url = url
        self.manifest = manifest
        self._folder = storage.local_path(url)
        self._ends = {
            split: list(itertools.accumulate(shard.num_samples for shard in shards))
            for split, shards in manifest.splits.items()
        }
        self._decompressor = zstandard.ZstdDecompressor()

    def __reduce__(self) -> tuple[Any, ...]:
        # Descriptors and decompressor belong to one process.
        return Archive, (self.url, self.manifest)

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, split: str, sample_ids: Sequence[int]) -> NDArray[np.uint8]:
        """Return frames_BTCHW of the given samples, in their order.

        Raises:
            ValueError: no such split or sample.
            ShardError: names the shard, the sample and its byte offset.
        """
        frames_BTCHW = np.empty((len(sample_ids), *self.manifest.sample_shape), np.uint8)
        rows_by_shard: dict[int, list[tuple[int, int]]] = {}
        for row, sample_id in enumerate(sample_ids):
            number, index = self._locate(split, int(sample_id))
            rows_by_shard.setdefault(number, []).append((row, index))
        for number, rows in rows_by_shard.items():
            shard = self.manifest.shards(split)[number]
            payloads = self._fetch(shard, [index for _, index in rows])
            for (row, index), payload in zip(rows, payloads, strict=True):
                frames_BTCHW[row] = self._decode(shard, index, payload)
        return frames_BTCHW

    def _locate(self, split: str, sample_id: int) -> tuple[int, int]:
        """Return the number of the sample's shard and the sample's index in it."""
        ends = self._ends[split]
        if not 0 <= sample_id < ends[-1]:
            raise ValueError(f"Split {split!r} has samples 0..{ends[-1] - 1}, not {sample_id}.")
        number = bisect.bisect_right(ends, sample_id)
        return number, sample_id - (ends[number - 1] if number else 0)

    def _fetch(self, shard: Shard, indices: list[int]) -> list[bytes]:
        """Return the stored bytes of some samples of one shard."""
        offsets = [shard.offsets[index] for index in indices]
        sizes = [shard.sizes[index] for index in indices]
        try:
            if self._folder is None:
                self._check_remote_size(shard, indices[0])
                return storage.read_ranges(self.url, shard.path, offsets, sizes)
            file = self._open_file(self._folder, shard.path)
            self._check_size(shard, indices[0], os.fstat(file).st_size)
            return [os.pread(file, *place) for place in zip(sizes, offsets, strict=True)]
        except (FileNotFoundError, storage.MissingObjectError) as error:
            raise self._error(shard, indices[0], "the shard is missing") from error
        except (OSError, storage.StorageError) as error:
            raise self._error(shard, indices[0], f"cannot be read: {error}") from error

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
            self._check_size(shard, index, storage.object_size(self.url, shard.path))
            self._sized.add(shard.path)

    def _check_size(self, shard: Shard, index: int, num_bytes: int) -> None:
        if num_bytes != shard.num_bytes:
            raise self._error(
                shard,
                index,
                f"the shard is truncated or replaced: it has {num_bytes} bytes, "
                f"the manifest says {shard.num_bytes}",
            )

    def _decode(self, shard: Shard, index: int, payload: bytes) -> NDArray[np.uint8]:
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
        if frames_TCHW.shape != self.manifest.sample_shape or frames_TCHW.dtype != np.uint8:
            raise self._error(
                shard,
                index,
                f"holds {frames_TCHW.dtype} frames of shape {frames_TCHW.shape}, the manifest "
                f"says {self.manifest.dtype} {self.manifest.sample_shape}",
            )
        return frames_TCHW

    def _error(self, shard: Shard, index: int, problem: str) -> ShardError:
        return ShardError(
            f"{storage.join_url(self.url, shard.path)}, sample {index} at byte "
            f"{shard.offsets[index]}: {problem}. Run `python -m data_prep verify {self.url}` for "
            "the whole damage; write or copy the archive again."
        )
