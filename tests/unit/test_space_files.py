"""Spaces as files: what they mean, and that whatever is wrong is said by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.recipes import get_recipe
from tuning.plan import SearchConfig
from tuning.space import SOURCES, Axis, Space, run_of
from tuning.space_files import BUILT_IN, check_fractions, make_space, read_space_file

BASE = get_recipe("digits-tmu").config
Read = Callable[[Any], Space]


def taught_by(*teachers: str) -> RunConfig:
    return replace(BASE, transfer=replace(BASE.transfer, teachers=teachers))


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write a space down, as YAML or its parts, and read it."""

    def made(content: Any, base: RunConfig = BASE) -> Space:
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        (tmp_path / "mine.yaml").write_text(text)
        return make_space(read_space_file(str(tmp_path / "mine.yaml")), base)

    return made


def labels(space: Space) -> list[str]:
    return [space.label(point) for point in space.grid()]


def built_in(name: str) -> Space:
    file = read_space_file(name)
    return make_space(file, get_recipe(file.recipe).config)


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILT_IN.glob("*.yaml")))
def test_built_in_spaces_fit_their_recipes_and_every_backbone(name: str) -> None:
    file = read_space_file(name)
    assert file.about and SearchConfig(**file.search)
    usual, student = built_in(name), file.recipe.removeprefix("digits-")
    for prefix in ("paper-digits", "digits-mim"):
        other = make_space(file, get_recipe(f"{prefix}-{student}").config)
        assert labels(other) == labels(usual)


def test_paper_beta_is_fig_4() -> None:
    space = built_in("paper-beta")
    betas = [run_of(BASE, space, point, 0).transfer.beta for point in space.grid()]
    assert betas == [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]


def test_paper_fractions_is_fig_7() -> None:
    space = built_in("paper-fractions")
    base = get_recipe("digits-fractions").config
    runs = [run_of(base, space, point, 0) for point in space.grid()]
    methods = ["scratch", "finetune", "finetune", "tmu"]
    assert [run.transfer.method for run in runs] == [name for name in methods for _ in range(5)]
    assert [run.data.fraction for run in runs] == [0.25, 0.5, 0.75, 1.0, 2.0] * 4
    assert {run.training.num_steps for run in runs} == {base.training.num_steps}


def test_paper_sources_is_table_1() -> None:
    assert labels(built_in("paper-sources")) == [
        *("arm=scratch", "arm=tmu-scratch", "arm=finetune-1", "arm=finetune-2"),
        *("arm=l2sp-1", "arm=l2sp-2", "arm=knowledge-flow", "arm=art"),
        *("arm=tmu, sources=1", "arm=tmu, sources=2", "arm=tmu, sources=1+2"),
    ]


def test_small_space_has_beta_only_where_something_is_taught() -> None:
    space = built_in("small")
    assert len(labels(space)) == (1 + 3 * 4) * 2
    for number in range(60):
        point = space.draw(0, number)
        assert ("transfer.beta" in point) == (point[SOURCES] != ())


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 6))
def test_all_sources_are_every_set_once(count: int) -> None:
    names = [f"t{m}" for m in range(count)]
    text = {"sources": {"sets": "all", "none": True}}
    file = replace(read_space_file("paper-beta"), axes=text)
    found = make_space(file, taught_by(*names)).axes[0].values
    masks = [sum(1 << names.index(str(name)) for name in chosen) for chosen in found]  # type: ignore[union-attr]
    assert sorted(masks) == list(range(2**count))
    assert all(list(chosen) == sorted(chosen) for chosen in found)  # type: ignore[arg-type,type-var]


def test_chosen_sources_are_sets_in_the_teachers_order(read: Read) -> None:
    space = read("axes: {sources: [[2, 1], [1, 2, 2], [], [2]]}")
    assert space.axes[0].values == (("1", "2"), (), ("2",))


def test_arm_and_sources_come_first_and_conditions_are_values(read: Read) -> None:
    space = read(
        """
        axes:
          data.fraction: {values: [0.5, 1], unless: {arm: finetune-*, sources: [[1]]}}
          transfer.beta: {values: [1e-3, 0.1], when: {arm: tmu, sources: [[2]]}}
          sources: {sets: all, when: {arm: tmu}}
          arm: [finetune-*, tmu, tmu]
        """
    )
    assert labels(space) == [
        *("arm=finetune-1", "arm=finetune-2", "arm=tmu, sources=1"),
        *(f"arm=tmu, sources=2, fraction={f}, beta={b}" for f in (0.5, 1) for b in (0.001, 0.1)),
        *("arm=tmu, sources=1+2, fraction=0.5", "arm=tmu, sources=1+2, fraction=1"),
    ]


