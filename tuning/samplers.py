"""Which point a search tries next.

Every sampler is a function of its seed and of what was asked and told so far, so a search that is
started again tells it what the journal knows and goes on as if nothing had happened.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from tmu_dist.draws import keyed_hash
from tuning.plan import SearchConfig
from tuning.space import SOURCES, Axis, Point, Space, Value, key_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

MOST_REPEATS = 20
"""Known points that TPE may suggest in a row before a point at random takes their place."""

Answers: TypeAlias = Mapping[str, Any]
"""A point as Optuna sees it: a value for each of its parameters."""


class Sampler(Protocol):
    """Suggests points and hears what they are worth. Points are numbered from 0 as they come."""

    def recall(self, point: Point) -> None:
        """Count a point that an earlier start asked for as the next one."""
        ...

    def ask(self) -> Point | None:
        """The next point; None: there is none left."""
        ...

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Say what a point is worth, when all its trials have ended.

        Args:
            number: of the point.
            values: of each objective, the mean over seeds, lower is better; None: a trial failed.
        """
        ...

    def tell_stopped(self, number: int, level: float, error: float) -> None:
        """Say that a scheduler stopped a point's trials, at which level, and their error there."""
        ...


def make_sampler(space: Space, options: SearchConfig) -> Sampler:
    """The sampler that a search asks for. No point comes twice.

    Raises:
        ConfigError: a grid over a range without `points`.
        ImportError: TPE without Optuna.
    """
    if options.num_samples is None:
        return ListSampler(space.grid())
    draws = (space.draw(options.sampler_seed, number) for number in itertools.count())
    limit = _num_points(space, at_most=options.num_samples)
    if options.sampler == "random":
        return ListSampler(draws, limit)
    return TpeSampler(
        space, draws, limit, seed=options.sampler_seed, num_objectives=len(options.objectives)
    )


