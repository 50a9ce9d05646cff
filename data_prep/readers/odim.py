"""ODIM_H5 2.x composites and single-radar images, whatever the country.

The layout is EUMETNET OPERA's information model for HDF5: `/datasetN/dataM/data` holds stored
numbers, and `what`, `where` and `how` groups at three levels say what they mean; the lowest wins.
Real files leave levels out, put attributes on the groups themselves, and hold several quantities,
products or times; all of that is read. Polar scans and volumes are not.

Shape letters: H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.coding import NEGATIVE_RULE, Coding
from data_prep.readers.hdf5 import attributes, hdf5_fits, number, open_hdf5
from data_prep.readers.odim_grid import odim_grid
from data_prep.readers.radar import BadFileError, Coded, Quantity, RadarFile, RadarFrame
from data_prep.readers.raw import StoredFields
from tmu_dist.data.manifest import SourceCard

_POLAR = ("PVOL", "SCAN", "RAY", "AZIM", "ELEV", "CVOL", "RHI", "XSEC", "VP", "PIC")
_QUANTITIES: dict[str, Quantity] = {
    "TH": "reflectivity",
    "TV": "reflectivity",
    "RATE": "rain_rate",
    "ACRR": "accumulation",
    "VIL": "vil",
}
"""Beside these, all that begins with DBZ is reflectivity."""
_SNAP = timedelta(seconds=90)
"""An end of measurement this near to the nominal time is that time."""


class _Entry(NamedTuple):
    """One stored field and what the levels above it say."""

    key: str
    what: dict[str, Any]
    shape: tuple[int, ...]

    @property
    def dataset(self) -> str:
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        return str(self.what.get("quantity") or "").upper()


@dataclass(frozen=True, kw_only=True, slots=True)
class ODIMReader(StoredFields):
    """Reads gridded ODIM_H5 files: reflectivity, rain rate, accumulation, VIL.

    `recognises` is also True for polar ODIM files, so that `scan` can say why they are not read;
    it is False for a truncated file, which cannot be opened.
    """

    quantity: str | None = None
    """ODIM's name of what to read, such as DBZH or ACRR; the first that is known if left out."""
    accumulation_minutes: float | None = None
    """Of a sum: over how long, where the file does not say so."""

    name: ClassVar[str] = "odim"
    extra: ClassVar[str | None] = "radar"
    patterns: ClassVar[tuple[str, ...]] = (
        *("*.h5", "*.hdf", "*.hdf5", "*.he5"),
        *("*.hd5", "*-hd5"),  # Deutscher Wetterdienst: composite_hx_20230914_1230-hd5
    )
    source: ClassVar[SourceCard] = SourceCard(
        name="ODIM_H5 radar composite",
        provider="named by the files (what/source)",
    )

    def recognises(self, path: Path) -> bool:
        return hdf5_fits(path, _is_odim)

    def scan(self, path: Path) -> RadarFile:
        with open_hdf5(path) as file:
            root = _what(file)
            _check_object(path, file, root)
            entries = _entries(file, root)
            chosen, notes = self._choose(path, entries)
            first = chosen[0]
            where = _attributes_of(file, "where") | _attributes_of(file[first.dataset], "where")
            grid, grid_notes = odim_grid(first.shape, where)
            quality = sorted({name for name in _names_below(file) if name.startswith("quality")})
        coding = self._coding(path, first)
        frames, time_notes = _frames(path, chosen, root)
        if quality:
            notes.append(f"Quality fields are in the file and are not read: {', '.join(quality)}.")
        product = " ".join(str(first.what[n]) for n in ("product", "prodname") if n in first.what)
        return RadarFile(
            quantity=coding.quantity,
            interval_minutes=_interval(frames),
            accumulation_minutes=self._accumulation(path, coding.quantity, first),
            grid=grid,
            missing_rule=_missing_rule(coding),
            notes=(
                f"Quantity {first.name or self.quantity}, product {product or 'not named'}, "
                f"source {root.get('source') or 'not named'}.",
                *notes,
                *time_notes,
                *grid_notes,
            ),
            frames=frames,
        )

    def stored_fields(
        self, path: Path, keys: Sequence[str]
    ) -> Iterator[NDArray[np.float32] | Coded]:
        if not keys:
            return
        with open_hdf5(path) as file:
            root = _what(file)
            _check_object(path, file, root)
            for key in keys:
                dataset, _, data = key.partition("/")
                node = file.get(key)
                if not re.fullmatch(r"dataset\d+(/data\d+)?", key, re.I) or node is None:
                    raise BadFileError(path, f"holds no field {key!r}")
                entry = _entry(key, file[dataset], node if data else None, root)
                yield self._coding(path, entry).coded(node["data"][()])

    def _choose(self, path: Path, entries: list[_Entry]) -> tuple[list[_Entry], list[str]]:
        """Return the fields of one quantity with distinct times, and notes on all others."""
        wanted = self.quantity.upper() if self.quantity else None
        if wanted is not None:
            of_quantity = [entry for entry in entries if entry.name == wanted]
            of_quantity = of_quantity or [entry for entry in entries if not entry.name]
        else:
            known = next((e.name for e in entries if _known(e.name)), None)
            of_quantity = [entry for entry in entries if known and entry.name == known]
        names = sorted({entry.name or "unnamed" for entry in entries})
        if not of_quantity:
            raise BadFileError(
                path,
                f"holds {', '.join(names) or 'no gridded fields'}; "
                + (
                    f"no {wanted}, as the option quantity asks"
                    if wanted
                    else "read are DBZ..., TH, TV, RATE, ACRR and VIL, or what the option "
                    "quantity names"
                ),
            )
        chosen: dict[Any, _Entry] = {}
        left_out = []
        for entry in of_quantity:
            time = _end(entry) or entry.dataset
            if time in chosen or entry.shape != of_quantity[0].shape:
                left_out.append(entry.key)
            else:
                chosen[time] = entry
        notes = []
        if others := [name for name in names if name != (of_quantity[0].name or "unnamed")]:
            notes.append(f"Also in the file, not read: {', '.join(others)}.")
        if left_out:
            notes.append(
                "Further products or levels of the same quantity and time are not read: "
                f"{', '.join(left_out)}."
            )
        return list(chosen.values()), notes

    def _coding(self, path: Path, entry: _Entry) -> Coding:
        name = entry.name or (self.quantity or "").upper()
        quantity = _known(name)
        if quantity is None:
            raise BadFileError(
                path, f"{entry.key} is {name or 'unnamed'}, which is not known to be radar rain"
            )
        gain, offset, nodata, undetect = (
            number(entry.what.get(fact)) for fact in ("gain", "offset", "nodata", "undetect")
        )
        return Coding(
            quantity=quantity,
            gain=1.0 if gain is None else gain,
            offset=0.0 if offset is None else offset,
            missing=() if nodata is None else (nodata,),
            no_echo=() if undetect is None else (undetect,),
        )

    def _accumulation(self, path: Path, quantity: Quantity, entry: _Entry) -> float | None:
        if quantity != "accumulation":
            return None
        start, end = _time(entry.what, "start"), _end(entry)
        if self.accumulation_minutes is not None:
            return self.accumulation_minutes
        if start is None or end is None or end <= start:
            raise BadFileError(
                path,
                f"is a sum from {start} to {end}; give the reader option "
                "accumulation_minutes=MINUTES",
            )
        # Times are whole seconds; sums are over whole minutes, also if one end is 59 s late.
        return float(max(1, round((end - start) / timedelta(minutes=1))))


