"""Zarr archives: what goes in comes out, plain xarray understands it, no damage stays unseen."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from data_prep.verify import verify_archive
from data_prep.verify_zarr import ArrayFacts, check_zarr_shard
from data_prep.writers import cf, zarr_tables
from data_prep.writers.objects import read_manifest, write_manifest, write_object
from data_prep.writers.zarr_store import (
    ZarrLayout,
    create_split,
    finish_store,
    write_frames,
    zarr_shards,
)
from data_prep.writers.zarr_tables import FrameAxis, ZarrSample
from tmu_dist.data import storage
from tmu_dist.data.archive import ShardError, open_archive
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.data.manifest import Grid, Manifest, SourceCard, Units

RADAR = Units(
    quantity="reflectivity", unit="dBZ", scale=0.5, offset=-10.0, max_code=140, missing_code=255
)
FINE_RADAR = dataclasses.replace(RADAR, scale=0.01, max_code=65_534, missing_code=65_535)
VIDEO = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)
GRID = Grid(
    height=10,
    width=14,
    projection="+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 +ellps=WGS84 +units=m",
    unit="m",
    left=1000.0,
    top=-3000.0,
    pixel_width=100.0,
    pixel_height=200.0,
)
SOURCE = SourceCard(name="test", provider="nobody", licence="CC0-1.0")

NUM_FRAMES, PER_SHARD = 11, 4
EMPTY_SHARD = 1
"""Of this one, every pixel is missing."""
ORIGINS = [(0, 0, 0), (1, 4, 6), (2, 0, 6), (4, 4, 0), (5, 1, 1), (8, 4, 6)]
"""Samples of 3 frames, 6x8 pixels; some end in the next shard."""
START_MINUTES = 24_000_000.0
SHARD = "train/reflectivity/c/{}/0/0"


def frames_of(layout: ZarrLayout) -> np.ndarray:
    """Codes that differ everywhere, with missing pixels where the units know them."""
    random = np.random.default_rng(len(layout.split))
    shape = (layout.num_frames, layout.channels, layout.height, layout.width)
    frames = random.integers(0, layout.units.max_code, shape, endpoint=True).astype(layout.dtype)
    if layout.units.missing_code is not None:
        frames[random.random(shape) < 0.2] = layout.units.missing_code
        frames[EMPTY_SHARD * PER_SHARD : (EMPTY_SHARD + 1) * PER_SHARD] = layout.units.missing_code
    return frames


def layout_of(url: str, split: str, units: Units, dtype: str, channels: int) -> ZarrLayout:
    return ZarrLayout(
        url=url,
        split=split,
        units=units,
        num_frames=NUM_FRAMES,
        channels=channels,
        height=GRID.height,
        width=GRID.width,
        dtype=dtype,
        frames_per_shard=PER_SHARD,
        chunk_frames=2,
        tile=6,
    )


def samples_of(split: str) -> list[ZarrSample]:
    return [
        ZarrSample(f"{split}-{i}", *origin, 1.0 + i, {"sample_id": i, "event": "größer"})
        for i, origin in enumerate(ORIGINS)
    ]


def write_archive(
    url: str,
    *,
    units: Units = RADAR,
    dtype: str = "uint8",
    channels: int = 1,
    is_clock: bool = True,
    edit_samples: Callable[[list[ZarrSample]], Any] = lambda samples: samples,
) -> str:
    """Write train and val splits of 11 frames in shards of 4, 6 samples each."""
    splits, created = {}, []
    grid = GRID if is_clock else None
    for split in ("train", "val"):
        layout = layout_of(url, split, units, dtype, channels)
        samples = samples_of(split)
        edit_samples(samples)
        start, step = (START_MINUTES, 5.0) if is_clock else (1.0, 1.0)
        axis = FrameAxis(["a"] * 8 + ["b"] * 3, [start + step * i for i in range(11)], is_clock)
        created += create_split(layout, axis, samples, title="tiny", grid=grid, source=SOURCE)
        splits[split] = zarr_shards(layout, write_shards(layout), samples)
    manifest = Manifest(
        name="tiny",
        num_frames=3,
        channels=channels,
        height=6,
        width=8,
        units=units,
        frame_interval_minutes=5.0 if is_clock else None,
        format="zarr",
        splits=splits,
        objects=finish_store(url, created),
        grid=grid,
        source=SOURCE,
        created_by={"source": "test"},
        dtype=dtype,  # type: ignore[arg-type]
    )
    write_manifest(url, manifest)
    return url


def write_one_shard(layout: ZarrLayout, number: int) -> Any:
    part = layout.shard_frames(number)
    return write_frames(layout, number, frames_of(layout)[part.start : part.stop])


def write_shards(layout: ZarrLayout) -> list[Any]:
    return [write_one_shard(layout, number) for number in range(layout.num_shards)]


def block(frames: np.ndarray, origin: tuple[int, int, int]) -> np.ndarray:
    t, y, x = origin
    return frames[t : t + 3, :, y : y + 6, x : x + 8]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return Path(write_archive(str(tmp_path_factory.mktemp("zarr"))))


@pytest.fixture
def archive(whole, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "archive"))


def problems_of(archive: Path | str) -> list[str]:
    return [str(problem) for problem in verify_archive(str(archive), show_progress=False)]


def edit_json(path: Path, edit: Callable[[dict], Any]) -> None:
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def rewrite(archive: Path, path: str, data: bytes) -> None:
    """Replace an object and its entry in the manifest: what a faulty writer would leave."""
    stored = write_object(str(archive), path, data)

    def replace(record: dict) -> None:
        shards = [shard for shards in record["splits"].values() for shard in shards]
        for entry in (*record["objects"], *shards):
            if entry["path"] == path:
                entry.update(num_bytes=stored.num_bytes, sha256=stored.sha256)

    edit_json(archive / "manifest.json", replace)


KINDS = {
    "radar": {},
    "fine radar": {"units": FINE_RADAR, "dtype": "uint16"},
    "gray video": {"units": VIDEO, "is_clock": False},
    "colour video": {"units": VIDEO, "channels": 3, "is_clock": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["folder", "memory"])
def test_samples_and_records_come_back(kind, where, tmp_path):
    options = KINDS[kind]
    url = str(tmp_path) if where == "folder" else f"memory://{kind}"
    archive = open_archive(write_archive(url, **options))
    for split in ("train", "val"):
        dtype, channels = options.get("dtype", "uint8"), options.get("channels", 1)
        frames = frames_of(layout_of(url, split, options.get("units", RADAR), dtype, channels))
        order = [5, 0, 3, 3, 1, 4, 2]
        found = archive.read(split, order)
        assert found.dtype == dtype
        assert np.array_equal(found, np.stack([block(frames, ORIGINS[i]) for i in order]))
        for i in order:
            assert archive.read_meta(split, i) == {"sample_id": i, "event": "größer"}
    assert problems_of(url) == []


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
        list(pool.map(write_one_shard, [layout] * 3, [2, 1, 0]))
    files = [
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (whole, tmp_path)
    ]
    assert files[0] == files[1]
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_a_shard_of_nothing_but_missing_pixels_is_there_and_must_be(archive):
    path = archive / SHARD.format(EMPTY_SHARD)
    assert path.is_file()
    path.unlink()
    silent = zarr.open_array(archive, path="train/reflectivity", mode="r")
    assert (silent[PER_SHARD : 2 * PER_SHARD] == 255).all()  # the hazard
    reader = open_archive(str(archive))
    reader.read("train", [0, 5])
    with pytest.raises(ShardError, match=rf"{path}, sample 1: the shard is missing"):
        reader.read("train", [4])
    with pytest.raises(ShardError, match=rf"{path}, sample 2: the shard is missing"):
        reader.read("train", [2])  # it begins in the shard before
    assert problems_of(archive) == [f"{SHARD.format(EMPTY_SHARD)}: {path} does not exist."]


def test_a_shard_that_goes_while_the_archive_is_open_is_noticed(archive):
    reader = open_archive(str(archive))
    reader.read("train", [0])
    (archive / SHARD.format(0)).unlink()
    with pytest.raises(ShardError, match=rf"{SHARD.format(0)} is missing"):
        reader.read("train", [0])


def test_a_truncated_shard_is_named(archive):
    path = archive / SHARD.format(2)
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(
        ShardError, match=rf"{path}, sample 0: .* it has {len(data) - 7} bytes, .* {len(data)}\."
    ):
        open_archive(str(archive)).read("train", [5])
    problems = problems_of(archive)
    assert problems[0].startswith(f"{SHARD.format(2)}: has {len(data) - 7} bytes")
    assert problems[1] == f"{SHARD.format(2)}: the crc32c of its index is wrong"


def test_every_altered_byte_is_noticed_where_it_is_read(archive):
    """Metadata say that samples are whole frames, so that every chunk is read."""

    def whole_frames(record: dict) -> None:
        record.update(height=10, width=14, num_frames=PER_SHARD)
        for shards in record["splits"].values():
            shards[0]["origins"] = [[0, 0, 0]]
            shards[1]["origins"] = shards[2]["origins"] = []

    edit_json(archive / "manifest.json", whole_frames)
    path = archive / SHARD.format(0)
    data = path.read_bytes()
    before = open_archive(str(archive)).read("train", [0])
    manifest, array = read_manifest(str(archive)), ArrayFacts((11, 10, 14), (4, 10, 14), (2, 5, 7))
    shard = manifest.shards("train")[0]
    assert not list(check_zarr_shard(manifest, array, shard, data))
    for place in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[place] ^= 0x81
        path.write_bytes(damaged)
        assert list(check_zarr_shard(manifest, array, shard, bytes(damaged))), place
        with pytest.raises(ShardError, match=r"/c/0/0/0, sample 0: the bytes were altered"):
            open_archive(str(archive)).read("train", [0])
    path.write_bytes(data)
    assert np.array_equal(open_archive(str(archive)).read("train", [0]), before)


def test_other_metadata_than_the_manifest_knows_are_refused(archive):
    path = archive / "train/reflectivity/zarr.json"
    edit_json(path, lambda record: record.update(fill_value=0))
    with pytest.raises(ShardError, match=r"train/reflectivity/zarr\.json, the array's metadata"):
        open_archive(str(archive)).read("train", [0])
    assert problems_of(archive)[0].startswith("train/reflectivity/zarr.json: has ")
    path.unlink()
    with pytest.raises(ShardError, match=r"zarr\.json does not exist"):
        open_archive(str(archive)).read("train", [0])


def test_damaged_records_are_named(archive):
    path = archive / "train/samples/sample_meta/c/0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"sample_meta/c/0, row 2: the bytes were altered"):
        open_archive(str(archive)).read_meta("train", 2)
    path.unlink()
    with pytest.raises(ShardError, match=r"row 2: train/samples/sample_meta/c/0 is missing"):
        open_archive(str(archive)).read_meta("train", 2)


def test_reading_processes_read_the_same(whole):
    archive = open_archive(str(whole))
    batches = [
        list(SequenceLoader(archive, "train", global_batch_size=3, num_workers=workers).one_pass())
        for workers in (0, 1)
    ]
    for here, there in zip(*batches, strict=True):
        assert np.array_equal(here.frames_BTCHW.numpy(), there.frames_BTCHW.numpy())
    ids = [i for batch in batches[0] for i in batch.sample_ids_B.tolist()]
    assert ids == list(range(6))


def test_verify_names_objects_that_are_gone_altered_or_strange(archive):
    (archive / "train/time/c/0").unlink()
    (archive / "val/y/zarr.json").write_text("{}")
    (archive / "statistics.json").write_text("{}")
    storage.write_bytes(str(archive), SHARD.format(9), b"more than there should be")
    (archive / ".parts").mkdir()
    (archive / ".parts/job.json").write_text("of an unfinished run")
    problems = problems_of(archive)
    assert problems[:2] == [
        "statistics.json: is not in the manifest",
        f"{SHARD.format(9)}: is not in the manifest",
    ]
    assert f"train/time/c/0: {archive}/train/time/c/0 does not exist." in problems
    assert any(p.startswith("val/y/zarr.json: has 2 bytes") for p in problems)
    assert not any(".parts" in p for p in problems)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(data_type="uint16"), "data_type is 'uint16', the format says 'uint8'"),
        (lambda r: r.update(shape=[20, 10, 14]), "has 20 frames and so the 5 shards"),
        (lambda r: r.update(shape=[11, 9, 14]), r"the manifest's grid is 10x14"),
        (lambda r: r.update(shape=[11, 1, 10, 14]), "shape, shards and chunks are"),
        (lambda r: r.pop("codecs"), "does not describe the array of this format: 'codecs'"),
        (
            lambda r: r["codecs"][0]["configuration"].update(index_codecs=[]),
            "index codecs is",
        ),
    ],
)
def test_verify_holds_the_array_against_the_manifest(archive, edit, message):
    path = "train/reflectivity/zarr.json"
    record = json.loads((archive / path).read_text())
    edit(record)
    rewrite(archive, path, json.dumps(record).encode())
    problems = problems_of(archive)
    assert any(p.startswith(f"{path}: ") and message in p for p in problems), problems


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (
            lambda samples: samples.__setitem__(1, samples[1]._replace(key="a.b")),
            ["samples/sample_key: row 1 is 'a.b', a key is letters"],
        ),
        (
            lambda samples: samples.__setitem__(1, samples[0]._replace(meta={"sample_id": 1})),
            ["train/samples/sample_key: row 1 is 'train-0', which is used twice"],
        ),
        (
            lambda samples: samples.__setitem__(1, samples[1]._replace(weight=0.0)),
            ["sample_weight: row 1 is 0.0"],
        ),
        (
            lambda samples: samples.__setitem__(1, samples[1]._replace(meta={"sample_id": 2})),
            ["sample_meta: row 1 is no JSON object that says sample_id 1"],
        ),
        (
            lambda samples: samples.__setitem__(1, samples[1]._replace(row=5)),
            [f"{SHARD.format(0)}, sample 1: starts at (1, 5, 6) and leaves the array"],
        ),
        (
            lambda samples: samples.__setitem__(4, samples[4]._replace(frame=6)),
            [f"{SHARD.format(1)}, sample 1: its frames do not follow each other in series"],
        ),
    ],
)
def test_verify_finds_samples_that_cannot_be(tmp_path, edit, messages):
    write_archive(str(tmp_path), edit_samples=edit)
    problems = problems_of(tmp_path)
    for message in messages:
        assert any(message in problem for problem in problems), problems


def test_verify_holds_the_tables_against_the_manifest(archive):
    edit_json(
        archive / "manifest.json",
        lambda record: record["splits"]["train"][0]["origins"].__setitem__(1, [1, 3, 6]),
    )
    assert problems_of(archive) == [
        "train/samples/sample_row: row 1 is 4, the manifest's origin says 3"
    ]


def test_verify_finds_codes_that_the_units_do_not_know(archive):
    edit_json(archive / "manifest.json", lambda record: record["units"].update(max_code=130))
    problems = problems_of(archive)
    assert all("the manifest's units know 0..130 and 255" in problem for problem in problems)
    assert any(p.startswith(f"{SHARD.format(0)}: chunk (0, 0, 0) holds the code") for p in problems)
    assert not any(p.startswith(SHARD.format(EMPTY_SHARD)) for p in problems)


def test_verify_finds_chunks_that_a_writer_left_out(archive):
    """Zarr libraries leave out chunks of fill values, and read them again as such."""
    plain = zarr.open_array(archive, path="train/reflectivity", mode="r+")
    plain[0:2, 0:5, 0:7] = 255
    path = SHARD.format(0)
    rewrite(archive, path, (archive / path).read_bytes())
    assert problems_of(archive) == [
        f"{path}: chunk (0, 0, 0) is absent and would read as fill values"
    ]


def test_a_manifest_that_puts_samples_elsewhere_is_refused_in_reading(archive):
    edit_json(
        archive / "manifest.json",
        lambda record: record["splits"]["train"][0]["origins"].__setitem__(0, [0, 5, 0]),
    )
    with pytest.raises(ShardError, match="sample 0: the manifest puts it at frame 0, row 5"):
        open_archive(str(archive)).read("train", [0])


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
    code += "assert not {'torch', 'ray', 'xarray', 'zarr'} & sys.modules.keys();"
    code += "import tmu_dist.data.zarr_archive;"
    code += "assert not {'torch', 'ray', 'xarray'} & sys.modules.keys()"
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
