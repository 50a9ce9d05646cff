"""Everything that follows from the trials of a search, as numbers: what the report then says.

All errors are of the validation split. What is compared are points, by the mean over their seeds;
only whole trials count, as stopped ones were trained for less.

Deliberately not here: reading runs (`records`), the theory of games (`worth`), words, tables and
charts (`report`).

Legend: M sources, P pairs of sets, S seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeGuard, get_args

import numpy as np

from tmu_dist.ledger.findings import CONTROLS
from tuning.journal import State
from tuning.plan import COSTS, Search
from tuning.records import TrialRecord, source_names
from tuning.space import ARM, FRACTION, Point, Space, Value, key_of
from tuning.worth import is_complete, marginal_gains, shapley_values

MAX_LINES = 8
"""Of one axis; more could not be told apart."""
_DECADES = 100.0
"""Positive values that span this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over seeds."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.by_seed.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds, with S - 1; None for one."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


@dataclass(frozen=True, kw_only=True)
class PointFinding:
    """One point of the space, over its seeds."""

    number: int
    point: Point
    label: str
    error: Spread | None
    """Of its whole trials; None while a seed is missing, was stopped or failed."""
    sources: tuple[str, ...]
    method: str
    fraction: float
    operations: float | None
    """Of training, mean over seeds, stopped trials included."""
    gates: tuple[float, ...]
    """Mean transfer gate by source, over seeds; none without TMU layers that are taught."""
    trials: tuple[TrialRecord, ...]

    def cost(self, name: str) -> float | None:
        """What it takes, by one of `plan.COSTS`; None if that is not known."""
        return self.operations if name == "operations" else float(len(self.sources))


@dataclass(frozen=True, kw_only=True)
class Line:
    """Errors along an axis, all else equal."""

    label: str
    """What the other axes are; empty if there are none."""
    xs: tuple[float, ...]
    errors: tuple[Spread, ...]
    """Over all seeds; on fractions of the data as fidelity, over those that came so far."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How the error depends on one axis of numbers (Figs. 4 and 7)."""

    axis: str
    is_log: bool
    lines: tuple[Line, ...]
    """Of points that differ along this axis alone; of points at random, one line of all of them."""
    is_scatter: bool
    """The points differ in other axes, too: marks, no lines."""


@dataclass(frozen=True, kw_only=True)
class SubsetFinding:
    """The best point of one set of sources, by memory transfer; of no source, from scratch."""

    sources: tuple[str, ...]
    point: PointFinding
    num_points: int
    """Whole points of this set, among which it is the best."""


@dataclass(frozen=True, kw_only=True)
class SourceWorth:
    """What one source is worth; positive lowers the error."""

    source: str
    marginal: Spread | None
    """Mean gain of adding it to sets without it, over the pairs of sets that were both tried."""
    num_pairs: int
    shapley: Spread | None
    """Shapley value: exact where every set was tried; None where it does not follow."""
    is_exact: bool
    """Every set was tried; else the value of the additive game that fits the tried ones best
    (least squares with Shapley kernel weights)."""
    gate: float | None
    """Mean transfer gate in the best point of all sources."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a search's trials say."""

    points: tuple[PointFinding, ...]
    """By number."""
    ranked: tuple[PointFinding, ...]
    """Those with an error, best first; all at the highest fidelity."""
    counts: Mapping[str, int]
    """Trials by state."""
    sensitivities: tuple[Sensitivity, ...]
    """By axis of numbers, in the order of the space; the fraction's (`data.fraction`, as an axis or
    as the fidelity) is Fig. 7."""
    subsets: tuple[SubsetFinding, ...]
    worth: tuple[SourceWorth, ...]
    fronts: Mapping[str, tuple[int, ...]]
    """By cost (`operations`, `teachers`): numbers of the points that no other one beats in both
    error and that cost, cheapest first."""


def find(search: Search, records: Sequence[TrialRecord]) -> Findings:
    """Compare everything that was tried."""
    points = _points(search, records)
    ranked = sorted((p for p in points if p.error is not None), key=lambda p: _error(p).mean)
    used = {name for record in records for name in record.sources}
    named = dict.fromkeys((*source_names(search), *sorted(used)))
    sources = tuple(name for name in named if name in used)
    subsets = _subsets(ranked, sources)
    states = Counter(record.trial.state for record in records)
    return Findings(
        points=points,
        ranked=tuple(ranked),
        counts={state: states[state] for state in get_args(State)},
        sensitivities=_sensitivities(search, points),
        subsets=subsets,
        worth=_worth(subsets, sources, search.options.seeds),
        fronts={cost: _front(ranked, cost) for cost in COSTS},
    )


