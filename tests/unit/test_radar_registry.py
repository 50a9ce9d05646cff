"""Choosing a radar reader: by name and options, or by looking at the files."""

from __future__ import annotations

import fnmatch
import gzip
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.inspection import inspect_file
from data_prep.readers import RADAR_READERS, detect_reader, radar_reader
from data_prep.readers.geotiff import GeoTIFFReader
from data_prep.readers.images import ImageReader
from data_prep.readers.radar import UNITS, BadFileError, MissingExtraError
from data_prep.readers.raw import physical, pick, time_by, time_in
from tests.real_data import real_data

HEAVY = ("h5py", "netCDF4", "xarray", "eccodes", "gribapi", "rasterio", "zarr", "torch", "pysteps")

SOURCES = {
    ("knmi", "*.h5"): "knmi",
    ("rmi", "*.hdf"): "odim",
    ("mch", "*.gif"): "mch",
    ("fmi", "*.pgm.gz"): "fmi",
    ("mrms", "*.grib2"): "grib2",
    ("dwd", "*.tar.*"): "radolan",
    ("meteonet", "r[ae][if]*.npz"): "meteonet",
}
"""Files of the real sources, and the reader of each."""


@pytest.mark.parametrize("name", RADAR_READERS)
def test_every_reader_is_what_the_register_says(name):
    reader = radar_reader(name, {})
    assert reader.name == name
    assert reader.extra in (None, "radar")
    assert reader.patterns and reader.source.name


