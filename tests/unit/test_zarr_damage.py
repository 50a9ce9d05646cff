"""Damaged and wrong Zarr archives: no reader gives other frames, and `verify` names all of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from data_prep.verify_zarr import ArrayFacts, check_zarr_shard
from data_prep.writers.objects import read_manifest, write_object
from tests.tiny_zarr import EMPTY_SHARD, PER_SHARD, SHARD, problems_of, write_archive
from tmu_dist.data import storage
from tmu_dist.data.archive import ShardError, open_archive


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return Path(write_archive(str(tmp_path_factory.mktemp("zarr"))))


@pytest.fixture
def archive(whole, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "archive"))


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
