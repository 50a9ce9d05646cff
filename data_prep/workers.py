"""Many independent pieces of work: in this process, in local processes, or as Ray tasks.

The only module of data_prep that imports ray, and only when Ray is asked for.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeAlias, TypeVar

Launcher: TypeAlias = Literal["local", "ray"]

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_TASKS_PER_CORE = 2
"""Ray tasks handed out before one is back; more would only pile up in a queue."""


class WorkerDiedError(ValueError):
    """A process that worked on a piece is gone."""


def run_pieces(
    work: Callable[[Piece], Result],
    pieces: Sequence[Piece],
    *,
    launcher: Launcher = "local",
    workers: int | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (index of the piece, result) of every piece, as they come ready.

    Args:
        work: a picklable function of one piece.
        pieces: what to work on; each is pickled by itself.
        launcher: "local" for processes of this machine, "ray" for tasks on a Ray cluster (the one
            in RAY_ADDRESS, or one started here). Every node must see the original files.
        workers: pieces at a time; 1 with "local" works in this process. None: one per core of the
            machine or the cluster.

    Raises:
        WorkerDiedError: a process was killed (memory, most often).
        Exception: what `work` raises; pieces not begun are then given up.
    """
    check_workers(workers)
    if not pieces:
        return iter(())
    if launcher == "ray":
        return _on_ray(work, pieces, workers)
    workers = min(workers or available_cores(), len(pieces))
    if workers == 1:
        return ((index, work(piece)) for index, piece in enumerate(pieces))
    return _in_processes(work, pieces, workers)


def check_workers(workers: int | None) -> None:
    """Refuse a number of workers that cannot be, before anything is touched."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")


def available_cores() -> int:
    """Cores that this process may use; a job scheduler may have given fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[int, Result]]:
    # One pipe a process: a process that dies is noticed by its pipe, and one that has lost this
    # process ends by itself.
    # Not "fork": obstore has been used in this process and would hang. Not "forkserver": the
    # server lives on, and a loader started later could not choose what it has imported.
    context = multiprocessing.get_context("spawn")
    waiting = iter(enumerate(pieces))
    processes = []
    running: dict[Connection, int] = {}

    def hand_out(connection: Connection) -> None:
        for index, piece in itertools.islice(waiting, 1):
            connection.send(piece)
            running[connection] = index

    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            hand_out(ours)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                index = running.pop(connection)
                failed, outcome = _receive(connection)
                if failed:
                    raise outcome
                hand_out(connection)
                yield index, outcome
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """Work on the pieces that come through a pipe until it is closed; runs in a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError):
        while True:
            piece = connection.recv()
            try:
                answer = (False, work(piece))
            except Exception as error:
                answer = (True, error)
            try:
                connection.send(answer)
            except (TypeError, AttributeError, pickle.PicklingError):  # an error of some library
                connection.send((True, RuntimeError(repr(answer[1]))))


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, also in the middle of a piece.

    A piece that was finished later could take the place of what another command has written since.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _receive(connection: Connection) -> tuple[bool, Any]:
    """Whether a piece failed, and its result or error."""
    try:
        return connection.recv()
    except (EOFError, ConnectionError) as error:
        raise WorkerDiedError(
            "A worker process was killed from outside; most often the machine ran out of memory. "
            "What was finished is kept: run the same command again, with fewer --workers."
        ) from error


def _on_ray(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int | None
) -> Iterator[tuple[int, Result]]:
    import ray

    if not ray.is_initialized():
        ray.init(logging_level="warning", log_to_driver=False)
    # Tasks of a lost node run again elsewhere: a piece writes the same objects each time.
    task: Any = ray.remote(num_cpus=1, max_retries=5)(work)
    workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(enumerate(pieces))
    running: dict[Any, int] = {}
    try:
        while True:
            free = workers * _TASKS_PER_CORE - len(running)
            for index, piece in itertools.islice(waiting, free):
                running[task.remote(piece)] = index
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                yield running.pop(reference), _result(reference)
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any) -> Any:
    """The task's result, or its own error without Ray's wrapping."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else None
        raise (cause or error) from None
    except ray.exceptions.WorkerCrashedError as error:
        raise WorkerDiedError(f"A Ray worker died again and again: {error}") from error
