"""GRIB edition 2: NOAA's MRMS mosaics, and rain or reflectivity of other centres.

MRMS uses a discipline of its own (209) that no GRIB library names; its products are known here by
discipline, category and number, after NSSL's user table (version 12). Of them "-3 no coverage" and
"-1 missing" (rain, VIL) and "-999 no coverage" (reflectivity) are missing. NSSL's table calls the
reflectivity -99 "missing", too; it is what covered pixels without an echo hold, and is read so.
Products of the WMO's disciplines are known by their numbers in code table 4.2.

Messages are read one at a time through eccodes. MRMS packs fields as PNG images; those are decoded
by Pillow, which takes half the time of eccodes and needs no field of doubles.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.readers.grib2_parameters import PARAMETERS, Parameter, Triple
from data_prep.readers.radar import (
    NO_ECHO_DBZ,
    BadFileError,
    RadarFile,
    RadarFrame,
    import_extra,
)
from data_prep.readers.raw import head_of, look_up, opened, pick, read_up_to, reading
from tmu_dist.data.manifest import Grid, SourceCard

_MRMS_DISCIPLINE = 209
_MRMS_NO_ECHO, _MRMS_NO_COVERAGE = -99.0, -999.0

_MINUTES_OF_UNIT = {0: 1, 1: 60, 2: 1440, 10: 180, 11: 360, 12: 720, 13: 1 / 60}
"""Code table 4.4."""
_OBSERVED = (0, 8)
"""Types of generating process that are no forecasts: analysis, observation."""
_MISSING_VALUE = 1e30
_PNG_TEMPLATE = 41


class _Message(NamedTuple):
    """What one message says of its field."""

    triple: Triple
    parameter: Parameter
    time: datetime
    lead_minutes: float
    grid: Grid
    series: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GRIB2Reader:
    """Reads *.grib2, plain or .gz; one field for each message of the parameter."""

    parameter: str = ""
    """DISCIPLINE/CATEGORY/NUMBER to read of a file with several parameters, such as 209/6/1."""

    name: ClassVar[str] = "grib2"
    extra: ClassVar[str | None] = "radar"
    patterns: ClassVar[tuple[str, ...]] = tuple(
        f"*.{ending}{wrapper}"
        for ending in ("grib2", "grb2", "grib", "grb")
        for wrapper in ("", ".gz", ".bz2")
    )
    source: ClassVar[SourceCard] = SourceCard(
        name="GRIB2 radar product (MRMS of NOAA where its products are read)",
        provider="the centre that the file names; of MRMS: NOAA/NSSL and NCEP",
        licence="MRMS: public domain as work of the US government; otherwise ask the provider",
        citation="NOAA Multi-Radar/Multi-Sensor System (MRMS)",
    )

    def __post_init__(self) -> None:
        words = self.parameter.split("/") if self.parameter else ["0"] * 3
        if len(words) != 3 or not all(word.isdecimal() for word in words):
            raise ValueError(
                f"parameter must be DISCIPLINE/CATEGORY/NUMBER such as 209/6/1, "
                f"got {self.parameter!r}."
            )

    def recognises(self, path: Path) -> bool:
        head = head_of(path, 8)
        return head.startswith(b"GRIB") and head[7:8] == b"\x02"

    def scan(self, path: Path) -> RadarFile:
        found, others = self._wanted(path)
        triples = {message.triple for message in found.values()}
        if len(triples) > 1:
            names = ", ".join(f"{_text(t)} ({PARAMETERS[t].name})" for t in sorted(triples))
            raise BadFileError(
                path, f"holds several parameters: {names}. Choose one with the option parameter."
            )
        first = next(iter(found.values()))
        parameter = first.parameter
        if any((m.parameter, m.grid) != (parameter, first.grid) for m in found.values()):
            raise BadFileError(path, "holds messages of different grids or accumulation times")
        notes = [f"Parameter {_text(first.triple)}, {parameter.name}."]
        if others:
            notes.append(f"{sum(others.values())} messages of other parameters were left out.")
        return RadarFile(
            quantity=parameter.quantity,
            interval_minutes=parameter.interval_minutes,
            accumulation_minutes=parameter.accumulation_minutes,
            grid=first.grid,
            missing_rule=_missing_rule(first.triple, parameter),
            notes=tuple(notes),
            frames=tuple(
                RadarFrame(
                    time=message.time,
                    key=key,
                    series=message.series,
                    lead_minutes=message.lead_minutes,
                )
                for key, message in found.items()
            ),
        )

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        for data in pick(path, keys, lambda: _messages(path)):
            with _decoding(path, data) as (eccodes, handle):
                message = _describe(eccodes, handle)
                if message is None:
                    raise BadFileError(path, "one of the keys is no field of a known parameter")
                values_HW = _values(eccodes, handle, data, message)
            yield values_HW

    def _wanted(self, path: Path) -> tuple[dict[str, _Message], dict[str, int]]:
        """Return the known messages of the parameter, and how many there are of each other."""
        found: dict[str, _Message] = {}
        others: dict[str, int] = {}
        for key, data in _messages(path):
            with _decoding(path, data) as (eccodes, handle):
                message = _describe(eccodes, handle)
                triple = _text(_triple(eccodes, handle))
            if message is not None and self.parameter in ("", triple):
                found[key] = message
            else:
                others[triple] = others.get(triple, 0) + 1
        if not found:
            wanted = f"parameter {self.parameter}" if self.parameter else "known parameter"
            raise BadFileError(
                path,
                f"holds no message of a {wanted}; it has {', '.join(others) or 'none at all'} "
                "(discipline/category/number)",
            )
        return found, others


def _messages(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield number and bytes of every message, checked to be whole."""
    with opened(path) as stream:
        number = 0
        while head := stream.read(16):
            if not head.strip(b"\0 \r\n"):
                continue  # padding after the last message
            if not head.startswith(b"GRIB") or len(head) < 16:
                raise BadFileError(path, f"message {number} does not start with GRIB: {head!r}")
            if head[7] != 2:
                raise BadFileError(path, f"message {number} is of GRIB edition {head[7]}, not 2")
            length = int.from_bytes(head[8:16], "big")
            data = head + read_up_to(stream, length - 16)
            if len(data) != length or data[-4:] != b"7777":
                raise BadFileError(
                    path, f"message {number} is truncated: {len(data)} of {length} bytes"
                )
            fields = sum(section == 7 for section, _ in _sections(data))
            if fields != 1:
                raise BadFileError(
                    path,
                    f"message {number} packs {fields} fields into one; separate them first, with "
                    "grib_copy -w of eccodes or grib2 tools of the provider",
                )
            yield str(number), data
            number += 1


