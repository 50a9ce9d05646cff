"""Shards fetched into the node's cache before they are needed, in the order of their use.

`ShardPrefetcher` follows the position of the training loop: it fetches so many bytes ahead of it
and no more, and keeps what is still needed from being removed. `working_set` says how much a cache
must hold for an order at the least.

Not here: the order itself (order.py), fetching and keeping (cache.py).
"""

from __future__ import annotations

import heapq
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

_KEEP_SECONDS = 5.0


class Use(NamedTuple):
    """One object's use in one epoch. Positions are samples consumed since the run began."""

    key: Hashable
    """Says to `fetch` which object it is."""
    num_bytes: int
    first: int
    """Position of the sample that needs the object first."""
    last: int
    """Position of the sample that needs it last in this epoch."""


class PrefetchStats(NamedTuple):
    """What a prefetcher has done so far."""

    objects_fetched: int
    bytes_fetched: int
    hits: int
    """Objects that were in the cache already."""
    failures: int
    """Objects that could not be fetched, and were left to the readers."""
    lost: int
    """Objects that were removed from the cache while still needed: it is too small."""


def working_set(
    num_bytes: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64]
) -> int:
    """Return the most bytes that are in use at once.

    Args:
        num_bytes: size of the object of each use.
        first: positions of the first samples of each use.
        last: positions of the last samples; from `first` to `last`, both included, the object is
            in use.
    """
    if len(num_bytes) == 0:
        return 0
    # The sum can only be largest where a use begins: what began until then, less what ended before.
    begun = np.sort(first)
    by_first, by_last = np.argsort(first, kind="stable"), np.argsort(last, kind="stable")
    ended = np.concatenate([[0], np.cumsum(num_bytes[by_last])])
    in_use = np.cumsum(num_bytes[by_first]) - ended[np.searchsorted(last[by_last], begun, "left")]
    return int(in_use.max())


