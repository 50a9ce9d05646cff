"""Ranges: together, ahead of time, within bounds, and in spite of failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tmu_dist.data import ranges, storage
from tmu_dist.data.ranges import Range, RangeFetcher, WrongSizeError

SIZE = 100_000
CONTENT = bytes(i * i % 251 for i in range(40 * SIZE))


@pytest.fixture
def url(tmp_path) -> str:
    """A store with two objects in it."""
    url = f"memory://{tmp_path}"
    for path in ("a", "b"):
        storage.write_bytes(url, path, path.encode() + CONTENT[1:])
    return url


def piece(number: int, path: str = "a") -> Range:
    """One of 20 ranges that are too far from each other for one request."""
    return Range(path, len(CONTENT), 2 * SIZE * number, SIZE)


def content(one: Range) -> bytes:
    return (one.path.encode() + CONTENT[1:])[one.offset : one.offset + one.size]


class Store:
    """What is asked of the storage, and what it does then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Range] = []
        self.looked_up: list[str] = []
        self.before: Callable[[], None] = lambda: None
        read_range, object_size = storage.read_range, storage.object_size

        def recorded_range(url: str, path: str, offset: int, size: int) -> memoryview:
            self.asked.append(Range(path, len(CONTENT), offset, size))
            self.before()
            return read_range(url, path, offset, size)

        def recorded_size(url: str, path: str) -> int:
            self.looked_up.append(path)
            self.before()
            return object_size(url, path)

        monkeypatch.setattr(storage, "read_range", recorded_range)
        monkeypatch.setattr(storage, "object_size", recorded_size)

    def wait_for(self, count: int) -> None:
        """Wait for so many requests, and see that no more come."""
        deadline = time.monotonic() + 20
        while len(self.asked) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(self.asked) == count


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


def taken(fetcher: RangeFetcher, wanted: list[Range], queue: str = "train") -> None:
    """Take ranges and compare their bytes."""
    assert [bytes(data) for data in fetcher.take(queue, wanted)] == [content(o) for o in wanted]


def test_what_was_not_expected_is_fetched_all_at_once(url, store):
    together = threading.Barrier(9)  # eight ranges, and the size of their object
    store.before = lambda: together.wait(20) and None
    taken(RangeFetcher(url), [piece(number) for number in range(8)])


def test_the_size_of_an_object_is_looked_up_once(url, store):
    fetcher = RangeFetcher(url)
    fetcher.expect("train", [piece(0), piece(1, "b"), piece(2)])
    taken(fetcher, [piece(0), piece(1, "b"), piece(2), piece(3, "b")])
    assert sorted(store.looked_up) == ["a", "b"]


def test_what_is_expected_is_fetched_before_it_is_taken_and_once(url, store):
    fetcher = RangeFetcher(url)
    pieces = [piece(number) for number in range(12)]
    fetcher.expect("train", pieces)
    store.wait_for(12)
    for start in range(0, 12, 4):
        taken(fetcher, pieces[start : start + 4])
    assert sorted(store.asked) == pieces


def test_what_waits_to_be_taken_is_bounded_and_comes_in_order(url, store):
    fetcher = RangeFetcher(url, ahead_bytes=3 * SIZE)
    pieces = [piece(number) for number in (5, 2, 9, 0, 7, 1, 3)]
    for one in pieces:
        fetcher.expect("train", [one])
    store.wait_for(3)
    taken(fetcher, pieces[:2])
    store.wait_for(5)
    taken(fetcher, pieces[2:])  # two of them were not even begun
    assert sorted(store.asked) == sorted(pieces)


def test_what_is_needed_first_is_asked_for_first(url, store, monkeypatch):
    one_thread = ranges._Threads(1)
    monkeypatch.setattr(ranges, "_threads", lambda: one_thread)
    pieces = [piece(number) for number in (5, 2, 9, 0)]
    RangeFetcher(url).expect("train", pieces)
    store.wait_for(4)
    assert store.asked == pieces


def test_what_is_passed_over_is_forgotten_and_makes_room(url, store):
    fetcher = RangeFetcher(url, ahead_bytes=3 * SIZE)
    old = [piece(number) for number in range(6)]
    fetcher.expect("train", old)
    store.wait_for(3)
    new = [piece(number, "b") for number in range(5)]
    fetcher.expect("train", new)  # behind what nobody will take
    taken(fetcher, new[:1])
    store.wait_for(7)  # one now, three ahead
    taken(fetcher, new[1:])
    taken(fetcher, old)


def test_what_is_forgotten_before_it_was_begun_is_not_fetched(url, store, monkeypatch):
    one_thread, go_on = ranges._Threads(1), threading.Event()
    monkeypatch.setattr(ranges, "_threads", lambda: one_thread)
    store.before = lambda: go_on.wait(20) and None
    fetcher = RangeFetcher(url)
    fetcher.expect("train", [piece(number) for number in range(5)])
    answers = fetcher.take("train", [piece(4)])
    go_on.set()
    assert next(answers) == content(piece(4))
    assert store.asked == [piece(4)]


