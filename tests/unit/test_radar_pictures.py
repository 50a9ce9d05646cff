"""GeoTIFF and grey images, written by the tests."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.readers.geotiff import GeoTIFFReader
from data_prep.readers.images import ImageReader
from data_prep.readers.radar import FOLDER, BadFileError
from tests.radar_contract import check_radar_reader
from tests.unit.test_radar_readers import only_field

RNG = np.random.default_rng(8)


# --- GeoTIFF ---


def geotiff(path: Path, stored_HW: np.ndarray, **facts: Any) -> Path:
    """Write a GeoTIFF of 1 km pixels from 100 km, 7000 km in UTM 35."""
    rasterio = pytest.importorskip("rasterio")
    height, width = stored_HW.shape
    tags, scales, unit = facts.pop("tags", {}), facts.pop("scaling", None), facts.pop("unit", "")
    profile = {
        "crs": "EPSG:32635",
        "transform": rasterio.Affine(1000, 0, 100_000, 0, -1000, 7_000_000),
        **facts,
    }
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=height,
        width=width,
        count=1,
        dtype=stored_HW.dtype,
        **profile,
    ) as dataset:
        dataset.write(stored_HW, 1)
        dataset.update_tags(**tags)
        if scales:
            dataset.scales, dataset.offsets = (scales[0],), (scales[1],)
        if unit:
            dataset.units = (unit,)
    return path


def codes(dtype: type = np.uint8, height: int = 60, width: int = 80) -> np.ndarray:
    return RNG.integers(0, 200, (height, width)).astype(dtype)


FMI_TAGS = {
    "Quantity": "Corrected reflectivity",
    "Gain": "0.500000",
    "Offset": "-32.000000",
    "Nodata": "255",
    "Undetect": "0",
    "Observation time": "201609281450",
}


def test_geotiff_keeps_the_contract(tmp_path):
    stored_HW = codes()
    stored_HW[0, :3] = [255, 0, 100]
    path = geotiff(tmp_path / "composite.tif", stored_HW, tags=FMI_TAGS)
    scanned = check_radar_reader(GeoTIFFReader(), path, quantity="reflectivity", shape=(60, 80))
    assert scanned.frames[0].time == datetime(2016, 9, 28, 14, 50, tzinfo=UTC)
    grid = scanned.grid
    assert (grid.projection, grid.unit) == ("EPSG:32635", "m")
    assert (grid.left, grid.top, grid.pixel_height) == (100_000, 7_000_000, 1000)
    values_HW = only_field(GeoTIFFReader(), path)
    np.testing.assert_array_equal(values_HW[0, :3], [np.nan, -32, 18])
    np.testing.assert_allclose(values_HW[1:], stored_HW[1:] / 2 - 32 * (stored_HW[1:] >= 0))


def test_geotiff_by_gdals_own_facts_and_the_name(tmp_path):
    stored_HW = codes(np.int16)
    stored_HW[0, 0] = -1
    path = tmp_path / "rate_20160711_2045.tif"
    geotiff(path, stored_HW, nodata=-1, scaling=(1e-8, 2e-8), unit="m s-1")
    scanned = GeoTIFFReader().scan(path)
    assert scanned.quantity == "rain_rate"
    assert scanned.frames[0].time == datetime(2016, 7, 11, 20, 45, tzinfo=UTC)
    values_HW = only_field(GeoTIFFReader(), path)
    assert np.isnan(values_HW[0, 0])
    np.testing.assert_allclose(values_HW[1:], stored_HW[1:] * 0.036 + 0.072, rtol=1e-5)


def test_geotiff_by_options(tmp_path):
    stored_HW = codes(np.uint16)
    stored_HW[0, :2] = [255, 65535]
    (tmp_path / "2016-07-11").mkdir()
    path = geotiff(tmp_path / "2016-07-11" / "x2045.tif", stored_HW)
    with pytest.raises(BadFileError, match="options quantity and"):
        GeoTIFFReader().scan(path)
    reader = GeoTIFFReader(
        quantity="reflectivity",
        scale=0.5,
        offset=-32.0,
        missing=(255.0, 65535.0),
        time_pattern=r"(?P<time>\d{4}-\d\d-\d\d/x\d{4})",
        interval_minutes=5.0,
    )
    scanned = check_radar_reader(reader, path, quantity="reflectivity", interval_minutes=5)
    assert scanned.frames[0].time == datetime(2016, 7, 11, 20, 45, tzinfo=UTC)
    values_HW = only_field(reader, path)
    assert np.isnan(values_HW[0, :2]).all() and np.isnan(values_HW).sum() == 2
    np.testing.assert_allclose(values_HW[1:], stored_HW[1:] / 2 - 32)


def test_geotiff_of_floats_south_up_and_its_tag_of_time(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    stored_HW = codes(np.float32)
    stored_HW[0, :2] = [np.nan, -9999]
    path = geotiff(
        tmp_path / "sum.tif",
        stored_HW,
        transform=rasterio.Affine(0.01, 0, 10, 0, 0.01, 50),
        crs="EPSG:4326",
        unit="mm",
        tags={"TIFFTAG_DATETIME": "2016:07:11 20:45:00"},
    )
    with pytest.raises(BadFileError, match="accumulation_minutes"):
        GeoTIFFReader().scan(path)
    reader = GeoTIFFReader(accumulation_minutes=60.0)
    scanned = reader.scan(path)
    assert (scanned.grid.unit, scanned.grid.top) == ("degree", pytest.approx(50.6))
    assert scanned.frames[0].time == datetime(2016, 7, 11, 20, 45, tzinfo=UTC)
    assert "DateTime" in " ".join(scanned.notes)
    with pytest.raises(BadFileError, match="down to -9999.*option missing"):
        only_field(reader, path)
    values_HW = only_field(GeoTIFFReader(accumulation_minutes=60.0, missing=(-9999.0,)), path)
    assert np.isnan(values_HW[-1, :2]).all()
    np.testing.assert_array_equal(values_HW[:-1], stored_HW[:0:-1])


def test_a_tiff_without_georeference_can_be_read_as_one_by_name(tmp_path):
    stored_HW = codes()
    path = tmp_path / "20160711_2045.tif"
    Image.fromarray(stored_HW).save(path)
    reader = GeoTIFFReader(quantity="intensity")
    assert not reader.recognises(path)
    assert "not placed" in " ".join(reader.scan(path).notes)
    np.testing.assert_array_equal(only_field(reader, path), stored_HW)


def test_geotiff_options_and_units_that_contradict(tmp_path):
    path = geotiff(tmp_path / "20160711_2045.tif", codes(), unit="dBZ")
    with pytest.raises(BadFileError, match="unit of reflectivity, not of rain_rate"):
        GeoTIFFReader(quantity="rain_rate").scan(path)
    with pytest.raises(BadFileError, match="no band 2"):
        GeoTIFFReader(band=2).scan(path)
    for wrong in ({"quantity": "rain"}, {"unit": "furlong"}, {"band": 0}, {"interval_minutes": -1}):
        with pytest.raises(ValueError, match=r"must be|counts from"):
            GeoTIFFReader(**wrong)


# --- images ---


def picture(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "bmp", "jpg", "tif", "pgm"])
def test_images_keep_the_contract(tmp_path, ending):
    path = picture(tmp_path / "event" / f"20160711_2045.{ending}", codes())
    scanned = check_radar_reader(ImageReader(), path, quantity="intensity", shape=(60, 80))
    assert scanned.frames[0].time == datetime(2016, 7, 11, 20, 45, tzinfo=UTC)
    assert "No mapping" in " ".join(scanned.notes)
    assert only_field(ImageReader(), path).max() <= 1


@pytest.mark.parametrize(
    ("preset", "pixel_0", "pixel_255"),
    [("hko7", -10, 60), ("shanghai", 0, 70), ("cikm", -10, 85), ("paper", 0, 70)],
)
def test_presets(tmp_path, preset, pixel_0, pixel_255):
    pixels_HW = np.array([[0, 255, 51]], np.uint8)
    path = picture(tmp_path / "RAD160711204200.png", pixels_HW)
    time_pattern = "" if preset == "hko7" else r"RAD(?P<year>\d\d)(?P<month>\d\d)(?P<day>\d\d)"
    time_pattern += "" if preset == "hko7" else r"(?P<hour>\d\d)(?P<minute>\d\d)"
    reader = ImageReader(preset=preset, time_pattern=time_pattern)
    expected = [pixel_0, pixel_255, pixel_0 + (pixel_255 - pixel_0) / 5]
    np.testing.assert_allclose(only_field(reader, path)[0], expected, rtol=1e-6)
    assert reader.scan(path).frames[0].time == datetime(2016, 7, 11, 20, 42, tzinfo=UTC)


def test_numbered_images_are_a_sequence_of_their_folder(tmp_path):
    reader = ImageReader(preset="cikm")
    for folder in ("sample_1", "sample_2"):
        for number in (1, 2, 10):
            picture(tmp_path / folder / f"img_{number}.png", codes())
    frames = {
        path.relative_to(tmp_path).as_posix(): reader.scan(path).frames[0]
        for path in tmp_path.rglob("*.png")
    }
    assert {frame.series for frame in frames.values()} == {FOLDER}
    start = datetime(1970, 1, 1, tzinfo=UTC)
    minutes = {name: (frame.time - start).total_seconds() / 60 for name, frame in frames.items()}
    assert minutes["sample_1/img_1.png"] == 6 and minutes["sample_2/img_10.png"] == 60
    assert ImageReader().scan(tmp_path / "sample_1/img_2.png").frames[0].time.minute == 2
    with pytest.raises(BadFileError, match="neither a time nor a frame number"):
        reader.scan(picture(tmp_path / "sample_1" / "mean.png", codes()))


def test_grey_images_of_all_modes_are_the_same(tmp_path):
    grey_HW = codes()
    grey = Image.fromarray(grey_HW)
    expected_HW = grey_HW / 255
    for mode in ("RGB", "RGBA", "LA", "P"):
        path = tmp_path / f"{mode}_1.png"
        grey.convert(mode).save(path)
        np.testing.assert_allclose(only_field(ImageReader(), path), expected_HW, rtol=1e-6)
    deep = picture(tmp_path / "deep_1.png", (grey_HW.astype(np.uint16) * 257))
    np.testing.assert_allclose(only_field(ImageReader(), deep), expected_HW, rtol=1e-6)
    with pytest.raises(BadFileError, match="preset paper is for 8 bits"):
        ImageReader(preset="paper").scan(deep)


def test_coloured_images_are_refused(tmp_path):
    pixels_HWC = np.repeat(codes()[..., None], 3, axis=2)
    pixels_HWC[5, 5, 1] += 1
    path = picture(tmp_path / "rainbow_1.png", pixels_HWC)
    with pytest.raises(BadFileError, match="coloured"):
        only_field(ImageReader(), path)
    palette = tmp_path / "palette_1.png"
    Image.fromarray(pixels_HWC).quantize(16).save(palette)
    with Image.open(palette) as image:
        changed = image.copy()
    changed.putpalette([0, 0, 255, 255, 0, 0] * 128)
    changed.save(palette)
    with pytest.raises(BadFileError, match="coloured"):
        only_field(ImageReader(), palette)


def test_missing_pixels_masks_and_transparency(tmp_path):
    pixels_HW = codes()
    pixels_HW[0, 0] = 255
    mask_HW = np.full(pixels_HW.shape, 255, np.uint8)
    mask_HW[1] = 0
    mask = picture(tmp_path / "mask.png", mask_HW)
    alpha_HW = np.full(pixels_HW.shape, 255, np.uint8)
    alpha_HW[2, 2] = 0
    path = tmp_path / "field_1.png"
    Image.merge("LA", [Image.fromarray(pixels_HW), Image.fromarray(alpha_HW)]).save(path)
    reader = ImageReader(quantity="rain_rate", scale=0.1, missing=(255,), mask=str(mask))
    values_HW = only_field(reader, path)
    missing_HW = np.isnan(values_HW)
    assert missing_HW[0, 0] and missing_HW[1].all() and missing_HW[2, 2]
    assert missing_HW.sum() == 2 + pixels_HW.shape[1]
    np.testing.assert_allclose(values_HW[3:], pixels_HW[3:] / 10, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "paper", "scale": 1.0},
        {"scale": 1.0},
        {"quantity": "reflectivity"},
        {"quantity": "dBZ", "scale": 1.0},
        {"quantity": "rain_rate", "scale": 0.0},
        {"quantity": "accumulation", "scale": 1.0},
        {"interval_minutes": 0.0},
        {"offset": -10.0},
    ],
)
def test_image_options_that_do_not_fit(wrong):
    with pytest.raises(ValueError):
        ImageReader(**wrong)


def test_a_mapping_below_zero_is_noticed(tmp_path):
    path = picture(tmp_path / "field_1.png", codes())
    with pytest.raises(BadFileError, match="below 0"):
        only_field(ImageReader(quantity="rain_rate", scale=0.1, offset=-1.0), path)
