"""A search in virtual time: trials on places that differ in speed, crash, and are started again.

The search's own parts decide: its agenda which trial is next, Ray Tune's scheduler which one is
stopped. Only the machines and the runs are made up, so a thousand trials take seconds.

Hours are of virtual time. Shape letters: K validations of a run.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tmu_dist.draws import keyed_normal, keyed_uniform
from tuning.agenda import Agenda, Outcome
from tuning.journal import Journal, State, Trial
from tuning.samplers import Sampler


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where trials run, and what goes wrong there. All of it is assumed."""

    places: int = 64
    """Trials at once."""
    places_per_node: int = 4
    slow_nodes: int = 1
    """So many nodes compute `slow_factor` times slower than the others."""
    slow_factor: float = 3.0
    speed_spread: float = 0.15
    """Standard deviation of the logarithm of a start's speed (log-normal)."""
    startup_hours: float = 1 / 60
    """Until a start trains: processes, data, teachers."""
    crashes_per_hour: float = 0.05
    """Of a trial, while it holds its place; memoryless."""

    def slowness(self, place: int, *key: int) -> float:
        """How many times longer a start takes on a place; a pure function of its key."""
        is_slow = place // self.places_per_node < self.slow_nodes
        (deviation,) = keyed_normal(np.zeros(1, np.int64), *key, 0).tolist()
        return math.exp(self.speed_spread * deviation) * (self.slow_factor if is_slow else 1.0)

    def hours_to_crash(self, *key: int) -> float:
        """Of one start; a pure function of its key."""
        if not self.crashes_per_hour:
            return math.inf
        (share,) = keyed_uniform(np.zeros(1, np.int64), *key, 1).tolist()
        return -math.log1p(-share) / self.crashes_per_hour


@dataclass(frozen=True)
class Course:
    """What a trial's run would tell, and how long it takes on a place of usual speed."""

    steps_K: NDArray[np.int64]
    errors_K: NDArray[np.float64]
    hours: float
    checkpoint_every: int
    """Iterations; a multiple of those between validations."""

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return int(self.steps_K[-1])


@dataclass(frozen=True, kw_only=True)
class Span:
    """One start of a trial on its place."""

    place: int
    start: float
    end: float


@dataclass(eq=False, repr=False, kw_only=True)
class SimulatedTrial:
    """A trial over all of its starts. Tune's schedulers know it by its identity and its id."""

    trial: Trial
    course: Course
    is_judged: bool
    """The scheduler hears of it, and may stop it."""
    state: State = "open"
    failures: int = 0
    num_heard: int = 0
    """Validations that it has told of."""
    saved_step: int = 0
    """Of the newest checkpoint."""
    spent_hours: float = 0.0
    """Of training, at usual speed; what crashes lost is part of it."""
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trial_id = f"{self.trial.number:05d}"

    @property
    def result(self) -> dict[str, float]:
        """The last validation as Tune's schedulers are told it."""
        last = self.num_heard - 1
        return {
            "level": float(self.course.steps_K[last]),
            "error": float(self.course.errors_K[last]),
        }