def _sections(data: bytes) -> Iterator[tuple[int, slice]]:
    """Yield number and place of each section after the first."""
    place = 16
    while place < len(data) - 4:
        length = int.from_bytes(data[place : place + 4], "big")
        if length < 5 or place + length > len(data) - 4:
            raise ValueError(f"a message has a section of {length} bytes at byte {place}")
        yield data[place + 4], slice(place, place + length)
        place += length


@contextmanager
def _decoding(path: Path, data: bytes) -> Iterator[tuple[ModuleType, Any]]:
    """Give a message to eccodes, and take it back."""
    eccodes = import_extra("eccodes", "radar", "Reading GRIB2")
    try:
        with reading(path):
            handle = eccodes.codes_new_from_message(data)
            try:
                yield eccodes, handle
            finally:
                eccodes.codes_release(handle)
    except (eccodes.CodesInternalError, MemoryError) as error:
        reason = str(error) or "it asks for more memory than there is"
        raise BadFileError(path, f"eccodes cannot decode it: {reason}") from error


def _triple(eccodes: ModuleType, handle: Any) -> Triple:
    names = ("discipline", "parameterCategory", "parameterNumber")
    discipline, category, number = (eccodes.codes_get_long(handle, name) for name in names)
    return discipline, category, number


def _text(triple: Triple) -> str:
    return "/".join(map(str, triple))


