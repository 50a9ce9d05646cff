"""Byte ranges of remote objects, many requests at a time, fetched before they are needed.

Requests are made by threads: while one of them waits for an answer, or pauses after a failure,
the others go on. What was fetched ahead and not yet taken is bounded.

Not here: how one request is made and retried (storage.py), what the bytes are (tar_archive.py).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, partial
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

from tmu_dist.data import storage

MOST_REQUESTS = 64
"""Of a process, at the same time."""
MOST_BYTES = 16 * 2**20
"""Of a process, asked for at the same time: with many large answers at once, a client's processor
and memory give out before the network does."""
AHEAD_BYTES = 32 * 2**20
"""Fetched and not yet taken, of each queue."""

_NEAR_BYTES = 64 * 2**10
"""Ranges with less between them are fetched together: to read on is sooner done than to ask."""
_MOST_WAITING = 10_000
"""Ranges in a queue; of more, the first are forgotten."""
_REQUEST_BYTES = 2**20
"""Near ranges are fetched together up to this; with more, one connection would be busy and the
others idle."""

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


class Range(NamedTuple):
    """Some bytes of an object."""

    path: str
    object_bytes: int
    """The size that the object should have."""
    offset: int
    size: int


class WrongSizeError(Exception):
    """An object of another size than it should have."""

    def __init__(self, path: str, num_bytes: int) -> None:
        super().__init__(f"{path} has {num_bytes} bytes")
        self.path = path
        self.num_bytes = num_bytes


class RangeFetcher:
    """Ranges of the objects of one archive. Used by one thread; others make the requests.

    What is expected and taken goes through queues with a name, each of them in its own order.

    Args:
        url: the archive.
        ahead_bytes: of each queue, what is fetched and waits to be taken never has more.
    """

    def __init__(self, url: str, *, ahead_bytes: int = AHEAD_BYTES) -> None:
        self._url = url
        self._ahead_bytes = ahead_bytes
        self._queues: dict[str, _Queue] = {}
        self._object_bytes: dict[str, Future[int]] = {}

    def expect(self, queue: str, ranges: Iterable[Range]) -> None:
        """Take a hint that these ranges will be taken next after those that already wait.

        They are fetched as soon as there is room. A range that waits already is not added.
        """
        waiting = self._queues.setdefault(queue, _Queue())
        waiting.extend(ranges)
        waiting.started(self._ask(waiting.next_within(self._ahead_bytes)))

    def take(self, queue: str, ranges: Sequence[Range]) -> Iterator[memoryview]:
        """Return the bytes of some ranges; those that were not expected are fetched together.

        What waited in the queue before them is forgotten: whoever expected it has stopped.

        Raises:
            WrongSizeError: by the iterator, which can go on: the range's object has another size.
            StorageError: likewise: it is missing or cannot be read.
        """
        waiting = self._queues.setdefault(queue, _Queue())
        found = waiting.pop(ranges)
        asked_now = self._ask([one for one, request in found.items() if request is None])
        waiting.started(self._ask(waiting.next_within(self._ahead_bytes)))
        # Not a generator: that would end with the first error.
        return map(self._finish, ranges, [found[one] or asked_now[one] for one in ranges])

    def _ask(self, ranges: Sequence[Range]) -> dict[Range, _Request]:
        """Begin to fetch ranges, near ones in one request, and the sizes of their objects."""
        requests = {}
        for group in _near_ones(ranges):
            request = _Request(self._url, group)
            requests.update(dict.fromkeys(group, request))
            self._look_up(request.path)
            _threads().do(request.run)
        return requests

    def _look_up(self, path: str) -> Future[int]:
        """Ask for the size of an object, once."""
        if path not in self._object_bytes:
            future = self._object_bytes[path] = Future()
            size = partial(storage.object_size, self._url, path)
            _threads().do(partial(_fulfil, future, size))
        return self._object_bytes[path]

    def _finish(self, one: Range, request: _Request) -> memoryview:
        """Return the bytes of a range that was asked for, when its object has the right size."""
        self._check_size(one)
        try:
            return request.part(one)
        except storage.StorageError:
            # It may have failed a while ago: what is needed now is worth another attempt.
            _log.debug("Once more: %s of %s.", one, self._url, exc_info=True)
        try:
            return storage.read_range(self._url, one.path, one.offset, one.size)
        except storage.StorageError:
            del self._object_bytes[one.path]  # was the object cut short since it was looked up?
            self._check_size(one)
            raise

    def _check_size(self, wanted: Range) -> None:
        try:
            num_bytes = self._look_up(wanted.path).result()
        except storage.StorageError:
            del self._object_bytes[wanted.path]
            num_bytes = self._look_up(wanted.path).result()
        if num_bytes != wanted.object_bytes:
            del self._object_bytes[wanted.path]  # it may be right the next time
            raise WrongSizeError(wanted.path, num_bytes)


class _Queue:
    """Ranges in the order in which they will be taken, each with its request once there is one."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Range, _Request | None] = OrderedDict()
        self._not_asked_for: OrderedDict[Range, None] = OrderedDict()
        self._ahead_bytes = 0

    def extend(self, ranges: Iterable[Range]) -> None:
        for one in ranges:
            if one not in self._waiting:
                self._waiting[one] = self._not_asked_for[one] = None
            if len(self._waiting) > _MOST_WAITING:
                _, request = self._remove_first()
                if request:
                    request.forget()

    def next_within(self, ahead_bytes: int) -> list[Range]:
        """Return the next ranges to ask for, as far as all that wait keep within `ahead_bytes`."""
        found = []
        for one in self._not_asked_for:
            if self._ahead_bytes and self._ahead_bytes + one.size > ahead_bytes:
                break  # but one is fetched ahead, however large it is
            self._ahead_bytes += one.size
            found.append(one)
        for one in found:
            del self._not_asked_for[one]
        return found

    def started(self, requests: Mapping[Range, _Request]) -> None:
        self._waiting.update(requests)

    def pop(self, ranges: Sequence[Range]) -> dict[Range, _Request | None]:
        """Take ranges out of the queue, those in it with their requests, and all before them."""
        found = {one: self._waiting.get(one) for one in ranges}
        to_come = found.keys() & self._waiting.keys()
        while to_come:
            one, request = self._remove_first()
            if request and one not in to_come:
                request.forget()
            to_come.discard(one)
        return found

    def _remove_first(self) -> tuple[Range, _Request | None]:
        one, request = self._waiting.popitem(last=False)
        if request is None:
            del self._not_asked_for[one]
        else:
            self._ahead_bytes -= one.size
        return one, request


