"""The manifest: a round trip, and every way in which it can be wrong is refused by name."""

import dataclasses
import hashlib
import json
from typing import Any

import pytest

from tmu_dist.data.manifest import (
    Grid,
    Manifest,
    ManifestError,
    Shard,
    SourceCard,
    StoredObject,
    Units,
    ZarrShard,
)

GRID = Grid(
    height=80,
    width=60,
    projection="EPSG:3067",
    unit="m",
    left=1.5,
    top=-2,
    pixel_width=1000,
    pixel_height=500.0,
)
UNITS = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)


def shard(path: str = "train/shard-000000.tar", **changes: Any) -> Shard:
    fields: dict[str, Any] = {
        "path": path,
        "num_bytes": 10240,
        "sha256": "0" * 64,
        "offsets": (512, 2560),
        "sizes": (700, 800),
        "crc32c": (1, 2**32 - 1),
    }
    return Shard(**(fields | changes))


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "tiny",
        "num_frames": 4,
        "channels": 1,
        "height": 8,
        "width": 6,
        "units": UNITS,
        "frame_interval_minutes": None,
        "splits": {"train": (shard(), shard("train/shard-000001.tar"))},
        "created_by": {"source": "test"},
    }
    return Manifest(**(fields | changes))


def zarr_shard(path: str = "train/reflectivity/c/0/0/0", **changes: Any) -> ZarrShard:
    fields: dict[str, Any] = {
        "path": path,
        "num_bytes": 10240,
        "sha256": "0" * 64,
        "origins": ((0, 0, 0), (3, 8, 6)),
    }
    return ZarrShard(**(fields | changes))


def zarr_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "format": "zarr",
        "units": Units(
            quantity="reflectivity",
            unit="dBZ",
            scale=0.01,
            offset=0.0,
            max_code=65_534,
            missing_code=65_535,
        ),
        "dtype": "uint16",
        "splits": {"train": (zarr_shard(), zarr_shard("train/reflectivity/c/1/0/0", origins=()))},
        "objects": (StoredObject(path="zarr.json", num_bytes=1, sha256="1" * 64),),
        "grid": GRID,
        "source": SourceCard(name="radar", licence="CC0-1.0"),
        "full_train_samples": 1,
    }
    return manifest(**(fields | changes))


def test_round_trip():
    before = manifest(frame_interval_minutes=5)
    after = Manifest.from_json(before.to_json())
    assert after == before
    assert after.content_hash == before.content_hash
    assert after.num_samples("train") == 4
    assert after.sample_shape == (4, 1, 8, 6)


def test_round_trip_of_zarr():
    before = zarr_manifest()
    after = Manifest.from_json(before.to_json())
    assert after == before
    assert after.num_samples("train") == 2
    assert after.shards("train")[0].origins[1] == (3, 8, 6)
    assert after.array_path("train") == "train/reflectivity"
    assert after.grid == GRID
    assert after.source is not None and after.source.provider == "unknown"


def test_content_hash_is_the_sha256_of_the_file_and_sees_every_change():
    before = manifest()
    assert before.content_hash == hashlib.sha256(before.to_json().encode()).hexdigest()
    after = manifest(splits={"train": (shard(crc32c=(1, 2)),)})
    assert after.content_hash != before.content_hash


