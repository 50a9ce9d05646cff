"""Which points samplers ask for: those of their rule, none twice, and after a restart the same."""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

import numpy as np
import pytest

from tmu_dist.config import ConfigError
from tuning.journal import Journal, read_trials
from tuning.plan import SearchConfig
from tuning.samplers import Sampler, make_sampler
from tuning.space import Axis, Point, Space


def sets_of(*sources: str, empty: bool = True) -> tuple[tuple[str, ...], ...]:
    counts = range(0 if empty else 1, len(sources) + 1)
    return tuple(each for n in counts for each in itertools.combinations(sources, n))


SOURCES_AND_BETA = Space(
    name="sources and beta",
    axes=(
        Axis(name="sources", values=sets_of("1", "2", "3", "4")),
        Axis(name="beta", low=1e-4, high=1.0, is_log=True),
    ),
)
METHODS = Space(
    name="methods",
    axes=(
        Axis(name="arm", values=("tmu", "l2sp", "scratch")),
        Axis(name="beta", low=1e-4, high=1.0, is_log=True, when={"arm": ("tmu",)}),
        Axis(name="pull", low=0.0, high=1.0, when={"arm": ("l2sp",)}),
        Axis(name="layers", low=1, high=6, is_integer=True),
    ),
)
NUMBERS = Space(
    name="numbers",
    axes=(
        Axis(name="sources", values=sets_of("1", "2", empty=False)),
        Axis(name="size", low=2, high=4, is_integer=True, is_log=True),
        Axis(name="share", values=(0.25, 0.5, 1.0), when={"sources": (("1",), ("1", "2"))}),
    ),
)
NUM_NUMBERS = (2 * 3 + 1) * 3
"""Points of NUMBERS: of three sets of sources, two have three shares; three sizes of each."""
WORTH = {"1": 1.0, "2": -0.5, "3": 0.7, "4": -0.2}
LEAST_ERROR = 5 - 1.7
Outcome: TypeAlias = Callable[[Sampler, int], None]
"""Says how a point of a number ended."""


def error_of_sources(point: Any) -> list[float]:
    return [5 + (math.log10(point["beta"]) + 1.7) ** 2 - sum(WORTH[s] for s in point["sources"])]


def error_and_cost(point: Any) -> list[float]:
    return [*error_of_sources(point), len(point["sources"])]


def size_and_number(point: Any) -> list[float]:
    return [abs(point["size"] - 3) + len(point["sources"])]


def error_of_methods(point: Any) -> list[float]:
    """Zero at best: tmu, beta 10^-1.7, three layers."""
    error = {
        "tmu": (math.log10(point.get("beta", 1.0)) + 1.7) ** 2,
        "l2sp": 0.5 + point.get("pull", 0.0),
        "scratch": 2.0,
    }[point["arm"]]
    return [error + (point["layers"] - 3) ** 2 / 10]


def sampler_of(
    space: Space, sampler: Any = "tpe", num_samples: int | None = 25, **options: Any
) -> Any:
    options = {"sampler": sampler, "num_samples": num_samples, **options}
    return make_sampler(space, SearchConfig(**options))


def ask_all(
    sampler: Sampler, values_of: Callable[[Point], Sequence[float]] | None = None
) -> list[Point]:
    """Every point that it gives, each told before the next one is asked for."""
    points: list[Point] = []
    while (point := sampler.ask()) is not None:
        points.append(point)
        if values_of:
            sampler.tell(len(points) - 1, values_of(point))
    return points


def distinct(points: Sequence[Point]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(point.items()) for point in points}


def test_grid_gives_every_point_in_order_without_recalled_ones() -> None:
    axes = (Axis(name="arm", values=("tmu", "l2sp")), Axis(name="beta", values=(0.1, 0.2)))
    expected = [{"arm": arm, "beta": beta} for arm in ("tmu", "l2sp") for beta in (0.1, 0.2)]
    options: dict[str, Any] = {"sampler": "grid", "num_samples": None}
    assert ask_all(sampler_of(Space(name="grid", axes=axes), **options)) == expected
    sampler = sampler_of(Space(name="grid", axes=axes), **options)
    for place in (2, 0):
        sampler.recall(expected[place])
    assert ask_all(sampler) == [expected[1], expected[3]]
    with pytest.raises(ConfigError, match="axis 'beta' is a range without `points`"):
        sampler_of(METHODS, **options).ask()


