"""Real S3 servers on loopback: what is written comes back, through faults; errors have words."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
import torch

from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from data_prep.verify import verify_archive
from tests.s3_servers import S3Server, hadro, localbucket, moto
from tmu_dist.data import object_store, storage
from tmu_dist.data.loader import SequenceLoader, open_archive
from tmu_dist.data.storage import MissingObjectError, StorageError

DIGITS = MovingMNISTConfig(
    digits=2, train=40, val=4, test=4, frames=4, frame_size=16, digit_size=7, samples_per_shard=8
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables, no files of this machine; no stores of other tests."""
    for name in os.environ:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    object_store._open.cache_clear()


@pytest.fixture(scope="module")
def moto_server() -> Iterator[S3Server]:
    with moto() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def use_moto(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    moto_server.use(monkeypatch)


@pytest.mark.usefixtures("use_moto")
def test_objects_come_back_as_they_were() -> None:
    url = "s3://bucket/some/folder"
    storage.write_bytes(url, "a/text", b"hello world")
    storage.write_bytes(url, "a/empty", b"")
    assert storage.read_text(url, "a/text") == "hello world"
    assert bytes(storage.read_range(url, "a/text", 4, 3)) == b"o w"
    assert storage.read_ranges(url, "a/text", [6, 0], [5, 2]) == [b"world", b"he"]
    assert storage.object_size(url, "a/text") == 11
    assert list(storage.stream_bytes(url, "a/empty")) == []
    storage.write_bytes(url, "a/text", b"other")
    assert storage.list_objects(url, "a") == {"a/empty": 0, "a/text": 5}
    storage.delete_many(url, ["a/text", "a/empty"])
    assert storage.list_paths(url) == []
    assert not storage.exists(url, "a/text")


@pytest.mark.usefixtures("use_moto")
def test_large_objects_are_written_in_parts() -> None:
    data = random.Random(1).randbytes(20_000_000)
    storage.write_bytes("s3://bucket/large", "object", memoryview(data))
    tag = obstore.head(storage.open_store("s3://bucket/large"), "object")["e_tag"]
    assert str(tag).endswith('-4"'), "the number of parts stands in the tag"
    assert b"".join(storage.stream_bytes("s3://bucket/large", "object")) == data


@pytest.mark.usefixtures("use_moto")
def test_more_objects_than_one_page_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://bucket/many"
    paths = [f"{number:04d}" for number in range(1_010)]  # pages have 1,000
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda path: storage.write_bytes(url, path, b"x"), paths))
    assert storage.list_objects(url) == dict.fromkeys(paths, 1)
    storage.delete_many(url, paths[:5])
    assert storage.list_paths(url) == paths[5:]
    monkeypatch.setenv("AWS_DISABLE_BULK_DELETE", "false")
    object_store._open.cache_clear()
    storage.delete_many(url, paths[5:])
    assert storage.list_paths(url) == []


@pytest.mark.usefixtures("use_moto")
def test_a_missing_bucket_is_not_a_missing_object() -> None:
    url = "s3://nobody-has-this/x"
    for request in (
        lambda: storage.read_bytes(url, "f"),
        lambda: storage.write_bytes(url, "f", b"x"),
        lambda: storage.list_paths(url),
        lambda: open_archive(url),
    ):
        with pytest.raises(StorageError, match=r"s3://nobody.*NoSuchBucket.*Check the URL") as said:
            request()
        assert not isinstance(said.value, MissingObjectError)
    with pytest.raises(MissingObjectError, match="s3://bucket/f does not exist"):
        storage.read_bytes("s3://bucket", "f")


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the servers of files serve: one bucket."""
    folder = tmp_path_factory.mktemp("buckets")
    (folder / "bucket").mkdir()
    return folder


@pytest.fixture(scope="module")
def archive_in_bucket(buckets: Path) -> str:
    """An archive written to object storage."""
    with localbucket(buckets) as server, pytest.MonkeyPatch.context() as monkeypatch:
        server.use(monkeypatch)
        write_moving_mnist(DIGITS, "s3://bucket/digits", workers=1, show_progress=False)
    return "s3://bucket/digits"


def epoch(url: str) -> list[tuple[list[int], torch.Tensor]]:
    """Ids and frames of every step of a shuffled epoch."""
    loader = SequenceLoader(open_archive(url), "train", global_batch_size=4, seed=5)
    batches = itertools.islice(loader.stream(0), loader.steps_per_epoch)
    return [(batch.sample_ids_B.tolist(), batch.frames_BTCHW) for batch in batches]


def assert_equal(
    found: list[tuple[list[int], torch.Tensor]], expected: list[tuple[list[int], torch.Tensor]]
) -> None:
    for (found_ids, found_frames), (ids, frames) in zip(found, expected, strict=True):
        assert found_ids == ids
        assert torch.equal(found_frames, frames)


def test_an_archive_in_object_storage(
    archive_in_bucket: str, buckets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same objects, proven whole, and the same epoch as from a local disk."""
    local = str(tmp_path / "digits")
    write_moving_mnist(DIGITS, local, workers=1, show_progress=False)
    with localbucket(buckets) as server:
        server.use(monkeypatch)
        assert storage.list_objects(archive_in_bucket) == storage.list_objects(local)
        assert verify_archive(archive_in_bucket, show_progress=False) == []
        assert_equal(epoch(archive_in_bucket), epoch(local))


def test_a_store_that_refuses_a_third_of_all_requests(
    archive_in_bucket: str, buckets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same samples in the same order; every byte of many small ranges."""
    data = random.Random(2).randbytes(500_000)
    (buckets / "bucket" / "object").write_bytes(data)
    draws = random.Random(3)
    offsets = [draws.randrange(len(data) - 1000) for _ in range(300)]
    expected = epoch(str(buckets / "bucket" / "digits"))
    with hadro(buckets, error_rate=0.3, seed=4) as server:
        server.use(monkeypatch)
        assert_equal(epoch(archive_in_bucket), expected)
        with ThreadPoolExecutor(8) as threads:
            found = threads.map(
                lambda at: storage.read_range("s3://bucket", "object", at, 1000), offsets
            )
            assert all(part == data[at : at + 1000] for at, part in zip(offsets, found))
        assert b"".join(storage.stream_bytes("s3://bucket", "object")) == data
