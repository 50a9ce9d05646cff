"""Files that hold what one teacher tells of many sequences (docs/cached_memories.md).

    CACHE/KEY/plan.json               what is kept, how a record is laid out, how many there are
    CACHE/KEY/00000/records.bin       records of consecutive samples, all of one size
    CACHE/KEY/00000/shard.json        their number and sha256; written with them
    CACHE/KEY/index.json              the plan and all shards; written last, the mark of a whole one

A record holds one sequence's tensors, one after the other, little endian, and then the crc32c of
the sample's id (8 bytes) and of those bytes: so a damaged record and one at a wrong place are
both found whenever it is read. Folders lie on a disk, where records are mapped into memory, or in
a store, where they are read by byte ranges.

Not here: which teacher, which sequences (bank.py).

Legend: B batch, N bytes of a record.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tmu_dist.data import storage
from tmu_dist.folders import list_folders, sweep_unfinished, write_folder, write_text
from tmu_dist.teachers.bank import Teaching, Told, Wanted

PLAN_FILE, INDEX_FILE = "plan.json", "index.json"
RECORDS_FILE, SHARD_FILE = "records.bin", "shard.json"
VERSION = 1
MAKE = "`python -m tmu_dist.memories make`, with the flags of the training,"

_CRC_BYTES = 4


class MemoriesError(ValueError):
    """What teachers told is not there, not whole, or not of this teacher and these data."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One tensor of a record."""

    name: Wanted
    layer: int | None
    """Of the student; None for predictions."""
    shape: tuple[int, ...]
    """Of one sequence: [T, P, h, w], predictions [T, C, H, W]."""
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _dtype(self.dtype).itemsize


@dataclass(frozen=True)
class RecordLayout:
    """The tensors of a record: states in the order of `wanted`, by layer, predictions last."""

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, taught: Teaching) -> Self:
        """The layout in which a teaching is kept, in the precision in which it is told."""
        return cls(
            tuple(
                Field(
                    name=name,
                    layer=layer,
                    shape=tuple(values.shape[1:]),
                    dtype=str(values.dtype).removeprefix("torch."),
                )
                for (name, layer), values in taught.tensors().items()
            )
        )

    @property
    def record_bytes(self) -> int:
        """Of one record, its crc32c included."""
        return sum(field.num_bytes for field in self.fields) + _CRC_BYTES

    def encode(self, taught: Teaching, sample_ids: Sequence[int]) -> NDArray[np.uint8]:
        """The records of the first sequences of a teaching, uint8 [B, N].

        Args:
            taught: of at least as many sequences as there are ids.
            sample_ids: of the sequences.

        Raises:
            MemoriesError: something told is infinite or NaN.
        """
        columns = []
        for (name, _), all_values in taught.tensors().items():
            values = all_values[: len(sample_ids)]
            if not values.isfinite().all():
                raise MemoriesError(
                    f"The teacher's {name} is not finite. With placement.memories=fp16 numbers "
                    "end at 65,504: use bf16 or full. Otherwise the teacher is broken."
                )
            flat = values.cpu().contiguous().view(torch.uint8).reshape(len(sample_ids), -1)
            columns.append(flat.numpy())
        payload_BN = np.concatenate(columns, axis=1)
        crcs = [_crc32c(i, row) for i, row in zip(sample_ids, payload_BN, strict=True)]
        trailer = np.array(crcs, "<u4").view(np.uint8).reshape(-1, _CRC_BYTES)
        return np.concatenate([payload_BN, trailer], axis=1)

    def decode(self, records: Sequence[NDArray[np.uint8]]) -> Teaching:
        """The teaching of a batch of records, as it was told."""
        tensors: dict[Told, Tensor] = {}
        start = 0
        for field in self.fields:
            stop = start + field.num_bytes
            values = torch.empty((len(records), *field.shape), dtype=_dtype(field.dtype))
            bytes_BN = values.view(torch.uint8).reshape(len(records), -1).numpy()
            for row, record in enumerate(records):
                bytes_BN[row] = record[start:stop]
            tensors[field.name, field.layer] = values
            start = stop
        return Teaching.of(tensors)


