"""Converted frames between reading and writing: blocks under .parts/ in the archive's own place.

A job's frames are packed, each compressed by itself, into blocks; a record beside them says where
each frame is and what planning must know of it. The record is written last, so a job without one
was not finished. All of it goes when the archive is finished.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zstandard

from data_prep.source import BadFile, Codes, Frame, FrameRecord
from tmu_dist.data import storage

_SHARD = "shard-"
_BLOCK_BYTES = 64 * 2**20
"""Compressed frames in one block, and so about the memory that a job needs."""


class Place(NamedTuple):
    """Where a staged frame lies."""

    block: str
    """Path of the object inside the archive's place."""
    offset: int
    size: int
    crc32c: int


class StagedJob(NamedTuple):
    """What one job found: facts and places of its frames, and the files that failed."""

    records: tuple[FrameRecord, ...]
    places: tuple[Place, ...]
    bad: tuple[BadFile, ...]
    shape_CHW: tuple[int, int, int] | None
    """Of its frames; None when there is none."""
    dtype: str | None


@dataclass(frozen=True)
class Staging:
    """The folder of staged pieces of one archive in the making."""

    url: str
    """Of the archive."""
    prefix: str
    """Path of the folder inside it, without a final slash."""

    def read_record(self, name: str) -> dict[str, Any] | None:
        """Return the record of a finished piece, or None."""
        try:
            return json.loads(storage.read_text(self.url, f"{self.prefix}/{name}.json"))
        except storage.MissingObjectError:
            return None
        except ValueError:  # no JSON: not ours, or damaged; the piece is made again
            return None

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Declare a piece finished."""
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
        storage.write_bytes(self.url, f"{self.prefix}/{name}.json", text.encode())

    def keep_shards_of(self, plan_key: str) -> None:
        """Forget the shards of other plans, whose places this plan's shards will take."""
        for path in storage.list_paths(self.url, self.prefix):
            name = path.rpartition("/")[2]
            if name.startswith(_SHARD) and not name.startswith(f"{_SHARD}{plan_key}-"):
                storage.delete(self.url, path)

    def read_shard(self, plan_key: str, name: str) -> dict[str, Any] | None:
        """Return the record of a shard that this plan has written, or None."""
        return self.read_record(f"{_SHARD}{plan_key}-{name}")

    def write_shard(self, plan_key: str, name: str, record: Mapping[str, Any]) -> None:
        """Declare a shard of this plan written."""
        self.write_record(f"{_SHARD}{plan_key}-{name}", record)

    def read_job(self, name: str, files: Sequence[Any]) -> StagedJob | None:
        """Return a finished job, or None; `files` must be what it was made from."""
        record = self.read_record(name)
        if record is None or record["files"] != json.loads(json.dumps(files)):
            return None
        return StagedJob(
            records=tuple(FrameRecord(**facts) for facts in record["records"]),
            places=tuple(Place(*place) for place in record["places"]),
            bad=tuple(BadFile(*bad) for bad in record["bad"]),
            shape_CHW=tuple(record["shape"]) if record["shape"] else None,
            dtype=record["dtype"],
        )

    def write_job(
        self, name: str, files: Sequence[Any], frames: Iterable[Frame | BadFile]
    ) -> StagedJob:
        """Pack the frames of a job into blocks as they come, and record them.

        Raises:
            ValueError: frames of different shape or dtype.
        """
        compressor = zstandard.ZstdCompressor(level=1)
        records: list[FrameRecord] = []
        places: list[Place] = []
        bad: list[BadFile] = []
        kinds: set[tuple[tuple[int, ...], str]] = set()
        packed, num_bytes, number = [], 0, 0
        for frame in frames:
            if isinstance(frame, BadFile):
                bad.append(frame)
                continue
            kinds.add((frame.codes_CHW.shape, frame.codes_CHW.dtype.name))
            payload = compressor.compress(np.ascontiguousarray(frame.codes_CHW).data)
            block = f"{self.prefix}/{name}-{number:03d}.frames"
            places.append(Place(block, num_bytes, len(payload), google_crc32c.value(payload)))
            records.append(frame.record)
            packed.append(payload)
            num_bytes += len(payload)
            if num_bytes >= _BLOCK_BYTES:
                storage.write_bytes(self.url, block, b"".join(packed))
                packed, num_bytes, number = [], 0, number + 1
        if packed:
            storage.write_bytes(self.url, places[-1].block, b"".join(packed))
        if len(kinds) > 1:
            raise ValueError(f"{files}: frames of different shape or type: {sorted(kinds)}.")
        shape, dtype = next(iter(kinds), (None, None))
        self.write_record(
            name,
            {
                "files": files,
                "records": [dataclasses.asdict(record) for record in records],
                "places": places,
                "bad": bad,
                "shape": shape,
                "dtype": dtype,
            },
        )
        return StagedJob(tuple(records), tuple(places), tuple(bad), shape, dtype)  # type: ignore[arg-type]


class FrameReader:
    """Reads staged frames in the order in which a piece of writing needs them.

    Args:
        url: of the archive.
        places: every frame that will be asked for, by any name.
        shape_CHW: of a frame.
        dtype: of a frame.
    """

    def __init__(
        self,
        url: str,
        places: Mapping[int, Place],
        shape_CHW: tuple[int, int, int],
        dtype: str,
    ) -> None:
        self._url = url
        self._places = places
        self.shape_CHW = shape_CHW
        self.dtype = dtype
        self._payloads: dict[int, bytes] = {}
        self._frames: dict[int, Codes] = {}

    def sequence(self, frames: Sequence[int]) -> Iterator[Codes]:
        """Yield frames by name; only those of the sequence before stay decoded in memory."""
        self._frames = {name: self._frames[name] for name in frames if name in self._frames}
        for name in frames:
            if name not in self._frames:
                self._frames[name] = self.frame(name)
            yield self._frames[name]

    def frame(self, name: int) -> Codes:
        """Read and decode one frame; its neighbours' compressed bytes come along and are kept.

        Raises:
            ValueError: the staged bytes were altered.
        """
        place = self._places[name]
        if name not in self._payloads:
            self._fetch_block(place.block)
        payload = self._payloads[name]
        if google_crc32c.value(payload) != place.crc32c:
            raise ValueError(
                f"{storage.join_url(self._url, place.block)} was altered at byte {place.offset}. "
                "Delete the folder .parts in the archive's place and run the same command again."
            )
        data = zstandard.ZstdDecompressor().decompress(payload, self._num_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape_CHW)

    def _fetch_block(self, block: str) -> None:
        """Read all frames of a block that are needed, in one request where they are neighbours."""
        names = [name for name, place in self._places.items() if place.block == block]
        names.sort(key=lambda name: self._places[name].offset)
        offsets = [self._places[name].offset for name in names]
        sizes = [self._places[name].size for name in names]
        payloads = storage.read_ranges(self._url, block, offsets, sizes)
        self._payloads.update(zip(names, payloads, strict=True))

    @property
    def _num_bytes(self) -> int:
        return int(np.prod(self.shape_CHW)) * np.dtype(self.dtype).itemsize
