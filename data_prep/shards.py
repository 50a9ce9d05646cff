"""Stage 3 of the pipeline: staged frames to shards, as the plan says.

Tars hold sequences, so a frame is written as often as windows share it; Zarr arrays hold every
frame once, and sequences are places in them. Each shard is one piece of work with a record of its
own; a shard whose record is there is not written again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from data_prep.source import ArchiveFacts, Codes, FrameRecord, Plan, SequencePlan
from data_prep.staging import FrameReader, StagedJob, Staging
from data_prep.statistics import CodeHistogram
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from data_prep.writers.zarr_store import (
    FrameAxis,
    ZarrLayout,
    ZarrSample,
    create_split,
    finish_store,
    write_frames,
    zarr_shards,
)
from tmu_dist.data.manifest import SPLITS, Compression, Shard, StoredObject, ZarrShard

_TAR_BYTES = 64 * 2**20
_TAR_BYTES_PER_SAMPLE = 3072  # headers, padding and the record
_ZARR_SHARD_BYTES = 128 * 2**20

RunPieces: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]
"""`workers.run_pieces` with its settings filled in."""


class NoLineError(ValueError):
    """Sequences that are not stretches of one line of frames."""


class Written(NamedTuple):
    """What writing leaves behind."""

    splits: Mapping[str, tuple[Shard, ...]] | Mapping[str, tuple[ZarrShard, ...]]
    objects: tuple[StoredObject, ...]
    """All but the shards."""
    histogram: CodeHistogram
    """Of the training split's frames, each counted once."""


