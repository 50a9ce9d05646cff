"""One trial of a search inside Ray Tune: its runs, one after another, and what Tune hears of them.

A trial is a function that Tune runs in a process of its own. It starts ordinary runs, on Ray Train
workers or in that process, and passes on what their logs say; it holds no state that its run
folders do not have, so a trial that is started again goes on where its runs are.

A scheduler's decision comes as the stop file in the run folder: the run ends after a checkpoint and
gives its workers back before Tune hears that the trial is over.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_cluster import connect_for
from tmu_dist.training.ray_worker import train_on_ray, would_only_repeat

from ray import tune  # isort: skip

import torch

from tmu_dist.bundle import bundle_on_crash
from tmu_dist.collectives import Collectives
from tmu_dist.config import RunConfig
from tmu_dist.data.storage import (
    StorageError,
    delete,
    exists,
    local_path,
    read_text,
)
from tmu_dist.run_folder import RESULT_FILE, read_log
from tmu_dist.training.checkpoint import ResumeError
from tmu_dist.training.launch import train_here
from tmu_dist.training.stopping import STOP_FILE, RunStoppedError, ask_to_stop
from tuning.plan import Search
from tuning.records import Report, progress_of

_LOOK_SECONDS = 0.5
_LOOK_STORE_SECONDS = 3.0


def run_trial(settings: dict[str, Any], search: Search) -> None:
    """What Tune runs: train a trial and report it.

    Args:
        settings: `trial`, its number; `seed`; and its `point`. Tune shows the rest in its tables.
        search: that it belongs to.

    Raises:
        Errors of processes, workers or stores, after which it is started again. What would only
        repeat ends the trial as failed, and is reported.
    """
    for result in results(search, settings["trial"], settings["point"], settings["seed"]):
        tune.report(result)


def results(
    search: Search, number: int, point: dict[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    """Train a trial and yield what Tune is told: a dict for each validation, or for each stage.

    Each has `level`, `error`, `step`, `seconds`; the last one also `state` and, if it is not
    "finished", `reason`.
    """
    known = {"level": 0.0, "error": float("nan"), "step": 0, "seconds": 0.0}
    folder = search.trial_folder(number)
    if exists(folder, STOP_FILE):  # of an earlier start
        delete(folder, STOP_FILE)
    try:
        stages = search.stages(number, point, seed)
        for place, stage in enumerate(stages):
            if exists(folder, STOP_FILE):
                raise RunStoppedError(read_text(folder, STOP_FILE).strip())
            is_last = place == len(stages) - 1
            before = known["seconds"]
            for report in _follow(stage.config, folder, search.options.error):
                known = {
                    "level": search.rung(stage.fraction or float(report.step)),
                    "error": report.error,
                    "step": report.step,
                    "seconds": before + report.seconds,
                }
                is_over = report.step == stage.config.training.num_steps
                if is_over and is_last:
                    yield {**known, "state": "finished"}
                elif is_over or stage.fraction is None:
                    yield known
    except RunStoppedError as error:
        yield {**known, "state": "stopped", "reason": str(error)}
    except Exception as error:
        # A lock may be one that a lost process has left.
        if isinstance(error, ResumeError) or not would_only_repeat(error):
            raise
        yield {**known, "state": "failed", "reason": f"{type(error).__name__}: {error}"}


def _follow(config: RunConfig, folder: str, error_name: str) -> Iterator[Report]:
    """Train a run in another thread and yield its reports as they come, the last when it has ended.

    Args:
        config: of the run.
        folder: of the trial; a stop file there is passed on to the run.
        error_name: of what is reported.

    Raises:
        Whatever ended the run.
    """
    ends: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            _train(config)
            ends.put(None)
        except Exception as error:  # nothing is hidden: raised below
            ends.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    told = 0
    while True:
        thread.join(_LOOK_SECONDS if local_path(config.output) is not None else _LOOK_STORE_SECONDS)
        has_ended = not thread.is_alive()
        if not has_ended and folder != config.output:
            _pass_on(folder, config.output)
        reports = _reports(config, error_name, has_ended)
        for report in reports[told:]:
            if has_ended or report.step < config.training.num_steps:
                told += 1
                yield report
        if has_ended:
            break
    error = ends.get_nowait()
    if error is not None:
        raise error


def _reports(config: RunConfig, error_name: str, must_be_read: bool) -> list[Report]:
    """What the log says so far; while the run goes on, a log out of reach says nothing."""
    try:
        return progress_of(config, read_log(config.output), error_name)
    except StorageError:
        if must_be_read:
            raise
        return []


def _pass_on(folder: str, run: str) -> None:
    with suppress(StorageError):  # the next look may see more
        if exists(folder, STOP_FILE):
            ask_to_stop(run, read_text(folder, STOP_FILE).strip())


def _train(config: RunConfig) -> None:
    """Train a run to its end, unless an earlier start has."""
    if exists(config.output, RESULT_FILE):
        return
    with bundle_on_crash(config):
        if config.launch.launcher == "ray":
            train_on_ray(config, connect_for(config))
            return
        # So that numbers do not depend on how many trials run beside it.
        torch.set_num_threads(1)
        train_here(config, Collectives())
