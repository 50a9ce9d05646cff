"""Radar in NetCDF and in Zarr stores: CF files of several services, built here."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, ZstdCodec

from data_prep.readers.cf_fields import parse_unit
from data_prep.readers.cf_model import minutes_in
from data_prep.readers.mlcast import MLCastReader
from data_prep.readers.netcdf import NetCDFReader
from data_prep.readers.radar import BadFileError, RadarFile, RadarReader
from tests.radar_contract import check_radar_reader

netCDF4 = pytest.importorskip("netCDF4")

NAN = np.nan
START = datetime(2018, 6, 16, 10, tzinfo=UTC)
LAEA = {
    "grid_mapping_name": "lambert_azimuthal_equal_area",
    "latitude_of_projection_origin": 55.0,
    "longitude_of_projection_origin": 10.0,
    "false_easting": 1_950_000.0,
    "false_northing": -2_100_000.0,
    "semi_major_axis": 6378137.0,
    "inverse_flattening": 298.257223563,
}


def rain(num_times: int = 3, height: int = 5, width: int = 4) -> NDArray[np.float32]:
    """Fields whose pixels all differ: rain in steps of 0.25, with one dry and one missing pixel."""
    values = 0.25 * np.arange(1, num_times * height * width + 1, dtype=np.float32)
    values = values.reshape(num_times, height, width)
    values[:, 0, 0] = 0
    values[:, 1, 2] = NAN
    return values


class File:
    """A NetCDF file to which a test adds what it is about."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.file = netCDF4.Dataset(path, "w", **options)

    def dims(self, **sizes: int | None) -> File:
        for name, size in sizes.items():
            self.file.createDimension(name, size)
        return self

    def add(self, name: str, dims: tuple[str, ...], values: Any, /, **attrs: Any) -> File:
        """`_type` and `_fill` are the stored type and fill value; the rest are attributes."""
        endian = attrs.pop("_endian", "native")
        kind = attrs.pop("_type", None) or np.asarray(values).dtype.newbyteorder(endian[0])
        fill = attrs.pop("_fill", None)
        variable = self.file.createVariable(name, kind, dims, fill_value=fill, endian=endian)
        variable.set_auto_maskandscale(False)
        variable.setncatts(attrs)
        variable[...] = values
        return self

    def done(self) -> Path:
        self.file.close()
        return self.path


def grid(
    file: File, values: NDArray[Any], *, y_up: bool = False, x_left: bool = False, unit: str = "m"
) -> File:
    """Dimensions time, y, x; times every 5 minutes; pixels of 2000 m from (1000, -3000) down."""
    num_times, height, width = values.shape
    scale = 1000.0 if unit == "km" else 1.0
    y = (-4000.0 - 2000 * np.arange(height)) / scale
    x = (2000.0 + 2000 * np.arange(width)) / scale
    file.dims(time=num_times, y=height, x=width)
    file.add(
        "y", ("y",), y[::-1] if y_up else y, units=unit, standard_name="projection_y_coordinate"
    )
    file.add(
        "x", ("x",), x[::-1] if x_left else x, units=unit, standard_name="projection_x_coordinate"
    )
    return file.add(
        "time",
        ("time",),
        5.0 * np.arange(num_times),
        units=f"minutes since {START:%F %T}",
        standard_name="time",
        calendar="standard",
    )


def simple(path: Path, values: NDArray[Any] | None = None, **attrs: Any) -> Path:
    values = rain() if values is None else values
    attrs = {"units": "mm h-1", "standard_name": "rainfall_rate", "_fill": np.float32(NAN)} | attrs
    return grid(File(path), values).add("rr", ("time", "y", "x"), values, **attrs).done()


def read(reader: RadarReader, path: Path) -> tuple[RadarFile, NDArray[np.float32]]:
    scanned = reader.scan(path)
    return scanned, np.stack(list(reader.fields(path, [frame.key for frame in scanned.frames])))


def times_of(scanned: RadarFile) -> list[datetime]:
    return [frame.time for frame in scanned.frames]


FORMATS = [
    "NETCDF3_CLASSIC",
    "NETCDF3_64BIT_OFFSET",
    "NETCDF3_64BIT_DATA",
    "NETCDF4_CLASSIC",
    "NETCDF4",
]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_of_netcdf_keeps_the_contract(tmp_path, kind):
    """Enough pixels that 60 % of a file ends inside the data."""
    values = np.tile(rain(4, 40, 30), (1, 1, 1))
    file = grid(File(tmp_path / "rain.nc", format=kind), values)
    path = file.add(
        "rainfall_rate", ("time", "y", "x"), values, units="mm h-1", _fill=np.float32(NAN)
    ).done()
    scanned = check_radar_reader(
        NetCDFReader(), path, quantity="rain_rate", interval_minutes=5, shape=(40, 30)
    )
    np.testing.assert_array_equal(read(NetCDFReader(), path)[1], values)
    assert times_of(scanned) == [START + timedelta(minutes=5 * i) for i in range(4)]


