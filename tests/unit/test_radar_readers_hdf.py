"""KNMI, ODIM and SEVIR: real files against the providers' rules, and layouts built here."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_prep.readers.coding import Coding
from data_prep.readers.knmi import KNMIReader
from data_prep.readers.mlcast import MLCastReader
from data_prep.readers.netcdf import NetCDFReader
from data_prep.readers.odim import ODIMReader
from data_prep.readers.projection import metric, project
from data_prep.readers.radar import NO_ECHO_DBZ, BadFileError, RadarFile, RadarReader
from data_prep.readers.sevir import SEVIRReader
from tests.radar_contract import check_radar_reader
from tests.real_data import real_data

h5py = pytest.importorskip("h5py")

NAN = np.nan
READERS: tuple[RadarReader, ...] = (
    KNMIReader(),
    ODIMReader(),
    SEVIRReader(),
    NetCDFReader(),
    MLCastReader(),
)
RMI_FOLDERS = ("20210704_qpe", "20210704_nog")


def read(reader: RadarReader, path: Path) -> tuple[RadarFile, NDArray[np.float32]]:
    scanned = reader.scan(path)
    return scanned, np.stack(list(reader.fields(path, [frame.key for frame in scanned.frames])))


def names_of_readers(path: Path) -> list[str]:
    return [reader.name for reader in READERS if reader.recognises(path)]


def write(path: Path, tree: dict[str, Any]) -> Path:
    """Write HDF5: a key with a dot is an attribute (GROUP.NAME), any other a data set.

    Text of bytes gets a fixed length, as C programs write it.
    """
    with h5py.File(path, "w") as file:
        for key, value in tree.items():
            node, dot, name = key.rpartition(".")
            value = np.bytes_(value) if isinstance(value, bytes) else value
            if not dot:
                file.create_dataset(key, data=value)
            elif node in file:
                file[node].attrs[name] = value
            else:
                file.require_group(node or "/").attrs[name] = value
    return path


# --- KNMI -----------------------------------------------------------------------------------------


def knmi_files() -> list[Path]:
    return sorted(real_data("knmi").rglob("*.h5"))


def test_a_real_knmi_file_keeps_the_contract():
    path = knmi_files()[7]
    scanned = check_radar_reader(
        KNMIReader(), path, quantity="accumulation", interval_minutes=5, shape=(765, 700)
    )
    assert names_of_readers(path) == ["knmi"]
    assert scanned.accumulation_minutes == 5
    place = scanned.grid
    assert (place.left, place.top, place.pixel_width) == (0, -3_650_000, 1000)
    assert place.projection is not None
    # The corners that the file gives in degrees, to their three decimals.
    corners = project(place.projection, ((0.0, 55.974), (9.009, 48.895)))
    assert corners is not None
    assert np.abs(np.subtract(corners, [(0, -3_650_000), (700_000, -4_415_000)])).max() < 100


def test_every_real_knmi_field_follows_the_providers_rule():
    files = knmi_files()
    times = []
    for path in files:
        scanned, (values,) = read(KNMIReader(), path)
        with h5py.File(path) as file:
            stored = file["image1/image_data"][()]
        expected = np.where(stored == 65535, NAN, stored * 0.01).astype(np.float32)
        np.testing.assert_array_equal(values, expected)
        stamp = path.stem.rpartition("_")[2]  # the end of the five minutes
        assert scanned.frames[0].time == datetime.strptime(stamp, "%Y%m%d%H%M").replace(tzinfo=UTC)
        times.append(scanned.frames[0].time)
    assert len(files) == 92
    assert {b - a for a, b in itertools.pairwise(times)} == {timedelta(minutes=5)}
    assert np.isnan(values).mean() == pytest.approx(0.744, abs=1e-3)


def test_knmi_as_pysteps_reads_it():
    importers = pytest.importorskip("pysteps.io.importers")
    for path in knmi_files()[::30]:
        precipitation, _, _ = importers.import_knmi_hdf5(str(path))
        np.testing.assert_allclose(read(KNMIReader(), path)[1][0], precipitation, rtol=1e-6)


KNMI_PROJECTION = b"+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 +a=6378.14 +b=6356.75 +x_0=0 y_0=0"


def knmi(path: Path, stored: Any = ((0, 64, 255), (1, 100, 254)), **changes: Any) -> Path:
    stored = np.array(stored, np.uint8)
    tree = {
        "overview.product_datetime_start": b"26-AUG-2010;00:00:00.000",
        "overview.product_datetime_end": np.array([b"26-AUG-2010;00:05:00.000"]),
        "geographic.geo_number_rows": [2],
        "geographic.geo_number_columns": [3],
        "geographic.geo_pixel_size_x": np.float32([1]),
        "geographic.geo_pixel_size_y": np.float32([-1]),
        "geographic.geo_column_offset": np.float32([10]),
        "geographic.geo_row_offset": np.float32([3650]),
        "geographic.geo_dim_pixel": b"KM,KM",
        "geographic/map_projection.projection_proj4_params": KNMI_PROJECTION,
        "image1.image_geo_parameter": b"REFLECTIVITY_[DBZ]",
        "image1/calibration.calibration_formulas": b"GEO=0.500000*PV+-32.000000",
        "image1/calibration.calibration_missing_data": [0],
        "image1/calibration.calibration_out_of_image": [255],
        "image1/image_data": stored,
    }
    tree |= {key.replace("__", "/"): value for key, value in changes.items()}
    return write(path, {key: value for key, value in tree.items() if value is not None})


def test_knmi_reflectivity_tells_no_echo_from_no_data(tmp_path):
    scanned, (values,) = read(KNMIReader(), knmi(tmp_path / "a.h5"))
    np.testing.assert_array_equal(values, np.float32([[-32, 0, NAN], [-31.5, 18, 95]]))
    assert (scanned.quantity, scanned.accumulation_minutes) == ("reflectivity", None)
    assert scanned.grid.projection == (
        "+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 +a=6378140 +b=6356750 +x_0=0 +y_0=0"
    )
    assert (scanned.grid.left, scanned.grid.top) == (10_000, -3_650_000)


@pytest.mark.parametrize(
    ("formula", "gain", "offset"),
    [
        ("GEO = 0.01 * PV + 0.0", 0.01, 0),
        ("GEO=0.5*PV-32", 0.5, -32),
        ("geo=5e-1*pv + -3.2E1", 0.5, -32),
        ("GEO=2*PV", 2, 0),
    ],
)
def test_knmi_formulas(tmp_path, formula, gain, offset):
    path = knmi(tmp_path / "a.h5", **{"image1/calibration.calibration_formulas": formula})
    np.testing.assert_allclose(
        read(KNMIReader(), path)[1][0, 1], np.multiply([1, 100, 254], gain) + offset, rtol=1e-6
    )


@pytest.mark.parametrize("formula", ["GEO=__import__('os')*PV", "GEO=PV**2", "", None])
def test_a_formula_that_is_no_line_is_refused(tmp_path, formula):
    path = knmi(tmp_path / "a.h5", **{"image1/calibration.calibration_formulas": formula})
    with pytest.raises(BadFileError, match="calibration formula"):
        KNMIReader().scan(path)


def test_knmi_rows_from_the_south_are_turned(tmp_path):
    path = knmi(
        tmp_path / "a.h5",
        **{
            "geographic.geo_pixel_size_y": np.float32([1]),
            "geographic.geo_row_offset": np.float32([-3652]),
        },
    )
    scanned, (values,) = read(KNMIReader(), path)
    np.testing.assert_array_equal(values[1], np.float32([-32, 0, NAN]))
    assert scanned.grid.top == -3_650_000


def test_knmi_forecasts_in_several_images(tmp_path):
    path = knmi(
        tmp_path / "a.h5",
        **{
            "image1.image_datetime_valid": "26-AUG-2010;00:00:00.000",
            "image2.image_datetime_valid": "26-AUG-2010;00:05:00.000",
            "image1.image_geo_parameter": "PRECIPITATION_[MM]",
            "image2.image_geo_parameter": "PRECIPITATION_[MM]",
            "image2/calibration.calibration_formulas": "GEO=0.01*PV+0",
            "image2/image_data": np.full((2, 3), 7, np.uint8),
            "image3.image_geo_parameter": "HEIGHT_[KM]",
            "image3/image_data": np.full((2, 3), 7, np.uint8),
        },
    )
    scanned, values = read(KNMIReader(), path)
    assert [frame.lead_minutes for frame in scanned.frames] == [0, 5]
    assert scanned.accumulation_minutes == 5
    np.testing.assert_allclose(values[1], 0.07)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image1.image_geo_parameter": b"HEIGHT_[KM]"}, "holds HEIGHT"),
        ({"geographic.geo_number_rows": [7]}, "holds 2x3 pixels, its header says"),
        ({"overview.product_datetime_end": None}, "product_datetime_end"),
        (
            {
                "image1.image_geo_parameter": "ACCUMULATION_[MM]",
                "overview.product_datetime_start": "x",
            },
            "needs a start",
        ),
    ],
)
def test_what_is_wrong_in_a_knmi_file_is_said(tmp_path, changes, reason):
    with pytest.raises(BadFileError, match=reason):
        KNMIReader().scan(knmi(tmp_path / "a.h5", **changes))


def test_knmi_polar_scans_are_refused(tmp_path):
    path = write(tmp_path / "a.h5", {"overview.x": 1, "geographic.x": 1, "scan1/scan_Z_data": [1]})
    assert names_of_readers(path) == ["knmi"]
    with pytest.raises(BadFileError, match="polar scans"):
        KNMIReader().scan(path)


# --- ODIM -----------------------------------------------------------------------------------------


def rmi_files(folder: str) -> list[Path]:
    return sorted((real_data("rmi") / folder).glob("*.hdf"))


@pytest.mark.parametrize("folder", RMI_FOLDERS)
def test_every_real_odim_field_follows_the_providers_rule(folder):
    times = []
    for path in rmi_files(folder):
        scanned, (values,) = read(ODIMReader(), path)
        with h5py.File(path) as file:
            np.testing.assert_array_equal(values, file["dataset1/data1/data"][()])
        assert scanned.frames[0].time == datetime.strptime(
            path.name.partition(".")[0], "%Y%m%d%H%M%S"
        ).replace(tzinfo=UTC)
        times.append(scanned.frames[0].time)
    assert {b - a for a, b in itertools.pairwise(times)} == {timedelta(minutes=5)}
    assert np.isnan(values).mean() == pytest.approx(0.33, abs=0.01)


@pytest.mark.parametrize("folder", RMI_FOLDERS)
def test_a_real_odim_file_keeps_the_contract(folder):
    path = rmi_files(folder)[3]
    scanned = check_radar_reader(ODIMReader(), path, quantity="rain_rate", shape=(700, 700))
    assert names_of_readers(path) == ["odim"]
    place = scanned.grid
    # Projected from its corners; the file also says UL_x and UL_y.
    assert (place.left, place.top, place.pixel_width, place.pixel_height) == (3e5, 1e6, 1e3, 1e3)


@pytest.fixture
def pysteps_odim(monkeypatch) -> Iterator[Any]:
    """The importer of pysteps; the projection that it imports is not needed for the values."""
    importers = pytest.importorskip("pysteps.io.importers")
    if not getattr(importers, "PYPROJ_IMPORTED", False):
        pyproj = types.SimpleNamespace(Proj=lambda text: lambda lon, lat: (lon, lat))
        monkeypatch.setattr(importers, "pyproj", pyproj, raising=False)
    yield importers.import_odim_hdf5


def test_odim_as_pysteps_reads_it(pysteps_odim, tmp_path):
    for folder in RMI_FOLDERS:
        path = rmi_files(folder)[20]
        precipitation, _, _ = pysteps_odim(str(path), qty="RATE")
        np.testing.assert_array_equal(read(ODIMReader(), path)[1][0], np.float32(precipitation))


def odim(path: Path, stored: Any = None, **changes: Any) -> Path:
    """A composite as OPERA writes it: float64, large negative numbers for nodata and undetect."""
    if stored is None:
        stored = np.array([[-9999000, -8888000, 0.1], [1.5, 150, -8888000]])
    height, width = np.shape(stored)
    tree = {
        ".Conventions": b"ODIM_H5/V2_1",
        "what.object": b"COMP",
        "what.date": b"20180824",
        "what.time": b"180000",
        "what.source": b"ORG:247",
        "where.projdef": b"+proj=laea +lat_0=55.0 +lon_0=10.0 +x_0=1950000.0 +y_0=-2100000.0 "
        b"+units=m +ellps=WGS84",
        "where.xscale": 3_800_000.0 / width,
        "where.yscale": 4_400_000.0 / height,
        "where.xsize": width,
        "where.ysize": height,
        "where.LL_lon": -10.434576838640398,
        "where.LL_lat": 31.746215319325056,
        "where.UR_lon": 57.81196475014995,
        "where.UR_lat": 67.62103710275053,
        "dataset1/what.startdate": b"20180824",
        "dataset1/what.starttime": b"174500",
        "dataset1/what.enddate": b"20180824",
        "dataset1/what.endtime": b"180000",
        "dataset1/data1/what.quantity": b"RATE",
        "dataset1/data1/what.gain": 1.0,
        "dataset1/data1/what.offset": 0.0,
        "dataset1/data1/what.nodata": -9999000.0,
        "dataset1/data1/what.undetect": -8888000.0,
        "dataset1/data1/data": stored,
    } | changes
    return write(path, {key: value for key, value in tree.items() if value is not None})


def test_opera_as_pysteps_reads_it(pysteps_odim, tmp_path):
    path = odim(tmp_path / "T_PAAH21_C_EUOC_20180824180000.hdf")
    scanned, (values,) = read(ODIMReader(), path)
    np.testing.assert_array_equal(values, np.float32([[NAN, 0, 0.1], [1.5, 150, 0]]))
    np.testing.assert_array_equal(values, np.float32(pysteps_odim(str(path), qty="RATE")[0]))
    place = scanned.grid
    assert (place.left, place.top) == pytest.approx((0, 0), abs=0.01)
    assert place.pixel_width * 3 == pytest.approx(3_800_000, abs=1)
    assert "-9.999e+06 (nodata)" in scanned.missing_rule and "undetect" in scanned.missing_rule


FACTS = {"quantity": "DBZH", "gain": 0.4, "offset": -30.0, "nodata": 255.0, "undetect": 0.0}
NO_FACTS = dict.fromkeys(f"dataset1/data1/what.{name}" for name in FACTS)


@pytest.mark.parametrize(
    "level", ["dataset1/data1/what", "dataset1/data1", "dataset1/what", "dataset1", "what"]
)
@pytest.mark.parametrize("spelling", ["bytes", "text", "array", "upper"])
def test_facts_at_any_level_in_any_spelling(tmp_path, level, spelling):
    """Of one byte, as in most countries."""
    spell = {
        "bytes": lambda value: np.bytes_(str(value)),
        "text": str,
        "array": lambda value: np.array([np.bytes_(value)] if isinstance(value, str) else [value]),
        "upper": lambda value: value,
    }[spelling]
    facts = {
        f"{level}.{name.upper() if spelling == 'upper' else name}": spell(value)
        for name, value in FACTS.items()
    }
    stored = np.array([[0, 1, 75], [100, 254, 255]], np.uint8)
    path = odim(tmp_path / "a.h5", stored, **NO_FACTS | facts)
    scanned, (values,) = read(ODIMReader(), path)
    assert scanned.quantity == "reflectivity"
    expected = [[NO_ECHO_DBZ, -29.6, 0], [10, 71.6, NAN]]
    np.testing.assert_allclose(values, np.float32(expected), atol=1e-5)


def test_a_lower_level_wins(tmp_path):
    path = odim(tmp_path / "a.h5", **{"what.gain": 7.0, "dataset1/what.offset": 7.0})
    assert read(ODIMReader(), path)[1][0, 1, 1] == 150


def test_undetect_that_equals_nodata_is_missing(tmp_path):
    path = odim(tmp_path / "a.h5", **{"dataset1/data1/what.undetect": -9999000.0})
    scanned, (values,) = read(ODIMReader(), path)
    assert np.isnan(values[0, 0])
    assert "cannot be told" in scanned.missing_rule


@pytest.mark.parametrize("kind", ["PVOL", "SCAN", "pvol", "RHI", "VP"])
def test_polar_data_are_refused_by_name(tmp_path, kind):
    path = odim(tmp_path / "a.h5", **{"what.object": kind})
    assert ODIMReader().recognises(path)
    with pytest.raises(BadFileError, match=f"an ODIM {kind.upper()}, polar scans"):
        ODIMReader().scan(path)
    with pytest.raises(BadFileError, match="polar scans"):
        next(ODIMReader().fields(path, ["dataset1/data1"]))


def test_quantities_are_chosen_and_the_others_noted(tmp_path):
    more = {
        "dataset1/data2/what.quantity": "DBZH",
        "dataset1/data2/data": np.full((2, 3), 20.0),
        "dataset1/data10/what.quantity": "ACRR",
        "dataset1/data10/data": np.full((2, 3), 30.0),
        "dataset1/data1/quality1/data": np.ones((2, 3)),
    }
    path = odim(tmp_path / "a.h5", **more)
    scanned, values = read(ODIMReader(), path)
    assert (scanned.quantity, values[0, 1, 1]) == ("rain_rate", 150)
    assert any("not read: ACRR, DBZH" in note for note in scanned.notes)
    assert any("quality1" in note for note in scanned.notes)
    scanned, values = read(ODIMReader(quantity="acrr"), path)
    assert (scanned.quantity, scanned.accumulation_minutes) == ("accumulation", 15)
    assert (values == 30).all()
    by_number = odim(tmp_path / "b.h5", **more | {"dataset1/data1/what.quantity": "HGHT"})
    assert ODIMReader().scan(by_number).frames[0].key == "dataset1/data2"
    with pytest.raises(BadFileError, match="holds ACRR, DBZH, RATE; no VRAD"):
        ODIMReader(quantity="VRAD").scan(path)


def test_what_is_no_rain_is_refused(tmp_path):
    path = odim(tmp_path / "a.h5", **{"dataset1/data1/what.quantity": "HGHT"})
    with pytest.raises(BadFileError, match="holds HGHT; read are DBZ"):
        ODIMReader().scan(path)
    unnamed = odim(tmp_path / "b.h5", **{"dataset1/data1/what.quantity": None})
    assert ODIMReader(quantity="TH").scan(unnamed).quantity == "reflectivity"
    assert read(ODIMReader(quantity="TH"), unnamed)[1][0, 1, 1] == 150


def test_a_sum_ends_when_its_interval_ends(tmp_path):
    acrr = {"dataset1/data1/what.quantity": "ACRR"}
    scanned = ODIMReader().scan(odim(tmp_path / "a.h5", **acrr))
    assert (scanned.quantity, scanned.accumulation_minutes) == ("accumulation", 15)
    late = odim(
        tmp_path / "b.h5",
        **acrr,
        **{
            "what.time": "174500",
            "dataset1/what.starttime": "174500",
            "dataset1/what.endtime": "175959",
        },
    )
    scanned = ODIMReader().scan(late)
    assert scanned.frames[0].time == datetime(2018, 8, 24, 17, 59, 59, tzinfo=UTC)
    assert (scanned.accumulation_minutes, scanned.frames[0].lead_minutes) == (15, 0)
    unknown = odim(tmp_path / "c.h5", **acrr, **{"dataset1/what.starttime": "180000"})
    with pytest.raises(BadFileError, match="accumulation_minutes=MINUTES"):
        ODIMReader().scan(unknown)
    assert ODIMReader(accumulation_minutes=60).scan(unknown).accumulation_minutes == 60


def test_several_datasets_are_times_or_products(tmp_path):
    def dataset(number: int, minute: int, value: float) -> dict[str, Any]:
        name = f"dataset{number}"
        return {
            f"{name}/what.startdate": "20180824",
            f"{name}/what.starttime": f"18{minute - 5:02}00",
            f"{name}/what.enddate": "20180824",
            f"{name}/what.endtime": f"18{minute:02}00",
            f"{name}/data1/what.quantity": "RATE",
            f"{name}/data1/data": np.full((2, 3), value),
        }

    forecast = odim(tmp_path / "a.h5", **dataset(2, 5, 2.0), **dataset(10, 10, 10.0))
    scanned, values = read(ODIMReader(), forecast)
    assert [(f.key, f.time.minute) for f in scanned.frames] == [
        ("dataset1/data1", 0),
        ("dataset2/data1", 5),
        ("dataset10/data1", 10),
    ]
    assert (scanned.interval_minutes, values[2, 0, 0]) == (5, 10)
    assert [frame.lead_minutes for frame in scanned.frames] == [0, 0, 10]
    smaller = dataset(2, 5, 2.0) | {"dataset2/data1/data": np.zeros((1, 3))}
    scanned = ODIMReader().scan(odim(tmp_path / "c.h5", **smaller))
    assert [frame.key for frame in scanned.frames] == ["dataset1/data1"]
    same_time = odim(
        tmp_path / "b.h5",
        **dataset(2, 5, 2.0)
        | {"dataset2/what.starttime": "174500", "dataset2/what.endtime": "180000"},
    )
    scanned = ODIMReader().scan(same_time)
    assert [frame.key for frame in scanned.frames] == ["dataset1/data1"]
    assert any("dataset2/data1" in note for note in scanned.notes)


def test_times_without_levels(tmp_path):
    none = dict.fromkeys(
        f"dataset1/what.{name}" for name in ("startdate", "starttime", "enddate", "endtime")
    )
    only_root = ODIMReader().scan(odim(tmp_path / "a.h5", **none))
    assert only_root.frames[0].time == datetime(2018, 8, 24, 18, tzinfo=UTC)
    only_dataset = odim(tmp_path / "b.h5", **{"what.date": None, "what.time": None})
    assert ODIMReader().scan(only_dataset).frames[0].time == only_root.frames[0].time
    neither = odim(tmp_path / "c.h5", **none, **{"what.date": None})
    with pytest.raises(BadFileError, match="no readable time"):
        ODIMReader().scan(neither)


def test_grids_in_kilometres_without_corners_and_without_a_projection(tmp_path):
    """KNMI's ODIM files have an earth of 6378 and pixels of 1."""
    stored = np.zeros((765, 700))
    km = {
        "where.projdef": "+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 +a=6378.137 +b=6356.752",
        "where.xscale": 1.0,
        "where.yscale": 1.0,
        "where.LL_lon": 0.0,
        "where.LL_lat": 49.362064,
        "where.UR_lon": 10.856453,
        "where.UR_lat": 55.388973,
    }
    place = ODIMReader().scan(odim(tmp_path / "a.h5", stored, **km)).grid
    assert (place.pixel_width, place.pixel_height) == (1000, 1000)
    assert (place.left, place.top) == pytest.approx((0, -3_650_000), abs=100)
    lonlat = {
        "where.projdef": "+proj=latlong +ellps=WGS84",
        "where.xscale": 0.01,
        "where.yscale": 0.01,
        "where.LL_lon": 10.0,
        "where.LL_lat": 40.0,
        "where.UR_lon": 17.0,
        "where.UR_lat": 47.65,
    }
    place = ODIMReader().scan(odim(tmp_path / "b.h5", stored, **lonlat)).grid
    assert (place.unit, place.left, place.top, place.pixel_width) == ("degree", 10, 47.65, 0.01)
    for changes in ({"where.projdef": None}, {"where.LL_lon": None}):
        scanned = ODIMReader().scan(odim(tmp_path / "c.h5", **changes))
        assert scanned.grid.unit is None
        assert any("does not place its grid" in note for note in scanned.notes)