class Scheduler(Protocol):
    """What is used of Ray Tune's `TrialScheduler`, which needs no Ray to run."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None: ...

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str: ...

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None: ...

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None: ...


class Simulation:
    """One search on one cluster.

    Args:
        sampler: of points.
        seeds: of each point.
        scheduler: of Ray Tune; hears of `level` and `error`.
        course_of: what a trial's run would tell.
        cluster: where it runs.
        retries: how often a trial is started again.
        seed: of speeds and crashes; those of a trial do not depend on what other trials do.
        is_staged: the scheduler judges the first seed of a point alone, and the others follow when
            that one finished, as in searches with a scheduler; else it judges all seeds.
    """

    def __init__(
        self,
        sampler: Sampler,
        seeds: Sequence[int],
        scheduler: Scheduler,
        course_of: Callable[[Trial], Course],
        cluster: Cluster,
        *,
        retries: int,
        seed: int,
        is_staged: bool = False,
    ) -> None:
        self._agenda = Agenda(_JournalInMemory(), sampler, seeds, is_staged, self._found)
        self._is_staged = is_staged
        self._scheduler = scheduler
        self._course_of = course_of
        self._cluster = cluster
        self._retries = retries
        self._seed = seed
        self._now = 0.0
        self._idle = deque(range(cluster.places))
        self._again: deque[SimulatedTrial] = deque()
        self._events: list[tuple[float, int, _Start]] = []
        self._order = itertools.count()
        self._trials: list[SimulatedTrial] = []

    def run(self) -> tuple[SimulatedTrial, ...]:
        """Until no trial is left; returns all of them, by number."""
        self._fill_places()
        while self._events:
            self._now, _, start = heapq.heappop(self._events)
            if self._now >= start.crash:
                self._crash(start)
            else:
                self._hear(start)
            self._fill_places()
        return tuple(self._trials)

    def get_live_trials(self) -> tuple[()]:
        """Tune's schedulers ask their controller for trials to pause another one for; none is."""
        return ()

    def _found(self, trial: Trial) -> Outcome | None:
        """What the agenda asks of a trial that has ended."""
        simulated = self._trials[trial.number]
        if not simulated.num_heard:
            return None
        result = simulated.result
        return result["level"], result["error"], None

    def _fill_places(self) -> None:
        while self._idle and (trial := self._next()) is not None:
            self._begin(trial, self._idle.popleft())

    def _next(self) -> SimulatedTrial | None:
        """Those that crashed come first."""
        if self._again:
            return self._again.popleft()
        trial = self._agenda.next()
        if trial is None:
            return None
        is_judged = not self._is_staged or self._agenda.is_judged(trial)
        simulated = SimulatedTrial(trial=trial, course=self._course_of(trial), is_judged=is_judged)
        self._trials.append(simulated)
        if is_judged:
            self._scheduler.on_trial_add(self, simulated)
        return simulated

    def _begin(self, trial: SimulatedTrial, place: int) -> None:
        course, key = trial.course, self._key(trial)
        slowness = self._cluster.slowness(place, *key)
        start = _Start(
            trial=trial,
            place=place,
            start=self._now,
            training=self._now + self._cluster.startup_hours,
            crash=self._now + self._cluster.hours_to_crash(*key),
            hours_per_step=slowness * course.hours / course.num_steps,
            from_step=trial.saved_step,
            next_report=int(np.searchsorted(course.steps_K, trial.saved_step, side="right")),
        )
        self._await(start)

    def _key(self, trial: SimulatedTrial) -> tuple[int, ...]:
        """Of what happens to one start: the same under every scheduler."""
        return self._seed, trial.trial.point_number, trial.trial.seed, trial.failures

    def _await(self, start: _Start) -> None:
        """The next validation, or the crash that comes before it."""
        steps = int(start.trial.course.steps_K[start.next_report]) - start.from_step
        validation = start.training + steps * start.hours_per_step
        when = min(validation, start.crash)
        heapq.heappush(self._events, (when, next(self._order), start))

    def _hear(self, start: _Start) -> None:
        """One validation: what a start before this one has told is not told again."""
        trial, number = start.trial, start.next_report
        step = int(trial.course.steps_K[number])
        start.next_report += 1
        if step % trial.course.checkpoint_every == 0:
            trial.saved_step = step
        decision = "CONTINUE"
        if number >= trial.num_heard:
            trial.num_heard = number + 1
            if trial.is_judged:
                decision = self._scheduler.on_trial_result(self, trial, trial.result)
        if step == trial.course.num_steps:
            self._end(start, "finished")
        elif decision == "STOP":
            self._end(start, "stopped")
        else:
            self._await(start)

    def _crash(self, start: _Start) -> None:
        trial = start.trial
        trial.failures += 1
        if trial.failures > self._retries:
            self._end(start, "failed")
            return
        self._leave(start)
        self._agenda.failed_once(trial.trial.number)
        self._again.append(trial)

    def _end(self, start: _Start, state: State) -> None:
        trial = start.trial
        trial.state = state
        self._leave(start)
        if trial.is_judged and state == "failed":
            self._scheduler.on_trial_error(self, trial)
        elif trial.is_judged:
            self._scheduler.on_trial_complete(self, trial, trial.result)
        self._agenda.ended(trial.trial.number, state)

    def _leave(self, start: _Start) -> None:
        """The place is free, and what was computed there is paid for."""
        trial, course = start.trial, start.trial.course
        steps = max(0.0, self._now - start.training) / start.hours_per_step
        trial.spent_hours += steps * course.hours / course.num_steps
        trial.spans.append(Span(place=start.place, start=start.start, end=self._now))
        self._idle.append(start.place)


@dataclass(eq=False, kw_only=True)
class _Start:
    """A trial on a place."""

    trial: SimulatedTrial
    place: int
    start: float
    training: float
    """When it trains: it starts before."""
    crash: float
    """When its processes die, unless it has ended by then."""
    hours_per_step: float
    from_step: int
    next_report: int


class _JournalInMemory(Journal):
    """Nothing is written."""

    def __init__(self) -> None:
        self._trials = []

    def _write(self) -> None:
        pass
