"""Radar readers on real files: the contract, the providers' rules, and pysteps' importers.

The rules are written out here once more, from the providers' documentation and by other means than
the readers'; the statistics were computed by hand before there was a reader.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.readers.fmi import FMIReader
from data_prep.readers.grib2 import GRIB2Reader
from data_prep.readers.mch import MCHReader
from data_prep.readers.meteonet import MeteoNetReader
from data_prep.readers.radar import RadarReader
from data_prep.readers.radolan import RADOLANReader
from tests.radar_contract import check_radar_reader
from tests.real_data import real_data

MCH_SHAPE, FMI_SHAPE, MRMS_SHAPE = (640, 710), (1226, 760), (3500, 7000)


def files_of(source: str, pattern: str) -> list[Path]:
    found = sorted(real_data(source).rglob(pattern))
    assert found, f"no {pattern} in {source}"
    return found


def fields_of(reader: RadarReader, path: Path) -> Iterator[tuple[datetime, NDArray[np.float32]]]:
    frames = reader.scan(path).frames
    fields = reader.fields(path, [frame.key for frame in frames])
    for frame, values_HW in zip(frames, fields, strict=True):
        yield frame.time, values_HW


def only_field(reader: RadarReader, path: Path) -> NDArray[np.float32]:
    ((_, values_HW),) = fields_of(reader, path)
    return values_HW


def assert_equal_to(values_HW, expected_HW, tolerance=1e-6) -> None:
    np.testing.assert_allclose(values_HW, expected_HW, rtol=tolerance, atol=tolerance)


# --- the contract, on one file of each kind ---


def test_mch_keeps_the_contract():
    path = files_of("mch", "*.gif")[0]
    scanned = check_radar_reader(
        MCHReader(), path, quantity="accumulation", interval_minutes=5, shape=MCH_SHAPE
    )
    assert scanned.accumulation_minutes == 5
    assert scanned.frames[0].time == datetime(2015, 5, 15, 15, 45, tzinfo=UTC)
    assert "Quality letter F" in " ".join(scanned.notes)


def test_fmi_keeps_the_contract():
    path = files_of("fmi", "*.pgm.gz")[0]
    check_radar_reader(
        FMIReader(), path, quantity="reflectivity", interval_minutes=5, shape=FMI_SHAPE
    )


def test_fmi_without_its_wrapper_keeps_the_contract(tmp_path):
    packed = files_of("fmi", "*.pgm.gz")[0]
    plain = tmp_path / packed.stem
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    check_radar_reader(FMIReader(), plain, quantity="reflectivity", shape=FMI_SHAPE)
    assert_equal_to(only_field(FMIReader(), plain), only_field(FMIReader(), packed), 0)


def test_mrms_keeps_the_contract():
    path = files_of("mrms", "*.grib2")[0]
    scanned = check_radar_reader(
        GRIB2Reader(), path, quantity="rain_rate", interval_minutes=2, shape=MRMS_SHAPE
    )
    assert scanned.accumulation_minutes is None
    assert (scanned.grid.left, scanned.grid.top) == (-130.0, 55.0)
    assert scanned.grid.pixel_width == scanned.grid.pixel_height == 0.01


@pytest.mark.parametrize(
    ("file", "quantity", "fields"),
    [
        ("rainfall_NW_2016_08.3.npz", "accumulation", 45),
        ("rainfall_SE_2016_08.3.npz", "accumulation", 45),
        ("reflectivity_old_NW_2016_08.3.npz", "reflectivity", 29),
        ("reflectivity_old_SE_2016_08.3.npz", "reflectivity", 29),
    ],
)
def test_meteonet_keeps_the_contract(file, quantity, fields):
    zone = "NW" if "_NW_" in file else "SE"
    scanned = check_radar_reader(
        MeteoNetReader(),
        real_data("meteonet") / file,
        quantity=quantity,
        interval_minutes=5,
        shape=(565 if zone == "NW" else 515, 784),
    )
    assert len(scanned.frames) == fields
    assert {frame.series for frame in scanned.frames} == {zone}
    assert scanned.accumulation_minutes == (5 if quantity == "accumulation" else None)


def test_radolan_text_in_a_tar_keeps_the_contract():
    scanned = check_radar_reader(
        RADOLANReader(),
        real_data("dwd") / "RW-20221018.tar.gz",
        quantity="accumulation",
        interval_minutes=60,
        shape=(900, 900),
    )
    assert scanned.accumulation_minutes == 60
    first = datetime(2022, 10, 18, 0, 50, tzinfo=UTC)
    assert [frame.time for frame in scanned.frames] == [
        first + timedelta(hours=hour) for hour in range(24)
    ]


def test_radvor_forecasts_in_a_tar_keep_the_contract(tmp_path):
    """A tar of three of the composites: the whole one takes seconds to unpack again and again."""
    path = tmp_path / "DE1200_RV2210180700.tar.bz2"
    with (
        tarfile.open(real_data("dwd") / path.name) as whole,
        tarfile.open(path, "w:bz2") as part,
    ):
        for _, member in zip(range(3), whole, strict=False):
            part.addfile(member, whole.extractfile(member))
    check_radar_reader(
        RADOLANReader(),
        path,
        quantity="accumulation",
        interval_minutes=5,
        shape=(1200, 1100),
    )


def test_radvor_forecasts_say_what_they_are():
    scanned = RADOLANReader().scan(real_data("dwd") / "DE1200_RV2210180700.tar.bz2")
    assert [frame.lead_minutes for frame in scanned.frames] == list(range(0, 121, 5))
    start = datetime(2022, 10, 18, 7, tzinfo=UTC)
    for frame in scanned.frames:
        assert frame.time == start + timedelta(minutes=frame.lead_minutes)
    # The analysis goes on with those of other runs; the forecasts of this run never do.
    assert len({frame.series for frame in scanned.frames}) == 2
    assert scanned.frames[0].series not in {frame.series for frame in scanned.frames[1:]}


# --- every file, by the providers' rules ---


def test_mch_values_are_those_of_the_palette_formula():
    for path in files_of("mch", "*.gif"):
        with Image.open(path) as image:
            index_HW = np.array(image).astype(np.float64)
        expected_HW = (10 ** ((index_HW - 71.5) / 20) / 316) ** (1 / 1.5)
        expected_HW[(index_HW < 2) | ((index_HW >= 251) & (index_HW <= 254))] = 0
        expected_HW[index_HW == 255] = np.nan
        ((time, values_HW),) = fields_of(MCHReader(), path)
        assert time == datetime.strptime(path.name[3:12], "%y%j%H%M").replace(tzinfo=UTC)
        assert_equal_to(values_HW, expected_HW)


def test_fmi_values_are_those_of_the_formula():
    for path in files_of("fmi", "*.pgm.gz"):
        with gzip.open(path) as file:
            line = file.readline()
            while line.startswith((b"P5", b"#")):
                line = file.readline()
            width, height = map(int, line.split())
            assert file.readline() == b"255\n"
            stored_HW = np.frombuffer(file.read(), np.uint8).reshape(height, width)
        expected_HW = np.where(stored_HW == 255, np.nan, (stored_HW.astype(float) - 64) / 2)
        ((time, values_HW),) = fields_of(FMIReader(), path)
        assert time == datetime.strptime(path.name[:12], "%Y%m%d%H%M").replace(tzinfo=UTC)
        np.testing.assert_array_equal(values_HW, expected_HW)


def test_fmi_grid_has_the_corners_and_pixels_of_the_header():
    grid = FMIReader().scan(files_of("fmi", "*.pgm.gz")[0]).grid
    # metersperpixel_x and _y of the header; the corners are projected by us.
    assert grid.pixel_width == pytest.approx(999.674053, abs=1e-4)
    assert grid.pixel_height == pytest.approx(999.62859, abs=1e-4)
    assert grid.left == pytest.approx(-380886.310, abs=0.01)  # FMI's false easting
    bottom = grid.top - grid.height * grid.pixel_height
    assert bottom == pytest.approx(-3395677.920, abs=0.01)


def test_mrms_values_are_those_of_eccodes():
    eccodes = pytest.importorskip("eccodes")
    path = files_of("mrms", "*.grib2")[7]
    handle = eccodes.codes_new_from_message(path.read_bytes())
    expected = eccodes.codes_get_values(handle)
    eccodes.codes_release(handle)
    expected[(expected == -3) | (expected == -1)] = np.nan
    ((time, values_HW),) = fields_of(GRIB2Reader(), path)
    assert time == datetime(2019, 6, 10, 0, 14, tzinfo=UTC)
    np.testing.assert_allclose(values_HW.ravel(), expected, atol=1e-5)


def test_mrms_files_follow_each_other_every_2_minutes():
    times = [GRIB2Reader().scan(path).frames[0].time for path in files_of("mrms", "*.grib2")]
    assert np.all(np.diff(np.array(times)) == timedelta(minutes=2))
    assert len(times) == 18


@pytest.mark.parametrize("zone", ["NW", "SE"])
@pytest.mark.parametrize(
    ("product", "divisor", "missing"), [("rainfall", 100, -1), ("reflectivity_old", 1, 255)]
)
def test_meteonet_values_and_dates_are_those_of_numpy(zone, product, divisor, missing):
    path = real_data("meteonet") / f"{product}_{zone}_2016_08.3.npz"
    with np.load(path, allow_pickle=True) as arrays:  # a file that we trust
        stored_THW, dates = arrays["data"], arrays["dates"]
    read = list(fields_of(MeteoNetReader(), path))
    assert [time.replace(tzinfo=None) for time, _ in read] == dates.tolist()
    for stored_HW, (_, values_HW) in zip(stored_THW, read, strict=True):
        expected_HW = np.where(stored_HW == missing, np.nan, stored_HW / divisor)
        assert_equal_to(values_HW, expected_HW)


def test_meteonet_grid_has_the_coordinates_as_pixel_centres():
    folder = real_data("meteonet")
    for zone in ("NW", "SE"):
        grid = MeteoNetReader().scan(folder / f"rainfall_{zone}_2016_08.3.npz").grid
        with np.load(folder / f"radar_coords_{zone}.npz") as centres:
            lats_HW, lons_HW = centres["lats"], centres["lons"]
        rows, columns = np.arange(grid.height) + 0.5, np.arange(grid.width) + 0.5
        np.testing.assert_allclose(
            lats_HW[:, 5], grid.top - rows * grid.pixel_height, rtol=0, atol=1e-4
        )
        np.testing.assert_allclose(
            lons_HW[7], grid.left + columns * grid.pixel_width, rtol=0, atol=1e-4
        )


def test_radvor_values_are_those_of_the_header_and_bits():
    path = real_data("dwd") / "DE1200_RV2210180700.tar.bz2"
    names = [f"DE1200_RV2210180700_{lead:03}" for lead in (0, 5, 60)]
    with tarfile.open(path) as archive:
        for name, values_HW in zip(names, RADOLANReader().fields(path, names), strict=True):
            data = archive.extractfile(name).read()
            pixels = data[data.index(b"\x03") + 1 :]
            codes_HW = np.frombuffer(pixels, "<u2").reshape(1200, 1100)[::-1]
            expected_HW = np.where(codes_HW & 0x2000, np.nan, (codes_HW & 0x0FFF) / 100)
            assert_equal_to(values_HW, expected_HW)


def test_radolan_text_values_are_tenths_of_millimetres():
    path = real_data("dwd") / "RW-20221018.tar.gz"
    with tarfile.open(path) as archive:
        member = archive.getmembers()[5]
        table_HW = np.loadtxt(io.BytesIO(archive.extractfile(member).read()), skiprows=6)
    reader = RADOLANReader()
    (values_HW,) = reader.fields(path, [member.name])
    assert_equal_to(values_HW, np.where(table_HW == -1, np.nan, table_HW / 10))
    grid = reader.scan(path).grid
    assert (grid.left, grid.top) == (-523462.0, -4658645.0 + 900_000)


# --- statistics of the events, computed before there was a reader ---


@pytest.mark.parametrize(
    ("reader", "folder", "pattern", "wet", "maximum", "missing_percent", "wet_percent"),
    [
        (MCHReader(), "mch/20150515", "*.gif", 0.1 / 12, 9.63, 30.9, 17.1),
        (MCHReader(), "mch/20160711", "*.gif", 0.1 / 12, 9.63, 29.6, 13.3),
        (MCHReader(), "mch/20170131", "*.gif", 0.1 / 12, 2.42, 28.4, 20.7),
        (FMIReader(), "fmi/20160928", "*.gz", 15.0, 57.5, 24.3, 21.7),
        (FMIReader(), "fmi/20170509", "*.gz", 15.0, 51.0, 24.3, 5.0),
        # Only the first half of this event is at hand, of which two fields are read (they are
        # large): its largest value is not the event's 152.8.
        (GRIB2Reader(), "mrms/20190610", "*-00[02]000.grib2", 0.1, 150.3, 35.8, 6.2),
        (MeteoNetReader(), "meteonet", "rainfall_SE*.npz", 0.1 / 12, 5.0, 4.0, 1.7),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)
def test_statistics_of_an_event(
    reader, folder, pattern, wet, maximum, missing_percent, wet_percent
):
    source, _, event = folder.partition("/")
    paths = sorted((real_data(source) / event).glob(pattern))
    largest, missing, rain = 0.0, [], []
    for path in paths:
        for _, values_HW in fields_of(reader, path):
            observed = values_HW[~np.isnan(values_HW)]
            largest = max(largest, float(observed.max()))
            missing.append(1 - observed.size / values_HW.size)
            rain.append(np.mean(observed >= wet))
    assert largest == pytest.approx(maximum, abs=0.005)
    assert 100 * np.mean(missing) == pytest.approx(missing_percent, abs=0.06)
    assert 100 * np.mean(rain) == pytest.approx(wet_percent, abs=0.06)


# --- pysteps' importers ---


def test_mch_equals_pysteps():
    importers = pytest.importorskip("pysteps.io.importers")
    for path in files_of("mch", "*.gif")[::30]:
        expected_HW, _, metadata = importers.import_mch_gif(str(path), "AQC", "mm", 5.0)
        assert_equal_to(only_field(MCHReader(), path), expected_HW)
        grid = MCHReader().scan(path).grid
        assert (grid.left, grid.top) == (metadata["x1"], metadata["y2"])
        assert grid.pixel_width == metadata["xpixelsize"]


def test_fmi_equals_pysteps(monkeypatch):
    importers = pytest.importorskip("pysteps.io.importers")
    # Its projection library is no part of this project, and says nothing about values.
    monkeypatch.setattr(importers, "PYPROJ_IMPORTED", True)
    monkeypatch.setattr(importers, "_import_fmi_pgm_geodata", lambda metadata: {})
    for path in files_of("fmi", "*.pgm.gz")[::20]:
        expected_HW, _, _ = importers.import_fmi_pgm(str(path), gzipped=True)
        values_HW = only_field(FMIReader(), path)
        np.testing.assert_array_equal(np.isnan(values_HW), np.isnan(expected_HW))
        assert_equal_to(values_HW, expected_HW)


def test_mrms_equals_pysteps():
    pytest.importorskip("pygrib")
    importers = pytest.importorskip("pysteps.io.importers")
    path = files_of("mrms", "*.grib2")[3]
    expected_HW, _, _ = importers.import_mrms_grib(str(path), window_size=1)
    assert_equal_to(only_field(GRIB2Reader(), path), expected_HW, 1e-5)


# --- products beside the ones at hand ---


def test_mch_colour_products_and_unknown_scales_are_refused(tmp_path):
    path = files_of("mch", "*.gif")[0]
    for old, new, reason in (
        (b"PRDT=AQC", b"PRDT=RZC", "coded by colour"),
        (b"SCALE=mmh2LASSEN8bit", b"SCALE=mmh2OTHER_8bits", "scale"),
    ):
        changed = tmp_path / path.name
        changed.write_bytes(path.read_bytes().replace(old, new[: len(old)]))
        assert MCHReader().recognises(changed)
        with pytest.raises(ValueError, match=reason):
            MCHReader().scan(changed)


def test_every_palette_index_of_mch(tmp_path):
    """The real files have none of 251 to 254."""
    path = tmp_path / "AQC151351545F_00005.801.gif"
    index_HW = np.resize(np.arange(256, dtype=np.uint8), MCH_SHAPE)
    image = Image.fromarray(index_HW, mode="P")
    image.putpalette([(97 * n) % 256 for n in range(768)])
    image.save(path, optimize=False)
    values_HW = only_field(MCHReader(), path)
    assert np.isnan(values_HW[index_HW == 255]).all()
    dry_HW = (index_HW < 2) | ((index_HW > 250) & (index_HW < 255))
    assert (values_HW[dry_HW] == 0).all() and (values_HW[~dry_HW] != 0).all()


def test_a_renamed_mch_file_is_noticed(tmp_path):
    path = files_of("mch", "*.gif")[0]
    renamed = Path(shutil.copy(path, tmp_path / "AQC151351550F_00005.801.gif"))
    with pytest.raises(ValueError, match="renamed"):
        MCHReader().scan(renamed)


def test_mch_without_a_comment_is_read_by_its_name(tmp_path):
    path = files_of("mch", "*.gif")[0]
    bare = tmp_path / path.name
    with Image.open(path) as image:
        del image.info["comment"]
        image.save(bare, optimize=False)
    assert b"PRDT" not in bare.read_bytes()
    assert MCHReader().recognises(bare)
    assert MCHReader().scan(bare).frames == MCHReader().scan(path).frames
    assert_equal_to(only_field(MCHReader(), bare), only_field(MCHReader(), path), 0)
