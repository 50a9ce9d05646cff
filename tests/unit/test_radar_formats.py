"""RADOLAN, GRIB2 and MeteoNet files that the tests write: what the real ones do not hold."""

from __future__ import annotations

import bz2
import gzip
import io
import math
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.readers.grib2 import GRIB2Reader
from data_prep.readers.meteonet import MeteoNetReader
from data_prep.readers.radar import NO_ECHO_DBZ, BadFileError
from data_prep.readers.radolan import RADOLANReader
from tests.radar_contract import check_radar_reader
from tests.unit.test_radar_readers import only_field

RNG = np.random.default_rng(7)


# --- RADOLAN ---


def radolan(
    product: str,
    codes_HW: np.ndarray,
    *,
    precision: str = "E-01",
    interval: str = "  60",
    version: int = 3,
    lead: str = "",
    stamp: str = "1807501000010 22".replace(" ", ""),
) -> bytes:
    """A composite in DWD's binary format; codes_HW has row 0 in the north."""
    height, width = codes_HW.shape
    pixels = np.ascontiguousarray(codes_HW[::-1]).tobytes()
    rest = (
        f"VS{version:2}SW   2.13.1PR {precision}INT{interval}GP{height:4}x{width:4}{lead}"
        "MS 12<asb,boo,VV 99>"
    )
    size = len(f"{product}{stamp}BY{0:10}{rest}") + 1 + len(pixels)
    return f"{product}{stamp}BY{size:10}{rest}".encode() + b"\x03" + pixels


def rain_codes(height: int = 900, width: int = 900) -> np.ndarray:
    return RNG.integers(0, 300, (height, width)).astype("<u2")


def test_radolan_rain_keeps_the_contract(tmp_path):
    codes_HW = rain_codes()
    path = tmp_path / "raa01-rw_10000-2210180750-dwd---bin"
    path.write_bytes(radolan("RW", codes_HW))
    scanned = check_radar_reader(
        RADOLANReader(), path, quantity="accumulation", interval_minutes=60, shape=(900, 900)
    )
    assert scanned.accumulation_minutes == 60
    assert scanned.frames[0].time == datetime(2022, 10, 18, 7, 50, tzinfo=UTC)
    assert scanned.frames[0].lead_minutes == 0, "a station's name was taken for a token"
    np.testing.assert_allclose(only_field(RADOLANReader(), path), codes_HW / 10, rtol=1e-6)


def test_radolan_flags(tmp_path):
    codes_HW = np.zeros((900, 900), "<u2")
    codes_HW[0, :6] = [0, 25, 25 | 0x1000, 25 | 0x4000, 2490 | 0x8000, 2500 | 0x2000]
    path = tmp_path / "raa01-ry"
    path.write_bytes(radolan("RY", codes_HW, precision="E-02", interval="   5"))
    values_HW = only_field(RADOLANReader(), path)
    np.testing.assert_allclose(values_HW[0, :3], [0, 0.25, 0.25], rtol=1e-6)
    assert np.isnan(values_HW[0, 3:6]).all()
    assert np.isnan(values_HW).sum() == 3
    assert RADOLANReader().scan(path).accumulation_minutes == 5


def test_radolan_reflectivity_of_8_and_16_bits(tmp_path):
    codes_HW = np.full((900, 900), 100, np.uint8)
    codes_HW[0, :4] = [0, 250, 249, 200]
    path = tmp_path / "raa01-rx"
    path.write_bytes(radolan("RX", codes_HW, precision="E+00", interval="   5"))
    scanned = RADOLANReader().scan(path)
    assert (scanned.quantity, scanned.accumulation_minutes) == ("reflectivity", None)
    values_HW = only_field(RADOLANReader(), path)
    np.testing.assert_array_equal(values_HW[0, :4], [-32.5, np.nan, np.nan, 67.5])
    assert values_HW[5, 5] == 17.5

    wide_HW = np.full((1200, 1100), 1000, "<u2")
    wide_HW[0, 0] = 0x2000 | 2500
    path.write_bytes(radolan("WN", wide_HW, interval="   5", version=5))
    values_HW = only_field(RADOLANReader(), path)
    assert np.isnan(values_HW[0, 0]) and values_HW[1, 1] == 17.5


