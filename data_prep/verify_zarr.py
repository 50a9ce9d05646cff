"""What `verify` checks in a Zarr archive.

The array's metadata against the manifest; of every shard object the index, its checksum, and every
chunk (present, checksum, length, codes that the units know); samples inside the array, neither
across series nor back in time; the sample tables against the manifest. Shards are decoded here from
the bytes by the letter of the Zarr specification, without a Zarr library; that reads only the small
tables.

Not here: sizes and sha256 of objects (verify.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from tmu_dist.data import storage
from tmu_dist.data.manifest import Manifest, Units, ZarrShard

KEY = r"[A-Za-z0-9_-]+"
"""What the key of a sample must match."""

_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_ABSENT = 2**64 - 1


class Problem(NamedTuple):
    """One thing that is broken."""

    path: str
    """Object inside the archive."""
    what: str
    sample: int | None = None
    """Index in the shard; None when the object as a whole is meant."""
    offset: int | None = None
    """Byte at which the sample's frames should start; None in Zarr, where chunks are shared."""

    def __str__(self) -> str:
        place = "" if self.offset is None else f" at byte {self.offset}"
        sample = "" if self.sample is None else f", sample {self.sample}{place}"
        return f"{self.path}{sample}: {self.what}"


class ArrayFacts(NamedTuple):
    """What the metadata of a split's array say."""

    shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]


def check_zarr_split(
    url: str, manifest: Manifest, split: str, seen_keys: set[str]
) -> tuple[ArrayFacts | None, list[Problem]]:
    """Check all of a split but the content of its shards.

    Args:
        url: the archive.
        manifest: its manifest.
        split: which split.
        seen_keys: keys of samples seen before, in any split; this split's are added.

    Returns:
        What is needed to decode the shards, if the metadata tell it, and what is broken.
    """
    path = f"{manifest.array_path(split)}/zarr.json"
    try:
        record = json.loads(storage.read_text(url, path))
        array = _array_facts(record, manifest)
    except storage.StorageError as error:
        return None, [Problem(path, str(error))]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return None, [Problem(path, f"does not describe the array of this format: {error}")]
    shards = cast(tuple[ZarrShard, ...], manifest.shards(split))
    problems = [Problem(path, what) for what in _check_shape(array, manifest, split, shards)]
    for number, shard in enumerate(shards):
        for index, origin in enumerate(shard.origins):
            if what := _wrong_place(array, manifest, number, origin):
                problems.append(Problem(shard.path, what, index))
    problems += _check_tables(url, manifest, split, array, shards, seen_keys)
    return array, problems


def check_zarr_shard(
    manifest: Manifest, array: ArrayFacts, shard: ZarrShard, data: bytes
) -> Iterator[Problem]:
    """Decode every chunk of a shard object."""
    counts = [s // c for s, c in zip(array.shard_shape, array.chunk_shape, strict=True)]
    index_bytes = 16 * math.prod(counts) + 4
    if len(data) < index_bytes:
        yield Problem(shard.path, f"has {len(data)} bytes, its index alone needs {index_bytes}")
        return
    index, checksum = data[-index_bytes:-4], int.from_bytes(data[-4:], "little")
    if google_crc32c.value(index) != checksum:
        yield Problem(shard.path, "the crc32c of its index is wrong")
        return
    num_bytes = math.prod(array.chunk_shape) * np.dtype(manifest.dtype).itemsize
    places = np.frombuffer(index, "<u8").reshape(*counts, 2)
    for chunk in np.ndindex(*counts):
        offset, size = map(int, places[chunk])
        if offset == _ABSENT:
            yield Problem(shard.path, f"chunk {chunk} is absent and would read as fill values")
        elif offset + size > len(data) - index_bytes:
            yield Problem(shard.path, f"chunk {chunk} ends after the last chunk's end")
        else:
            payload = data[offset : offset + size]
            for what in _check_chunk(payload, num_bytes, manifest):
                yield Problem(shard.path, f"chunk {chunk} {what}")


def check_codes(frames: NDArray[Any], units: Units) -> Iterator[str]:
    """Say whether there is a stored number that the units do not explain."""
    highest = int(frames.max(initial=0))
    if highest <= units.max_code:
        return
    wrong = (frames > units.max_code) & (frames != units.missing_code)
    if wrong.any():
        yield (
            f"holds the code {frames[wrong].max()}, the manifest's units know 0..{units.max_code}"
            + (f" and {units.missing_code}" if units.missing_code is not None else "")
        )


def _check_chunk(payload: bytes, num_bytes: int, manifest: Manifest) -> Iterator[str]:
    try:
        if not zstandard.get_frame_parameters(payload).has_checksum:
            yield "has no checksum"
            return
        raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=num_bytes)
    except zstandard.ZstdError as error:
        yield f"cannot be decompressed: {error}"
        return
    if len(raw) != num_bytes:
        yield f"has {len(raw)} bytes, its shape needs {num_bytes}"
        return
    codes = np.frombuffer(raw, np.dtype(manifest.dtype).newbyteorder("<"))
    yield from check_codes(codes, manifest.units)


