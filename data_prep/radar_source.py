"""Radar files as a source of sequences: read, crop, average, convert, quantise, plan.

Values are converted by named transforms only (physics.py), in this order: crop the pixels that are
wanted, average over the area of the stored pixels, bring to the stored quantity, quantise. Pixels
that were not observed stay missing all the way.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.files import describe, list_files, local_file
from data_prep.physics import (
    Conversion,
    Encoded,
    MarshallPalmer,
    PixelScale,
    convert,
    linear_for_average,
)
from data_prep.radar_plan import RadarPlanSettings, plan_radar
from data_prep.readers import RADAR_READERS, detect_reader, radar_reader
from data_prep.readers.radar import (
    FOLDER,
    UNITS,
    BadFileError,
    Coded,
    Quantity,
    RadarFile,
    RadarFrame,
    RadarReader,
)
from data_prep.readers.raw import look_up, values_of
from data_prep.resample import Crop, area_average, crop, resampled_grid
from data_prep.source import ArchiveFacts, BadFile, Codes, Frame, FrameRecord, Job, Plan
from data_prep.statistics import CodeHistogram, wet_codes

_FILES_PER_JOB = 16
_JOB_BYTES = 64 * 2**20
_FIELDS_PER_JOB = 64
_PART = "::"  # between a file and a range of its fields
_DEFAULT_RANGE: dict[Quantity, tuple[float, float]] = {
    "reflectivity": (0.0, 70.0),
    "rain_rate": (0.0, 160.0),
    "accumulation": (0.0, 100.0),
    "vil": (0.0, 80.0),
    "intensity": (0.0, 1.0),
}
_DEFAULT_STORED: dict[Quantity, Quantity] = {
    "reflectivity": "reflectivity",
    "rain_rate": "reflectivity",
    "accumulation": "reflectivity",
    "vil": "vil",
    "intensity": "intensity",
}
_WET_RATE = 0.1  # mm/h


@dataclass(frozen=True, kw_only=True)
class RadarSettings:
    """What is read, and what is stored of it."""

    source: str
    """Folder (with subfolders) or URL of the original files, or one file."""
    reader: str = "auto"
    """Name of the format; auto finds it out from the content of some files."""
    option: tuple[str, ...] = ()
    """Options of the reader, each KEY=VALUE."""
    include: tuple[str, ...] = ()
    """Shell patterns of paths below the source, such as "2016*/*"; others are left out."""
    name: str | None = None
    """Name of the archive; reader and folder when left out."""
    crop: tuple[int, int, int, int] | None = None
    """TOP LEFT HEIGHT WIDTH in original pixels, row 0 is north; the whole field when left out."""
    size: tuple[int, int] | None = None
    """HEIGHT WIDTH to store; larger pixels are area averages of the linear quantity. The original
    pixels when left out."""
    min_observed_area: float = 0.5
    """A stored pixel is missing unless this part of its area was observed."""
    store: Literal["reflectivity", "rain_rate", "accumulation", "vil", "intensity"] | None = None
    """Quantity to store. When left out: reflectivity for reflectivity and rain (by Z-R), otherwise
    what is read."""
    range: tuple[float, float] | None = None
    """LOW HIGH that the stored numbers span, in the quantity's unit; when left out 0 70 dBZ,
    0 160 mm/h, 0 100 mm, 0 80 kg/m2. Values outside are clipped; those above are counted."""
    dtype: Literal["uint8", "uint16"] | None = None
    """Stored numbers: 255 levels, or 65535 for finer steps. When left out uint8, and uint16 for
    rain rates and accumulations, which need fine steps near zero."""
    z_r: tuple[float, float] = (200.0, 1.6)
    """A and B of Z = A R^B (mm^6/m^3, mm/h); the default is Marshall-Palmer."""
    include_forecasts: bool = False
    """Also take fields that are forecasts (lead time above 0)."""
    provider: str | None = None
    """Who made the data, for the archive's source card; what is known of the format if left out."""
    licence: str | None = None
    """Under which terms, for the source card."""
    citation: str | None = None
    """How to cite them, for the source card."""

    def __post_init__(self) -> None:
        if self.range is not None and not -math.inf < self.range[0] < self.range[1] < math.inf:
            raise ValueError(f"range needs LOW < HIGH, got {self.range[0]:g} {self.range[1]:g}.")
        if self.crop is not None and (min(self.crop[:2]) < 0 or min(self.crop[2:]) < 1):
            raise ValueError(f"crop is TOP LEFT HEIGHT WIDTH in pixels, got {self.crop}.")
        if not 0 < self.min_observed_area <= 1:
            raise ValueError(f"min_observed_area must lie in (0, 1], got {self.min_observed_area}.")


