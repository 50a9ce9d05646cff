"""What a space's points are, and the runs that they stand for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmu_dist.config import ConfigError, RunConfig, TransferConfig
from tmu_dist.recipes import get_recipe
from tuning.space import ARM, SOURCES, Axis, Point, Space, Value, arms_of, run_of, show

BETA = Axis(name="transfer.beta", low=1e-3, high=10.0, is_log=True)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Axes of one to three numbers each, some of which depend on earlier ones."""
    axes: list[Axis] = []
    for number in range(draw(st.integers(1, 4))):
        when: dict[str, tuple[Value, ...]] = {}
        for other in axes:
            if draw(st.booleans()):
                kept = draw(st.sets(st.sampled_from(other.values), min_size=1))
                when[other.name] = tuple(kept)
        values = tuple(range(draw(st.integers(1, 3))))
        axes.append(Axis(name=f"axis.{number}", values=values, when=when))
    return Space(name="drawn", axes=tuple(axes))


def by_product(axes: Sequence[Axis]) -> list[Point]:
    """The grid by another way: the product of all values, less those without effect, each once."""
    found: list[Point] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        whole = dict(zip((axis.name for axis in axes), values))
        point: dict[str, Value] = {}
        for axis in axes:
            if all(other in point and whole[other] in kept for other, kept in axis.when.items()):
                point[axis.name] = whole[axis.name]
        if point not in found:
            found.append(point)
    return found


@settings(deadline=None)
@given(spaces())
def test_a_grid_has_every_combination_that_has_an_effect_once(space: Space) -> None:
    points = list(space.grid())
    assert points == by_product(space.axes)
    assert len({space.label(point) for point in points}) == len(points)


@settings(deadline=None)
@given(spaces(), st.integers(0, 2**40), st.integers(0, 2**20))
def test_a_draw_is_a_point_of_the_grid_and_a_pure_function(
    space: Space, seed: int, number: int
) -> None:
    point = space.draw(seed, number)
    assert point in by_product(space.axes)
    assert space.draw(seed, number) == point


def test_draws_follow_the_scale_of_their_range() -> None:
    whole = Axis(name="training.num_steps", low=-3, high=3, is_integer=True)
    space = Space(name="two", axes=(BETA, whole))
    points = [space.draw(7, number) for number in range(4000)]
    logs = np.log10([float(str(point["transfer.beta"])) for point in points])
    assert -3 <= logs.min() < -2.99 and 0.99 < logs.max() <= 1
    # Uniform in the logarithm: mean -1, variance 16 / 12; five standard errors.
    assert abs(logs.mean() + 1) < 5 * math.sqrt(16 / 12 / 4000)
    wholes = [int(str(point[whole.name])) for point in points]
    assert abs(np.corrcoef(logs, wholes)[0, 1]) < 5 / math.sqrt(4000)  # each axis for itself
    counts = np.unique(wholes, return_counts=True)
    assert counts[0].tolist() == list(range(-3, 4))
    assert np.abs(counts[1] - 4000 / 7).max() < 5 * math.sqrt(4000 / 7)
    assert {type(point[whole.name]) for point in points} == {int}
    assert len({space.draw(8, number)["transfer.beta"] for number in range(50)}) > 45


def test_a_draw_is_wholly_told_by_its_label() -> None:
    space = Space(name="beta", axes=(BETA,))
    for number in range(200):
        point = space.draw(0, number)
        assert space.label(point) == f"beta={point['transfer.beta']:.15g}"


@settings(deadline=None)
@given(
    st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)).filter(lambda ends: ends[0] < ends[1]),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
)
def test_a_range_is_never_left(ends: tuple[float, float], share: float, is_log: bool) -> None:
    axis = Axis(name="a", low=ends[0], high=ends[1], is_log=is_log)
    assert ends[0] <= float(str(axis.at(share))) <= ends[1]


