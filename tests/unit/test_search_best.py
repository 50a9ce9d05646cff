"""The best settings of a search give its run again from any recipe, and are scored once on test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.s3_servers import moto
from tmu_dist import evaluate
from tmu_dist.config import (
    LaunchConfig,
    PlacementConfig,
    RunConfig,
    ScaleConfig,
    from_dict,
    identity,
    load_overrides,
    with_overrides,
)
from tmu_dist.recipes import get_recipe
from tmu_dist.run_folder import read_json
from tmu_dist.train import parse_command
from tmu_dist.training import run_lock
from tmu_dist.training.many import Job, Outcome, run_job
from tuning import best as best_module
from tuning.best import ScoringError, choose, export, read_best, score
from tuning.findings import Findings, PointFinding, Spread
from tuning.journal import Trial
from tuning.plan import Search, SearchConfig
from tuning.records import TrialRecord
from tuning.space import SOURCES, Axis, Point, Space

BETA = "transfer.beta"
RAY = LaunchConfig(launcher="ray", max_failures=5)
AXES = (
    Axis(name=SOURCES, values=((), ("1",), ("1", "2"))),
    Axis(name=BETA, low=1e-6, high=1.0, is_log=True, when={SOURCES: (("1",), ("1", "2"))}),
)
RATES = (Axis(name="training.learning_rate", values=(0.001, 0.01)),)
PLAIN: Point = {"training.learning_rate": 0.001}


def searched(
    base: RunConfig, folder: str, axes: Sequence[Axis] = AXES, **options: object
) -> Search:
    chosen = SearchConfig(**{"sampler": "random", "num_samples": 8, **options})  # type: ignore[arg-type]
    space = Space(name="test", axes=tuple(axes), settings={"training.num_steps": 2})
    return Search(
        folder=folder,
        recipe="digits-tmu",
        command="python tuning/search.py",
        base=base,
        space=space,
        options=chosen,
    )


def found(search: Search, number: int, point: Point, errors: dict[int, float]) -> PointFinding:
    """A point whose trials are numbered on from 10 times its number."""
    trials = tuple(
        Trial(
            number=10 * number + place,
            point_number=number,
            point=point,
            seed=seed,
            state="finished",
        )
        for place, seed in enumerate(errors)
    )
    records = tuple(
        TrialRecord(
            trial=trial,
            folder=search.stages(trial.number, point, trial.seed)[-1].config.output,
            reports=(),
            sources=(),
            method="tmu",
            fraction=1.0,
            num_steps=2,
            gates=(),
        )
        for trial in trials
    )
    return PointFinding(
        number=number,
        point=point,
        label=search.space.label(point),
        error=Spread(by_seed=errors),
        sources=(),
        method="tmu",
        fraction=1.0,
        operations=None,
        gates=(),
        trials=records,
    )


def test_the_first_ranked_point_is_the_best(tmu_config: RunConfig) -> None:
    search = searched(tmu_config, "runs/search")
    first, second = (found(search, n, {SOURCES: ()}, {0: float(n)}) for n in (3, 1))
    findings = Findings(
        points=(second, first),
        ranked=(first, second),
        counts={},
        sensitivities=(),
        subsets=(),
        worth=(),
        fronts={},
    )
    assert choose(findings) is first
    assert choose(replace(findings, ranked=())) is None


@pytest.mark.parametrize(
    ("point", "placement"),
    [
        ({SOURCES: ()}, PlacementConfig()),
        ({SOURCES: ("1", "2"), BETA: 1e-05}, PlacementConfig()),
        ({SOURCES: ("1",), BETA: 0.1 + 0.2}, PlacementConfig(kind="placed", group=2)),
    ],
)
def test_its_file_gives_its_run_on_top_of_any_recipe(
    tmu_config: RunConfig, tmp_path: Path, point: Point, placement: PlacementConfig
) -> None:
    base = replace(
        tmu_config, placement=placement, scale=ScaleConfig(num_workers="2..4"), launch=RAY
    )
    search = searched(base, str(tmp_path / "search"), seeds=(4, 5))
    best = found(search, 7, point, {4: 2.0, 5: 3.0})
    file = tmp_path / "best.yaml"
    file.write_text(export(search, best))

    run = search.stages(70, point, 4)[0].config
    expected = replace(run, output=str(tmp_path / "search-best"))
    assert parse_command(["--config", str(file)]).config == expected
    overrides = load_overrides(file)
    # Of other networks, windows, methods, schedules and data.
    for name in ("digits-savp-knowledge-flow", "paper-digits-scratch", "radar-tmu"):
        assert with_overrides(get_recipe(name).config, overrides) == expected


def test_its_file_says_where_it_is_from(
    tmu_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_module, "git_revision", lambda: "abc123")
    search = searched(tmu_config, str(tmp_path / "search"), seeds=(4, 5))
    point = {SOURCES: ("1",), BETA: 0.03}
    text = export(search, found(search, 7, point, {4: 2.0, 5: 3.5}))
    comments = [line for line in text.split("\n") if line.startswith("#")]
    assert comments == [
        "# The best settings that the search search found: sources=1, beta=0.03.",
        "# Validation mse_per_frame: 2.75, the mean of 2 (seed 4), 3.5 (seed 5).",
        "# Every setting of the run is here, so that it is the same on top of any recipe:",
        "#",
        "#     python -m tmu_dist.train --config best.yaml",
        "#",
        f"# Searched in {tmp_path}/search (point 7),",
        "# with the code of revision abc123.",
        "# What is not as in the recipe digits-tmu, but for the run folder:",
        f"#     transfer.teachers: ['{tmu_config.transfer.teachers[0]}']",
        "#     transfer.beta: 0.03",
        "#     transfer.tmu.combine: paper",
        "#     training.num_steps: 2",
    ]


def test_addresses_are_absolute_and_the_whole_data_is_trained_on(
    tmu_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trials that grow with the data, the last one is meant."""
    monkeypatch.chdir(tmp_path)
    relative = replace(
        tmu_config,
        data=replace(tmu_config.data, url="archives/it", mix_with=("s3://bucket/more",)),
        transfer=replace(tmu_config.transfer, teachers=("runs/1", "runs/2")),
    )
    search = searched(
        relative,
        "runs/search/",
        fidelity="fraction",
        fractions=(0.5, 2.0),
        scheduler="asha",
    )
    point = {SOURCES: ("1", "2"), BETA: 0.5}
    (tmp_path / "best.yaml").write_text(export(search, found(search, 0, point, {0: 1.0})))
    config = with_overrides(RunConfig(), load_overrides(tmp_path / "best.yaml"))
    assert config.output == str(tmp_path / "runs/search-best")
    assert config.data.url == str(tmp_path / "archives/it")
    assert config.data.mix_with == ("s3://bucket/more",)
    assert config.transfer.teachers == (str(tmp_path / "runs/1"), str(tmp_path / "runs/2"))
    assert (config.data.fraction, config.training.num_steps) == (2.0, 2)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained or scored, in this process instead of many."""
    names: list[str] = []

    def one_by_one(jobs: Sequence[Job], *_: object) -> list[Outcome]:
        names.extend(job.name for job in jobs)
        return [run_job(job) for job in jobs]

    monkeypatch.setattr(best_module, "run_many", one_by_one)
    return names


def trained(search: Search, point: PointFinding) -> PointFinding:
    for record in point.trials:
        trial = record.trial
        run_job(Job(config=search.stages(trial.number, trial.point, trial.seed)[-1].config))
    return point


def test_the_best_runs_are_scored_once_and_what_was_scored_is_remembered(
    tiny_config: RunConfig, tmp_path: Path, run_here: list[str]
) -> None:
    search = searched(tiny_config, str(tmp_path / "search"), RATES, seeds=(1, 2))
    assert read_best(search.folder) is None
    first = trained(search, found(search, 0, PLAIN, {1: 5.0, 2: 7.0}))
    result = score(search, first)
    assert run_here == ["0000", "0001"]
    assert (result.point_number, result.label) == (0, "learning_rate=0.001")
    assert (result.metric, result.validation) == ("mse_per_frame", {1: 5.0, 2: 7.0})
    assert result.runs == {1: "trials/0000", 2: "trials/0001"}
    assert not result.is_retrained and result.earlier == ()
    assert result.command == f"python -m tmu_dist.train --config {search.folder}/best.yaml"

    expected = {
        seed: evaluate.evaluate_model(f"{search.folder}/{run}", tiny_config.data.url).overall
        for seed, run in result.runs.items()
    }
    assert set(result.test) == set(expected[1]["model"]) == set(result.persistence)
    for metric, by_seed in result.test.items():
        assert by_seed == {seed: expected[seed]["model"][metric] for seed in (1, 2)}
        assert result.persistence[metric] == expected[1]["persistence"][metric]
        assert metric in result.definitions
    assert len(set(result.test["mse_per_frame"].values())) == 2

    assert score(search, first) == result == read_best(search.folder)
    second = trained(search, found(search, 3, {"training.learning_rate": 0.01}, {1: 4.0, 2: 6.0}))
    after = score(search, second)
    assert (after.point_number, after.earlier) == (3, ("learning_rate=0.001",))
    back = score(search, first)
    assert back == replace(result, earlier=("learning_rate=0.01",))
    assert run_here == ["0000", "0001", "0030", "0031"], "no run is scored twice"

    revised = score(search, replace(first, error=Spread(by_seed={1: 5.0, 2: 7.5})))
    assert revised.earlier == ("learning_rate=0.01",), "a point is not another one than itself"

    last = first.trials[-1]
    again, stopped = (
        replace(last, trial=replace(last.trial, number=number, state=state))
        for number, state in ((98, "finished"), (99, "stopped"))
    )
    for more in ((*first.trials, again), (stopped, *first.trials)):
        assert score(search, replace(first, trials=more)).runs == result.runs, "one run a seed"
    scored = json.loads((tmp_path / "search" / "best.json").read_text())["scored"]
    assert [each["point_number"] for each in scored] == [3, 0, 0]


def test_the_best_point_is_trained_again_on_new_seeds(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    """In processes of their own, by the search's launcher."""
    search = searched(
        tiny_config,
        str(tmp_path / "search"),
        RATES,
        seeds=(1,),
        best="retrain",
        retrain_seeds=(8, 9),
    )
    result = score(search, found(search, 5, PLAIN, {1: 5.0}), parallel=1)
    assert result.is_retrained and result.validation == {1: 5.0}
    assert result.runs == {8: "best/point-5-seed-8", 9: "best/point-5-seed-9"}
    for seed, run in result.runs.items():
        config = from_dict(read_json(f"{search.folder}/{run}", "config.json"))
        assert identity(config) == identity(search.stages(50, PLAIN, seed)[0].config)
        assert read_json(f"{search.folder}/{run}", "result.json")["steps"] == 2
    assert set(result.test["ssim"]) == {8, 9}


