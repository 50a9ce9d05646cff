"""Several archives in one stream, reading processes that stay, and hints of what comes next."""

import dataclasses
import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tmu_dist.data.archive import Archive
from tmu_dist.data.cache import NodeCache
from tmu_dist.data.loader import Batch, SequenceLoader, open_archive, open_archives
from tmu_dist.data.manifest import Manifest, Units
from tmu_dist.data.reading import Request, with_lookahead

SHAPE = (2, 1, 3, 4)
UNITS = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)


def write_archive(url: str, first_code: int, sizes: list[int], **facts) -> str:
    """Write an archive whose training samples are full of first_code, first_code + 1, ..."""
    shards, number = [], 0
    for shard, size in enumerate(sizes):
        samples = [
            Sample(f"train-{i:08d}", np.full(SHAPE, first_code + i, np.uint8), {"sample_id": i})
            for i in range(number, number + size)
        ]
        shards.append(write_shard(url, shard_path("train", shard), samples))
        number += size
    manifest = Manifest(
        **{
            "name": "tiny",
            "num_frames": SHAPE[0],
            "channels": SHAPE[1],
            "height": SHAPE[2],
            "width": SHAPE[3],
            "units": UNITS,
            "frame_interval_minutes": 5.0,
            "splits": {"train": tuple(shards)},
            "created_by": {"first_code": first_code},
        }
        | facts
    )
    write_manifest(url, manifest)
    return url


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> list[str]:
    """Twelve samples of codes 0 to 11, and eight of codes 100 to 107."""
    folder = tmp_path_factory.mktemp("archives")
    return [
        write_archive(str(folder / "a"), 0, [5, 4, 3]),
        write_archive(str(folder / "b"), 100, [4, 4]),
    ]


def mixed_loader(urls: list[str], **options) -> SequenceLoader:
    archives = [open_archive(url) for url in urls]
    return SequenceLoader(archives, "train", **({"global_batch_size": 4} | options))


def take(batches, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def codes_of(batches: list[Batch]) -> list[int]:
    """The code that fills each real sample, in order; checks that ids name the same samples."""
    codes = []
    for batch in batches:
        for frames, sample_id, weight in zip(
            batch.frames_BTCHW, batch.sample_ids_B.tolist(), batch.weights_B, strict=True
        ):
            (code,) = frames.unique().tolist()
            assert code == (sample_id if sample_id < 12 else 100 + sample_id - 12)
            codes += [code] * int(weight)
    return codes


def test_without_weights_an_epoch_has_every_sample_of_all_archives_once(urls):
    loader = mixed_loader(urls)
    assert (loader.num_samples, loader.steps_per_epoch) == (20, 5)
    stream = loader.stream(0)
    for _ in range(2):
        codes = codes_of(take(stream, 5))
        assert sorted(codes) == [*range(12), *range(100, 108)]
        assert {code < 100 for code in codes[:8]} == {True, False}, "they are mixed"


def test_weights_are_shares_of_every_epoch(urls):
    loader = mixed_loader(urls, mix_weights=(1, 3), global_batch_size=1)
    codes = codes_of(take(loader.stream(0), 80))
    for start in range(0, 80, 20):
        assert sum(code >= 100 for code in codes[start : start + 20]) == 15
    of_b = [code for code in codes if code >= 100]
    for start in range(0, 48, 8):  # passes of its own: each sample once before any comes again
        assert sorted(of_b[start : start + 8]) == list(range(100, 108))


@pytest.mark.parametrize("mix_weights", [(), (1, 3)])
def test_a_mixture_is_elastic_and_resumes_anywhere(urls, mix_weights):
    whole = take(mixed_loader(urls, mix_weights=mix_weights, global_batch_size=4).stream(0), 12)
    done = 7
    streams = [
        mixed_loader(urls, mix_weights=mix_weights, rank=rank, world_size=2).stream(
            whole[done - 1].consumed
        )
        for rank in range(2)
    ]
    for expected in whole[done:]:
        parts = [next(stream) for stream in streams]
        ids = torch.cat([part.sample_ids_B for part in parts])
        assert ids.tolist() == expected.sample_ids_B.tolist()
        frames = torch.cat([part.frames_BTCHW for part in parts])
        assert torch.equal(frames, expected.frames_BTCHW)


def test_a_fraction_is_of_the_first_archive_alone(urls):
    loader = mixed_loader(urls, fraction=0.25)
    codes = codes_of(take(loader.stream(0), loader.steps_per_epoch))
    assert len(codes) == 11
    assert [code for code in sorted(codes) if code >= 100] == list(range(100, 108))


def test_a_mixture_is_part_of_the_state(urls):
    saved = mixed_loader(urls, mix_weights=(1, 3)).state()
    mixed_loader(urls, mix_weights=(1, 3)).check_state(saved)
    with pytest.raises(ValueError, match=r"mix_weights was \[1, 3\] and is \[1, 2\]"):
        mixed_loader(urls, mix_weights=(1, 2)).check_state(saved)
    with pytest.raises(ValueError, match="manifest_hashes was"):
        mixed_loader(urls[::-1], mix_weights=(1, 3)).check_state(saved)
    with pytest.raises(ValueError, match="shuffle_lanes was 16 and is 4"):
        mixed_loader(urls, mix_weights=(1, 3), shuffle_lanes=4).check_state(saved)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"frame_interval_minutes": 10.0}, "frame interval in minutes is 10.0, not 5.0"),
        ({"units": dataclasses.replace(UNITS, unit="dBZ")}, "its units is Units"),
    ],
)
def test_archives_of_other_frames_are_refused(urls, tmp_path, facts, message):
    other = write_archive(str(tmp_path), 0, [3], **facts)
    with pytest.raises(ValueError, match=f"cannot be mixed with .*{message}"):
        mixed_loader([urls[0], other])


