"""What a search varies: axes over a run's settings, and the run of a point of them.

Axes are named by the dotted paths of the command line, but for two: `arm` changes the method as the
ledger's arms do, and `sources` leaves out some of the teachers.

Deliberately not here: files of spaces and their checks (`space_files`), which points are tried
(`samplers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from tmu_dist.config import PlacementConfig, RunConfig, TransferConfig, with_overrides
from tmu_dist.config.checks import require
from tmu_dist.draws import keyed_uniform
from tmu_dist.ledger.arms import make_arms, short_names, subset

ARM, SOURCES, FRACTION, SEED = "arm", "sources", "data.fraction", "training.seed"

Value: TypeAlias = str | int | float | bool | tuple[Any, ...] | None
Point: TypeAlias = Mapping[str, Value]
"""The value of every axis that has an effect there, by name; of `sources`, names of teachers."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One thing that is varied: either over some values, or over a range."""

    name: str
    values: tuple[Value, ...] = ()
    """All there are; of a range, those of a grid (none without `points`)."""
    low: float | None = None
    """Of a range; None for values."""
    high: float | None = None
    is_log: bool = False
    is_integer: bool = False
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    """Earlier axes with the values of theirs at which this one has an effect; empty: always."""

    @property
    def is_range(self) -> bool:
        """Whether it is a range."""
        return self.low is not None

    def is_active(self, point: Point) -> bool:
        """Whether it has an effect, given the axes before it."""
        return all(other in point and point[other] in values for other, values in self.when.items())

    def at(self, share: float) -> Value:
        """One of its values: those from first or lowest to last or highest, for 0 <= share < 1."""
        if self.low is None or self.high is None:
            return self.values[int(share * len(self.values))]
        high = self.high + self.is_integer
        found = (
            self.low * (high / self.low) ** share
            if self.is_log
            else self.low + share * (high - self.low)
        )
        if self.is_integer:
            return min(max(math.floor(found), int(self.low)), int(self.high))
        return min(max(rounded(found), self.low), self.high)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The axes of a search, each after those it depends on."""

    name: str
    axes: tuple[Axis, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of every run, by dotted path."""

    @property
    def is_finite(self) -> bool:
        """Whether a grid has all its points; one of ranges has some of theirs, if any."""
        return not any(axis.is_range for axis in self.axes)

    def axis(self, name: str) -> Axis | None:
        """An axis by name."""
        return next((axis for axis in self.axes if axis.name == name), None)

    def grid(self) -> Iterator[Point]:
        """Every combination of values, each once; the first axis changes slowest.

        Raises:
            ConfigError: a range without `points`.
        """
        for axis in self.axes:
            require(
                len(axis.values) > 0,
                f"{self.name}: axis {axis.name!r} is a range without `points`, which a grid needs: "
                "say how many, or use --sampler random or tpe.",
            )
        yield from _combinations(self.axes, lambda axis: axis.values)

    def ends(self) -> Iterator[Point]:
        """Every combination of the axes' first or lowest and last or highest values."""
        yield from _combinations(self.axes, lambda axis: tuple(dict.fromkeys(_ends_of(axis))))

    def draw(self, seed: int, number: int) -> Point:
        """A point at random; a pure function of seed and number."""
        point: dict[str, Value] = {}
        for place, axis in enumerate(self.axes):
            if axis.is_active(point):
                # Hashed by place, so that an axis' draws do not depend on which others are active.
                (share,) = keyed_uniform(np.array([place]), seed, number).tolist()
                point[axis.name] = axis.at(share)
        return point

    def label(self, point: Point) -> str:
        """A point for people: `sources=1+2, beta=0.03`."""
        return ", ".join(
            f"{self.short(axis.name)}={show(point[axis.name])}"
            for axis in self.axes
            if axis.name in point
        )

    def short(self, name: str) -> str:
        """The last part of an axis' name, or all of it where two end alike."""
        short = name.rpartition(".")[2]
        alike = sum(axis.name.rpartition(".")[2] == short for axis in self.axes)
        return short if alike < 2 else name


def key_of(point: Point) -> frozenset[tuple[str, Value]]:
    """What equal points have in common, to be looked up by."""
    return frozenset(point.items())


def show(value: Value) -> str:
    """A value in few letters; a set of sources as `1+2`, the empty one as `none`."""
    if isinstance(value, tuple):
        return "+".join(map(show, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rounded(value: float) -> float:
    """The four digits that `show` shows, so that tables and files tell all of what was tried."""
    return float(f"{value:.4g}")


def run_of(base: RunConfig, space: Space, point: Point, seed: int) -> RunConfig:
    """The run of one point and seed, with the base's output.

    Without any source it is the plain network from scratch.

    Raises:
        ConfigError: the settings contradict each other there.
    """
    config = with_overrides(base, space.settings)
    if ARM in point:
        config = arms_of(config)[str(point[ARM])]
    if SOURCES in point:
        config = _with_sources(config, point[SOURCES])
    rest = {name: value for name, value in point.items() if name not in (ARM, SOURCES)}
    return with_overrides(config, {**rest, SEED: seed})


def arms_of(config: RunConfig) -> dict[str, RunConfig]:
    """What the axis `arm` can be: the ledger's methods and controls of a TMU student."""
    arms = {arm.name: arm.config for arm in make_arms(config, 1.0)}
    del arms["scratch-longer"]  # an axis training.num_steps says it better
    return arms


def _with_sources(config: RunConfig, names: Value) -> RunConfig:
    assert isinstance(names, tuple)
    if not names:
        return replace(config, transfer=TransferConfig(), placement=PlacementConfig())
    teachers = short_names(config.transfer.teachers)
    require(
        config.transfer.method == "tmu" and set(names) <= set(teachers),
        f"sources={show(names)} are for memory transfer from these or more teachers, not for "
        f"transfer.method={config.transfer.method} with {show(teachers)}.",
    )
    transfer = subset(config.transfer, [teachers.index(name) for name in names])
    return replace(config, transfer=transfer)


def _ends_of(axis: Axis) -> tuple[Value, Value]:
    return axis.at(0.0), axis.at(math.nextafter(1.0, 0.0))


def _combinations(
    axes: Sequence[Axis], values_of: Callable[[Axis], Sequence[Value]]
) -> Iterator[Point]:
    def extend(point: dict[str, Value], left: Sequence[Axis]) -> Iterator[Point]:
        if not left:
            yield point
        elif not left[0].is_active(point):
            yield from extend(point, left[1:])
        else:
            for value in values_of(left[0]):
                yield from extend({**point, left[0].name: value}, left[1:])

    return extend({}, axes)
