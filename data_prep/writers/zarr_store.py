"""Samples to an archive in Zarr v3's format: every frame once, sequences as places in an array.

The format is docs/data_format.md: a group for each split with the array of its frames, coordinates,
and tables of its samples. Any Zarr v3 library opens it, xarray with times and physical values.

A store is written in this order: `create_split` for each split (one process), `write_frames` for
each shard (any processes, any order), `finish_store` (one process), and then the manifest
(objects.py). Bytes depend on the content alone: objects are encoded in memory and then put in place
whole.

Not here: coordinates and sample tables (zarr_tables.py), tars (webdataset.py).

Shape letters: T time, C channels, H height, W width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.source import Codes
from data_prep.writers import cf
from data_prep.writers.objects import ROOT_GROUP_PATH, ROOT_MARK, write_object
from data_prep.writers.zarr_tables import (
    ZSTD_LEVEL,
    FrameAxis,
    ZarrSample,
    write_frame_axis,
    write_grid,
    write_samples,
)
from tmu_dist.data import storage
from tmu_dist.data.manifest import (
    SCHEMA_VERSION,
    SPLITS,
    Grid,
    SourceCard,
    StoredObject,
    Units,
    ZarrShard,
)

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True, kw_only=True, slots=True)
class ZarrLayout:
    """The array of one split's frames, [time, y, x] or [time, channel, y, x], and its shards.

    A shard object holds `frames_per_shard` whole frames; `frames_per_shard * channels * height *
    width` bytes (uint8) are in memory while it is written, and a few times that while it is
    encoded. Inside, chunks are compressed by themselves: a reader decompresses those it touches.
    """

    url: str
    """Of the archive."""
    split: str
    units: Units
    num_frames: int
    """Of the split, all sequences together."""
    channels: int
    height: int
    width: int
    """Of a frame; a sample may be a tile of it."""
    dtype: str
    """ "uint8" or "uint16"."""
    frames_per_shard: int
    chunk_frames: int = 8
    """Frames in a chunk at most: the largest divisor of `frames_per_shard` up to this."""
    tile: int = 256
    """Height and width of a chunk, about: frames are divided evenly."""

    def __post_init__(self) -> None:
        for name in (
            "num_frames",
            "channels",
            "height",
            "width",
            "frames_per_shard",
            "chunk_frames",
            "tile",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.split not in SPLITS or self.dtype not in ("uint8", "uint16"):
            raise ValueError(
                f"A split is one of {list(SPLITS)} and a dtype uint8 or uint16, "
                f"got {self.split!r} and {self.dtype!r}."
            )

    @property
    def quantity(self) -> str:
        """Name of the array in the split's group."""
        return self.units.quantity

    @property
    def array_path(self) -> str:
        return f"{self.split}/{self.quantity}"

    @property
    def dimensions(self) -> tuple[str, ...]:
        return ("time", "y", "x") if self.channels == 1 else ("time", "channel", "y", "x")

    @property
    def fill_value(self) -> int:
        """What stands where no frame is: beyond the frame's edges and the last frame."""
        return self.units.missing_code or 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self._with_channels(self.num_frames, self.height, self.width)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of an inner chunk."""
        frames = next(n for n in range(self.chunk_frames, 0, -1) if self.frames_per_shard % n == 0)
        return self._with_channels(frames, *(_even_part(n, self.tile) for n in self._frame_HW))

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of a shard: whole chunks, as few as hold its frames."""
        frames, *_, tile_height, tile_width = self.chunk_shape
        in_one = min(self.frames_per_shard, _round_up(self.num_frames, frames))
        return self._with_channels(
            in_one, _round_up(self.height, tile_height), _round_up(self.width, tile_width)
        )

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_frames / self.shard_shape[0])

    def shard_path(self, number: int) -> str:
        """Return the path of a shard object inside the archive."""
        return "/".join([self.array_path, "c", str(number), *("0" for _ in self.dimensions[1:])])

    def shard_frames(self, number: int) -> range:
        """Return which frames of the split a shard holds."""
        if not 0 <= number < self.num_shards:
            raise ValueError(
                f"{self.array_path} has shards 0..{self.num_shards - 1}, not {number}."
            )
        first = number * self.shard_shape[0]
        return range(first, min(first + self.shard_shape[0], self.num_frames))

    @property
    def _frame_HW(self) -> tuple[int, int]:
        return self.height, self.width

    def _with_channels(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        middle = () if self.channels == 1 else (self.channels,)
        return frames, *middle, height, width


def create_split(
    layout: ZarrLayout,
    frames: FrameAxis,
    samples: Sequence[ZarrSample],
    *,
    title: str,
    grid: Grid | None = None,
    source: SourceCard | None = None,
) -> tuple[StoredObject, ...]:
    """Write all of a split but its shards: metadata, coordinates and sample tables.

    Args:
        layout: the array.
        frames: what its frames are.
        samples: the split's samples, in the order of their ids.
        title: name of the archive.
        grid: where the array's frames lie on the earth.
        source: where the data come from, and their terms.

    Returns:
        What was written, for `finish_store`.

    Raises:
        ValueError: frames, samples or grid do not fit the array.
    """
    import zarr
    from zarr.storage import MemoryStore

    _check_fit(layout, frames, grid)
    # First, and alone: with its mark, whatever follows is known as part of an unfinished archive.
    _write_root(layout.url, {})
    files: dict[str, Any] = {}
    attributes = cf.group_attributes(f"{title}, {layout.split}", source)
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=attributes)
    coordinates = write_frame_axis(group, frames)
    field = cf.field_attributes(layout.units, grid, " ".join(coordinates))
    _create_array(group, layout, layout.shape, field)
    if grid is not None:
        write_grid(group, grid)
    write_samples(group.create_group("samples"), samples)
    data = {path: buffer.to_bytes() for path, buffer in files.items()}
    metadata = {p: json.loads(d) for p, d in data.items() if p.endswith("zarr.json")}
    consolidated = _consolidated(metadata.pop("zarr.json"), metadata)
    data |= {path: _canonical(record) for path, record in metadata.items()}
    data["zarr.json"] = _canonical(consolidated)
    return tuple(
        write_object(layout.url, f"{layout.split}/{path}", data[path]) for path in sorted(data)
    )


