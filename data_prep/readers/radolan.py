"""Deutscher Wetterdienst: RADOLAN and RADVOR composites, binary and ESRI ASCII, packed or not.

Binary composites have an ASCII header up to the byte 0x03, then one or two bytes a pixel, row by
row from the south. Format: DWD, "RADOLAN/RADVOR: Hoch aufgeloeste Niederschlagsanalyse und
-vorhersage, Kompositformat". Run-length coded products (PG, PC) are not read. RADVOR products with
a lead time (RV, RQ) are forecasts: their time is the one they are for.

A file may be one composite or a tar of many, each plain or compressed, tars within tars included.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.radar import BadFileError, Quantity, RadarFile, RadarFrame
from data_prep.readers.raw import look_up, members, pick, read_up_to, reading
from tmu_dist.data.manifest import Grid, SourceCard

_REFLECTIVITY = {"EX", "FX", "FZ", "RX", "WN", "WX"}
_RAIN = {
    *("RA", "RB", "RH", "RL", "RQ", "RU", "RV", "RW", "RY", "RZ"),
    *("EB", "EH", "EW", "EY", "EZ", "YW"),
    *("SF", "SH", "SQ", "W1", "W2", "W3", "W4"),
}
_EVERY_5_MINUTES = {"EX", "EY", "EZ", "FX", "FZ", "RV", "RX", "RY", "RZ", "WN", "WX", "YW"}
_EVERY_HOUR = {"EW", "RW"}

_SECONDARY, _MISSING, _NEGATIVE, _CLUTTER, _VALUE = 0x1000, 0x2000, 0x4000, 0x8000, 0x0FFF
_MISSING_8BIT, _CLUTTER_8BIT = 250, 249

_MAX_HEADER_BYTES = 2048
_START = re.compile(
    rb"(?P<product>[A-Z%][A-Z0-9])(?P<day>\d\d)(?P<hour>\d\d)(?P<minute>\d\d)\d{5}"
    rb"(?P<month>\d\d)(?P<year>\d\d)BY\s*(?P<bytes>\d+)"
)
_SIZE = re.compile(rb"GP\s*(\d+)\s*x\s*(\d+)")
_PRECISION = re.compile(rb"PR\s*(E[+-]\d\d)")
_INTERVAL = re.compile(rb"INT\s*(\d+)(?:U(\d))?")
_LEAD = re.compile(rb"VV\s*(\d+)")
_VERSION = re.compile(rb"VS\s*(\d+)")
_ASCII_NAME = re.compile(
    r"(?P<product>[A-Z][A-Z0-9])_(?:(?P<climatology>20\d\d\.\d+)_)?"
    r"(?P<date>\d{8})[-_](?P<time>\d{4})\.asc",
    re.IGNORECASE,
)
_ASCII_HEADER_LINES = 6
_ASCII_MINUTES = {"RW": 60.0, "SF": 1440.0, "YW": 5.0}
_ASCII_OPERATIONAL = ("RW", "SF")
_ASCII_OPERATIONAL_MM = 0.1


class _Composite(NamedTuple):
    """What one composite says of itself."""

    product: str
    quantity: Quantity
    time: datetime
    """Of the newest measurement in it."""
    lead_minutes: float
    minutes: float
    """It accumulates over, or for reflectivity the interval of the product."""
    grid: Grid
    scale: float
    offset: float
    num_bytes: int
    """Of a pixel; 0 for text."""
    missing: float | None
    """Of text, the number that means "no data"."""
    start: int
    """Of the pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RADOLANReader:
    """Reads RW, RY, RX, SF, YW, WN, RV and their kin; one field for each composite of the file."""

    ascii_unit_mm: float | None = None
    """Millimetres of rain per unit of an ESRI ASCII grid. Without it, RW and SF of the operational
    archive have 0.1 (documented) and any other product is refused."""

    name: ClassVar[str] = "radolan"
    extra: ClassVar[str | None] = None
    patterns: ClassVar[tuple[str, ...]] = (
        *("*.tar.gz", "*.tar.bz2", "*.tgz", "*.tar"),
        *("raa0*", "de1200_*", "*---bin*", "*.asc", "*.asc.gz", "*.asc.bz2"),
    )
    source: ClassVar[SourceCard] = SourceCard(
        name="DWD RADOLAN/RADVOR",
        provider="Deutscher Wetterdienst",
        licence="GeoNutzV / CC BY 4.0 (DWD's open data policy; not stated in the files)",
        citation="Source: Deutscher Wetterdienst",
    )

    def __post_init__(self) -> None:
        if self.ascii_unit_mm is not None and not 0 < self.ascii_unit_mm < float("inf"):
            raise ValueError(f"ascii_unit_mm must be positive, got {self.ascii_unit_mm}.")

    def recognises(self, path: Path) -> bool:
        with suppress(BadFileError):
            for _, name, stream in members(path):
                head = read_up_to(stream, _MAX_HEADER_BYTES)
                if _is_binary(head) or _is_ascii(name, head):
                    return True
        return False

    def scan(self, path: Path) -> RadarFile:
        found: dict[str, _Composite] = {}
        others = 0
        for key, name, stream in members(path):
            head = read_up_to(stream, _MAX_HEADER_BYTES)
            if not _is_binary(head) and not _is_ascii(name, head):
                others += 1
            elif key in found:
                raise BadFileError(path, f"holds two composites of one name, {key}")
            else:
                found[key] = self._composite(path, key, name, head)
        if not found:
            raise BadFileError(path, "holds no RADOLAN composite, neither binary nor ESRI ASCII")
        first = next(iter(found.values()))
        for key, composite in found.items():
            if _fixed(composite) != _fixed(first):
                raise BadFileError(
                    path,
                    f"mixes composites that differ in more than time: {next(iter(found))} and "
                    f"{key}. Convert them from separate files.",
                )
        return RadarFile(
            quantity=first.quantity,
            interval_minutes=_interval(first),
            accumulation_minutes=first.minutes if first.quantity == "accumulation" else None,
            grid=first.grid,
            missing_rule=_missing_rule(first),
            notes=_notes(first, others),
            frames=tuple(
                RadarFrame(
                    time=composite.time + timedelta(minutes=composite.lead_minutes),
                    key=key,
                    series=_series(composite),
                    lead_minutes=composite.lead_minutes,
                )
                for key, composite in found.items()
            ),
        )

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        def items() -> Iterator[tuple[str, tuple[str, str, io.BufferedReader]]]:
            return ((member[0], member) for member in members(path))

        for key, name, stream in pick(path, keys, items):
            with reading(path):
                data = stream.read()
            composite = self._composite(path, key, name, data[:_MAX_HEADER_BYTES])
            read = _read_binary if composite.num_bytes else _read_ascii
            try:
                values_HW = read(composite, data)
            except ValueError as error:
                raise _bad(path, key, error) from error
            yield values_HW

    def _composite(self, path: Path, key: str, name: str, head: bytes) -> _Composite:
        """Parse the start of a composite."""
        try:
            if _is_binary(head):
                return _parse_binary(head)
            if _is_ascii(name, head):
                return _parse_ascii(name, head, self.ascii_unit_mm)
        except ValueError as error:
            raise _bad(path, key, error) from error
        raise _bad(path, key, "is no RADOLAN composite")