def radar_source(settings: RadarSettings, plan: RadarPlanSettings) -> RadarSource:
    """Look at the files, choose the reader, and take the facts from the first readable file.

    Raises:
        ValueError: no files, no reader for them, unknown options, or no physical way from what is
            read to what is to be stored.
        MissingExtraError: a library is missing.
    """
    reader: RadarReader | None = None
    if settings.reader != "auto":
        reader = radar_reader(settings.reader, reader_options(settings.option))
        patterns: Sequence[str] = reader.patterns
    else:
        patterns = sorted({p for name in RADAR_READERS for p in radar_reader(name, {}).patterns})
    files, others = list_files(settings.source, patterns, settings.include)
    if not files:
        named = f", such as {', '.join(others[:3])}" if others else ""
        packed = any(re.search(r"\.(nc4?|cdf|h5|hdf5?)\.(gz|bz2|xz|zip)$", name) for name in others)
        raise ValueError(
            f"{settings.source} holds no file that could be radar data ({len(others)} others"
            + f"{named}). "
            + ("Unpack NetCDF and HDF5 files first: they are not read packed. " if packed else "")
            + f"Expected names: {', '.join(patterns)}; check --source, --include and --reader."
        )
    if reader is None:
        reader = _detect(settings, files)
        files, others = list_files(settings.source, reader.patterns, settings.include)
        if not files:
            raise ValueError(
                f"Files of {settings.source} are of the format {reader.name}, but have other names "
                f"than it expects: {', '.join(reader.patterns)}. Rename them."
            )
    example = _first_good(settings, reader, files)
    source = RadarSource(
        settings_=settings,
        planning=plan,
        reader=reader,
        example=example,
        files=tuple(files),
        ignored=len(others),
    )
    source.check()
    return source


