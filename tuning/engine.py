"""A search on Ray Tune: as many trials at once as there is room for, until the agenda is empty.

Every start makes a new Tune experiment. What must survive a killed driver is in the journal and in
the runs' folders, so nothing is read back from Tune's own snapshots: open trials are given to it
first, and the scheduler is told what the others reported.

A trial that the scheduler wants to end is asked to (the stop file) and ends by itself, after which
its workers are free; Tune never kills one that trains.
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
from tmu_dist.training.ray_cluster import connect, reach_stores, wants_gpu, worker_places

# Signals are heard here, a trial that failed before any validation has nothing to report, and the
# tables of the new output do not show a trial's point.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

from ray import tune  # isort: skip
from ray.exceptions import RayActorError, RayTaskError  # isort: skip
from ray.tune.experiment import Trial as TuneTrial  # isort: skip
from ray.tune.schedulers import (  # isort: skip
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher  # isort: skip

from tmu_dist.config import ConfigError, with_overrides
from tmu_dist.data.storage import join_url
from tmu_dist.training.stopping import ASK_AGAIN_SECONDS, RunStoppedError, Signals, ask_to_stop
from tuning.agenda import Agenda
from tuning.plan import Search, SearchConfig
from tuning.records import TrialRecord
from tuning.space import Space, show
from tuning.trial import free_places_of_the_lost, run_trial

log = logging.getLogger(__name__)

_DRIVER_BYTES = 500 * 2**20
"""Memory of the process that drives a trial's workers; it takes no CPU that they could have."""
_MEDIAN_OF = 5
"""Trials whose averages a median is taken of, at least."""
_SHOWN_SECONDS = 30
_TRACES = ("ray.tune.tune", "ray.tune.execution.tune_controller")
"""Who logs pages about a trial that failed, of which one line is told here."""


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
    scheduler = _Gentle(search, make_scheduler(search.options, _most_steps(search)))
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


def make_scheduler(options: SearchConfig, num_steps: int) -> TrialScheduler:
    """Tune's scheduler; it reads `level` and `error` of what trials report.

    Args:
        options: of the search.
        num_steps: iterations of its longest trial.
    """
    common = {"time_attr": "level", "metric": "error", "mode": "min"}
    grace = options.grace_steps or max(1, num_steps // 8)
    if options.scheduler == "median":
        return MedianStoppingRule(grace_period=grace, min_samples_required=_MEDIAN_OF, **common)
    if options.scheduler == "none":
        return FIFOScheduler()
    rungs = len(options.fractions)
    return ASHAScheduler(
        grace_period=1 if rungs else grace,
        max_t=options.reduction ** (rungs - 1) if rungs else num_steps,
        reduction_factor=options.reduction,
        stop_last_trials=False,  # they end by themselves
        **common,
    )


def trials_at_once(search: Search) -> int:
    """How many trials the cluster has room for, as it is.

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


def _most_steps(search: Search) -> int:
    """Iterations of the longest trial."""
    axis = search.space.axis("training.num_steps")
    steps: list[object] = []
    if axis is not None:
        steps += axis.values if axis.high is None else (axis.high,)
    if axis is None or axis.when:
        steps.append(with_overrides(search.base, search.space.settings).training.num_steps)
    return max(int(each) for each in steps if isinstance(each, int | float))


def _columns(space: Space) -> dict[str, str]:
    """Of the progress table: what Tune calls a setting, and what it is called there."""
    names = [space.short(axis.name) for axis in space.axes]
    return {**{f"shown/{name}": name for name in names}, "seed": "seed"}


def _name_of(trial: TuneTrial) -> str:
    return f"{trial.config['trial']:04d}"


class _NotPickled:
    """What Tune keeps to restore an experiment, which is never done here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Gentle(_NotPickled, FIFOScheduler):
    """Another scheduler's decisions on the trials that it judges, who are asked to stop."""

    def __init__(self, search: Search, scheduler: TrialScheduler) -> None:
        super().__init__()
        self._search = search
        self._scheduler = scheduler
        self.running: set[int] = set()
        """Numbers of the trials that Tune has."""
        self.asked: dict[int, str] = {}
        """Why trials are to stop, by number."""
        self.ending: str | None = None
        """The signal that ends the search."""
        self.has_lost = False
        """Whether the process of a trial died."""

    @property
    def metric(self) -> str:
        return "error"

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def remember(self, past: Iterable[TrialRecord]) -> None:
        """Tell the scheduler what the trials of earlier starts that it judges reported."""
        firsts: set[int] = set()
        for record in past:
            if record.trial.point_number in firsts:
                continue
            firsts.add(record.trial.point_number)
            trial, result = _Past(record.trial.number), {}
            self._scheduler.on_trial_add(_NOBODY, trial)
            for report in record.reports:
                result = {"level": self._search.rung(report.level), "error": report.error}
                self._scheduler.on_trial_result(_NOBODY, trial, result)
            self._scheduler.on_trial_complete(_NOBODY, trial, result)

    def end(self, why: str) -> None:
        """Have all trials stop, and start none."""
        log.warning("%s: trials stop after a checkpoint; once more ends the search now", why)
        self.ending = why

    def look_after(self, is_over: threading.Event) -> None:
        """Ask those who are to stop until they have; a run that just starts hears no request.

        And see to it that those who died are no burden to the others.
        """
        while not is_over.wait(ASK_AGAIN_SECONDS):
            for number in sorted(self.running):
                self._ask(number)
            if self.has_lost:
                free_places_of_the_lost()

    def _ask(self, number: int) -> None:
        reason = self.asked.get(number)
        if reason is None and self.ending is not None:
            reason = f"the search was stopped: {self.ending}"
        if reason is not None:
            ask_to_stop(self._search.trial_folder(number), reason)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        self.running.add(trial.config["trial"])
        if trial.config["is_judged"]:
            self._scheduler.on_trial_add(tune_controller, trial)

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: Mapping[str, Any]
    ) -> str:
        number = trial.config["trial"]
        is_over = "state" in result  # the other scheduler hears it when the trial is complete
        if trial.config["is_judged"] and number not in self.asked and not is_over:
            verdict = self._scheduler.on_trial_result(tune_controller, trial, result)
            if verdict == TrialScheduler.STOP:
                self.asked[number] = f"{self._search.options.scheduler} at {result['level']:g}"
                self._ask(number)  # before it goes on to its next stage
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(
        self, tune_controller: Any, trial: TuneTrial, result: Mapping[str, Any]
    ) -> None:
        if self._let_go(trial):
            self._scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        if self._let_go(trial):
            self._scheduler.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        if self._let_go(trial):
            self._scheduler.on_trial_remove(tune_controller, trial)

    def _let_go(self, trial: TuneTrial) -> bool:
        """Tune is done with a trial; returns whether the other scheduler is to hear it."""
        self.running.discard(trial.config["trial"])
        return bool(trial.config["is_judged"])

    def debug_string(self) -> str:
        return f"{self._search.options.scheduler}: {len(self.asked)} trials stopped"


class _Past:
    """A trial that ended before, as schedulers see it."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"past-{number}"


class _Nobody:
    """The controller of trials that ended before."""

    def get_live_trials(self) -> list[TuneTrial]:
        return []


_NOBODY = _Nobody()


class _Suggestions(_NotPickled, Searcher):
    """The agenda, as Tune asks it."""

    def __init__(self, search: Search, agenda: Agenda, scheduler: _Gentle) -> None:
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


class _Recorder(_NotPickled, tune.Callback):
    """Writes down how trials end."""

    def __init__(self, agenda: Agenda, scheduler: _Gentle) -> None:
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
