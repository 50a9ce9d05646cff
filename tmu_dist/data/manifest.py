"""The manifest: what an archive holds, where each sample's bytes are, and their checksums.

Pure data and its checks (standard library only): no storage, no tar, no torch. The file format is
described in docs/data_format.md. A manifest that parses is consistent in itself; whether the shards
agree with it is for `python -m data_prep verify` and for the checks made at every read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

SCHEMA_VERSION = 1
MANIFEST_PATH = "manifest.json"
SPLITS = ("train", "val", "test")
TAR_BLOCK_BYTES = 512

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
    missing_code: int | None
    """The stored value that means "not observed"; None when every pixel is observed."""

    def __post_init__(self) -> None:
        _check_types(self, "units", quantity=str, unit=str, scale=float, offset=float)
        if not math.isfinite(self.scale) or not math.isfinite(self.offset) or self.scale == 0:
            raise ManifestError(
                "units need a finite, non-zero scale and a finite offset, "
                f"got scale={self.scale}, offset={self.offset}."
            )
        if self.missing_code is not None:
            _check_types(self, "units", missing_code=int)
            if not 0 <= self.missing_code <= 255:
                raise ManifestError(f"units.missing_code must fit uint8, got {self.missing_code}.")


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
        _check_types(self, "shard", path=str, num_bytes=int, sha256=str)
        where = f"shard {self.path!r}"
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or str(path) != self.path or "\\" in self.path:
            raise ManifestError(f"{where}: a path must be relative and plain, without '..'.")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ManifestError(f"{where}: sha256 must be 64 hexadecimal digits.")
        for name in ("offsets", "sizes", "crc32c"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or any(type(value) is not int for value in values):
                raise ManifestError(f"{where}: {name} must be a list of integers.")
        if not len(self.offsets) == len(self.sizes) == len(self.crc32c) >= 1:
            raise ManifestError(
                f"{where}: offsets, sizes and crc32c must have one entry per sample and at least "
                f"one, got {len(self.offsets)}, {len(self.sizes)} and {len(self.crc32c)}."
            )
        if not all(0 <= value < 2**32 for value in self.crc32c):
            raise ManifestError(f"{where}: a crc32c is outside 32 bits.")
        end = 0
        for index, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            # Each payload follows its own tar header; so samples can't overlap.
            if size < 1 or offset % TAR_BLOCK_BYTES or offset < end + TAR_BLOCK_BYTES:
                raise ManifestError(
                    f"{where}: sample {index} has offset {offset} and size {size}, which is no "
                    "place for a tar payload after the one before it."
                )
            end = offset + size
        if end > self.num_bytes:
            raise ManifestError(f"{where}: the last sample ends at {end}, after {self.num_bytes}.")

    @property
    def num_samples(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, kw_only=True, slots=True)
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
    splits: Mapping[str, tuple[Shard, ...]]
    created_by: Mapping[str, Any]
    """The arguments that determine the content, JSON values only: no clock, host or path."""
    dtype: str = "uint8"
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
        if self.schema_version != SCHEMA_VERSION:
            raise ManifestError(
                f"manifest.schema_version is {self.schema_version!r}; this version reads only "
                f"{SCHEMA_VERSION}. Rewrite the archive or use the version that wrote it."
            )
        if self.dtype != "uint8":
            raise ManifestError(f"manifest.dtype must be 'uint8', got {self.dtype!r}.")
        self._check_splits()

    def _check_splits(self) -> None:
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise ManifestError(
                f"manifest.splits must be some of {list(SPLITS)}, got {list(self.splits)}."
            )
        seen: set[str] = set()
        for split, shards in self.splits.items():
            if not shards:
                raise ManifestError(f"manifest.splits.{split} has no shard; leave the split out.")
            for shard in shards:
                if PurePosixPath(shard.path).parts[0] != split or shard.path in seen:
                    raise ManifestError(
                        f"shard {shard.path!r}: must lie in the folder {split}/ and be listed once."
                    )
                seen.add(shard.path)

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """Shape of one stored sample: (frames, channels, height, width)."""
        return self.num_frames, self.channels, self.height, self.width

    def shards(self, split: str) -> tuple[Shard, ...]:
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
        record = dataclasses.asdict(self)
        return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"

    @property
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
        if isinstance(record, dict) and record.get("schema_version") != SCHEMA_VERSION:
            # Before the field names are looked at: another version may have other fields.
            raise ManifestError(
                f"manifest.schema_version is {record.get('schema_version')!r}; this version reads "
                f"only {SCHEMA_VERSION}. Rewrite the archive or use the version that wrote it."
            )
        fields = _take_fields(cls, record, "manifest")
        fields["units"] = Units(**_take_fields(Units, fields["units"], "manifest.units"))
        if not isinstance(fields["splits"], dict):
            raise ManifestError("manifest.splits must be a JSON object of lists of shards.")
        fields["splits"] = {
            split: _shards_from_json(shards, f"manifest.splits.{split}")
            for split, shards in fields["splits"].items()
        }
        return cls(**fields)


def _shards_from_json(records: Any, where: str) -> tuple[Shard, ...]:
    if not isinstance(records, list):
        raise ManifestError(f"{where} must be a list of shards.")
    shards = []
    for index, record in enumerate(records):
        fields = _take_fields(Shard, record, f"{where}[{index}]")
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        shards.append(Shard(**(fields | lists)))
    return tuple(shards)


def _take_fields(record_type: type[_Record], record: Any, where: str) -> dict[str, Any]:
    """Return the record's fields, all of the type's and no other."""
    if not isinstance(record, dict):
        raise ManifestError(f"{where} must be a JSON object, got {type(record).__name__}.")
    known = {field.name for field in dataclasses.fields(record_type)}  # type: ignore[arg-type]
    if missing := sorted(known - record.keys()):
        raise ManifestError(f"{where} lacks {', '.join(missing)}.")
    if unknown := sorted(record.keys() - known):
        raise ManifestError(f"{where} has unknown fields: {', '.join(unknown)}.")
    return dict(record)


def _check_types(record: object, where: str, **types: type) -> None:
    """Refuse fields of another JSON type; an integer passes as a float, a bool as neither."""
    for name, expected in types.items():
        value = getattr(record, name)
        allowed = (int, float) if expected is float else expected
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise ManifestError(f"{where}.{name} must be {expected.__name__}, got {value!r:.80}.")