@dataclass(frozen=True, kw_only=True)
class RadarSource:
    """Files of one radar product as sequences; made by `radar_source`."""

    settings_: RadarSettings
    planning: RadarPlanSettings
    reader: RadarReader
    example: RadarFile
    """Facts of the first good file; all others must share them."""
    files: tuple[str, ...]
    ignored: int
    """Files of the folder that are not meant."""

    def __getstate__(self) -> dict[str, Any]:
        # Every piece of work carries its source: a million names in each would be all the work.
        return self.__dict__ | {"files": ()}

    def check(self) -> None:
        """Refuse, before hours of work, what could not be stored.

        Raises:
            ValueError: crop, size or tile do not fit the files' grid, or physics knows no way to
                the stored quantity.
        """
        resampled_grid(self.example.grid, self._crop, *self._stored_size)
        _ = self._conversion, self._scale, self._wet
        tile = self.planning.tile
        if tile is not None and (tile[0] > self._stored_size[0] or tile[1] > self._stored_size[1]):
            raise ValueError(
                f"A tile of {tile[0]} x {tile[1]} does not fit stored frames of "
                f"{self._stored_size[0]} x {self._stored_size[1]} pixels."
            )

    def summary(self) -> str:
        """What was found and will be stored, in a line for people."""
        found, settings = self.example, self.settings_
        height, width = self._stored_size
        over = f" over {found.accumulation_minutes:g} min" if found.accumulation_minutes else ""
        ignored = f" ({self.ignored} other files ignored)" if self.ignored else ""
        return (
            f"{len(self.files)} files of {settings.source}{ignored}, reader {self.reader.name}: "
            f"{found.quantity} [{UNITS[found.quantity]}]{over}, "
            f"{found.grid.height} x {found.grid.width} pixels. To be stored: {self._stored} of "
            f"{self._scale.low:g} to {self._scale.high:g} {UNITS[self._stored]}, "
            f"{height} x {width} pixels, {self._dtype}."
        )

    def settings(self) -> dict[str, Any]:
        record = dataclasses.asdict(self.settings_)
        del record["source"], record["reader"], record["option"]
        record |= {  # what was left out, as it was decided
            "crop": dataclasses.astuple(self._crop),
            "size": self._stored_size,
            "store": self._stored,
            "range": (self._scale.low, self._scale.high),
            "dtype": self._dtype,
        }
        return {
            "kind": "radar",
            "reader": {"name": self.reader.name, **_fields(self.reader)},
            "radar": record,
            "plan": _fields(self.planning),
            "conversion": self._conversion.record(),
        }

    def jobs(self) -> list[Job]:
        jobs: list[Job] = []
        job: list[str] = []
        num_bytes = 0
        for file, size in describe(self.settings_.source, self.files):
            if size > _JOB_BYTES and (parts := self._parts(file)):
                jobs += [(part,) for part in parts]
                continue
            if job and (len(job) == _FILES_PER_JOB or num_bytes + size > _JOB_BYTES):
                jobs.append(tuple(job))
                job, num_bytes = [], 0
            job.append(file)
            num_bytes += size
        return [*jobs, tuple(job)] if job else jobs

    def describe_files(self, job: Job) -> list[tuple[str, int]]:
        return describe(self.settings_.source, [_whole(part)[0] for part in job])

    def convert(self, job: Job) -> Iterator[Frame | BadFile]:
        for part in job:
            file, fields = _whole(part)
            try:
                with local_file(self.settings_.source, file) as path:
                    yield from self._convert_file(path, file, fields)
            except BadFileError as error:
                yield BadFile(file, error.reason)

    def plan(self, records: Sequence[FrameRecord]) -> Plan:
        return plan_radar(
            records,
            self.planning,
            height=self._stored_size[0],
            width=self._stored_size[1],
            declared_interval_minutes=self.example.interval_minutes,
        )

    def wet_threshold(self) -> float | None:
        return self._wet

    def facts(self, plan: Plan) -> ArchiveFacts:
        settings = self.settings_
        named = {name: getattr(settings, name) for name in ("provider", "licence", "citation")}
        card = dataclasses.replace(self.reader.source, **{k: v for k, v in named.items() if v})
        folder = Path(settings.source.rstrip("/")).name
        return ArchiveFacts(
            name=settings.name or f"{self.reader.name}-{folder}",
            channels=1,
            dtype=self._dtype,
            units=self._scale.units(self._stored, UNITS[self._stored]),
            frame_interval_minutes=plan.report["interval_minutes"],
            grid=resampled_grid(self.example.grid, self._crop, *self._stored_size),
            source=card,
            notes={
                "reader": self.reader.name,
                "quantity_read": self.example.quantity,
                "missing_rule": self.example.missing_rule,
                "notes": list(self.example.notes),
                "conversion": self._conversion.record(),
                "original_grid": dataclasses.asdict(self.example.grid),
                "ignored_files": self.ignored,
            },
        )

    def _parts(self, file: str) -> list[str]:
        """A large file of many fields as parts for different processes; [] where it has few."""
        try:
            with local_file(self.settings_.source, file) as path:
                count = len(self.reader.scan(path).frames)
        except BadFileError:
            return []  # `convert` names it
        starts = range(0, count, _FIELDS_PER_JOB)
        return (
            [f"{file}{_PART}{i}:{i + _FIELDS_PER_JOB}" for i in starts] if len(starts) > 1 else []
        )

    def _convert_file(self, path: Path, file: str, fields: slice) -> Iterator[Frame | BadFile]:
        """Convert fields of one file, one after another."""
        info = self.reader.scan(path)
        if difference := _difference(info, self.example):
            yield BadFile(file, f"is not like the other files: {difference}")
            return
        frames = info.frames[fields]
        if not self.settings_.include_forecasts:
            frames = tuple(frame for frame in frames if frame.lead_minutes <= 0)
            if left_out := len(info.frames[fields]) - len(frames):
                reason = f"{left_out} forecast fields left out (--include-forecasts takes them)"
                yield BadFile(file, reason, by_design=True)
        # As the file stores them, where the reader can tell: that saves most of the arithmetic.
        read = getattr(self.reader, "stored_fields", self.reader.fields)
        folder = file.rpartition("/")[0] or path.parent.name
        for frame, field in zip(frames, read(path, [f.key for f in frames]), strict=True):
            series = frame.series.replace(FOLDER, folder)
            yield self._frame(dataclasses.replace(frame, series=series), file, field)

    def _frame(self, frame: RadarFrame, file: str, field: NDArray[np.float32] | Coded) -> Frame:
        """Crop, average, convert and quantise one field."""
        if isinstance(field, Coded) and self._stored_size == (self._crop.height, self._crop.width):
            codes_HW, above = self._look_up(field)
        else:
            codes_HW, above = self._quantise(crop(values_of(field), self._crop))
        histogram = CodeHistogram.empty(self._dtype)
        histogram.update(codes_HW)
        observed = int(histogram.counts[: self._scale.max_code + 1].sum())
        wet = None
        if self._wet is not None and observed:
            wet = int(histogram.counts[self._is_wet].sum()) / observed
        record = FrameRecord(
            series=frame.series,
            order=frame.time.timestamp() / 60,
            file=file,
            key=frame.key,
            digest=hashlib.sha256(np.ascontiguousarray(codes_HW).data).hexdigest(),
            observed_fraction=observed / codes_HW.size,
            wet_fraction=wet,
            above_range=above,
        )
        return Frame(record, codes_HW[None])

    def _quantise(self, values_HW: NDArray[np.float32]) -> Encoded:
        """Stored codes of values that were read, area averages of them where pixels are larger."""
        if values_HW.shape != self._stored_size:
            linear = linear_for_average(self.example.quantity)
            averages_HW = area_average(
                linear.to_linear(values_HW),
                *self._stored_size,
                min_observed=self.settings_.min_observed_area,
            )
            values_HW = linear.from_linear(averages_HW)
        return self._scale.encode(self._conversion(values_HW))

    def _look_up(self, field: Coded) -> Encoded:
        """The same for numbers of 8 or 16 bits: each of them is converted once, then looked up."""
        known = self._tables.get(id(field.table))
        if known is None or known[0] is not field.table:
            values = self._conversion(field.table)
            known = (
                field.table,
                self._scale.encode(values).codes,
                values > np.float32(self._scale.high),
            )
            self._tables[id(field.table)] = known
        _, codes, is_above = known
        stored_HW = np.ascontiguousarray(crop(field.codes_HW, self._crop))
        codes_HW = look_up(codes, stored_HW)
        # What was clipped has the largest code; where that does not occur, nothing was.
        clipped = is_above.any() and (codes_HW == self._scale.max_code).any()
        return Encoded(codes_HW, int(look_up(is_above, stored_HW).sum()) if clipped else 0)

    @property
    def _crop(self) -> Crop:
        grid = self.example.grid
        return Crop(*(self.settings_.crop or (0, 0, grid.height, grid.width)))

    @property
    def _stored_size(self) -> tuple[int, int]:
        return self.settings_.size or (self._crop.height, self._crop.width)

    @property
    def _stored(self) -> Quantity:
        return self.settings_.store or _DEFAULT_STORED[self.example.quantity]

    @property
    def _dtype(self) -> Literal["uint8", "uint16"]:
        fine = self._stored in ("rain_rate", "accumulation")
        return self.settings_.dtype or ("uint16" if fine else "uint8")

    @cached_property
    def _conversion(self) -> Conversion:
        return convert(
            self.example.quantity,
            self._stored,
            z_r=MarshallPalmer(*self.settings_.z_r),
            accumulation_minutes=self.example.accumulation_minutes,
        )

    @cached_property
    def _scale(self) -> PixelScale:
        low, high = self.settings_.range or _DEFAULT_RANGE[self._stored]
        return PixelScale(low, high, self._dtype, reserve_missing=True)

    @cached_property
    def _tables(self) -> dict[int, tuple[NDArray[np.float32], Codes, NDArray[np.bool_]]]:
        """Stored code, and whether it was clipped, of every number that a reader's table knows."""
        return {}

    @cached_property
    def _is_wet(self) -> NDArray[np.bool_]:
        """Of every code that can be stored, whether it is rain; the missing code is not."""
        assert self._wet is not None
        is_wet = wet_codes(self._scale.units(self._stored, UNITS[self._stored]), self._wet)
        return np.append(is_wet, False)

    @cached_property
    def _wet(self) -> float | None:
        """The rain rate that counts as wet, in the stored quantity."""
        if self._stored in ("vil", "intensity"):
            return None
        rate = convert(
            "rain_rate",
            self._stored,
            z_r=MarshallPalmer(*self.settings_.z_r),
            accumulation_minutes=self.example.accumulation_minutes,
        )
        return float(rate(np.array([_WET_RATE], np.float32))[0])