def _is_odim(file: Any) -> bool:
    if not any(re.fullmatch(r"dataset\d+", name, re.I) for name in file):
        return False
    conventions = str(attributes(file).get("conventions", ""))
    return "ODIM" in conventions.upper() or "what" in file or "where" in file


def _check_object(path: Path, file: Any, root: dict[str, Any]) -> None:
    """Refuse what is no ODIM file, or one in polar coordinates."""
    if not _is_odim(file):
        raise BadFileError(path, "is no ODIM_H5 file: it has no datasetN with what or where")
    kind = str(root.get("object") or "").upper()
    if kind in _POLAR:
        raise BadFileError(
            path,
            f"is an ODIM {kind}, polar scans or profiles; only gridded composites and images "
            "(COMP, IMAGE) are read",
        )


def _entries(file: Any, root: dict[str, Any]) -> list[_Entry]:
    """All stored two-dimensional fields, in the order of their numbers."""
    entries = []
    for dataset in _numbered(file, "dataset"):
        group = file[dataset]
        nodes = [(f"{dataset}/{name}", group[name]) for name in _numbered(group, "data")]
        if not nodes and "data" in group:
            nodes = [(dataset, None)]
        for key, node in nodes:
            entry = _entry(key, group, node, root)
            if len(entry.shape) == 2:
                entries.append(entry)
    return entries