def test_corners_that_are_centres_of_pixels_are_noticed(tmp_path):
    lonlat = {
        "where.projdef": "+proj=longlat +ellps=WGS84",
        "where.xscale": 0.5,
        "where.yscale": 0.5,
        "where.LL_lon": 10.25,
        "where.LL_lat": 40.25,
        "where.UR_lon": 11.25,
        "where.UR_lat": 40.75,
    }
    scanned = ODIMReader().scan(odim(tmp_path / "a.h5", **lonlat))
    assert (scanned.grid.left, scanned.grid.top, scanned.grid.pixel_width) == (10, 41, 0.5)
    assert any("centres of pixels" in note for note in scanned.notes)
    unlike = odim(tmp_path / "b.h5", **lonlat | {"where.xscale": 0.4})
    scanned = ODIMReader().scan(unlike)
    assert scanned.grid.pixel_width == pytest.approx(1 / 3)
    assert any("xscale is 0.4, but the corners" in note for note in scanned.notes)


def test_projections_become_metric():
    assert metric("+proj=merc +units=km +x_0=5") == "+proj=merc +units=m +x_0=5"
    assert metric("EPSG:3035") == "EPSG:3035"


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tables_and_arithmetic_agree(bits, order):
    """Whole numbers of 8 and 16 bits go through a table, wider ones do not."""
    for kind in "iu":
        limits = np.iinfo(f"{kind}{bits // 8}")
        numbers = np.linspace(limits.min, limits.max, 600).astype(int).reshape(20, 30)
        coding = Coding(
            quantity="rain_rate",
            gain=0.01,
            offset=-0.5,
            missing=(int(limits.max), 1e9),
            no_echo=(0,),
            lowest=limits.min + 3,
        )
        narrow = coding.decode(numbers.astype(f"{order}{kind}{bits // 8}")[::-1])
        np.testing.assert_array_equal(narrow, coding.decode(numbers.astype(np.int64))[::-1])
        assert np.isnan(narrow[0, -1]) and narrow.flags.c_contiguous