def test_a_classic_file_that_lost_its_last_bytes_is_named(tmp_path):
    """The C library reads zeros there: no rain where nothing is known."""
    for num_times in (None, 3):
        file = File(tmp_path / f"{num_times}.nc", format="NETCDF3_CLASSIC")
        file.dims(time=num_times, y=5, x=4).add(
            "time", ("time",), np.arange(3.0), units="hours since 2018-06-16"
        )
        path = file.add(
            "precipitation", ("time", "y", "x"), rain(), units="mm", accumulation="1 h"
        ).done()
        assert len(read(NetCDFReader(), path)[1]) == 3
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(BadFileError, match="truncated: it has"):
            NetCDFReader().scan(path)
        with pytest.raises(BadFileError, match="truncated: it has"):
            list(NetCDFReader().fields(path, ["0"]))


@pytest.mark.parametrize("y_up", [False, True])
@pytest.mark.parametrize("x_left", [False, True])
@pytest.mark.parametrize("unit", ["m", "km"])
def test_rows_and_columns_are_turned_to_north_and_west(tmp_path, y_up, x_left, unit):
    values = rain()
    stored = values[:, :: -1 if y_up else 1, :: -1 if x_left else 1]
    file = grid(File(tmp_path / "a.nc"), values, y_up=y_up, x_left=x_left, unit=unit)
    mapping = LAEA | {
        name: LAEA[name] / 1000 for name in ("false_easting", "false_northing") if unit == "km"
    }
    file.add("crs", (), np.int32(0), **mapping)
    file.add(
        "rr",
        ("time", "y", "x"),
        stored,
        units="mm/h",
        grid_mapping="crs: x y",
        _fill=np.float32(NAN),
    )
    scanned, read_values = read(NetCDFReader(), file.done())
    np.testing.assert_array_equal(read_values, values)
    place = scanned.grid
    assert (place.left, place.top, place.pixel_width, place.pixel_height, place.unit) == (
        1000,
        -3000,
        2000,
        2000,
        "m",
    )
    assert place.projection == (
        "+proj=laea +lat_0=55 +lon_0=10 +x_0=1950000 +y_0=-2100000 +a=6378137 +rf=298.2572236 "
        "+units=m +no_defs"
    )


def test_columns_before_rows_are_transposed(tmp_path):
    values = rain()
    file = grid(File(tmp_path / "a.nc"), values)
    file.add("rr", ("time", "x", "y"), values.swapaxes(1, 2), units="mm/h", _fill=np.float32(NAN))
    np.testing.assert_array_equal(read(NetCDFReader(), file.done())[1], values)


@pytest.mark.parametrize(
    ("unit", "factor", "quantity"),
    [
        ("mm h-1", 1, "rain_rate"),
        ("mm/hr", 1, "rain_rate"),
        ("kg m-2 s-1", 3600, "rain_rate"),
        ("kg m**-2 s**-1", 3600, "rain_rate"),
        ("m s-1", 3_600_000, "rain_rate"),
        ("mm/day", 1 / 24, "rain_rate"),
        ("0.1 mm/h", 0.1, "rain_rate"),
        ("dBZ", 1, "reflectivity"),
        ("mm/5min", 1, "accumulation"),
        ("0.01 mm", 0.01, "accumulation"),
        ("kg m-2", 1, "accumulation"),
        ("m", 1000, "accumulation"),
    ],
)
def test_units_become_those_of_the_quantity(tmp_path, unit, factor, quantity):
    path = simple(tmp_path / "a.nc", units=unit)
    scanned, values = read(NetCDFReader(), path)
    assert scanned.quantity == quantity
    np.testing.assert_allclose(values, rain() * factor, rtol=2e-7)
    assert (scanned.accumulation_minutes == 5) == (quantity == "accumulation")
    np.testing.assert_allclose(
        read(NetCDFReader(unit=unit), simple(tmp_path / "b.nc", units="furlong"))[1],
        values,
    )


@pytest.mark.parametrize("unit", ["K", "1", "", "m2", "kg m-3", "%", "mm6 m-3", "minutes", "m s-2"])
def test_a_unit_that_is_no_rain_is_refused(tmp_path, unit):
    assert parse_unit(unit) is None
    path = simple(tmp_path / "a.nc", units=unit)
    assert not NetCDFReader().recognises(path)
    with pytest.raises(BadFileError, match=r"holds rr \(.*unit that is not understood.*unit=UNIT"):
        NetCDFReader().scan(path)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("time: sum (interval: 5 minutes)", 5),
        ("PT1H30M", 90),
        ("rain of 6min", 6),
        ("hourly sums", 60),
        ("24-hour total", 1440),
        ("30 s", 0.5),
        ("at 2 m height", None),
        ("version 3h2x", None),
    ],
)
def test_durations_in_words(text, minutes):
    assert minutes_in(text) == minutes


