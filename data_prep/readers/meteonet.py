"""Meteo-France's MeteoNet: many radar fields of one zone in one npz, with a pickle of their dates.

The npz is read as a stream, one field at a time. Its dates are pickled Python objects. A pickle is
a program, so it is never run as one: the only names that it may call are answered by stand-ins that
can build nothing but dates, and any other name refuses the file.

Products, after MeteoNet's documentation: rainfall (1/100 mm in 5 minutes), reflectivity_old
(classes in dBZ) and reflectivity_new (1/10 dBZ). Quality codes are not read.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.radar import BadFileError, Quantity, RadarFile, RadarFrame
from data_prep.readers.raw import look_up, pick, reading
from tmu_dist.data.manifest import Grid, SourceCard

_NAME = re.compile(
    r"(?P<product>rainfall|reflectivity_old|reflectivity_new)_(?P<zone>[A-Z]+)_\d{4}"
)
_DATA, _DATES = "data.npy", "dates.npy"
_MAX_DATES_BYTES = 2**26
_PIXEL_DEGREES = 0.01


class _Product(NamedTuple):
    quantity: Quantity
    per_unit: int
    """Stored numbers per unit of the quantity."""
    missing: int
    rule: str
    note: str


_PRODUCTS = {
    "rainfall": _Product(
        "accumulation",
        100,
        -1,
        "-1 is missing; 0 is no rain.",
        "Rain accumulated in 5 minutes, in steps of 0.01 mm.",
    ),
    "reflectivity_old": _Product(
        "reflectivity",
        1,
        255,
        "255 is missing; 0, the class below 8 dBZ, is no echo.",
        "Classes: a value is the lower end of its class (0, 8, 16, 20, 21 ... 70 dBZ).",
    ),
    "reflectivity_new": _Product(
        "reflectivity",
        10,
        -200,
        "-200 is missing; -100, nothing detected, is no echo (-10 dBZ).",
        "Steps of 0.5 dBZ from -9 dBZ; rain probability and measuring height are not read.",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MeteoNetReader:
    """Reads rainfall_ZONE_*.npz and reflectivity_*_ZONE_*.npz; each zone is a series."""

    name: ClassVar[str] = "meteonet"
    extra: ClassVar[str | None] = None
    patterns: ClassVar[tuple[str, ...]] = (
        *("rainfall_[a-z][a-z]_*.npz", "reflectivity_old_*.npz", "reflectivity_new_*.npz"),
    )
    source: ClassVar[SourceCard] = SourceCard(
        name="MeteoNet radar",
        provider="Meteo-France",
        licence="Etalab Open Licence 2.0",
        citation=(
            "Larvor, Berthomier, Chabot, Le Pape, Pradel, Perez: MeteoNet, an open reference "
            "weather dataset by METEO FRANCE, 2020"
        ),
    )

    def recognises(self, path: Path) -> bool:
        if not _NAME.match(path.name):
            return False
        try:
            with reading(path), zipfile.ZipFile(path) as archive:
                return {_DATA, _DATES} <= set(archive.namelist())
        except BadFileError:
            return False

    def scan(self, path: Path) -> RadarFile:
        product, zone = _product(path)
        with reading(path), zipfile.ZipFile(path) as archive:
            with archive.open(_DATA) as stream:
                shape, _ = _array_header(stream)
            if archive.getinfo(_DATES).file_size > _MAX_DATES_BYTES:
                raise ValueError(f"its dates take more than {_MAX_DATES_BYTES} bytes")
            dates = _dates(archive.read(_DATES))
        count, height, width = shape
        if len(dates) != count:
            raise BadFileError(path, f"has {count} fields, but {len(dates)} dates")
        grid, note = _grid(path.with_name(f"radar_coords_{zone}.npz"), height, width)
        return RadarFile(
            quantity=product.quantity,
            interval_minutes=5.0,
            accumulation_minutes=5.0 if product.quantity == "accumulation" else None,
            grid=grid,
            missing_rule=product.rule,
            notes=(product.note, *note),
            frames=tuple(
                RadarFrame(time=date, key=str(index), series=zone)
                for index, date in enumerate(dates)
            ),
        )

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        product, _ = _product(path)
        for codes_HW in pick(path, keys, lambda: _fields(path)):
            if codes_HW.dtype.itemsize <= 2:
                yield look_up(
                    _table(codes_HW.dtype.str, product.per_unit, product.missing), codes_HW
                )
            else:
                values_HW = codes_HW.astype(np.float32) / np.float32(product.per_unit)
                values_HW[codes_HW == product.missing] = np.nan
                yield values_HW


def _product(path: Path) -> tuple[_Product, str]:
    """Return the product and zone that the file's name tells; nothing else does."""
    name = _NAME.match(path.name)
    if name is None:
        raise BadFileError(
            path,
            f"only the name says what a MeteoNet file holds; it must start with one of "
            f"{', '.join(_PRODUCTS)}, then the zone and year, such as rainfall_NW_2016_08.3.npz",
        )
    return _PRODUCTS[name["product"]], name["zone"]


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    """Read the npy header of the fields: their number, height and width, and the type."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran_order, dtype = read(stream)
    if len(shape) != 3 or fortran_order or dtype.kind not in "iuf" or min(shape) < 1:
        raise ValueError(f"{_DATA} holds {dtype} of shape {shape}, not fields [time, lat, lon]")
    return shape, dtype


def _fields(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield index and stored numbers of every field."""
    with reading(path), zipfile.ZipFile(path) as archive, archive.open(_DATA) as stream:
        (count, height, width), dtype = _array_header(stream)
        num_bytes = height * width * dtype.itemsize
        for index in range(count):
            data = stream.read(num_bytes)
            if len(data) != num_bytes:
                raise ValueError(f"is truncated within field {index} of {count}")
            yield str(index), np.frombuffer(data, dtype).reshape(height, width)