def test_readers_import_no_library_of_a_format():
    modules = [target.partition(":")[0] for target in RADAR_READERS.values()]
    script = f"""
import importlib, sys
import data_prep.readers
assert "numpy" not in sys.modules, "the register itself needs nothing"
for module in {modules}:
    importlib.import_module(module)
loaded = [name for name in {HEAVY} if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("source", "pattern"), SOURCES, ids=lambda value: value)
def test_exactly_one_reader_claims_each_real_file(source, pattern):
    wanted = SOURCES[source, pattern]
    paths = sorted(real_data(source).rglob(pattern))
    assert paths
    readers = [radar_reader(name, {}) for name in RADAR_READERS]
    for path in paths[:: max(1, len(paths) // 6)]:
        assert [reader.name for reader in readers if reader.recognises(path)] == [wanted], path
    assert detect_reader(paths).name == wanted


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("T_PAAH21_C_EUOC_20210704100000.hdf", "odim"),
        ("composite_hx_20230914_1230-hd5", "odim"),
        ("66_20210704_100000.prcp-cscn.nc", "netcdf"),
        ("3B-HHR.MS.MRG.3IMERG.20210704-S000000-E002959.0000.V07B.HDF5", "netcdf"),
        ("3B-HHR-L.MS.MRG.3IMERG.20210704-S000000-E002959.0000.V07B.RT-H5", "netcdf"),
    ],
)
def test_a_reader_expects_the_names_that_services_give(name: str, reader: str):
    patterns = radar_reader(reader, {}).patterns
    assert any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)


def test_looking_at_a_folder_says_which_files_there_are(tmp_path: Path):
    (tmp_path / "one.h5").touch()
    with pytest.raises(ValueError, match=r"is a folder: name files in it, such as .*one\.h5"):
        inspect_file(tmp_path, "auto", {})


def test_coordinates_of_meteonet_are_no_radar_file():
    path = real_data("meteonet") / "radar_coords_NW.npz"
    with pytest.raises(ValueError, match=r"radar_coords_NW.npz \(starts with b'PK"):
        detect_reader([path])


def test_options_are_converted_to_their_types():
    reader = radar_reader(
        "geotiff",
        {"band": "2", "quantity": "rain_rate", "scale": "0.1", "missing": "255, 65535"},
    )
    assert reader == GeoTIFFReader(
        band=2, quantity="rain_rate", scale=0.1, missing=(255.0, 65535.0)
    )
    images = radar_reader("images", {"preset": "hko7", "interval_minutes": "6", "missing": "255"})
    assert images == ImageReader(preset="hko7", interval_minutes=6.0, missing=(255,))
    assert radar_reader("images", {"interval_minutes": "none"}) == ImageReader()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("geotif", {}, "no reader 'geotif'. Did you mean 'geotiff'\\? There are: fmi, geotiff"),
        ("zzz", {}, "no reader 'zzz'. There are"),
        ("images", {"quantiti": "vil"}, "option 'quantiti'. Did you mean 'quantity'"),
        ("mch", {"unit": "mm"}, "Reader mch has no option 'unit'; it has no options"),
        ("geotiff", {"band": "first"}, "Option band of reader geotiff: must be a whole number"),
        ("geotiff", {"scale": "x"}, "must be a number, got 'x'"),
        ("images", {"preset": "hko8"}, "must be one of .*hko7"),
        ("images", {"preset": "hko7", "scale": "1"}, "not both"),
    ],
)
def test_what_is_wrong_with_a_choice_is_said(name, options, message):
    with pytest.raises(ValueError, match=message):
        radar_reader(name, options)


def grey(path: Path) -> Path:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    return path


def test_images_are_what_nobody_else_knows(tmp_path):
    paths = [grey(tmp_path / f"frame_{n}.{ending}") for n, ending in enumerate(("png", "tif"))]
    assert detect_reader(paths).name == "images"
    scanned = radar_reader("images", {}).scan(paths[0])
    assert (scanned.quantity, UNITS[scanned.quantity]) == ("intensity", "1")


def test_a_tiff_is_a_geotiff_or_an_image_never_both(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    placed = tmp_path / "placed.tif"
    with rasterio.open(
        placed,
        "w",
        driver="GTiff",
        height=8,
        width=8,
        count=1,
        dtype="uint8",
        crs="EPSG:4326",
        transform=rasterio.Affine(1, 0, 0, 0, -1, 50),
    ) as dataset:
        dataset.write(np.zeros((8, 8), np.uint8), 1)
    plain = grey(tmp_path / "plain.tif")
    assert [GeoTIFFReader().recognises(path) for path in (placed, plain)] == [True, False]
    assert [ImageReader().recognises(path) for path in (placed, plain)] == [False, True]
    assert detect_reader([placed]).name == "geotiff"


def test_a_bad_file_among_good_ones_does_not_hide_the_format(tmp_path):
    good = sorted(real_data("mch").rglob("*.gif"))[:2]
    bad = tmp_path / "AQC151351545F_00005.801.gif"
    bad.write_bytes(b"nothing")
    assert detect_reader([bad, *good]).name == "mch"


def test_files_of_two_formats_are_named():
    gif = sorted(real_data("mch").rglob("*.gif"))[0]
    pgm = sorted(real_data("fmi").rglob("*.gz"))[0]
    with pytest.raises(ValueError, match=f"Several.*fmi claims {pgm}; mch claims {gif}"):
        detect_reader([gif, pgm])


def test_unknown_files_are_described(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("rain tomorrow")
    with pytest.raises(ValueError, match=r"notes.txt \(starts with b'rain tom', 13 bytes\).*fmi"):
        detect_reader([path, tmp_path / "absent"])
    with pytest.raises(ValueError, match="no file"):
        detect_reader([])


def test_a_missing_library_is_named_when_it_might_tell(tmp_path, monkeypatch):
    def needs_library(self: object, path: Path) -> bool:
        raise MissingExtraError("Install it with: pip install 'tmu-dist[radar]'")

    monkeypatch.setattr("data_prep.readers.odim.ODIMReader.recognises", needs_library)
    path = tmp_path / "x.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(MissingExtraError, match="radar"):
        detect_reader([path])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
def test_damaged_files_are_bad_files_and_nothing_else(tmp_path):
    """Whatever bytes follow a format's first ones, the file is named, and recognising is quiet."""
    generator = np.random.default_rng(0)
    starts = (
        *(b"GIF89a\xc6\x02\x80\x02", b"P5\n# obstime 201609281445\n", b"II*\0\x08\0\0\0", b"BM"),
        *(b"GRIB\0\0\xd1\x02" + bytes(5) + b"\2\1\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b""),
        *(b"\x1f\x8b\x08\0", b"BZh9", b"PK\3\4", b"RW180750100001022BY   1620123VS 3\3"),
    )
    names = ("AQC151351545F_00005.801.gif", "rainfall_NW_2016_08.3.npz", "frame_1.png")
    own = ("fmi", "geotiff", "grib2", "images", "mch", "meteonet", "radolan")
    for number, start in enumerate(starts):
        for name in names:
            path = tmp_path / str(number) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(start + generator.bytes(3000))
            for reader in (radar_reader(reader, {}) for reader in own):
                assert reader.recognises(path) in (True, False)
                with pytest.raises(BadFileError) as raised:
                    list(reader.fields(path, [f.key for f in reader.scan(path).frames]))
                assert raised.value.path == str(path)


def test_a_folder_is_no_file_of_any_reader(tmp_path):
    for name in RADAR_READERS:
        assert radar_reader(name, {}).recognises(tmp_path) is False


# --- what the readers share ---


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("RAD_201607112045.png", datetime(2016, 7, 11, 20, 45, tzinfo=UTC)),
        ("20160711204530.png", datetime(2016, 7, 11, 20, 45, 30, tzinfo=UTC)),
        ("radar-2016-07-11T20:45:30Z.png", datetime(2016, 7, 11, 20, 45, 30, tzinfo=UTC)),
        ("20160711_2045_cappi.png", datetime(2016, 7, 11, 20, 45, tzinfo=UTC)),
        ("run20200101_0000_20160711_2045.png", datetime(2016, 7, 11, 20, 45, tzinfo=UTC)),
        ("20160231_2045.png", None),
        ("20160711_2560.png", None),
        ("20160711.png", None),
        ("frame_000012.png", None),
        ("1234567890123456.png", None),
    ],
)
def test_times_in_names(name, time):
    assert time_in(name) == time


