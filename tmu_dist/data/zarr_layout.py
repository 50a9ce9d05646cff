"""How the frames of a split lie in the shards and chunks of its Zarr array.

The layout is the one of docs/data_format.md ("Zarr stores"): a shard holds whole frames, a chunk
all channels, so that only time, height and width are divided among chunks.

Not here: reading (zarr_archive.py).

Shape letters: T time, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeAlias

import google_crc32c
import numpy as np
import zstandard

from tmu_dist.data.archive import Codes, DamageError
from tmu_dist.data.manifest import Manifest
from tmu_dist.data.ranges import Range

Three: TypeAlias = tuple[int, int, int]
"""Numbers along time, height and width."""

_ABSENT = 2**64 - 1
"""Offset and size of a chunk that a shard does not hold."""


class Cut(NamedTuple):
    """The part of a range along one axis that lies in one chunk."""

    chunk: int
    """Which one, counted from the one where the range begins."""
    of_range: slice
    of_chunk: slice


class Part(NamedTuple):
    """The part of a block of the array that lies in one chunk."""

    shard: int
    """Number of the chunk's shard in the split."""
    chunk: int
    """Number of the chunk in its shard."""
    time: Cut
    height: Cut
    width: Cut


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """The array of a split's frames. For one thread."""

    shape_THW: Three
    shard_THW: Three
    """Of a shard, in chunks."""
    chunk_THW: Three
    """Of a chunk, in frames, rows and columns."""
    chunk_shape: tuple[int, ...]
    """The same, with an axis for the channels if there are several."""
    dtype: np.dtype[Any]

    @classmethod
    def from_metadata(cls, record: dict[str, Any], manifest: Manifest) -> ArrayLayout:
        """Take the layout from the array's zarr.json.

        Raises:
            ValueError: it is another one than docs/data_format.md describes.
            KeyError, TypeError, IndexError, AttributeError: this is no metadata of a sharded array.
        """
        (sharding,) = record["codecs"]
        inside = sharding["configuration"]
        steps = [*inside["codecs"], *inside["index_codecs"]]
        orders = {(step.get("configuration") or {}).get("endian") or "little" for step in steps}
        names = [step["name"] for step in (sharding, *steps)]
        if (
            names != ["sharding_indexed", "bytes", "zstd", "bytes", "crc32c"]
            or orders != {"little"}
            or inside["index_location"] != "end"
        ):
            raise ValueError(f"the codecs are {record['codecs']}")
        shape, chunk_shape = record["shape"], inside["chunk_shape"]
        shard_shape = record["chunk_grid"]["configuration"]["chunk_shape"]
        channels = [] if manifest.channels == 1 else [manifest.channels]
        if (
            record["data_type"] != manifest.dtype
            or not len(shape) == len(shard_shape) == len(chunk_shape) == 3 + len(channels)
            or not shape[1:-2] == shard_shape[1:-2] == chunk_shape[1:-2] == channels
            or any(shard < whole for shard, whole in zip(shard_shape[1:], shape[1:], strict=True))
            or any(shard % chunk for shard, chunk in zip(shard_shape, chunk_shape, strict=True))
        ):
            raise ValueError(
                f"{record['data_type']} {shape} in shards of {shard_shape} and chunks of "
                f"{chunk_shape} is no array of whole {manifest.dtype} frames with "
                f"{manifest.channels} channels"
            )
        time, height, width = _without_channels(shard_shape)
        chunk_THW = _without_channels(chunk_shape)
        return cls(
            shape_THW=_without_channels(shape),
            shard_THW=(time // chunk_THW[0], height // chunk_THW[1], width // chunk_THW[2]),
            chunk_THW=chunk_THW,
            chunk_shape=tuple(chunk_shape),
            dtype=np.dtype(manifest.dtype).newbyteorder("<"),
        )

    @property
    def frames_per_shard(self) -> int:
        return self.shard_THW[0] * self.chunk_THW[0]

    @cached_property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @cached_property
    def _stated_bytes(self) -> tuple[int, int]:
        """What zstd may say of the length of a chunk."""
        return self.chunk_bytes, zstandard.CONTENTSIZE_UNKNOWN

    @cached_property
    def _decompressor(self) -> zstandard.ZstdDecompressor:
        return zstandard.ZstdDecompressor()

    def parts(self, origin_THW: Three, block_THW: Three) -> Iterator[Part]:
        """Cut a block of the array where chunks end."""
        (first_t, in_t), (first_y, in_y), (first_x, in_x) = map(divmod, origin_THW, self.chunk_THW)
        num_t, num_y, num_x = self.shard_THW
        chunk_t, chunk_y, chunk_x = self.chunk_THW
        size_t, size_y, size_x = block_THW
        for t in _cuts(in_t, size_t, chunk_t):
            shard, t_in_shard = divmod(first_t + t.chunk, num_t)
            for y in _cuts(in_y, size_y, chunk_y):
                row_of_chunks = (t_in_shard * num_y + first_y + y.chunk) * num_x + first_x
                for x in _cuts(in_x, size_x, chunk_x):
                    yield Part(shard, row_of_chunks + x.chunk, t, y, x)

    def decode(self, payload: bytes | memoryview) -> Codes:
        """Return a chunk from its bytes in a shard.

        Raises:
            DamageError: they are not a whole chunk, or not what was written.
        """
        try:
            facts = zstandard.get_frame_parameters(payload)
            # Without a checksum, or with bytes after it, altered ones could pass; so much memory
            # is taken as they say that they need.
            if not facts.has_checksum or facts.content_size not in self._stated_bytes:
                raise DamageError(f"they do not begin as a chunk of {self.chunk_bytes} bytes does")
            data = self._decompressor.decompress(
                payload, max_output_size=self.chunk_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise DamageError(str(error)) from error
        if len(data) != self.chunk_bytes:
            raise DamageError(f"they decode to {len(data)} bytes, a chunk has {self.chunk_bytes}")
        return np.frombuffer(data, self.dtype).reshape(self.chunk_shape)

    def index_range(self, path: str, num_bytes: int) -> Range:
        """Return where the index is in a shard of a length."""
        size = 16 * math.prod(self.shard_THW) + 4
        # In a shard that is too short for one, the checksum will be wrong.
        return Range(path, num_bytes, max(0, num_bytes - size), min(size, num_bytes))


class ShardIndex:
    """Where the chunks of a shard are in its object.

    Args:
        place: of the index in the object, from `ArrayLayout.index_range`.
        data: the bytes there.

    Raises:
        DamageError: their checksum says that they were altered.
    """

    def __init__(self, place: Range, data: bytes | memoryview) -> None:
        entries, stored = bytes(data[:-4]), int.from_bytes(data[-4:], "little")
        checksum = google_crc32c.value(entries)
        if checksum != stored:
            raise DamageError(
                f"the bytes of the index at byte {place.offset} were altered: crc32c is "
                f"{checksum:08x}, they say {stored:08x}"
            )
        self._entries = np.frombuffer(entries, "<u8").reshape(-1, 2)
        self._place = place

    def range(self, chunk: int) -> Range:
        """Return where a chunk is.

        Raises:
            DamageError: the chunk is not there.
        """
        offset, size = self._entries[chunk].tolist()
        if offset + size > self._place.offset:
            if offset == _ABSENT:
                raise DamageError(f"chunk {chunk} is absent")
            raise DamageError(f"chunk {chunk} would end at byte {offset + size}, in the index")
        return Range(self._place.path, self._place.object_bytes, offset, size)


@lru_cache(maxsize=4096)
def _cuts(start_in_chunk: int, length: int, chunk_length: int) -> tuple[Cut, ...]:
    """Cut a range along one axis where chunks end."""
    cuts = []
    done = 0
    while done < length:
        chunk, start = divmod(start_in_chunk + done, chunk_length)
        size = min(length - done, chunk_length - start)
        cuts.append(Cut(chunk, slice(done, done + size), slice(start, start + size)))
        done += size
    return tuple(cuts)


def _without_channels(shape: Sequence[int]) -> Three:
    return shape[0], shape[-2], shape[-1]