def _detect(settings: RadarSettings, files: Sequence[str]) -> RadarReader:
    """The reader that recognises some of the files, spread over the folder."""
    some = [files[i] for i in sorted({0, len(files) // 2, len(files) - 1})]
    with ExitStack() as stack:
        paths = [stack.enter_context(local_file(settings.source, file)) for file in some]
        reader = detect_reader(paths)
    return radar_reader(reader.name, reader_options(settings.option))


def _first_good(settings: RadarSettings, reader: RadarReader, files: Sequence[str]) -> RadarFile:
    """Facts of the first file that can be read."""
    reasons = []
    for file in files[:_FILES_PER_JOB]:
        try:
            with local_file(settings.source, file) as path:
                return reader.scan(path)
        except BadFileError as error:
            reasons.append(f"{file}: {error.reason}")
    raise ValueError(
        f"None of the first {len(reasons)} files of {settings.source} can be read as "
        f"{reader.name}: {reasons[0]}. Check --source, or give another --reader."
    )


def _difference(found: RadarFile, expected: RadarFile) -> str:
    """In which fact that all files must share a file differs; "" in none."""
    for what in ("quantity", "accumulation_minutes", "grid"):
        mine, theirs = getattr(found, what), getattr(expected, what)
        if mine != theirs:
            return f"{what} {mine}, the first file has {theirs}"
    return ""


def _whole(part: str) -> tuple[str, slice]:
    """The file that an entry of a job names, and which of its fields are meant."""
    file, found, fields = part.rpartition(_PART)
    if not found:
        return part, slice(None)
    first, _, end = fields.partition(":")
    return file, slice(int(first), int(end))


def reader_options(pairs: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE pairs as a dictionary."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"A reader option is KEY=VALUE, got {pair!r}.")
        options[key] = value
    return options


def _fields(record: Any) -> dict[str, Any]:
    """A dataclass as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(record), default=str))
