"""From radar files to stored codes: the numbers are those that the settings promise."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import radar_source as module
from data_prep.radar_plan import RadarPlanSettings
from data_prep.radar_source import RadarSettings, RadarSource, radar_source
from data_prep.source import BadFile, Frame
from tests.real_data import real_data

PLAN = RadarPlanSettings(frames=1, split_by="time", split_gap_minutes=0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images of 6 x 8 pixels, ten minutes apart; pixel value 255 is missing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        field_HW = np.full((6, 8), 20 * number, np.uint8)
        field_HW[0, 0] = 255
        name = f"20200101{number // 6:02d}{10 * (number % 6):02d}.png"
        Image.fromarray(field_HW).save(folder / name)
    return folder


def source_of(folder: Path, **changes: object) -> RadarSource:
    settings = RadarSettings(
        source=str(folder),
        reader="images",
        option=("quantity=reflectivity", "scale=0.25", "offset=0", "missing=255"),
    )
    return radar_source(replace(settings, **changes), PLAN)  # type: ignore[arg-type]


def frames_of(source: RadarSource) -> list[Frame]:
    found = [frame for job in source.jobs() for frame in source.convert(job)]
    assert all(isinstance(frame, Frame) for frame in found), found
    return found  # type: ignore[return-value]


def test_stored_codes_are_the_values_and_missing_stays_missing(images: Path):
    source = source_of(images)
    frames = frames_of(source)
    facts = source.facts(source.plan([frame.record for frame in frames]))
    assert (facts.units.quantity, facts.units.unit) == ("reflectivity", "dBZ")
    assert facts.frame_interval_minutes == 10.0
    for number, frame in enumerate(frames):
        codes_HW = frame.codes_CHW[0]
        assert codes_HW[0, 0] == facts.units.missing_code
        values = facts.units.offset + facts.units.scale * codes_HW[1:].astype(float)
        np.testing.assert_allclose(values, 5.0 * number, atol=70 / 254 / 2 + 1e-6)
        assert frame.record.observed_fraction == 47 / 48
        assert frame.record.wet_fraction == (0.0 if number < 2 else 1.0)  # 0.1 mm/h is 7 dBZ


def test_rain_is_stored_as_rain_where_that_is_asked_for(images: Path):
    source = source_of(images, store="rain_rate", range=(0.0, 100.0), dtype="uint16")
    frames = frames_of(source)
    units = source.facts(source.plan([frame.record for frame in frames])).units
    assert (units.unit, units.max_code, units.missing_code) == ("mm/h", 65534, 65535)
    stored = units.scale * frames[8].codes_CHW[0, 3, 3]
    assert stored == pytest.approx((10 ** (40 / 10) / 200) ** (1 / 1.6), abs=1e-3)


def test_area_average_is_of_linear_reflectivity(tmp_path: Path):
    for number in range(12):
        field_HW = np.array([[0, 160], [0, 160]], np.uint8).repeat(2, axis=0)
        Image.fromarray(field_HW).save(tmp_path / f"202001010{number // 6}{number % 6}0.png")
    source = source_of(tmp_path, size=(1, 1))
    codes_HW = frames_of(source)[0].codes_CHW[0]
    mean_dbz = 10 * np.log10((10**0 + 10**4) / 2)  # not the 20 dBZ that decibels would give
    assert float(codes_HW[0, 0]) * 70 / 254 == pytest.approx(mean_dbz, abs=70 / 254 / 2)


def test_crop_takes_the_named_pixels_and_the_grid_follows(images: Path):
    source = source_of(images, crop=(0, 0, 2, 3))
    frame = frames_of(source)[0]
    assert frame.codes_CHW.shape == (1, 2, 3)
    assert frame.record.observed_fraction == 5 / 6


def test_images_without_times_are_sequences_by_folder_and_first_number(tmp_path: Path):
    for name in ("a/radar/0", "b/radar/0", "c/sample_1_07", "c/sample_2_07", "0"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(path)
    series = {f.record.file: f.record.series for f in frames_of(source_of(tmp_path / "images"))}
    assert series == {
        "0.png": "images",
        "a/radar/0.png": "a/radar",
        "b/radar/0.png": "b/radar",
        "c/sample_1_07.png": "c/sample_1",
        "c/sample_2_07.png": "c/sample_2",
    }


def test_files_of_unusual_names_are_an_error_that_says_so(images: Path):
    for path in sorted(images.iterdir()):
        path.rename(path.with_suffix(".nc"))
    with pytest.raises(ValueError, match=r"of the format images, but have other names"):
        source_of(images, reader="auto")


def test_files_that_differ_are_named(images: Path):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(images / "202001010200.png")
    (images / "202001010210.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    source = source_of(images)
    bad = list(source.convert(("202001010200.png", "202001010210.png")))
    assert [type(found) for found in bad] == [BadFile, BadFile]
    assert "not like the other files" in bad[0].reason and "grid" in bad[0].reason
    assert bad[1].file == "202001010210.png"


def test_the_summary_says_what_was_found_and_what_will_be_stored(images: Path):
    (images / "README.txt").write_text("not an image")
    words = source_of(images, crop=(0, 0, 4, 8)).summary()
    assert "12 files" in words and "(1 other files ignored)" in words
    assert "reader images: reflectivity [dBZ], 6 x 8 pixels" in words
    assert "reflectivity of 0 to 70 dBZ, 4 x 8 pixels, uint8" in words


def test_settings_name_no_place_and_travel_to_processes(images: Path):
    source = source_of(images)
    text = json.dumps(source.settings())
    assert str(images) not in text and "Marshall" not in text
    source = replace(source, files=source.files * 10_000)
    travelling = pickle.dumps(source)
    assert len(travelling) < 10_000  # the names of all files stay at home
    assert pickle.loads(travelling) == replace(source, files=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"option": ("scale",)}, "KEY=VALUE"),
        ({"option": ("scael=1",)}, "scale"),
        ({"include": ("1999*",)}, "no file that could be"),
        ({"reader": "radolan"}, "radolan"),
        ({"crop": (0, 0, 7, 8)}, "does not lie inside"),
        ({"size": (12, 16)}, "nothing is enlarged"),
        ({"store": "vil"}, "no physical path"),
    ],
)
def test_wrong_settings_say_what_is_wrong(images: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        source_of(images, **changes)


def test_packed_files_that_are_not_read_packed_are_to_be_unpacked(tmp_path: Path):
    (tmp_path / "rain.nc.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"such as rain\.nc\.gz\)\. Unpack NetCDF and HDF5"):
        radar_source(RadarSettings(source=str(tmp_path)), PLAN)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere"):
        source_of(tmp_path / "nowhere")


def test_real_rain_is_stored_by_the_provider_s_rule_and_marshall_palmer():
    h5py = pytest.importorskip("h5py")
    folder = real_data("knmi")
    source = radar_source(RadarSettings(source=str(folder)), PLAN)
    (job, *_) = source.jobs()
    frame = next(f for f in source.convert(job) if isinstance(f, Frame))
    with h5py.File(folder / frame.record.file) as file:
        raw_HW = file["image1/image_data"][:]
    rate_HW = raw_HW * 0.01 * 12
    with np.errstate(divide="ignore"):
        dbz_HW = 10 * np.log10(200 * rate_HW**1.6)
    observed = raw_HW != 65535
    codes_HW = frame.codes_CHW[0]
    np.testing.assert_array_equal(codes_HW == 255, ~observed)
    expected = np.clip(dbz_HW[observed], 0, 70)
    np.testing.assert_allclose(
        codes_HW[observed].astype(float) * 70 / 254, expected, atol=70 / 254 / 2 + 1e-4
    )


@pytest.fixture
def zarr_store(tmp_path: Path) -> Path:
    """A store of 11 rain fields, ten minutes apart, as the MLCast convention has them."""
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "rain.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    axes = {
        "time": (600 * np.arange(11), "seconds since 2020-01-01 00:00:00", "time"),
        "y": (1000.0 * np.arange(6, 0, -1), "m", "projection_y_coordinate"),
        "x": (1000.0 * np.arange(1, 9), "m", "projection_x_coordinate"),
    }
    for name, (values, unit, standard_name) in axes.items():
        axis = group.create_array(name, data=np.asarray(values), dimension_names=(name,))
        axis.attrs.update({"units": unit, "standard_name": standard_name})
    rain = np.arange(11 * 6 * 8, dtype=np.float32).reshape(11, 6, 8) / 10
    array = group.create_array("rain", data=rain, dimension_names=("time", "y", "x"))
    array.attrs.update({"units": "mm h-1", "standard_name": "rainfall_rate"})
    return path


@pytest.mark.parametrize("as_folder", [True, False], ids=["folder of stores", "the store"])
def test_a_zarr_store_counts_as_one_file(zarr_store: Path, as_folder: bool):
    source = source_of(zarr_store.parent if as_folder else zarr_store, reader="auto", option=())
    assert source.files == ("rain.zarr",)
    ((name, num_bytes),) = source.describe_files(source.jobs()[0])
    assert (name, num_bytes > 1000) == ("rain.zarr", True)
    assert len(frames_of(source)) == 11


def test_a_large_file_is_divided_between_processes(
    zarr_store: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = frames_of(source_of(zarr_store, reader="mlcast", option=()))
    monkeypatch.setattr(module, "_JOB_BYTES", 100)
    monkeypatch.setattr(module, "_FIELDS_PER_JOB", 4)
    source = source_of(zarr_store, reader="mlcast", option=())
    assert len(source.jobs()) == 3
    parts = frames_of(source)
    assert [part.record for part in parts] == [frame.record for frame in whole]