class ListSampler:
    """Takes points as they come, whatever they are worth: a grid's, or points at random.

    Args:
        points: to take from.
        limit: how many to give, recalled ones included; None: all.
    """

    def __init__(self, points: Iterator[Point], limit: int | None = None) -> None:
        self._points = points
        self._limit = limit
        self._known: set[frozenset[tuple[str, Value]]] = set()

    def recall(self, point: Point) -> None:
        """Count a point that an earlier start asked for as the next one."""
        self._known.add(key_of(point))

    def ask(self) -> Point | None:
        """The next point; None: there is none left."""
        if self._limit is not None and len(self._known) >= self._limit:
            return None
        for point in self._points:
            if not self.knows(point):
                self.recall(point)
                return point
        return None

    def knows(self, point: Point) -> bool:
        """Whether it was given or recalled."""
        return key_of(point) in self._known

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Changes nothing."""

    def tell_stopped(self, number: int, level: float, error: float) -> None:
        """Changes nothing."""


class TpeSampler:
    """Tree-structured Parzen estimator, all axes together (Bergstra et al. 2011; Optuna's).

    Each ask is made to a new study with new random numbers, so it depends on nothing but its
    number and what is known by then; a sampler that was killed leaves nothing behind to restore.

    Args:
        draws: points at random without end, for when it keeps suggesting known ones.
        limit: how many points to give, recalled ones included; no more than there are.

    Raises:
        ImportError: Optuna is not installed.
    """

    def __init__(
        self, space: Space, draws: Iterator[Point], limit: int, *, seed: int, num_objectives: int
    ) -> None:
        self._optuna = _load_optuna()
        self._axes = space.axes
        self._codes = [_code(axis) for axis in space.axes]
        self._seed = seed
        self._num_objectives = num_objectives
        self._random = ListSampler(draws, limit)
        self._limit = limit
        self._points: list[Point] = []
        self._outcomes: list[dict[str, Any]] = []

    def recall(self, point: Point) -> None:
        """Count a point that an earlier start asked for as the next one."""
        self._random.recall(point)
        self._note(point)

    def ask(self) -> Point | None:
        """The next point; None: there is none left."""
        if len(self._points) >= self._limit:
            return None
        point = self._suggest()
        if point is None:
            point = self._random.ask()
            assert point is not None
        self._random.recall(point)
        self._note(point)
        return point

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Say what a point is worth; one that failed is left out of what follows."""
        states = self._optuna.trial.TrialState
        if values is None:
            self._outcomes[number] = {"state": states.FAIL}
        else:
            worst_if_nan = [math.inf if math.isnan(value) else value for value in values]
            self._outcomes[number] = {"state": states.COMPLETE, "values": worst_if_nan}

    def tell_stopped(self, number: int, level: float, error: float) -> None:
        """Say that a point was stopped: worse than whole ones, and the sooner the worse."""
        # Optuna's levels are integers; only their order matters to it.
        self._outcomes[number] = {
            "state": self._optuna.trial.TrialState.PRUNED,
            "intermediate_values": {round(level * 1e6): error},
        }

    def _note(self, point: Point) -> None:
        self._points.append(point)
        self._outcomes.append({"state": self._optuna.trial.TrialState.RUNNING})

    def _suggest(self) -> Point | None:
        """A new point by what is known; None if it insists on known ones."""
        study = self._study()
        questions = {
            name: question for code in self._codes for name, question in code.questions.items()
        }
        for _ in range(MOST_REPEATS):
            # One in vain stays open in this study, and open points repel.
            point = self._decode(study.ask(questions).params)
            if point is not None and not self._random.knows(point):
                return point
        return None

    def _study(self) -> Study:
        """Everything known, in a study of its own."""
        (seed,) = keyed_hash(np.array([len(self._points)]), self._seed, 1).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            sampler = self._optuna.samplers.TPESampler(
                seed=seed % 2**32,
                multivariate=True,
                group=any(axis.when for axis in self._axes),
                constant_liar=True,
            )
        study: Study = self._optuna.create_study(
            sampler=sampler, directions=["minimize"] * self._num_objectives
        )
        for point, outcome in zip(self._points, self._outcomes):
            study.add_trial(self._encode(point, outcome))
        return study

    def _encode(self, point: Point, outcome: Mapping[str, Any]) -> Any:
        """A known point as one of Optuna's trials."""
        answers: dict[str, Any] = {}
        questions: dict[str, BaseDistribution] = {}
        for axis, code in zip(self._axes, self._codes):
            if axis.name in point:
                answers |= code.encode(point[axis.name])
                questions |= code.questions
        return self._optuna.trial.create_trial(params=answers, distributions=questions, **outcome)

    def _decode(self, answers: Answers) -> Point | None:
        """The point of answers to all questions; None if the space has no such one."""
        point: dict[str, Value] = {}
        for axis, code in zip(self._axes, self._codes):
            if axis.is_active(point):
                value = code.decode(answers)
                if not axis.is_range and value not in axis.values:
                    return None
                point[axis.name] = value
        return point


@dataclass(frozen=True)
class _Code:
    """What Optuna is asked about an axis, and how its answers and the axis' values translate."""

    questions: Mapping[str, BaseDistribution]
    encode: Callable[[Any], Answers]
    decode: Callable[[Answers], Value]


def _code(axis: Axis) -> _Code:
    if axis.name == SOURCES:
        sources = tuple(dict.fromkeys(itertools.chain(*map(_members, axis.values))))
        # All sets of them, but perhaps the empty one.
        if len({*axis.values, ()}) == 2 ** len(sources):
            return _set_code(axis, sources)
    distributions = _load_optuna().distributions
    if axis.low is not None and axis.high is not None:
        question = (
            distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.is_log)
            if axis.is_integer
            else distributions.FloatDistribution(axis.low, axis.high, log=axis.is_log)
        )
        return _Code(
            {axis.name: question},
            encode=lambda value: {axis.name: value},
            decode=lambda answers: answers[axis.name],
        )
    places = range(len(axis.values))
    question = (
        distributions.IntDistribution(places[0], places[-1])
        if _are_in_order(axis.values)  # neighbours are alike
        else distributions.CategoricalDistribution(tuple(places))
    )
    return _Code(
        {axis.name: question},
        encode=lambda value: {axis.name: axis.values.index(value)},
        decode=lambda answers: axis.values[answers[axis.name]],
    )


def _set_code(axis: Axis, sources: Sequence[str]) -> _Code:
    """Whether each source is used; no sources where the axis has no such set."""
    names = {source: f"{axis.name}/{source}" for source in sources}
    own = {frozenset(_members(value)): value for value in axis.values}
    yes_or_no = _load_optuna().distributions.CategoricalDistribution((False, True))
    return _Code(
        dict.fromkeys(names.values(), yes_or_no),
        encode=lambda value: {name: source in value for source, name in names.items()},
        decode=lambda answers: own.get(
            frozenset(source for source, name in names.items() if answers[name]), ()
        ),
    )


def _members(value: Value) -> tuple[str, ...]:
    assert isinstance(value, tuple)
    return value


def _are_in_order(values: Sequence[Value]) -> bool:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    rising = sorted(set(numbers))
    return len(numbers) == len(values) and numbers in (rising, rising[::-1])


def _num_points(space: Space, at_most: int) -> int:
    """How many points there are, counted no further than `at_most`."""
    if any(axis.is_range and not axis.is_integer for axis in space.axes):
        return at_most
    axes = tuple(replace(axis, values=_first_values(axis, at_most)) for axis in space.axes)
    points = replace(space, axes=axes).grid()
    return sum(1 for _ in itertools.islice(points, at_most))


def _first_values(axis: Axis, at_most: int) -> tuple[Value, ...]:
    if axis.low is None or axis.high is None:
        return axis.values
    return tuple(range(int(axis.low), int(axis.high) + 1)[:at_most])


def _load_optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise ImportError(
            "--sampler tpe needs Optuna: pip install optuna; or use --sampler random."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    module: ModuleType = optuna
    return module
