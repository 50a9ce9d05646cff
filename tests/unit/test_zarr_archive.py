"""Zarr archives: what goes in comes out, and plain xarray understands it."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st

from data_prep.writers import cf, zarr_tables
from data_prep.writers.zarr_store import create_split, finish_store, write_frames, zarr_shards
from data_prep.writers.zarr_tables import FrameAxis
from tests import s3_servers
from tests.archive_place import WAYS
from tests.tiny_zarr import (
    FINE_RADAR,
    GRID,
    NUM_FRAMES,
    ORIGINS,
    PER_SHARD,
    RADAR,
    VIDEO,
    ZARRS,
    block,
    frames_of,
    layout_of,
    part_of,
    place_of,
    problems_of,
    samples_of,
    write_archive,
    write_shards,
)
from tmu_dist.data import ranges, storage, zarr_archive
from tmu_dist.data.archive import Archive, open_archive
from tmu_dist.data.cache import NodeCache
from tmu_dist.data.loader import SequenceLoader


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return Path(write_archive(str(tmp_path_factory.mktemp("zarr"))))


KINDS = {
    "radar": {},
    "fine radar": {"units": FINE_RADAR, "dtype": "uint16"},
    "gray video": {"units": VIDEO, "is_clock": False},
    "colour video": {"units": VIDEO, "channels": 3, "is_clock": False},
}


def frames_in(url: str, split: str, options: dict[str, Any]) -> np.ndarray:
    """The frames that `write_archive` writes with the options of a kind."""
    dtype, channels = options.get("dtype", "uint8"), options.get("channels", 1)
    return frames_of(layout_of(url, split, options.get("units", RADAR), dtype, channels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_samples_and_records_come_back(kind, way, tmp_path):
    place = place_of(way, tmp_path, **KINDS[kind])
    archive = place.open()
    for split in ("train", "val"):
        frames = frames_in(place.url, split, KINDS[kind])
        order = [5, 0, 3, 3, 1, 4, 2]
        found = archive.read(split, order)
        assert found.dtype == frames.dtype
        assert np.array_equal(found, np.stack([block(frames, ORIGINS[i]) for i in order]))
        assert archive.read(split, []).shape == (0, *archive.manifest.sample_shape)
        for i in order:
            assert archive.read_meta(split, i) == {"sample_id": i, "event": "größer"}
    assert problems_of(place.url) == []


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[tuple[str, str], tuple[Archive, np.ndarray]]:
    """Archives of two kinds, in a folder and in a store, with their frames."""
    found = {}
    for kind in ("fine radar", "colour video"):
        for way in ("files", "ranges"):
            place = place_of(way, tmp_path_factory.mktemp("zarr"), **KINDS[kind])
            found[kind, way] = place.open(), frames_in(place.url, "train", KINDS[kind])
    return found


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, int, int], list[tuple[int, int, int]]]:
    """A size of samples, and places where such samples are in the array, by shard."""
    limits = NUM_FRAMES, GRID.height, GRID.width
    size = draw(st.tuples(*(st.integers(1, limit) for limit in limits)))
    place = st.tuples(*(st.integers(0, a - b) for a, b in zip(limits, size, strict=True)))
    return size, sorted(draw(st.lists(place, min_size=1, max_size=12)), key=lambda p: p[0] // 4)


@pytest.mark.parametrize("way", ["files", "ranges"])
@pytest.mark.parametrize("kind", ["fine radar", "colour video"])
@pytest.mark.parametrize("kept", [0, 2_000, 2**20])
@given(data=st.data())
def test_any_batch_of_any_blocks_is_what_the_array_holds(kinds, kind, way, kept, data):
    """Overlapping, across shards, of one pixel or of everything; whatever is kept in between."""
    (size, origins), batches = data.draw(blocks()), []
    whole, frames = kinds[kind, way]
    shards = whole.manifest.shards("train")
    places = [[o for o in origins if o[0] // PER_SHARD == n] for n in range(len(shards))]
    replaced = tuple(
        dataclasses.replace(shard, origins=tuple(of_shard))
        for shard, of_shard in zip(shards, places, strict=True)
    )
    sizes = dict(zip(("num_frames", "height", "width"), size, strict=True))
    # The grid is of frames, not of samples; without it, nothing else says how large they are.
    manifest = dataclasses.replace(whole.manifest, splits={"train": replaced}, **sizes)
    archive = Archive(whole.url, manifest)
    batches = data.draw(st.lists(st.lists(st.integers(0, len(origins) - 1)), max_size=4))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(zarr_archive, "_KEPT_BYTES", kept)
        for ids in batches:
            archive.expect("train", ids)
        for ids in batches:
            found = archive.read("train", ids)
            for sample, sample_id in zip(found, ids, strict=True):
                (t, y, x), (time, height, width) = origins[sample_id], size
                assert np.array_equal(
                    sample, frames[t : t + time, :, y : y + height, x : x + width]
                )


@pytest.mark.parametrize("pipeline", ["zarr.core.codec_pipeline.BatchedCodecPipeline", ZARRS])
@pytest.mark.parametrize("kind", KINDS)
def test_other_readers_of_zarr_see_the_same_frames(kind, pipeline, tmp_path):
    if pipeline == ZARRS:
        pytest.importorskip("zarrs")
    options = KINDS[kind]
    frames = frames_in(write_archive(str(tmp_path), **options), "val", options)
    quantity = options.get("units", RADAR).quantity
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        found = zarr.open_array(tmp_path, path=f"val/{quantity}", mode="r")[...]
    assert np.array_equal(found, frames if frames.shape[1] > 1 else frames[:, 0])


def test_samples_that_overlap_fetch_their_chunks_once(tmp_path, requests, monkeypatch):
    """In a batch, and from one batch to the next, with hints and without."""
    monkeypatch.setattr(ranges, "_NEAR_BYTES", 0)  # nothing is read over between two chunks
    archive = place_of("ranges", tmp_path).open()
    archive.expect("train", [0, 1])
    for ids in ([0, 1], [2, 0], [1, 5, 5], [3, 4]):
        archive.read("train", ids)
    stored = {shard.path for shard in archive.manifest.shards("train")}
    assert {path for path, *_ in requests} == stored
    assert len(set(requests)) == len(requests)


def test_hints_fetch_what_is_then_read(tmp_path, requests):
    archive = place_of("ranges", tmp_path).open()
    frames = frames_in(archive.url, "train", {})
    archive.expect("train", [5, 0, 3])
    deadline = time.monotonic() + 10
    while len(requests) < 6 and time.monotonic() < deadline:  # indexes and chunks
        time.sleep(0.01)
    before = len(requests)
    found = archive.read("train", [5, 0, 3])
    assert np.array_equal(found, [block(frames, ORIGINS[i]) for i in (5, 0, 3)])
    assert len(requests) == before


def test_a_store_that_often_refuses_gives_the_same_samples(tmp_path, monkeypatch):
    url = write_archive(str(tmp_path / "bucket/tiny"))
    frames = frames_in(url, "train", {})
    with s3_servers.hadro(tmp_path, error_rate=0.3, seed=5) as server:
        server.use(monkeypatch)
        for _ in range(3):
            archive = open_archive("s3://bucket/tiny")
            archive.expect("train", [4, 2])
            for ids in ([4, 2], [0, 5, 1, 3]):
                found = archive.read("train", ids)
                assert np.array_equal(found, [block(frames, ORIGINS[i]) for i in ids])
            assert archive.read_meta("train", 3)["sample_id"] == 3


def test_records_come_back_from_every_chunk_of_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_tables, "_ROWS_PER_CHUNK", 4)
    archive = open_archive(write_archive(str(tmp_path)))
    assert (tmp_path / "train/samples/sample_meta/c/1").is_file()
    for sample_id in (5, 0, 4, 3):
        assert archive.read_meta("train", sample_id)["sample_id"] == sample_id
    assert problems_of(tmp_path) == []


def test_there_is_no_sample_beyond_the_last(whole):
    archive = open_archive(str(whole))
    with pytest.raises(ValueError, match=r"'train' has samples 0..5, not 6"):
        archive.read("train", [6])
    with pytest.raises(ValueError, match="no split 'test'"):
        archive.read_meta("test", 0)


def test_plain_xarray_sees_times_places_and_physical_values(whole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xarray.open_zarr(whole, group="train") as data:
            data.load()
    field = data["reflectivity"]
    assert field.dims == ("time", "y", "x")
    codes = frames_of(layout_of(str(whole), "train", RADAR, "uint8", 1))[:, 0]
    assert np.array_equal(np.isnan(field), codes == 255)
    observed = codes != 255
    assert np.allclose(field.values[observed], codes[observed] * 0.5 - 10)
    assert field.attrs["units"] == "dBZ"
    assert field.attrs["standard_name"] == "equivalent_reflectivity_factor"
    assert field.attrs["grid_mapping"] == "crs"
    start = np.datetime64("2015-08-19T16:00:00")
    assert np.array_equal(data["time"], start + np.arange(11) * np.timedelta64(5, "m"))
    assert data["series"].values.tolist() == ["a"] * 8 + ["b"] * 3
    assert "series" in data.coords
    assert data["x"].values[:2].tolist() == [1050.0, 1150.0]
    assert data["y"].values[:2].tolist() == [-3100.0, -3300.0]
    assert data["y"].attrs["standard_name"] == "projection_y_coordinate"
    assert data["crs"].attrs["grid_mapping_name"] == "polar_stereographic"
    assert data.attrs["license"] == "CC0-1.0"
    assert field.sel(time="2015-08-19T16:10").shape == (10, 14)


def test_plain_xarray_sees_the_sample_tables(whole):
    with xarray.open_zarr(whole, group="train/samples") as tables:
        tables.load()
    places = [tables[f"sample_{name}"].values.tolist() for name in ("frame", "row", "col")]
    assert list(zip(*places, strict=True)) == ORIGINS
    assert tables["sample_weight"].values.tolist() == [1, 2, 3, 4, 5, 6]
    assert tables["sample_key"].values[2] == "train-2"
    assert json.loads(tables["sample_meta"].values[3])["sample_id"] == 3


def test_the_example_of_the_document_finds_the_first_sample(whole):
    document = (Path(__file__).parents[2] / "docs/data_format.md").read_text()
    (example,) = re.findall(r"```python\n(import xarray.*?)```", document, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace("ARCHIVE", str(whole)).replace("20, 128, 128", "3, 6, 8"), names)
    codes = open_archive(str(whole)).read("train", [0])[0, :, 0]
    expected = np.where(codes == 255, np.nan, codes * 0.5 - 10)
    assert np.allclose(names["sequence"], expected, equal_nan=True)


def test_video_has_clips_and_frame_numbers(tmp_path):
    write_archive(str(tmp_path), units=VIDEO, channels=3, is_clock=False)
    with xarray.open_zarr(tmp_path, group="val") as data:
        assert data["intensity"].dims == ("time", "channel", "y", "x")
        assert data["frame_number"].values.tolist() == list(range(1, 12))
        assert data["clip"].values[-1] == "b"
        assert {"frame_number", "clip"} == set(data.coords)
        assert float(data["intensity"].max()) <= 1


def test_bytes_depend_neither_on_processes_nor_on_order(whole, tmp_path):
    url = str(tmp_path)
    write_archive(url)
    layout = layout_of(url, "train", RADAR, "uint8", 1)
    shutil.rmtree(tmp_path / "train/reflectivity/c")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        numbers = [2, 1, 0]
        list(pool.map(write_frames, [layout] * 3, numbers, [part_of(layout, n) for n in numbers]))
    files = [
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (whole, tmp_path)
    ]
    assert files[0] == files[1]
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("way", ["files", "cache"])
def test_reading_processes_read_the_same(whole, way, tmp_path):
    cache = NodeCache(tmp_path, 2**20) if way == "cache" else None
    archive = open_archive(str(whole), cache=cache)
    batches = [
        list(SequenceLoader(archive, "train", global_batch_size=3, num_workers=workers).one_pass())
        for workers in (0, 1)
    ]
    for here, there in zip(*batches, strict=True):
        assert np.array_equal(here.frames_BTCHW.numpy(), there.frames_BTCHW.numpy())
    ids = [i for batch in batches[0] for i in batch.sample_ids_B.tolist()]
    assert ids == list(range(6))


def test_a_layout_divides_frames_evenly_and_holds_no_more_than_it_needs():
    layout = dataclasses.replace(
        layout_of("x", "train", RADAR, "uint8", 1),
        num_frames=100,
        height=1226,
        width=300,
        frames_per_shard=64,
        chunk_frames=8,
        tile=256,
    )
    assert layout.chunk_shape == (8, 246, 300)
    assert layout.shard_shape == (64, 1230, 300)
    assert layout.num_shards == 2
    assert layout.shard_frames(1) == range(64, 100)
    assert layout.shard_path(1) == "train/reflectivity/c/1/0/0"
    few = dataclasses.replace(layout, num_frames=10)
    assert few.shard_shape == (16, 1230, 300)
    assert dataclasses.replace(layout, frames_per_shard=30).chunk_shape[0] == 6
    colour = dataclasses.replace(layout, channels=3)
    assert colour.shape == (100, 3, 1226, 300)
    assert colour.shard_path(0) == "train/reflectivity/c/0/0/0/0"
    with pytest.raises(ValueError, match=r"has shards 0\.\.1, not 2"):
        layout.shard_frames(2)
    with pytest.raises(ValueError, match="tile must be at least 1"):
        dataclasses.replace(layout, tile=0)
    with pytest.raises(ValueError, match="dtype uint8 or uint16"):
        dataclasses.replace(layout, dtype="float32")


def test_what_does_not_fit_is_refused(tmp_path):
    layout = layout_of(str(tmp_path), "train", RADAR, "uint8", 1)
    axis = FrameAxis(["a"] * 11, list(range(11)), True)
    with pytest.raises(ValueError, match=r"takes uint8 frames of shape \(3, 1, 10, 14\)"):
        write_frames(layout, 2, np.zeros((4, 1, 10, 14), np.uint8))
    with pytest.raises(ValueError, match="got uint16 of"):
        write_frames(layout, 2, np.zeros((3, 1, 10, 14), np.uint16))
    with pytest.raises(ValueError, match="has 11 frames, but there are 10 series"):
        create_split(layout, axis._replace(series=["a"] * 10), [], title="x")
    with pytest.raises(ValueError, match="the grid is 8x14"):
        create_split(layout, axis, [], title="x", grid=dataclasses.replace(GRID, height=8))
    written = write_shards(layout)
    with pytest.raises(ValueError, match="has the 3 shards"):
        zarr_shards(layout, written[:2], samples_of("train"))
    with pytest.raises(ValueError, match="sort them by their first frame"):
        zarr_shards(layout, written, samples_of("train")[::-1])


def test_projections_in_cf():
    assert cf.crs_attributes("EPSG:4326") == {"spatial_ref": "EPSG:4326"}
    assert cf.crs_attributes("PROJCS[...]")["crs_wkt"] == "PROJCS[...]"
    laea = cf.crs_attributes("+proj=laea +lat_0=55 +lon_0=10 +x_0=195 +ellps=GRS80 +no_defs")
    assert laea["grid_mapping_name"] == "lambert_azimuthal_equal_area"
    assert laea["latitude_of_projection_origin"] == 55
    assert laea["false_easting"] == 195
    assert laea["inverse_flattening"] == pytest.approx(298.257222101)
    lcc = cf.crs_attributes("+proj=lcc +lat_0=0 +lat_1=44 +lat_2=49.5 +k_0=1 +a=6378137 +b=6356752")
    assert lcc["standard_parallel"] == [44, 49.5]
    assert lcc["semi_minor_axis"] == 6356752
    for text in (
        "+proj=stere +lat_0=52 +lon_0=0",  # oblique
        "+proj=stere +lat_0=90 +a=6378.137 +b=6356.752",  # in km
        "+proj=somerc +lat_0=46.95 +lon_0=7.43",
        "+proj=laea +lat_0=52d30'N +lon_0=10",
    ):
        assert cf.crs_attributes(text) == {"spatial_ref": text, "proj4": text}


def test_degrees_are_latitude_and_longitude(tmp_path):
    layout = layout_of(str(tmp_path), "train", RADAR, "uint8", 1)
    grid = dataclasses.replace(GRID, unit="degree", projection=None)
    axis = FrameAxis(["a"] * 11, list(range(11)), True)
    finish_store(
        str(tmp_path), create_split(layout, axis, samples_of("train"), title="x", grid=grid)
    )
    with xarray.open_zarr(tmp_path, group="train") as data:
        assert data["y"].attrs["units"] == "degrees_north"
        assert data["x"].attrs["standard_name"] == "longitude"
        assert "crs" not in data


def test_nothing_heavy_is_loaded():
    code = "import sys, tmu_dist.data.archive, data_prep.verify, data_prep.writers.zarr_store;"
    code += "import tmu_dist.data.zarr_archive;"
    code += "assert not {'torch', 'ray', 'xarray', 'zarr'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metadata_can_be_read_where_nothing_can_be_listed(whole):
    """As on a plain web server: the root has the metadata of all nodes."""
    root = json.loads(storage.read_text(str(whole), "zarr.json"))
    nodes = root["consolidated_metadata"]["metadata"]
    on_disk = {
        str(path.parent.relative_to(whole)): json.loads(path.read_text())
        for path in whole.rglob("zarr.json")
        if path.parent != whole
    }
    for record in on_disk.values():
        record.pop("consolidated_metadata", None)
    assert nodes == on_disk