def write_frames(layout: ZarrLayout, number: int, frames_TCHW: Codes) -> StoredObject:
    """Write one shard object, whole or not at all, and return what the manifest says of it.

    Args:
        layout: the array, created before.
        number: which shard.
        frames_TCHW: the frames that `layout.shard_frames(number)` names.

    Raises:
        ValueError: the frames are not of the array's shape or dtype.
    """
    wanted = (len(layout.shard_frames(number)), layout.channels, layout.height, layout.width)
    if frames_TCHW.shape != wanted or frames_TCHW.dtype != layout.dtype:
        raise ValueError(
            f"Shard {number} of {layout.array_path} takes {layout.dtype} frames of shape "
            f"{wanted}, got {frames_TCHW.dtype} of {frames_TCHW.shape}."
        )
    return write_object(layout.url, layout.shard_path(number), _encode(layout, frames_TCHW))


def zarr_shards(
    layout: ZarrLayout, written: Sequence[StoredObject], samples: Sequence[ZarrSample]
) -> tuple[ZarrShard, ...]:
    """Put shard objects and samples together as the manifest lists them.

    Args:
        layout: the array.
        written: what `write_frames` returned, of every shard by number.
        samples: the split's samples, in the order of their ids.

    Raises:
        ValueError: a shard is not there, or the ids do not follow the array from shard to shard.
    """
    paths = [layout.shard_path(number) for number in range(layout.num_shards)]
    if [stored.path for stored in written] != paths:
        raise ValueError(
            f"{layout.array_path} has the {len(paths)} shards {paths[0]} ... {paths[-1]}, "
            f"but {[stored.path for stored in written]} were written."
        )
    numbers = [sample.frame // layout.shard_shape[0] for sample in samples]
    if numbers != sorted(numbers) or (numbers and not 0 <= numbers[0] <= numbers[-1] < len(paths)):
        raise ValueError(
            f"The samples of {layout.split} must start in its {layout.num_frames} frames, and "
            "those of an earlier shard come first: sort them by their first frame."
        )
    origins: list[list[tuple[int, int, int]]] = [[] for _ in paths]
    for number, sample in zip(numbers, samples, strict=True):
        origins[number].append((sample.frame, sample.row, sample.column))
    return tuple(
        ZarrShard(
            path=stored.path,
            num_bytes=stored.num_bytes,
            sha256=stored.sha256,
            origins=tuple(places),
        )
        for stored, places in zip(written, origins, strict=True)
    )


def finish_store(url: str, created: Sequence[StoredObject]) -> tuple[StoredObject, ...]:
    """Complete the store's root and return all of its objects but the shards, for the manifest.

    Args:
        url: of the archive.
        created: what `create_split` returned, of all splits.
    """
    metadata = {
        stored.path.removesuffix("/zarr.json"): json.loads(storage.read_text(url, stored.path))
        for stored in created
        if stored.path.endswith("/zarr.json")
    }
    for record in metadata.values():
        record.pop("consolidated_metadata", None)
    root = _write_root(url, metadata)
    return tuple(sorted((root, *created), key=lambda stored: stored.path))


def _check_fit(layout: ZarrLayout, frames: FrameAxis, grid: Grid | None) -> None:
    if not len(frames.series) == len(frames.order) == layout.num_frames:
        raise ValueError(
            f"{layout.array_path} has {layout.num_frames} frames, but there are "
            f"{len(frames.series)} series and {len(frames.order)} positions."
        )
    if grid is not None and (grid.height, grid.width) != (layout.height, layout.width):
        raise ValueError(
            f"{layout.array_path} has frames of {layout.height}x{layout.width}, but the grid is "
            f"{grid.height}x{grid.width}."
        )


def _encode(layout: ZarrLayout, frames_TCHW: Codes) -> bytes:
    """Return the bytes of a shard object.

    A frame that fills no chunk, and a chunk of nothing but fill values, are written all the same: a
    shard always holds all of its chunks, so an absent one is damage.
    """
    import zarr
    from zarr.storage import MemoryStore

    frames = frames_TCHW[:, 0] if layout.channels == 1 else frames_TCHW
    whole = np.full(layout.shard_shape, layout.fill_value, layout.dtype)
    whole[tuple(slice(0, n) for n in frames.shape)] = frames
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3)
    _create_array(group, layout, layout.shard_shape, {})[...] = whole
    place = layout.shard_path(0).removeprefix(f"{layout.split}/")
    return files[place].to_bytes()