def test_what_could_not_be_scored_is_said_and_the_rest_is_kept(
    tiny_config: RunConfig, tmp_path: Path, run_here: list[str]
) -> None:
    search = searched(tiny_config, str(tmp_path / "search"), RATES, seeds=(1, 2))
    point = trained(search, found(search, 0, PLAIN, {1: 5.0, 2: 7.0}))
    models = tmp_path / "search/trials/0001/models"
    models.rename(tmp_path / "away")
    with pytest.raises(
        ScoringError, match=r"1 of 2 runs .*learning_rate=0.001.*0001: TeacherError"
    ):
        score(search, point)
    assert read_best(search.folder) is None
    (tmp_path / "away").rename(models)
    assert set(score(search, point).test["mse_per_frame"]) == {1, 2}
    assert run_here == ["0000", "0001", "0001"]


def test_another_versions_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text("[]")
    with pytest.raises(ValueError, match=r"best.json was not written by this version"):
        read_best(str(tmp_path))


def test_a_search_in_a_store(
    tiny_config: RunConfig, run_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.05)
    with moto() as server:
        server.use(monkeypatch)
        server.make_bucket("bucket")
        search = searched(tiny_config, "s3://bucket/searches/one", RATES, seeds=(1,))
        point = trained(search, found(search, 0, PLAIN, {1: 5.0}))
        result = score(search, point)
        again = score(search, point)
        url = f"s3://bucket/searches/one/{result.runs[1]}"
        expected = evaluate.evaluate_model(url, tiny_config.data.url).overall["model"]
    assert again == result
    assert {metric: by_seed[1] for metric, by_seed in result.test.items()} == expected
    assert run_here == ["0000"]
    assert "output: s3://bucket/searches/one-best\n" in export(search, point)
