"""Scoring in threads: as many as the process may use, while NumPy works outside the interpreter.

What a thread does must not depend on when it does it. Deliberately not here: what is scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING_PER_THREAD = 2
"""Items taken before one is done; each may hold a whole sequence in memory."""


def map_in_threads(
    action: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None
) -> Iterator[Result]:
    """What the action returns of every item, in their order.

    Args:
        action: mostly NumPy on large arrays, or threads only wait for each other.
        items: taken one by one in the calling thread, a few ahead of the results.
        threads: None: as many as PyTorch works with, which knows a rank's share of the cores.

    Raises:
        Exception: the first one of an action, by the order of the items; no further item is taken.
    """
    count = torch.get_num_threads() if threads is None else threads
    if count == 1:
        yield from map(action, items)
        return
    with ThreadPoolExecutor(count, thread_name_prefix="scoring") as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            if len(waiting) == _WAITING_PER_THREAD * count:
                yield waiting.popleft().result()
            waiting.append(pool.submit(action, item))
        while waiting:
            yield waiting.popleft().result()