def as_record(search: Search, findings: Findings) -> dict[str, Any]:
    """All numbers of a search as plain data, for other programs; undefined ones are None."""
    rows = {entry.name: getattr(findings, entry.name) for entry in fields(findings)}
    plain: dict[str, Any] = _plain(
        {
            "search": search.name,
            "recipe": search.recipe,
            "space": search.space,
            "options": search.options,
            **rows,
            "ranked": [point.number for point in findings.ranked],
            "subsets": [
                {**vars(subset), "point": subset.point.number, "error": subset.point.error}
                for subset in findings.subsets
            ],
        }
    )
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Spread):
        return {"mean": value.mean, "deviation": value.deviation, "by_seed": _plain(value.by_seed)}
    if isinstance(value, TrialRecord):
        return _plain({**vars(value.trial), **vars(value), "trial": value.trial.number})
    if is_dataclass(value):
        return _plain({entry.name: getattr(value, entry.name) for entry in fields(value)})
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _points(search: Search, records: Sequence[TrialRecord]) -> tuple[PointFinding, ...]:
    """Trials by point; points that are thought of twice are one."""
    groups: dict[Any, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda record: record.trial.number):
        groups.setdefault(key_of(record.trial.point), []).append(record)
    return tuple(_point(search, trials) for trials in groups.values())


def _point(search: Search, trials: Sequence[TrialRecord]) -> PointFinding:
    first, furthest = trials[0], max(trials, key=lambda record: record.fraction)
    operations = [record.operations for record in trials if record.operations is not None]
    gates = [record.gates for record in trials if record.gates]
    top = search.options.fractions[-1:]

    def whole_error(record: TrialRecord) -> float | None:
        if not record.is_whole or record.error is None or not math.isfinite(record.error):
            return None
        is_at_top = not top or record.reports[-1].level == top[0]
        return record.error if is_at_top else None

    errors = _by_seed(trials, search.options.seeds, whole_error)
    is_whole = len(errors) == len(search.options.seeds)
    return PointFinding(
        number=first.trial.point_number,
        point=first.trial.point,
        label=search.space.label(first.trial.point),
        error=Spread(by_seed=errors) if is_whole else None,
        sources=first.sources,
        method=first.method,
        fraction=furthest.fraction,
        operations=fmean(operations) if operations else None,
        gates=tuple(map(fmean, zip(*gates))),
        trials=tuple(trials),
    )


def _by_seed(
    trials: Sequence[TrialRecord],
    seeds: Sequence[int],
    value_of: Callable[[TrialRecord], float | None],
) -> dict[int, float]:
    """A value of trials, for the seeds that have one."""
    values = {
        record.trial.seed: value
        for record in reversed(trials)  # the first one counts
        if (value := value_of(record)) is not None
    }
    return {seed: values[seed] for seed in seeds if seed in values}


class _Mark(NamedTuple):
    """One error at one value of an axis."""

    x: float
    others: Point
    """The other axes."""
    error: Spread


def _sensitivities(search: Search, points: Sequence[PointFinding]) -> tuple[Sensitivity, ...]:
    options, space = search.options, search.space
    found = []
    for axis in space.axes:
        marks = [
            _Mark(float(value), _without(point.point, axis.name), point.error)
            for point in points
            for value in [point.point.get(axis.name)]
            if point.error is not None and _is_number(value)
        ]
        at_random = options.sampler != "grid"
        found.append(_sensitivity(space, axis.name, marks, axis.is_log, at_random))
    curves = [
        _Mark(fraction, point.point, Spread(by_seed=errors))
        for point in points
        for fraction in options.fractions
        if (errors := _by_seed(point.trials, options.seeds, partial(_error_at, level=fraction)))
    ]
    found.append(_sensitivity(space, FRACTION, curves, False, False))
    return tuple(each for each in found if each is not None)