# --- SEVIR ----------------------------------------------------------------------------------------

CODES = (0, 5, 6, 18, 19, 100, 254, 255)
VIL = (0, 0, 4 / 90.66, 16 / 90.66, *(np.exp((x - 83.9) / 38.9) for x in (19, 100, 254)), NAN)


def sevir(path: Path, **options: Any) -> NDArray[np.uint8]:
    """Two events of 3 frames of 4x2 pixels; the codes of event 1, frame 2 are CODES."""
    codes = np.random.default_rng(0).integers(0, 255, (2, 4, 2, 3), np.uint8)
    codes[1, :, :, 2] = np.reshape(CODES, (4, 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("vil", data=codes, **options)
        file["id"] = np.array([b"S1", b"R2"])
    return codes


def catalog(path: Path) -> Path:
    rows = [
        "id,file_name,file_index,img_type,time_utc,minute_offsets",
        "S1,vil/2018/a.h5,0,vil,2018-03-25 05:00:00,-5:0:5",
        "R2,vil/2018/a.h5,1,vil,2018-07-01 12:30:00,-5:0:5",
        "R2,vis/2018/a.h5,1,vis,2001-01-01 00:00:00,0:5:10",
    ]
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("chunks", [None, (1, 4, 2, 3), (1, 4, 2, 2), (2, 2, 2, 1)])
def test_sevir_codes_become_liquid(tmp_path, chunks):
    path = tmp_path / "SEVIR_VIL_STORMEVENTS_2018_0101_0630.h5"
    sevir(path, chunks=chunks)
    scanned, values = read(SEVIRReader(), path)
    np.testing.assert_allclose(values[5], np.reshape(VIL, (4, 2))[::-1], rtol=1e-6)
    assert (scanned.quantity, scanned.interval_minutes) == ("vil", 5)
    assert [frame.key for frame in scanned.frames] == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert [frame.series for frame in scanned.frames] == ["S1"] * 3 + ["R2"] * 3
    shuffled = SEVIRReader().fields(path, ["1/2", "0/1", "1/0"])
    np.testing.assert_array_equal(np.stack(list(shuffled)), values[[5, 1, 3]])


def test_a_sevir_file_keeps_the_contract(tmp_path):
    path = tmp_path / "SEVIR_VIL.h5"
    with h5py.File(path, "w") as file:
        codes = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 7), np.uint8)
        file.create_dataset("vil", data=codes, chunks=(1, 32, 32, 7))
        file["id"] = np.array([b"S1", b"S2", b"R3"])
    check_radar_reader(SEVIRReader(), path, quantity="vil", interval_minutes=5, shape=(32, 32))
    assert names_of_readers(path) == ["sevir"]