class ShardPrefetcher:
    """Background threads that fetch the objects of an order ahead of the training loop.

    They cannot make a run fail: what they cannot fetch is left to the readers, who meet the same
    error where it can be reported. A warning tells of the first one.

    Args:
        fetch: brings the object of a key into the cache; says whether it was not there.
        keep: marks the object of a key as still needed; says whether it is in the cache.
        release: marks the object of a key as used up: by last use alone, it would outlive one that
            waits for its first.
        uses: sorted by `first`; may be endless. Pulled in a thread and only as far as needed,
            because making them may cost time.
        ahead_bytes: how much is fetched, or under way, for uses that lie after the position; one
            object in any case. Together with the working set it should fit in the cache.
        threads: objects fetched at a time.

    Raises:
        ValueError: ahead_bytes or threads out of range.
    """

    def __init__(
        self,
        fetch: Callable[[Hashable], bool],
        keep: Callable[[Hashable], bool],
        release: Callable[[Hashable], None],
        uses: Iterator[Use],
        *,
        ahead_bytes: int,
        threads: int = 4,
    ) -> None:
        if ahead_bytes < 0 or threads < 1:
            raise ValueError(
                "A prefetcher needs ahead_bytes of at least 0 and at least one thread, got "
                f"ahead_bytes={ahead_bytes}, threads={threads}."
            )
        self._fetch = fetch
        self._keep = keep
        self._release = release
        self._uses = uses
        self._ahead_bytes = ahead_bytes
        self._position = 0
        self._wake_at = sys.maxsize
        self._wake = threading.Event()
        self._closed = False
        self._needed: dict[Hashable, Use] = {}  # in the cache, as far as is known
        self._ends: list[tuple[int, int, Use]] = []  # a heap: last position, a number, the use
        self._keep_at = time.monotonic() + _KEEP_SECONDS
        self._to_fetch: queue.SimpleQueue[Use | None] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._stats = PrefetchStats(0, 0, 0, 0, 0)
        self._told_of_losses = False
        self._threads = [
            threading.Thread(target=target, name="shard-prefetch", daemon=True)
            for target in (self._plan, *[self._work] * threads)
        ]
        for thread in self._threads:
            thread.start()

    def advance(self, position: int) -> None:
        """Tell how many samples have been consumed; costs a fraction of a microsecond."""
        self._position = position
        if position >= self._wake_at:
            self._wake.set()

    def stats(self) -> PrefetchStats:
        """Return what was done so far."""
        return self._stats

    def close(self) -> None:
        """Stop. A download that is under way ends in the background, or with the process."""
        self._closed = True
        self._wake.set()
        for _ in self._threads:
            self._to_fetch.put(None)

    def _plan(self) -> None:
        """Hand uses to the fetching threads, as far as the position allows."""
        ahead: deque[Use] = deque()  # handed out, and first used after the position
        bytes_ahead = 0
        try:
            for number, use in enumerate(self._uses):
                while ahead and bytes_ahead + use.num_bytes > self._ahead_bytes:
                    self._rest(until=ahead[0].first)
                    if self._closed:
                        return
                    while ahead and ahead[0].first <= self._position:
                        bytes_ahead -= ahead.popleft().num_bytes
                heapq.heappush(self._ends, (use.last, number, use))
                self._to_fetch.put(use)
                ahead.append(use)
                bytes_ahead += use.num_bytes
            while not self._closed:
                self._rest(until=self._ends[0][0] + 1 if self._ends else sys.maxsize)
        except Exception:  # whatever making uses raises: the readers fetch for themselves then
            _log.warning("Shards are no longer fetched ahead of their use:", exc_info=True)

    def _rest(self, until: int) -> None:
        """Wait for the position, for a few seconds at most; then see to what is in the cache."""
        self._wake.clear()
        self._wake_at = until
        if self._position < until and not self._closed:
            self._wake.wait(_KEEP_SECONDS)
        self._wake_at = sys.maxsize  # until then, `advance` has nobody to wake
        while self._ends and self._ends[0][0] < self._position:
            self._let_go(heapq.heappop(self._ends)[-1])
        begin = time.monotonic()
        if begin >= self._keep_at:
            self._keep_needed()
            # Of ten thousands of small objects not so often: a hundredth of the time is enough.
            self._keep_at = begin + max(_KEEP_SECONDS, 100 * (time.monotonic() - begin))

    def _let_go(self, use: Use) -> None:
        """Say that an object is used up, unless the next epoch's use of it was fetched already."""
        if self._needed.get(use.key) is use:
            self._needed.pop(use.key, None)
            self._release(use.key)

    def _keep_needed(self) -> None:
        """Mark what is needed: an object that waits long for its use would look like an old one."""
        for key in self._needed.copy():
            if not self._keep(key):
                self._needed.pop(key, None)
                self._tell_of_losses(key, self._count(lost=1))

    def _tell_of_losses(self, key: Hashable, stats: PrefetchStats) -> None:
        """Warn once, if more than one object in twenty was removed before its last use."""
        if self._told_of_losses or 20 * stats.lost <= stats.objects_fetched + stats.hits:
            return
        self._told_of_losses = True
        _log.warning(
            "The cache is too small for this order, or other jobs use it up: %s was removed while "
            "it was still needed, and more may be fetched again and again. Raise data.cache_gib, "
            "or lower data.shuffle_lanes or data.shuffle_window.",
            key,
        )

    def _work(self) -> None:
        """Fetch what is handed out, in a thread."""
        while (use := self._to_fetch.get()) is not None and not self._closed:
            if use.last < self._position:
                continue  # training was faster
            try:
                fetched = self._fetch(use.key)
            except Exception as error:  # of any kind: its reader meets it again, and reports it
                is_first = self._count(failures=1).failures == 1
                level = logging.WARNING if is_first else logging.DEBUG
                _log.log(level, "Could not fetch %s ahead of its use: %s", use.key, error)
                continue
            if fetched:
                self._count(objects_fetched=1, bytes_fetched=use.num_bytes)
            else:
                self._count(hits=1)
            self._needed[use.key] = use
            if use.last < self._position:
                self._let_go(use)

    def _count(self, **more: int) -> PrefetchStats:
        with self._counting:
            self._stats = self._stats._replace(
                **{name: getattr(self._stats, name) + number for name, number in more.items()}
            )
            return self._stats
