"""What is compared: schedulers, on the same trials, clusters and crashes; and how well they do."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal

from benchmarks.provenance import say
from benchmarks.search_simulation.events import (
    Cluster,
    Course,
    Scheduler,
    SimulatedTrial,
    Simulation,
)
from benchmarks.search_simulation.landscape import Landscape
from tuning.journal import Trial
from tuning.plan import SearchConfig
from tuning.samplers import make_sampler
from tuning.space import Point

HOURS_OF_TRIAL = 2.0
"""Of a whole trial, on average over the recorded points."""
CHECKPOINT_EVERY = 2
"""Validations, as the recorded runs have it."""
TOP_SHARE = 0.01
"""Points that count as best."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A kind of search on a kind of cluster."""

    about: str
    sampler: Literal["random", "tpe"] = "random"
    num_points: int = 1000
    seeds: tuple[int, ...] = (0,)
    retries: int = SearchConfig.retries
    cluster: Cluster = field(default_factory=Cluster)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to stop trials."""

    name: str
    scheduler: Literal["none", "asha", "median"]
    reduction: float = SearchConfig.reduction
    grace: float | None = None
    """The first rung, or when the median rule begins, as a share of a run's iterations."""
    share_of_points: float = 1.0
    """Of the scenario's points that are tried."""
    judges_all_seeds: bool = False
    """All seeds of a point are trained at once, and each is judged by itself; else the first one
    is, and the others follow when it finished."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What one simulated search came to."""

    regret: float | None
    """Expected error of the chosen point over that of the best one that random search tries with
    this seed, minus 1; None without a whole point."""
    compute: float
    """Of training, crashes' losses included, over what all trials of the scenario take to the
    end."""
    hours: float
    """From the first start to the last end."""
    top_stopped: float | None
    """Share of the best points (those that come among the `TOP_SHARE` best of random search) that
    the scheduler stopped; None: none of them was tried."""
    finished: int
    stopped: int
    failed: int


SCENARIOS = {
    "usual": Scenario(about="1,000 points, one seed each"),
    "seeds": Scenario(about="333 points, three seeds each", num_points=333, seeds=(0, 1, 2)),
    "rough": Scenario(
        about="1,000 points; ten times the crashes, 4 of 16 nodes slow",
        cluster=Cluster(crashes_per_hour=0.5, slow_nodes=4),
    ),
    "small": Scenario(
        about="24 points on two places",
        num_points=24,
        cluster=Cluster(places=2, slow_nodes=0),
    ),
    "tpe": Scenario(
        about="100 points that TPE asks for, on 16 places",
        sampler="tpe",
        num_points=100,
        cluster=Cluster(places=16),
    ),
}

NONE = Contender(name="none", scheduler="none")
DEFAULT = Contender(name="asha, reduction 3, grace 1/8", scheduler="asha", reduction=3, grace=1 / 8)
"""What `SearchConfig` says if it is not told."""
FEWER = replace(NONE, name="none, a third of the points", share_of_points=1 / 3)
CONTENDERS = (
    NONE,
    FEWER,
    *(
        replace(
            DEFAULT,
            name=f"asha, reduction {reduction}, grace 1/{part}",
            reduction=reduction,
            grace=1 / part,
        )
        for reduction in (2, 3, 4)
        for part in (16, 8, 4)
    ),
    *(
        Contender(name=f"median, grace 1/{part}", scheduler="median", grace=1 / part)
        for part in (8, 4)
    ),
)

ALL_SEEDS = replace(DEFAULT, name=f"{DEFAULT.name}, every seed judged", judges_all_seeds=True)
"""Of scenarios with several seeds."""


def compare(
    recorded: Mapping[str, Any], scenario: Scenario, repetitions: int, processes: int
) -> dict[str, dict[str, list[float | None]]]:
    """All contenders on the same searches.

    Returns:
        By contender and measure, the values of all repetitions.
    """
    say(scenario.about)
    contenders = (*CONTENDERS, ALL_SEEDS) if len(scenario.seeds) > 1 else CONTENDERS
    jobs = [(contender, seed) for contender in contenders for seed in range(repetitions)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(partial(measure_one, recorded, scenario), *zip(*jobs, strict=True)))
    return {
        contender.name: {
            name: [
                getattr(measures, name)
                for (other, _), measures in zip(jobs, found, strict=True)
                if other == contender
            ]
            for name in (field.name for field in fields(Measures))
        }
        for contender in contenders
    }