def test_times_by_a_pattern():
    by_parts = r"(?P<year>\d\d)(?P<month>\d\d)(?P<day>\d\d)_(?P<hour>\d\d)(?P<minute>\d\d)"
    assert time_by(by_parts, "a/160711_2045.png") == datetime(2016, 7, 11, 20, 45, tzinfo=UTC)
    whole = r"(?P<time>\d{4}/\d\d/\d\d/\d{4})"
    assert time_by(whole, "x/2016/07/11/2045.png") == datetime(2016, 7, 11, 20, 45, tzinfo=UTC)
    assert time_by(whole, "x/y.png") is None
    with pytest.raises(ValueError, match="has the groups"):
        time_by(r"(?P<year>\d{4})", "2016")
    with pytest.raises(ValueError, match="is no time"):
        time_by(by_parts, "161311_2045")


def test_pick_follows_the_keys_and_reads_again_only_when_it_must():
    passes = []

    def items():
        passes.append(1)
        return iter([("a", 1), ("b", 2), ("c", 3)])

    assert list(pick(Path("f"), ["a", "c"], items)) == [1, 3]
    assert len(passes) == 1
    assert list(pick(Path("f"), ["c", "a", "a"], items)) == [3, 1, 1]
    with pytest.raises(BadFileError, match="f: holds no field 'd'"):
        list(pick(Path("f"), ["a", "d"], items))


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", ">u2", "<i2", ">i2", "i4", "f4", "f8"])
def test_stored_numbers_become_values(dtype):
    stored_HW = np.array([[0, 1, 100], [127, 5, 2]]).astype(dtype)
    if np.dtype(dtype).kind != "u":
        stored_HW[1, 2] = -2
    values_HW = physical(stored_HW, 0.5, -32.0, {127.0: np.nan, 5.0: 7.0})
    expected_HW = stored_HW.astype(float) / 2 - 32
    expected_HW[1, :2] = [np.nan, 7]
    np.testing.assert_array_equal(values_HW, expected_HW)
    assert values_HW.dtype == np.float32


def test_a_wrapped_file_is_known_by_its_content_not_its_name(tmp_path):
    source = sorted(real_data("fmi").rglob("*.gz"))[0]
    plain = tmp_path / "201609281445_plain.pgm.gz"  # not compressed, whatever it is called
    plain.write_bytes(gzip.decompress(source.read_bytes()))
    assert detect_reader([plain]).name == "fmi"