class StagedFrames:
    """All staged frames, numbered through the jobs, as the plan numbers them."""

    def __init__(self, jobs: Sequence[StagedJob]) -> None:
        self.records = [record for job in jobs for record in job.records]
        self.places = [place for job in jobs for place in job.places]
        kinds = {(job.shape_CHW, job.dtype) for job in jobs if job.shape_CHW and job.dtype}
        if len(kinds) != 1:
            raise ValueError(
                f"Frames must have one shape and type, but there are {sorted(kinds)}: give a size "
                "that all files are brought to, or convert them separately."
            )
        self.shape_CHW, self.dtype = next(iter(kinds))

    def reader(self, url: str, names: Sequence[int]) -> FrameReader:
        places = {name: self.places[name] for name in names}
        return FrameReader(url, places, self.shape_CHW, self.dtype)

    def samples_per_shard(self, plan: Plan, compression: Compression) -> int:
        """Sequences that make a tar of the wanted size, going by the staged, compressed frames."""
        mean_bytes = sum(place.size for place in self.places) / len(self.places)
        if compression == "none":
            mean_bytes = self.frame_bytes
        part = plan.height * plan.width / (self.shape_CHW[1] * self.shape_CHW[2])
        sample_bytes = plan.num_frames * (mean_bytes * part) + _TAR_BYTES_PER_SAMPLE
        return max(1, int(_TAR_BYTES / sample_bytes))

    def frames_per_shard(self) -> int:
        """Frames that make a Zarr shard of the wanted size, a multiple of 8 where that is much."""
        frames = max(1, _ZARR_SHARD_BYTES // self.frame_bytes)
        return frames if frames < 8 else frames // 8 * 8

    @property
    def frame_bytes(self) -> int:
        """Of one frame, not compressed."""
        return math.prod(self.shape_CHW) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _TarPiece:
    """One tar shard to write."""

    staging: Staging
    plan_key: str
    split: str
    number: int
    first_id: int
    sequences: tuple[SequencePlan, ...]
    reader: FrameReader
    tile: tuple[int, int]
    """Height and width of a sample."""
    counted: tuple[int, ...]
    """Frames that this shard counts for the statistics."""
    compression: Compression


def write_tars(
    plan: Plan,
    frames: StagedFrames,
    staging: Staging,
    plan_key: str,
    samples: int | None,
    compression: Compression,
    run: RunPieces,
) -> Written:
    """Write every tar shard of the plan, `samples` sequences in each (None: about 64 MiB)."""
    samples = samples or frames.samples_per_shard(plan, compression)
    pieces: list[_TarPiece] = []
    seen: set[int] = set()
    for split in SPLITS:
        sequences = [one for one in plan.sequences if one.split == split]
        with suppress(NoLineError):  # where there is none, no Zarr archive can differ
            sequences = in_line(sequences, frame_line(sequences, frames.records))
        for number, first in enumerate(range(0, len(sequences), samples)):
            part = tuple(sequences[first : first + samples])
            names = sorted({frame for sequence in part for frame in sequence.frames})
            counted = [name for name in names if name not in seen] if split == "train" else []
            seen.update(counted)
            pieces.append(
                _TarPiece(
                    staging=staging,
                    plan_key=plan_key,
                    split=split,
                    number=number,
                    first_id=first,
                    sequences=part,
                    reader=frames.reader(staging.url, names),
                    tile=(plan.height, plan.width),
                    counted=tuple(counted),
                    compression=compression,
                )
            )
    shards: dict[int, Shard] = {}
    histogram = CodeHistogram.empty(frames.dtype)
    for index, (shard, counts) in run(_write_tar, pieces):
        shards[index] = shard
        histogram.merge(counts)
    by_split = {
        split: tuple(shards[i] for i, piece in enumerate(pieces) if piece.split == split)
        for split in SPLITS
    }
    return Written({split: own for split, own in by_split.items() if own}, (), histogram)


def _write_tar(piece: _TarPiece) -> tuple[Shard, CodeHistogram]:
    """Write one tar shard, unless its record says that it is there."""
    name = f"{piece.split}-{piece.number:06d}"
    if record := piece.staging.read_shard(piece.plan_key, name):
        return _shard(record["shard"]), CodeHistogram.from_record(record["histogram"])
    histogram = CodeHistogram.empty(piece.reader.dtype)
    to_count = set(piece.counted)

    def samples() -> Iterator[Sample]:
        for index, sequence in enumerate(piece.sequences):
            tiles: list[Codes] = []
            for number, frame_CHW in zip(
                sequence.frames, piece.reader.sequence(sequence.frames), strict=True
            ):
                if number in to_count:
                    to_count.remove(number)
                    histogram.update(frame_CHW)
                tiles.append(_tile(frame_CHW, sequence, piece.tile))
            meta = _sample_meta(sequence, piece.first_id + index)
            yield Sample(sequence.key, _stacked(tiles), meta)

    path = shard_path(piece.split, piece.number)
    shard = write_shard(piece.staging.url, path, samples(), piece.compression)
    piece.staging.write_shard(
        piece.plan_key,
        name,
        {"shard": dataclasses.asdict(shard), "histogram": histogram.to_record()},
    )
    return shard, histogram


def _shard(record: Mapping[str, Any]) -> Shard:
    """A tar shard from its JSON record."""
    lists = {name: tuple(v) for name, v in record.items() if isinstance(v, list)}
    return Shard(**(dict(record) | lists))


def _stacked(frames: Sequence[Codes]) -> Codes:
    frames_TCHW: Codes = np.stack(frames)  # type: ignore[assignment]
    return frames_TCHW


def _tile(frame_CHW: Codes, sequence: SequencePlan, size: tuple[int, int]) -> Codes:
    bottom, right = sequence.top + size[0], sequence.left + size[1]
    return frame_CHW[:, sequence.top : bottom, sequence.left : right]


@dataclass(frozen=True)
class _ZarrPiece:
    """One shard object to write."""

    staging: Staging
    plan_key: str
    layout: ZarrLayout
    number: int
    names: tuple[int, ...]
    """Its frames, in their order."""
    reader: FrameReader


def write_zarr(
    plan: Plan,
    frames: StagedFrames,
    staging: Staging,
    plan_key: str,
    facts: ArchiveFacts,
    frames_per_shard: int,
    run: RunPieces,
) -> Written:
    """Write one array of frames for each split of the plan, with its coordinates and samples."""
    channels, height, width = frames.shape_CHW
    layouts: dict[str, ZarrLayout] = {}
    samples: dict[str, list[ZarrSample]] = {}
    created: list[StoredObject] = []
    pieces: list[_ZarrPiece] = []
    for split in SPLITS:
        sequences = [one for one in plan.sequences if one.split == split]
        if not sequences:
            continue
        line = frame_line(sequences, frames.records)
        layout = layouts[split] = ZarrLayout(
            url=staging.url,
            split=split,
            units=facts.units,
            num_frames=len(line),
            channels=channels,
            height=height,
            width=width,
            dtype=frames.dtype,
            frames_per_shard=frames_per_shard,
        )
        samples[split] = _zarr_samples(sequences, line)
        records = [frames.records[name] for name in line]
        axis = FrameAxis(
            series=[record.series for record in records],
            order=[record.order for record in records],
            is_clock=facts.frame_interval_minutes is not None,
        )
        created += create_split(
            layout, axis, samples[split], title=facts.name, grid=facts.grid, source=facts.source
        )
        for number in range(layout.num_shards):
            names = tuple(line[i] for i in layout.shard_frames(number))
            pieces.append(
                _ZarrPiece(
                    staging=staging,
                    plan_key=plan_key,
                    layout=layout,
                    number=number,
                    names=names,
                    reader=frames.reader(staging.url, names),
                )
            )
    written: dict[int, StoredObject] = {}
    histogram = CodeHistogram.empty(frames.dtype)
    for index, (stored, counts) in run(_write_zarr_shard, pieces):
        written[index] = stored
        histogram.merge(counts)
    splits = {
        split: zarr_shards(
            layout,
            [written[i] for i, piece in enumerate(pieces) if piece.layout is layout],
            samples[split],
        )
        for split, layout in layouts.items()
    }
    return Written(splits, finish_store(staging.url, created), histogram)


def _write_zarr_shard(piece: _ZarrPiece) -> tuple[StoredObject, CodeHistogram]:
    """Write one shard object, unless its record says that it is there."""
    name = f"{piece.layout.split}-{piece.number:06d}"
    if record := piece.staging.read_shard(piece.plan_key, name):
        return StoredObject(**record["object"]), CodeHistogram.from_record(record["histogram"])
    histogram = CodeHistogram.empty(piece.layout.dtype)
    frames_TCHW = np.empty((len(piece.names), *piece.reader.shape_CHW), piece.layout.dtype)
    for index, frame in enumerate(piece.names):
        frame_CHW = frames_TCHW[index] = piece.reader.frame(frame)
        if piece.layout.split == "train":
            histogram.update(frame_CHW)
    stored = write_frames(piece.layout, piece.number, frames_TCHW)
    piece.staging.write_shard(
        piece.plan_key,
        name,
        {"object": dataclasses.asdict(stored), "histogram": histogram.to_record()},
    )
    return stored, histogram


def in_line(sequences: Sequence[SequencePlan], line: Sequence[int]) -> list[SequencePlan]:
    """Put sequences in the order of their first frames in a line, then of their tiles.

    This is the order of sample ids in both formats, so an id means the same in either.
    """
    place = {name: index for index, name in enumerate(line)}
    return sorted(sequences, key=lambda one: (place[one.frames[0]], one.top, one.left))


def _sample_meta(sequence: SequencePlan, sample_id: int) -> dict[str, Any]:
    """The record of a sample, the same in both formats."""
    return {
        **sequence.meta,
        "sample_id": sample_id,
        "split": sequence.split,
        "weight": sequence.weight,
    }


def _zarr_samples(sequences: Sequence[SequencePlan], line: Sequence[int]) -> list[ZarrSample]:
    """Sequences as places in the array, by id."""
    place = {name: index for index, name in enumerate(line)}
    return [
        ZarrSample(
            key=sequence.key,
            frame=place[sequence.frames[0]],
            row=sequence.top,
            column=sequence.left,
            weight=sequence.weight,
            meta=_sample_meta(sequence, index),
        )
        for index, sequence in enumerate(in_line(sequences, line))
    ]


def frame_line(sequences: Sequence[SequencePlan], records: Sequence[FrameRecord]) -> list[int]:
    """Put the frames of a split in one line in which every sequence is a stretch.

    Lines follow series and time wherever sequences allow it; where they take every second frame of
    a product, say, its even frames come before its odd ones.

    Raises:
        NoLineError: a frame is followed by different frames in different sequences.
    """
    after: dict[int, int] = {}
    for sequence in sequences:
        for frame, following in zip(sequence.frames, sequence.frames[1:]):
            if after.setdefault(frame, following) != following:
                raise NoLineError(
                    f"{records[frame].file} is followed by different frames in different "
                    "sequences, so the sequences are no stretches of one array: write them as "
                    "webdataset."
                )
    frames = {frame for sequence in sequences for frame in sequence.frames}
    heads = frames - set(after.values())
    line: list[int] = []
    for head in sorted(heads, key=lambda i: (records[i].series, records[i].order)):
        line.append(head)
        while line[-1] in after:
            line.append(after[line[-1]])
    return line