def measure_one(
    recorded: Mapping[str, Any], scenario: Scenario, contender: Contender, seed: int
) -> Measures:
    """One search, simulated and measured."""
    landscape = Landscape(recorded)
    return measure(landscape, scenario, simulate(landscape, scenario, contender, seed), seed)


def simulate(
    landscape: Landscape, scenario: Scenario, contender: Contender, seed: int
) -> tuple[SimulatedTrial, ...]:
    """One search in virtual time.

    Args:
        landscape: what trials would find.
        scenario: the search and its cluster.
        contender: what stops trials.
        seed: of points, noise, speeds and crashes; contenders with the same one see the same.
    """
    from tuning.scheduling import make_scheduler  # loads Ray, which reading a record does not need

    options = _options(landscape, scenario, contender, seed)
    checkpoint_every = CHECKPOINT_EVERY * int(landscape.steps_K[0])

    def course_of(trial: Trial) -> Course:
        return Course(
            steps_K=landscape.steps_K,
            errors_K=landscape.curve_K(trial.point, seed, trial.point_number, trial.seed),
            hours=HOURS_OF_TRIAL * landscape.relative_cost(trial.point),
            checkpoint_every=checkpoint_every,
        )

    return Simulation(
        make_sampler(landscape.space, options),
        options.seeds,
        quick(make_scheduler(options, landscape.num_steps)),
        course_of,
        scenario.cluster,
        retries=options.retries,
        seed=seed,
        is_staged=contender.scheduler != "none" and not contender.judges_all_seeds,
    ).run()


def measure(
    landscape: Landscape,
    scenario: Scenario,
    trials: Sequence[SimulatedTrial],
    seed: int,
) -> Measures:
    """How well a search did, beside the points that random search has with the same seed."""
    known = [landscape.space.draw(seed, number) for number in range(scenario.num_points)]
    errors = [float(landscape.truth_K(point)[-1]) for point in known]
    whole_hours = sum(HOURS_OF_TRIAL * landscape.relative_cost(point) for point in known)
    points = _by_point(trials)
    chosen = choose(points)
    limit = sorted(errors)[max(1, round(TOP_SHARE * len(errors))) - 1]
    top = [p for p in points if float(landscape.truth_K(p[0].trial.point)[-1]) <= limit]
    states = [trial.state for trial in trials]
    return Measures(
        regret=None if chosen is None else float(landscape.truth_K(chosen)[-1]) / min(errors) - 1,
        compute=sum(trial.spent_hours for trial in trials) / (whole_hours * len(scenario.seeds)),
        hours=max(span.end for trial in trials for span in trial.spans),
        top_stopped=statistics.fmean(any(t.state == "stopped" for t in p) for p in top)
        if top
        else None,
        finished=states.count("finished"),
        stopped=states.count("stopped"),
        failed=states.count("failed"),
    )


def choose(points: Iterable[Sequence[SimulatedTrial]]) -> Point | None:
    """The point of the lowest mean error over its seeds, of those whose trials all finished."""
    whole = [trials for trials in points if all(trial.state == "finished" for trial in trials)]
    if not whole:
        return None
    best = min(whole, key=lambda trials: statistics.fmean(t.result["error"] for t in trials))
    return best[0].trial.point


def quick(scheduler: Scheduler) -> Scheduler:
    """The median rule with averages that it has taken before, which it else takes again and again.

    Those up to a level that a trial has reached no longer change: where it ends, Tune tells the
    rule the last validation twice, but both before any other trial is judged.
    """
    from ray.tune.schedulers import MedianStoppingRule

    if isinstance(scheduler, MedianStoppingRule):
        take = scheduler._running_mean
        taken: dict[tuple[SimulatedTrial, float], float] = {}

        def mean(trial: SimulatedTrial, level: float) -> float:
            key = trial, level
            if key not in taken:
                taken[key] = float(take(trial, level))
            return taken[key]

        scheduler._running_mean = mean
    return scheduler


def _options(
    landscape: Landscape, scenario: Scenario, contender: Contender, seed: int
) -> SearchConfig:
    grace = contender.grace
    return SearchConfig(
        sampler=scenario.sampler,
        num_samples=round(contender.share_of_points * scenario.num_points),
        sampler_seed=seed,
        seeds=scenario.seeds,
        scheduler=contender.scheduler,
        grace_steps=None if grace is None else round(grace * landscape.num_steps),
        reduction=contender.reduction,
        retries=scenario.retries,
    )


def _by_point(trials: Iterable[SimulatedTrial]) -> list[list[SimulatedTrial]]:
    points: dict[int, list[SimulatedTrial]] = {}
    for trial in trials:
        points.setdefault(trial.trial.point_number, []).append(trial)
    return list(points.values())
