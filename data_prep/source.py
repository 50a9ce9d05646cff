"""What the pipeline asks of a source of sequences, and what the two exchange.

A source (radar_source.py, video_source.py) knows files, units and protocols; the pipeline knows
processes, storage and restarts. Between them travel frames, facts about frames, and a plan.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.manifest import Grid, SourceCard, Units

Codes: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]
"""Frames as they are stored: numbers that `Units` explains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameRecord:
    """What planning knows of one converted frame; its pixels stay where they are."""

    series: str
    """Sequences are cut inside one series: a radar product, an event, a clip."""
    order: float
    """Position in the series: minutes since 1970 (UTC) for radar, the frame number for video."""
    file: str
    """Original file, relative to the source folder."""
    key: str = ""
    """Which field or frame of the file."""
    group: str = ""
    """What must not be divided between splits, where the source knows it: person, recording."""
    official_split: str | None = None
    """Where the publisher of the data put it: "train", "val" or "test"."""
    digest: str
    """sha256 (hex) of the stored pixels: equal frames have equal digests."""
    observed_fraction: float = 1.0
    """Part of the pixels that are not missing."""
    wet_fraction: float | None = None
    """Part of the observed pixels with rain at or above the source's wet threshold."""
    above_range: int = 0
    """Pixels whose value lay above the stored range and was clipped to its end."""

    @property
    def time(self) -> datetime:
        """UTC time of a radar frame."""
        from datetime import UTC

        return datetime.fromtimestamp(self.order * 60, tz=UTC)


class Frame(NamedTuple):
    """One converted frame: its facts and its pixels, C x H x W."""

    record: FrameRecord
    codes_CHW: Codes


class BadFile(NamedTuple):
    """A file, or one field of it, that could not be converted."""

    file: str
    reason: str
    by_design: bool = False
    """Left out because the settings say so: reported, but no reason to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequencePlan:
    """One sample of the archive to be: which frames, and where in them."""

    split: str
    key: str
    """Unique in the archive; letters, digits, "-" and "_" only."""
    frames: tuple[int, ...]
    """Indices into the list of records that was planned from."""
    top: int = 0
    left: int = 0
    """Upper left pixel of the sample's tile in the frames."""
    weight: float = 1.0
    """1 / the probability with which this sample was kept: what a mean over the full data needs."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for the sample's record, such as times and event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What an archive will hold, and what was left out on the way."""

    sequences: tuple[SequencePlan, ...]
    """In the order of their ids within each split."""
    num_frames: int
    height: int
    width: int
    """Of a sample; smaller than the frame where tiles are cut."""
    report: Mapping[str, Any]
    """JSON values for report.json: gaps, duplicates, groups by split, what was dropped and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveFacts:
    """What the manifest says beside the samples."""

    name: str
    channels: int
    dtype: str
    units: Units
    frame_interval_minutes: float | None
    grid: Grid | None
    source: SourceCard
    notes: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for report.json: reader, missing-data rule, quality notes, conversions."""


Job: TypeAlias = tuple[str, ...]
"""Files (paths as `files` gave them) that one process converts in one go."""


class Source(Protocol):
    """A source of sequences; sent to the processes that convert, so it must be picklable."""

    def settings(self) -> dict[str, Any]:
        """Everything that determines the archive, JSON values only; no absolute paths, no clock."""
        ...

    def jobs(self) -> list[Job]:
        """All files to convert, in small jobs, in an order that never changes.

        Raises:
            ValueError: no such folder, or nothing in it that this source reads.
        """
        ...

    def describe_files(self, job: Job) -> list[tuple[str, int]]:
        """Name and size in bytes of a job's files: others, or changed ones, are another archive."""
        ...

    def wet_threshold(self) -> float | None:
        """From which physical value on a pixel counts as wet in the statistics; None: none does."""
        ...

    def convert(self, job: Job) -> Iterator[Frame | BadFile]:
        """Read, check and convert the files of a job, one frame in memory at a time.

        A bad file is yielded, not raised; what else is raised ends the pipeline.
        """
        ...

    def plan(self, records: Sequence[FrameRecord]) -> Plan:
        """Splits, windows and filters: a pure function of the records and the settings.

        Raises:
            ValueError: nothing is left; says how much was dropped for which reason.
        """
        ...

    def facts(self, plan: Plan) -> ArchiveFacts:
        """What the manifest needs beside the plan."""
        ...