def test_hints_without_end_do_not_take_memory_without_end(url, store, monkeypatch):
    monkeypatch.setattr(ranges, "_MOST_WAITING", 4)
    fetcher = RangeFetcher(url, ahead_bytes=SIZE)
    fetcher.expect("train", [piece(number) for number in range(20)])
    store.wait_for(1)
    assert store.asked == [piece(16)]  # the first of the four that still wait
    fetcher.expect("train", [piece(number, "b") for number in range(4)])
    store.wait_for(2)
    assert store.asked[1] == piece(0, "b")
    taken(fetcher, [piece(number) for number in range(20)])


def test_one_range_is_ahead_however_large_it_is(url, store):
    fetcher = RangeFetcher(url, ahead_bytes=SIZE // 2)
    fetcher.expect("train", [piece(0), piece(1)])
    store.wait_for(1)
    taken(fetcher, [piece(0), piece(1)])


def test_queues_do_not_disturb_each_other(url, store):
    fetcher = RangeFetcher(url, ahead_bytes=2 * SIZE)
    fetcher.expect("train", [piece(0), piece(1)])
    fetcher.expect("val", [piece(2), piece(3)])
    store.wait_for(4)
    taken(fetcher, [piece(2), piece(3)], "val")
    taken(fetcher, [piece(0), piece(1)], "train")
    assert len(store.asked) == 4


def test_a_range_may_be_expected_and_taken_twice(url, store):
    fetcher = RangeFetcher(url)
    fetcher.expect("train", [piece(0), piece(1), piece(0)])
    fetcher.expect("train", [piece(0)])
    taken(fetcher, [piece(0), piece(0)])
    taken(fetcher, [piece(1)])
    taken(fetcher, [piece(0)])
    assert len(store.asked) == 3


def test_near_ranges_are_one_request_up_to_a_size(url, store):
    ranges_of = [Range("a", len(CONTENT), offset, 400_000) for offset in (0, 450_000, 900_000)]
    far = Range("a", len(CONTENT), 2_000_000, 10)
    taken(RangeFetcher(url), [ranges_of[2], far, ranges_of[0], ranges_of[1]])
    assert [(one.offset, one.size) for one in sorted(store.asked)] == [
        (0, 850_000),
        (900_000, 400_000),
        (2_000_000, 10),
    ]


def failing(times: int) -> Callable[[], None]:
    """What makes the first requests fail."""
    left = iter(range(times))

    def fail() -> None:
        if next(left, None) is not None:
            raise storage.StorageError("the store is busy")

    return fail


def test_what_failed_ahead_of_time_is_asked_for_again(url, store):
    fetcher = RangeFetcher(url)
    store.before = failing(5)  # the size, and four ranges
    fetcher.expect("train", [piece(number) for number in range(6)])
    store.wait_for(6)
    taken(fetcher, [piece(number) for number in range(6)])


def test_an_error_is_one_range_s_and_does_not_last(url, store):
    fetcher = RangeFetcher(url)
    taken(fetcher, [piece(0)])
    store.before = failing(2)  # at first, and when it is taken
    answers = fetcher.take("train", [piece(1)])
    with pytest.raises(storage.StorageError, match="is busy"):
        next(answers)
    taken(fetcher, [piece(1)])
    answers = fetcher.take("train", [piece(2), piece(3, "c"), piece(4)])
    assert next(answers) == content(piece(2))
    with pytest.raises(storage.MissingObjectError, match="/c does not exist"):
        next(answers)
    assert next(answers) == content(piece(4))


def test_an_object_of_another_size_is_refused_until_it_is_right(url):
    fetcher = RangeFetcher(url)
    storage.write_bytes(url, "c", b"short")
    with pytest.raises(WrongSizeError, match="c has 5 bytes"):
        next(fetcher.take("train", [piece(0, "c")]))
    storage.write_bytes(url, "c", b"c" + CONTENT[1:])
    taken(fetcher, [piece(0, "c")])


def test_an_object_that_was_cut_short_later_is_named_by_its_size(url):
    fetcher = RangeFetcher(url)
    taken(fetcher, [piece(0)])
    storage.write_bytes(url, "a", CONTENT[: 3 * SIZE])
    with pytest.raises(WrongSizeError, match=f"a has {3 * SIZE} bytes"):
        next(fetcher.take("train", [piece(8)]))


def test_threads_are_started_as_they_are_needed(url, store, monkeypatch):
    threads = ranges._Threads(3)
    monkeypatch.setattr(ranges, "_threads", lambda: threads)
    before = threading.active_count()
    fetcher = RangeFetcher(url)
    for number in range(5):
        taken(fetcher, [piece(number)])
        store.wait_for(number + 1)
    assert threading.active_count() - before <= 2  # a range, and a size
    fetcher.expect("train", [piece(number, "b") for number in range(20)])
    taken(fetcher, [piece(number, "b") for number in range(20)])
    assert threading.active_count() - before == 3
