"""Damaged and wrong Zarr archives: no reader gives other frames, and `verify` names all of it."""

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zstandard

from data_prep.verify_zarr import ArrayFacts, check_zarr_shard
from data_prep.writers.objects import read_manifest, write_object
from tests.archive_place import WAYS, open_files
from tests.tiny_zarr import (
    EMPTY_SHARD,
    ORIGINS,
    PER_SHARD,
    SHARD,
    ZARRS,
    place_of,
    problems_of,
    write_archive,
)
from tmu_dist.data import cache, shard_files, storage, zarr_archive
from tmu_dist.data.archive import DamageError, ShardError, open_archive
from tmu_dist.data.cache import NodeCache
from tmu_dist.data.zarr_layout import ArrayLayout


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


each_way = pytest.mark.parametrize("way", WAYS)


def values_of(url: str) -> np.ndarray:
    """The training samples of a whole archive."""
    return open_archive(url).read("train", range(len(ORIGINS)))


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x81]) + data[place + 1 :]


@each_way
def test_a_shard_of_nothing_but_missing_pixels_is_there_and_must_be(way, tmp_path):
    place = place_of(way, tmp_path)
    path, data = SHARD.format(EMPTY_SHARD), place.read(SHARD.format(EMPTY_SHARD))
    storage.delete(place.url, path)
    reader = place.open()
    reader.read("train", [0, 5])
    with pytest.raises(
        ShardError, match=rf"{path}, sample 1 at frame 5, row 1, column 1: the shard is missing"
    ):
        reader.read("train", [0, 4])
    begins_in_the_shard_before = "sample 2 at frame 2, row 0, column 6: the shard is missing"
    with pytest.raises(ShardError, match=rf"{path}, {begins_in_the_shard_before}"):
        reader.read("train", [2])
    assert problems_of(place.url) == [f"{path}: {place.url}/{path} does not exist."]
    storage.write_bytes(place.url, path, data)
    assert (reader.read("train", [4])[0, :2] == 255).all()


@pytest.mark.parametrize("pipeline", ["zarr.core.codec_pipeline.BatchedCodecPipeline", ZARRS])
def test_libraries_give_fill_values_for_what_is_not_there(archive, pipeline):
    """The hazard because of which shards are not read by one."""
    if pipeline == ZARRS:
        pytest.importorskip("zarrs")
    (archive / SHARD.format(0)).unlink()
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        silent = zarr.open_array(archive, path="train/reflectivity", mode="r")[:PER_SHARD]
    assert (silent == 255).all()


def test_a_shard_that_goes_while_the_archive_is_open(archive, monkeypatch):
    """It is read on, as it was, by those who have it open, until they look; others miss it."""
    monkeypatch.setattr(zarr_archive, "_KEPT_BYTES", 0)
    monkeypatch.setattr(shard_files, "_LOOK_SECONDS", math.inf)
    before = values_of(str(archive))
    reader = open_archive(str(archive))
    reader.read("train", [0])
    for number in (0, 1):
        (archive / SHARD.format(number)).unlink()
    assert np.array_equal(reader.read("train", [1]), before[1:2])
    with pytest.raises(ShardError, match=rf"{SHARD.format(1)}, sample 0 .* the shard is missing"):
        reader.read("train", [3])
    with pytest.raises(ShardError, match=rf"{SHARD.format(0)}, sample 0 .* the shard is missing"):
        open_archive(str(archive)).read("train", [0])
    monkeypatch.setattr(shard_files, "_LOOK_SECONDS", 0.0)
    reader.read("train", [1])  # after which it looks at its files
    with pytest.raises(ShardError, match=rf"{SHARD.format(0)}, sample 1 .* the shard is missing"):
        reader.read("train", [1])


@pytest.mark.parametrize("way", ["files", "ranges"])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_truncated_shard_is_named(way, is_open, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_archive, "_KEPT_BYTES", 0)
    place = place_of(way, tmp_path)
    path, reader = SHARD.format(0), place.open()
    data = place.read(path)
    if is_open:
        reader.read("train", [0])
    place.write(path, data[:300])
    with pytest.raises(
        ShardError, match=rf"{path}, sample 1 .* it has 300 bytes, the manifest says {len(data)}\."
    ):
        reader.read("train", [1])


@pytest.mark.parametrize("way", ["files", "ranges"])
def test_a_shard_that_is_too_long_is_named(way, tmp_path):
    place = place_of(way, tmp_path)
    data = place.read(SHARD.format(0))
    place.write(SHARD.format(0), data + b"more")
    with pytest.raises(ShardError, match=rf"it has {len(data) + 4} bytes, the manifest says"):
        place.open().read("train", [0])


