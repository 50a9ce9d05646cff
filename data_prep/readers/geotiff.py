"""GeoTIFF: one field a file, with whatever the file says of unit, scale and time.

Providers write those facts into different places. Looked at, in this order: the reader's options;
GDAL metadata items named Quantity, Gain, Offset, Nodata, Undetect and Observation time (as the
Finnish Meteorological Institute writes them); GDAL's own scale, offset, unit and no-data value; for
the time, the file's name and last the tag DateTime, which often is the time of writing. What cannot
be found is asked for by an error that names the option.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.radar import (
    NO_ECHO_DBZ,
    UNITS,
    BadFileError,
    Quantity,
    RadarFile,
    RadarFrame,
    import_extra,
)
from data_prep.readers.raw import physical, reading, time_by, time_in
from tmu_dist.data.manifest import Grid, SourceCard

GEO_TAGS = {33550, 34264, 34735}
"""ModelPixelScale, ModelTransformation, GeoKeyDirectory: any of them makes a TIFF a GeoTIFF."""
_KNOWN_UNITS: Mapping[str, tuple[Quantity, float]] = {
    "dbz": ("reflectivity", 1.0),
    "mm/h": ("rain_rate", 1.0),
    "mm/hr": ("rain_rate", 1.0),
    "mmh-1": ("rain_rate", 1.0),
    "mmhr-1": ("rain_rate", 1.0),
    "mm/s": ("rain_rate", 3600.0),
    "m/s": ("rain_rate", 3.6e6),
    "ms-1": ("rain_rate", 3.6e6),
    "kgm-2s-1": ("rain_rate", 3600.0),
    "mm": ("accumulation", 1.0),
    "kg/m2": ("vil", 1.0),
    "kgm-2": ("vil", 1.0),
    "1": ("intensity", 1.0),
}
"""Quantity, and factor to its unit, by unit without spaces and powers' signs."""
_TIME_ITEMS = ("observation time", "observation_time", "valid_time", "time", "acquisitiontime")