def _bad(path: Path, key: str, reason: object) -> BadFileError:
    return BadFileError(path, f"{key}: {reason}" if key else str(reason))


def _is_binary(head: bytes) -> bool:
    return _START.match(head) is not None and b"\x03" in head


def _is_ascii(name: str, head: bytes) -> bool:
    return head[:5].lower() == b"ncols" and _ASCII_NAME.search(name) is not None


def _parse_binary(head: bytes) -> _Composite:
    """Parse a binary header; ValueErrors say what is wrong with it."""
    text = head[: head.index(b"\x03")]
    start = _START.match(text)
    facts = re.split(rb"MS\s*\d+<", text)[0]  # station names must not be taken for tokens
    size, precision = _SIZE.search(facts), _PRECISION.search(facts)
    interval, lead, version = (p.search(facts) for p in (_INTERVAL, _LEAD, _VERSION))
    if start is None or size is None or precision is None or interval is None:
        raise ValueError(f"the header {text[:80]!r} lacks GP, PR or INT")
    product = start["product"].decode()
    if product not in _REFLECTIVITY | _RAIN:
        raise ValueError(
            f"holds product {product}, which is not read; known are "
            f"{', '.join(sorted(_REFLECTIVITY | _RAIN))}"
        )
    height, width = int(size[1]), int(size[2])
    num_bytes, rest = divmod(int(start["bytes"]) - len(text) - 1, max(1, height * width))
    if rest or num_bytes not in (1, 2):
        raise ValueError(
            f"the header says {int(start['bytes'])} bytes, which is not one or two for each of "
            f"{height}x{width} pixels"
        )
    step = float(b"1" + precision[1])
    quantity: Quantity = "reflectivity" if product in _REFLECTIVITY else "accumulation"
    if quantity == "accumulation":
        scale, offset = step, 0.0
    else:
        scale, offset = (0.5, -32.5) if num_bytes == 1 else (step / 2, -32.5)
    stamp = b"".join(start[part] for part in ("year", "month", "day", "hour", "minute"))
    return _Composite(
        product=product,
        quantity=quantity,
        time=datetime.strptime(stamp.decode(), "%y%m%d%H%M").replace(tzinfo=UTC),
        lead_minutes=float(lead[1]) if lead else 0.0,
        minutes=float(interval[1]) * (1440 if interval[2] == b"1" else 1),
        grid=_grid(height, width, int(version[1]) if version else 3),
        scale=scale,
        offset=offset,
        num_bytes=num_bytes,
        missing=None,
        start=len(text) + 1,
    )


