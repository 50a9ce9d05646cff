"""Searches in virtual time: nothing is lost, nothing happens twice, and good points are found."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import search_curves
from benchmarks.search_simulation import __main__ as command
from benchmarks.search_simulation.events import (
    Cluster,
    Course,
    Scheduler,
    SimulatedTrial,
    Simulation,
)
from benchmarks.search_simulation.landscape import Landscape
from benchmarks.search_simulation.report import conclusion
from benchmarks.search_simulation.study import (
    ALL_SEEDS,
    CONTENDERS,
    DEFAULT,
    NONE,
    SCENARIOS,
    Contender,
    Measures,
    Scenario,
    choose,
    measure,
    quick,
    simulate,
)
from tuning.journal import Trial
from tuning.plan import SearchConfig
from tuning.samplers import ListSampler
from tuning.space import SOURCES, Point

BETA = "transfer.beta"
BETAS = (0.01, 0.1, 1.0)
CALM = Cluster(
    places=2,
    places_per_node=1,
    slow_nodes=0,
    speed_spread=0.0,
    startup_hours=0.5,
    crashes_per_hour=0.0,
)
STEPS_K = np.array([10, 20, 30, 40])


class Recording:
    """A scheduler that hears, and stops one trial at a level."""

    def __init__(self, stop: str = "", at: float = 0) -> None:
        self.stop = stop, at
        self.heard: list[tuple[str, float]] = []
        self.ended: list[str] = []

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        pass

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
        self.heard.append((trial.trial_id, result["level"]))
        return "STOP" if self.heard[-1] == self.stop else "CONTINUE"

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        self.ended.append(trial.trial_id)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.ended.append(trial.trial_id)


def recorded(noise: float = 0.0) -> dict[str, Any]:
    """Curves of 16 validations that never cross: 30 is the lowest, at beta = 0.1 with both."""
    curves = []
    for sources, (place, beta), seed in itertools.product(
        (["1"], ["1", "2"]), enumerate(BETAS), (0, 1)
    ):
        last = 30.0 + 4 * abs(place - 1) + 3 * (len(sources) == 1)
        steps = list(range(8, 129, 8))
        noisy = last * math.exp(noise * (1 if seed else -1))
        curves.append(
            {
                "point": {SOURCES: sources, BETA: beta},
                "seed": seed,
                "steps": steps,
                "errors": [noisy * (1 + 8 / step - 8 / 128) for step in steps],
                "operations_per_step": 1e8 * len(sources),
            }
        )
    return {
        "recipe": "r",
        "git_revision": "g",
        "axes": [
            {"name": SOURCES, "values": [["1"], ["1", "2"]], "is_log": False},
            {"name": BETA, "values": list(BETAS), "is_log": True},
        ],
        "seeds": [0, 1],
        "curves": curves,
    }


def course(level: float, hours: float = 4.0, checkpoint_every: int = 20) -> Course:
    return Course(STEPS_K, level + 1 / STEPS_K, hours, checkpoint_every)


def simulated(
    num_points: int,
    cluster: Cluster,
    *,
    course_of: Callable[[Trial], Course] = lambda trial: course(trial.point_number),
    scheduler: Scheduler | None = None,
    retries: int = 2,
    seed: int = 5,
) -> tuple[SimulatedTrial, ...]:
    """A search over so many points, of one seed each."""
    points: list[Point] = [{"x": number} for number in range(num_points)]
    return Simulation(
        ListSampler(iter(points)),
        (0,),
        scheduler or Recording(),
        course_of,
        cluster,
        retries=retries,
        seed=seed,
    ).run()


def small(name: str, num_points: int = 40) -> Scenario:
    return replace(
        SCENARIOS[name],
        num_points=num_points,
        cluster=replace(SCENARIOS[name].cluster, places=6, places_per_node=1),
    )


# From recorded curves to those of trials


def test_recorded_points_keep_their_curves_and_those_between_are_geometric_means() -> None:
    landscape = Landscape(recorded())
    both = {SOURCES: ("1", "2")}
    at_a_tenth = landscape.truth_K({**both, BETA: 0.1})
    assert at_a_tenth[-1] == pytest.approx(30.0)
    assert at_a_tenth[0] == pytest.approx(30.0 * (1 + 1 - 1 / 16))
    between = landscape.truth_K({**both, BETA: math.sqrt(0.1)})
    assert between[-1] == pytest.approx(math.sqrt(30.0 * 34.0))
    assert landscape.truth_K({SOURCES: ("1",), BETA: 1.0})[-1] == pytest.approx(37.0)
    assert landscape.relative_cost({**both, BETA: 0.1}) == pytest.approx(0.2 / 0.15)


def test_noise_has_the_spread_between_seeds_and_is_a_function_of_its_key() -> None:
    landscape = Landscape(recorded(noise=0.03))
    point: Point = {SOURCES: ("1",), BETA: 0.1}
    # Two seeds at +-0.03 have the standard deviation 0.03 * sqrt(2), with S - 1.
    assert landscape.spread_of_final == pytest.approx(0.03 * math.sqrt(2))
    ends = np.log([landscape.curve_K(point, 0, key)[-1] / 33.0 for key in range(400)])
    assert ends.std() == pytest.approx(0.03 * math.sqrt(2), rel=0.02)
    assert abs(ends.mean()) < 0.01
    assert np.array_equal(landscape.curve_K(point, 1, 2), landscape.curve_K(point, 1, 2))
    assert landscape.truth_K(point)[-1] == pytest.approx(33.0)


def test_the_space_has_the_recorded_ranges_and_a_hole_in_the_record_is_refused() -> None:
    record = recorded()
    beta = Landscape(record).space.axis(BETA)
    assert beta is not None and (beta.low, beta.high, beta.is_log) == (0.01, 1.0, True)
    with pytest.raises(ValueError, match="11 curves were recorded for 12"):
        Landscape({**record, "curves": record["curves"][1:]})


# Events


def test_a_calm_cluster_takes_the_hours_that_can_be_counted() -> None:
    trials = simulated(5, CALM)
    # Three rounds on two places, of half an hour to start and four to train.
    assert [(s.start, s.end) for trial in trials for s in trial.spans] == [
        (0.0, 4.5), (0.0, 4.5), (4.5, 9.0), (4.5, 9.0), (9.0, 13.5),
    ]  # fmt: skip
    assert [trial.spent_hours for trial in trials] == [4.0] * 5
    assert {trial.state for trial in trials} == {"finished"}


@pytest.mark.parametrize("contender", [NONE, DEFAULT, CONTENDERS[-1]], ids=lambda c: c.name)
def test_no_place_runs_two_trials_at_once_and_every_trial_is_accounted_for(
    contender: Contender,
) -> None:
    scenario = small("rough")
    trials = simulate(Landscape(recorded(0.03)), scenario, contender, 0)
    assert [trial.trial.number for trial in trials] == list(range(40))
    assert {trial.state for trial in trials} <= {"finished", "stopped", "failed"}
    by_place: dict[int, list[tuple[float, float]]] = {}
    for trial in trials:
        assert len(trial.spans) == trial.failures + (trial.state != "failed")
        assert all(a.end <= b.start for a, b in itertools.pairwise(trial.spans))
        for span in trial.spans:
            by_place.setdefault(span.place, []).append((span.start, span.end))
    assert sorted(by_place) == list(range(6))
    for spans in by_place.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(spans)))
    assert any(trial.failures for trial in trials)


def test_a_straggler_holds_its_own_place_only() -> None:
    slow = replace(CALM, slow_nodes=1, slow_factor=100.0)
    trials = simulated(9, slow)
    places = [trial.spans[0].place for trial in trials]
    assert places == [0] + [1] * 8
    assert trials[-1].spans[-1].end == 8 * 4.5 < trials[0].spans[0].end == 0.5 + 400.0


class Doomed(Cluster):
    """Every start dies after so long."""

    def hours_to_crash(self, *key: int) -> float:
        return 3.0


def test_a_crash_is_paid_for_and_retried_from_the_newest_checkpoint() -> None:
    # 10 iterations an hour, from half an hour after the start; a checkpoint at every 20th.
    doomed = Doomed(**vars(CALM))
    (trial,) = simulated(1, doomed)
    # Dies at iteration 25, starts again at 20, and ends 2.5 hours later, before it dies again.
    assert trial.state == "finished"
    assert trial.failures == 1
    assert [(s.start, s.end) for s in trial.spans] == [(0.0, 3.0), (3.0, 5.5)]
    assert trial.spent_hours == pytest.approx(2.5 + 2.0)
    (lost,) = simulated(1, doomed, course_of=lambda _: course(1, checkpoint_every=40))
    assert (lost.state, lost.failures, len(lost.spans)) == ("failed", 3, 3)
    assert lost.num_heard == 2
    (given_up,) = simulated(1, doomed, retries=0)
    assert (given_up.state, given_up.failures) == ("failed", 1)


def test_a_scheduler_hears_every_level_once_and_what_it_stops_frees_its_place() -> None:
    scheduler = Recording("00000", 20)
    trials = simulated(3, CALM, scheduler=scheduler)
    assert [t.state for t in trials] == ["stopped", "finished", "finished"]
    assert trials[0].spans[0].end == trials[2].spans[0].start == 2.5
    assert trials[0].spent_hours == 2.0
    assert scheduler.ended == ["00000", "00001", "00002"]
    crashing = Recording()
    simulated(1, Doomed(**vars(CALM)), scheduler=crashing)
    assert crashing.heard == [("00000", 10), ("00000", 20), ("00000", 30), ("00000", 40)]
    losing = Recording()
    losing_course = course(1, checkpoint_every=40)
    simulated(1, Doomed(**vars(CALM)), scheduler=losing, course_of=lambda _: losing_course)
    assert losing.heard == [("00000", 10), ("00000", 20)]  # by three starts
    last = Recording("00000", 40)
    assert simulated(1, CALM, scheduler=last)[0].state == "finished"  # too late to stop it


# Studies


@pytest.mark.parametrize("contender", [NONE, DEFAULT, ALL_SEEDS], ids=lambda c: c.name)
def test_every_point_has_each_seed_once_and_later_ones_if_the_first_finished(
    contender: Contender,
) -> None:
    trials = simulate(Landscape(recorded(0.03)), small("seeds", 12), contender, 0)
    by_point: dict[int, list[SimulatedTrial]] = {}
    for trial in trials:
        by_point.setdefault(trial.trial.point_number, []).append(trial)
    assert len(by_point) == 12
    for first, *others in by_point.values():
        whole = contender != DEFAULT or first.state == "finished"
        assert [t.trial.seed for t in (first, *others)] == ([0, 1, 2] if whole else [0])
        if contender == DEFAULT:
            assert all(t.state != "stopped" for t in others)
            assert all(first.spans[-1].end <= t.spans[0].start for t in others)
    stopped = [t.trial.seed for t in trials if t.state == "stopped"]
    expected = {NONE.name: set(), DEFAULT.name: {0}, ALL_SEEDS.name: {0, 1, 2}}
    assert set(stopped) == expected[contender.name]


def test_without_noise_and_stopping_the_best_point_is_chosen() -> None:
    landscape = Landscape(recorded(0.05), noise=0.0)
    for name in ("usual", "seeds"):
        scenario = small(name)
        found = measure(landscape, scenario, simulate(landscape, scenario, NONE, 1), 1)
        assert found.regret == 0.0
        assert (found.stopped, found.top_stopped) == (0, 0.0)
    noisy, scenario = Landscape(recorded(0.2)), small("usual")
    searches = [simulate(noisy, scenario, NONE, seed) for seed in range(4)]
    regrets = [measure(noisy, scenario, each, s).regret for s, each in enumerate(searches)]
    assert max(regret or 0.0 for regret in regrets) > 0


def test_curves_that_never_cross_lose_little_to_early_stopping_and_cost_less() -> None:
    landscape, scenario = Landscape(recorded()), small("usual", 120)
    none, asha = (
        measure(landscape, scenario, simulate(landscape, scenario, contender, 0), 0)
        for contender in (NONE, DEFAULT)
    )
    assert none.compute == pytest.approx(1.0, abs=0.05)
    assert asha.compute < 0.5
    assert asha.hours < 0.6 * none.hours
    assert asha.regret is not None and asha.regret < 0.02
    assert asha.finished + asha.stopped + asha.failed == 120


def test_the_same_seed_gives_the_same_search_and_others_others() -> None:
    landscape, scenario = Landscape(recorded(0.03)), small("rough", 20)
    first, again, other = (
        [(t.trial, t.state, t.spans) for t in simulate(landscape, scenario, DEFAULT, seed)]
        for seed in (3, 3, 4)
    )
    assert first == again != other
    shaky = replace(CALM, speed_spread=0.3)
    assert simulated(1, shaky)[0].spans == simulated(1, shaky)[0].spans
    assert simulated(1, shaky)[0].spans != simulated(1, shaky, seed=6)[0].spans


def test_chosen_is_the_lowest_mean_of_points_whose_seeds_all_finished() -> None:
    errors = {0: (1.0, 1.0), 1: (2.0, 6.0), 2: (3.0, 4.0), 3: (9.0, 9.0)}

    def trials_of(number: int) -> list[SimulatedTrial]:
        made = simulated(2, CALM, course_of=lambda trial: course(errors[number][trial.number]))
        return [replace(t, trial=replace(t.trial, point={"x": number})) for t in made]

    points = [trials_of(number) for number in errors]
    points[0][1].state = "failed"
    assert choose(points) == {"x": 2}
    assert choose(points[:1]) is None


def test_contenders_see_the_same_points_and_noise() -> None:
    landscape, scenario = Landscape(recorded(0.03)), small("usual", 20)
    none, asha = (simulate(landscape, scenario, c, 0) for c in (NONE, DEFAULT))
    for a, b in zip(none, asha, strict=True):
        assert a.trial.point == b.trial.point
        assert np.array_equal(a.course.errors_K, b.course.errors_K)


def test_the_quick_median_rule_decides_as_tunes_own() -> None:
    from ray.tune.schedulers import MedianStoppingRule, TrialScheduler

    assert (TrialScheduler.STOP, TrialScheduler.CONTINUE) == ("STOP", "CONTINUE")

    def rule() -> Scheduler:
        made: Scheduler = MedianStoppingRule(
            time_attr="level", metric="error", mode="min", grace_period=10, min_samples_required=3
        )
        return made

    def course_of(trial: Trial) -> Course:
        return course(37 * trial.number % 11, hours=1 + trial.number % 3)

    shaky = replace(CALM, places=4, crashes_per_hour=0.1, speed_spread=0.3)
    slow, fast = (
        simulated(40, shaky, course_of=course_of, scheduler=each)
        for each in (rule(), quick(rule()))
    )
    assert [t.state for t in fast] == [t.state for t in slow]
    assert {"stopped", "finished"} <= {t.state for t in fast}


def test_the_default_is_that_of_searches() -> None:
    assert DEFAULT in CONTENDERS
    assert (DEFAULT.reduction, DEFAULT.grace) == (SearchConfig.reduction, 1 / 8)


def test_the_conclusion_takes_the_cheapest_that_loses_hardly_anything() -> None:
    def columns(regret: float | None, compute: float) -> dict[str, list[float | None]]:
        return {"regret": [0.01, regret], "compute": [compute, compute]}

    cheap = "asha, reduction 4, grace 1/8"
    record: dict[str, Any] = {
        "curves": {"spread_of_final": 0.08},
        "scenarios": {
            "usual": {
                "contenders": {
                    NONE.name: columns(0.01, 1.0),
                    DEFAULT.name: columns(0.04, 0.3),
                    cheap: columns(0.06, 0.2),
                }
            }
        },
    }
    said = conclusion(record)
    assert f"(2.00 %) in any scenario: **{DEFAULT.name}**. " in said
    assert f"{DEFAULT.name}: 30 % of the compute, at worst +1.50 %" in said
    record["scenarios"]["usual"]["contenders"][DEFAULT.name] = columns(None, 0.3)
    said = conclusion(record)
    assert said.startswith("Every early stopping loses more")
    assert "30 % of the compute, but some searches were left without a point" in said
    record["scenarios"]["usual"]["contenders"][cheap] = columns(0.04, 0.2)
    assert f"**{cheap}**" in conclusion(record)
    record["scenarios"]["usual"]["contenders"][DEFAULT.name] = columns(0.04, 0.3)
    assert f"**{cheap}**" in conclusion(record)
    record["scenarios"]["usual"]["contenders"][cheap] = columns(0.04, 0.4)
    assert f"**{DEFAULT.name}**" in conclusion(record)


def test_the_table_of_curves_has_the_lowest_errors_so_far() -> None:
    record = {**recorded(0.01), "num_steps": 128, "machine": {"cpu": "C"}}
    for curve in record["curves"]:
        curve["errors"][-1] += 50.0  # what it ends with is the weights' of step 120
    row = "| 1+2 | 0.1 | 43.1 ± 0.6 | 31.9 ± 0.5 | 30.1 ± 0.4 | 0.2 |"
    assert row in search_curves.table(record).splitlines()


def test_the_command_writes_a_table_for_every_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SCENARIOS", {"usual": small("usual", 5)})
    monkeypatch.setattr(
        command,
        "compare",
        lambda *_: {NONE.name: {field.name: [0.0, 1.0] for field in fields(Measures)}},
    )
    curves = tmp_path / "curves.json"
    curves.write_text(json.dumps(recorded(0.03)))
    command.main(["--curves", str(curves), "--out", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert "| none | 50.00 ± 70.71 |" in text
    assert "12 curves of 128 iterations of r, seeds 0, 1" in text