@pytest.mark.parametrize(
    ("name", "written", "values"),
    [
        (
            "transfer.beta",
            "{from: 1e-3, to: 10, scale: log, points: 5}",
            (0.001, 0.01, 0.1, 1.0, 10.0),
        ),
        ("transfer.beta", "{from: 0, to: 1, points: 4}", (0.0, 0.3333, 0.6667, 1.0)),
        ("transfer.beta", "{from: 0.123456, to: 1, points: 2}", (0.123456, 1.0)),
        ("model.num_layers", "{from: 1, to: 4, points: 9}", (1, 2, 3, 4)),
        ("training.num_steps", "{from: 10, to: 1000, scale: log, points: 3}", (10, 100, 1000)),
        ("transfer.tmu.layers", "[all, [0], [0, 1]]", ("all", (0,), (0, 1))),
        ("training.grad_clip_norm", "[null, 1]", (None, 1.0)),
    ],
)
def test_values_are_of_the_fields_type(
    read: Read, name: str, written: str, values: tuple[Any, ...]
) -> None:
    axis = read(f"axes: {{{name}: {written}}}").axes[0]
    assert axis.values == values
    assert [type(value) for value in axis.values] == [type(value) for value in values]
    assert axis.is_integer == (type(axis.low) is int)


def test_settings_are_of_every_trial(read: Read) -> None:
    space = read("{settings: {training: {num_steps: 3}, data.fraction: .5}, axes: {arm: [tmu]}}")
    assert space.settings == {"training.num_steps": 3, "data.fraction": 0.5}
    run = run_of(BASE, space, {"arm": "tmu"}, 0)
    assert (run.training.num_steps, run.data.fraction) == (3, 0.5)