def test_reading_processes_stay_from_pass_to_pass(urls):
    loader = mixed_loader(urls, num_workers=2)
    expected = mixed_loader(urls)
    first = take(loader.stream(8), 3)  # left in the middle
    assert codes_of(first) == codes_of(take(expected.stream(8), 3))
    processes = {child.pid for child in torch.multiprocessing.active_children()}
    for _ in range(2):
        assert codes_of(list(loader.one_pass())) == codes_of(list(expected.one_pass()))
    assert codes_of(take(loader.stream(0), 9)) == codes_of(take(expected.stream(0), 9))
    assert {child.pid for child in torch.multiprocessing.active_children()} == processes
    assert len(processes) >= 2 and os.getpid() not in processes


@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_is_used_again_only_when_nobody_holds_it(urls, num_workers):
    stream = mixed_loader(urls, num_workers=num_workers).stream(0)
    kept = [next(stream).frames_BTCHW[:, :, :, 1] for _ in range(10)]  # views, not the batches
    copies = [frames.clone() for frames in kept]
    places = set()
    for _ in range(20):
        places.add(next(stream).frames_BTCHW.data_ptr())
    assert all(torch.equal(frames, copy) for frames, copy in zip(kept, copies, strict=True))
    assert len(places) <= 4


def test_reading_processes_end_with_their_loader(urls):
    before = {child.pid for child in torch.multiprocessing.active_children()}
    loader = mixed_loader(urls, num_workers=2)
    stream = loader.stream(0)
    next(stream)
    started = time.monotonic()
    del stream, loader  # without the garbage collector's help
    assert {child.pid for child in torch.multiprocessing.active_children()} <= before
    assert time.monotonic() - started < 4, "a process that is not told is waited for for 5 s"


def test_every_sample_is_announced_once_and_before_it_is_asked_for():
    requests = [
        Request([10 * n, 10 * n + 1], np.ones(2, np.float32), 2, 2 * n + 2) for n in range(1000)
    ]
    for num_readers in (1, 2, 3):
        announced: list[list[int]] = [[] for _ in range(num_readers)]
        asked: list[list[int]] = [[] for _ in range(num_readers)]
        most = 0
        told = list(with_lookahead(iter(requests), num_readers))
        assert [request.ids for request in told] == [request.ids for request in requests]
        for number, request in enumerate(told):
            reader = number % num_readers
            announced[reader] += request.soon
            asked[reader] += request.ids
            assert announced[reader][: len(asked[reader])] == asked[reader]
            most = max(most, len(announced[reader]) - len(asked[reader]))
        assert announced == asked
        assert 500 <= most <= 520, "enough for requests that take long"


class _Recording(Archive):
    """Writes down the hints that it gets."""

    hints: list[int]

    def expect(self, split: str, sample_ids) -> None:
        self.hints += sample_ids


def test_hints_are_given_for_remote_archives_only(urls):
    def hints_of(url: str, manifest: Manifest) -> list[int]:
        archive = _Recording(url, manifest)
        archive.hints = []
        archive.read = lambda split, ids, out: out  # type: ignore[assignment]
        list(SequenceLoader(archive, "train", global_batch_size=4).one_pass())
        return archive.hints

    manifest = open_archive(urls[0]).manifest
    assert hints_of("memory://hints", manifest) == list(range(12))
    assert hints_of(urls[0], manifest) == []


def test_archives_are_opened_as_the_settings_say(urls, tmp_path):
    in_place, copied = (
        open_archives(urls, reading=reading, cache_folder=str(tmp_path), cache_gib=1)
        for reading in ("auto", "cache")
    )
    assert all(archive.cache is None for archive in in_place)
    assert all(isinstance(archive.cache, NodeCache) for archive in copied)
    loader = SequenceLoader(copied, "train", global_batch_size=4)
    assert codes_of(take(loader.stream(0), 5)) == codes_of(take(mixed_loader(urls).stream(0), 5))
    assert sum(path.stat().st_size for path in Path(tmp_path).rglob("*") if path.is_file()) > 20_000
    with pytest.raises(ValueError, match=r"is a local folder, .* data\.reading=range"):
        open_archives(urls, reading="range")


def test_a_cache_that_cannot_hold_what_is_in_use_is_refused(urls, tmp_path):
    archives = open_archives(urls, reading="cache", cache_folder=str(tmp_path), cache_gib=1e-5)
    with pytest.raises(ValueError, match=r"data\.cache_gib"):
        SequenceLoader(archives, "train", global_batch_size=4)