def test_random_points_are_the_draws_of_their_seed() -> None:
    points = ask_all(sampler_of(SOURCES_AND_BETA, "random", 30, sampler_seed=5))
    assert points == [SOURCES_AND_BETA.draw(5, number) for number in range(30)]
    again = sampler_of(SOURCES_AND_BETA, "random", 30, sampler_seed=5)
    for point in points[:12]:
        again.recall(point)
    assert ask_all(again) == points[12:]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_no_point_comes_twice_and_all_come_where_asked_for(sampler: str) -> None:
    points = ask_all(sampler_of(NUMBERS, sampler, 1000), size_and_number)
    assert len(points) == len(distinct(points)) == NUM_NUMBERS
    every = [
        {"sources": sources, "size": size, **({"share": share} if "1" in sources else {})}
        for sources in (("1",), ("2",), ("1", "2"))
        for size in (2, 3, 4)
        for share in (0.25, 0.5, 1.0)
    ]
    assert distinct(points) == distinct(every)
    some = sampler_of(NUMBERS, sampler, 12)
    for point in every[:4]:
        some.recall(point)
    points = ask_all(some)
    assert len(points) == 8 and not distinct(points) & distinct(every[:4])
    fewer = sampler_of(NUMBERS, sampler, 3)
    for point in every[:4]:
        fewer.recall(point)
    assert fewer.ask() is None


@pytest.mark.parametrize(
    ("space", "error_of", "least"),
    [(SOURCES_AND_BETA, error_of_sources, LEAST_ERROR), (METHODS, error_of_methods, 0.0)],
    ids=["sets", "conditional"],
)
def test_tpe_finds_better_points_than_random(
    space: Space, error_of: Callable[[Point], list[float]], least: float
) -> None:
    def regret(sampler: str, seed: int) -> float:
        points = ask_all(sampler_of(space, sampler, 30, sampler_seed=seed), error_of)
        assert len(points) == len(distinct(points)) == 30
        return min(error_of(point)[0] for point in points) - least

    guided, by_chance = ([regret(name, seed) for seed in range(4)] for name in ("tpe", "random"))
    assert mean(guided) < 0.5 * mean(by_chance)
    assert sum(a < b for a, b in zip(guided, by_chance)) >= 3


def test_tpe_weighs_the_cost_too() -> None:
    def covered(sampler: str, seed: int) -> float:
        """Area between the front of error and cost and the worst of both, (6, 5)."""
        objectives = ("mse_per_frame", "teachers") if sampler == "tpe" else ("mse_per_frame",)
        asked = sampler_of(SOURCES_AND_BETA, sampler, 30, sampler_seed=seed, objectives=objectives)
        values = [error_and_cost(point) for point in ask_all(asked, error_and_cost)]
        errors_at = [min((e for e, c in values if c <= cost), default=6.0) for cost in range(5)]
        return sum(max(0.0, 6.0 - error) for error in errors_at)

    guided, by_chance = ([covered(name, seed) for seed in range(3)] for name in ("tpe", "random"))
    assert mean(guided) > 1.1 * mean(by_chance)
    assert min(guided) > max(0.9 * area for area in by_chance)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_points_have_the_axes_that_have_an_effect_there(sampler: str) -> None:
    points = ask_all(sampler_of(METHODS, sampler, 30), error_of_methods)
    own = {"tmu": {"beta"}, "l2sp": {"pull"}, "scratch": set()}
    for point in points:
        assert set(point) == {"arm", "layers"} | own[str(point["arm"])]
        assert point["layers"] in range(1, 7)
        assert 1e-4 <= float(point.get("beta", 1.0)) <= 1.0  # type: ignore[arg-type]
        assert 0.0 <= float(point.get("pull", 0.0)) <= 1.0  # type: ignore[arg-type]
    assert {point["arm"] for point in points} == set(own)


def drive(sampler: Sampler, journal: Journal, first: int, last: int, error_of: Any) -> None:
    """Ask for points up to `last`, each told when two more are open, so two are left open."""
    for number in range(first, last):
        point = sampler.ask()
        assert point is not None
        journal.add(number, point, seed=0)
        if number >= 2:
            end(sampler, journal, number - 2, error_of)