def test_verify_names_a_truncated_shard(archive):
    path = archive / SHARD.format(2)
    data = path.read_bytes()
    path.write_bytes(data[:-7])
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
        with pytest.raises(ShardError, match=r"/c/0/0/0, sample 0 .* at byte \d+ were altered"):
            open_archive(str(archive)).read("train", [0])
    path.write_bytes(data)
    assert np.array_equal(open_archive(str(archive)).read("train", [0]), before)


@each_way
@pytest.mark.parametrize("where", ["chunk", "index"])
def test_damage_in_the_store_is_named(way, where, tmp_path, monkeypatch):
    """Of a copy in the cache by its sha256, else by the checksum of what is read."""
    monkeypatch.setattr(cache, "_RETRY_SECONDS", 0.0)
    place = place_of(way, tmp_path)
    path = SHARD.format(1)
    data = place.read(path)
    place.write(path, flipped(data, 20 if where == "chunk" else len(data) - 30))
    said = {"chunk": r"chunk 0 at byte 0 were altered", "index": r"the index at byte \d+ were alt"}
    message = "sha256" if way == "cache" else said[where]
    with pytest.raises(ShardError, match=rf"{path}, sample 0 at frame 4, .*{message}"):
        place.open().read("train", [3, 4])


@pytest.mark.parametrize("where", ["chunk", "index", "cut"])
def test_a_damaged_copy_is_fetched_again(where, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_archive, "_KEPT_BYTES", 0)
    place = place_of("cache", tmp_path)
    before, copy = values_of(place.url), place.copy_of(0)
    place.open().read("train", [0])
    data = copy.read_bytes()
    reader = place.open()
    if where != "index":  # an index is read once; what it says is then known
        reader.read("train", [0])
    damaged = {
        "chunk": flipped(data, 20),
        "index": flipped(data, len(data) - 30),
        "cut": data[:300],
    }
    copy.write_bytes(damaged[where])
    assert np.array_equal(reader.read("train", [1, 0]), before[[1, 0]])
    assert copy.read_bytes() == data


def test_a_range_damaged_on_its_way_is_fetched_again(tmp_path, monkeypatch):
    place = place_of("ranges", tmp_path)
    before = values_of(place.url)
    read_range, damage = storage.read_range, iter([1, 1])

    def damaged(url: str, path: str, offset: int, size: int) -> memoryview:
        data = bytearray(read_range(url, path, offset, size))
        data[-1] ^= next(damage, 0)
        return memoryview(bytes(data))

    monkeypatch.setattr(storage, "read_range", damaged)
    assert np.array_equal(place.open().read("train", [0]), before[:1])


def test_copies_may_be_removed_at_any_time(tmp_path, monkeypatch):
    """The cache holds one shard only, and somebody else empties it all the time."""
    monkeypatch.setattr(zarr_archive, "_KEPT_BYTES", 0)
    place = place_of("cache", tmp_path)
    before = values_of(place.url)
    shards = place.open().manifest.shards("train")
    largest = max(shard.num_bytes for shard in shards)
    reader = open_archive(place.url, cache=NodeCache(place.cache.folder, largest))
    done = threading.Event()

    def empty() -> None:
        while not done.wait(0.0005):
            for shard in shards:
                (place.cache.folder / shard.sha256).unlink(missing_ok=True)

    other = threading.Thread(target=empty)
    other.start()
    try:
        random = np.random.default_rng(0)
        for _ in range(60):
            ids = random.integers(0, len(ORIGINS), 3).tolist()
            assert np.array_equal(reader.read("train", ids), before[ids])
    finally:
        done.set()
        other.join()


def test_not_too_many_shards_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_MOST_OPEN_FILES", 2)
    monkeypatch.setattr(zarr_archive, "_MOST_INDEXES", 1)
    place = place_of("files", tmp_path)
    before, reader = values_of(place.url), place.open()
    for _ in range(2):
        assert np.array_equal(reader.read("train", [5, 3, 0]), before[[5, 3, 0]])
        assert len(open_files(Path(place.url))) == 2
    del reader
    assert not open_files(Path(place.url))


def test_removed_copies_are_closed(tmp_path):
    place = place_of("cache", tmp_path)
    reader = place.open()
    reader.read("train", [0, 3])
    place.copy_of(0).unlink()
    reader.read("train", [5])
    found = open_files(place.cache.folder)
    assert found == {str(place.copy_of(number)) for number in (1, 2)}


def test_copies_in_use_are_marked_and_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(zarr_archive, "_KEPT_BYTES", 0)
    place = place_of("cache", tmp_path)
    reader = place.open()
    reader.read("train", [0, 3, 5])
    before = time.time() - 3600
    for number in (0, 1, 2):
        os.utime(place.copy_of(number), (before, before))
    later = time.monotonic() + 10  # the cache asks the disk at most once a second
    monkeypatch.setattr(time, "monotonic", lambda: later)
    reader.read("train", [5])
    marked = [place.copy_of(number).stat().st_mtime > before + 60 for number in (0, 1, 2)]
    assert marked == [False, False, True]


