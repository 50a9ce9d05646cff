"""The options of a search, the runs of its trials, and what two starts of it must agree on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tmu_dist.config import ConfigError, RunConfig, ScheduleConfig, with_overrides
from tuning.plan import SEARCH_FILE, Search, SearchConfig, load_search, save_search
from tuning.space import SOURCES, Axis, Space

BETA, RATE = "transfer.beta", "training.learning_rate"
AXES = (
    Axis(name=SOURCES, values=((), ("1",), ("1", "2"))),
    Axis(name=BETA, low=1e-3, high=1.0, is_log=True, when={SOURCES: (("1",),)}),
    Axis(name=RATE, values=(0.001, 0.01), when={BETA: (0.5,)}),
)


def make_search(folder: str, base: RunConfig, **options: Any) -> Search:
    return Search(
        folder=folder,
        recipe="digits-tmu",
        command="python tuning/search.py",
        base=base,
        space=Space(name="test", axes=AXES, settings={"training.batch_size": 2}),
        options=SearchConfig(**{"sampler": "tpe", "num_samples": 5, **options}),
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seeds": ()}, "--seeds needs one"),
        ({"seeds": (1, 2, 1)}, r"--seeds \(1, 2, 1\) names a seed twice"),
        ({"num_samples": 4}, "sampler is grid, the number 4"),
        ({"sampler": "random"}, "sampler is random, the number None"),
        ({"sampler": "tpe", "num_samples": 0}, "--num-samples 0 must be at least 1"),
        ({"objectives": ()}, "--objectives : the first one is an error"),
        ({"objectives": ("skill",)}, "--objectives skill: .*mse_per_frame"),
        ({"objectives": ("mse_per_frame", "watts")}, "one of operations, teachers"),
        ({"objectives": ("mse_per_frame", "teachers")}, "only has an effect with --sampler tpe"),
        (
            {
                "objectives": ("mse_per_frame", "operations"),
                "sampler": "tpe",
                "num_samples": 2,
                "scheduler": "asha",
            },
            "use --scheduler none",
        ),
        ({"fidelity": "fraction", "scheduler": "asha"}, "--fractions go together"),
        ({"fractions": (0.5, 1.0), "scheduler": "asha"}, "--fractions go together"),
        (
            {"fidelity": "fraction", "fractions": (1.0, 0.5), "scheduler": "asha"},
            r"--fractions \(1.0, 0.5\) must be positive and rise",
        ),
        (
            {"fidelity": "fraction", "fractions": (0.0, 0.5), "scheduler": "asha"},
            "must be positive",
        ),
        (
            {"fidelity": "fraction", "fractions": (0.5, 1.0), "scheduler": "median"},
            "needs --scheduler asha, not median",
        ),
        ({"grace_steps": 5}, "only has an effect with a scheduler by steps"),
        (
            {
                "fidelity": "fraction",
                "fractions": (0.5, 1.0),
                "scheduler": "asha",
                "grace_steps": 5,
            },
            "only has an effect with a scheduler by steps",
        ),
        ({"grace_steps": 0, "scheduler": "asha"}, "--grace-steps 0 must be at least 1"),
        ({"reduction": 1.0}, "--reduction 1.0 must be above 1"),
        ({"concurrent": 0}, "--concurrent 0"),
        ({"retries": -1}, "--retries -1"),
        ({"best": "retrain"}, "--retrain-seeds go together"),
        ({"retrain_seeds": (5,)}, "--retrain-seeds go together"),
        ({"best": "retrain", "retrain_seeds": (0, 5)}, r"others than --seeds \(0,\)"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(
    options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        SearchConfig(**options)


def test_error_and_cost_are_the_objectives() -> None:
    both = SearchConfig(sampler="tpe", num_samples=3, objectives=("mae_per_frame", "operations"))
    assert (both.error, both.cost) == ("mae_per_frame", "operations")
    assert (SearchConfig().error, SearchConfig().cost) == ("mse_per_frame", None)


def test_by_step_a_trial_is_one_run(tmu_config: RunConfig) -> None:
    search = make_search("s3://bucket/search/", tmu_config)
    assert search.name == "search"
    (stage,) = search.stages(7, {SOURCES: ("1",), BETA: 0.3}, seed=4)
    run = stage.config
    assert stage.fraction is None and run.output == "s3://bucket/search/trials/0007"
    assert run.transfer.teachers == tmu_config.transfer.teachers[:1]
    assert (run.transfer.beta, run.training.seed, run.training.batch_size) == (0.3, 4, 2)
    assert search.rung(12.0) == 12.0


def test_by_fraction_a_trial_sees_every_sequence_as_often_in_each_run(
    tiny_config: RunConfig,
) -> None:
    schedule = ScheduleConfig(log_every=1, validate_every=8, checkpoint_every=4)
    base = with_overrides(replace(tiny_config, schedule=schedule), {"training.num_steps": 40})
    search = make_search(
        "/s", base, scheduler="asha", fidelity="fraction", fractions=(0.25, 0.5, 2.0), reduction=3
    )
    stages = search.stages(3, {SOURCES: ()}, seed=0)
    assert [stage.fraction for stage in stages] == [0.25, 0.5, 2.0]
    runs = [stage.config for stage in stages]
    assert [run.output for run in runs] == [
        f"/s/trials/0003/fraction-{fraction}" for fraction in ("0.25", "0.5", "2")
    ]
    assert [run.data.fraction for run in runs] == [0.25, 0.5, 2.0]
    assert [run.training.num_steps for run in runs] == [5, 10, 40]
    assert [search.rung(fraction) for fraction in (0.25, 0.5, 2.0)] == [1, 3, 9]


def test_a_search_is_read_as_it_was_written(tmu_config: RunConfig, tmp_path: Path) -> None:
    search = make_search(str(tmp_path / "here"), tmu_config, seeds=(1, 2), scheduler="median")
    save_search(search)
    assert load_search(search.folder) == search
    moved = tmp_path / "moved"
    (tmp_path / "here").rename(moved)
    assert load_search(str(moved)) == replace(search, folder=str(moved))


def test_what_does_not_shape_a_search_may_change(tmu_config: RunConfig, tmp_path: Path) -> None:
    search = make_search(str(tmp_path), tmu_config)
    save_search(search)
    options = {"num_samples": 9, "seeds": (0, 1), "concurrent": 1, "retries": 0}
    later = make_search(str(tmp_path), tmu_config, **options, best="retrain", retrain_seeds=(5,))
    later = replace(later, command="python tuning/search.py --concurrent 1")
    save_search(later)
    assert load_search(search.folder) == later


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base": {RATE: 0.5}}, "training.learning_rate: there 0.001, here 0.5"),
        ({"base": {"data.url": "/elsewhere"}}, "data.url: there .*, here '/elsewhere'"),
        ({"base": {"transfer.teachers": ("x", "y")}}, "transfer.teachers: there"),
        ({"options": {"scheduler": "asha"}}, "--scheduler: there 'none', here 'asha'"),
        ({"options": {"sampler_seed": 3}}, "--sampler-seed: there 0, here 3"),
        ({"axes": AXES[:2]}, rf"axis {RATE}: there .*, here None"),
        ({"settings": {}}, "settings training.batch_size: there 2, here None"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(
    tmu_config: RunConfig, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    search = make_search(str(tmp_path), tmu_config)
    save_search(search)
    other = make_search(
        str(tmp_path),
        with_overrides(tmu_config, change.get("base", {})),
        **change.get("options", {}),
    )
    axes, settings = change.get("axes", AXES), change.get("settings", other.space.settings)
    other = replace(other, space=replace(other.space, axes=axes, settings=settings))
    with pytest.raises(ConfigError, match=rf"holds another search \({named}.*--out"):
        save_search(other)
    assert load_search(search.folder) == search, "the folder is as it was"


def test_a_folder_without_a_search_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no {SEARCH_FILE}"):
        load_search(str(tmp_path))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda tree: tree.pop("space"),
        lambda tree: tree["space"]["axes"][0].pop("name"),
        lambda tree: tree["options"].update(sampler="magic"),
        lambda tree: tree["base"].update(unknown=1),
    ],
)
def test_a_search_of_another_version_is_refused_by_name(
    tmu_config: RunConfig, tmp_path: Path, break_it: Any
) -> None:
    save_search(make_search(str(tmp_path), tmu_config))
    file = tmp_path / SEARCH_FILE
    tree = json.loads(file.read_text())
    break_it(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=f"{SEARCH_FILE} was not written by this version"):
        load_search(str(tmp_path))
