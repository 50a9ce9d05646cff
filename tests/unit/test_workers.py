"""Pieces of work in several processes: all results, errors as they are, deaths noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.workers import WorkerDiedError, run_pieces


def square(number: int) -> int:
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is not allowed")
    return number


class OddError(Exception):
    """An error that does not survive pickling."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def fail_oddly(_: int) -> int:
    raise OddError("a", "b")


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_every_piece_has_its_result(workers: int) -> None:
    assert sorted(run_pieces(square, range(10), workers=workers)) == [
        (number, number * number) for number in range(10)
    ]


def test_no_pieces_are_no_results() -> None:
    assert list(run_pieces(square, [])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_as_it_is(workers: int) -> None:
    with pytest.raises(ValueError, match="three is not allowed"):
        list(run_pieces(fail_at_three, range(10), workers=workers))


def test_an_error_that_cannot_travel_is_described() -> None:
    with pytest.raises(Exception, match="OddError|missing 1 required"):
        list(run_pieces(fail_oddly, range(4), workers=2))


def test_a_killed_process_is_noticed() -> None:
    with pytest.raises(WorkerDiedError, match="fewer --workers"):
        list(run_pieces(die, range(10), workers=2))


def begin_and_wait(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "from data_prep.workers import run_pieces\n"
        "from tests.unit.test_workers import begin_and_wait\n"
        f"list(run_pieces(begin_and_wait, [{str(tmp_path)!r}] * 2, workers=2))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    _wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    process.kill()
    process.wait()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    _wait_until(lambda: not any(map(_is_alive, workers)))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def test_a_piece_that_cannot_travel_is_an_error_and_no_hang() -> None:
    pieces: list[Any] = [1, threading.Lock()]
    with pytest.raises(TypeError, match="pickle"):
        list(run_pieces(square, pieces, workers=2))


def test_workers_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run_pieces(square, range(3), workers=0)
