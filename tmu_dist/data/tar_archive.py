"""Samples of tar shards, found by the manifest's byte offsets, every one of them checked.

Shards are read as files (shard_files.py: local ones, or copies in the node's cache) or by ranges
(ranges.py).

The checksum of an uncompressed sample costs half as much as reading it. Of a file it is therefore
computed when this process first reads the sample, by `preadv` straight into the batch. From then on
the sample is copied from a memory map, whose speed does not depend on the pieces in which the
kernel keeps the file; `preadv` takes up to three times as long. All that is compressed, or comes
over a network, is checked every time.

A memory map of a file that was cut short ends the process by a signal, where other reads fail. So
the size of the file is compared just before, and only what was read otherwise at least once is
copied from there. A file that was written to is closed within a second and checked again.

Not here: which samples are read when (order.py), Zarr (zarr_archive.py).

Shape letters: B samples, T time, C channels, H height, W width, N bytes of a sample's frames.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from tmu_dist.data import storage
from tmu_dist.data.archive import (
    Codes,
    DamageError,
    SampleIndex,
    ShardError,
    problem_of,
    shard_error,
)
from tmu_dist.data.cache import object_files
from tmu_dist.data.manifest import TAR_BLOCK_BYTES, Manifest, Shard
from tmu_dist.data.ranges import Range, RangeFetcher, WrongSizeError
from tmu_dist.data.shard_files import Identity, OpenShard, ShardFiles
from tmu_dist.files import WriteError

if TYPE_CHECKING:
    from tmu_dist.data.cache import NodeCache, ObjectFiles

_Result = TypeVar("_Result")


class _OpenTar(OpenShard):
    """A tar that is open, and what `TarReader` needs of it for each sample."""

    __slots__ = ("crc32c", "first_id", "is_checked", "memory", "offsets", "sizes")

    def __init__(self, shard: Shard, first_id: int, descriptor: int, identity: Identity) -> None:
        super().__init__(shard, descriptor, identity)
        self.offsets = shard.offsets
        self.sizes = shard.sizes
        self.crc32c = shard.crc32c
        self.first_id = first_id
        self.memory: NDArray[np.uint8] | None = None
        """The tar's bytes, mapped."""
        self.is_checked = bytearray()
        """By number in the shard: 1 where they were found right."""


class _TarFiles(ShardFiles[_OpenTar]):
    """Tars that are files; remembers which samples were found right while a file is the same."""

    def __init__(
        self, files: ObjectFiles, manifest: Manifest, index: SampleIndex, *, are_copies: bool
    ) -> None:
        super().__init__(files, manifest, are_copies=are_copies)
        self._index = index
        self._checked: dict[tuple[str, int], tuple[Identity, bytearray]] = {}

    def discard(self, split: str, number: int) -> bool:
        """As `ShardFiles.discard`."""
        self._checked.pop((split, number), None)
        return super().discard(split, number)

    def _described(self, split: str, number: int, descriptor: int, identity: Identity) -> _OpenTar:
        shard = cast(Shard, self._manifest.splits[split][number])
        first_id = self._index.ends(split)[number] - shard.num_samples
        file = _OpenTar(shard, first_id, descriptor, identity)
        if self._checked.get((split, number), ((),))[0] != identity:
            self._checked[split, number] = identity, bytearray(shard.num_samples)
        file.is_checked = self._checked[split, number][1]
        if self._manifest.compression == "none":
            # Not every file system can, and it may be cut short just now: read on, not as fast.
            with suppress(OSError, ValueError):
                mapped = mmap.mmap(descriptor, shard.num_bytes, prot=mmap.PROT_READ)
                file.memory = np.frombuffer(mapped, np.uint8)
        return file