def sphere_corner(height: int, width: int) -> tuple[float, float]:
    """Lower left corner from DWD's reference point, 9 E 51 N, and its place in the grid."""
    scale = 6370.04 * (1 + math.sin(math.radians(60))) / (1 + math.sin(math.radians(51)))
    radius = scale * math.cos(math.radians(51)) * 1000
    x, y = radius * math.sin(math.radians(-1)), -radius * math.cos(math.radians(-1))
    columns = {900: 450, 1100: 470, 1400: 600}[width] if height != 1100 else 370
    rows = {900: 450, 1100: 550, 1200: 600, 1500: 800}[height]
    return x - columns * 1000, y - rows * 1000


@pytest.mark.parametrize("shape", [(900, 900), (1100, 900), (1200, 1100), (1500, 1400)])
def test_radolan_grids_on_the_sphere(shape, tmp_path):
    path = tmp_path / "raa01-rw"
    path.write_bytes(radolan("RW", rain_codes(*shape)))
    grid = RADOLANReader().scan(path).grid
    left, bottom = sphere_corner(*shape)
    assert grid.left == pytest.approx(left, abs=1)
    assert grid.top - grid.height * grid.pixel_height == pytest.approx(bottom, abs=1)


def test_radvor_grid_on_the_ellipsoid(tmp_path):
    path = tmp_path / "DE1200_RV"
    path.write_bytes(radolan("RV", rain_codes(1200, 1100), version=5, lead="VV 005"))
    scanned = RADOLANReader().scan(path)
    assert (scanned.grid.left, scanned.grid.top) == (-500, 500)
    # DWD gives the lower left corner as 45.69642538 N, 3.566994635 E.
    axis, eccentricity = 6378137.0, math.sqrt(1 - (6356752.3142451802 / 6378137.0) ** 2)

    def isometric(lat: float) -> float:
        sine = eccentricity * math.sin(lat)
        return math.tan(math.pi / 4 - lat / 2) / ((1 - sine) / (1 + sine)) ** (eccentricity / 2)

    lat_ts = math.radians(60)
    factor = math.cos(lat_ts) / math.sqrt(1 - (eccentricity * math.sin(lat_ts)) ** 2)
    radius = axis * factor * isometric(math.radians(45.69642538)) / isometric(lat_ts)
    angle = math.radians(3.566994635 - 10)
    left = radius * math.sin(angle) + 543196.83521776402
    bottom = -radius * math.cos(angle) + 3622588.8619310018
    assert scanned.grid.left == pytest.approx(left, abs=0.1)
    assert scanned.grid.top - 1_200_000 == pytest.approx(bottom, abs=0.1)
    assert scanned.frames[0].time == datetime(2022, 10, 18, 7, 55, tzinfo=UTC)
    assert scanned.frames[0].lead_minutes == 5


