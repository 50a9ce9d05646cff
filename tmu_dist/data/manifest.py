"""The manifest: what an archive holds, where each sample's bytes are, and their checksums.

One schema for both formats, WebDataset tars and Zarr stores. Pure data and its checks (standard
library only): no storage, no tar, no torch. The file format is described in docs/data_format.md. A
manifest that parses is consistent in itself; whether the objects agree with it is for `python -m
data_prep verify` and for the checks made at every read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias, TypeVar, get_args

SCHEMA_VERSION = 3
"""Of manifests that are written."""
READABLE_VERSIONS = (2, 3)
"""Version 2 has no field `compression`: its tars are compressed."""
MANIFEST_PATH = "manifest.json"
STATISTICS_PATH = "statistics.json"
"""Of the training split (`data_prep.statistics`); listed in the manifest's objects."""
REPORT_PATH = "report.json"
"""How the archive came about: files, gaps, splits (`data_prep.report`); listed in the objects."""
SPLITS = ("train", "val", "test")
TAR_BLOCK_BYTES = 512

Compression: TypeAlias = Literal["zstd", "none"]
"""How frames are kept in a tar: "zstd" takes little space, "none" is read fastest."""

_Record = TypeVar("_Record")


class ManifestError(ValueError):
    """A manifest that is missing something, contradicts itself or is of another schema."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """What a stored number means: physical = scale * stored + offset, in `unit`."""

    quantity: str
    unit: str
    """Unit of the physical value; "1" for a dimensionless one."""
    scale: float
    offset: float
    max_code: int = 255
    """The largest stored value that is a measurement; networks see stored / max_code."""
    missing_code: int | None
    """The stored value that means "not observed", above max_code; None when every pixel is
    observed."""

    def __post_init__(self) -> None:
        _check_types(self, "units", quantity=str, unit=str, scale=float, offset=float, max_code=int)
        if not math.isfinite(self.scale) or not math.isfinite(self.offset) or self.scale == 0:
            raise ManifestError(
                "units need a finite, non-zero scale and a finite offset, "
                f"got scale={self.scale}, offset={self.offset}."
            )
        if self.max_code < 1:
            raise ManifestError(f"units.max_code must be at least 1, got {self.max_code}.")
        if self.missing_code is not None:
            _check_types(self, "units", missing_code=int)
            if self.missing_code <= self.max_code:
                raise ManifestError(
                    f"units.missing_code must lie above max_code={self.max_code}, "
                    f"got {self.missing_code}."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Where the pixels of a field lie. Row 0 is the top (north), column 0 the left (west)."""

    height: int
    width: int
    projection: str | None = None
    """PROJ string, WKT or "EPSG:n"; None when the file does not say."""
    unit: str | None = None
    """Unit of the four numbers below: "m" (of the projection) or "degree"; None without them."""
    left: float | None = None
    """Outer edge of column 0."""
    top: float | None = None
    """Outer edge of row 0."""
    pixel_width: float | None = None
    pixel_height: float | None = None
    """Both positive; the y of a row's centre is top - (row + 0.5) * pixel_height."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            _check_types(self, "grid", **{name: int})
            if getattr(self, name) < 1:
                raise ManifestError(f"grid.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("projection", "unit"):
            if getattr(self, name) is not None:
                _check_types(self, "grid", **{name: str})
        placed = [self.unit, self.left, self.top, self.pixel_width, self.pixel_height]
        if any(value is None for value in placed) and any(value is not None for value in placed):
            raise ManifestError(
                "grid.unit, left, top, pixel_width and pixel_height are given all or none, "
                f"got {placed}."
            )
        if self.unit is not None:
            numbers = ("left", "top", "pixel_width", "pixel_height")
            _check_types(self, "grid", **dict.fromkeys(numbers, float))
            if self.unit not in ("m", "degree"):
                raise ManifestError(f"grid.unit must be 'm' or 'degree', got {self.unit!r}.")
            if not all(math.isfinite(getattr(self, name)) for name in numbers) or (
                min(self.pixel_width or 0, self.pixel_height or 0) <= 0
            ):
                raise ManifestError(f"grid needs finite edges and positive pixels, got {placed}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCard:
    """Where data come from and under which terms, as its provider says or as far as known."""

    name: str
    provider: str = "unknown"
    licence: str = "unknown: ask the provider before you pass the data on"
    citation: str = ""

    def __post_init__(self) -> None:
        _check_types(self, "source", name=str, provider=str, licence=str, citation=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """One object of an archive that holds no samples by itself."""

    path: str
    """Relative to the archive, e.g. "statistics.json"."""
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check_object(self.path, self.num_bytes, self.sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar file; the tuples have one entry per sample, in the order of the tar."""

    path: str
    """Relative to the archive, e.g. "train/shard-000000.tar"."""
    num_bytes: int
    sha256: str
    offsets: tuple[int, ...]
    """Byte at which the payload of the sample's frames member starts."""
    sizes: tuple[int, ...]
    """Length of that payload in bytes, as stored (compressed)."""
    crc32c: tuple[int, ...]
    """CRC-32C (Castagnoli) of that payload."""

    def __post_init__(self) -> None:
        where = _check_object(self.path, self.num_bytes, self.sha256)
        for name in ("offsets", "sizes", "crc32c"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not set(map(type, values)) <= {int}:
                raise ManifestError(f"{where}: {name} must be a list of integers.")
        if not len(self.offsets) == len(self.sizes) == len(self.crc32c) >= 1:
            raise ManifestError(
                f"{where}: offsets, sizes and crc32c must have one entry per sample and at least "
                f"one, got {len(self.offsets)}, {len(self.sizes)} and {len(self.crc32c)}."
            )
        if min(self.crc32c) < 0 or max(self.crc32c) >= 2**32:
            raise ManifestError(f"{where}: a crc32c is outside 32 bits.")
        # Without a loop in Python: an archive may have millions of samples.
        ends = list(map(operator.add, self.offsets, self.sizes))
        gaps = map(operator.sub, self.offsets, (0, *ends[:-1]))
        # Each payload follows its own tar header; so samples can't overlap.
        if (
            min(self.sizes) < 1
            or reduce(operator.or_, self.offsets) % TAR_BLOCK_BYTES
            or min(gaps) < TAR_BLOCK_BYTES
        ):
            raise ManifestError(f"{where}: {_misplaced_sample(self.offsets, ends)}")
        if ends[-1] > self.num_bytes:
            raise ManifestError(
                f"{where}: the last sample ends at {ends[-1]}, after {self.num_bytes}."
            )

    @property
    def num_samples(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, kw_only=True, slots=True)
class ZarrShard:
    """One shard object of a split's array in a Zarr archive, and the samples that start in it.

    The array SPLIT/QUANTITY (`Manifest.array_path`) holds every frame once, [time, y, x] or, of
    several channels, [time, channel, y, x]. A sample is the block of the manifest's sample shape at
    its origin; it may end in the next objects.
    """

    path: str
    """Relative to the archive, e.g. "train/reflectivity/c/0/0/0"."""
    num_bytes: int
    sha256: str
    origins: tuple[tuple[int, int, int], ...]
    """Of each sample: its first frame, top row and left column in the array. May be empty."""

    def __post_init__(self) -> None:
        where = _check_object(self.path, self.num_bytes, self.sha256)
        if not isinstance(self.origins, tuple):
            raise ManifestError(f"{where}: origins must be a list, got {self.origins!r:.80}.")
        if not _are_origins(self.origins):
            wrong = next(origin for origin in self.origins if not _are_origins((origin,)))
            raise ManifestError(
                f"{where}: an origin is three integers (frame, row, column) of at least 0, "
                f"got {wrong!r:.80}."
            )

    @property
    def num_samples(self) -> int:
        return len(self.origins)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader must know about an archive before it opens a shard."""

    name: str
    num_frames: int
    channels: int
    height: int
    width: int
    units: Units
    frame_interval_minutes: float | None
    """Time between frames; None for video without a physical clock."""
    format: Literal["webdataset", "zarr"] = "webdataset"
    splits: Mapping[str, tuple[Shard, ...]] | Mapping[str, tuple[ZarrShard, ...]]
    """Tar shards, or the shard objects of the splits' Zarr arrays."""
    compression: Compression = "zstd"
    """Of the samples' frames; Zarr archives have "zstd"."""
    objects: tuple[StoredObject, ...] = ()
    """Every other object of the archive: statistics, report, metadata and coordinates of Zarr."""
    grid: Grid | None = None
    """Where the stored frames lie on the earth; of tiles, the frame that they are cut from."""
    source: SourceCard | None = None
    full_train_samples: int | None = None
    """Training samples that count as a data fraction of 1.0; None: all of them."""
    created_by: Mapping[str, Any]
    """The arguments that determine the content, JSON values only: no clock, host or path."""
    dtype: Literal["uint8", "uint16"] = "uint8"
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_types(self, "manifest", name=str, dtype=str, created_by=dict, splits=dict)
        for field in ("num_frames", "channels", "height", "width"):
            _check_types(self, "manifest", **{field: int})
            if getattr(self, field) < 1:
                raise ManifestError(f"manifest.{field} must be at least 1.")
        if self.frame_interval_minutes is not None:
            _check_types(self, "manifest", frame_interval_minutes=float)
            if not 0 < self.frame_interval_minutes < math.inf:
                raise ManifestError(
                    "manifest.frame_interval_minutes must be positive and finite or null, "
                    f"got {self.frame_interval_minutes}."
                )
        _check_schema(self.schema_version)
        if self.dtype not in _LARGEST:
            raise ManifestError(
                f"manifest.dtype must be one of {list(_LARGEST)}, got {self.dtype!r}."
            )
        largest = max(self.units.max_code, self.units.missing_code or 0)
        if largest > _LARGEST[self.dtype]:
            raise ManifestError(f"units has code {largest}, which does not fit {self.dtype}.")
        _check_format(self.format)
        self._check_compression()
        self._check_splits()
        if self.full_train_samples is not None:
            _check_types(self, "manifest", full_train_samples=int)
            if self.full_train_samples < 1 or "train" not in self.splits:
                raise ManifestError(
                    "manifest.full_train_samples must be at least 1, of an archive with a train "
                    f"split, got {self.full_train_samples}."
                )

    def _check_compression(self) -> None:
        choices = get_args(Compression)
        if self.compression not in choices:
            raise ManifestError(
                f"manifest.compression must be one of {list(choices)}, got {self.compression!r}."
            )
        if self.compression != "zstd" and (self.format == "zarr" or self.schema_version == 2):
            raise ManifestError(
                f"manifest.compression is {self.compression!r}, but Zarr archives and archives of "
                "schema_version 2 are compressed with zstd."
            )

    def _check_splits(self) -> None:
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise ManifestError(
                f"manifest.splits must be some of {list(SPLITS)}, got {list(self.splits)}."
            )
        seen: set[str] = set()
        for split, shards in self.splits.items():
            if not sum(shard.num_samples for shard in shards):
                raise ManifestError(f"manifest.splits.{split} has no sample; leave the split out.")
            for shard in shards:
                if not isinstance(shard, _SHARD_TYPES[self.format]):
                    raise ManifestError(f"shard {shard.path!r} is not of format {self.format}.")
                if PurePosixPath(shard.path).parts[0] != split or shard.path in seen:
                    raise ManifestError(
                        f"shard {shard.path!r}: must lie in the folder {split}/ and be listed once."
                    )
                seen.add(shard.path)
        for stored in self.objects:
            if stored.path in seen or stored.path == MANIFEST_PATH:
                raise ManifestError(f"object {stored.path!r} is listed twice, or the manifest.")
            seen.add(stored.path)

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """Shape of one stored sample: (frames, channels, height, width)."""
        return self.num_frames, self.channels, self.height, self.width

    def array_path(self, split: str) -> str:
        """Path of a split's array of frames in a Zarr archive, e.g. "train/reflectivity"."""
        return f"{split}/{self.units.quantity}"

    def shards(self, split: str) -> tuple[Shard, ...] | tuple[ZarrShard, ...]:
        """Return the shards of one split; sample ids count through them in this order."""
        if split not in self.splits:
            raise ManifestError(
                f"Archive {self.name!r} has no split {split!r}: choose from {list(self.splits)}."
            )
        return self.splits[split]

    def num_samples(self, split: str) -> int:
        return sum(shard.num_samples for shard in self.shards(split))

    def to_json(self) -> str:
        """Return the canonical text: sorted keys, no spaces, ASCII, one final newline."""
        record = _to_record(self)
        if self.schema_version == 2:
            del record["compression"]
        return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"

    @cached_property
    def content_hash(self) -> str:
        """The sha256 (hex) of `to_json()`: of manifest.json, and through it of every shard."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            ManifestError: not JSON, another schema version, or a missing, unknown, mistyped or
                inconsistent field; the message names it.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ManifestError(f"The manifest is not valid JSON: {error}.") from error
        if isinstance(record, dict):
            # Before the field names are looked at: another version may have other fields.
            _check_schema(record.get("schema_version"))
            if record["schema_version"] == 2:
                _refuse_unknown(record, {"compression"}, "manifest")
                record["compression"] = "zstd"
        fields = _take_fields(cls, record, "manifest")
        fields["units"] = Units(**_take_fields(Units, fields["units"], "manifest.units"))
        for name, record_type in (("grid", Grid), ("source", SourceCard)):
            if fields[name] is not None:
                fields[name] = record_type(
                    **_take_fields(record_type, fields[name], f"manifest.{name}")
                )
        fields["objects"] = _records(StoredObject, fields["objects"], "manifest.objects")
        _check_format(fields["format"])
        if not isinstance(fields["splits"], dict):
            raise ManifestError("manifest.splits must be a JSON object of lists of shards.")
        fields["splits"] = {
            split: _records(_SHARD_TYPES[fields["format"]], shards, f"manifest.splits.{split}")
            for split, shards in fields["splits"].items()
        }
        return cls(**fields)


_LARGEST = {"uint8": 255, "uint16": 65_535}
_SHARD_TYPES: dict[str, Any] = {"webdataset": Shard, "zarr": ZarrShard}


def _check_schema(version: Any) -> None:
    if version not in READABLE_VERSIONS or type(version) is not int:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ManifestError(
            f"manifest.schema_version is {version!r}; this version reads only {readable}. "
            "Write the archive again (with --overwrite in the same place), or use the version that "
            "wrote it."
        )


def _check_format(name: Any) -> None:
    if not isinstance(name, str) or name not in _SHARD_TYPES:
        raise ManifestError(f"manifest.format must be one of {list(_SHARD_TYPES)}, got {name!r}.")


def _records(record_type: Any, records: Any, where: str) -> tuple[Any, ...]:
    """Parse a JSON list of records; their lists become tuples."""
    if not isinstance(records, list):
        raise ManifestError(f"{where} must be a list of JSON objects.")
    parsed = []
    for index, record in enumerate(records):
        fields = _take_fields(record_type, record, f"{where}[{index}]")
        parsed.append(record_type(**{name: _frozen(value) for name, value in fields.items()}))
    return tuple(parsed)


def _frozen(value: Any) -> Any:
    """Turn lists into tuples; of lists in a list, one level (origins have no more)."""
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], list):
        return tuple(tuple(one) if isinstance(one, list) else one for one in value)
    return tuple(value)


def _to_record(record: Any) -> dict[str, Any]:
    """Return a record as JSON values, as `dataclasses.asdict`, which would copy every number."""
    return {
        field.name: _to_json_value(getattr(record, field.name))
        for field in dataclasses.fields(record)
    }


def _to_json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json_value(one) for name, one in value.items()}
    if dataclasses.is_dataclass(value):
        return _to_record(value)
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return [_to_record(one) for one in value]
    return value


def _are_origins(origins: Sequence[Any]) -> bool:
    if not set(map(type, origins)) <= {tuple} or not set(map(len, origins)) <= {3}:
        return False
    numbers = tuple(chain.from_iterable(origins))
    return set(map(type, numbers)) <= {int} and min(numbers, default=0) >= 0


def _misplaced_sample(offsets: Sequence[int], ends: Sequence[int]) -> str:
    """Name the first sample of a tar that lies where none can lie."""
    for index, (offset, end, before) in enumerate(zip(offsets, ends, (0, *ends), strict=False)):
        if end <= offset or offset % TAR_BLOCK_BYTES or offset < before + TAR_BLOCK_BYTES:
            return (
                f"sample {index} has offset {offset} and size {end - offset}, which is no place "
                "for a tar payload after the one before it."
            )
    raise AssertionError("every sample lies in its place")


def _check_object(path: Any, num_bytes: Any, sha256: Any) -> str:
    """Check what every stored object has, and return how messages name it."""
    where = f"object {path!r:.200}"
    if type(path) is not str or type(num_bytes) is not int or num_bytes < 0:
        raise ManifestError(f"{where}: path must be a string and num_bytes a positive integer.")
    plain = PurePosixPath(path)
    is_plain = str(plain) == path != "." and "\\" not in path
    if plain.is_absolute() or ".." in plain.parts or not is_plain:
        raise ManifestError(f"{where}: a path must be relative and plain, without '..'.")
    if type(sha256) is not str or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ManifestError(f"{where}: sha256 must be 64 hexadecimal digits.")
    return where


def _take_fields(record_type: type[_Record], record: Any, where: str) -> dict[str, Any]:
    """Return the record's fields, all of the type's and no other."""
    if not isinstance(record, dict):
        raise ManifestError(f"{where} must be a JSON object, got {type(record).__name__}.")
    known = {field.name for field in dataclasses.fields(record_type)}  # type: ignore[arg-type]
    if missing := sorted(known - record.keys()):
        raise ManifestError(f"{where} lacks {', '.join(missing)}.")
    _refuse_unknown(record, record.keys() - known, where)
    return dict(record)


def _refuse_unknown(record: dict[str, Any], unknown: set[str], where: str) -> None:
    if found := sorted(record.keys() & unknown):
        raise ManifestError(f"{where} has unknown fields: {', '.join(found)}.")


def _check_types(record: object, where: str, **types: type) -> None:
    """Refuse fields of another JSON type; an integer passes as a float, a bool as neither."""
    for name, expected in types.items():
        value = getattr(record, name)
        allowed = (int, float) if expected is float else expected
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise ManifestError(f"{where}.{name} must be {expected.__name__}, got {value!r:.80}.")
