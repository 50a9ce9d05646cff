"""Fetching ahead: in order, at the pace of training, and never a reason for a run to fail."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmu_dist.data import prefetch
from tmu_dist.data.cache import NodeCache
from tmu_dist.data.prefetch import PrefetchStats, ShardPrefetcher, Use, working_set


class FakeCache:
    """Remembers what it was asked for; fetches take as long as a test likes."""

    def __init__(self) -> None:
        self.fetched: list[Hashable] = []
        self.kept: Counter[Hashable] = Counter()
        self.released: list[Hashable] = []
        self.removed: set[Hashable] = set()
        self.broken: set[Hashable] = set()
        self.at_a_time = 0
        self.most_at_a_time = 0
        self.open = threading.Event()
        self.open.set()
        self._lock = threading.Lock()

    def fetch(self, key: Hashable) -> bool:
        with self._lock:
            is_new = key not in self.fetched
            self.fetched.append(key)
            self.at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
        self.open.wait(10)
        with self._lock:
            self.at_a_time -= 1
        if key in self.broken:
            raise OSError(f"no {key}")
        return is_new

    def keep(self, key: Hashable) -> bool:
        self.kept[key] += 1
        return key not in self.removed


@pytest.fixture
def cache() -> FakeCache:
    return FakeCache()


@pytest.fixture
def begin(cache: FakeCache) -> Iterator[Callable[..., ShardPrefetcher]]:
    begun: list[ShardPrefetcher] = []

    def begin_one(uses: Iterable[Use], ahead_bytes: int, threads: int = 1) -> ShardPrefetcher:
        begun.append(
            ShardPrefetcher(
                cache.fetch,
                cache.keep,
                cache.released.append,
                iter(uses),
                ahead_bytes=ahead_bytes,
                threads=threads,
            )
        )
        return begun[-1]

    yield begin_one
    cache.open.set()
    for one in begun:
        one.close()
    assert settles(num_threads, 0)


Begin = Callable[..., ShardPrefetcher]


def shards(num_bytes: int = 10, samples: int = 100) -> Iterator[Use]:
    """Endlessly, shard after shard: keys 0, 1, ..., each used by 100 samples."""
    for key in itertools.count():
        yield Use(key, num_bytes, key * samples, (key + 1) * samples - 1)


def settles(found: Callable[[], object], expected: object) -> bool:
    """Whether background threads make something what it should be, and then no more of it."""
    deadline = time.monotonic() + 4  # less than what is done every five seconds
    while found() != expected and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.03)
    assert found() == expected
    return True


def num_threads() -> int:
    return sum(thread.name == "shard-prefetch" for thread in threading.enumerate())


def test_so_far_ahead_and_no_further(cache: FakeCache, begin: Begin) -> None:
    """Shard 0 is in use from the start, so it is not ahead; 30 bytes are three shards."""
    prefetcher = begin(shards(), ahead_bytes=30)
    assert settles(lambda: cache.fetched, [0, 1, 2, 3])
    prefetcher.advance(99)
    assert settles(lambda: cache.fetched, [0, 1, 2, 3])
    prefetcher.advance(100)
    assert settles(lambda: cache.fetched, [0, 1, 2, 3, 4])
    prefetcher.advance(399)
    assert settles(lambda: cache.fetched, [0, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("ahead_bytes", [0, 9])
def test_one_object_in_any_case(cache: FakeCache, begin: Begin, ahead_bytes: int) -> None:
    prefetcher = begin(shards(num_bytes=10), ahead_bytes=ahead_bytes)
    assert settles(lambda: cache.fetched, [0, 1])
    prefetcher.advance(100)
    assert settles(lambda: cache.fetched, [0, 1, 2])


def test_what_is_under_way_counts(cache: FakeCache, begin: Begin) -> None:
    cache.open.clear()
    begin(shards(), ahead_bytes=50, threads=3)
    assert settles(lambda: sorted(cache.fetched), [0, 1, 2])
    cache.open.set()
    assert settles(lambda: sorted(cache.fetched), [0, 1, 2, 3, 4, 5])
    assert cache.most_at_a_time == 3


def test_uses_are_pulled_as_needed_and_in_the_background(cache: FakeCache, begin: Begin) -> None:
    pulled: list[tuple[int, str]] = []

    def slow_uses() -> Iterator[Use]:
        for use in shards():
            time.sleep(0.02)
            pulled.append((use.first, threading.current_thread().name))
            yield use

    begin(slow_uses(), ahead_bytes=20)
    assert not pulled, "making the prefetcher does not wait for them"
    assert settles(lambda: len(cache.fetched), 3)
    assert [first for first, _ in pulled] == [0, 100, 200, 300], "one is known that must wait"
    assert {name for _, name in pulled} == {"shard-prefetch"}


def test_what_training_has_passed_is_not_fetched(cache: FakeCache, begin: Begin) -> None:
    prefetcher = begin(shards(), ahead_bytes=20)
    assert settles(lambda: cache.fetched, [0, 1, 2])
    prefetcher.advance(1050)
    assert settles(lambda: cache.fetched, [0, 1, 2, 10, 11, 12])


def test_an_object_comes_again_in_the_next_epoch(cache: FakeCache, begin: Begin) -> None:
    uses = [Use(number % 3, 10, number * 100, number * 100 + 99) for number in range(6)]
    prefetcher = begin(uses, ahead_bytes=20)
    assert settles(lambda: cache.fetched, [0, 1, 2])
    prefetcher.advance(300)
    assert settles(lambda: cache.fetched, [0, 1, 2, 0, 1, 2])
    assert prefetcher.stats() == PrefetchStats(
        objects_fetched=3, bytes_fetched=30, hits=3, failures=0, lost=0
    )


def test_a_failure_is_told_once_and_left_to_the_reader(
    cache: FakeCache, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    cache.broken = {1, 2}
    prefetcher = begin(shards(), ahead_bytes=40)
    assert settles(lambda: cache.fetched, [0, 1, 2, 3, 4])
    prefetcher.advance(100)
    assert settles(lambda: cache.fetched, [0, 1, 2, 3, 4, 5]), "none of them twice"
    assert prefetcher.stats() == PrefetchStats(4, 40, 0, failures=2, lost=0)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        "Could not fetch 1 ahead of its use: no 1"
    ]


def test_an_order_that_breaks_is_told(
    cache: FakeCache, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_uses() -> Iterator[Use]:
        yield Use("a", 1, 0, 9)
        raise RuntimeError("no more shards")

    prefetcher = begin(broken_uses(), ahead_bytes=10)
    assert settles(lambda: cache.fetched, ["a"])
    prefetcher.advance(5)
    assert settles(lambda: "no longer fetched ahead" in caplog.text, True)
    assert "no more shards" in caplog.text


@pytest.fixture
def keeping_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_KEEP_SECONDS", 0.01)


@pytest.mark.usefixtures("keeping_often")
def test_what_is_needed_is_kept(cache: FakeCache, begin: Begin) -> None:
    """Until its last use, and without the position moving."""
    prefetcher = begin(shards(), ahead_bytes=20)
    assert settles(lambda: set(cache.kept), {0, 1, 2})
    prefetcher.advance(199)
    assert settles(lambda: cache.fetched, [0, 1, 2, 3])
    cache.kept.clear()
    assert settles(lambda: set(cache.kept), {1, 2, 3})


def test_what_is_used_up_is_released(cache: FakeCache, begin: Begin) -> None:
    """Also out of order, and before anything is fetched in its place."""
    uses = [Use("long", 10, 0, 250), *(Use(n, 10, n * 100, n * 100 + 99) for n in range(4))]
    prefetcher = begin(uses, ahead_bytes=10)
    assert settles(lambda: cache.fetched, ["long", 0, 1])
    prefetcher.advance(99)
    assert settles(lambda: cache.released, [])
    prefetcher.advance(100)
    assert settles(lambda: (cache.released, cache.fetched), ([0], ["long", 0, 1, 2]))
    prefetcher.advance(251)
    assert settles(lambda: cache.released, [0, 1, "long"])
    prefetcher.advance(400)
    assert settles(lambda: cache.released, [0, 1, "long", 2, 3])


def test_what_the_next_epoch_needs_is_not_released(cache: FakeCache, begin: Begin) -> None:
    uses = [Use("a", 10, 0, 99), Use("b", 10, 50, 99), Use("a", 10, 100, 199)]
    prefetcher = begin(uses, ahead_bytes=20)
    assert settles(lambda: cache.fetched, ["a", "b", "a"])
    prefetcher.advance(100)
    assert settles(lambda: cache.released, ["b"])
    prefetcher.advance(200)
    assert settles(lambda: cache.released, ["b", "a"])


def test_what_comes_too_late_is_released(cache: FakeCache, begin: Begin) -> None:
    cache.open.clear()
    prefetcher = begin(shards(), ahead_bytes=10)
    assert settles(lambda: cache.fetched, [0])
    prefetcher.advance(100)
    assert settles(lambda: cache.released, [])
    cache.open.set()
    assert settles(lambda: (cache.fetched, cache.released), ([0, 1, 2], [0]))


def test_a_cache_just_large_enough_loses_nothing(tmp_path: Path) -> None:
    """One shard is in use all the time, many others briefly; there is room for one ahead."""
    archive = tmp_path / "archive"
    archive.mkdir()
    uses, sha256s = [], {}
    for number in range(16):
        data = bytes([number]) * 1000
        (archive / str(number)).write_bytes(data)
        sha256s[number] = hashlib.sha256(data).hexdigest()
        first, last = (0, 150) if number == 0 else (number * 10 - 9, number * 10)
        uses.append(Use(number, 1000, first, last))
    node_cache = NodeCache(tmp_path / "cache", 3000)

    prefetcher = ShardPrefetcher(
        lambda key: node_cache.fetch(str(archive), str(key), 1000, sha256s[key]),
        lambda key: node_cache.keep(sha256s[key]),
        lambda key: node_cache.release(sha256s[key]),
        iter(uses),
        ahead_bytes=1000,
    )
    for position in range(150):
        prefetcher.advance(position)
        ahead = min(15, (position + 9) // 10 + 1)
        deadline = time.monotonic() + 10
        while prefetcher.stats().objects_fetched <= ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        assert (node_cache.folder / sha256s[0]).exists(), position
    prefetcher.close()
    assert prefetcher.stats() == PrefetchStats(16, 16_000, hits=0, failures=0, lost=0)


@pytest.mark.usefixtures("keeping_often")
def test_a_cache_that_loses_what_is_needed(
    cache: FakeCache, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    prefetcher = begin(shards(), ahead_bytes=20)
    assert settles(lambda: cache.fetched, [0, 1, 2])
    cache.removed = {1, 2}
    assert settles(lambda: prefetcher.stats().lost, 2)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    for named in ("too small", "data.cache_gib", "data.shuffle_lanes", "data.shuffle_window"):
        assert named in caplog.text


@pytest.mark.usefixtures("keeping_often")
def test_a_single_loss_of_many_is_no_warning(
    cache: FakeCache, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    prefetcher = begin(shards(), ahead_bytes=200)
    assert settles(lambda: len(cache.fetched), 21)
    cache.removed = {7}
    assert settles(lambda: prefetcher.stats().lost, 1)
    assert not caplog.records


@pytest.mark.usefixtures("keeping_often")
def test_an_end_of_the_uses_is_not_the_end_of_keeping(cache: FakeCache, begin: Begin) -> None:
    begin([Use("a", 1, 0, 9)], ahead_bytes=10)
    assert settles(lambda: cache.fetched, ["a"])
    cache.kept.clear()
    assert settles(lambda: set(cache.kept), {"a"})


def test_closing_ends_the_threads(cache: FakeCache, begin: Begin) -> None:
    prefetcher = begin(shards(), ahead_bytes=10, threads=3)
    assert settles(lambda: sorted(cache.fetched), [0, 1])
    assert num_threads() == 4
    prefetcher.close()
    assert settles(num_threads, 0)


def test_closing_leaves_a_download_to_itself(cache: FakeCache, begin: Begin) -> None:
    cache.open.clear()
    prefetcher = begin(shards(), ahead_bytes=100, threads=2)
    assert settles(lambda: sorted(cache.fetched), [0, 1])
    started = time.perf_counter()
    prefetcher.close()
    assert time.perf_counter() - started < 0.1
    assert settles(num_threads, 2), "those that fetch"
    cache.open.set()
    assert settles(num_threads, 0)
    assert sorted(cache.fetched) == [0, 1], "nothing new is begun"


def test_advancing_is_cheap(begin: Begin) -> None:
    """A tenth of a microsecond was measured; far more would cost training."""
    prefetcher = begin(shards(), ahead_bytes=100)

    def seconds_each() -> float:
        started = time.perf_counter()
        for _ in range(10_000):
            prefetcher.advance(0)
        return (time.perf_counter() - started) / 10_000

    assert min(seconds_each() for _ in range(5)) < 2e-6


def test_arguments_out_of_range(begin: Begin) -> None:
    for ahead_bytes, threads in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"ahead_bytes={ahead_bytes}, threads={threads}"):
            begin(shards(), ahead_bytes=ahead_bytes, threads=threads)


# The working set


@given(
    st.lists(
        st.tuples(st.integers(0, 2**40), st.integers(0, 30), st.integers(0, 30)).map(
            lambda use: (use[0], min(use[1:]), max(use[1:]))
        ),
        max_size=12,
    )
)
def test_working_set_is_what_counting_at_every_position_gives(
    uses: list[tuple[int, int, int]],
) -> None:
    at = [sum(size for size, first, last in uses if first <= p <= last) for p in range(31)]
    sizes, firsts, lasts = np.array(uses, np.int64).reshape(-1, 3).T
    assert working_set(sizes, firsts, lasts) == max(at)


def test_working_set_of_a_million_uses() -> None:
    """Lanes of shards one after the other: as many in use as there are lanes."""
    per_lane = np.arange(62_500) * 100
    first = np.concatenate([per_lane + lane for lane in range(16)])
    assert working_set(np.full(first.size, 7), first, first + 99) == 16 * 7
    assert working_set(np.full(first.size, 7), first, first + 100) == 17 * 7
