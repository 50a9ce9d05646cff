"""Samples of a Zarr archive: blocks of a split's array, put together from checked chunks.

A batch names the chunks that its samples touch. Each is read and decoded once, however many samples
share it, and those decoded last are kept for the next batch, whose windows may overlap this one's.

Shards are taken apart here (zarr_layout.py), not by a Zarr library. Libraries give fill values for
an object or a chunk that is not there, without an error, and open files by themselves, which the
node's cache may remove at any time; and finding a chunk takes them longer than decoding it. Here,
what is not there is an error: each shard's size is compared with the manifest, its index with a
crc32c, each chunk with zstd's checksum.

Not here: open files (shard_files.py), ranges of remote shards (ranges.py), tars (tar_archive.py).

Shape letters: B samples, T time, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import zstandard

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
from tmu_dist.data.manifest import Manifest, ZarrShard
from tmu_dist.data.ranges import Range, RangeFetcher, WrongSizeError
from tmu_dist.data.shard_files import Identity, OpenShard, ShardFiles
from tmu_dist.data.zarr_layout import ArrayLayout, Part, ShardIndex
from tmu_dist.files import WriteError

if TYPE_CHECKING:
    from tmu_dist.data.cache import NodeCache, ObjectFiles

_KEPT_BYTES = 16 * 2**20
"""Of decoded chunks, kept for the next batch."""
_MOST_INDEXES = 1024

_PROBLEMS = (DamageError, WrongSizeError, storage.StorageError, OSError)
"""What reading a chunk may meet."""


class _Place(NamedTuple):
    """Which chunk."""

    split: str
    shard: int
    """Number in the split."""
    chunk: int
    """Number in the shard."""


class ZarrReader:
    """Reads samples of one archive; implements `tmu_dist.data.archive.ShardReader`.

    For one thread of one process.
    """

    def __init__(
        self, url: str, manifest: Manifest, index: SampleIndex, cache: NodeCache | None
    ) -> None:
        self._url = url
        self._manifest = manifest
        self._index = index
        files = object_files(url, cache)
        self._files = (
            None if files is None else _ZarrFiles(files, manifest, are_copies=cache is not None)
        )
        self._fetcher = RangeFetcher(url)
        self._arrays: dict[str, ArrayLayout] = {}  # by split
        self._indexes: dict[tuple[str, int], ShardIndex] = {}  # by split and number of the shard
        self._kept: OrderedDict[_Place, Codes] = OrderedDict()  # the one used last is the last
        self._kept_bytes = 0
        self._rows_per_chunk: dict[str, int] = {}  # of the tables of records, by split
        self._records: tuple[str, list[str]] = "", []  # the chunk of a table that was read last

    def read(self, split: str, sample_ids: Sequence[int], frames_BTCHW: Codes) -> None:
        """As `ShardReader.read`."""
        # One channel is no axis of the array; several are an axis that is never divided.
        frames = frames_BTCHW[:, :, 0] if self._manifest.channels == 1 else frames_BTCHW
        parts = self._parts(split, sample_ids)
        places = sorted(parts)
        chunks = {place: self._kept[place] for place in places if place in self._kept}
        ranges = self._ranges([place for place in places if place not in chunks])
        payloads = self._take(split, list(ranges.values()))
        for place in places:
            chunk = chunks.get(place)
            if place in ranges:
                try:
                    chunk = self._decoded(place, ranges[place], next(payloads))
                except _PROBLEMS:
                    chunk = None
            if chunk is None:
                row, _ = parts[place][0]
                chunk = self._read_chunk(place, sample_ids[row])
            for row, (_, _, t, y, x) in parts[place]:
                part = chunk[t.of_chunk, ..., y.of_chunk, x.of_chunk]
                frames[row, t.of_range, ..., y.of_range, x.of_range] = part
            self._keep(place, chunk)
        if self._files is not None:
            self._files.look_after()

    def expect(self, split: str, sample_ids: Sequence[int]) -> None:
        """As `ShardReader.expect`: nothing to do where there are files.

        Waits for the indexes of shards that are new: without one, nothing can be asked for.
        """
        if self._files is None:
            with suppress(ShardError):  # reading will meet it
                places = self._parts(split, sample_ids)
                ranges = self._ranges([place for place in places if place not in self._kept])
                self._fetcher.expect(split, ranges.values())

    def read_meta(self, split: str, sample_id: int) -> Any:
        """As `ShardReader.read_meta`: a row of the table of records."""
        self._index.check(split, [sample_id])
        table = f"{split}/samples/sample_meta"
        if split not in self._rows_per_chunk:
            record = json.loads(self._object(f"{table}/zarr.json", "the array's metadata"))
            (self._rows_per_chunk[split],) = record["chunk_grid"]["configuration"]["chunk_shape"]
        number, row = divmod(sample_id, self._rows_per_chunk[split])
        path, where = f"{table}/c/{number}", f"row {row}"
        try:
            if self._records[0] != path:
                data = zstandard.decompress(self._object(path, where))
                self._records = path, _strings(data)
            return json.loads(self._records[1][row])
        except (zstandard.ZstdError, struct.error, ValueError, IndexError) as error:
            if isinstance(error, ShardError):
                raise
            problem = f"is no JSON object: {error}"
            raise shard_error(self._url, path, where, problem) from error

    def _parts(self, split: str, sample_ids: Sequence[int]) -> dict[_Place, list[tuple[int, Part]]]:
        """Return the chunks that samples touch: of each, rows of the batch and what they take."""
        self._index.check(split, sample_ids)
        array = self._array(split)
        block_THW = self._manifest.num_frames, self._manifest.height, self._manifest.width
        parts = defaultdict[_Place, list[tuple[int, Part]]](list)
        for row, sample_id in enumerate(sample_ids):
            for part in array.parts(self._origin(split, sample_id), block_THW):
                parts[_Place(split, part.shard, part.chunk)].append((row, part))
        return parts

    def _origin(self, split: str, sample_id: int) -> tuple[int, int, int]:
        """Return the frame, row and column at which a sample starts, if all of it can be there."""
        array, shards = self._array(split), self._shards(split)
        number, in_shard = self._index.locate(split, sample_id)
        frame, row, column = origin = shards[number].origins[in_shard]
        if (
            frame // array.frames_per_shard != number
            or frame + self._manifest.num_frames > array.shape_THW[0]
            or row + self._manifest.height > array.shape_THW[1]
            or column + self._manifest.width > array.shape_THW[2]
            or len(shards) * array.frames_per_shard < array.shape_THW[0]
        ):
            problem = (
                f"the manifest puts it where this shard does not have it: the array has "
                f"{array.shape_THW} frames, rows and columns, in {len(shards)} shards of "
                f"{array.frames_per_shard} frames"
            )
            raise self._error(_Place(split, number, 0), sample_id, problem)
        return origin

    def _ranges(self, places: Sequence[_Place]) -> dict[_Place, Range]:
        """Return where chunks are, as far as the indexes of their shards can be read."""
        unknown = dict.fromkeys(place[:2] for place in places if place[:2] not in self._indexes)
        if unknown:
            wanted = [self._index_range(*shard) for shard in unknown]
            answers = self._take("indexes", wanted)
            for shard, index_range in zip(unknown, wanted, strict=True):
                with suppress(*_PROBLEMS):
                    self._add_index(shard, index_range, next(answers))
        ranges = {}
        for place in places:
            if index := self._indexes.get(place[:2]):
                try:
                    ranges[place] = index.range(place.chunk)
                except DamageError:
                    continue
        return ranges

    def _index_range(self, split: str, shard: int) -> Range:
        stored = self._shards(split)[shard]
        return self._array(split).index_range(stored.path, stored.num_bytes)

    def _add_index(
        self, shard: tuple[str, int], index_range: Range, data: bytes | memoryview
    ) -> None:
        if len(self._indexes) >= _MOST_INDEXES:
            del self._indexes[next(iter(self._indexes))]
        self._indexes[shard] = ShardIndex(index_range, data)

    def _take(self, queue: str, ranges: Sequence[Range]) -> Iterator[bytes | memoryview]:
        """Return the bytes of ranges; an error belongs to one range, the iterator can go on."""
        if self._files is None:
            return self._fetcher.take(queue, ranges)
        return map(self._files.read, ranges)

    def _read_chunk(self, place: _Place, sample_id: int) -> Codes:
        """Return a chunk, or say what is wrong; damaged bytes are fetched again once, if possible.

        Args:
            place: which chunk.
            sample_id: that needs it, for messages.
        """
        shard = self._shard(place)
        may_try_again = True
        while True:
            try:
                if place[:2] not in self._indexes:
                    index_range = self._index_range(*place[:2])
                    (data,) = self._take("indexes", [index_range])
                    self._add_index(place[:2], index_range, data)
                wanted = self._indexes[place[:2]].range(place.chunk)
                (payload,) = self._take(place.split, [wanted])
                return self._decoded(place, wanted, payload)
            except WriteError:
                raise  # the cache's folder, not the archive
            except _PROBLEMS as error:
                is_transport = isinstance(error, storage.StorageError)
                if is_transport or not may_try_again or not self._forget(place):
                    raise self._error(place, sample_id, problem_of(error, shard)) from error
                may_try_again = False

    def _forget(self, place: _Place) -> bool:
        """Remove a damaged copy; say whether the store's own bytes may be better."""
        return self._files is None or self._files.discard(*place[:2])

    def _decoded(self, place: _Place, wanted: Range, payload: bytes | memoryview) -> Codes:
        try:
            return self._array(place.split).decode(payload)
        except DamageError as error:
            problem = f"the bytes of chunk {place.chunk} at byte {wanted.offset} were altered"
            raise DamageError(f"{problem}: {error}") from error

    def _keep(self, place: _Place, chunk: Codes) -> None:
        """Keep a decoded chunk as the one used last."""
        if place not in self._kept:
            self._kept[place] = chunk
            self._kept_bytes += chunk.nbytes
        self._kept.move_to_end(place)
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes

    def _array(self, split: str) -> ArrayLayout:
        """Return how a split's frames are stored."""
        if split not in self._arrays:
            path, where = f"{self._manifest.array_path(split)}/zarr.json", "the array's metadata"
            record = json.loads(self._object(path, where))
            try:
                self._arrays[split] = ArrayLayout.from_metadata(record, self._manifest)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                problem = f"do not describe an array of docs/data_format.md: {error}"
                raise shard_error(self._url, path, where, problem) from error
        return self._arrays[split]

    def _object(self, path: str, where: str) -> bytes:
        """Return an object that the manifest lists beside the shards, if it is what that says."""
        try:
            data = storage.read_bytes(self._url, path)
        except storage.MissingObjectError as error:
            raise shard_error(self._url, path, where, "the object is missing") from error
        except storage.StorageError as error:
            raise shard_error(self._url, path, where, f"cannot be read: {error}") from error
        known = {stored.path: stored.sha256 for stored in self._manifest.objects}
        if hashlib.sha256(data).hexdigest() != known.get(path):
            problem = "the bytes were altered: the manifest has another sha256"
            raise shard_error(self._url, path, where, problem)
        return data

    def _shards(self, split: str) -> tuple[ZarrShard, ...]:
        return cast(tuple[ZarrShard, ...], self._manifest.splits[split])

    def _shard(self, place: _Place) -> ZarrShard:
        return self._shards(place.split)[place.shard]

    def _error(self, place: _Place, sample_id: int, problem: str) -> ShardError:
        """Say what is wrong with a shard that holds a part of a sample."""
        number, in_shard = self._index.locate(place.split, sample_id)
        frame, row, column = self._shards(place.split)[number].origins[in_shard]
        where = f"sample {in_shard} at frame {frame}, row {row}, column {column}"
        return shard_error(self._url, self._shard(place).path, where, problem)