def _describe(eccodes: ModuleType, handle: Any) -> _Message | None:
    """Return the facts of a message; None of an unknown parameter."""
    triple = _triple(eccodes, handle)
    parameter = PARAMETERS.get(triple)
    if parameter is None:
        return None

    def number(name: str) -> int:
        return int(eccodes.codes_get_long(handle, name))

    parts = ("year", "month", "day", "hour", "minute", "second")
    year, month, day, hour, minute, second = map(number, parts)
    reference = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    unit = _MINUTES_OF_UNIT.get(number("indicatorOfUnitForForecastTime"), 0)
    time = reference + timedelta(minutes=number("forecastTime") * unit)
    if parameter.quantity == "accumulation" and parameter.accumulation_minutes is None:
        if not eccodes.codes_is_defined(handle, "lengthOfTimeRange"):
            raise ValueError(f"{parameter.name} does not say over which time")
        unit = _MINUTES_OF_UNIT.get(number("indicatorOfUnitForTimeRange"), 0)
        minutes = float(number("lengthOfTimeRange") * unit)
        if minutes <= 0:
            raise ValueError(f"{parameter.name} is over {minutes} minutes")
        parameter = parameter._replace(accumulation_minutes=minutes)
        time += timedelta(minutes=minutes)
    observed = number("typeOfGeneratingProcess") in _OBSERVED
    level = number("level") if eccodes.codes_is_defined(handle, "level") else 0
    return _Message(
        triple=triple,
        parameter=parameter,
        time=time,
        lead_minutes=0.0 if observed else max(0.0, (time - reference).total_seconds() / 60),
        grid=_grid(eccodes, handle),
        series=f"level-{level}" if level else "",
    )


def _grid(eccodes: ModuleType, handle: Any) -> Grid:
    """Return the grid with row 0 in the north; placed where it is regular in degrees."""

    def degrees(name: str) -> float:
        return float(eccodes.codes_get_double(handle, f"{name}InDegrees"))

    kind = eccodes.codes_get_string(handle, "gridType")
    width, height = _size(eccodes, handle)
    if kind != "regular_ll" or min(width, height) < 2:
        return Grid(height=height, width=width)
    firsts, lasts = (
        (degrees(f"longitudeOf{which}GridPoint"), degrees(f"latitudeOf{which}GridPoint"))
        for which in ("First", "Last")
    )
    span_x = (lasts[0] - firsts[0]) * (
        -1 if eccodes.codes_get_long(handle, "iScansNegatively") else 1
    )
    # Coordinates are rounded to the microdegree: thousands of pixels tell their size exactly.
    pixel_width = round(span_x % 360 / (width - 1), 7)
    pixel_height = round(abs(firsts[1] - lasts[1]) / (height - 1), 7)
    west = firsts[0] if span_x == lasts[0] - firsts[0] else lasts[0]
    return Grid(
        height=height,
        width=width,
        projection=f"+proj=longlat {_earth(eccodes, handle)} +no_defs",
        unit="degree",
        left=round((west + 180) % 360 - 180 - pixel_width / 2, 7),
        top=round(max(firsts[1], lasts[1]) + pixel_height / 2, 7),
        pixel_width=pixel_width,
        pixel_height=pixel_height,
    )


def _earth(eccodes: ModuleType, handle: Any) -> str:
    """Return the shape of the earth that the message's coordinates are on."""
    radius, major, minor = (
        eccodes.codes_get_double(handle, name) if eccodes.codes_is_defined(handle, name) else 0.0
        for name in ("radius", "earthMajorAxis", "earthMinorAxis")
    )
    # Below 0 where the message leaves it open.
    if radius > 0:
        return f"+R={radius:.10g}"
    return f"+a={major:.10g} +b={minor:.10g}" if major > 0 and minor > 0 else "+datum=WGS84"


def _size(eccodes: ModuleType, handle: Any) -> tuple[int, int]:
    """Return width and height."""
    names = ("Ni", "Nj") if eccodes.codes_is_defined(handle, "Ni") else ("Nx", "Ny")
    width, height = (int(eccodes.codes_get_long(handle, name)) for name in names)
    if (
        width < 1
        or height < 1
        or width * height != eccodes.codes_get_long(handle, "numberOfDataPoints")
    ):
        raise ValueError(f"is no rectangular grid: {height}x{width} points")
    return width, height


