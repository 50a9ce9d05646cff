"""Tar shards, compressed or not, as files, as copies in a cache or by ranges: all of it checked."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.verify import verify_archive
from data_prep.writers import webdataset
from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tests import s3_servers
from tests.archive_place import WAYS, Place, open_files, place_of
from tmu_dist.data import shard_files, storage, tar_archive
from tmu_dist.data.archive import Archive, ShardError, open_archive
from tmu_dist.data.cache import CacheLimitError, NodeCache
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.data.manifest import Compression, Manifest, ManifestError, Shard, Units
from tmu_dist.data.storage import StorageError
from tmu_dist.files import WriteError

SHAPE = (3, 1, 4, 5)
SIZES = {"train": (8, 8, 6), "val": (5,)}
UNITS = Units(quantity="intensity", unit="1", scale=1.0, offset=0.0, missing_code=None)

each_compression = pytest.mark.parametrize("compression", ["none", "zstd"])
each_way = pytest.mark.parametrize("way", WAYS)
in_place = pytest.mark.parametrize("way", ["files", "ranges"])


def frames_of(sample_id: int, dtype: str = "uint8") -> np.ndarray:
    """Frames that no other sample has."""
    frames = np.random.default_rng(sample_id).integers(0, np.iinfo(dtype).max, SHAPE)
    return frames.astype(dtype)


def write_archive(
    url: str,
    compression: Compression = "zstd",
    dtype: str = "uint8",
    shape: tuple[int, ...] = SHAPE,
) -> str:
    """Write 22 training samples in shards of 8, 8 and 6, and 5 validation samples."""
    splits: dict[str, tuple[Shard, ...]] = {}
    for split, sizes in SIZES.items():
        ids = itertools.count()
        splits[split] = tuple(
            write_shard(
                url,
                shard_path(split, number),
                [
                    Sample(f"{split}-{i:08d}", frames_of(i, dtype), {"sample_id": i})
                    for i in itertools.islice(ids, size)
                ],
                compression,
            )
            for number, size in enumerate(sizes)
        )
    num_frames, channels, height, width = shape
    manifest = Manifest(
        name="tiny",
        num_frames=num_frames,
        channels=channels,
        height=height,
        width=width,
        dtype=dtype,  # type: ignore[arg-type]
        units=UNITS,
        frame_interval_minutes=None,
        splits=splits,
        compression=compression,
        created_by={"source": "test"},
    )
    write_manifest(url, manifest)
    return url


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Place]:
    """Write an archive to be read in one of three ways."""

    def write(way: str, compression: Compression, **options) -> Place:
        return place_of(way, tmp_path, write_archive, compression=compression, **options)

    return write


def flipped(offset: int) -> Callable[[bytes], bytes]:
    """An edit that changes one bit."""

    def edit(data: bytes) -> bytes:
        return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]

    return edit


def read_all(archive: Archive) -> None:
    for sample_id in range(sum(SIZES["train"])):
        archive.read("train", [sample_id])


@each_way
@each_compression
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_samples_are_read_in_any_order_into_the_caller_s_memory(place, way, compression, dtype):
    archive = place(way, compression, dtype=dtype).open()
    for ids in ([21, 0, 8, 7, 15, 16], [3], list(range(22)), [5, 5, 5], []):
        archive.expect("train", ids)
        out = np.full((len(ids), *SHAPE), 77, dtype)
        assert archive.read("train", ids, out) is out
        assert out.tolist() == [frames_of(i, dtype).tolist() for i in ids]
    assert np.array_equal(archive.read("val", [4])[0], frames_of(4, dtype))
    assert archive.read("val", [0]).dtype == dtype


@each_way
@each_compression
def test_records_are_read_too(place, way, compression):
    archive = place(way, compression).open()
    for split, count in (("train", 22), ("val", 5)):
        assert [archive.read_meta(split, i) for i in range(count)] == [
            {"sample_id": i} for i in range(count)
        ]


@each_way
@each_compression
def test_what_is_not_there_is_refused(place, way, compression):
    archive = place(way, compression).open()
    for ids in ([22], [0, -1]):
        for ask in (archive.read, archive.expect):
            if way == "ranges" or ask == archive.read:
                with pytest.raises(ValueError, match=rf"samples 0\.\.21, not {ids[-1]}"):
                    ask("train", ids)
    with pytest.raises(ManifestError, match="no split 'test'"):
        archive.read("test", [0])


@pytest.mark.parametrize(
    "out",
    [
        np.empty((2, *SHAPE), np.uint16),
        np.empty((1, *SHAPE), np.uint8),
        np.empty((2, 3, 1, 5, 4), np.uint8),
        np.empty((4, *SHAPE), np.uint8)[::2],
    ],
)
def test_memory_that_cannot_be_filled_is_refused(place, out):
    with pytest.raises(ValueError, match=r"out must be C-contiguous uint8 of shape \(2, 3, 1, 4"):
        place("files", "none").open().read("train", [0, 1], out)


@each_compression
def test_a_proof_reads_both_kinds(place, compression):
    found = place("files", compression)
    assert verify_archive(found.url, show_progress=False) == []
    offset = found.shard(1).offsets[2]
    found.change(1, flipped(offset + 140))
    problems = [str(one) for one in verify_archive(found.url, show_progress=False)]
    assert "has sha256" in problems[0]
    assert f"shard-000001.tar, sample 2 at byte {offset}: crc32c is" in problems[1]


def test_an_archive_travels_with_its_cache(place):
    archive = pickle.loads(pickle.dumps(place("cache", "none").open()))
    assert np.array_equal(archive.read("train", [9])[0], frames_of(9))
    assert archive.cache.stats().objects_fetched == 1


# Damage


@in_place
@each_compression
def test_a_truncated_shard_is_named(place, way, compression):
    found = place(way, compression)
    cut = found.shard(1).offsets[3] + 5
    found.change(1, lambda data: data[:cut])
    message = rf"shard-000001\.tar, sample 0 at byte 512: .* it has {cut} bytes"
    with pytest.raises(ShardError, match=message):
        read_all(found.open())


@in_place
@each_compression
def test_a_shard_truncated_while_it_is_open_is_named(place, way, compression):
    found = place(way, compression)
    archive = found.open()
    archive.read("train", [8, 12])
    found.change(1, lambda data: data[:2000])
    with pytest.raises(ShardError, match=r"shard-000001\.tar, sample 4 at byte .* has 2000 bytes"):
        archive.read("train", [8, 12])


@in_place
@each_compression
@pytest.mark.parametrize("part", ["header", "frames"])
def test_an_altered_byte_is_named(place, way, compression, part):
    found = place(way, compression)
    offset = found.shard(2).offsets[5]
    byte = 20 if part == "header" else found.shard(2).sizes[5] - 30
    found.change(2, flipped(offset + byte))
    archive = found.open()
    with pytest.raises(ShardError, match=rf"sample 5 at byte {offset}: the bytes were altered"):
        archive.read("train", [16, 21, 17])
    assert np.array_equal(archive.read("train", [20])[0], frames_of(20))


@each_way
@each_compression
def test_a_missing_shard_is_named_and_may_come_back(place, way, compression):
    found = place(way, compression)
    path = shard_path("train", 0)
    data = storage.read_bytes(found.url, path)
    storage.delete(found.url, path)
    archive = found.open()
    with pytest.raises(ShardError, match=r"000\.tar, sample 2 at byte .*: the shard is missing"):
        archive.read("train", [2])
    storage.write_bytes(found.url, path, data)
    assert np.array_equal(archive.read("train", [2])[0], frames_of(2))


def test_a_missing_shard_is_named_also_from_a_worker(place):
    found = place("files", "none")
    storage.delete(found.url, shard_path("train", 0))
    loader = SequenceLoader(found.open(), "train", global_batch_size=4, num_workers=1)
    with pytest.raises(ShardError, match=r"000\.tar, sample 0 at byte 512: the shard is missing"):
        list(loader.one_pass())


@each_way
@each_compression
def test_a_wrong_shape_is_named(place, way, compression):
    found = place(way, compression, shape=(3, 1, 5, 4))
    message = r"sample 0 at byte 512: holds uint8 frames of shape \(3, 1, 4, 5\)"
    with pytest.raises(ShardError, match=message):
        found.open().read("train", [0])


@in_place
@each_compression
def test_what_is_no_npy_file_is_named(place, way, compression, monkeypatch):
    monkeypatch.setattr(webdataset, "encode_frames", lambda *_: b"frames")
    found = place(way, compression)
    kind = {"none": "npy array", "zstd": "zstd-compressed npy array"}[compression]
    with pytest.raises(ShardError, match=rf"sample 1 at byte .*: is no {kind}: "):
        found.open().read("train", [1])


@in_place
@each_compression
def test_npy_files_of_other_writers_are_read(place, way, compression, monkeypatch):
    """Not only those whose header is, byte for byte, what this project writes."""
    encode = webdataset.encode_frames

    def other(frames_TCHW: np.ndarray, compression: Compression, *rest: object) -> bytes:
        npy = io.BytesIO()
        np.lib.format.write_array(npy, np.asfortranarray(frames_TCHW), version=(2, 0))
        monkeypatch.setattr(
            webdataset.np, "save", lambda file, *_, **__: file.write(npy.getvalue())
        )
        return encode(frames_TCHW, compression, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(webdataset, "encode_frames", other)
        found = place(way, compression)
    archive = found.open()
    for _ in range(2):
        assert np.array_equal(archive.read("train", [3, 9])[1], frames_of(9))


def test_one_compressor_for_many_samples_gives_the_bytes_of_its_own_for_each():
    random, compressor = np.random.default_rng(0), webdataset.new_compressor()
    for number in range(200):
        side = int(random.integers(1, 60))
        frames = random.integers(0, 2 + number, (3, 1, side, side)).astype(np.uint8)
        frames[:, :, random.integers(side) :] = 0
        for again in range(2):  # what came just before is the best match there could be
            alone = webdataset.encode_frames(frames, "zstd")
            assert webdataset.encode_frames(frames, "zstd", compressor) == alone, (number, again)


def test_no_archive_is_no_archive(tmp_path):
    with pytest.raises(StorageError, match=r"not a finished archive: it has no manifest\.json"):
        open_archive(str(tmp_path / "nowhere"))
    manifest = Path(write_archive(str(tmp_path))) / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(ManifestError, match=rf"{manifest}: The manifest is not valid JSON"):
        open_archive(str(tmp_path))


# Files


def test_a_file_that_changed_is_checked_again(place, monkeypatch):
    """Uncompressed samples are checked once for each file, not once for each name."""
    monkeypatch.setattr(shard_files, "_MOST_OPEN_FILES", 1)
    found = place("files", "none")
    archive = found.open()
    for _ in range(2):
        archive.read("train", list(range(22)))
    found.change(0, flipped(found.shard(0).offsets[1] + 150))
    with pytest.raises(ShardError, match="sample 1 at byte .*: the bytes were altered"):
        archive.read("train", [0, 1])


def test_a_file_that_is_written_to_while_it_is_open_is_checked_again(place, monkeypatch):
    monkeypatch.setattr(shard_files, "_LOOK_SECONDS", 0.0)
    found = place("files", "none")
    archive = found.open()
    for _ in range(2):
        archive.read("train", list(range(22)))
    found.change(0, flipped(found.shard(0).offsets[1] + 150))
    archive.read("train", [0])  # after which it looks at its files
    with pytest.raises(ShardError, match="sample 1 at byte .*: the bytes were altered"):
        archive.read("train", [0, 1])


def test_files_that_cannot_be_mapped_are_read_all_the_same(place, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(tar_archive.mmap, "mmap", fails)
    archive = place("files", "none").open()
    for _ in range(3):
        assert np.array_equal(archive.read("train", [0, 9, 1])[2], frames_of(1))


@each_compression
def test_few_files_are_open_at_a_time(place, monkeypatch, compression):
    monkeypatch.setattr(shard_files, "_MOST_OPEN_FILES", 2)
    found = place("files", compression)
    archive = found.open()
    for sample_id in (0, 8, 16, 0, 21, 12, 3, 20):
        assert np.array_equal(archive.read("train", [sample_id])[0], frames_of(sample_id))
        archive.read("val", [0])
        assert 1 <= len(open_files(Path(found.url))) <= 2
    del archive
    assert not open_files(Path(found.url))


# Copies in a cache


@each_compression
@pytest.mark.parametrize("cut", [False, True], ids=["altered", "cut short"])
def test_a_damaged_copy_is_fetched_again(place, compression, cut):
    found = place("cache", compression)
    archive = found.open()
    archive.read("train", [0])
    data = found.copy_of(0).read_bytes()
    offset = found.shard(0).offsets[6]
    found.copy_of(0).write_bytes(data[:offset] if cut else flipped(offset + 150)(data))
    assert np.array_equal(archive.read("train", [6])[0], frames_of(6))
    assert found.copy_of(0).read_bytes() == data
    assert found.cache.stats().objects_fetched == 2


def test_a_damaged_record_of_a_copy_is_fetched_again(place):
    found = place("cache", "none")
    archive = found.open()
    archive.read_meta("train", 0)
    data = found.copy_of(0).read_bytes()
    found.copy_of(0).write_bytes(data.replace(b'"sample_id":6', b'"sample_id";6'))
    assert archive.read_meta("train", 6) == {"sample_id": 6}


@each_compression
def test_what_is_damaged_in_the_store_too_is_an_error(place, compression, monkeypatch):
    found = place("cache", compression)
    offset = found.shard(0).offsets[6]
    with pytest.raises(ShardError, match=r"shard-000000\.tar, sample 6 .* sha256"):
        found.change(0, flipped(offset + 150))
        found.open().read("train", [6])


def test_what_is_wrong_with_the_cache_is_not_blamed_on_the_archive(place, tmp_path):
    found = place("cache", "none")
    with pytest.raises(CacheLimitError, match=r"shard-000000\.tar"):
        open_archive(found.url, cache=NodeCache(tmp_path / "small", 1000)).read("train", [0])
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        open_archive(found.url, cache=NodeCache(tmp_path / "file", 2**20)).read("train", [0])


def test_copies_that_were_removed_are_closed(place):
    found = place("cache", "none")
    archive = found.open()
    archive.read("train", [0, 8])
    found.copy_of(0).unlink()
    found.copy_of(1).unlink()
    assert len(open_files(found.cache.folder)) == 2
    assert np.array_equal(archive.read("train", [9])[0], frames_of(9))  # still open, still right
    archive.read("train", [16])
    assert open_files(found.cache.folder) == {str(found.copy_of(2))}


@each_compression
def test_copies_in_use_are_marked_and_others_are_not(place, compression, monkeypatch):
    monkeypatch.setattr(shard_files, "_LOOK_SECONDS", 0.0)
    found = place("cache", compression)
    archive = found.open()
    archive.read("train", [0, 8])
    archive.read("train", [0])
    # The cache itself asks the disk at most once a second.
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 10)
    for number in (0, 1):
        os.utime(found.copy_of(number), (10**9, 10**9))
    archive.read("train", [0])
    assert found.copy_of(0).stat().st_mtime > 10**9
    assert found.copy_of(1).stat().st_mtime == 10**9


# Ranges


@each_compression
def test_hints_that_are_followed_are_asked_for_once(place, compression, requests):
    archive = place("ranges", compression).open()
    order = np.random.default_rng(0).permutation(22).tolist()
    archive.expect("train", order[:12])
    for start in range(0, 22, 4):
        archive.expect("train", order[start + 12 : start + 16])
        ids = order[start : start + 4]
        assert archive.read("train", ids).tolist() == [frames_of(i).tolist() for i in ids]
    sizes = sum(sum(shard.sizes) for shard in archive.manifest.shards("train"))
    asked = Counter()
    for path, offset, size in requests:
        asked.update((path, byte) for byte in range(offset, offset + size))
    assert sum(size for *_, size in requests) >= sizes
    assert max(asked.values()) <= 2  # read over on the way to a neighbour, at most


@each_compression
def test_hints_that_are_not_followed_do_no_harm(place, compression, requests):
    archive = place("ranges", compression).open()
    for _ in range(3):
        archive.expect("train", list(range(10)))
        archive.expect("val", [0, 1, 2])
        for sample_id in (21, 4, 3, 11):
            assert np.array_equal(archive.read("train", [sample_id])[0], frames_of(sample_id))
    assert np.array_equal(archive.read("val", [4])[0], frames_of(4))


def test_neighbours_come_in_one_request(place, requests):
    archive = place("ranges", "none").open()
    archive.read("train", list(range(16)))
    assert sorted(path for path, *_ in requests) == [shard_path("train", 0), shard_path("train", 1)]


def test_a_range_damaged_on_its_way_is_fetched_again(place, monkeypatch):
    found = place("ranges", "none")
    archive = found.open()
    read_range = storage.read_range
    answers = itertools.count()

    def damaged_once(url: str, path: str, offset: int, size: int) -> memoryview:
        data = bytearray(read_range(url, path, offset, size))
        data[-1] ^= next(answers) == 0
        return memoryview(bytes(data))

    monkeypatch.setattr(storage, "read_range", damaged_once)
    assert np.array_equal(archive.read("train", [7])[0], frames_of(7))
    assert next(answers) == 2


@each_compression
def test_a_store_that_often_refuses_gives_the_same_samples(tmp_path, compression, monkeypatch):
    pytest.importorskip("hadro")
    write_archive(str(tmp_path / "bucket/tiny"), compression)
    with s3_servers.hadro(tmp_path, error_rate=0.3, seed=5) as server:
        server.use(monkeypatch)
        archive = open_archive("s3://bucket/tiny")
        loader = SequenceLoader(archive, "train", global_batch_size=4)
        for batch in itertools.islice(loader.stream(0), 12):
            for sample_id, frames in zip(batch.sample_ids_B, batch.frames_BTCHW, strict=True):
                assert np.array_equal(frames.numpy(), frames_of(int(sample_id)))


def test_a_loader_of_a_store_in_memory_reads_in_this_process():
    url = write_archive("memory://loader")
    loader = SequenceLoader(open_archive(url), "train", global_batch_size=4)
    firsts = [batch.frames_BTCHW[0].numpy() for batch in loader.one_pass()]
    assert np.array_equal(firsts, [frames_of(i) for i in range(0, 22, 4)])
    with pytest.raises(ValueError, match="num_workers=0"):
        SequenceLoader(open_archive(url), "train", global_batch_size=4, num_workers=1)