def tar_of(members: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def hours(count: int) -> dict[str, bytes]:
    return {
        f"rw-{hour:02}": radolan("RW", rain_codes(90, 80), stamp=f"18{hour:02}50100001022")
        for hour in range(count)
    }


@pytest.mark.parametrize(
    ("pack", "mode"),
    [(gzip.compress, "w"), (bz2.compress, "w:gz"), (lambda data: tar_of({"x": data}, "w"), "w")],
    ids=["gz in tar", "bz2 in tar.gz", "tar in tar"],
)
def test_radolan_wrappers_within_wrappers(tmp_path, pack: Callable[[bytes], bytes], mode):
    plain = hours(3)
    path = tmp_path / "RW-20221018.tar.gz"  # the name need not tell the truth
    path.write_bytes(tar_of({name: pack(data) for name, data in plain.items()}, mode))
    reader = RADOLANReader()
    scanned = check_radar_reader(reader, path, quantity="accumulation")
    assert [frame.time.hour for frame in scanned.frames] == [0, 1, 2]
    single = tmp_path / "single"
    single.write_bytes(plain["rw-01"])
    (values_HW,) = reader.fields(path, [scanned.frames[1].key])
    np.testing.assert_array_equal(values_HW, only_field(reader, single))


def test_a_tar_cut_between_two_members_is_noticed(tmp_path):
    path = tmp_path / "RW.tar"
    whole = tar_of(hours(2), "w")
    one_member = 512 + -(-len(hours(1)["rw-00"]) // 512) * 512
    path.write_bytes(whole[:one_member])
    with pytest.raises(BadFileError, match="truncated"):
        RADOLANReader().scan(path)


def test_radolan_archives_hold_one_kind(tmp_path):
    path = tmp_path / "mixed.tar"
    other = radolan("RY", rain_codes(90, 80), precision="E-02", interval="   5")
    path.write_bytes(tar_of({**hours(1), "ry": other}, "w"))
    with pytest.raises(BadFileError, match="rw-00 and ry"):
        RADOLANReader().scan(path)
    path.write_bytes(tar_of({"README": b"hello", **hours(1)}, "w"))
    assert "1 other files" in " ".join(RADOLANReader().scan(path).notes)


def test_radolan_refuses_what_it_does_not_know(tmp_path):
    path = tmp_path / "raa01"
    path.write_bytes(radolan("XX", rain_codes()))
    with pytest.raises(BadFileError, match="product XX, which is not read; known are"):
        RADOLANReader().scan(path)
    path.write_bytes(radolan("RW", rain_codes()) + b"\0\0")
    with pytest.raises(BadFileError, match="its header says"):
        list(RADOLANReader().fields(path, [""]))
    text = (
        b"ncols 2\nnrows 2\nxllcorner 0\nyllcorner 0\ncellsize 1000\nNODATA_value -9\n0 1\n-9 2\n"
    )
    path = tmp_path / "YW_2017.002_20230101_0525.asc"
    path.write_bytes(text)
    with pytest.raises(BadFileError, match="ascii_unit_mm"):
        RADOLANReader().scan(path)
    reader = RADOLANReader(ascii_unit_mm=0.01)
    np.testing.assert_allclose(only_field(reader, path), [[0, 0.01], [np.nan, 0.02]], rtol=1e-6)
    path.write_bytes(text.replace(b"-9 2", b"-8 2"))
    with pytest.raises(BadFileError, match="below 0"):
        only_field(reader, path)
    with pytest.raises(ValueError, match="ascii_unit_mm must be positive"):
        RADOLANReader(ascii_unit_mm=0)


# --- GRIB2 ---


def grib(values_HW: np.ndarray, settings: dict[str, Any] | None = None) -> bytes:
    """One message on a grid of 0.5 degrees from 10 W 50 N, values in tenths, packed as PNG."""
    eccodes = pytest.importorskip("eccodes")
    height, width = values_HW.shape
    handle = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
    facts = {
        "discipline": 209,
        "parameterCategory": 6,
        "parameterNumber": 1,
        "dataDate": 20190610,
        "dataTime": 230,
        "typeOfGeneratingProcess": 8,
        "decimalPrecision": 1,
        "Ni": width,
        "Nj": height,
        "iDirectionIncrementInDegrees": 0.5,
        "jDirectionIncrementInDegrees": 0.5,
        "latitudeOfFirstGridPointInDegrees": 50.0,
        "longitudeOfFirstGridPointInDegrees": 350.0,
        "latitudeOfLastGridPointInDegrees": 50.0 - 0.5 * (height - 1),
        "longitudeOfLastGridPointInDegrees": (350.0 + 0.5 * (width - 1)) % 360,
        **(settings or {}),
    }
    packing = facts.pop("packingType", "grid_png")
    for key, value in facts.items():
        eccodes.codes_set(handle, key, value)
    eccodes.codes_set_values(handle, values_HW.astype(float).ravel())
    data = eccodes.codes_get_message(handle)
    eccodes.codes_release(handle)
    return as_png(data, values_HW) if packing == "grid_png" else data


def as_png(message: bytes, values_HW: np.ndarray) -> bytes:
    """Pack tenths as MRMS does: template 5.41, one grey PNG of 16 bits (eccodes fails to)."""
    tenths_HW = np.rint(values_HW * 10).astype(int)
    reference = tenths_HW.min()
    picture = io.BytesIO()
    Image.fromarray((tenths_HW - reference).astype(np.uint16)).save(picture, "PNG")
    png = picture.getvalue()
    parts, place = [message[:16]], 16
    while place < len(message) - 4:
        length, number = struct.unpack_from(">IB", message, place)
        section = message[place : place + length]
        if number == 5:
            section = section[:9] + struct.pack(">HfHHBB", 41, reference, 0, 1, 16, 0)
            section = struct.pack(">I", len(section)) + section[4:]
        elif number == 7:
            section = struct.pack(">IB", 5 + len(png), 7) + png
        parts.append(section)
        place += length
    whole = b"".join(parts) + b"7777"
    return whole[:8] + struct.pack(">Q", len(whole)) + whole[16:]


MERGED_REFLECTIVITY = {
    "parameterCategory": 10,
    "parameterNumber": 0,
    "typeOfFirstFixedSurface": 102,
}


def rain(height: int = 40, width: int = 60) -> np.ndarray:
    return RNG.integers(0, 500, (height, width)) / 10


def test_grib2_keeps_the_contract_in_a_wrapper(tmp_path):
    path = tmp_path / "MRMS_PrecipRate_00.00_20190610-023000.grib2.gz"
    path.write_bytes(gzip.compress(grib(rain()), mtime=0))
    scanned = check_radar_reader(
        GRIB2Reader(), path, quantity="rain_rate", interval_minutes=2, shape=(40, 60)
    )
    assert scanned.frames[0].time == datetime(2019, 6, 10, 2, 30, tzinfo=UTC)
    grid = scanned.grid
    assert (grid.left, grid.top, grid.pixel_width) == (-10.25, 50.25, 0.5)


SOUTH_FIRST = {
    "jScansPositively": 1,
    "latitudeOfFirstGridPointInDegrees": 48.5,
    "latitudeOfLastGridPointInDegrees": 50.0,
}
COLUMNS_FIRST = {
    "jPointsAreConsecutive": 1,
    "latitudeOfLastGridPointInDegrees": 48.5,
    "longitudeOfLastGridPointInDegrees": 352.5,
}
EAST_FIRST = {
    "iScansNegatively": 1,
    "longitudeOfFirstGridPointInDegrees": 352.5,
    "longitudeOfLastGridPointInDegrees": 350.0,
}


@pytest.mark.parametrize("packing", ["grid_png", "grid_simple"])
@pytest.mark.parametrize(
    ("flags", "stored"),
    [
        ({}, lambda values_HW: values_HW),
        (SOUTH_FIRST, lambda values_HW: values_HW[::-1]),
        (EAST_FIRST, lambda values_HW: values_HW[:, ::-1]),
        (SOUTH_FIRST | EAST_FIRST, lambda values_HW: values_HW[::-1, ::-1]),
        (
            {"alternativeRowScanning": 1},
            lambda values_HW: np.array([row[:: (-1) ** n] for n, row in enumerate(values_HW)]),
        ),
        (COLUMNS_FIRST, lambda values_HW: values_HW.T),
    ],
)
def test_grib2_rows_come_north_first_whatever_the_scanning(tmp_path, packing, flags, stored):
    values_HW = rain(4, 6)
    values_HW[0, 0], values_HW[1, 2] = -3, -1
    path = tmp_path / "rain.grib2"
    stored_HW = np.ascontiguousarray(stored(values_HW))
    facts = {**flags, "packingType": packing, "Ni": 6, "Nj": 4}
    path.write_bytes(grib(stored_HW, facts))
    expected_HW = np.where(values_HW < 0, np.nan, values_HW)
    np.testing.assert_allclose(only_field(GRIB2Reader(), path), expected_HW, atol=0.06)
    grid = GRIB2Reader().scan(path).grid
    assert (grid.left, grid.top) == (-10.25, 50.25)


def test_grib2_reflectivity_without_echo_is_observed(tmp_path):
    values_HW = rain() / 2
    values_HW[0, :2] = [-999, -99]
    path = tmp_path / "reflectivity.grib2"
    path.write_bytes(grib(values_HW, MERGED_REFLECTIVITY | {"level": 500}))
    scanned = GRIB2Reader().scan(path)
    assert scanned.quantity == "reflectivity" and scanned.frames[0].series == "level-500"
    read_HW = only_field(GRIB2Reader(), path)
    assert np.isnan(read_HW[0, 0]) and read_HW[0, 1] == NO_ECHO_DBZ
    np.testing.assert_allclose(read_HW[1:], values_HW[1:], atol=0.06)
    assert np.isnan(read_HW).sum() == 1


def test_grib2_rates_per_second_and_bitmaps(tmp_path):
    """Of a discipline that GRIB itself knows: total precipitation rate in kg m-2 s-1."""
    values_HW = rain() / 3600
    values_HW[3, 4], values_HW[5, 6] = 9999, -1e-7
    settings = {
        "discipline": 0,
        "parameterCategory": 1,
        "parameterNumber": 52,
        "packingType": "grid_simple",
        "bitmapPresent": 1,
        "missingValue": 9999,
        "decimalPrecision": 8,
        "typeOfGeneratingProcess": 2,
        "indicatorOfUnitForForecastTime": 0,
        "forecastTime": 45,
    }
    path = tmp_path / "model.grib2"
    path.write_bytes(grib(values_HW, settings))
    frame = GRIB2Reader().scan(path).frames[0]
    assert frame.lead_minutes == 45 and frame.time == datetime(2019, 6, 10, 3, 15, tzinfo=UTC)
    read_HW = only_field(GRIB2Reader(), path)
    assert np.isnan(read_HW[3, 4]) and np.isnan(read_HW).sum() == 1
    assert read_HW[5, 6] == 0
    np.testing.assert_allclose(read_HW[10:], values_HW[10:] * 3600, atol=0.01)


def test_grib2_messages_of_one_parameter_are_the_fields_of_a_file(tmp_path):
    fields = [rain() for _ in range(3)]
    other = grib(rain(), {"parameterCategory": 8, "parameterNumber": 0})
    reflectivity = grib(rain(), MERGED_REFLECTIVITY)
    times = [grib(field, {"dataTime": 230 + 2 * n}) for n, field in enumerate(fields)]
    path = tmp_path / "many.grib2"
    path.write_bytes(times[0] + other + times[1] + times[2])
    scanned = check_radar_reader(GRIB2Reader(), path, quantity="rain_rate")
    assert [frame.key for frame in scanned.frames] == ["0", "2", "3"]
    assert [frame.time.minute for frame in scanned.frames] == [30, 32, 34]
    assert "1 messages of other parameters" in " ".join(scanned.notes)
    with pytest.raises(BadFileError):
        list(GRIB2Reader().fields(path, ["1"]))

    path.write_bytes(times[0] + reflectivity)
    with pytest.raises(BadFileError, match="209/10/0 .*Choose one with the option parameter"):
        GRIB2Reader().scan(path)
    assert GRIB2Reader(parameter="209/10/0").scan(path).quantity == "reflectivity"
    path.write_bytes(other)
    with pytest.raises(BadFileError, match="it has 209/8/0"):
        GRIB2Reader().scan(path)
    with pytest.raises(ValueError, match="DISCIPLINE/CATEGORY/NUMBER"):
        GRIB2Reader(parameter="rain")


def test_grib2_gives_back_every_message(tmp_path, monkeypatch):
    """What eccodes holds is not Python's to collect."""
    eccodes = pytest.importorskip("eccodes")
    path = tmp_path / "many.grib2"
    path.write_bytes(grib(rain()) * 3)
    held: list[str] = []
    create, release = eccodes.codes_new_from_message, eccodes.codes_release
    monkeypatch.setattr(
        eccodes, "codes_new_from_message", lambda data: held.append("") or create(data)
    )
    monkeypatch.setattr(eccodes, "codes_release", lambda handle: held.pop() or release(handle))
    reader = GRIB2Reader()
    keys = [frame.key for frame in reader.scan(path).frames]
    next(reader.fields(path, keys))
    assert not held

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(eccodes, "codes_get_string", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.scan(path)
    assert not held


def test_grib2_with_several_fields_in_one_message_is_refused(tmp_path):
    message = grib(rain(), {"packingType": "grid_simple"})
    sections, place = [], 16
    while place < len(message) - 4:
        (length,) = struct.unpack_from(">I", message, place)
        sections.append(message[place : place + length])
        place += length
    # Sections 4 to 7 may come again for another field on the same grid.
    body = b"".join(sections + [section for section in sections if section[4] >= 4])
    whole = message[:8] + struct.pack(">Q", 16 + len(body) + 4) + body + b"7777"
    path = tmp_path / "two.grib2"
    path.write_bytes(whole)
    with pytest.raises(BadFileError, match="packs 2 fields into one"):
        GRIB2Reader().scan(path)


def test_grib_of_the_first_edition_is_named(tmp_path):
    path = tmp_path / "old.grib"
    path.write_bytes(b"GRIB\0\0\x50\x01" + bytes(100))
    assert not GRIB2Reader().recognises(path)
    with pytest.raises(BadFileError, match="edition 1"):
        GRIB2Reader().scan(path)


# --- MeteoNet ---


def meteonet(
    path: Path, stored_THW: np.ndarray, dates: bytes | list[datetime], **compression: Any
) -> None:
    """Write an npz as MeteoNet's; `dates` as bytes is the whole member."""
    data, dates_npy = io.BytesIO(), io.BytesIO()
    np.save(data, stored_THW)
    if isinstance(dates, list):
        np.save(dates_npy, np.array(dates), allow_pickle=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", data.getvalue())
        archive.writestr("dates.npy", dates if isinstance(dates, bytes) else dates_npy.getvalue())


DATES = [datetime(2018, 12, 11, 3, 5 * n) for n in range(3)]


def test_the_new_reflectivity_of_meteonet(tmp_path):
    stored_THW = RNG.integers(-90, 500, (3, 20, 30)).astype(np.int16)
    stored_THW[0, 0, :2] = [-200, -100]
    path = tmp_path / "reflectivity_new_SE_2018_12.2.npz"
    meteonet(path, stored_THW, DATES)
    scanned = check_radar_reader(
        MeteoNetReader(), path, quantity="reflectivity", interval_minutes=5, shape=(20, 30)
    )
    assert [frame.time.replace(tzinfo=None) for frame in scanned.frames] == DATES
    assert "not beside" in " ".join(scanned.notes) and scanned.grid.unit is None
    (values_HW,) = MeteoNetReader().fields(path, ["0"])
    assert np.isnan(values_HW[0, 0]) and values_HW[0, 1] == -10
    np.testing.assert_allclose(values_HW[1:], stored_THW[0, 1:] / 10, rtol=1e-6)


def test_dates_without_a_pickle_are_read(tmp_path):
    dates_npy = io.BytesIO()
    np.save(dates_npy, np.array(DATES, dtype="datetime64[us]"))
    path = tmp_path / "rainfall_NW_2018_12.2.npz"
    meteonet(path, np.zeros((3, 4, 5), np.int16), dates_npy.getvalue())
    frames = MeteoNetReader().scan(path).frames
    assert [frame.time.replace(tzinfo=None) for frame in frames] == DATES


class _Hostile:
    """Unpickled, it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, protocol):
    target = tmp_path / "created"
    hostile = pickle.dumps([_Hostile(target)], protocol)
    pickle.loads(hostile)
    assert target.exists(), "the pickle must be harmful, or the test shows nothing"
    target.unlink()

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|O", "fortran_order": False, "shape": (3,)}
    )
    path = tmp_path / "rainfall_NW_2018_12.2.npz"
    meteonet(path, np.zeros((3, 4, 5), np.int16), header.getvalue() + hostile)
    with pytest.raises(BadFileError, match="may be malicious"):
        MeteoNetReader().scan(path)
    assert not target.exists()
    np.testing.assert_array_equal(list(MeteoNetReader().fields(path, ["2"])), np.zeros((1, 4, 5)))
    assert not target.exists()


@pytest.mark.parametrize(
    "dates",
    [DATES[:2], [*DATES[:2], "noon"], pickle.dumps(DATES)],
    ids=["too few", "not dates", "not an array"],
)
def test_other_dates_are_refused(tmp_path, dates):
    path = tmp_path / "rainfall_NW_2018_12.2.npz"
    if isinstance(dates, list) and "noon" in dates:
        member = io.BytesIO()
        np.save(member, np.array(dates, dtype=object), allow_pickle=True)
        dates = member.getvalue()
    meteonet(path, np.zeros((3, 4, 5), np.int16), dates)
    with pytest.raises(BadFileError):
        MeteoNetReader().scan(path)


def test_quality_codes_are_no_rain(tmp_path):
    path = tmp_path / "rainfall_mean_quality-code_NW_2016_08.3.npz"
    meteonet(path, np.zeros((3, 4, 5), np.int16), DATES)
    assert not MeteoNetReader().recognises(path)
    with pytest.raises(BadFileError, match="only the name says"):
        MeteoNetReader().scan(path)
