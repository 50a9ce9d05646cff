"""Which trials go on: Tune's schedulers, and how their decisions are carried out.

A trial that is to end is asked to (the stop file) and ends by itself, after a checkpoint, after
which its workers are free; Tune never kills one that trains. Only a point's first trial is judged
(`agenda`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_places import free_places_of_the_lost

from ray.tune.experiment import Trial as TuneTrial  # isort: skip
from ray.tune.schedulers import (  # isort: skip
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from tmu_dist.config import with_overrides
from tmu_dist.training.stopping import ASK_AGAIN_SECONDS, ask_to_stop
from tuning.plan import Search, SearchConfig
from tuning.records import TrialRecord

log = logging.getLogger(__name__)

_MEDIAN_OF = 5
"""Trials whose averages a median is taken of, at least."""


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


class NotPickled:
    """What Tune keeps to restore an experiment, which is never done here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class GentleScheduler(NotPickled, FIFOScheduler):
    """The search's scheduler, whose decisions are carried out by asking trials to stop."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._search = search
        self._scheduler = make_scheduler(search.options, _most_steps(search))
        self._asking = threading.Lock()
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
            with self._asking:
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


def _most_steps(search: Search) -> int:
    """Iterations of the longest trial."""
    axis = search.space.axis("training.num_steps")
    steps: list[object] = []
    if axis is not None:
        steps += axis.values if axis.high is None else (axis.high,)
    if axis is None or axis.when:
        steps.append(with_overrides(search.base, search.space.settings).training.num_steps)
    return max(int(each) for each in steps if isinstance(each, int | float))