def test_manifests_of_schema_2_keep_their_bytes_and_their_hash():
    """Runs, checkpoints and teachers record the hash, and there are many archives."""
    text = (
        '{"channels":1,"created_by":{"source":"test"},"dtype":"uint8","format":"webdataset",'
        '"frame_interval_minutes":null,"full_train_samples":null,"grid":null,"height":8,'
        '"name":"tiny","num_frames":4,"objects":[],"schema_version":2,"source":null,"splits":'
        '{"train":[{"crc32c":[1,4294967295],"num_bytes":10240,"offsets":[512,2560],"path":'
        '"train/shard-000000.tar","sha256":"0000000000000000000000000000000000000000000000000000'
        '000000000000","sizes":[700,800]}]},"units":{"max_code":255,"missing_code":null,"offset":'
        '0.0,"quantity":"intensity","scale":0.00392156862745098,"unit":"1"},"width":6}\n'
    )
    before = Manifest.from_json(text)
    assert before.compression == "zstd"
    assert before.to_json() == text
    assert before.content_hash == hashlib.sha256(text.encode()).hexdigest()
    assert Manifest.from_json(text) == before
    with pytest.raises(ManifestError, match="schema_version 2 are compressed with zstd"):
        dataclasses.replace(before, compression="none")
    now = manifest(splits={"train": (shard(),)})
    assert now.schema_version == 3
    assert now.content_hash != before.content_hash
    assert dataclasses.replace(now, schema_version=2) == before


def test_only_tars_are_uncompressed():
    raw = manifest(compression="none")
    assert Manifest.from_json(raw.to_json()).compression == "none"
    with pytest.raises(ManifestError, match="'none', but Zarr archives .* with zstd"):
        zarr_manifest(compression="none")


def record(**changes: Any) -> str:
    return json.dumps(json.loads(manifest().to_json()) | changes)


@pytest.mark.parametrize("field", sorted(json.loads(manifest().to_json())))
def test_a_missing_field_is_named(field):
    incomplete = json.loads(manifest().to_json())
    del incomplete[field]
    with pytest.raises(ManifestError, match=field):
        Manifest.from_json(json.dumps(incomplete))


@pytest.mark.parametrize("field", ["path", "sha256", "offsets"])
def test_a_missing_field_of_a_shard_is_named(field):
    incomplete = json.loads(manifest().to_json())
    del incomplete["splits"]["train"][1][field]
    with pytest.raises(ManifestError, match=rf"splits\.train\[1\] lacks {field}"):
        Manifest.from_json(json.dumps(incomplete))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        (record(schema_version=1), "schema_version is 1; this version reads only 2 and 3"),
        (record(schema_version=3.0), "schema_version is 3.0; this version"),
        (record(schema_version=2), "manifest has unknown fields: compression"),
        (record(compression="gzip"), r"compression must be one of \['zstd', 'none'\], got 'gzip'"),
        (record(compression=None), "compression must be one of"),
        (record(color="red"), "unknown fields: color"),
        (record(height="8"), "height must be int"),
        (record(height=True), "height must be int"),
        (record(width=0), "width must be at least 1"),
        (record(dtype="float32"), r"dtype must be one of \['uint8', 'uint16'\]"),
        (record(format="hdf5"), r"format must be one of \['webdataset', 'zarr'\]"),
        (record(format=["zarr"]), "format must be one of"),
        (record(full_train_samples=0), "full_train_samples must be at least 1"),
        (record(full_train_samples=1.5), "full_train_samples must be int"),
        (record(objects={}), "objects must be a list"),
        (record(objects=[{"path": "a"}]), r"objects\[0\] lacks num_bytes, sha256"),
        (record(grid={"height": 3}), "manifest.grid lacks"),
        (record(source="somebody"), "manifest.source must be a JSON object"),
        (record(frame_interval_minutes=0), "frame_interval_minutes must be positive"),
        (record(splits={}), "splits must be some of"),
        (record(splits={"dev": []}), "splits must be some of"),
        (record(splits={"train": []}), "train has no sample; leave the split out"),
        (record(splits=[]), "splits must be a JSON object"),
        (record(units={}), "units lacks"),
        (record(units=json.loads(manifest().to_json())["units"] | {"scale": 0}), "scale=0"),
    ],
)
def test_a_wrong_manifest_is_refused(text, message):
    with pytest.raises(ManifestError, match=message):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../train/x.tar",
        "train/../../x.tar",
        "train//x.tar",
        "./x.tar",
        "train\\x",
        ".",
    ],
)
def test_paths_that_leave_the_archive_are_refused(path):
    with pytest.raises(ManifestError, match="relative"):
        shard(path)