class _Facts(NamedTuple):
    quantity: Quantity
    scale: float
    offset: float
    missing: tuple[float, ...]
    undetect: float | None
    time: datetime
    grid: Grid
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GeoTIFFReader:
    """Reads *.tif with georeference; options say what a file does not."""

    band: int = 1
    """Band to read, counted from 1."""
    quantity: str = ""
    """reflectivity, rain_rate, accumulation, vil or intensity."""
    unit: str = ""
    """Unit of scale * stored + offset, such as dBZ, mm/h, m/s, mm, kg/m2."""
    scale: float | None = None
    offset: float | None = None
    missing: tuple[float, ...] = ()
    """Stored numbers that mean "not observed", commas between."""
    time_pattern: str = ""
    """Regular expression that finds the time in the path, by the groups (?P<year>...), month, day,
    hour, minute and perhaps second; or one group (?P<time>...) of YYYYMMDDhhmm[ss]."""
    interval_minutes: float | None = None
    accumulation_minutes: float | None = None

    name: ClassVar[str] = "geotiff"
    extra: ClassVar[str | None] = "radar"
    patterns: ClassVar[tuple[str, ...]] = ("*.tif", "*.tiff", "*.gtif")
    source: ClassVar[SourceCard] = SourceCard(name="radar composite in GeoTIFF")

    def __post_init__(self) -> None:
        if self.band < 1:
            raise ValueError(f"band counts from 1, got {self.band}.")
        if self.quantity and self.quantity not in UNITS:
            raise ValueError(f"quantity must be one of {', '.join(UNITS)}, got {self.quantity!r}.")
        if self.unit and _plain(self.unit) not in _KNOWN_UNITS:
            raise ValueError(f"unit must be one of {', '.join(_KNOWN_UNITS)}, got {self.unit!r}.")
        check_minutes(self.interval_minutes, self.accumulation_minutes)
        re.compile(self.time_pattern)

    def recognises(self, path: Path) -> bool:
        tags = tiff_tags(path)
        return tags is not None and bool(tags & GEO_TAGS)

    def scan(self, path: Path) -> RadarFile:
        with _opened(path) as dataset:
            facts = self._facts(path, dataset)
        if facts.quantity == "accumulation" and self.accumulation_minutes is None:
            raise BadFileError(
                path, "holds an accumulation: give the option accumulation_minutes, over how long"
            )
        missing = " and ".join(f"{value:g}" for value in facts.missing) or "NaN only"
        return RadarFile(
            quantity=facts.quantity,
            interval_minutes=self.interval_minutes,
            accumulation_minutes=(
                self.accumulation_minutes if facts.quantity == "accumulation" else None
            ),
            grid=facts.grid,
            missing_rule=f"Missing where the stored number is {missing}."
            + ("" if facts.undetect is None else f" {facts.undetect:g} is no echo."),
            notes=facts.notes,
            frames=(RadarFrame(time=facts.time),),
        )

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        for key in keys:
            if key:
                raise BadFileError(path, f"holds no field {key!r}")
            with _opened(path) as dataset:
                facts = self._facts(path, dataset)
                stored_HW = dataset.read(self.band)
                # Without georeference rows count from the top, too, and rasterio gives identity.
                north_up = dataset.transform.e < 0 or dataset.transform.is_identity
            special = dict.fromkeys(facts.missing, math.nan)
            if facts.undetect is not None:
                nothing = NO_ECHO_DBZ if facts.quantity == "reflectivity" else 0.0
                special.setdefault(facts.undetect, nothing)
            values_HW = physical(stored_HW, facts.scale, facts.offset, special)
            if facts.quantity != "reflectivity" and np.nanmin(values_HW, initial=0) < 0:
                raise BadFileError(
                    path,
                    f"holds {facts.quantity} below 0 (down to {np.nanmin(values_HW):g}): if that "
                    "is a number for missing, give the option missing",
                )
            yield values_HW if north_up else np.ascontiguousarray(values_HW[::-1])

    def _facts(self, path: Path, dataset: Any) -> _Facts:
        """Gather what options, metadata and name say; the header only."""
        if self.band > dataset.count:
            raise BadFileError(path, f"has {dataset.count} bands, no band {self.band}")
        items = {
            name.lower(): str(value)
            for name, value in {**dataset.tags(), **dataset.tags(self.band)}.items()
        }
        quantity, factor = self._quantity(path, dataset, items)
        scale, offset = (
            float(given if given is not None else _number(items, name, own[self.band - 1]) or 0)
            for given, name, own in (
                (self.scale, "gain", dataset.scales),
                (self.offset, "offset", dataset.offsets),
            )
        )
        if not 0 < abs(scale) < math.inf or not math.isfinite(offset):
            raise BadFileError(path, f"has scale {scale} and offset {offset}")
        own_missing = _number(items, "nodata", dataset.nodatavals[self.band - 1])
        missing = self.missing or (() if own_missing is None else (own_missing,))
        time, time_note = self._time(path, items)
        grid, grid_note = _grid(dataset)
        return _Facts(
            quantity=quantity,
            scale=scale * factor,
            offset=offset * factor,
            missing=tuple(value for value in missing if not math.isnan(value)),
            undetect=_number(items, "undetect", None),
            time=time,
            grid=grid,
            notes=(
                f"Band {self.band} of {dataset.count}, {dataset.dtypes[self.band - 1]}; "
                f"{UNITS[quantity]} = {scale * factor:g} * stored + {offset * factor:g}.",
                *time_note,
                *grid_note,
            ),
        )

    def _quantity(
        self, path: Path, dataset: Any, items: Mapping[str, str]
    ) -> tuple[Quantity, float]:
        """Return what is measured, and the factor from its unit in the file to ours."""
        words = [self.unit, dataset.units[self.band - 1] or ""]
        words += [items.get(name, "") for name in ("unit", "units", "unittype", "quantity")]
        known = [found for word in words if (found := _KNOWN_UNITS.get(_plain(word)))]
        if not known and "reflectivity" in items.get("quantity", "").lower():
            known = [("reflectivity", 1.0)]
        if self.quantity:
            # A depth of rain may be given as kg/m2, which alone would mean VIL.
            as_depth = self.quantity == "accumulation"
            fits = [f for q, f in known if q == self.quantity or (as_depth and q == "vil")]
            if known and not fits:
                raise BadFileError(
                    path, f"is in the unit of {known[0][0]}, not of {self.quantity}: {words}"
                )
            return cast(Quantity, self.quantity), (fits or [1.0])[0]
        if not known:
            raise BadFileError(
                path,
                f"does not say what it measures (unit {words[1]!r}, metadata items "
                f"{sorted(items)}): give the options quantity and, unless it is "
                "already in dBZ, mm/h, mm or kg/m2, unit or scale and offset",
            )
        return known[0]

    def _time(self, path: Path, items: Mapping[str, str]) -> tuple[datetime, tuple[str, ...]]:
        """Return the time, and a note where it may be another than that of the measurement."""
        if self.time_pattern:
            with reading(path):
                time = time_by(self.time_pattern, path.as_posix())
            if time is None:
                raise BadFileError(path, f"time_pattern {self.time_pattern!r} finds nothing in it")
            return time, ()
        for name in _TIME_ITEMS:
            digits = re.sub(r"\D", "", items.get(name, ""))
            if len(digits) in (12, 14):
                with reading(path):
                    stamp = datetime.strptime(digits.ljust(14, "0"), "%Y%m%d%H%M%S")
                return stamp.replace(tzinfo=UTC), ()
        if (time := time_in(path.name)) is not None:
            return time, ()
        digits = re.sub(r"\D", "", items.get("tifftag_datetime", ""))
        if len(digits) != 14:
            raise BadFileError(
                path, "tells its time neither in metadata nor in its name: give a time_pattern"
            )
        with reading(path):
            stamp = datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        return stamp, (
            "The time is the tag DateTime, which may be when the file was written; taken as UTC.",
        )


