"""A search on Ray Tune: as many trials at once as there is room for, until the agenda is empty.

Every start makes a new Tune experiment. What must survive a killed driver is in the journal and in
the runs' folders, so nothing is read back from Tune's own snapshots: open trials are given to it
first, and the scheduler is told what the others reported.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from operator import floordiv
from pathlib import Path
from typing import Any

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_cluster import connect, reach_stores

# Signals are heard here, a trial that failed before any validation has nothing to report, and the
# tables of the new output do not show a trial's point.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

from ray import tune  # isort: skip
from ray.exceptions import RayActorError, RayTaskError  # isort: skip
from ray.tune.experiment import Trial as TuneTrial  # isort: skip
from ray.tune.search import Searcher  # isort: skip

from tmu_dist.config import ConfigError
from tmu_dist.data.storage import join_url
from tmu_dist.training.ray_places import wait_for_places, wants_gpu, worker_places
from tmu_dist.training.stopping import RunStoppedError, Signals
from tuning.agenda import Agenda
from tuning.plan import Search
from tuning.records import TrialRecord
from tuning.scheduling import GentleScheduler, NotPickled
from tuning.space import Space, show
from tuning.trial import run_trial

log = logging.getLogger(__name__)

_DRIVER_BYTES = 500 * 2**20
"""Memory of the process that drives a trial's workers; it takes no CPU that they could have."""
_SHOWN_SECONDS = 30
_TRACES = (
    "ray.tune.tune",
    "ray.tune.execution.tune_controller",
    "ray.tune.execution.experiment_state",
)
"""Who logs pages about a trial that failed, of which one line is told here, and about a snapshot of
Tune's that was not copied in time, which nobody reads."""


def run_trials(search: Search, agenda: Agenda, past: Iterable[TrialRecord]) -> None:
    """Run all trials that are left to their ends.

    Args:
        search: what to do.
        agenda: which trials are left.
        past: trials that ended before.

    Raises:
        ConfigError: not even one trial fits on the cluster.
        RunStoppedError: by SIGTERM or Ctrl-C, when the trials have written their checkpoints.
    """
    for name in _TRACES:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    connect(reach_stores(replace(search.base, output=search.folder)))
    search = _with_share(search)
    concurrent = trials_at_once(search)
    scheduler = GentleScheduler(search)
    scheduler.remember(past)
    log.info("%d trials at once", concurrent)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, search=search), _resources(search)),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until the searcher says that it has finished
            search_alg=_Suggestions(search, agenda, scheduler),
            scheduler=scheduler,
            max_concurrent_trials=concurrent,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
            reuse_actors=True,  # what a process imports takes seconds
        ),
        run_config=tune.RunConfig(
            name=datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
            storage_path=join_url(search.folder, "tune"),
            failure_config=tune.FailureConfig(max_failures=search.options.retries),
            callbacks=[_Recorder(agenda, scheduler)],
            progress_reporter=tune.CLIReporter(
                max_report_frequency=_SHOWN_SECONDS,
                parameter_columns=_columns(search.space),
                metric_columns=["error", "step", "seconds", "state"],
            ),
            verbose=1,
        ),
    )
    is_over = threading.Event()
    threading.Thread(target=scheduler.look_after, args=(is_over,), daemon=True).start()
    try:
        with closing(Signals((signal.SIGTERM, signal.SIGINT), scheduler.end)):
            tuner.fit()
    finally:
        is_over.set()
    if scheduler.ending is not None:
        raise RunStoppedError(
            f"{search.folder} was stopped ({scheduler.ending}). Its trials have written their "
            "checkpoints: the same command continues."
        )


def trials_at_once(search: Search) -> int:
    """How many trials the cluster has room for; for one, an autoscaler may start nodes.

    Raises:
        ConfigError: for none.
    """
    scale, launch = search.base.scale, search.base.launch
    workers, most = scale.worker_range or (1, 1)
    if workers < most:
        raise ConfigError(
            f"scale.num_workers={scale.num_workers}: the trials of a search have a fixed number of "
            "workers, or they would take each other's places."
        )
    wait_for_places(scale, use_gpu=wants_gpu(launch))
    share = _share(search)
    _, places = worker_places(wants_gpu(launch), share)
    room = sum(places) // workers
    if room < 1:
        raise ConfigError(
            f"A trial has {workers} workers, but this Ray cluster has room for {sum(places)} of "
            f"{share} CPUs{' and a GPU' if wants_gpu(launch) else ''} each: lower "
            "--scale.num-workers or --scale.cpus-per-worker, or add nodes."
        )
    return min(room, search.options.concurrent or room)