def test_an_axis_that_is_off_is_not_the_value_none() -> None:
    clip = Axis(name="clip", values=(None, 1.0), when={"arm": ("tmu",)})
    after = Axis(name="after", values=(0, 1), when={"clip": (None,)})
    arm = Axis(name="arm", values=("scratch", "tmu"))
    space = Space(name="none", axes=(arm, clip, after))
    assert [space.label(point) for point in space.grid()] == [
        *("arm=scratch", "arm=tmu, clip=None, after=0", "arm=tmu, clip=None, after=1"),
        "arm=tmu, clip=1",
    ]


def test_ends_are_all_combinations_of_lowest_and_highest() -> None:
    steps = Axis(name="steps", values=(10, 20, 30))
    one = Axis(name="one", values=("x",))
    space = Space(name="ends", axes=(BETA, steps, one))
    assert [tuple(point.values()) for point in space.ends()] == [
        *((0.001, 10, "x"), (0.001, 30, "x"), (10.0, 10, "x"), (10.0, 30, "x"))
    ]


def test_a_grid_needs_points_of_its_ranges() -> None:
    space = Space(name="mine", axes=(BETA,))
    assert not space.is_finite
    with pytest.raises(ConfigError, match=r"mine: axis 'transfer.beta' .*`points`.*--sampler"):
        next(space.grid())


def test_labels_tell_axes_apart_that_end_alike() -> None:
    l2_sp = Axis(name="transfer.l2_sp.beta", values=(0.1,))
    fraction = Axis(name="data.fraction", values=(0.5,))
    beta = Axis(name="transfer.beta", values=(0.1,))
    space = Space(name="two", axes=(beta, l2_sp, fraction))
    (point,) = space.grid()
    assert space.label(point) == "transfer.beta=0.1, transfer.l2_sp.beta=0.1, fraction=0.5"
    assert (show(()), show(("1", "2")), show(0.00316227766)) == ("none", "1+2", "0.003162")


@pytest.fixture
def base() -> RunConfig:
    return get_recipe("digits-tmu").config


EMPTY = Space(name="empty", axes=(), settings={"training.num_steps": 10})


def test_a_run_has_the_settings_the_point_and_the_seed(base: RunConfig) -> None:
    run = run_of(base, EMPTY, {"transfer.beta": 0.5, "data.fraction": 0.25}, seed=3)
    training = replace(base.training, num_steps=10, seed=3)
    assert run == replace(
        base,
        training=training,
        transfer=replace(base.transfer, beta=0.5),
        data=replace(base.data, fraction=0.25),
    )


def test_a_set_of_sources_leaves_the_others_out(base: RunConfig) -> None:
    one, two = base.transfer.teachers
    assert run_of(base, EMPTY, {SOURCES: ("2",)}, 0).transfer.teachers == (two,)
    both = run_of(base, EMPTY, {SOURCES: ("1", "2"), "transfer.beta": 0.2}, 0).transfer
    assert both.teachers == (one, two) and both.beta == 0.2
    assert run_of(base, EMPTY, {SOURCES: ()}, 0).transfer == TransferConfig()


def test_arms_are_the_ledgers_with_the_points_settings(base: RunConfig) -> None:
    for name, arm in arms_of(base).items():
        run = run_of(base, EMPTY, {ARM: name, "data.fraction": 0.5}, 0)
        assert run.transfer == arm.transfer
        assert (run.data.fraction, run.training.num_steps) == (0.5, 10)
    assert "scratch-longer" not in arms_of(base)
    alone = run_of(base, EMPTY, {ARM: "tmu", SOURCES: ("1",)}, 0)
    assert alone.transfer == arms_of(base)["tmu-alone-1"].transfer


@pytest.mark.parametrize(
    "point", [{ARM: "art", SOURCES: ("1",)}, {ARM: "tmu-alone-1", SOURCES: ("2",)}]
)
def test_sources_are_of_memory_transfer_from_them(base: RunConfig, point: Point) -> None:
    with pytest.raises(ConfigError, match=r"sources=. are for memory transfer from these"):
        run_of(base, EMPTY, point, 0)
