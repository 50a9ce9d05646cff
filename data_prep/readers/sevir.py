"""SEVIR (Storm EVent ImagRy): vertically integrated liquid (VIL) of US storms, in HDF5.

A file holds events of 4 hours and 384 km: `vil` [event, row, column, frame] in codes of one byte,
and `id`. When and where an event was is not in the file but in SEVIR's CATALOG.csv. Satellite
images and lightning, SEVIR's other types, are not radar and are not read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.hdf5 import hdf5_fits, open_hdf5, plain
from data_prep.readers.radar import BadFileError, RadarFile, RadarFrame
from data_prep.readers.raw import look_up
from tmu_dist.data.manifest import Grid, SourceCard

_INTERVAL_MINUTES = 5.0
_MISSING = 255
_CATALOG = "CATALOG.csv"
_FOLDERS_UP = 4
"""SEVIR's layout is CATALOG.csv beside data/vil/YEAR/FILE.h5."""
_PROJECTION = "+proj=laea +lat_0=38 +lon_0=-98 +units=m +a=6370997.0 +ellps=sphere"
_FIRST_INVENTED_DAY = datetime(2000, 1, 1, tzinfo=UTC)

_Times = tuple[datetime, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SEVIRReader:
    """Reads SEVIR's VIL files; each event is a series of its own.

    `recognises` is False for a truncated file, which cannot be opened; `scan` then says so.
    """

    catalog: str | None = None
    """SEVIR's CATALOG.csv, for the times of the events; looked for beside the file and in the
    folders above when left out. Without it events get invented days."""

    name: ClassVar[str] = "sevir"
    extra: ClassVar[str | None] = "radar"
    patterns: ClassVar[tuple[str, ...]] = ("*.h5", "*.hdf5", "*.hdf")
    source: ClassVar[SourceCard] = SourceCard(
        name="SEVIR: Storm EVent ImagRy, vertically integrated liquid",
        provider="MIT Lincoln Laboratory, from NOAA's NEXRAD radars",
        citation="Veillette, Samsi and Mattioli, SEVIR: A Storm Event Imagery Dataset for Deep "
        "Learning Applications in Radar and Satellite Meteorology, NeurIPS 2020",
    )

    def recognises(self, path: Path) -> bool:
        return hdf5_fits(path, lambda file: "id" in file and "vil" in file and _is_vil(file["vil"]))

    def scan(self, path: Path) -> RadarFile:
        with open_hdf5(path) as file:
            _, height, width, num_frames = _vil(path, file).shape
            events = [str(plain(event)) for event in file["id"][()]]
        catalog = self._catalog(path)
        times = None if catalog is None else _catalog_times(path, str(catalog), len(events))
        frames = []
        for index, event in enumerate(events):
            of_event = _invented(index, num_frames) if times is None else times[index]
            if len(of_event) != num_frames:
                raise BadFileError(
                    path,
                    f"holds {num_frames} frames of event {event}, {catalog} gives it "
                    f"{len(of_event)} times",
                )
            frames += [
                RadarFrame(time=time, key=f"{index}/{frame}", series=event)
                for frame, time in enumerate(of_event)
            ]
        return RadarFile(
            quantity="vil",
            interval_minutes=_INTERVAL_MINUTES,
            accumulation_minutes=None,
            grid=Grid(height=height, width=width, projection=_PROJECTION),
            missing_rule=f"Stored {_MISSING} is missing; 0 to 5 are no liquid.",
            notes=(
                "VIL by SEVIR's published rule: 0 up to code 5, (code - 2) / 90.66 up to 18, "
                "exp((code - 83.9) / 38.9) above.",
                "Pixels are 1 km; each event lies elsewhere, so the grid has no place.",
                "Times are from CATALOG.csv."
                if times is not None
                else "Times are invented (no CATALOG.csv): one day an event, from 2000-01-01 on. "
                "Only their order and distance within an event mean something.",
            ),
            frames=tuple(frames),
        )

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        if not keys:
            return
        with open_hdf5(path) as file:
            vil = _vil(path, file)
            # What HDF5 has to decompress at once anyway: as stored by SEVIR, an event of 7 MB.
            step = vil.chunks[3] if vil.chunks else vil.shape[3]
            held: tuple[int, int] | None = None
            for key in keys:
                event, frame = _place(path, key, vil.shape)
                block = (event, frame // step)
                if held != block:
                    first = block[1] * step
                    codes_HWT = vil[event, :, :, first : first + step]
                    held = block
                # SEVIR's rows run from south to north.
                codes_HW = np.ascontiguousarray(codes_HWT[::-1, :, frame - block[1] * step])
                yield look_up(_vil_of_code(), codes_HW)

    def _catalog(self, path: Path) -> Path | None:
        if self.catalog is not None:
            if not Path(self.catalog).is_file():
                raise ValueError(f"There is no catalog {self.catalog}: check the reader option.")
            return Path(self.catalog)
        above = path.absolute().parents[:_FOLDERS_UP]
        return next((p for folder in above if (p := folder / _CATALOG).is_file()), None)


def _is_vil(node: Any) -> bool:
    return len(getattr(node, "shape", ())) == 4 and node.dtype == np.uint8


def _vil(path: Path, file: Any) -> Any:
    if "vil" not in file or "id" not in file:
        raise BadFileError(
            path, f"is no SEVIR file of VIL: it holds {', '.join(sorted(file)) or 'nothing'}"
        )
    vil, ids = file["vil"], getattr(file["id"], "shape", ())
    if not _is_vil(vil) or vil.shape[:1] != ids or 0 in vil.shape:
        raise BadFileError(
            path,
            f"holds vil as {getattr(vil, 'dtype', 'a group')} {getattr(vil, 'shape', '')} for "
            f"{ids} events, expected uint8 [event, row, column, frame]",
        )
    return vil


def _place(path: Path, key: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Event and frame of a key such as 12/48."""
    event, _, frame = key.partition("/")
    if not (event.isdecimal() and frame.isdecimal()):
        raise BadFileError(path, f"holds no field {key!r}")
    place = int(event), int(frame)
    if place[0] >= shape[0] or place[1] >= shape[3]:
        raise BadFileError(path, f"holds no field {key!r}: it has {shape[0]} events")
    return place


@lru_cache(maxsize=1)
def _vil_of_code() -> NDArray[np.float32]:
    """VIL in kg/m2 of each code."""
    codes = np.arange(256.0)
    values = np.where(codes <= 18, (codes - 2) / 90.66, np.exp((codes - 83.9) / 38.9))
    values[:6] = 0
    values[_MISSING] = np.nan
    table = values.astype(np.float32)
    table.setflags(write=False)
    return table


def _invented(index: int, num_frames: int) -> _Times:
    start = _FIRST_INVENTED_DAY + timedelta(days=index)
    return tuple(
        start + timedelta(minutes=_INTERVAL_MINUTES * frame) for frame in range(num_frames)
    )


def _catalog_times(path: Path, catalog: str, num_events: int) -> list[_Times]:
    """Times of the frames of each event of a file."""
    of_file = _read_catalog(catalog).get(path.name, {})
    if missing := [index for index in range(num_events) if index not in of_file]:
        raise BadFileError(
            path,
            f"holds events that {catalog} does not list under this file name, the first at index "
            f"{missing[0]}",
        )
    times = []
    for index in range(num_events):
        try:
            time, offsets = of_file[index]
            start = datetime.fromisoformat(time).replace(tzinfo=UTC)
            times.append(
                tuple(start + timedelta(minutes=float(offset)) for offset in offsets.split(":"))
            )
        except ValueError as error:
            raise BadFileError(path, f"event {index} in {catalog}: {error}") from error
    return times


@lru_cache(maxsize=2)
def _read_catalog(catalog: str) -> dict[str, dict[int, tuple[str, str]]]:
    """Per file name and index in it: time_utc and minute_offsets of the VIL events.

    Ids do not serve: SEVIR uses some twice.

    Raises:
        ValueError: this is no catalog, which is not the fault of any data file.
    """
    found: dict[str, dict[int, tuple[str, str]]] = {}
    try:
        with Path(catalog).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["img_type"] == "vil":
                    of_file = found.setdefault(row["file_name"].rpartition("/")[2], {})
                    of_file[int(row["file_index"])] = (row["time_utc"], row["minute_offsets"])
    except (OSError, KeyError, ValueError, AttributeError, csv.Error) as error:
        raise ValueError(
            f"{catalog} is no SEVIR catalog ({error!r}): give its place by the reader option "
            "catalog=PATH."
        ) from error
    return found