def _values(
    eccodes: ModuleType, handle: Any, data: bytes, message: _Message
) -> NDArray[np.float32]:
    """Decode the field of a message; row 0 north, column 0 west."""
    width, height = _size(eccodes, handle)
    flag = {
        name: bool(eccodes.codes_get_long(handle, name))
        for name in (
            *("iScansNegatively", "jScansPositively", "jPointsAreConsecutive"),
            "alternativeRowScanning",
        )
    }
    shape = (width, height) if flag["jPointsAreConsecutive"] else (height, width)
    codes = _png_codes(eccodes, handle, data, shape)
    if codes is not None:
        packed = np.arange(256**codes.dtype.itemsize, dtype=np.float64)
        reference, binary, decimal = (
            eccodes.codes_get_double(handle, name)
            for name in ("referenceValue", "binaryScaleFactor", "decimalScaleFactor")
        )
        table = (reference + packed * 2.0**binary) / 10.0**decimal
        values_HW = look_up(_physical(table, message), codes)
    else:
        if eccodes.codes_get_size(handle, "values") != width * height:
            raise ValueError(f"does not hold the {height}x{width} values of its grid")
        eccodes.codes_set_double(handle, "missingValue", _MISSING_VALUE)
        doubles = eccodes.codes_get_values(handle)
        values_HW = _physical(doubles, message).reshape(shape)
    if flag["alternativeRowScanning"]:
        values_HW[1::2] = values_HW[1::2, ::-1].copy()
    if flag["jPointsAreConsecutive"]:
        values_HW = values_HW.T
    if flag["iScansNegatively"]:
        values_HW = values_HW[:, ::-1]
    return np.ascontiguousarray(values_HW[::-1] if flag["jScansPositively"] else values_HW)


def _png_codes(
    eccodes: ModuleType, handle: Any, data: bytes, shape: tuple[int, int]
) -> NDArray[Any] | None:
    """Return the packed numbers of a field that is one grey PNG without bitmap, else None.

    Raises:
        ValueError: the PNG is not what the message says of it. eccodes must not see such a one:
            it ends the process.
    """
    if eccodes.codes_get_long(handle, "dataRepresentationTemplateNumber") != _PNG_TEMPLATE:
        return None
    bits = int(eccodes.codes_get_long(handle, "bitsPerValue"))
    if bits == 0:  # a constant field, of which there is no PNG
        return None
    png = next(data[place][5:] for number, place in _sections(data) if number == 7)
    depth, colours = png[24:26] if len(png) > 25 else (0, 0)
    if depth * {0: 1, 2: 3, 6: 4}.get(colours, 0) != -(-bits // 8) * 8:
        raise ValueError(f"packs {bits} bits a value as a PNG of {depth} bits, type {colours}")
    if eccodes.codes_get_long(handle, "bitMapIndicator") != 255:
        return None
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if image.size != shape[::-1]:
            raise ValueError(f"packs {shape[0]}x{shape[1]} values as a PNG of size {image.size}")
        codes = np.asarray(image)
    return codes if codes.dtype in (np.uint8, np.uint16) and codes.ndim == 2 else None


def _physical(stored: NDArray[np.float64], message: _Message) -> NDArray[np.float32]:
    """Turn a message's numbers into the quantity's unit; flags become NaN or "no echo"."""
    parameter = message.parameter
    values = (stored * parameter.factor).astype(np.float32)
    if message.triple[0] != _MRMS_DISCIPLINE:
        if parameter.quantity != "reflectivity":
            np.maximum(values, 0, out=values)
    elif parameter.quantity == "reflectivity":
        values[stored <= _MRMS_NO_ECHO] = NO_ECHO_DBZ
        values[stored <= _MRMS_NO_COVERAGE] = np.nan
    else:
        values[stored < 0] = np.nan
    values[stored >= _MISSING_VALUE] = np.nan
    return values


def _missing_rule(triple: Triple, parameter: Parameter) -> str:
    if triple[0] != _MRMS_DISCIPLINE:
        rest = "" if parameter.quantity == "reflectivity" else " Values below 0 by packing are 0."
        return f"Points outside the message's bitmap are not observed.{rest}"
    if parameter.quantity == "reflectivity":
        return (
            f"-999 is outside coverage; -99, covered and below detection, is no echo "
            f"({NO_ECHO_DBZ:g} dBZ)."
        )
    return "-3 is outside coverage, -1 is missing; 0 is no rain or nothing measured."