def _create_array(
    group: zarr.Group, layout: ZarrLayout, shape: tuple[int, ...], attributes: dict[str, Any]
) -> zarr.Array[Any]:
    from zarr.codecs import ZstdCodec

    return group.create_array(
        layout.quantity,
        shape=shape,
        dtype=layout.dtype,
        chunks=layout.chunk_shape,
        shards=layout.shard_shape,
        compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
        fill_value=layout.fill_value,
        dimension_names=layout.dimensions,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )


def _write_root(url: str, metadata: dict[str, Any]) -> StoredObject:
    """Write the store's root group, with all metadata below it for readers that cannot list."""
    attributes = {"Conventions": cf.CONVENTIONS, ROOT_MARK: SCHEMA_VERSION}
    group = {"attributes": attributes, "node_type": "group", "zarr_format": 3}
    return write_object(url, ROOT_GROUP_PATH, _canonical(_consolidated(group, metadata)))


def _consolidated(group: dict[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's metadata with those of all nodes below, as zarr-python consolidates them."""
    nodes = {path.removesuffix("/zarr.json"): record for path, record in metadata.items()}
    inline = {"kind": "inline", "must_understand": False, "metadata": nodes}
    return group | {"consolidated_metadata": inline}


def _canonical(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _even_part(length: int, about: int) -> int:
    """Divide a length into equal parts as near to `about` as whole numbers of them allow."""
    return math.ceil(length / max(1, round(length / about)))


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