def _array_facts(record: dict[str, Any], manifest: Manifest) -> ArrayFacts:
    """Take the shapes from an array's metadata.

    Raises:
        ValueError: the array is not stored as docs/data_format.md says.
    """
    (sharding,) = record["codecs"]
    inside = sharding["configuration"]
    names = [codec["name"] for codec in inside["codecs"]]
    stored = {
        "zarr_format": record["zarr_format"],
        "node_type": record["node_type"],
        "data_type": record["data_type"],
        "separator": record["chunk_key_encoding"]["configuration"]["separator"],
        "codec": sharding["name"],
        "codecs of a chunk": names,
        "byte order": inside["codecs"][0].get("configuration", {}).get("endian", "little"),
        "index codecs": inside["index_codecs"],
        "index location": inside["index_location"],
    }
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": manifest.dtype,
        "separator": "/",
        "codec": "sharding_indexed",
        "codecs of a chunk": ["bytes", "zstd"],
        "byte order": "little",
        "index codecs": _INDEX_CODECS,
        "index location": "end",
    }
    for name, value in expected.items():
        if stored[name] != value:
            raise ValueError(f"{name} is {stored[name]!r}, the format says {value!r}")
    shapes = (
        record["shape"],
        record["chunk_grid"]["configuration"]["chunk_shape"],
        inside["chunk_shape"],
    )
    array = ArrayFacts(*(tuple(map(int, shape)) for shape in shapes))
    if len({len(shape) for shape in array}) != 1 or min(map(min, array)) < 1:
        raise ValueError(f"shape, shards and chunks are {array}")
    if any(s % c for s, c in zip(array.shard_shape, array.chunk_shape, strict=True)):
        raise ValueError(f"shards of {array.shard_shape} do not hold whole chunks")
    return array


def _check_shape(
    array: ArrayFacts, manifest: Manifest, split: str, shards: Sequence[ZarrShard]
) -> Iterator[str]:
    """Compare the array's shape and its division into shards with the manifest."""
    middle = () if manifest.channels == 1 else (manifest.channels,)
    if len(array.shape) != 3 + len(middle) or array.shape[1:-2] != middle:
        yield f"has shape {array.shape}, the manifest says {manifest.channels} channels"
        return
    grid = manifest.grid
    if grid is not None and array.shape[-2:] != (grid.height, grid.width):
        yield f"has shape {array.shape}, the manifest's grid is {grid.height}x{grid.width}"
    if any(s < a for s, a in zip(array.shard_shape[1:], array.shape[1:], strict=True)):
        yield f"has shards of {array.shard_shape}, which do not hold whole frames of {array.shape}"
    per_shard, zeros = array.shard_shape[0], "/0" * (len(array.shape) - 1)
    expected = [
        f"{manifest.array_path(split)}/c/{number}{zeros}"
        for number in range(math.ceil(array.shape[0] / per_shard))
    ]
    if [shard.path for shard in shards] != expected:
        yield (
            f"has {array.shape[0]} frames and so the {len(expected)} shards {expected[0]} ... "
            f"{expected[-1]}, the manifest lists {len(shards)}, from {shards[0].path} on"
        )