@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "f4", "f8"])
def test_packed_numbers_with_their_exceptions(tmp_path, kind, endian):
    """value = stored * 0.5 - 1; 7 is the fill, 8 another missing value, 100 beyond the range."""
    stored = np.array([[[2, 3, 7, 8], [9, 40, 100, 1]]]).astype(kind)
    file = grid(File(tmp_path / "a.nc"), stored)
    one = stored.dtype.type
    file.add(
        "rr",
        ("time", "y", "x"),
        stored,
        units="mm h-1",
        scale_factor=0.5,
        add_offset=-1.0,
        _fill=one(7),
        missing_value=one(8),
        valid_max=one(99),
        _endian=endian,
    )
    scanned, values = read(NetCDFReader(), file.done())
    expected = [[[0, 0.5, NAN, NAN], [3.5, 19, NAN, 0]]]  # the last is -0.5: noise around 0
    np.testing.assert_array_equal(values, np.float32(expected))
    assert "Stored 7 and 8 and NaN are missing" in scanned.missing_rule


def test_unsigned_bytes_and_a_range_in_values(tmp_path):
    stored = np.array([[[0, 100], [-56, -1]]], np.int8)  # 0, 100, 200, 255
    file = grid(File(tmp_path / "a.nc"), stored)
    file.add(
        "dbz",
        ("time", "y", "x"),
        stored,
        units="dBZ",
        _Unsigned="true",
        _fill=np.int8(-1),
        scale_factor=0.5,
        add_offset=-32.0,
        valid_max=60.0,
    )
    values = read(NetCDFReader(), file.done())[1]
    np.testing.assert_array_equal(values, np.float32([[[-32, 18], [NAN, NAN]]]))


def test_undeclared_flags_are_missing_and_noise_is_dry(tmp_path):
    values = rain()
    values[0, 4] = [-0.05, -1, -99, 1e20]
    values[2, 4] = [np.inf, -np.inf, NAN, 3]
    values[1, 4] = netCDF4.default_fillvals["f4"]
    path = simple(tmp_path / "a.nc", values, _fill=None)
    found = read(NetCDFReader(), path)[1]
    np.testing.assert_array_equal(found[0, 4], np.float32([0, NAN, NAN, 1e20]))
    assert np.isnan(found[1, 4]).all() and np.isnan(found[2, 4]).tolist() == [True] * 3 + [False]
    reflectivity = simple(tmp_path / "b.nc", values, units="dBZ", _fill=None)
    assert read(NetCDFReader(), reflectivity)[1][0, 4, 2] == -99


def bom(path: Path, **changes: Any) -> Path:
    """As Rainfields writes it: packed, coordinates in km, one field between two scalar times."""
    raw = np.array([[0, 20, 200, -1], [3, 0, -2, 5], [1, 2, 3, 4]], np.int16)
    file = File(path).dims(x=4, y=3)
    file.add(
        "valid_time",
        (),
        1529143560,
        units="seconds since 1970-01-01 00:00:00 UTC",
        standard_name="time",
        _type="i8",
    )
    file.add(
        "start_time",
        (),
        1529143200,
        units="seconds since 1970-01-01 00:00:00 UTC",
        standard_name="time",
        _type="i8",
    )
    file.add(
        "proj",
        (),
        0,
        _type="i1",
        grid_mapping_name="albers_conical_equal_area",
        latitude_of_projection_origin=-37.852,
        longitude_of_central_meridian=144.752,
        standard_parallel=np.array([-18.0, -36.0]),
        semi_major_axis=6378137.0,
        semi_minor_axis=6356752.31414,
    )
    file.add(
        "x",
        ("x",),
        np.float32([-1, -0.5, 0, 0.5]),
        units="km",
        standard_name="projection_x_coordinate",
        valid_min=-1.0,
        valid_max=0.5,
    )
    file.add(
        "y",
        ("y",),
        np.float32([0.5, 0, -0.5]),
        units="km",
        standard_name="projection_y_coordinate",
        valid_min=-0.5,
        valid_max=0.5,
    )
    attrs = {
        "units": "kg m-2",
        "grid_mapping": "proj",
        "scale_factor": 0.05,
        "add_offset": 0.0,
        "standard_name": "precipitation_amount",
        "_fill": np.int16(-1),
    } | changes
    return file.add("precipitation", ("y", "x"), raw, **attrs).done()