def end(sampler: Sampler, journal: Journal, number: int, error_of: Any) -> None:
    """Some fail, some are stopped."""
    error = error_of(journal.trials[number].point)
    state = {3: "failed", 5: "stopped"}.get(number % 7, "finished")
    journal.note(number, state=state)
    if state == "failed":
        sampler.tell(number, None)
    elif state == "stopped" and len(error) == 1:
        sampler.tell_stopped(number, [0.25, 4][number % 2], error[0])
    else:
        sampler.tell(number, error)


@pytest.mark.parametrize(
    ("sampler", "space", "error_of", "objectives"),
    [
        ("random", METHODS, error_of_methods, ("mse_per_frame",)),
        ("tpe", METHODS, error_of_methods, ("mse_per_frame",)),
        ("tpe", SOURCES_AND_BETA, error_of_sources, ("mse_per_frame",)),
        ("tpe", SOURCES_AND_BETA, error_and_cost, ("mse_per_frame", "teachers")),
        ("tpe", NUMBERS, size_and_number, ("mse_per_frame",)),
    ],
    ids=["random", "conditional", "sets", "two objectives", "finite"],
)
def test_a_killed_search_goes_on_with_the_same_points(
    tmp_path: Path, sampler: str, space: Space, error_of: Any, objectives: tuple[str, ...]
) -> None:
    def new() -> Sampler:
        return sampler_of(space, sampler, 40, sampler_seed=3, objectives=objectives)

    whole, killed = Journal(str(tmp_path / "whole")), Journal(str(tmp_path / "killed"))
    drive(new(), whole, 0, 21, error_of)
    drive(new(), killed, 0, 9, error_of)
    for first, last in ((9, 15), (15, 21)):  # killed twice; points 7, 8 and then 13, 14 are open
        sampler_again, journal = new(), Journal(str(tmp_path / "killed"))
        for trial in journal.trials:
            sampler_again.recall(trial.point)
        told = [trial.number for trial in journal.trials if trial.state != "open"]
        for number in reversed(told):  # the order of telling has no effect
            end(sampler_again, journal, number, error_of)
        drive(sampler_again, journal, first, last, error_of)
    assert read_trials(str(tmp_path / "killed")) == read_trials(str(tmp_path / "whole"))


def test_suggestions_are_pure() -> None:
    def points(seed: int) -> list[Point]:
        return ask_all(sampler_of(METHODS, "tpe", 14, sampler_seed=seed), error_of_methods)

    np.random.seed(1)  # noqa: NPY002
    first = points(0)
    np.random.seed(2)  # noqa: NPY002
    assert points(0) == first
    assert len(distinct(first) & distinct(points(1))) <= 4  # without a range there are 18 points


LINE = Space(name="line", axes=(Axis(name="x", low=0.0, high=1.0),))


def worth(value: float) -> Outcome:
    return lambda sampler, number: sampler.tell(number, [value])


def stopped(level: float, error: float) -> Outcome:
    return lambda sampler, number: sampler.tell_stopped(number, level, error)


def first_asks(space: Space, known: Sequence[tuple[Point, Outcome]]) -> list[Any]:
    """The next points of 30 searches that only differ in their seeds."""
    points = []
    for seed in range(30):
        sampler = sampler_of(space, num_samples=1000, sampler_seed=seed)
        for number, (point, outcome) in enumerate(known):
            sampler.recall(point)
            outcome(sampler, number)
        points.append(sampler.ask())
    return points


def num_near(place: float, radius: float, known: Sequence[tuple[float, Outcome]]) -> int:
    asked = first_asks(LINE, [({"x": x}, outcome) for x, outcome in known])
    return sum(abs(point["x"] - place) < radius for point in asked)


def test_tpe_keeps_away_from_points_that_are_open_or_did_badly() -> None:
    def num_near_best(outcome: Outcome, num_points: int = 8) -> int:
        others = [(x, worth(1 + abs(x - 0.3))) for x in np.linspace(0.0, 1.0, 21).tolist()]
        return num_near(
            0.3, 0.04, [*others, *((0.3 + n / 1000, outcome) for n in range(num_points))]
        )

    assert num_near_best(lambda sampler, number: sampler.tell(number, None)) > 20  # is left out
    assert num_near_best(lambda sampler, number: None) < 5
    assert num_near_best(stopped(1, 0.0)) < 5
    assert num_near_best(worth(math.nan)) < 5
    assert num_near_best(worth(math.nan), 3) < 15 < 20 < num_near_best(worth(0.0), 3)