def test_sevir_times_come_from_the_catalog_or_are_invented(tmp_path):
    path = tmp_path / "data" / "vil" / "2018" / "a.h5"
    sevir(path)
    invented = SEVIRReader().scan(path)
    assert any("invented" in note for note in invented.notes)
    times = [frame.time for frame in invented.frames]
    assert [b - a for a, b in itertools.pairwise(times)] == [
        timedelta(minutes=5),
        timedelta(minutes=5),
        timedelta(days=1, minutes=-10),
    ] + [timedelta(minutes=5)] * 2
    expected = datetime(2018, 7, 1, 12, 25, tzinfo=UTC)
    given = SEVIRReader(catalog=str(catalog(tmp_path / "mine.csv")))
    assert given.scan(path).frames[3].time == expected
    catalog(tmp_path / "CATALOG.csv")
    beside = SEVIRReader().scan(path)
    assert beside.frames[3].time == expected
    assert any("from CATALOG.csv" in note for note in beside.notes)
    sevir(path.with_name("b.h5"))
    with pytest.raises(BadFileError, match="events that .*CATALOG.csv does not list"):
        SEVIRReader().scan(path.with_name("b.h5"))
    with pytest.raises(ValueError, match="no catalog /nowhere"):
        SEVIRReader(catalog="/nowhere").scan(path)