def test_the_bureau_of_meteorology_as_pysteps_reads_it(tmp_path):
    path = bom(tmp_path / "2_20180616_100600.prcp-cscn.nc")
    scanned, (values,) = read(NetCDFReader(), path)
    expected = np.float32([[0, 1, 10, NAN], [0.15, 0, 0, 0.25], [0.05, 0.1, 0.15, 0.2]])
    np.testing.assert_allclose(values, expected, rtol=1e-7)
    assert (scanned.quantity, scanned.accumulation_minutes, scanned.interval_minutes) == (
        "accumulation",
        6,
        6,
    )
    assert times_of(scanned) == [datetime(2018, 6, 16, 10, 6, tzinfo=UTC)]
    place = scanned.grid
    assert (place.left, place.top, place.pixel_width) == (-1250, 750, 500)
    assert place.projection and place.projection.startswith(
        "+proj=aea +lat_0=-37.852 +lon_0=144.752 +lat_1=-18 +lat_2=-36"
    )
    importers = pytest.importorskip("pysteps.io.importers")
    precipitation, _, metadata = importers.import_bom_rf3(str(path))
    clipped = np.maximum(np.ma.filled(precipitation, NAN), 0)  # pysteps leaves -0.1
    np.testing.assert_allclose(values, clipped, rtol=1e-6)
    assert metadata["accutime"] == scanned.accumulation_minutes


def test_time_bounds_end_the_interval_and_give_the_sum_its_duration(tmp_path):
    values = rain()
    file = grid(File(tmp_path / "a.nc"), values).dims(nv=2)
    file.file["time"].bounds = "time_bnds"
    starts = 5 * np.arange(3)
    file.add("time_bnds", ("time", "nv"), np.stack([starts, starts + 10], 1))
    file.add("tp", ("time", "y", "x"), values, units="mm", _fill=np.float32(NAN))
    scanned = NetCDFReader().scan(file.done())
    assert (scanned.accumulation_minutes, scanned.interval_minutes) == (10, 5)
    assert times_of(scanned)[0] == START + timedelta(minutes=10)


def test_a_sum_over_an_unknown_or_changing_time_is_refused(tmp_path):
    path = bom(tmp_path / "a.nc")
    with netCDF4.Dataset(path, "a") as file:
        file.renameVariable("start_time", "elsewhere")
    with pytest.raises(BadFileError, match="over how long.*accumulation_minutes=MINUTES"):
        NetCDFReader().scan(path)
    assert NetCDFReader(accumulation_minutes=30).scan(path).accumulation_minutes == 30
    values = rain()
    file = grid(File(tmp_path / "b.nc"), values)
    file.add("start_time", ("time",), 5 * np.arange(3) - [5, 5, 10], units=f"minutes since {START}")
    file.add("tp", ("time", "y", "x"), values, units="mm", _fill=np.float32(NAN))
    with pytest.raises(BadFileError, match="sums over 5 to 10 minutes"):
        NetCDFReader().scan(file.done())


@pytest.mark.parametrize(
    ("attrs", "said_by"),
    [
        ({"cell_methods": "time: sum (interval: 7 min)"}, "cell_methods"),
        ({"long_name": "7 minute rainfall accumulation"}, "long_name"),
        ({"units": "mm/7min"}, "unit"),
    ],
)
def test_the_duration_of_a_sum_in_attributes(tmp_path, attrs, said_by):
    scanned = NetCDFReader().scan(simple(tmp_path / "a.nc", **{"units": "mm"} | attrs))
    assert scanned.accumulation_minutes == 7
    assert any(said_by in note for note in scanned.notes)


@pytest.mark.parametrize(
    ("units", "calendar", "number", "expected"),
    [
        ("seconds since 1970-01-01", "standard", 86_400, datetime(1970, 1, 2, tzinfo=UTC)),
        ("days since 2018-10-31 12:00", "gregorian", 0.25, datetime(2018, 10, 31, 18, tzinfo=UTC)),
        ("hours since 2018-1-1T00:00:00Z", "", 1, datetime(2018, 1, 1, 1, tzinfo=UTC)),
        (
            "minutes since 2018-01-01 00:00:00 +02:00",
            "standard",
            0,
            datetime(2017, 12, 31, 22, tzinfo=UTC),
        ),
        (
            "minutes since 2018-01-01 00:00:00.0 UTC",
            "proleptic_gregorian",
            5,
            datetime(2018, 1, 1, 0, 5, tzinfo=UTC),
        ),
        ("days since 2020-02-28", "noleap", 1, datetime(2020, 3, 1, tzinfo=UTC)),
    ],
)
def test_times_in_many_spellings(tmp_path, units, calendar, number, expected):
    file = File(tmp_path / "a.nc").dims(y=5, x=4)
    file.add("time", (), np.float64(number), units=units, calendar=calendar)
    file.add("rr", ("y", "x"), rain()[0], units="mm h-1")
    scanned = NetCDFReader().scan(file.done())
    assert times_of(scanned) == [expected]
    assert scanned.frames[0].key == ""


