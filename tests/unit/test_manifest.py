"""The manifest: a round trip, and every way in which it can be wrong is refused by name."""

import hashlib
import json
from typing import Any

import pytest

from tmu_dist.data.manifest import Manifest, ManifestError, Shard, Units

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


def test_round_trip():
    before = manifest(frame_interval_minutes=5)
    after = Manifest.from_json(before.to_json())
    assert after == before
    assert after.content_hash == before.content_hash
    assert after.num_samples("train") == 4
    assert after.sample_shape == (4, 1, 8, 6)


def test_content_hash_is_the_sha256_of_the_file_and_sees_every_change():
    before = manifest()
    assert before.content_hash == hashlib.sha256(before.to_json().encode()).hexdigest()
    after = manifest(splits={"train": (shard(crc32c=(1, 2)),)})
    assert after.content_hash != before.content_hash


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
        (record(schema_version=2), "schema_version is 2"),
        (record(color="red"), "unknown fields: color"),
        (record(height="8"), "height must be int"),
        (record(height=True), "height must be int"),
        (record(width=0), "width must be at least 1"),
        (record(dtype="float32"), "dtype must be 'uint8'"),
        (record(frame_interval_minutes=0), "frame_interval_minutes must be positive"),
        (record(splits={}), "splits must be some of"),
        (record(splits={"dev": []}), "splits must be some of"),
        (record(splits={"train": []}), "has no shard"),
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
    ["/etc/passwd", "../train/x.tar", "train/../../x.tar", "train//x.tar", "./x.tar", "train\\x"],
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


def test_an_unknown_split_names_the_ones_there_are():
    with pytest.raises(ManifestError, match=r"no split 'test': choose from \['train'\]"):
        manifest().num_samples("test")
