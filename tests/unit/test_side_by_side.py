"""Actions at once: what ended is told, errors too, and what never ends holds nobody up."""

from __future__ import annotations

import threading

from tmu_dist.side_by_side import side_by_side


def test_each_action_has_an_end_of_its_own_or_none() -> None:
    error, released = ValueError("planted"), threading.Event()
    hanging: list[threading.Thread] = []

    def fail() -> str:
        raise error

    def hang() -> str:
        hanging.append(threading.current_thread())
        released.wait()
        return "too late"

    ends = side_by_side({"hangs": hang, "fails": fail, "ends": lambda: "done"}, seconds=0.2)
    assert ends == {"fails": error, "ends": "done"}
    released.set()
    hanging[0].join(60)
    assert set(ends) == {"fails", "ends"}  # what ended too late changes nothing


def test_all_of_them_run_at_once() -> None:
    both = threading.Barrier(2, timeout=60)
    ends = side_by_side({name: lambda: both.wait() >= 0 for name in ("a", "b")}, seconds=60)
    assert ends == {"a": True, "b": True}


def test_nothing_to_do_is_done_at_once() -> None:
    assert side_by_side({}, seconds=60) == {}