def _read_binary(composite: _Composite, data: bytes) -> NDArray[np.float32]:
    height, width = composite.grid.height, composite.grid.width
    expected = composite.start + height * width * composite.num_bytes
    if len(data) != expected:
        raise ValueError(f"has {len(data)} bytes, its header says {expected}: truncated?")
    dtype = "u1" if composite.num_bytes == 1 else "<u2"
    codes_HW = np.frombuffer(data, dtype, offset=composite.start).reshape(height, width)
    table = _table(composite.num_bytes, composite.scale, composite.offset)
    return look_up(table, codes_HW[::-1])


@cache
def _table(num_bytes: int, scale: float, offset: float) -> NDArray[np.float32]:
    """The value of every code; flagged ones are missing."""
    codes = np.arange(256**num_bytes)
    values = (codes if num_bytes == 1 else codes & _VALUE) * np.float64(scale) + offset
    if num_bytes == 1:
        values[[_CLUTTER_8BIT, _MISSING_8BIT, 255]] = np.nan
    else:
        values[codes & (_MISSING | _NEGATIVE | _CLUTTER) != 0] = np.nan
    return values.astype(np.float32)


def _parse_ascii(name: str, head: bytes, unit_mm: float | None) -> _Composite:
    """Parse the six header lines of an ESRI grid; ValueErrors say what is wrong with them."""
    told = _ASCII_NAME.search(name)
    lines = head.split(b"\n", _ASCII_HEADER_LINES)
    if told is None or len(lines) <= _ASCII_HEADER_LINES:
        raise ValueError("has no six header lines of an ESRI grid")
    words = [line.decode("latin-1").lower().split() for line in lines[:_ASCII_HEADER_LINES]]
    if any(len(pair) != 2 for pair in words):
        raise ValueError(f"has a header of other lines than NAME VALUE: {words}")
    facts = {key: float(value) for key, value in words}
    needed = {"ncols", "nrows", "xllcorner", "yllcorner", "cellsize", "nodata_value"}
    if facts.keys() != needed:
        raise ValueError(f"has header lines {sorted(facts)}, not {sorted(needed)}")
    product = told["product"].upper()
    if unit_mm is None:
        if product not in _ASCII_OPERATIONAL or told["climatology"]:
            raise ValueError(
                f"is product {product} in text, of which the unit is not documented: give the "
                "option ascii_unit_mm, millimetres per unit (such as 0.1)"
            )
        unit_mm = _ASCII_OPERATIONAL_MM
    if product not in _ASCII_MINUTES:
        raise ValueError(f"is product {product} in text; known are {', '.join(_ASCII_MINUTES)}")
    height, width, cell_m = int(facts["nrows"]), int(facts["ncols"]), facts["cellsize"]
    return _Composite(
        product=product,
        quantity="accumulation",
        time=datetime.strptime(told["date"] + told["time"], "%Y%m%d%H%M").replace(tzinfo=UTC),
        lead_minutes=0.0,
        minutes=_ASCII_MINUTES[product],
        grid=Grid(
            height=height,
            width=width,
            projection=_SPHERE,
            unit="m",
            left=facts["xllcorner"],
            top=facts["yllcorner"] + height * cell_m,
            pixel_width=cell_m,
            pixel_height=cell_m,
        ),
        scale=unit_mm,
        offset=0.0,
        num_bytes=0,
        missing=facts["nodata_value"],
        start=sum(len(line) + 1 for line in lines[:_ASCII_HEADER_LINES]),
    )