class TarReader:
    """Reads samples of one archive; implements `tmu_dist.data.archive.ShardReader`.

    For one thread of one process.
    """

    def __init__(
        self, url: str, manifest: Manifest, index: SampleIndex, cache: NodeCache | None
    ) -> None:
        self._url = url
        self._manifest = manifest
        self._index = index
        self._codec = _FramesCodec(manifest)
        files = object_files(url, cache)
        self._files = (
            None
            if files is None
            else _TarFiles(files, manifest, index, are_copies=cache is not None)
        )
        self._fetcher = RangeFetcher(url)

    def read(self, split: str, sample_ids: Sequence[int], frames_BTCHW: Codes) -> None:
        """As `ShardReader.read`."""
        self._index.check(split, sample_ids)
        if self._files is None:
            self._read_ranges(split, sample_ids, frames_BTCHW)
            return
        ends, opened = self._index.ends(split), self._files.opened[split]
        frames_BN = _as_bytes(frames_BTCHW)
        fill = self._codec.fill
        for row, sample_id in enumerate(sample_ids):
            file = opened.get(bisect_right(ends, sample_id))
            if file is None or not fill(frames_BN[row], file, sample_id - file.first_id):
                self._read_sample(split, sample_id, frames_BTCHW[row])
        self._files.look_after()

    def expect(self, split: str, sample_ids: Sequence[int]) -> None:
        """As `ShardReader.expect`: nothing to do where there are files."""
        if self._files is None:
            self._index.check(split, sample_ids)
            self._fetcher.expect(split, [self._range(split, one) for one in sample_ids])

    def read_meta(self, split: str, sample_id: int) -> Any:
        """As `ShardReader.read_meta`: the tar member that follows the frames."""
        number, index = self._index.locate(split, sample_id)
        shard = self._shard(split, number)
        end = shard.offsets[index] + shard.sizes[index]
        header = -(-end // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        last = index + 1 == shard.num_samples
        stop = shard.num_bytes if last else shard.offsets[index + 1] - TAR_BLOCK_BYTES
        return self._use_bytes(split, number, index, (header, stop - header), _parse_record)

    def _read_ranges(self, split: str, sample_ids: Sequence[int], frames_BTCHW: Codes) -> None:
        """Fill `frames_BTCHW` from ranges of remote shards, all under way at the same time.

        What was damaged, perhaps on its way, is fetched once more.
        """
        payloads = self._fetcher.take(split, [self._range(split, one) for one in sample_ids])
        for row, sample_id in enumerate(sample_ids):
            number, index = self._index.locate(split, sample_id)
            crc32c = self._shard(split, number).crc32c[index]
            try:
                self._codec.decode(next(payloads), crc32c, frames_BTCHW[row])
            except (DamageError, WrongSizeError, storage.StorageError):
                self._read_sample(split, sample_id, frames_BTCHW[row])

    def _read_sample(self, split: str, sample_id: int, frames_TCHW: Codes) -> None:
        """Fill `frames_TCHW`, or say what is wrong."""
        number, index = self._index.locate(split, sample_id)
        shard = self._shard(split, number)

        def decode(payload: bytes | memoryview) -> None:
            self._codec.decode(payload, shard.crc32c[index], frames_TCHW)

        place = shard.offsets[index], shard.sizes[index]
        self._use_bytes(split, number, index, place, decode)

    def _use_bytes(
        self,
        split: str,
        number: int,
        index: int,
        place: tuple[int, int],
        use: Callable[[bytes | memoryview], _Result],
    ) -> _Result:
        """Read bytes of a shard and use them; a damaged copy is replaced once.

        Args:
            split: of the shard.
            number: of the shard in its split.
            index: of the sample in the shard, for messages.
            place: first byte, and number of bytes.
            use: raises `DamageError` if they are not right.
        """
        shard = self._shard(split, number)
        is_replaced = False
        while True:
            try:
                if self._files is None:
                    wanted = Range(shard.path, shard.num_bytes, *place)
                    return use(next(self._fetcher.take(split, [wanted])))
                return use(self._files.open(split, number).read(*place))
            except WriteError:
                raise  # the cache's folder, not the archive
            except (DamageError, WrongSizeError, storage.StorageError, OSError) as error:
                may_help = not is_replaced and not isinstance(error, storage.StorageError)
                if not (may_help and self._files and self._files.discard(split, number)):
                    raise self._error(shard, index, problem_of(error, shard)) from error
                is_replaced = True

    def _shard(self, split: str, number: int) -> Shard:
        return cast(Shard, self._manifest.splits[split][number])

    def _range(self, split: str, sample_id: int) -> Range:
        number, index = self._index.locate(split, sample_id)
        shard = self._shard(split, number)
        return Range(shard.path, shard.num_bytes, shard.offsets[index], shard.sizes[index])

    def _error(self, shard: Shard, index: int, problem: str) -> ShardError:
        where = f"sample {index} at byte {shard.offsets[index]}"
        return shard_error(self._url, shard.path, where, problem)


class _FramesCodec:
    """The stored form of one archive's frames: an npy file, compressed by zstd or not."""

    def __init__(self, manifest: Manifest) -> None:
        self._shape = manifest.sample_shape
        self._dtype = manifest.dtype
        self._decompressor = zstandard.ZstdDecompressor()
        self._is_compressed = manifest.compression == "zstd"
        self.fill = self._fill_decompressed if self._is_compressed else self._fill_copied
        """Fill a sample's row of a batch from an open shard, and check it: the fast way. Returns
        False where anything is not as expected; `decode` finds out what, and if it matters."""
        # What the npy files begin with, unless they are from other writers.
        self._header = _npy_header(self._shape, self._dtype)
        self._header_crc32c = google_crc32c.value(self._header)
        self._num_header = len(self._header)
        self._num_bytes = self._num_header + math.prod(self._shape) * np.dtype(self._dtype).itemsize
        self._found_header = bytearray(self._num_header)

    def _fill_copied(self, frames_N: NDArray[np.uint8], file: _OpenTar, index: int) -> bool:
        start = file.offsets[index]
        file.is_used = True
        if (
            file.is_checked[index]
            and file.memory is not None
            and os.lseek(file.descriptor, 0, os.SEEK_END) == file.num_bytes
        ):
            frames_N[:] = file.memory[start + self._num_header : start + self._num_bytes]
            return True
        try:
            found = os.preadv(file.descriptor, (self._found_header, frames_N.data), start)
        except OSError:
            return False
        if found != self._num_bytes or self._found_header != self._header:
            return False
        is_right = google_crc32c.extend(self._header_crc32c, frames_N) == file.crc32c[index]
        file.is_checked[index] = is_right
        return is_right

    def _fill_decompressed(self, frames_N: NDArray[np.uint8], file: _OpenTar, index: int) -> bool:
        file.is_used = True
        try:
            stored = os.pread(file.descriptor, file.sizes[index], file.offsets[index])
            if google_crc32c.value(stored) != file.crc32c[index]:
                return False
            npy = self._decompressor.decompress(stored)
        except (OSError, zstandard.ZstdError):
            return False
        if len(npy) != self._num_bytes or not npy.startswith(self._header):
            return False
        frames_N[:] = np.frombuffer(npy, np.uint8, offset=self._num_header)
        return True

    def decode(self, payload: bytes | memoryview, crc32c: int, frames_TCHW: Codes) -> None:
        """Check a sample's stored bytes and fill `frames_TCHW` with them.

        Raises:
            DamageError: says what is wrong.
        """
        stored = np.frombuffer(payload, np.uint8)
        checksum = google_crc32c.value(stored)
        if checksum != crc32c:
            raise DamageError(
                f"the bytes were altered: crc32c is {checksum:08x}, the manifest says {crc32c:08x}"
            )
        try:
            if self._is_compressed:
                stored = np.frombuffer(self._decompressor.decompress(stored.data), np.uint8)
            if len(stored) == self._num_bytes and (
                stored[: self._num_header].tobytes() == self._header
            ):
                _as_bytes(frames_TCHW[None])[0] = stored[self._num_header :]
                return
            other_TCHW = np.load(io.BytesIO(stored.data), allow_pickle=False)
        except (zstandard.ZstdError, ValueError, EOFError) as error:
            kind = "zstd-compressed npy array" if self._is_compressed else "npy array"
            raise DamageError(f"is no {kind}: {error}") from error
        if (other_TCHW.shape, other_TCHW.dtype) != (self._shape, self._dtype):
            raise DamageError(
                f"holds {other_TCHW.dtype} frames of shape {other_TCHW.shape}, the manifest "
                f"says {self._dtype} {self._shape}"
            )
        frames_TCHW[...] = other_TCHW


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    fields = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _as_bytes(frames_BTCHW: Codes) -> NDArray[np.uint8]:
    """Return the same memory as frames_BN."""
    num_bytes = math.prod(frames_BTCHW.shape[1:]) * frames_BTCHW.itemsize
    return frames_BTCHW.reshape(-1).view(np.uint8).reshape(len(frames_BTCHW), num_bytes)


def _parse_record(data: bytes | memoryview) -> Any:
    """Return a sample's record from the bytes of its tar member."""
    try:
        member = tarfile.TarInfo.frombuf(bytes(data[:TAR_BLOCK_BYTES]), "utf-8", "strict")
        return json.loads(bytes(data[TAR_BLOCK_BYTES : TAR_BLOCK_BYTES + member.size]))
    except (tarfile.HeaderError, ValueError) as error:
        raise DamageError(f"its record cannot be read: {error}") from error