@cache
def _table(dtype: str, per_unit: int, missing: int) -> NDArray[np.float32]:
    """The value of every number that a type of one or two bytes can hold."""
    kind = np.dtype(dtype).newbyteorder("=")
    stored = np.arange(256**kind.itemsize).astype(f"u{kind.itemsize}").view(kind)
    values = stored / per_unit
    values[stored == missing] = np.nan
    return values.astype(np.float32)


def _dates(npy: bytes) -> list[datetime]:
    """Return the dates (UTC) of an npy file: datetime64, or a pickle of datetimes."""
    stream = io.BytesIO(npy)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"{_DATES} is of npy version {version}, not (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind == "M":
        moments = np.frombuffer(stream.read(), dtype).astype("datetime64[s]").astype(object)
        return [moment.replace(tzinfo=UTC) for moment in moments.tolist()]
    if dtype.kind != "O" or len(shape) != 1:
        raise ValueError(f"{_DATES} holds {dtype} of shape {shape}, not a list of dates")
    dates = _unpickled(stream)
    if len(dates) != shape[0] or not all(isinstance(date, datetime) for date in dates):
        raise ValueError(f"{_DATES} does not hold {shape[0]} dates")
    return dates


def _unpickled(stream: io.BytesIO) -> list[datetime]:
    """Follow the pickle of an object array of datetimes, with stand-ins for all that it names.

    The stand-ins are made anew for each file: a pickle may set attributes of what it is given.

    Raises:
        ValueError: it names anything else, or is no such pickle.
    """

    class Array:
        def __init__(self, *_: object) -> None:
            self.items: list[datetime] = []

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.items = list(state[-1])

    class DType:
        def __init__(self, *_: object) -> None: ...

        def __setstate__(self, state: object) -> None: ...

    def make_array(*_: object) -> Array:
        return Array()

    def make_datetime(packed: bytes) -> datetime:
        # Ten bytes: year (two of them), month, day, hour, minute, second, microsecond.
        year_high, year_low, month, day, hour, minute, second = packed[:7]
        return datetime(year_high * 256 + year_low, month, day, hour, minute, second, tzinfo=UTC)

    stand_ins = {
        "numpy.core.multiarray._reconstruct": make_array,
        "numpy._core.multiarray._reconstruct": make_array,
        "numpy.ndarray": Array,
        "numpy.dtype": DType,
        "datetime.datetime": make_datetime,
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str) -> Any:
            wanted = f"{module_name}.{global_name}"
            if wanted not in stand_ins:
                raise ValueError(
                    f"the pickle in {_DATES} calls {wanted}, which dates do not need: the file "
                    "may be malicious, and is not read"
                )
            return stand_ins[wanted]

    try:
        array = Unpickler(stream).load()
        return list(array.items)
    except (pickle.UnpicklingError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"the pickle in {_DATES} is no array of dates ({error})") from error


def _grid(coordinates: Path, height: int, width: int) -> tuple[Grid, tuple[str, ...]]:
    """Return the grid, placed by the zone's file of pixel centres where that lies beside."""
    unplaced = Grid(height=height, width=width)
    if not coordinates.is_file():
        return unplaced, (f"{coordinates.name} is not beside the file: the grid is not placed.",)
    with reading(coordinates), np.load(coordinates, allow_pickle=False) as arrays:
        lats_HW, lons_HW = arrays["lats"], arrays["lons"]
    if lats_HW.shape != (height, width) or lons_HW.shape != (height, width):
        return unplaced, (f"{coordinates.name} is of another grid: the grid is not placed.",)
    top, left = float(lats_HW[0, 0]), float(lons_HW[0, 0])
    expected_lats_H = top - _PIXEL_DEGREES * np.arange(height)
    expected_lons_W = left + _PIXEL_DEGREES * np.arange(width)
    off = max(
        float(np.abs(lats_HW - expected_lats_H[:, None]).max()),
        float(np.abs(lons_HW - expected_lons_W).max()),
    )
    if not math.isfinite(off) or off > _PIXEL_DEGREES / 10:
        return unplaced, (f"{coordinates.name} is no regular grid: the grid is not placed.",)
    return Grid(
        height=height,
        width=width,
        projection="EPSG:4326",
        unit="degree",
        left=round(left - _PIXEL_DEGREES / 2, 6),
        top=round(top + _PIXEL_DEGREES / 2, 6),
        pixel_width=_PIXEL_DEGREES,
        pixel_height=_PIXEL_DEGREES,
    ), ()