class _ZarrFiles(ShardFiles[OpenShard]):
    """Shards that are files, read by ranges as remote ones are."""

    def __init__(self, files: ObjectFiles, manifest: Manifest, *, are_copies: bool) -> None:
        super().__init__(files, manifest, are_copies=are_copies)
        splits = cast(Mapping[str, tuple[ZarrShard, ...]], manifest.splits)
        self._numbers = {
            shard.path: (split, number)
            for split, shards in splits.items()
            for number, shard in enumerate(shards)
        }

    def read(self, wanted: Range) -> bytes:
        """Return bytes of a shard.

        Raises:
            StorageError, WrongSizeError, OSError: as `ShardFiles.open` and `OpenShard.read`.
        """
        return self.open(*self._numbers[wanted.path]).read(wanted.offset, wanted.size)

    def _described(self, split: str, number: int, descriptor: int, identity: Identity) -> OpenShard:
        return OpenShard(self._manifest.splits[split][number], descriptor, identity)


def _strings(data: bytes) -> list[str]:
    """Decode Zarr's vlen-utf8: how many there are, then of each its length and its bytes."""
    (count,), place = struct.unpack_from("<I", data), 4
    strings = []
    for _ in range(count):
        (length,) = struct.unpack_from("<I", data, place)
        place += 4 + length
        strings.append(data[place - length : place].decode())
    return strings