def _entry(key: str, dataset: Any, data: Any, root: dict[str, Any]) -> _Entry:
    """Collect what the levels say; attributes may also stand on the groups themselves."""
    what = {name: value for name, value in root.items() if name not in ("date", "time")}
    for node in (dataset, data):
        if node is not None:
            what |= attributes(node) | _attributes_of(node, "what")
    holder = dataset if data is None else data
    shape = getattr(holder.get("data"), "shape", ())
    return _Entry(key, what, shape)


def _what(file: Any) -> dict[str, Any]:
    return _attributes_of(file, "what")


def _attributes_of(group: Any, name: str) -> dict[str, Any]:
    return attributes(group[name]) if name in group else {}


def _numbered(group: Any, prefix: str) -> list[str]:
    """Members such as data1, data2, ... data10, by number."""
    found = [name for name in group if re.fullmatch(rf"{prefix}\d+", name, re.I)]
    return sorted(found, key=lambda name: int(name[len(prefix) :]))


def _names_below(file: Any) -> Iterator[str]:
    """Names of the groups in the first data set and in its first field."""
    for dataset in _numbered(file, "dataset")[:1]:
        yield from file[dataset]
        for data in _numbered(file[dataset], "data")[:1]:
            yield from file[dataset][data]


def _known(name: str) -> Quantity | None:
    return "reflectivity" if name.startswith("DBZ") else _QUANTITIES.get(name)


def _time(what: dict[str, Any], prefix: str) -> datetime | None:
    """Time from PREFIXdate (YYYYMMDD) and PREFIXtime (HHMMSS or HHMM), UTC."""
    digits = re.sub(r"\D", "", f"{what.get(f'{prefix}date', '')}")
    digits += re.sub(r"\D", "", f"{what.get(f'{prefix}time', '')}").ljust(6, "0")
    try:
        return datetime.strptime(digits[:14], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None


def _end(entry: _Entry) -> datetime | None:
    return _time(entry.what, "end")


def _frames(
    path: Path, chosen: list[_Entry], root: dict[str, Any]
) -> tuple[tuple[RadarFrame, ...], list[str]]:
    """Times of the fields, and notes on them.

    A single field has the file's nominal time: the end of the last scan in it wanders by seconds,
    so that no two fields would be a whole interval apart. A sum has the time at which it ends, and
    so has each of several fields. What begins after the nominal time is a forecast.
    """
    nominal = _time(root, "")
    series = str(root.get("source") or "") if str(root.get("object")).upper() == "IMAGE" else ""
    frames, notes = [], []
    for entry in chosen:
        start, end = _time(entry.what, "start"), _end(entry)
        time = end or nominal
        ahead = nominal is not None and start is not None and start > nominal
        if nominal is not None and end is not None and len(chosen) == 1 and not ahead:
            is_sum = _known(entry.name) == "accumulation"
            time = end if is_sum and abs(end - nominal) > _SNAP else nominal
        if time is None or (end is None and len(chosen) > 1):
            raise BadFileError(
                path, f"has no readable time for {entry.key} (what: enddate, endtime; date, time)"
            )
        if end is not None and end != time:
            late = (end - time).total_seconds()
            notes.append(
                "The time is the nominal one; in the first file the last measurement ended "
                f"{abs(late):g} s {'later' if late > 0 else 'earlier'}."
            )
        lead = (time - nominal) / timedelta(minutes=1) if ahead and nominal is not None else 0.0
        frames.append(RadarFrame(time=time, key=entry.key, series=series, lead_minutes=lead))
    frames.sort(key=lambda frame: frame.time)
    if frames[-1].lead_minutes > 0:
        notes.append("Fields that begin after the file's nominal time are forecasts.")
    return tuple(frames), notes


def _interval(frames: tuple[RadarFrame, ...]) -> float | None:
    """Minutes between the fields of one file; a single field does not tell."""
    if len(frames) < 2:
        return None
    steps = np.diff([frame.time.timestamp() for frame in frames]) / 60
    return float(np.median(steps)) or None


def _missing_rule(coding: Coding) -> str:
    missing = ", ".join(f"{code:g}" for code in coding.missing)
    rule = f"Stored {missing} (nodata) and NaN are missing" if missing else "NaN is missing"
    if coding.no_echo and coding.no_echo != coding.missing:
        rule += f"; {coding.no_echo[0]:g} (undetect) is observed, no echo"
    elif coding.no_echo:
        rule += "; undetect is the same number, and cannot be told from missing"
    if coding.quantity != "reflectivity":
        rule += f"; {NEGATIVE_RULE}"
    return rule + "."