WRONG = [
    ("[1, 2]", "has named parts"),
    ("axes: {a: [", "not valid YAML"),
    ("{axis: {}, axes: {arm: [tmu]}}", "Unknown key 'axis'. Did you mean 'axes'"),
    ("axes: {transfer.beta: [1], transfer.beta: [2]}", "'transfer.beta' is there twice"),
    ("axes: {arm: [tmu], [1]: [2]}", "not valid YAML: while constructing a mapping"),
    ("about: nothing", "`axes` is missing or empty"),
    ("{recipe: digit-tmu, axes: {arm: [tmu]}}", "Did you mean 'digits-tmu'"),
    ("{recipe: [a], axes: {arm: [tmu]}}", "`recipe` must be words"),
    ("{search: {sampeler: grid}, axes: {arm: [tmu]}}", "search: .*Did you mean 'sampler'"),
    ("{search: {sampler: best}, axes: {arm: [tmu]}}", "search: sampler: .*'grid', 'random'"),
    ("{search: [grid], axes: {arm: [tmu]}}", "`search` must hold named values"),
    ("{settings: {trainig.num_steps: 3}, axes: {arm: [tmu]}}", "settings: .*Did you mean 'train"),
    ("{settings: {training.num_steps: x}, axes: {arm: [tmu]}}", "settings: training.num_steps='x'"),
    ("{settings: {output: x}, axes: {arm: [tmu]}}", "settings: output is not for a space"),
    ("{settings: {training: {seed: 1}}, axes: {arm: [tmu]}}", "training.seed .*by --seeds"),
    (
        "{settings: {data: {fraction: 1}, data.fraction: 2}, axes: {arm: [tmu]}}",
        "settings: data.fraction is there twice",
    ),
    (
        "{settings: {transfer: {beta: 1}}, axes: {transfer.beta: [1, 2]}}",
        "transfer.beta is both under `settings` and under `axes`",
    ),
    ("axes: {transfer.bta: [1]}", "axis 'transfer.bta': .*Did you mean 'transfer.beta'"),
    ("axes: {beta: [1]}", "axis 'beta': .*Did you mean 'transfer.beta'"),
    ("axes: {1: [1]}", "axis 1: There is no such config field"),
    ("axes: {transfer: {beta: [1]}}", "axis 'transfer': This is a section"),
    ("axes: {training.seed: [1, 2]}", "axis 'training.seed': .*use --seeds"),
    ("axes: {output: [a, b]}", "axis 'output': This is no axis"),
    ("axes: {scale.num_workers: [1, 2]}", "axis 'scale.num_workers': This is no axis"),
    ("axes: {transfer.teachers: [[a]]}", "use the axis `sources`"),
    ("axes: {transfer.beta: [0.1, much]}", "axis 'transfer.beta': the value 'much': .*number"),
    ("axes: {model.num_layers: [2.5]}", "axis 'model.num_layers': the value 2.5: .*integer"),
    ("axes: {transfer.beta: []}", "axis 'transfer.beta': Name one value at least"),
    ("axes: {transfer.beta: 0.1}", "axis 'transfer.beta': Name one value at least"),
    ("axes: {transfer.beta: {}}", "axis 'transfer.beta': Name one value at least"),
    ("axes: {transfer.beta: [0.1, 1e-1]}", "0.1 and 0.1 are both shown as 0.1"),
    ("axes: {transfer.beta: [0.12345, 0.12346]}", "0.12345 and 0.12346 are both shown"),
    ("axes: {transfer.beta: {form: 1, to: 2}}", "Unknown key 'form'. Did you mean 'from'"),
    ("axes: {transfer.beta: {from: 1}}", "axis 'transfer.beta': A range needs `from` and `to`"),
    ("axes: {transfer.beta: {from: 1, to: x}}", "axis 'transfer.beta': `to`: .*number"),
    ("axes: {transfer.beta: {from: 1, to: .inf}}", "finite"),
    ("axes: {transfer.tmu.zigzag: {from: no, to: yes}}", "between finite numbers, got False"),
    ("axes: {transfer.beta: {from: 1, to: 1}}", "`from` must be below `to`"),
    ("axes: {transfer.beta: {from: 0, to: 1, scale: log}}", "`scale: log` needs a positive"),
    ("axes: {transfer.beta: {from: 0, to: 1, scale: cubic}}", "linear or log, got 'cubic'"),
    ("axes: {transfer.beta: {from: 0, to: 1, points: 1}}", "from 2 on, got 1"),
    ("axes: {transfer.beta: {values: [1], from: 0, to: 1}}", "exclude each other"),
    ("axes: {arm: [tmux]}", "axis 'arm': There is no arm 'tmux'. Did you mean 'tmu'"),
    ("axes: {arm: tmu}", "axis 'arm': Name one value at least, in a list; got 'tmu'"),
    ("axes: {arm: {values: [tmu], when: {sources: [[1]]}}}", "axis 'arm': Unknown key 'when'"),
    ("axes: {sources: [1, 2]}", r"axis 'sources': A set is a list .*such as \[1\]"),
    ("axes: {sources: every}", "axis 'sources': Name one value at least.*or `all`; got 'every'"),
    ("axes: {sources: [[3]]}", "axis 'sources': The run has no teacher '3'.*teachers: 1, 2"),
    ("axes: {sources: {sets: all, none: maybe}}", "`none` must be true or false"),
    (
        "axes: {data.fraction: {values: [1], when: {transfer.beta: 1}}, transfer.beta: [1, 2]}",
        "axis 'data.fraction': `when`: 'transfer.beta' is none of the axes before",
    ),
    (
        "axes: {transfer.beta: [1, 2], data.fraction: {values: [1], when: {transfer.beta: 3}}}",
        "axis 'data.fraction': `when`: 'transfer.beta' is never 3, but 1, 2",
    ),
    (
        "axes: {arm: [tmu, art], data.fraction: {values: [1], unless: {arm: scratch}}}",
        "axis 'data.fraction': `unless`: There is no arm 'scratch'.*Arms: tmu, art",
    ),
    (
        "axes: {arm: [tmu, art], data.fraction: {values: [1], unless: {arm: '*'}}}",
        "`unless`: 'arm' has no other values",
    ),
    (
        "axes: {arm: [tmu], data.fraction: {values: [1], when: {arm: tmu}, unless: {arm: tmu}}}",
        "`unless`: 'arm' is under `when` as well",
    ),
    (
        "axes: {transfer.beta: {from: 1, to: 2}, data.fraction: {values: [1], "
        "when: {transfer.beta: 1}}}",
        "`when`: 'transfer.beta' is a range",
    ),
    ("axes: {arm: [tmu], data.fraction: {values: [1], when: tmu}}", "`when` names axes with"),
    (
        "axes: {arm: [tmu, art], data.fraction: {values: [1], when: {arm: art}}, "
        "training.num_steps: {values: [9], when: {arm: tmu, data.fraction: 1}}}",
        "axis 'training.num_steps': its conditions never hold together",
    ),
    ("axes: {transfer.beta: [0.1, -1]}", "at beta=-1: transfer.beta must be >= 0, got -1.0.$"),
    (
        "axes: {arm: [tmu, scratch], transfer.beta: [0.1, 1]}",
        r"at arm=scratch, beta=1: transfer.beta only has an effect with transfer.method=tmu.*"
        r"`unless: \{arm: \[scratch\]\}`",
    ),
    (
        "axes: {data.fraction: [1], transfer.beta: [0.2], sources: {sets: all, none: true}}",
        r"at sources=none, fraction=1, beta=0.2: .*axis 'transfer.beta' .*"
        r"`unless: \{sources: \[\[\]\]\}`",
    ),
    (
        "axes: {training.num_steps: {from: 10, to: 100}, training.decay_from: [50]}",
        r"at num_steps=10, decay_from=50: training.decay_from=50 must lie before",
    ),
    ("axes: {arm: [tmu-*]}", "arm=tmu-alone-2 and arm=tmu-without-1 are the same run"),
    (
        "axes: {arm: [scratch, tmu], sources: {sets: [[]], when: {arm: tmu}}}",
        "arm=scratch and arm=tmu, sources=none are the same run",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_said_by_file_and_name(
    read: Read, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(text)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: ")


def test_the_run_must_have_what_is_varied(read: Read) -> None:
    file, scratch = read_space_file("paper-sources"), get_recipe("digits-scratch").config
    with pytest.raises(ConfigError, match=r"paper-sources: axis 'arm': .*transfer.method=tmu"):
        make_space(file, scratch)
    with pytest.raises(ConfigError, match=r"axis 'sources': .*memory transfer.*not of art"):
        make_space(replace(file, axes={"sources": "all"}), get_recipe("digits-art").config)
    many = taught_by(*(f"teacher-{m}" for m in range(13)))
    with pytest.raises(ConfigError, match=r"All sets of 13 teachers are too many"):
        make_space(file, many)


def test_spaces_are_found_by_name_or_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'paper-beta'.*\n  paper-beta: weight"):
        read_space_file("paper-bta")
    with pytest.raises(ConfigError, match=r"space file 'paper-beta.yaml' does not exist"):
        read_space_file("paper-beta.yaml")
    with pytest.raises(ConfigError, match=r"space file .* does not exist"):
        read_space_file(str(tmp_path / "mine"))


def test_contradictions_are_found_in_spaces_too_large_to_try_whole(read: Read) -> None:
    text = """
        axes:
          training.batch_size: {from: 1, to: 100, points: 100}
          training.learning_rate: {from: 0.001, to: 1}
          training.num_steps: {from: 50, to: 100}
          training.decay_from: [40, %d, %d]
        """
    assert not read(text % (42, 45)).is_finite
    with pytest.raises(ConfigError, match=r"at batch_size=1, .*decay_from=50 must lie before"):
        read(text % (42, 50))
    with pytest.raises(ConfigError, match=r"decay_from=98: .* must lie before"):
        read(text % (98, 45))  # at no end of its axis


def spread(*fractions: float) -> Space:
    return Space(name="mine", axes=(Axis(name="data.fraction", values=fractions),))


def test_fractions_need_an_archive_with_as_much() -> None:
    check_fractions(spread(2, 0.5), (), num_train_samples=400, full=200)
    check_fractions(Space(name="none", axes=()), (0.5, 2), num_train_samples=400, full=200)
    wanted = r"data.fraction.*fraction of 2 is 400 samples.*--full-train-samples.*digits-fractions"
    with pytest.raises(ConfigError, match=f"mine: axis .{wanted}"):
        check_fractions(spread(2, 0.5), (), num_train_samples=200, full=None)
    with pytest.raises(ConfigError, match=f"--fractions .{wanted}"):
        check_fractions(Space(name="none", axes=()), (1, 2), num_train_samples=399, full=200)
    fixed = Space(name="mine", axes=(), settings={"data.fraction": 2.0})
    with pytest.raises(ConfigError, match=f"mine: settings: {wanted}"):
        check_fractions(fixed, (), num_train_samples=200, full=200)
    ranging = Space(name="mine", axes=(Axis(name="data.fraction", low=0.1, high=2.0),))
    with pytest.raises(ConfigError, match=f"mine: axis .{wanted}"):
        check_fractions(ranging, (), num_train_samples=200, full=200)
    with pytest.raises(ConfigError, match=r"axis 'data.fraction' and --fractions .*about the same"):
        check_fractions(spread(0.5), (0.5, 1), num_train_samples=400, full=200)
