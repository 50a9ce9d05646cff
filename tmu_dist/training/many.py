"""Many ordinary runs of one worker each, side by side: on processes of this machine, or on Ray.

A run that fails does not end the others. A driver that is killed takes its processes with it; the
same jobs again continue from the runs' checkpoints, and what is finished is not trained again.

Every run computes on one thread, so that its numbers do not depend on how many run beside it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import PurePosixPath

import torch

from tmu_dist.collectives import Collectives
from tmu_dist.config import ConfigError, LaunchConfig, RunConfig
from tmu_dist.data.storage import exists
from tmu_dist.run_folder import RESULT_FILE, read_json
from tmu_dist.training.launch import launch, train_here
from tmu_dist.training.loop import RunResult

log = logging.getLogger(__name__)

_PROCESSES = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, and what follows it."""

    config: RunConfig
    then: Callable[[RunConfig], object] | None = None
    """Called where the run was trained, also if it was finished before: such as its evaluation. A
    function of a module."""

    @property
    def name(self) -> str:
        """Of the run folder."""
        return PurePosixPath(self.config.output).name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended: with a result, or with an error."""

    result: RunResult | None = None
    error: str | None = None
    """In one line."""
    trace: str | None = None
    """Of an error that was raised; a process that died left none."""


Numbered = Iterator[tuple[int, Outcome]]
"""Outcomes as they come, each with the number of its job."""


def run_many(
    jobs: Sequence[Job], launch_settings: LaunchConfig, parallel: int | None = None
) -> list[Outcome]:
    """Run all jobs to their ends, and say how each one ended as it does.

    Args:
        jobs: with runs in different folders.
        launch_settings: of all of them. With several workers a run (scale.num_workers), one run
            follows another.
        parallel: runs at once, at most; None: one for each CPU of this machine (GPU where there
            are any), or as many as the Ray cluster has room for.

    Returns:
        How each job ended, in their order.

    Raises:
        ConfigError: `torchrun`, which starts the processes of one run; several workers and
            several runs at once; or no Ray cluster answers.
    """
    launcher = launch_settings.launcher
    if launcher == "torchrun":
        raise ConfigError(
            "launch.launcher=torchrun starts the processes of one run; many runs take ray or local."
        )
    if several := [job for job in jobs if (job.config.scale.worker_range or (1, 1))[1] > 1]:
        if parallel not in (None, 1):
            raise ConfigError(
                f"{parallel} runs at once with "
                f"scale.num_workers={several[0].config.scale.num_workers}: "
                "runs of several workers follow one another. Leave one of the two out."
            )
        ends = _one_by_one(jobs)
    elif launcher == "ray" and jobs:
        from tmu_dist.training.ray_many import run_on_ray

        ends = run_on_ray(jobs, launch_settings, parallel)
    else:
        ends = _on_processes(jobs, parallel or _places(launch_settings))
    outcomes: dict[int, Outcome] = {}
    for number, outcome in ends:
        outcomes[number] = outcome
        _say(f"{len(outcomes)} of {len(jobs)}: {jobs[number].name}", outcome)
    return [outcomes[number] for number in range(len(jobs))]


def run_job(job: Job) -> Outcome:
    """Train a run as the one rank of this process, and do what follows; never raises an error."""
    torch.set_num_threads(1)
    return _attempt(job, _train_alone)


def _attempt(job: Job, run: Callable[[RunConfig], RunResult]) -> Outcome:
    folder = job.config.output
    try:
        if exists(folder, RESULT_FILE):
            result = RunResult(**read_json(folder, RESULT_FILE))
        else:
            result = run(job.config)
        if job.then is not None:
            job.then(job.config)
        return Outcome(result=result)
    except Exception as error:  # nothing is hidden: the outcome tells
        return Outcome(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def _train_alone(config: RunConfig) -> RunResult:
    return train_here(config, Collectives())


def _one_by_one(jobs: Sequence[Job]) -> Numbered:
    """Each run on several workers, with its progress shown as of a single run."""
    for number, job in enumerate(jobs):
        yield number, _attempt(job, launch)


def _say(which: str, outcome: Outcome) -> None:
    if outcome.result is None:
        log.error("%s failed: %s", which, outcome.error)
        return
    log.info(
        "%s: best validation MSE/frame %.2f at step %d of %d",
        which,
        outcome.result.best_mse_per_frame,
        outcome.result.best_step,
        outcome.result.steps,
    )


# Processes of this machine


def _places(settings: LaunchConfig) -> int:
    gpus = 0 if settings.device == "cpu" else torch.cuda.device_count()
    return gpus or len(os.sched_getaffinity(0))


def _on_processes(jobs: Sequence[Job], parallel: int) -> Numbered:
    """Run jobs on as many processes, each of which takes one job after another."""
    waiting = deque(enumerate(jobs))
    idle = [_Worker(place) for place in range(min(parallel, len(jobs)))]
    busy: dict[Connection, tuple[int, _Worker]] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop()
                number, job = waiting.popleft()
                busy[worker.start(job)] = number, worker
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                number, worker = busy.pop(connection)
                idle.append(worker)
                yield number, worker.outcome()
    finally:
        for _, worker in busy.values():
            worker.end(in_a_job=True)
        for worker in idle:
            worker.end()


class _Worker:
    """A process that runs jobs until it is ended; where it dies, another takes its place.

    Args:
        place: which of the GPUs, if there are any, is its own.
    """

    def __init__(self, place: int) -> None:
        self._gpu = _gpu(place)
        self._running: tuple[SpawnProcess, Connection] | None = None

    def start(self, job: Job) -> Connection:
        """Begin a job; the connection is ready when `outcome` is known."""
        if self._running is not None and not self._running[0].is_alive():
            self.end()
        if self._running is None:
            ours, theirs = _PROCESSES.Pipe()
            process = _PROCESSES.Process(target=_serve, args=(theirs, self._gpu))
            process.start()
            theirs.close()  # so that its death is seen
            self._running = process, ours
        _, connection = self._running
        connection.send(job)
        return connection

    def outcome(self) -> Outcome:
        """How the job ended."""
        assert self._running is not None
        process, connection = self._running
        try:
            outcome: Outcome = connection.recv()
        except (EOFError, ConnectionResetError):
            self.end()
            return Outcome(
                error=f"its process ended with exit code {process.exitcode} (-9: killed, perhaps "
                "for memory). The same command continues from its newest checkpoint."
            )
        return outcome

    def end(self, *, in_a_job: bool = False) -> None:
        """End the process, if there is one, and with it what it is doing."""
        if self._running is None:
            return
        process, connection = self._running
        self._running = None
        if in_a_job:
            process.terminate()
        connection.close()  # which ends a process that waits for a job
        process.join()


def _serve(connection: Connection, gpu: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, who ends this process
    threading.Thread(target=_end_with_driver, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with suppress(EOFError):
        while True:
            connection.send(run_job(connection.recv()))


def _end_with_driver() -> None:
    """A driver that was killed cannot end its processes, and they would hold their runs."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def _gpu(place: int) -> str | None:
    """The GPU of a process, as the environment names it; None where there are none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]
    return gpus[place % len(gpus)] if gpus else None