def test_a_shard_lies_in_its_split_and_is_listed_once():
    with pytest.raises(ManifestError, match="folder val/"):
        manifest(splits={"val": (shard(),)})
    with pytest.raises(ManifestError, match="listed once"):
        manifest(splits={"train": (shard(), shard())})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "abc"}, "64 hexadecimal"),
        ({"offsets": (512,)}, "one entry per sample"),
        ({"offsets": (), "sizes": (), "crc32c": ()}, "at least one"),
        ({"offsets": (512, 1024)}, "sample 1"),
        ({"offsets": (512, 2561)}, "sample 1"),
        ({"sizes": (700, 9000)}, "after 10240"),
        ({"sizes": (0, 800)}, "sample 0"),
        ({"crc32c": (1, 2**32)}, "32 bits"),
        ({"sizes": (700.0, 800)}, "list of integers"),
    ],
)
def test_a_shard_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ManifestError, match=message):
        shard(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"origins": ((0, 0),)}, "three integers"),
        ({"origins": (5,)}, "three integers"),
        ({"origins": None}, "must be a list"),
        ({"origins": ((0, 0, -1),)}, "at least 0"),
        ({"origins": ((0, 0, 1.0),)}, "three integers"),
        ({"sha256": "abc"}, "64 hexadecimal"),
        ({"path": "/train"}, "relative"),
    ],
)
def test_a_zarr_shard_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ManifestError, match=message):
        zarr_shard(**changes)


def test_shards_are_of_the_format_and_a_split_has_samples():
    with pytest.raises(ManifestError, match="is not of format zarr"):
        zarr_manifest(splits={"train": (shard(),)})
    with pytest.raises(ManifestError, match="is not of format webdataset"):
        manifest(splits={"train": (zarr_shard(),)})
    with pytest.raises(ManifestError, match="train has no sample"):
        zarr_manifest(splits={"train": (zarr_shard(origins=()),)})


@pytest.mark.parametrize("path", ["train/shard-000000.tar", "manifest.json", "a.json"])
def test_an_object_is_listed_once_and_is_not_the_manifest(path):
    stored = StoredObject(path="a.json", num_bytes=0, sha256="0" * 64)
    another = StoredObject(path=path, num_bytes=0, sha256="0" * 64)
    with pytest.raises(ManifestError, match=f"object '{path}' is listed twice, or the manifest"):
        manifest(objects=(stored, another))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_code": 0}, "max_code must be at least 1"),
        ({"missing_code": 254, "max_code": 254}, "must lie above max_code=254, got 254"),
        ({"missing_code": 256}, "units has code 256, which does not fit uint8"),
        ({"max_code": 300}, "units has code 300, which does not fit uint8"),
        ({"unit": 1}, "unit must be str"),
        ({"scale": float("nan")}, "finite, non-zero scale"),
    ],
)
def test_units_that_contradict_themselves_or_the_dtype_are_refused(changes, message):
    with pytest.raises(ManifestError, match=message):
        manifest(units=dataclasses.replace(UNITS, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "grid.width must be at least 1"),
        ({"unit": None}, "given all or none"),
        ({"top": None}, "given all or none"),
        ({"unit": "km"}, "'m' or 'degree', got 'km'"),
        ({"pixel_height": -1.0}, "positive pixels"),
        ({"left": float("inf")}, "finite edges"),
        ({"projection": 3067}, "projection must be str"),
    ],
)
def test_a_grid_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ManifestError, match=message):
        dataclasses.replace(GRID, **changes)


def test_a_full_count_needs_training_samples():
    with pytest.raises(ManifestError, match="of an archive with a train split"):
        manifest(splits={"val": (shard("val/shard-000000.tar"),)}, full_train_samples=1)


def test_an_unknown_split_names_the_ones_there_are():
    with pytest.raises(ManifestError, match=r"no split 'test': choose from \['train'\]"):
        manifest().num_samples("test")