def _sensitivity(
    space: Space, axis: str, marks: Sequence[_Mark], is_log: bool, at_random: bool
) -> Sensitivity | None:
    """One axis; None if there is nothing to compare along it."""
    xs = sorted({mark.x for mark in marks})
    if len(xs) < 2:
        return None
    groups: dict[Any, list[_Mark]] = {}
    for mark in marks:
        groups.setdefault(key_of(mark.others), []).append(mark)
    along = [group for group in groups.values() if len(group) > 1]
    # Among points at random a few differ in one axis alone by chance.
    is_scatter = not along or (at_random and 2 * sum(map(len, along)) < len(marks))
    best = sorted(along, key=lambda group: (-len(group), min(mark.error.mean for mark in group)))
    lines = [
        _line(space.label(group[0].others), group) for group in along if group in best[:MAX_LINES]
    ]
    return Sensitivity(
        axis=axis,
        is_log=is_log or (xs[0] > 0 and xs[-1] >= _DECADES * xs[0]),
        lines=(_line("", marks),) if is_scatter else tuple(lines),
        is_scatter=is_scatter,
    )


def _line(label: str, marks: Sequence[_Mark]) -> Line:
    marks = sorted(marks, key=lambda mark: mark.x)
    return Line(
        label=label,
        xs=tuple(mark.x for mark in marks),
        errors=tuple(mark.error for mark in marks),
    )


def _subsets(ranked: Sequence[PointFinding], sources: Sequence[str]) -> tuple[SubsetFinding, ...]:
    """Of memory transfer, and none from scratch; small sets first, then in the sources' order."""
    by_set: dict[tuple[int, ...], list[PointFinding]] = {}
    for point in ranked:
        if point.method not in ("tmu", "scratch") or point.point.get(ARM) in CONTROLS:
            continue
        by_set.setdefault(tuple(sorted(map(sources.index, point.sources))), []).append(point)
    return tuple(
        SubsetFinding(
            sources=tuple(sources[m] for m in numbers), point=found[0], num_points=len(found)
        )
        for numbers, found in sorted(by_set.items(), key=lambda each: (len(each[0]), each[0]))
    )


def _worth(
    subsets: Sequence[SubsetFinding], sources: Sequence[str], seeds: Sequence[int]
) -> tuple[SourceWorth, ...]:
    """Of each source by the best points of the sets with and without it."""

    def spread(by_seed: Iterable[float]) -> Spread:
        return Spread(by_seed=dict(zip(seeds, map(float, by_seed), strict=True)))

    best = {frozenset(subset.sources): subset.point for subset in subsets}
    errors_S = {
        tried: np.array([_error(point).by_seed[seed] for seed in seeds])
        for tried, point in best.items()
    }
    values_MS = shapley_values(errors_S, sources)
    everyone = best.get(frozenset(sources))
    gates = dict(zip(everyone.sources, everyone.gates)) if everyone else {}
    found = []
    for m, source in enumerate(sources):
        gains_PS = marginal_gains(errors_S, source)
        found.append(
            SourceWorth(
                source=source,
                marginal=spread(gains_PS.mean(0)) if len(gains_PS) else None,
                num_pairs=len(gains_PS),
                shapley=None if values_MS is None else spread(values_MS[m]),
                is_exact=is_complete(errors_S, sources),
                gate=gates.get(source),
            )
        )
    return tuple(found)


def _front(ranked: Sequence[PointFinding], cost: str) -> tuple[int, ...]:
    """Each point's error is below that of everything that costs less, or as much."""
    costs = [(paid, point) for point in ranked if (paid := point.cost(cost)) is not None]
    lowest, front = math.inf, []
    for _, point in sorted(costs, key=lambda each: each[0]):  # of equal cost, the best first
        if _error(point).mean < lowest:
            lowest = _error(point).mean
            front.append(point.number)
    return tuple(front)


def _error(point: PointFinding) -> Spread:
    assert point.error is not None, "a ranked point has one"
    return point.error


def _error_at(record: TrialRecord, *, level: float) -> float | None:
    errors = [report.error for report in record.reports if report.level == level]
    return errors[0] if errors and math.isfinite(errors[0]) else None


def _without(point: Point, axis: str) -> Point:
    return {name: value for name, value in point.items() if name != axis}


def _is_number(value: Value) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