def _read_ascii(composite: _Composite, data: bytes) -> NDArray[np.float32]:
    height, width = composite.grid.height, composite.grid.width
    # Text that is no number ends the parsing without an error; the count tells.
    values = np.fromstring(data[composite.start :].decode("latin-1"), np.float32, sep=" ")
    if values.size != height * width:
        raise ValueError(f"has {values.size} of {height * width} values: truncated or altered?")
    missing = values == np.float32(composite.missing or 0)
    # Tenths of a millimetre: dividing rounds once, multiplying by an inexact 0.1 twice.
    values /= np.float32(1 / composite.scale)
    values[missing] = np.nan
    if (values < 0).any():
        raise ValueError(f"has values below 0 that are not its no-data value {composite.missing:g}")
    return values.reshape(height, width)


_SPHERE = "+proj=stere +lat_0=90 +lat_ts=60 +lon_0=10 +R=6370040 +units=m +no_defs"
_WGS84 = (
    "+proj=stere +lat_0=90 +lat_ts=60 +lon_0=10 +a=6378137 +b=6356752.3142451802 "
    "+x_0=543196.83521776402 +y_0=3622588.8619310018 +units=m +no_defs"
)
_LOWER_LEFT_M = {
    (900, 900): (-523_462.16, -4_658_644.72),
    (1100, 900): (-443_462.16, -4_758_644.72),
    (1500, 1400): (-673_462.16, -5_008_644.72),
    (1200, 1100): (-543_462.16, -4_808_644.72),
}
"""On the sphere, from the point 9 E 51 N, which lies whole kilometres from every grid's corner."""
_WGS84_VERSION = 5


def _grid(height: int, width: int, version: int) -> Grid:
    """Return the grid: DWD's sphere, or from format version 5 its WGS84 grid DE1200."""
    left_top: tuple[float, float] | None = None
    if version < _WGS84_VERSION and (height, width) in _LOWER_LEFT_M:
        left, bottom = _LOWER_LEFT_M[height, width]
        left_top, projection = (left, bottom + height * 1000.0), _SPHERE
    elif version >= _WGS84_VERSION and (height, width) == (1200, 1100):
        left_top, projection = (-500.0, 500.0), _WGS84
    if left_top is None:
        return Grid(height=height, width=width)
    return Grid(
        height=height,
        width=width,
        projection=projection,
        unit="m",
        left=left_top[0],
        top=left_top[1],
        pixel_width=1000.0,
        pixel_height=1000.0,
    )


def _fixed(composite: _Composite) -> tuple[object, ...]:
    """The facts that all composites of one file must share."""
    return (
        *(composite.product, composite.minutes, composite.grid, composite.missing),
        *(composite.scale, composite.offset, composite.num_bytes),
    )


def _interval(composite: _Composite) -> float | None:
    if composite.product in _EVERY_5_MINUTES:
        return 5.0
    return 60.0 if composite.product in _EVERY_HOUR else None


def _series(composite: _Composite) -> str:
    """Observations of a product are one series; every run of a forecast is its own."""
    if composite.lead_minutes:
        return f"{composite.product}-forecast-{composite.time:%Y%m%d%H%M}"
    return composite.product


def _missing_rule(composite: _Composite) -> str:
    if composite.num_bytes == 0:
        return f"{composite.missing:g} is not observed; 0 is no rain."
    if composite.num_bytes == 1:
        return (
            f"{_MISSING_8BIT} is not observed, {_CLUTTER_8BIT} is clutter: both missing. "
            f"0 is no echo ({composite.offset} dBZ)."
        )
    nothing = "no rain" if composite.quantity == "accumulation" else "no echo"
    return (
        f"Bit 0x{_MISSING:04x} is not observed, bit 0x{_CLUTTER:04x} clutter, bit "
        f"0x{_NEGATIVE:04x} a negative value: all missing. 0 is {nothing}."
    )


def _notes(composite: _Composite, others: int) -> tuple[str, ...]:
    notes = [f"DWD product {composite.product}."]
    if composite.num_bytes == 2:
        notes.append(f"Bit 0x{_SECONDARY:04x} (secondary data, interpolated) is not looked at.")
    if composite.product in ("RV", "RQ", "FX", "FZ"):
        notes.append("Fields with a lead time are DWD's forecasts, not observations.")
    if others:
        notes.append(f"{others} other files in the archive are no composites and were left out.")
    return tuple(notes)