@pytest.mark.parametrize(
    "units", ["minutes since 2018-01-01 00:00 CET", "fortnights since 1970-1-1"]
)
def test_times_that_are_not_understood_are_refused(tmp_path, units):
    file = File(tmp_path / "a.nc").dims(y=5, x=4)
    file.add("time", (), 1.0, units=units)
    file.add("rr", ("y", "x"), rain()[0], units="mm h-1")
    with pytest.raises(BadFileError, match="time.*(unknown time zone|no readable times)"):
        NetCDFReader().scan(file.done())


def test_the_time_of_a_file_without_a_coordinate(tmp_path):
    def write(name: str, **attrs: str) -> Path:
        file = File(tmp_path / name).dims(y=5, x=4)
        file.file.setncatts(attrs)
        return file.add("rr", ("y", "x"), rain()[0], units="mm h-1").done()

    by_name = NetCDFReader().scan(write("radar_201806161005.nc"))
    assert times_of(by_name) == [START + timedelta(minutes=5)]
    assert any("file's name" in note for note in by_name.notes)
    by_attribute = NetCDFReader().scan(write("a.nc", nominal_product_time="2018-06-16T10:00:00Z"))
    assert times_of(by_attribute) == [START]
    with pytest.raises(BadFileError, match="has no time for rr"):
        NetCDFReader().scan(write("b.nc"))


def test_forecasts_are_marked(tmp_path):
    values = rain()
    file = grid(File(tmp_path / "a.nc"), values)
    file.add(
        "issued",
        (),
        5,
        units=f"minutes since {START:%F %T}",
        standard_name="forecast_reference_time",
    )
    file.add("rr", ("time", "y", "x"), values, units="mm/h")
    scanned = NetCDFReader().scan(file.done())
    assert [frame.lead_minutes for frame in scanned.frames] == [0, 0, 5]


def test_the_time_of_issue_is_not_the_time(tmp_path):
    values = rain()
    file = grid(File(tmp_path / "a.nc"), values).dims(issued=1)
    file.add(
        "issued",
        ("issued",),
        [0],
        units="hours since 2000-01-01",
        standard_name="forecast_reference_time",
    )
    file.add("rr", ("issued", "time", "y", "x"), values[None], units="mm/h")
    scanned = NetCDFReader().scan(file.done())
    assert times_of(scanned)[0] == START and scanned.frames[0].lead_minutes > 1e6


def test_several_fields_are_named_and_one_can_be_chosen(tmp_path):
    values = rain()
    file = grid(File(tmp_path / "a.nc"), values)
    for name in ("rainfall_rate", "precipitation"):
        file.add(name, ("time", "y", "x"), values + len(name), units="mm/h", _fill=np.float32(NAN))
    file.add("rainfall_rate_quality", ("time", "y", "x"), values, units="mm/h")
    path = file.done()
    assert NetCDFReader().recognises(path)
    with pytest.raises(BadFileError, match=r"rainfall_rate \(mm/h\), precipitation \(mm/h\)\. C.*"):
        NetCDFReader().scan(path)
    for name in ("rainfall_rate", "precipitation"):
        found = read(NetCDFReader(variable=name), path)[1]
        np.testing.assert_array_equal(found, values + np.float32(len(name)))
    with pytest.raises(BadFileError, match="has no variable rain; it has .*rainfall_rate"):
        NetCDFReader(variable="rain").scan(path)


def test_a_standard_name_wins_over_a_name_and_a_name_over_a_unit(tmp_path):
    values = rain()
    for names, expected in (
        ({"a": "rainfall_flux", "precipitation": "", "b": ""}, "a"),
        ({"precipitation": "", "b": ""}, "precipitation"),
        ({"b": "", "c_error": ""}, "b"),
    ):
        file = grid(File(tmp_path / f"{len(names)}.nc"), values)
        modified = {"units": "mm/h", "standard_name": "rainfall_flux standard_error"}
        file.add("rain", ("time", "y", "x"), values, **modified)
        for name, standard_name in names.items():
            file.add(name, ("time", "y", "x"), values, units="mm/h", standard_name=standard_name)
        assert NetCDFReader().scan(file.done()).notes[0].startswith(f"Variable {expected}:")


def test_levels_of_one_are_dropped_and_ensembles_refused(tmp_path):
    values = rain()
    file = grid(File(tmp_path / "a.nc"), values).dims(level=1, member=2)
    file.add(
        "rr", ("time", "level", "y", "x"), values[:, None], units="mm/h", _fill=np.float32(NAN)
    )
    file.add("dbz", ("member", "time", "y", "x"), np.stack([values, values]), units="dBZ")
    path = file.done()
    np.testing.assert_array_equal(read(NetCDFReader(variable="rr"), path)[1], values)
    with pytest.raises(BadFileError, match="dbz has further dimensions: member of 2"):
        NetCDFReader(variable="dbz").scan(path)


