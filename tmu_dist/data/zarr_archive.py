"""Samples of a Zarr archive: blocks of a split's array, every read checked.

A Zarr library gives fill values for a shard object that is not there, without an error. So each
object's size is compared with the manifest before it is first read in a process, and the store that
the library reads from says no where it would have said "absent". What is inside an object is
protected by Zarr's own checksums: crc32c of the shard's index, zstd's of every chunk.

Shape letters: B samples, T time, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from tmu_dist.data import storage
from tmu_dist.data.archive import Codes, SampleIndex, ShardError, shard_error
from tmu_dist.data.manifest import Manifest, ZarrShard

if TYPE_CHECKING:
    from tmu_dist.data.cache import NodeCache


class _AbsentError(Exception):
    """The store has no such object."""


class _WholeStore(ObjectStore[Any]):
    """A store in which everything that is asked for must be there."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if found is None:
            raise _AbsentError(key)
        return found


class ZarrReader:
    """Reads samples of one archive; implements `tmu_dist.data.archive.ShardReader`."""

    def __init__(
        self, url: str, manifest: Manifest, index: SampleIndex, cache: NodeCache | None
    ) -> None:
        self._index = index
        self._url = url
        self._manifest = manifest
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._sized: set[str] = set()  # shards whose size is known to be right
        self._records: tuple[str, int, list[str]] = ("", 0, [])  # the chunk read last

    def read(self, split: str, sample_ids: Sequence[int], frames_BTCHW: Codes) -> None:
        """As `ShardReader.read`."""
        for row, sample_id in enumerate(sample_ids):
            self._read_sample(split, sample_id, frames_BTCHW[row])

    def expect(self, split: str, sample_ids: Sequence[int]) -> None:
        """As `ShardReader.expect`."""

    def read_meta(self, split: str, sample_id: int) -> Any:
        """As `ShardReader.read_meta`: a row of the table of records."""
        self._index.locate(split, sample_id)  # refuses what is not there
        path = f"{split}/samples/sample_meta"
        array = self._open(path)
        chunk, row = divmod(sample_id, array.chunks[0])
        path, where = f"{path}/c/{chunk}", f"row {row}"
        if self._records[:2] != (split, chunk):
            first = chunk * array.chunks[0]
            try:
                texts = cast(Any, array[first : first + array.chunks[0]])
            except Exception as error:  # of any kind: see _read_sample
                raise shard_error(self._url, path, where, _problem(error)) from error
            self._records = split, chunk, [str(text) for text in texts]
        try:
            return json.loads(self._records[2][row])
        except (ValueError, IndexError) as error:
            problem = f"is no JSON object: {error}"
            raise shard_error(self._url, path, where, problem) from error

    def _read_sample(self, split: str, sample_id: int, frames_TCHW: Codes) -> None:
        """Fill `frames_TCHW`, part by part as the sample lies in shards."""
        array = self._open(self._manifest.array_path(split))
        shards = self._shards(split)
        per_shard = (array.shards or array.chunks)[0]
        shard_number, in_shard = self._index.locate(split, sample_id)
        first, row, column = shards[shard_number].origins[in_shard]
        num_frames, channels, height, width = self._manifest.sample_shape
        end = first + num_frames
        *_, array_height, array_width = array.shape
        if (
            first // per_shard != shard_number
            or end > min(array.shape[0], per_shard * len(shards))
            or row + height > array_height
            or column + width > array_width
        ):
            raise self._error(
                shards[shard_number],
                in_shard,
                f"the manifest puts it at frame {first}, row {row}, column {column}, which is not "
                f"in this part of an array of {array.shape} in shards of {per_shard} frames",
            )
        tile = slice(row, row + height), slice(column, column + width)
        middle = () if channels == 1 else (slice(None),)
        done = first
        while done < end:
            number = done // per_shard
            stop = min(end, (number + 1) * per_shard)
            self._check_size(shards[number], in_shard)
            try:
                part = cast(Any, array[(slice(done, stop), *middle, *tile)])
            # zarr, obstore and the codecs raise what they like, from OSError to RuntimeError; what
            # they say of the object is in any case that it cannot be read.
            except Exception as error:
                raise self._error(shards[number], in_shard, _problem(error)) from error
            target = frames_TCHW[done - first : stop - first]
            target[...] = part[:, None] if channels == 1 else part
            done = stop

    def _open(self, path: str) -> zarr.Array[Any]:
        """Return an open array whose metadata are those that the manifest knows."""
        if path not in self._arrays:
            metadata_path = f"{path}/zarr.json"
            known = {stored.path: stored.sha256 for stored in self._manifest.objects}
            where = "the array's metadata"
            try:
                metadata = storage.read_bytes(self._url, metadata_path)
            except storage.StorageError as error:
                raise shard_error(self._url, metadata_path, where, str(error)) from error
            if hashlib.sha256(metadata).hexdigest() != known.get(metadata_path):
                problem = "are not those that the manifest knows"
                raise shard_error(self._url, metadata_path, where, problem)
            store = _WholeStore(storage.open_store(self._url), read_only=True)
            self._arrays[path] = zarr.open_array(store, path=path, mode="r", zarr_format=3)
        return self._arrays[path]

    def _shards(self, split: str) -> tuple[ZarrShard, ...]:
        return cast(tuple[ZarrShard, ...], self._manifest.shards(split))

    def _check_size(self, shard: ZarrShard, in_shard: int) -> None:
        """Compare a shard's size with the manifest's, once."""
        if shard.path in self._sized:
            return
        try:
            num_bytes = storage.object_size(self._url, shard.path)
        except storage.MissingObjectError as error:
            raise self._error(shard, in_shard, "the shard is missing") from error
        except storage.StorageError as error:
            raise self._error(shard, in_shard, f"cannot be read: {error}") from error
        if num_bytes != shard.num_bytes:
            raise self._error(
                shard,
                in_shard,
                f"the shard is truncated or replaced: it has {num_bytes} bytes, "
                f"the manifest says {shard.num_bytes}",
            )
        self._sized.add(shard.path)

    def _error(self, shard: ZarrShard, in_shard: int, problem: str) -> ShardError:
        return shard_error(self._url, shard.path, f"sample {in_shard}", problem)


def _problem(error: Exception) -> str:
    """Say in words what a read failed of."""
    if isinstance(error, _AbsentError):
        return f"{error} is missing"
    reason = str(error).partition("\n")[0]
    return f"the bytes were altered or cannot be read: {reason or type(error).__name__}"
