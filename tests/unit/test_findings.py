"""What follows from the trials of a search; worth of sources against a count of all orders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations, permutations, product
from statistics import stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmu_dist.config import RunConfig, TransferConfig
from tuning.findings import MAX_LINES, Findings, Sensitivity, as_record, find
from tuning.journal import State, Trial
from tuning.plan import Search, SearchConfig
from tuning.records import Report, TrialRecord
from tuning.space import Axis, Point, Space, Value
from tuning.worth import Errors, is_complete, marginal_gains, shapley_values

NAMES = ("a", "b", "c")


def search_of(*axes: Axis, **options: Any) -> Search:
    transfer = TransferConfig(method="tmu", teachers=tuple(f"zoo/{name}" for name in NAMES))
    return Search(
        folder="runs/my-search",
        recipe="tiny",
        command="",
        base=RunConfig(transfer=transfer),
        space=Space(name="test", axes=axes),
        options=SearchConfig(**options),
    )


def axis(name: str, *values: Value, **more: Any) -> Axis:
    return Axis(name=name, values=values, **more)


class Trials:
    """Records of trials, numbered as they come; equal points have equal numbers."""

    def __init__(self) -> None:
        self.records: list[TrialRecord] = []
        self._points: list[Point] = []

    def add(
        self,
        point: Point,
        errors: float | Mapping[float, float] | None,
        *,
        seed: int = 0,
        state: State = "finished",
        sources: Sequence[str] = NAMES,
        **facts: Any,
    ) -> None:
        """One trial with its error at the end, or at each level."""
        if point not in self._points:
            self._points.append(point)
        if not isinstance(errors, Mapping):
            errors = {} if errors is None else {100.0: errors}
        known = {"method": "tmu" if sources else "scratch", "fraction": 1.0, "num_steps": 100}
        self.records.append(
            TrialRecord(
                trial=Trial(
                    number=len(self.records),
                    point_number=self._points.index(point),
                    point=point,
                    seed=seed,
                    state=state,
                ),
                folder="",
                reports=tuple(
                    Report(level=level, error=error, step=int(100 * level), seconds=1.0)
                    for level, error in errors.items()
                ),
                sources=tuple(sources),
                **{"gates": (), **known, **facts},
            )
        )


def by_axis(findings: Findings) -> dict[str, Sensitivity]:
    return {found.axis: found for found in findings.sensitivities}


# Points


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_a_trial_that_diverged_is_not_compared(error: float) -> None:
    search = search_of(axis("beta", 1, 2), seeds=(0, 1))
    trials = Trials()
    for seed in (0, 1):
        trials.add({"beta": 1}, error if seed else 3.0, seed=seed)
        trials.add({"beta": 2}, 5.0 + seed, seed=seed)
    found = find(search, trials.records)
    assert [point.number for point in found.ranked] == [1]
    assert found.counts["finished"] == 4


def test_points_are_compared_by_the_mean_over_seeds_of_whole_trials() -> None:
    search = search_of(axis("beta", 1, 2, 3, 4), seeds=(0, 1))
    trials = Trials()
    for seed, error in enumerate((5.0, 8.0)):
        trials.add({"beta": 1}, error, seed=seed, operations=10.0 + seed, gates=(0.1, seed))
    for seed, error in enumerate((6.0, 6.5)):
        trials.add({"beta": 2}, error, seed=seed)
    trials.add({"beta": 3}, 1.0)
    trials.add({"beta": 3}, 1.0, seed=1, state="stopped", operations=3.0)
    trials.add({"beta": 4}, 1.0)
    trials.add({"beta": 4}, None, seed=1, state="failed")
    found = find(search, trials.records)
    assert [point.number for point in found.points] == [0, 1, 2, 3]
    assert [point.number for point in found.ranked] == [1, 0]
    first = found.points[0]
    assert first.error is not None and first.error.by_seed == {0: 5.0, 1: 8.0}
    assert first.error.mean == 6.5 and first.error.deviation == pytest.approx(stdev((5.0, 8.0)))
    assert first.operations == 10.5 and first.gates == (0.1, 0.5)
    assert first.label == "beta=1" and len(first.trials) == 2
    assert found.points[2].error is None and found.points[2].operations == 3.0
    assert found.points[1].operations is None
    assert found.counts == {"open": 0, "finished": 6, "stopped": 1, "failed": 1}


def test_one_seed_has_no_deviation_and_others_seeds_do_not_count() -> None:
    trials = Trials()
    trials.add({"beta": 1}, 4.0, seed=7)
    trials.add({"beta": 1}, 9.0, seed=0)
    (point,) = find(search_of(axis("beta", 1, 2), seeds=(7,)), trials.records).ranked
    assert point.error is not None
    assert point.error.by_seed == {7: 4.0} and point.error.deviation is None


def test_a_point_that_is_thought_of_twice_is_one() -> None:
    trials = Trials()
    trials.add({"beta": 1, "sources": ("a",)}, 4.0)
    again = trials.records[0]
    later = replace(again.trial, number=1, point_number=1, seed=1)
    trials.records.append(replace(again, trial=later, reports=()))
    trials.add({"sources": ("a",), "beta": 1}, 6.0, seed=1)
    trials.add({"sources": ("a",), "beta": 1}, 7.0, seed=1)
    (point,) = find(search_of(axis("beta", 1), seeds=(0, 1)), trials.records).points
    assert point.number == 0 and len(point.trials) == 4
    assert point.error is not None and point.error.by_seed == {0: 4.0, 1: 6.0}


def test_a_search_without_trials_says_nothing() -> None:
    found = find(search_of(axis("beta", 1, 2)), [])
    assert found.points == found.ranked == found.sensitivities == found.subsets == found.worth == ()
    assert found.fronts == {"operations": (), "teachers": ()}


# Along axes


def test_errors_along_an_axis_with_all_else_equal() -> None:
    search = search_of(
        axis("beta", 0.001, 0.1, 1.0), axis("arm", "x", "y"), axis("on", True, False)
    )
    trials = Trials()
    errors = iter(range(1, 20))
    for beta, arm, is_on in product((1.0, 0.001, 0.1), ("x", "y"), (True, False)):
        state: State = "stopped" if (beta, arm, is_on) == (0.1, "y", False) else "finished"
        trials.add({"beta": beta, "arm": arm, "on": is_on}, float(next(errors)), state=state)
    found = find(search, trials.records)
    (sensitivity,) = found.sensitivities  # of numbers only
    assert sensitivity.axis == "beta" and sensitivity.is_log and not sensitivity.is_scatter
    labels = ["arm=x, on=True", "arm=x, on=False", "arm=y, on=True", "arm=y, on=False"]
    assert [line.label for line in sensitivity.lines] == labels
    first, *_, last = sensitivity.lines
    assert first.xs == (0.001, 0.1, 1.0)
    assert [error.mean for error in first.errors] == [5.0, 9.0, 1.0]
    assert last.xs == (0.001, 1.0)


@pytest.mark.parametrize(
    ("values", "more", "is_log"),
    [
        ((0.0, 0.1, 10.0), {}, False),
        ((0.1, 1.0, 9.9), {}, False),
        ((0.1, 1.0, 10.0), {}, True),
        ((0.1, 0.2), {"low": 0.1, "high": 0.2, "is_log": True}, True),
        ((-100, 1), {}, False),
    ],
)
def test_two_decades_need_a_logarithm(
    values: tuple[float, ...], more: dict[str, Any], is_log: bool
) -> None:
    trials = Trials()
    for value in values:
        trials.add({"x": value}, 1.0)
    (found,) = find(search_of(axis("x", *values, **more)), trials.records).sensitivities
    assert found.is_log == is_log
    assert [(line.label, line.xs) for line in found.lines] == [("", values)]


def test_points_at_random_are_marks() -> None:
    axes = (Axis(name="x", low=0.0, high=1.0), Axis(name="y", low=0.0, high=1.0))
    trials = Trials()
    for x, y in ((0.5, 0.1), (0.2, 0.7), (0.9, 0.7), (0.3, 0.4), (0.1, 0.6)):
        trials.add({"x": x, "y": y}, x + y)
    drawn = by_axis(find(search_of(*axes, sampler="random", num_samples=5), trials.records))
    (line,) = drawn["x"].lines
    assert drawn["x"].is_scatter and line.label == ""
    assert line.xs == (0.1, 0.2, 0.3, 0.5, 0.9)
    assert [error.mean for error in line.errors] == pytest.approx([0.7, 0.9, 0.7, 0.6, 1.6])
    # Of a grid, two points that differ in one axis alone are no chance.
    designed = by_axis(find(search_of(*axes), trials.records))
    assert [line.xs for line in designed["x"].lines] == [(0.2, 0.9)]
    assert designed["y"].is_scatter
    # Nor are most of the points.
    trials.add({"x": 0.4, "y": 0.7}, 1.0)
    mostly = by_axis(find(search_of(*axes, sampler="random", num_samples=6), trials.records))
    assert [line.xs for line in mostly["x"].lines] == [(0.2, 0.4, 0.9)]


def test_at_most_so_many_lines_the_longest_and_best() -> None:
    names = [f"n{k}" for k in range(MAX_LINES + 3)]
    search = search_of(axis("x", 1, 2, 3), axis("arm", *names))
    trials = Trials()
    for x, (k, name) in product((1, 2, 3), enumerate(names)):
        if (x, k) != (3, 0):  # the best one, but shorter
            trials.add({"x": x, "arm": name}, float(k + x))
    (found,) = find(search, trials.records).sensitivities
    assert [line.label for line in found.lines] == [f"arm=n{k}" for k in range(1, MAX_LINES + 1)]


def test_curves_against_the_data_have_what_stopped_trials_finished() -> None:
    options = {"scheduler": "asha", "fidelity": "fraction", "fractions": (0.25, 0.5, 1.0)}
    search = search_of(axis("arm", "p", "q", "r"), seeds=(0, 1), **options)
    trials = Trials()
    for seed in (0, 1):
        trials.add({"arm": "p"}, {0.25: 9.0, 0.5: 7.0, 1.0: 5.0 + seed}, seed=seed)
        stopped: State = "stopped" if seed else "finished"
        levels = {0.25: 8.0, 0.5: 6.0 + seed} | ({} if seed else {1.0: 1.0})
        trials.add({"arm": "q"}, levels, seed=seed, state=stopped)
        trials.add({"arm": "r"}, {0.25: 3.0}, seed=seed, state="stopped")
    found = find(search, trials.records)
    assert [point.label for point in found.ranked] == ["arm=p"]
    curves = by_axis(found)["data.fraction"]
    assert [(line.label, line.xs) for line in curves.lines] == [
        ("arm=p", (0.25, 0.5, 1.0)),
        ("arm=q", (0.25, 0.5, 1.0)),
    ]
    assert [error.by_seed for error in curves.lines[1].errors] == [
        {0: 8.0, 1: 8.0},
        {0: 6.0, 1: 7.0},
        {0: 1.0},
    ]
    assert not curves.is_log and not curves.is_scatter


def test_a_finished_trial_below_the_last_fraction_is_not_ranked() -> None:
    options = {"scheduler": "asha", "fidelity": "fraction", "fractions": (0.5, 1.0)}
    trials = Trials()
    trials.add({"arm": "p"}, {0.5: 1.0})
    assert find(search_of(axis("arm", "p"), **options), trials.records).ranked == ()


# Sources


def worth_by_orders(errors_S: Errors, sources: Sequence[str]) -> np.ndarray:
    """Shapley values by definition: the mean gain of a source over all orders of joining."""
    orders = list(permutations(sources))
    gains_MS = np.zeros((len(sources), len(next(iter(errors_S.values())))))
    for order in orders:
        for place, source in enumerate(order):
            before = frozenset(order[:place])
            gains_MS[sources.index(source)] += errors_S[before] - errors_S[before | {source}]
    return gains_MS / len(orders)


def all_sets(sources: Sequence[str]) -> list[frozenset[str]]:
    return [
        frozenset(each)
        for each in chain.from_iterable(
            combinations(sources, size) for size in range(len(sources) + 1)
        )
    ]


@st.composite
def games(draw: st.DrawFn) -> tuple[Errors, tuple[str, ...]]:
    """Errors of all sets of 1 to 4 sources with 1 to 3 seeds."""
    sources = tuple("abcd"[: draw(st.integers(1, 4))])
    seeds = draw(st.integers(1, 3))
    numbers = st.floats(0.0, 100.0, width=32)
    return {
        each: np.array(draw(st.lists(numbers, min_size=seeds, max_size=seeds)))
        for each in all_sets(sources)
    }, sources


@settings(max_examples=60, deadline=None)
@given(games())
def test_shapley_values_are_those_of_all_orders(game: tuple[Errors, tuple[str, ...]]) -> None:
    errors_S, sources = game
    found_MS = shapley_values(errors_S, sources)
    assert is_complete(errors_S, sources) and found_MS is not None
    np.testing.assert_allclose(found_MS, worth_by_orders(errors_S, sources), atol=1e-9)
    total_S = errors_S[frozenset()] - errors_S[frozenset(sources)]
    np.testing.assert_allclose(found_MS.sum(0), total_S, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(games(), st.randoms(use_true_random=False))
def test_shapley_values_of_some_sets(game: tuple[Errors, tuple[str, ...]], random: Any) -> None:
    """Efficient whatever is missing; exact where the game is additive, once they follow at all."""
    errors_S, sources = game
    gains = {source: errors_S[frozenset((source,))] for source in sources}
    additive_S = {
        each: 500 - sum((gains[source] for source in each), start=0 * errors_S[each])
        for each in all_sets(sources)
    }
    ends = (frozenset[str](), frozenset(sources))
    kept = [each for each in all_sets(sources) if each in ends or random.random() < 0.6]
    found_MS = shapley_values({each: errors_S[each] for each in kept}, sources)
    if found_MS is not None:
        np.testing.assert_allclose(
            found_MS.sum(0), errors_S[ends[0]] - errors_S[ends[1]], atol=1e-9
        )
        found_MS = shapley_values({each: additive_S[each] for each in kept}, sources)
        assert found_MS is not None
        np.testing.assert_allclose(found_MS, [gains[s] for s in sources], atol=1e-6)
    else:
        assert len(kept) < len(all_sets(sources))


@settings(max_examples=40, deadline=None)
@given(games(), st.floats(-5, 5))
def test_equal_sources_are_worth_the_same_and_idle_ones_nothing(
    game: tuple[Errors, tuple[str, ...]], gain: float
) -> None:
    errors_S, sources = game
    twins, idle = ("x", "y"), "z"
    players = (*sources[:2], *twins, idle)
    made = {
        each: errors_S[each & frozenset(sources[:2])] - gain * len(each & set(twins)) ** 2
        for each in all_sets(players)
    }
    found_MS = shapley_values(made, players)
    assert found_MS is not None
    np.testing.assert_allclose(found_MS[-3], found_MS[-2], atol=1e-8)
    np.testing.assert_allclose(found_MS[-1], 0, atol=1e-8)
    np.testing.assert_allclose(found_MS[-2], 2 * gain, atol=1e-8)  # half of gain x 4


def test_what_does_not_follow_is_not_said() -> None:
    one_S = np.array([1.0])
    pairs = {frozenset(each): one_S for each in ("", "abc", "a", "ab")}
    assert shapley_values(pairs, "abc") is not None
    for missing in ("", "abc", "a"):
        fewer = {each: one for each, one in pairs.items() if each != frozenset(missing)}
        assert shapley_values(fewer, "abc") is None
    assert shapley_values({}, "") is None
    # a alone and b with c say the same: c and b are not told apart.
    same = {frozenset(each): one_S for each in ("", "abc", "a", "bc")}
    assert shapley_values(same, "abc") is None


def subset_trials(errors: Mapping[str, Sequence[float]], **facts: Any) -> list[TrialRecord]:
    """Trials of sets of sources at two values of beta, of which the second is worse."""
    trials = Trials()
    for letters, by_seed in errors.items():
        for (seed, error), beta in product(enumerate(by_seed), (1, 2)):
            point: Point = {"sources": tuple(letters), "beta": beta}
            trials.add(point, error + beta - 1, seed=seed, sources=tuple(letters), **facts)
    return trials.records


def test_sets_of_sources_by_their_best_points() -> None:
    search = search_of(axis("sources", (), ("a",)), axis("beta", 1, 2), seeds=(0, 1))
    errors = {
        "abc": (1.0, 3.0),
        "": (9.0, 10.0),
        "ac": (2.0, 2.5),
        "c": (4.0, 5.0),
        "a": (8.0, 6.0),
    }
    found = find(search, subset_trials(errors, gates=(0.3, 0.2, 0.1)))
    assert [subset.sources for subset in found.subsets] == [
        (),
        ("a",),
        ("c",),
        ("a", "c"),
        ("a", "b", "c"),
    ]
    assert [subset.num_points for subset in found.subsets] == [2] * 5
    assert all(subset.point.point["beta"] == 1 for subset in found.subsets)
    worth = {each.source: each for each in found.worth}
    assert tuple(worth) == NAMES
    # a joins none and c; b joins a and c; c joins none and a.
    assert [worth[name].num_pairs for name in NAMES] == [2, 1, 2]
    gains_of_a = worth["a"].marginal
    assert gains_of_a is not None
    assert gains_of_a.by_seed == {0: (1.0 + 2.0) / 2, 1: (4.0 + 2.5) / 2}
    assert not any(each.is_exact for each in found.worth)
    values = [each.shapley for each in found.worth]
    assert sum(value.by_seed[1] for value in values if value) == pytest.approx(10.0 - 3.0)
    assert [each.gate for each in found.worth] == [0.3, 0.2, 0.1]


def test_other_methods_and_controls_are_no_sets_of_sources() -> None:
    arms = {"scratch": ((), 9.0), "finetune-a": (("a",), 1.0), "tmu": (NAMES, 6.0)}
    arms |= {"tmu-shuffled": (NAMES, 2.0), "tmu-scratch": ((), 3.0)}
    methods = {"finetune-a": "finetune", "scratch": "scratch", "tmu-scratch": "tmu_scratch"}
    trials = Trials()
    for arm, (sources, error) in arms.items():
        trials.add({"arm": arm}, error, sources=sources, method=methods.get(arm, "tmu"))
    found = find(search_of(axis("arm", *arms)), trials.records)
    assert [(each.sources, each.point.point["arm"]) for each in found.subsets] == [
        ((), "scratch"),
        (NAMES, "tmu"),
    ]


def test_the_worth_of_sources_by_all_sets() -> None:
    errors = {"": (9.0, 5.0), "a": (7.0, 6.0), "b": (8.0, 4.0), "ab": (5.0, 1.0)}
    search = search_of(axis("sources", (), ("a",)), axis("beta", 1, 2), seeds=(0, 1))
    found = find(search, subset_trials(errors))
    expected = worth_by_orders({frozenset(k): np.array(v) for k, v in errors.items()}, ("a", "b"))
    for m, each in enumerate(found.worth):
        assert each.is_exact and each.shapley is not None and each.gate is None
        assert list(each.shapley.by_seed.values()) == pytest.approx(list(expected[m]))
        # Of two sources, the mean over both sets without one is its Shapley value.
        assert each.marginal is not None
        assert each.marginal.by_seed == pytest.approx(each.shapley.by_seed)


def test_the_worth_of_one_source_is_the_difference() -> None:
    trials = subset_trials({"": (9.0,), "b": (7.0,)})
    (found,) = find(search_of(axis("sources", (), ("b",))), trials).worth
    assert found.source == "b" and found.is_exact
    assert found.shapley is not None and found.shapley.by_seed == {0: 2.0}


def test_pairs_of_sets() -> None:
    errors_S = {frozenset(each): np.array([float(len(each))]) for each in ("", "a", "ab")}
    assert marginal_gains(errors_S, "a").tolist() == [[-1.0]]
    assert marginal_gains(errors_S, "b").tolist() == [[-1.0]]
    assert len(marginal_gains(errors_S, "c")) == 0


# Cost


def costly(*pairs: tuple[float, float | None]) -> list[TrialRecord]:
    trials = Trials()
    for number, (error, operations) in enumerate(pairs):
        sources = NAMES[: number % 4]
        trials.add({"n": number}, error, operations=operations, sources=sources)
    return trials.records


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12, unique=True))
def test_a_front_has_every_point_that_none_beats(pairs: list[tuple[int, int]]) -> None:
    records = costly(*((float(error), float(cost)) for error, cost in pairs))
    fronts = find(search_of(axis("n", *range(12))), records).fronts
    costs = {
        "operations": [record.operations or 0.0 for record in records],
        "teachers": [float(len(record.sources)) for record in records],
    }
    for cost, front in fronts.items():
        both = [(pairs[n][0], costs[cost][n]) for n in range(len(pairs))]
        unbeaten = {
            mine
            for mine in both
            if not any(a <= mine[0] and b <= mine[1] for a, b in both if (a, b) != mine)
        }
        # Of several points with the same error and cost, one stands for all.
        assert {both[n] for n in front} == unbeaten and len(front) == len(unbeaten)
        assert [costs[cost][n] for n in front] == sorted(costs[cost][n] for n in front)


def test_points_whose_cost_is_unknown_are_on_no_front() -> None:
    found = find(search_of(axis("n", 0, 1)), costly((1.0, None), (2.0, 5.0)))
    assert found.fronts == {"operations": (1,), "teachers": (0,)}


# For other programs


def test_the_record_is_plain_json() -> None:
    search = search_of(
        axis("sources", (), ("a",), when={"beta": (1,)}), axis("beta", 1, 2), seeds=(0, 1)
    )
    records = subset_trials({"": (9.0, 8.0), "ab": (9.5, 8.5)}, gates=(math.nan, 0.5))
    text = json.dumps(as_record(search, find(search, records)), allow_nan=False)
    read = json.loads(text)
    assert read["search"] == "my-search" and read["space"]["axes"][1]["values"] == [1, 2]
    assert read["options"]["seeds"] == [0, 1] and read["counts"]["finished"] == 8
    best = read["points"][read["ranked"][0]]
    assert best["error"] == {
        "mean": 8.5,
        "deviation": pytest.approx(stdev((9.0, 8.0))),
        "by_seed": {"0": 9.0, "1": 8.0},
    }
    assert best["trials"][1]["seed"] == 1 and best["trials"][1]["state"] == "finished"
    assert best["trials"][1]["reports"][0]["error"] == 8.0
    assert [subset["point"] for subset in read["subsets"]] == [0, 2]
    assert read["points"][2]["gates"] == [None, 0.5]
    assert read["points"][2]["sources"] == ["a", "b"] and read["points"][2]["operations"] is None
    assert read["worth"][1]["gate"] == 0.5 and read["fronts"]["teachers"] == [0]