def test_geographic_grids_across_the_date_line(tmp_path):
    values = rain()
    file = File(tmp_path / "a.nc").dims(time=3, lat=5, lon=4)
    file.add("time", ("time",), np.arange(3), units="hours since 2018-06-16")
    file.add("lat", ("lat",), np.float32(-36.05 + 0.1 * np.arange(5)), units="degrees_north")
    file.add("lon", ("lon",), [179.85, 179.95, -179.95, -179.85], units="degrees_east")
    file.add("rr", ("time", "lat", "lon"), values[:, ::-1], units="mm/h", _fill=np.float32(NAN))
    scanned, found = read(NetCDFReader(), file.done())
    np.testing.assert_array_equal(found, values)
    place = scanned.grid
    assert (place.projection, place.unit) == ("EPSG:4326", "degree")
    assert (place.left, place.top) == pytest.approx((179.8, -35.6), abs=1e-5)
    assert (place.pixel_width, place.pixel_height) == pytest.approx((0.1, 0.1), abs=1e-5)


def test_latitudes_of_every_pixel_tell_which_way_is_north(tmp_path):
    values = rain()
    file = File(tmp_path / "a_201806161000.nc").dims(row=5, col=4)
    lat, lon = np.meshgrid(50 + 0.1 * np.arange(5), 8 - 0.1 * np.arange(4), indexing="ij")
    file.add("lat", ("row", "col"), lat, units="degrees_north")
    file.add("lon", ("row", "col"), lon, units="degrees_east")
    file.add("rr", ("row", "col"), values[0, ::-1, ::-1], units="mm/h", _fill=np.float32(NAN))
    scanned, (found,) = read(NetCDFReader(), file.done())
    np.testing.assert_array_equal(found, values[0])
    assert scanned.grid.unit is None


def test_packed_coordinates_are_scaled(tmp_path):
    values = rain(1)
    file = File(tmp_path / "a_201806161000.nc").dims(y=5, x=4)
    attrs = {"units": "m", "scale_factor": 100.0, "add_offset": 50.0}
    file.add("y", ("y",), -np.arange(5, dtype=np.int16), **attrs)
    file.add("x", ("x",), np.arange(4, dtype=np.int16), **attrs)
    file.add("rr", ("y", "x"), values[0], units="mm/h", _fill=np.float32(NAN))
    place = NetCDFReader().scan(file.done()).grid
    assert (place.left, place.top, place.pixel_width) == (0, 100, 100)


def test_uneven_coordinates_give_no_place_and_say_so(tmp_path):
    values = rain()
    file = grid(File(tmp_path / "a.nc"), values)
    file.file["y"][:] = [9, 7, 6, 2, 0]
    file.add("rr", ("time", "y", "x"), values, units="mm/h")
    scanned = NetCDFReader().scan(file.done())
    assert scanned.grid.unit is None
    assert any("not at equal distances" in note for note in scanned.notes)


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [
        (
            {"proj4": "+proj=stere +lat_0=90 +a=6378.137 +b=6356.752 +units=km"},
            "+proj=stere +lat_0=90 +a=6378137 +b=6356752 +units=m",
        ),
        (
            {
                "grid_mapping_name": "polar_stereographic",
                "standard_parallel": 60.0,
                "straight_vertical_longitude_from_pole": 10.0,
                "earth_radius": 6370040.0,
            },
            "+proj=stere +lon_0=10 +lat_ts=60 +lat_0=90 +R=6370040 +units=m +no_defs",
        ),
        ({"grid_mapping_name": "mercator", "crs_wkt": 'PROJCRS["mine"]'}, 'PROJCRS["mine"]'),
    ],
)
def test_projections_as_files_say_them(tmp_path, attrs, expected):
    values = rain()
    file = grid(File(tmp_path / "a.nc"), values).add("crs", (), np.int32(0), **attrs)
    file.add("rr", ("time", "y", "x"), values, units="mm/h", grid_mapping="crs")
    place = NetCDFReader().scan(file.done()).grid
    assert (place.projection, place.unit) == (expected, "m")


