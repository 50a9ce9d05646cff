"""Several actions at once, each in a thread that may be given up.

For actions that may never end, such as asking a store that does not answer. Threads that are given
up go on until they or the process end. For work that does end, a pool of threads is the better
choice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def side_by_side(
    actions: Mapping[Key, Callable[[], Result]], *, seconds: float
) -> dict[Key, Result | Exception]:
    """What each action returned or raised; one that has not ended in time has no entry.

    Args:
        actions: what is to be done, each by a name of its own.
        seconds: that all of them have together.
    """
    ends: dict[Key, Result | Exception] = {}

    def do(key: Key, action: Callable[[], Result]) -> None:
        try:
            ends[key] = action()
        except Exception as error:  # nothing is hidden: the caller gets it
            ends[key] = error

    threads = [threading.Thread(target=do, args=item, daemon=True) for item in actions.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(ends)  # those given up may still end, and change nothing any more