@dataclass(frozen=True)
class Plan:
    """What one folder of memories holds."""

    facts: Mapping[str, Any]
    """What its key is made of."""
    about: Mapping[str, str]
    """Names that say which one it is, and change nothing."""
    layout: RecordLayout
    num_records: int
    records_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_records // self.records_per_shard)

    def rows(self, shard: int) -> range:
        """The records of a shard, counted through all of them."""
        start = shard * self.records_per_shard
        return range(start, min(start + self.records_per_shard, self.num_records))

    def shard_bytes(self, shard: int) -> int:
        return len(self.rows(shard)) * self.layout.record_bytes

    def to_tree(self) -> dict[str, Any]:
        """As it lies in JSON files."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Self:
        values = {name: tree[name] for name in cls.__dataclass_fields__}
        fields = [Field(**f | {"shape": tuple(f["shape"])}) for f in tree["layout"]["fields"]]
        return cls(**values | {"layout": RecordLayout(tuple(fields))})


def key_of(facts: Mapping[str, Any]) -> str:
    """The name of the folder that holds the memories of which these are the facts."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class MemoryFolder:
    """One folder of memories: what is there already, and what is added to it.

    Args:
        address: the cache, a path or a URL.
        facts: of what is, or will be, in this folder.
    """

    def __init__(self, address: str, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self.url = storage.join_url(address, key_of(facts))

    def is_whole(self) -> bool:
        """Whether it has its mark and all that the mark promises, by name and size."""
        plan = self.plan()
        if plan is None or not storage.exists(self.url, INDEX_FILE):
            return False
        return not self.missing_shards(plan)

    def plan(self) -> Plan | None:
        """What it is to hold; None: nobody has begun to make it."""
        try:
            return Plan.from_tree(json.loads(storage.read_bytes(self.url, PLAN_FILE)))
        except storage.MissingObjectError:
            return None

    def begin(self, plan: Plan) -> None:
        """Say what it is to hold."""
        write_text(self.url, PLAN_FILE, json.dumps(plan.to_tree(), indent=1) + "\n")

    def missing_shards(self, plan: Plan) -> list[int]:
        """Shards that are not there, or not of the right size."""
        sizes = storage.list_objects(self.url)
        return [
            number
            for number in range(plan.num_shards)
            if f"{shard_name(number)}/{SHARD_FILE}" not in sizes
            or sizes.get(f"{shard_name(number)}/{RECORDS_FILE}") != plan.shard_bytes(number)
        ]

    def write_shard(self, number: int, records_BN: NDArray[np.uint8]) -> None:
        """Write or replace one shard, whole or not at all.

        Raises:
            WriteError, StorageError: it could not be written.
        """
        sweep_unfinished(self.url, "", shard_name(number))
        data = records_BN.reshape(-1).data
        facts = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_folder(
            storage.join_url(self.url, shard_name(number)),
            {RECORDS_FILE: data, SHARD_FILE: (json.dumps(facts) + "\n").encode()},
        )

    def finish(self, plan: Plan) -> None:
        """Write the mark; all shards are there."""
        shards = [
            json.loads(storage.read_bytes(self.url, f"{shard_name(k)}/{SHARD_FILE}"))
            | {"name": shard_name(k), "num_records": len(plan.rows(k))}
            for k in range(plan.num_shards)
        ]
        index = plan.to_tree() | {"shards": shards}
        write_text(self.url, INDEX_FILE, json.dumps(index, indent=1) + "\n")


class MemoryReader:
    """The records of a whole folder, each one checked as it is read.

    Raises:
        MemoriesError: the folder is not there, or not whole; says what is, and what to do.
        StorageError: the store cannot be reached.
    """

    def __init__(self, address: str, facts: Mapping[str, Any], about: Mapping[str, str]) -> None:
        folder = MemoryFolder(address, facts)
        self.url = folder.url
        try:
            index = json.loads(storage.read_bytes(self.url, INDEX_FILE))
        except storage.MissingObjectError:
            raise MemoriesError(_why_missing(address, folder, about)) from None
        self.plan = Plan.from_tree(index)
        self.sha256 = [shard["sha256"] for shard in index["shards"]]
        if missing := folder.missing_shards(self.plan):
            shown = ", ".join(shard_name(k) for k in missing[:3])
            raise MemoriesError(
                f"{self.url} lacks {len(missing)} of its {self.plan.num_shards} shards, or they "
                f"are cut short ({shown}): run {MAKE} again; it makes only those."
            )

    def read(self, places: Sequence[int], sample_ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return records in the order that is asked for.

        Args:
            places: of the records, counted through all shards.
            sample_ids: what they must be of.

        Raises:
            MemoriesError: a record is damaged; names the file and the sample.
        """
        size, per_shard = self.plan.layout.record_bytes, self.plan.records_per_shard
        found: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(places)
        for shard in sorted({place // per_shard for place in places}):
            rows = [row for row, place in enumerate(places) if place // per_shard == shard]
            offsets = [places[row] % per_shard * size for row in rows]
            for row, record in zip(rows, self._ranges(shard, offsets, size), strict=True):
                self._check(shard, sample_ids[row], record)
                found[row] = record
        return found

    def check_shard(self, number: int) -> None:
        """Compare the sha256 of a shard with the index.

        Raises:
            MemoriesError: they differ.
        """
        path = f"{shard_name(number)}/{RECORDS_FILE}"
        digest = hashlib.sha256()
        for chunk in storage.stream_bytes(self.url, path):
            digest.update(chunk)
        if digest.hexdigest() != self.sha256[number]:
            raise self._damage(number, f"its sha256 is {digest.hexdigest()[:12]}...")

    def _ranges(self, shard: int, offsets: Sequence[int], size: int) -> list[NDArray[np.uint8]]:
        path = f"{shard_name(shard)}/{RECORDS_FILE}"
        folder = storage.local_path(self.url)
        if folder is None:
            ranges = storage.read_ranges(self.url, path, offsets, [size] * len(offsets))
            return [np.frombuffer(data, np.uint8) for data in ranges]
        try:
            mapped = np.memmap(folder / path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise self._damage(shard, str(error)) from None
        return [mapped[offset : offset + size] for offset in offsets]

    def _check(self, shard: int, sample_id: int, record: NDArray[np.uint8]) -> None:
        payload, crc = record[:-_CRC_BYTES], record[-_CRC_BYTES:]
        if len(record) != self.plan.layout.record_bytes or _crc32c(sample_id, payload) != int(
            crc.copy().view("<u4")[0]
        ):
            raise self._damage(shard, f"the record of sample {sample_id} has another crc32c")

    def _damage(self, shard: int, problem: str) -> MemoriesError:
        folder = storage.join_url(self.url, shard_name(shard))
        return MemoriesError(
            f"{folder}/{RECORDS_FILE} is damaged: {problem}. Remove the folder {folder} and run "
            f"{MAKE} again; it makes only what is missing."
        )


def shard_name(number: int) -> str:
    """The name of a shard's folder."""
    return f"{number:05d}"


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is different between two sets of facts, as readable lines."""
    return [
        f"{name} is {_short(found.get(name))} there and {_short(wanted[name])} here"
        for name in wanted
        if found.get(name) != wanted[name]
    ]


def _why_missing(address: str, folder: MemoryFolder, about: Mapping[str, str]) -> str:
    what = ", ".join(f"{name} {value}" for name, value in about.items())
    missing = f"{address} holds no memories of {what} ({folder.url})"
    if (plan := folder.plan()) is not None:
        left = len(folder.missing_shards(plan))
        return (
            f"{missing}: they are unfinished, {left} of {plan.num_shards} shards are not there. "
            f"Run {MAKE} again; it goes on where it stopped."
        )
    nearest: list[str] | None = None
    for name in list_folders(address, "", INDEX_FILE):
        with suppress(storage.MissingObjectError, ValueError, KeyError):
            index = json.loads(storage.read_bytes(address, f"{name}/{INDEX_FILE}"))
            # As it would be read again: tuples become lists.
            found = differences(json.loads(json.dumps(folder.facts)), index["facts"])
            if nearest is None or len(found) < len(nearest):
                nearest = found
    others = "it holds none at all" if nearest is None else f"the nearest: {'; '.join(nearest)}"
    return f"{missing}; {others}. Run {MAKE} first; `price` instead of `make` says what that costs."


def _crc32c(sample_id: int, payload: NDArray[np.uint8]) -> int:
    own = google_crc32c.value(sample_id.to_bytes(8, "little"))
    return int(google_crc32c.extend(own, payload))


def _dtype(name: str) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, name))


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