def test_sevirs_other_types_are_refused(tmp_path):
    path = write(tmp_path / "a.h5", {"ir069": np.zeros((1, 2, 2, 3), np.int16), "id": [b"S1"]})
    assert names_of_readers(path) == []
    with pytest.raises(BadFileError, match="no SEVIR file of VIL: it holds id, ir069"):
        SEVIRReader().scan(path)


# --- all ------------------------------------------------------------------------------------------


def test_each_kind_of_hdf5_has_one_reader(tmp_path):
    netcdf4 = pytest.importorskip("netCDF4")
    sevir(tmp_path / "sevir.h5")
    knmi(tmp_path / "knmi.h5")
    odim(tmp_path / "odim.h5")
    odim(tmp_path / "odim_plain.h5", **{".Conventions": None, "what.object": None})
    with netcdf4.Dataset(tmp_path / "netcdf.h5", "w") as file:
        file.createDimension("y", 2)
        file.createDimension("x", 2)
        file.createVariable("rainfall_rate", "f4", ("y", "x")).units = "mm/h"
    write(tmp_path / "none.h5", {"precipitation/values": np.zeros((3, 3))})
    found = {path.stem: names_of_readers(path) for path in tmp_path.glob("*.h5")}
    assert found == {
        "sevir": ["sevir"],
        "knmi": ["knmi"],
        "odim": ["odim"],
        "odim_plain": ["odim"],
        "netcdf": ["netcdf"],
        "none": [],
    }