def test_nwc_saf_places_its_grid_by_global_attributes(tmp_path):
    """Rows and columns have no coordinates in metres; GDAL's six numbers say where they lie."""
    stored = np.array([[0, 15, 65535], [500, 1, 2]], np.uint16)
    file = File(tmp_path / "S_NWC_CRR_MSG4_Europe-VISIR_20180601T070000Z.nc").dims(ny=2, nx=3)
    file.file.setncatts(
        {
            "gdal_projection": "+proj=geos +a=6378137 +b=6356752.3 +lon_0=0 +h=35785863.0",
            "gdal_geotransform_table": np.array([-3301500.0, 3000, 0, 5569500, 0, -3000]),
            "nominal_product_time": "2018-06-01T07:00:00Z",
        }
    )
    attrs = {"scale_factor": 0.1, "add_offset": 0.0, "_fill": np.uint16(65535)}
    file.add("crr_intensity", ("ny", "nx"), stored, units="mm/h", **attrs)
    file.add("crr_accum", ("ny", "nx"), stored, units="mm", **attrs)
    file.add("crr_quality", ("ny", "nx"), stored, units="1", flag_masks=[1, 2])
    scanned, (values,) = read(NetCDFReader(), file.done())
    np.testing.assert_allclose(values, np.float32([[0, 1.5, NAN], [50, 0.1, 0.2]]))
    assert scanned.frames[0].time == datetime(2018, 6, 1, 7, tzinfo=UTC)
    place = scanned.grid
    assert (place.left, place.top, place.pixel_width) == (-3_301_500, 5_569_500, 3000)


def test_groups_and_reversed_dimensions_as_in_imerg(tmp_path):
    values = rain(1)
    path = tmp_path / "a.nc4"
    file = File(path).dims(nv=2)
    group = file.file.createGroup("Grid")
    inner = File.__new__(File)
    inner.file, inner.path = group, path
    inner.dims(time=1, lon=4, lat=5)
    inner.add("time", ("time",), [300], units="seconds since 2018-06-16", bounds="time_bnds")
    inner.add("time_bnds", ("time", "nv"), [[0, 1800]])
    inner.add("lat", ("lat",), np.float32(np.arange(5)), units="degrees_north")
    inner.add("lon", ("lon",), np.float32(np.arange(4)), units="degrees_east")
    stored = np.nan_to_num(values[:, ::-1].swapaxes(1, 2), nan=-9999.9)
    inner.add(
        "precipitation", ("time", "lon", "lat"), stored, units="mm/hr", _fill=np.float32(-9999.9)
    )
    scanned, found = read(NetCDFReader(), file.done())
    np.testing.assert_array_equal(found, values)
    assert times_of(scanned) == [datetime(2018, 6, 16, 0, 30, tzinfo=UTC)]


# --- Zarr -----------------------------------------------------------------------------------------


def store(
    path: Path,
    values: NDArray[Any],
    *,
    version: int,
    name: str = "rainfall_flux",
    fill: float | None = NAN,
    codec: Any = "auto",
    **global_attrs: Any,
) -> Path:
    """A store as the convention has it, written without xarray; y runs from the south."""
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    attrs = {
        name: {
            "units": "kg m-2 h-1",
            "standard_name": "rainfall_flux",
            "long_name": "rain",
            "grid_mapping": "crs",
        },
        "time": {
            "units": "minutes since 2018-06-16T10:00:00",
            "calendar": "proleptic_gregorian",
            "standard_name": "time",
        },
        "y": {"units": "m", "standard_name": "projection_y_coordinate"},
        "x": {"units": "m", "standard_name": "projection_x_coordinate"},
        "crs": {"crs_wkt": 'PROJCRS["mine"]', "spatial_ref": 'PROJCRS["mine"]'},
    }
    num_times, height, width = values.shape
    arrays = {
        name: (values[:, ::-1], ("time", "y", "x")),
        "time": (5 * np.arange(num_times), ("time",)),
        "y": (1000.0 * np.arange(height), ("y",)),
        "x": (1000.0 * np.arange(width), ("x",)),
        "crs": (np.array(0), ()),
    }
    for key, (data, dims) in arrays.items():
        chunks = (1, *data.shape[1:]) if key == name else data.shape or "auto"
        extra = {"dimension_names": dims} if version == 3 else {}
        array = group.create_array(
            key,
            shape=data.shape,
            dtype=data.dtype,
            chunks=chunks,
            fill_value=fill if key == name else None,
            compressors=codec if key == name else "auto",
            attributes=attrs[key] | ({} if version == 3 else {"_ARRAY_DIMENSIONS": list(dims)}),
            **extra,
        )
        array[...] = data
    group.attrs.update({"license": "CC-BY-4.0"} | global_attrs)
    if version == 2:
        zarr.consolidate_metadata(str(path))
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_a_store_is_read_one_time_at_a_time(tmp_path, version):
    path = store(tmp_path / "a.zarr", rain(), version=version)
    reader = MLCastReader()
    assert reader.recognises(path)
    scanned, values = read(reader, path)
    np.testing.assert_array_equal(values, rain())
    assert values.dtype == np.float32
    assert (scanned.quantity, scanned.interval_minutes) == ("rain_rate", 5)
    assert times_of(scanned) == [START + timedelta(minutes=5 * i) for i in range(3)]
    assert (scanned.grid.top, scanned.grid.projection) == (4500, 'PROJCRS["mine"]')
    assert any("CC-BY-4.0" in note for note in scanned.notes)
    with pytest.raises(BadFileError, match="no field '3'"):
        list(reader.fields(path, ["3"]))


