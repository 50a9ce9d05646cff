"""Which trial comes next, and what becomes of each: the sampler and the journal in step.

Where a scheduler stops trials, a point's first seed alone is judged by it, and the others are
trained, whole, when that one was trained to its end. Were each seed judged by itself, good points
would lose one and could not be chosen, and all seeds of bad points would be paid for
(docs/results/search-simulation).

Deliberately not here: running trials (`engine`, or the simulation of benchmarks/).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean

from tuning.journal import Journal, State, Trial, missing_seeds
from tuning.samplers import Sampler
from tuning.space import Point

Outcome = tuple[float, float, float | None]
"""What a trial found: level, error, cost (None without a second objective)."""


class Agenda:
    """The trials that are left, in order: those an earlier start left open, seeds that were added,
    then whatever the sampler thinks of.

    Args:
        journal: of the search; earlier starts' trials are recalled from it.
        sampler: new; it is told what they found.
        seeds: of each point.
        has_scheduler: trials may be stopped.
        found: what an ended trial found, read from its runs; None if nothing.
    """

    def __init__(
        self,
        journal: Journal,
        sampler: Sampler,
        seeds: Sequence[int],
        has_scheduler: bool,
        found: Callable[[Trial], Outcome | None],
    ) -> None:
        self._journal = journal
        self._sampler = sampler
        self._seeds = seeds
        self._has_scheduler = has_scheduler
        self._found = found
        self._points: list[Point] = []
        self._is_exhausted = False
        """The sampler has no more points."""
        self._outcomes: dict[int, Outcome | None] = {}
        for trial in journal.trials:
            if trial.point_number == len(self._points):
                self._points.append(trial.point)
                sampler.recall(trial.point)
        self._waiting = deque(trial.number for trial in journal.trials if trial.state == "open")
        self._new: deque[tuple[int, int]] = deque()
        for trial in journal.trials:
            self._look_up(trial)
        for number in range(len(self._points)):
            self._new.extend((number, seed) for seed in self._missing_seeds(number))
            self._tell_if_over(number)

    def next(self) -> Trial | None:
        """The next trial, written down before it is given away; None: there is none left now."""
        if self._waiting:
            return self._journal.trials[self._waiting.popleft()]
        if not self._new:
            point = None if self._is_exhausted else self._sampler.ask()
            if point is None:
                self._is_exhausted = True
                return None
            self._points.append(point)
            number = len(self._points) - 1
            self._new.extend((number, seed) for seed in self._missing_seeds(number))
        number, seed = self._new.popleft()
        return self._journal.add(number, self._points[number], seed)

    def is_judged(self, trial: Trial) -> bool:
        """Whether the scheduler may stop it: it is its point's first."""
        return trial.number == self._of_point(trial.point_number)[0].number

    def ended(self, number: int, state: State, reason: str | None = None) -> None:
        """Write down how a trial ended, and tell the sampler when its point's are over."""
        trial = self._journal.note(number, state=state, reason=reason)
        self._look_up(trial)
        if self._has_scheduler and self.is_judged(trial):
            # Before new points, so that what is good is known soon.
            rest = [(trial.point_number, seed) for seed in self._missing_seeds(trial.point_number)]
            self._new.extendleft(reversed(rest))
        self._tell_if_over(trial.point_number)

    def failed_once(self, number: int) -> None:
        """Write down that a trial is started again."""
        failures = self._journal.trials[number].failures + 1
        self._journal.note(number, failures=failures)

    def _look_up(self, trial: Trial) -> None:
        """Of one that failed nothing counts, and its settings or its folder may not be readable."""
        if trial.state in ("finished", "stopped"):
            self._outcomes[trial.number] = self._found(trial)

    def _of_point(self, number: int) -> list[Trial]:
        return [trial for trial in self._journal.trials if trial.point_number == number]

    def _missing_seeds(self, number: int) -> list[int]:
        trials = self._of_point(number)
        return missing_seeds(trials, self._seeds, has_scheduler=self._has_scheduler)

    def _tell_if_over(self, number: int) -> None:
        trials = self._of_point(number)
        if self._missing_seeds(number) or any(trial.state == "open" for trial in trials):
            return
        states = {trial.state for trial in trials}
        outcomes = [self._outcomes.get(trial.number) for trial in trials]
        known = [outcome for outcome in outcomes if outcome is not None]
        if "failed" in states or len(known) < len(trials):
            self._sampler.tell(number, None)
        elif states == {"finished"}:
            values = [fmean(error for _, error, _ in known)]
            costs = [cost for _, _, cost in known if cost is not None]
            self._sampler.tell(number, [*values, fmean(costs)] if costs else values)
        else:  # what is known of all its seeds
            lowest = min(level for level, _, _ in known)
            self._sampler.tell_stopped(number, lowest, fmean(error for _, error, _ in known))