def _wrong_place(
    array: ArrayFacts, manifest: Manifest, number: int, origin: tuple[int, int, int]
) -> str | None:
    """Say why a sample cannot start where the manifest says, or nothing."""
    size = (manifest.num_frames, manifest.height, manifest.width)
    limits = (array.shape[0], *array.shape[-2:])
    if any(o + n > limit for o, n, limit in zip(origin, size, limits, strict=True)):
        return f"starts at {origin} and leaves the array of shape {array.shape}"
    if origin[0] // array.shard_shape[0] != number:
        return f"starts at frame {origin[0]}, which is in another shard"
    return None


def _check_tables(
    url: str,
    manifest: Manifest,
    split: str,
    array: ArrayFacts,
    shards: Sequence[ZarrShard],
    seen_keys: set[str],
) -> Iterator[Problem]:
    """Check the sample tables and what the frames are."""
    listed = {stored.path for stored in manifest.objects}
    is_clock = f"{split}/time/zarr.json" in listed
    axis = ("time", "series") if is_clock else ("frame_number", "clip")
    tables = tuple(f"samples/sample_{n}" for n in ("frame", "row", "col", "weight", "key", "meta"))
    columns = {}
    for name in (*axis, *tables):
        try:
            columns[name] = _read_column(url, f"{split}/{name}")
        except Exception as error:  # Zarr's codecs raise what they like
            yield Problem(f"{split}/{name}", f"cannot be read: {error}")
            continue
        length = manifest.num_samples(split) if name in tables else array.shape[0]
        if len(columns[name]) != length:
            yield Problem(f"{split}/{name}", f"has {len(columns[name])} rows and needs {length}")
            del columns[name]
    origins = np.array([origin for shard in shards for origin in shard.origins]).reshape(-1, 3)
    for name, values in columns.items():
        for row, what in _wrong_rows(name, values, origins, seen_keys):
            yield Problem(f"{split}/{name}", f"row {row} {what}")
    if set(axis) <= columns.keys():
        order, series = columns[axis[0]], columns[axis[1]]
        follows = (order[1:] > order[:-1]) & (series[1:] == series[:-1])
        for shard in shards:
            for index, (first, _, _) in enumerate(shard.origins):
                if not follows[first : first + manifest.num_frames - 1].all():
                    what = f"its frames do not follow each other in {axis[1]} and {axis[0]}"
                    yield Problem(shard.path, what, index)


def _read_column(url: str, path: str) -> NDArray[Any]:
    import zarr
    from zarr.storage import ObjectStore

    store = ObjectStore(storage.open_store(url), read_only=True)
    column = zarr.open_array(store, path=path, mode="r", zarr_format=3)[...]
    return np.asarray(column)


def _wrong_rows(
    name: str, values: NDArray[Any], origins: NDArray[np.int64], seen_keys: set[str]
) -> Iterator[tuple[int, str]]:
    """Yield rows of a sample table that are not what they must be, and why."""
    match name.removeprefix("samples/sample_"):
        case "frame" | "row" | "col" as axis:
            expected = origins[:, ("frame", "row", "col").index(axis)]
            for row in np.flatnonzero(values != expected).tolist():
                yield row, f"is {values[row]}, the manifest's origin says {expected[row]}"
        case "weight":
            for row in np.flatnonzero(~(np.isfinite(values) & (values > 0))).tolist():
                yield row, f"is {values[row]}, a weight is positive and finite"
        case "key":
            for row, key in enumerate(map(str, values)):
                if not re.fullmatch(KEY, key):
                    yield row, f"is {key!r}, a key is letters, digits, '-' and '_'"
                if key in seen_keys:
                    yield row, f"is {key!r}, which is used twice"
                seen_keys.add(key)
        case "meta":
            for row, text in enumerate(map(str, values)):
                try:
                    says_id = json.loads(text)["sample_id"] == row
                except (ValueError, KeyError, TypeError):
                    says_id = False
                if not says_id:
                    yield row, f"is no JSON object that says sample_id {row}"