@pytest.mark.parametrize("version", [2, 3])
def test_what_xarray_writes_is_what_is_read(tmp_path, version):
    xarray = pytest.importorskip("xarray")
    values = rain()
    times = [np.datetime64("2018-06-16T10:00") + np.timedelta64(5 * i, "m") for i in range(3)]
    dataset = xarray.Dataset(
        {
            "tp": (
                ("time", "lat", "lon"),
                values,
                {"units": "mm", "standard_name": "rainfall_amount"},
            )
        },
        coords={
            "time": np.array(times, "datetime64[ns]"),
            "lat": ("lat", 50 - np.arange(5.0), {"units": "degrees_north"}),
            "lon": ("lon", np.arange(4.0), {"units": "degrees_east"}),
        },
    )
    packed = {"dtype": "int16", "scale_factor": 0.25, "_FillValue": -9}
    for name, encoding in (("float", {}), ("packed", {"tp": packed})):
        path = tmp_path / f"{name}.zarr"
        dataset.to_zarr(path, zarr_format=version, encoding=encoding, consolidated=version == 2)
        assert MLCastReader().recognises(path)
        scanned, found = read(MLCastReader(), path)
        np.testing.assert_array_equal(found, values)
        assert scanned.accumulation_minutes == 5
        assert times_of(scanned)[-1] == START + timedelta(minutes=10)


def test_times_after_the_last_valid_one_are_left_out(tmp_path):
    path = store(tmp_path / "a.zarr", rain(), version=3, last_valid_timestep="2018-06-16T10:05:00")
    assert len(MLCastReader().scan(path).frames) == 2


def test_a_fill_value_that_reads_as_dry_is_noted(tmp_path):
    noted = MLCastReader().scan(store(tmp_path / "a.zarr", rain(), version=3, fill=0.0)).notes
    assert any("not in the store read as 0" in note for note in noted)
    unnoted = MLCastReader().scan(store(tmp_path / "b.zarr", rain(), version=3)).notes
    assert not any("not in the store" in note for note in unnoted)


@pytest.mark.parametrize("codec", ["blosc", "zstd", None])
@pytest.mark.parametrize("version", [2, 3])
def test_a_damaged_store_is_named(tmp_path, version, codec):
    """Blosc itself reads beyond the end of a chunk that was cut."""
    codecs = {
        2: {"blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd()},
        3: {"blosc": BloscCodec(), "zstd": ZstdCodec()},
    }
    path = store(tmp_path / "a.zarr", rain(), version=version, codec=codecs[version].get(codec))
    np.testing.assert_array_equal(read(MLCastReader(), path)[1], rain())
    chunk = path / "rainfall_flux" / ("c/1/0/0" if version == 3 else "1.0.0")
    chunk.write_bytes(chunk.read_bytes()[:-9])
    fields = MLCastReader().fields(path, ["0", "1"])
    next(fields)
    with pytest.raises(BadFileError) as raised:
        next(fields)
    assert raised.value.path == str(path) and raised.value.reason
    metadata = ["rainfall_flux/zarr.json"] if version == 3 else ["rainfall_flux/.zarray"]
    for name in metadata + [".zmetadata"] * (version == 2):
        (path / name).write_text("{")
    assert not MLCastReader().recognises(path)
    with pytest.raises(BadFileError) as raised:
        MLCastReader().scan(path)
    assert raised.value.path == str(path)


def test_a_store_without_times_is_refused(tmp_path):
    path = tmp_path / "a.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    attrs = {"units": "mm/h"}
    group.create_array(
        "rain", shape=(4, 5), dtype="f4", dimension_names=("y", "x"), attributes=attrs
    )
    assert not MLCastReader().recognises(path)
    with pytest.raises(BadFileError, match="no dimension time of rain"):
        MLCastReader().scan(path)


def test_other_folders_and_files_are_no_store(tmp_path):
    reader = MLCastReader()
    path = store(tmp_path / "a.zarr", rain(), version=3)
    shutil.rmtree(path / "rainfall_flux")
    for other in (path, tmp_path, simple(tmp_path / "a.nc"), tmp_path / "absent.zarr"):
        assert not reader.recognises(other)
        with pytest.raises(BadFileError) as raised:
            reader.scan(other)
        assert raised.value.path == str(other)