def tiff_tags(path: Path) -> set[int] | None:
    """Return the numbers of the tags of a TIFF's first image; None of anything else."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
            order = {b"II": "<", b"MM": ">"}.get(head[:2])
            if order is None:
                return None
            version = struct.unpack(f"{order}H", head[2:4])[0]
            big = version == 43
            if version not in (42, 43):
                return None
            place = struct.unpack_from(f"{order}{'Q' if big else 'I'}", head, 8 if big else 4)[0]
            file.seek(place)
            count_format, entry_bytes = (f"{order}Q", 20) if big else (f"{order}H", 12)
            (count,) = struct.unpack(count_format, file.read(struct.calcsize(count_format)))
            entries = file.read(min(count, 4096) * entry_bytes)
    except (OSError, struct.error, OverflowError):
        return None
    return {
        struct.unpack_from(f"{order}H", entries, start)[0]
        for start in range(0, len(entries) - entry_bytes + 1, entry_bytes)
    }


def check_minutes(*minutes: float | None) -> None:
    """Refuse an interval or accumulation time that is not positive."""
    for given in minutes:
        if given is not None and not 0 < given < math.inf:
            raise ValueError(f"minutes must be positive, got {given}.")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a dataset of rasterio; whatever goes wrong with it becomes a BadFileError."""
    rasterio = import_extra("rasterio", "radar", "Reading GeoTIFF")
    errors = import_extra("rasterio.errors", "radar", "Reading GeoTIFF")
    with reading(path), warnings.catch_warnings():
        if tiff_tags(path) is None:
            path.stat()  # of an absent file, the error that says so
            raise BadFileError(path, "is no TIFF")
        warnings.simplefilter("ignore", errors.NotGeoreferencedWarning)
        try:
            with rasterio.open(path, driver="GTiff") as dataset:
                yield dataset
        except errors.RasterioError as error:
            raise BadFileError(path, f"cannot be read by GDAL: {error}") from error


def _plain(unit: str) -> str:
    """A unit without spaces, powers' signs and capitals."""
    return re.sub(r"[\s*^.]", "", unit).lower()


def _number(items: Mapping[str, str], name: str, otherwise: float | None) -> float | None:
    """Return a metadata item as a number, or what else is known."""
    try:
        return float(items[name])
    except (KeyError, ValueError):
        return otherwise


def _grid(dataset: Any) -> tuple[Grid, tuple[str, ...]]:
    """Return the grid, and a note where it cannot be placed."""
    unplaced = Grid(height=dataset.height, width=dataset.width)
    transform, crs = dataset.transform, dataset.crs
    if crs is None or transform.b or transform.d or transform.a <= 0 or not transform.e:
        return unplaced, ("The file has no projection, or rotated rows: the grid is not placed.",)
    unit = "degree" if crs.is_geographic else crs.linear_units.lower()
    if unit not in ("degree", "metre", "meter", "m"):
        return unplaced, (f"Coordinates are in {unit}: the grid is not placed.",)
    number = crs.to_epsg()
    return Grid(
        height=dataset.height,
        width=dataset.width,
        projection=f"EPSG:{number}" if number else crs.to_wkt(),
        unit="degree" if unit == "degree" else "m",
        left=float(transform.c),
        top=float(transform.f + max(0.0, transform.e) * dataset.height),
        pixel_width=float(transform.a),
        pixel_height=float(abs(transform.e)),
    ), ()