def _share(search: Search) -> int:
    """CPUs of each worker: as asked for, or with a GPU its part of the node's, or one."""
    asked = search.base.scale.cpus_per_worker
    if asked is not None or not wants_gpu(search.base.launch):
        return asked or 1
    cpus, gpus = worker_places(True, None)
    return max(1, min(map(floordiv, cpus, gpus), default=1))


def _with_share(search: Search) -> Search:
    """The search with a fixed part of the cluster for each worker.

    A run that is alone would take all there is.
    """
    base = search.base
    if base.launch.launcher != "ray":
        return search
    workers = base.scale.num_workers or 1
    scale = replace(base.scale, cpus_per_worker=_share(search), num_workers=workers)
    return replace(search, base=replace(base, scale=scale))


def _resources(search: Search) -> dict[str, float]:
    """What Tune reserves for a trial's own process; Ray Train reserves for its workers."""
    launch = search.base.launch
    if launch.launcher == "ray":
        return {"memory": _DRIVER_BYTES}
    return {"CPU": _share(search), **({"GPU": 1} if wants_gpu(launch) else {})}


def _columns(space: Space) -> dict[str, str]:
    """Of the progress table: what Tune calls a setting, and what it is called there."""
    names = [space.short(axis.name) for axis in space.axes]
    return {**{f"shown/{name}": name for name in names}, "seed": "seed"}


def _name_of(trial: TuneTrial) -> str:
    return f"{trial.config['trial']:04d}"


class _Suggestions(NotPickled, Searcher):
    """The agenda, as Tune asks it."""

    def __init__(self, search: Search, agenda: Agenda, scheduler: GentleScheduler) -> None:
        super().__init__(metric="error", mode="min")
        self._search = search
        self._agenda = agenda
        self._scheduler = scheduler

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._scheduler.ending:
            return str(Searcher.FINISHED)
        trial = self._agenda.next()
        if trial is None:  # one that still runs may be worth more seeds
            return None if self._scheduler.running else str(Searcher.FINISHED)
        return {
            "trial": trial.number,
            "seed": trial.seed,
            "point": dict(trial.point),
            "shown": {self._search.space.short(k): show(v) for k, v in trial.point.items()},
            "is_judged": self._agenda.is_judged(trial),
        }

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """The recorder hears it, with the reason."""

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("the journal is what a search goes on from")


class _Recorder(NotPickled, tune.Callback):
    """Writes down how trials end."""

    def __init__(self, agenda: Agenda, scheduler: GentleScheduler) -> None:
        self._agenda = agenda
        self._scheduler = scheduler

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        number = trial.config["trial"]
        log.warning("trial %04d is started again: %s", number, _what_happened(trial))
        self._agenda.failed_once(number)
        self._scheduler.has_lost = True

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        number, result = trial.config["trial"], trial.last_result
        asked = self._scheduler.asked.get(number)
        if result["state"] == "stopped" and asked is None and self._scheduler.ending:
            return  # it goes on with the search
        # One that was asked to stop may have been at its end.
        reason = None if result["state"] == "finished" else asked or result.get("reason")
        self._agenda.ended(number, result["state"], reason)

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        number, reason = trial.config["trial"], _what_happened(trial)
        log.error("trial %04d failed: %s", number, reason)
        self._scheduler.has_lost = True
        self._agenda.ended(number, "failed", reason)


def _what_happened(trial: TuneTrial) -> str:
    """Why a trial's function ended, in one line."""
    file = trial.pickled_error_file
    error = None if file is None else pickle.loads(Path(file).read_bytes())
    if isinstance(error, RayActorError):
        return "its process died"
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else 'nothing more is known'}"