@pytest.mark.parametrize("later", [0.2, 0.8])
def test_the_sooner_stopped_the_worse(later: float) -> None:
    sooner = 1.0 - later
    known = [
        *((sooner + n / 100, stopped(0.25, 0.1)) for n in range(8)),
        *((later + n / 100, stopped(0.5, 0.9)) for n in range(3)),
    ]
    assert num_near(later, 0.1, known) > 20
    assert num_near(sooner, 0.1, known) < 5


@pytest.mark.parametrize("falling", [False, True])
def test_of_numbers_in_order_neighbours_are_alike(falling: bool) -> None:
    numbers = tuple(sorted((n / 10 for n in range(21)), reverse=falling))

    def num_neighbours(values: tuple[Any, ...]) -> int:
        """Asks for a neighbour of the best one, where every other place is known."""
        space = Space(name="list", axes=(Axis(name="x", values=values),))
        known = [({"x": values[place]}, worth(abs(place - 14))) for place in range(0, 21, 2)]
        return sum(values.index(point["x"]) in (13, 15) for point in first_asks(space, known))

    assert num_neighbours(numbers) > 20
    assert num_neighbours(tuple(map(str, numbers))) < 15  # 6 by chance


def test_what_a_source_is_worth_in_some_sets_is_expected_of_others() -> None:
    best = ("1", "2", "3")
    sets = sets_of("1", "2", "3", "4", "5")
    known = [
        ({"sources": each}, worth(len(set(each) ^ set(best)))) for each in sets[::2] if each != best
    ]
    asked = first_asks(Space(name="sets", axes=(Axis(name="sources", values=sets),)), known)
    assert sum(point["sources"] == best for point in asked) > 15  # 2 by chance


def test_axes_of_one_condition_are_learnt_together() -> None:
    when = {"arm": ("tmu",)}
    x, y = (Axis(name=name, low=0.0, high=1.0, when=when) for name in ("x", "y"))
    space = Space(name="pair", axes=(Axis(name="arm", values=("tmu", "scratch")), x, y))
    known: list[tuple[Point, Outcome]] = [({"arm": "scratch"}, worth(1.0))]
    for number in range(60):
        x_at, y_at = (0.2 + 0.6 * (number // n % 2) + number % 7 / 100 for n in (1, 2))
        known.append(({"arm": "tmu", "x": x_at, "y": y_at}, worth(abs(x_at - y_at))))
    alike = [abs(point["x"] - point["y"]) < 0.4 for point in first_asks(space, known)]
    assert sum(alike) >= 27  # 15, if each were drawn by itself


def test_of_some_sets_only_those_are_asked_for() -> None:
    some = ((), ("1",), ("1", "2", "3"))
    space = Space(name="some", axes=(Axis(name="sources", values=some), LINE.axes[0]))
    points = ask_all(sampler_of(space), lambda point: [len(point["sources"])])  # type: ignore[arg-type]
    assert len(points) == 25 and {point["sources"] for point in points} == set(some)


def test_asks_in_parallel_differ() -> None:
    points = ask_all(sampler_of(LINE, num_samples=30))
    assert len(points) == len(distinct(points)) == 30
    by_chance = [LINE.draw(0, number) for number in range(30)]
    assert not distinct(points) & distinct(by_chance)  # none for want of another


def test_tpe_without_optuna_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="pip install optuna; or use --sampler random"):
        sampler_of(METHODS)
    assert sampler_of(METHODS, "random").ask() == METHODS.draw(0, 0)


def test_tpe_is_quiet(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    optuna_logger = logging.getLogger("optuna")
    optuna_logger.addHandler(caplog.handler)
    try:
        ask_all(sampler_of(METHODS, "tpe", 12), error_of_methods)
    finally:
        optuna_logger.removeHandler(caplog.handler)
    assert not caplog.records and not recwarn.list
