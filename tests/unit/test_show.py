"""Pictures of archives: true colours, places, times and sizes."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.panels import (
    MapView,
    VideoView,
    attribution,
    resampled,
    shorten,
    spread,
    strided,
    view_of,
    wrapped,
)
from data_prep.pipeline import OutputSettings, WorkSettings, build_archive
from data_prep.show import contact_sheet, draw_archive, draw_example, read_examples
from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tests.blob_source import BlobSource
from tests.radar_archive import CORNER, GRID, STARTS, UNITS, rain, write_radar_archive
from tmu_dist.colours import INK, MISSING, MISSING_LINE, colour_scale, paint, physical
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import Manifest, Units

LEFT, TOP, GAP, LABEL_ROW = 104, 98, 4, 22
"""Where the frames of a contact sheet lie."""


def rgb(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text[1:]))


@pytest.fixture(scope="module")
def rainy(tmp_path_factory) -> tuple[str, Manifest]:
    folder = tmp_path_factory.mktemp("rain")
    return str(folder), write_radar_archive(folder)


def write_video(folder: Path, frames_NTCHW: np.ndarray) -> Manifest:
    samples = [Sample(f"v{i}", frames, {"sample_id": i}) for i, frames in enumerate(frames_NTCHW)]
    _, num_frames, channels, height, width = frames_NTCHW.shape
    manifest = Manifest(
        name="clips",
        num_frames=num_frames,
        channels=channels,
        height=height,
        width=width,
        units=Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None),
        frame_interval_minutes=None,
        splits={"train": (write_shard(str(folder), shard_path("train", 0), samples),)},
        created_by={},
    )
    write_manifest(str(folder), manifest)
    return manifest


def test_a_sheet_of_radar_has_the_frames_in_their_colours_and_places(rainy, tmp_path):
    url, _ = rainy
    sheet, animation = draw_archive(url, tmp_path / "new", split="train", num=8)
    assert (sheet.name, animation.name) == ("rain-train.png", "rain-train.gif")
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    factor = 280 // GRID.width
    width, height = GRID.width * factor, GRID.height * factor
    for row in range(2):
        for t in range(5):
            x, y = LEFT + t * (width + GAP), TOP + row * (height + LABEL_ROW)
            middles = pixels[y : y + height, x : x + width][
                factor // 2 :: factor, factor // 2 :: factor
            ]
            expected = paint(physical(rain(row, 5, 40, 50)[t, 0], UNITS), colour_scale(UNITS))
            observed = np.ones((40, 50), bool)
            observed[: CORNER[0], : CORNER[1]] = False
            assert np.array_equal(middles[observed], expected[observed])
            hatched = {tuple(pixel) for pixel in middles[~observed]}
            assert hatched == {rgb(MISSING), rgb(MISSING_LINE)}


def test_an_animation_has_every_frame_and_no_wrong_colour(rainy, tmp_path):
    url, manifest = rainy
    _, path = draw_archive(url, tmp_path, split="train", num=2)
    view = view_of(manifest)
    with Image.open(path) as animation:
        assert animation.n_frames == 5
        for t in range(5):
            animation.seek(t)
            page = np.asarray(animation.convert("RGB")).astype(int)
            size = view.tile_size(view.animation_tile_px)
            tile = page[54 : 54 + size[1], 12 : 12 + size[0]]
            expected = np.asarray(view.tile(rain(0, 5, 40, 50)[t], size)).astype(int)
            assert np.abs(tile - expected)[1:-1, 1:-1].max() <= 8  # greys are few in a GIF


def test_times_are_those_of_the_record_and_count_days(rainy):
    _, manifest = rainy
    view = view_of(manifest)
    labels = view.time_labels({"start": STARTS["train"][0]})
    assert labels == ["23:50", "23:55", "00:00 +1 d", "00:05 +1 d", "00:10 +1 d"]
    assert view.describe({"start": STARTS["train"][0]}) == "2024-06-01"
    assert view.time_labels({}) == ["+0 min", "+5 min", "+10 min", "+15 min", "+20 min"]
    half = MapView(dataclasses.replace(manifest, frame_interval_minutes=2.5))
    assert half.time_labels({"start": "2024-06-01T00:00:00Z"})[1] == "00:02:30"


def test_frames_without_a_clock_are_numbered(tmp_path):
    manifest = write_video(tmp_path, np.zeros((1, 3, 1, 8, 8), np.uint8))
    assert view_of(manifest).time_labels({}) == ["1", "2", "3"]


def test_a_sheet_of_a_long_sequence_shows_frames_at_equal_steps(tmp_path):
    manifest = write_radar_archive(tmp_path, num_frames=30)
    view = view_of(manifest)
    (example,) = read_examples(open_archive(str(tmp_path)), "val", 1)
    pixels = np.asarray(contact_sheet(view, "val", [draw_example(view, example)]))
    size = view.tile_size(view.sheet_tile_px(10))
    for place, t in enumerate(range(0, 30, 3)):
        x = LEFT + place * (size[0] + GAP)
        shown = pixels[TOP + 1 : TOP + size[1] - 1, x + 1 : x + size[0] - 1]
        tile = np.asarray(view.tile(example.frames_TCHW[t], size))[1:-1, 1:-1]
        assert np.array_equal(shown, tile)


def test_choosing_frames_and_samples():
    assert strided(12, 12) == list(range(12))
    assert strided(13, 12) == [0, 2, 4, 6, 8, 10, 12]
    assert strided(1, 12) == [0]
    assert spread(5, 8) == [0, 1, 2, 3, 4]
    assert spread(100, 3) == [0, 50, 99]


@pytest.mark.parametrize(
    ("unit", "pixel", "top", "shape"),
    [
        ("m", (2000.0, 2000.0), 0.0, 40 / 50),
        ("m", (2000.0, 1000.0), 0.0, 40 / 100),
        ("degree", (0.01, 0.01), 60.2, 40 / (50 * math.cos(math.radians(60)))),
    ],
)
def test_tiles_have_the_shape_of_the_map(rainy, unit, pixel, top, shape):
    _, manifest = rainy
    grid = dataclasses.replace(
        GRID, unit=unit, pixel_width=pixel[0], pixel_height=pixel[1], top=top
    )
    width, height = MapView(dataclasses.replace(manifest, grid=grid)).tile_size(300)
    assert height / width == pytest.approx(shape, rel=0.02)
    assert max(width, height / 1.5) <= 300


@pytest.mark.parametrize(
    ("km_per_pixel", "length_km"), [(2.0, 50), (1.0, 20), (0.3, 5), (4.0, 100)]
)
def test_the_scale_bar_is_as_long_as_it_says(rainy, km_per_pixel, length_km):
    _, manifest = rainy
    metres = 1000 * km_per_pixel
    grid = dataclasses.replace(GRID, pixel_width=metres, pixel_height=metres)
    view = MapView(dataclasses.replace(manifest, grid=grid))
    legend = np.asarray(view.legend(200, 900))
    dark = (legend == rgb(INK)).all(axis=2)
    longest = max(_longest_run(row) for row in dark[:, 460:])
    assert (longest - 1) / 200 * 50 * km_per_pixel == pytest.approx(length_km, rel=0.02)
    assert f"{50 * km_per_pixel:g} km wide" in view.extent_text()


def _longest_run(row: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def test_without_a_place_on_the_map_there_is_no_scale_bar(rainy):
    _, manifest = rainy
    view = MapView(dataclasses.replace(manifest, grid=None))
    assert view.legend(200, 900).width == 440
    assert view.extent_text() == ""
    assert MapView(manifest).legend(200, 900).width > 440
    narrow = MapView(manifest).legend(200, 320)
    assert narrow.width <= 320 and narrow.height > 2 * 48


def test_shrunken_fields_are_averages_of_what_was_observed():
    values = np.array([[1, 3, np.nan, np.nan], [5, 7, np.nan, 8]], np.float32)
    assert np.array_equal(resampled(values, (2, 1)), [[4, np.nan]], equal_nan=True)
    assert np.array_equal(resampled(values, (4, 2)), values, equal_nan=True)
    assert np.array_equal(resampled(values, (8, 4)), values.repeat(2, 0).repeat(2, 1), True)
    half = np.array([[2, np.nan]], np.float32)
    assert resampled(half, (1, 1)) == 2


def test_codes_of_16_bits_are_drawn_by_their_physical_values(rainy):
    _, manifest = rainy
    fine = dataclasses.replace(UNITS, scale=70 / 65_534, max_code=65_534, missing_code=65_535)
    view = MapView(dataclasses.replace(manifest, units=fine, dtype="uint16"))
    codes = np.full((1, 40, 50), 32_767 + 1, np.uint16)  # just above 35 dBZ
    codes[0, 0, 0] = 65_535
    tile = np.asarray(view.tile(codes, (50, 40)))
    scale = colour_scale(UNITS)
    assert tuple(tile[20, 20]) == rgb(scale.colours[scale.bounds.index(35.0)])
    assert tuple(tile[0, 0]) in {rgb(MISSING), rgb(MISSING_LINE)}


def test_grey_video_of_16_bits_keeps_its_range(tmp_path):
    manifest = write_video(tmp_path, np.zeros((1, 1, 1, 4, 4), np.uint8))
    units = dataclasses.replace(manifest.units, scale=1 / 65_535, max_code=65_535)
    view = VideoView(dataclasses.replace(manifest, units=units, dtype="uint16"))
    tile = np.asarray(view.tile(np.full((1, 4, 4), 32_768, np.uint16), (4, 4)))
    assert (tile == 127).all()


def test_rgb_video_keeps_its_colours(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 16, 24), dtype=np.uint8)
    write_video(tmp_path, frames)
    sheet, _ = draw_archive(str(tmp_path), tmp_path, split="train", num=2)
    pixels = np.asarray(Image.open(sheet))
    for n in range(2):
        for t in range(3):
            x, y = LEFT + t * (48 + GAP), TOP + n * (32 + GAP)
            assert np.array_equal(
                pixels[y : y + 32 : 2, x : x + 48 : 2], frames[n, t].transpose(1, 2, 0)
            )


def test_both_formats_give_the_same_pictures(tmp_path):
    work = WorkSettings(workers=1, show_progress=False)
    pictures = []
    for storage_format in ("webdataset", "zarr"):
        url = str(tmp_path / storage_format)
        build_archive(BlobSource(), url, OutputSettings(format=storage_format), work)
        sheet, _ = draw_archive(url, tmp_path / f"{storage_format}-pictures", split="test", num=3)
        pictures.append(sheet.read_bytes())
    assert pictures[0] == pictures[1]


def test_a_radar_archive_is_a_map_and_a_video_is_not(rainy, tmp_path):
    _, manifest = rainy
    assert isinstance(view_of(manifest), MapView)
    grey = dataclasses.replace(manifest.units, quantity="intensity", unit="1")
    assert isinstance(view_of(dataclasses.replace(manifest, units=grey)), MapView)
    video = write_video(tmp_path, np.zeros((1, 2, 3, 8, 8), np.uint8))
    assert not isinstance(view_of(video), MapView)
    with pytest.raises(ValueError, match="Only 1 .gray. or 3 .RGB. channels .* clips has 2"):
        view_of(dataclasses.replace(video, channels=2))


def test_the_terms_are_on_the_sheet(rainy):
    _, manifest = rainy
    assert attribution(manifest) == (
        "Data: Synthetic composite, Nobody's weather service. Terms: CC0 & <no strings attached>"
    )
    assert attribution(dataclasses.replace(manifest, source=None)) == ""
    assert shorten("short", 500, 11) == "short"
    cut = shorten("a long text that does not fit", 80, 11)
    assert cut.endswith("…") and len(cut) < 20
    lines = wrapped("terms of many words that need lines", 80, 11)
    assert len(lines) > 2 and " ".join(lines) == "terms of many words that need lines"
    assert wrapped("", 80, 11) == []


def test_the_command_refuses_another_split(rainy, tmp_path, capsys):
    url, _ = rainy
    assert main(["show", url, "--out", str(tmp_path), "--split", "test"]) == 1
    assert "no split 'test'" in capsys.readouterr().err