class _Request:
    """Bytes of one object that are asked for at once, and shared by some ranges."""

    def __init__(self, url: str, ranges: Sequence[Range]) -> None:
        self.path = ranges[0].path
        self._url = url
        self._start = ranges[0].offset
        self._size = max(one.offset + one.size for one in ranges) - self._start
        self._takers = len(ranges)
        self._bytes: Future[memoryview] = Future()

    def run(self) -> None:
        """Fetch the bytes, unless they were forgotten."""
        if self._takers > 0:
            with _under_way().some(self._size):
                _fulfil(self._bytes, self._fetch)

    def forget(self) -> None:
        """Say that one of the ranges will not be taken."""
        self._takers -= 1

    def part(self, one: Range) -> memoryview:
        """Wait, and return one of the ranges."""
        first = one.offset - self._start
        return self._bytes.result()[first : first + one.size]

    def _fetch(self) -> memoryview:
        return storage.read_range(self._url, self.path, self._start, self._size)


def _near_ones(ranges: Sequence[Range]) -> list[list[Range]]:
    """Group ranges that are worth one request, by offset; groups as their first ranges come."""
    groups: list[list[Range]] = []
    for one in sorted(ranges):
        if groups:
            first, last = groups[-1][0], groups[-1][-1]
            is_near = one.path == last.path and one.offset - last.offset - last.size < _NEAR_BYTES
            if is_near and one.offset + one.size - first.offset <= _REQUEST_BYTES:
                groups[-1].append(one)
                continue
        groups.append([one])
    order = {one: number for number, one in enumerate(ranges)}
    return sorted(groups, key=lambda group: min(order[one] for one in group))


class _UnderWay:
    """Lets so many bytes be asked for at the same time; a single request always."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def some(self, num_bytes: int) -> Iterator[None]:
        """Wait until there is room for so many more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes or self._bytes + num_bytes <= self._most)
            self._bytes += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._bytes -= num_bytes
                self._changed.notify(4)  # all of them would only get in each other's way


class _Threads:
    """Threads that are started when there is work for them, and end with the process."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tasks: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0
        self._unfinished = 0

    def do(self, task: Callable[[], object]) -> None:
        self._tasks.put(task)
        with self._lock:
            self._unfinished += 1
            if self._started < min(self._unfinished, self._most):
                self._started += 1
                # Not waited for at the end: a store that is down would keep the process alive.
                threading.Thread(target=self._work, name="ranges", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._tasks.get()()
            with self._lock:
                self._unfinished -= 1


@cache
def _threads() -> _Threads:
    """All archives of a process share them."""
    return _Threads(MOST_REQUESTS)


@cache
def _under_way() -> _UnderWay:
    """All archives of a process share it."""
    return _UnderWay(MOST_BYTES)


def _fulfil(future: Future[_Result], function: Callable[[], _Result]) -> None:
    try:
        result = function()
    except BaseException as error:  # obstore's panics, too: nobody may wait for ever
        future.set_exception(error)
    else:
        future.set_result(result)