def test_bytes_that_their_checksum_does_not_cover_are_refused():
    """A chunk without one, with more after it, or of another length."""
    layout = ArrayLayout(
        shape_THW=(2, 5, 7),
        shard_THW=(1, 1, 1),
        chunk_THW=(2, 5, 7),
        chunk_shape=(2, 5, 7),
        dtype=np.dtype("u1"),
    )

    def compressed(data: bytes, **options: bool) -> bytes:
        options = {"write_checksum": True} | options
        return zstandard.ZstdCompressor(**options).compress(data)

    raw = bytes(range(70))
    says_exabytes = bytearray(compressed(raw))
    says_exabytes[4] |= 0xC0

    for data in (compressed(raw), compressed(raw, write_content_size=False)):
        assert layout.decode(data).tobytes() == raw
    for data in (
        compressed(raw, write_checksum=False),
        compressed(raw) + b"more",
        compressed(raw)[:-1],
        compressed(raw[1:]),
        compressed(raw[1:], write_content_size=False),
        compressed(raw + b"x", write_content_size=False),
        says_exabytes,
        raw,
        b"",
    ):
        with pytest.raises(DamageError):
            layout.decode(data)


def test_other_metadata_than_the_manifest_knows_are_refused(archive):
    path = archive / "train/reflectivity/zarr.json"
    edit_json(path, lambda record: record.update(fill_value=0))
    with pytest.raises(ShardError, match=r"train/reflectivity/zarr\.json, the array's metadata"):
        open_archive(str(archive)).read("train", [0])
    assert problems_of(archive)[0].startswith("train/reflectivity/zarr.json: has ")
    path.unlink()
    with pytest.raises(
        ShardError, match=r"zarr\.json, the array's metadata: the object is missing"
    ):
        open_archive(str(archive)).read("train", [0])


def test_damaged_records_are_named(archive):
    path = archive / "train/samples/sample_meta/c/0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"sample_meta/c/0, row 2: the bytes were altered"):
        open_archive(str(archive)).read_meta("train", 2)
    path.unlink()
    with pytest.raises(ShardError, match=r"sample_meta/c/0, row 2: the object is missing"):
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


def inside(record: dict) -> dict:
    """What array metadata say of a shard."""
    return record["codecs"][0]["configuration"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r.update(data_type="uint16"),
        lambda r: r.update(shape=[11, 1, 10, 14]),
        lambda r: r.update(shape=[11, 11, 14]),  # a frame in two shards
        lambda r: r.pop("codecs"),
        lambda r: r.update(codecs=inside(r)["codecs"]),
        lambda r: inside(r).update(chunk_shape=[3, 5, 7]),
        lambda r: inside(r).update(index_location="start"),
        lambda r: inside(r).update(index_codecs=["crc32c"]),
        lambda r: inside(r)["index_codecs"].pop(),
        lambda r: inside(r)["index_codecs"][0]["configuration"].update(endian="big"),
        lambda r: inside(r)["codecs"].insert(0, {"name": "transpose"}),
        lambda r: inside(r)["codecs"].pop(),
    ],
)
def test_an_array_of_another_layout_is_refused_in_reading(archive, edit):
    path = "train/reflectivity/zarr.json"
    record = json.loads((archive / path).read_text())
    edit(record)
    rewrite(archive, path, json.dumps(record).encode())
    with pytest.raises(ShardError, match=rf"{path}, .* do not describe an array of docs/data_f"):
        open_archive(str(archive)).read("train", [0])


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


def test_chunks_that_a_writer_left_out_are_found(archive):
    """Zarr libraries leave out chunks of fill values, and read them again as such."""
    plain = zarr.open_array(archive, path="train/reflectivity", mode="r+")
    plain[0:2, 0:5, 0:7] = 255
    path = SHARD.format(0)
    rewrite(archive, path, (archive / path).read_bytes())
    assert problems_of(archive) == [
        f"{path}: chunk (0, 0, 0) is absent and would read as fill values"
    ]
    with pytest.raises(ShardError, match=rf"{path}, sample 0 .*: chunk 0 is absent"):
        open_archive(str(archive)).read("train", [0])


def test_a_manifest_that_puts_samples_elsewhere_is_refused_in_reading(archive):
    edit_json(
        archive / "manifest.json",
        lambda record: record["splits"]["train"][0]["origins"].__setitem__(0, [0, 5, 0]),
    )
    with pytest.raises(
        ShardError, match="sample 0 at frame 0, row 5, column 0: the manifest puts it"
    ):
        open_archive(str(archive)).read("train", [0])