def _fields_elsewhere(reader: RadarReader, path: Path, key: str) -> NDArray[np.float32]:
    """What a worker does that has only the reader, a path and a key."""
    (values,) = reader.fields(path, [key])
    return values


def test_fields_are_read_in_another_process_than_the_scan(tmp_path):
    paths = {KNMIReader(): knmi(tmp_path / "a.h5"), ODIMReader(): odim(tmp_path / "b.h5")}
    sevir(tmp_path / "c.h5")
    paths[SEVIRReader()] = tmp_path / "c.h5"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for reader, path in paths.items():
            key = reader.scan(path).frames[-1].key
            there = pool.submit(_fields_elsewhere, reader, path, key).result()
            np.testing.assert_array_equal(there, _fields_elsewhere(reader, path, key))


def test_a_missing_library_is_named_with_the_extra(tmp_path, monkeypatch):
    path = odim(tmp_path / "a.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    for reader in (KNMIReader(), ODIMReader(), SEVIRReader()):
        with pytest.raises(ValueError, match=r"needs the library h5py.*tmu-dist\[radar\]"):
            reader.scan(path)
        with pytest.raises(ValueError, match="h5py"):
            reader.recognises(path)


def test_without_rasterio_the_grid_has_no_place(tmp_path, monkeypatch):
    project.cache_clear()
    monkeypatch.setitem(sys.modules, "rasterio.warp", None)
    scanned = ODIMReader().scan(odim(tmp_path / "a.h5"))
    project.cache_clear()
    assert scanned.grid.unit is None and scanned.grid.projection
    assert any("rasterio" in note for note in scanned.notes)
