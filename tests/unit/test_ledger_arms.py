"""Which runs a ledger has, what each one's settings are, and that they run once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tmu_dist.ledger.__main__ as ledger
from tmu_dist import train
from tmu_dist.config import (
    AdapterConfig,
    ConfigError,
    ImitationConfig,
    LaunchConfig,
    RunConfig,
    ScheduleConfig,
    StartConfig,
    TMUConfig,
    TransferConfig,
    identity,
    with_overrides,
)
from tmu_dist.data.archive import open_archive
from tmu_dist.evaluation.operations import count_operations
from tmu_dist.evaluation.training_operations import cost_of_transfer
from tmu_dist.ledger import runs
from tmu_dist.ledger.__main__ import Wanted, parse, run_ledger
from tmu_dist.ledger.arms import Arm, make_arms, run_configs, short_names
from tmu_dist.ledger.records import load
from tmu_dist.ledger.runs import train_teachers
from tmu_dist.models.shapes import FrameShape
from tmu_dist.recipes.base import Recipe
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.store import load_card
from tmu_dist.training.many import Job, Outcome, run_job

TEACHERS = ("runs/digits-teacher-1", "runs/digits-teacher-2")


def tmu(teachers: Sequence[str] = TEACHERS, **settings: Any) -> RunConfig:
    return RunConfig(transfer=TransferConfig(method="tmu", teachers=tuple(teachers), **settings))


def by_name(config: RunConfig, cost: float = 1.5) -> dict[str, Arm]:
    return {arm.name: arm for arm in make_arms(config, cost)}


def contents(*addresses: str) -> dict[str, str]:
    return {address: f"hash of {address}" for address in (RunConfig().data.url, *addresses)}


def test_arms_of_two_sources_are_those_of_table_1_and_the_controls() -> None:
    arms = by_name(tmu())
    assert list(arms) == [
        *("scratch", "scratch-longer", "tmu-scratch", "finetune-1", "finetune-2"),
        *("l2sp-1", "l2sp-2", "knowledge-flow", "art", "distillation"),
        *("tmu-alone-1", "tmu-alone-2", "tmu", "tmu-without-1", "tmu-without-2"),
        *("tmu-beta-0", "tmu-shuffled", "tmu-random-weights"),
    ]
    assert arms["tmu-without-1"].sources == arms["tmu-alone-2"].sources == ("2",)
    assert arms["tmu-without-1"].config == arms["tmu-alone-2"].config
    assert arms["l2sp-2"].config.transfer.teachers == (TEACHERS[1],)
    assert arms["tmu"].config == tmu()
    assert arms["tmu-scratch"].config.transfer.num_tmu_slots == 2
    assert arms["tmu-beta-0"].config.transfer.beta == 0.0
    assert {arm.config.transfer.control for arm in arms.values()} == {
        *("none", "shuffled", "random_weights")
    }


def test_arms_of_one_source_have_no_subsets_and_of_three_all() -> None:
    assert "memory transfer" in {arm.label for arm in make_arms(tmu(TEACHERS[:1]), 1.5)}
    assert not [arm for arm in make_arms(tmu(TEACHERS[:1]), 1.5) if arm.group == "subset"]
    three = by_name(tmu((*TEACHERS, "zoo/rain")))
    assert three["tmu-without-2"].sources == ("1", "rain")
    assert three["tmu-alone-rain"].config.transfer.teachers == ("zoo/rain",)


def test_arms_differ_in_transfer_alone_but_for_the_longer_one() -> None:
    config = with_overrides(
        tmu(), {"training.num_steps": 301, "training.sampling_stop_step": 100,
                "training.decay_from": 150}
    )  # fmt: skip
    for name, arm in by_name(config, 1.7).items():
        if name != "scratch-longer":
            assert replace(arm.config, transfer=config.transfer) == config, name
    longer = by_name(config, 1.7)["scratch-longer"].config
    training = longer.training
    assert (training.num_steps, training.sampling_stop_step, training.decay_from) == (512, 170, 255)
    assert replace(training, num_steps=301, sampling_stop_step=100, decay_from=150) == (
        config.training
    )


def test_settings_follow_the_teachers_and_methods_that_use_them() -> None:
    config = tmu(
        start=StartConfig(teacher=1, unmatched="random"),
        adapter=AdapterConfig(channels="project", units="any"),
        imitation=ImitationConfig(teacher_weights=(0.25, 4.0)),
        teacher_input="student",
        tmu=TMUConfig(gate_kernel_size=3),
    )
    transfer = {name: arm.config.transfer for name, arm in by_name(config).items()}
    assert transfer["scratch"] == TransferConfig()
    assert transfer["tmu-scratch"].tmu.gate_kernel_size == 3
    alone = transfer["tmu-alone-2"]
    assert alone.start == StartConfig(teacher=0, unmatched="random")
    assert alone.imitation.teacher_weights == (4.0,)
    assert transfer["tmu-alone-1"].start == StartConfig()
    assert transfer["finetune-1"].start == StartConfig(unmatched="random")
    assert transfer["finetune-1"].adapter == AdapterConfig(units="any")
    assert transfer["distillation"].imitation.teacher_weights == (0.25, 4.0)
    assert transfer["distillation"].teacher_input == "student"
    assert transfer["knowledge-flow"].teacher_input == transfer["art"].teacher_input == "own"
    assert transfer["art"].start.teacher == 1
    assert by_name(tmu())["finetune-1"].config.transfer.start.unmatched == "refuse"


def test_leaving_a_teacher_out_changes_no_other_setting() -> None:
    four = [f"teacher-{m}" for m in range(4)]
    arms = by_name(tmu(four))
    assert arms["tmu"].config.transfer.tmu.combination(4) == "mean"
    assert arms["tmu-without-0"].config.transfer.tmu.combination(3) == "mean"
    assert arms["tmu-alone-0"].config.transfer.tmu.combination(1) == "mean"


def test_what_is_no_memory_transfer_is_refused() -> None:
    for settings, named in (
        ({"transfer": TransferConfig()}, "needs transfer.method=tmu, not scratch"),
        ({"transfer": replace(tmu().transfer, control="shuffled")}, "both are arms"),
        ({"transfer": replace(tmu().transfer, beta=0.0)}, "both are arms"),
    ):
        with pytest.raises(ConfigError, match=named):
            make_arms(replace(tmu(), **settings), 1.5)


def test_teachers_get_short_names_that_tell_them_apart() -> None:
    assert short_names(["s3://b/runs/radar-teacher-mch/", "zoo/walking"]) == ("mch", "walking")
    assert short_names(["a/checkpoints/step-1", "b/checkpoints/step-1"]) == (
        *("step-1.0", "step-1.1"),
    )
    assert short_names(["runs/teacher-"]) == ("teacher-",)


def test_runs_are_named_by_what_shapes_their_result() -> None:
    arms = make_arms(tmu(), 1.5)
    known = contents(*TEACHERS)
    runs = run_configs(arms, [0, 7], "out", known)
    assert len({config.output for config in runs.values()}) == 2 * (len(arms) - 2)
    assert runs["tmu-without-1", 7].output == runs["tmu-alone-2", 7].output
    assert runs["tmu", 7].output.startswith("out/tmu-seed7-")
    assert runs["tmu", 7].training.seed == 7

    def changed(config: RunConfig, hashes: dict[str, str]) -> set[str]:
        again = run_configs(make_arms(config, 1.5), [0, 7], "out", hashes)
        return {arm for (arm, seed), run in again.items() if run.output != runs[arm, seed].output}

    assert changed(tmu(), known) == set()
    second = {**known, TEACHERS[1]: "another"}
    assert changed(tmu(), second) == {
        arm.name for arm in arms if TEACHERS[1] in arm.config.transfer.teachers
    }
    assert changed(tmu(), {**known, RunConfig().data.url: "new"}) == {arm.name for arm in arms}
    elsewhere = replace(
        tmu(), launch=LaunchConfig(launcher="local"), schedule=ScheduleConfig(log_every=3)
    )
    assert changed(elsewhere, known) == set()
    assert changed(with_overrides(tmu(), {"transfer.tmu.hidden_from": "own"}), known) == {
        arm.name for arm in arms if arm.config.transfer.method in ("tmu", "tmu_scratch")
    }


def test_identity_has_every_setting_but_where_and_how() -> None:
    named = identity(RunConfig())
    assert named["schedule.validate_every"] == 1000 and named["training.seed"] == 0
    assert named["data.shuffle_window"] == 4096 and named["transfer.teacher_input"] == "own"
    for free in (
        *("output", "data.url", "data.mix_with", "data.num_workers", "data.cache_gib"),
        *("transfer.teachers", "schedule.log_every", "launch.launcher", "data.reading"),
    ):
        assert free not in named
    json.dumps(named)


def test_cost_of_transfer_is_what_the_convolutions_take(
    tmu_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    teachers = [load_card(run) for run in teacher_runs]
    before = torch.get_rng_state()
    found = cost_of_transfer(tmu_config, FrameShape(channels=1, height=16, width=16), teachers)
    assert torch.equal(torch.get_rng_state(), before)
    # Products at each place of a 4x4 map: 16 numbers in a patch, 4 channels, 3x3 filters; of each
    # TMU layer, distillers of 4 to 2 x 4 channels and gates of input and hidden state to as many.
    plain = (16 + 4) * 16 * 9 + (4 + 4) * 16 * 9 + 4 * 16
    student = plain + (4 * 8 + (16 + 4) * 8) + (4 * 8 + (4 + 4) * 8)
    assert found == pytest.approx((3 * student + 2 * plain) / (3 * plain), abs=1e-12)


def test_a_product_with_its_sum_is_two_operations() -> None:
    one, other = torch.zeros(3, 5), torch.zeros(5, 7)
    assert count_operations(lambda: one @ other) == 2 * 3 * 5 * 7


# Whole ledgers


def run_here(jobs: Sequence[Job], settings: LaunchConfig, parallel: int | None) -> list[Outcome]:
    """`run_many` without the processes, which tests/unit/test_many.py has."""
    return [run_job(job) for job in jobs]


@pytest.fixture
def wanted(tmu_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    """A ledger of a few arms with one seed, run in this process; its page is not drawn."""
    monkeypatch.setattr(runs, "run_many", run_here)
    monkeypatch.setattr(ledger, "rewrite_page", lambda folder: None)
    settings = {"training.num_steps": 4, "schedule.validate_every": 2}
    return Wanted(
        name="digits-tmu",
        recipe=Recipe(config=with_overrides(tmu_config, settings)),
        seeds=(0,),
        only=("scratch", "tmu-scratch", "art", "tmu-alone-2", "tmu", "tmu-without-1", "tmu-beta-0"),
        out=tmp_path / "ledger",
        parallel=None,
        command="the command",
    )


def files_of(wanted: Wanted) -> dict[str, int]:
    """When each result and evaluation was written, by path from the runs' folder."""
    folder = wanted.out / "runs"
    found = [*folder.glob("*/result.json"), *folder.glob("*/*/evaluation.json")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def test_only_what_is_missing_runs_and_one_failure_is_no_end(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def with_a_bad_arm(config: RunConfig, cost: float) -> tuple[Arm, ...]:
        return tuple(
            replace(arm, config=with_overrides(arm.config, {"model.hidden_channels": 6}))
            if arm.name == "art"
            else arm
            for arm in make_arms(config, cost)
        )

    with monkeypatch.context() as patched:
        patched.setattr(runs, "make_arms", with_a_bad_arm)
        assert run_ledger(wanted) == 1
    assert "1 of 6 failed; traces are in" in caplog.text
    assert "Traceback" in (wanted.out / "failures.txt").read_text()
    found = load(wanted.out)
    assert [arm.name for arm in found.arms if arm.seeds] == [
        *("scratch", "tmu-scratch", "tmu-alone-2", "tmu", "tmu-without-1", "tmu-beta-0")
    ]
    art, without = found.arm("art"), found.arm("tmu-without-1")
    assert art is not None and without is not None
    assert art.failures[0].startswith("TeacherError: ") and not art.seeds
    assert without.seeds[0].run.startswith("runs/tmu-alone-2-seed0-")
    assert found.facts["sequences"]["test"] == 5 and found.sources == ("1", "2")

    # What an interruption leaves: a run without its result, and one without its evaluation.
    before = files_of(wanted)
    (scratch,) = wanted.out.glob("runs/scratch-seed0-*")
    (tmu_run,) = wanted.out.glob("runs/tmu-seed0-*")
    (scratch / "result.json").unlink()
    shutil.rmtree(scratch / "checkpoints" / "step-00000004")
    (tmu_run / "evaluation-test" / "evaluation.json").unlink()
    assert run_ledger(replace(wanted, seeds=(0,))) == 0
    after = files_of(wanted)
    again = {path for path in after if after[path] != before.get(path)}
    assert {path.partition("-seed0-")[0] for path in again} == {"scratch", "tmu", "art"}
    assert f"{tmu_run.name}/result.json" not in again
    assert any(event["event"] == "resume" for event in read_log(scratch))
    assert not (wanted.out / "failures.txt").exists()

    assert run_ledger(replace(wanted, seeds=(1,), only=("scratch",))) == 0
    assert {path: when for path, when in files_of(wanted).items() if "seed0" in path} == after
    both = load(wanted.out)
    assert {arm.name: list(arm.seeds) for arm in both.arms if arm.seeds} == {
        "scratch": [0, 1],
        **{name: [0] for name in wanted.only[1:]},
    }


def test_records_are_what_the_runs_found(wanted: Wanted) -> None:
    assert run_ledger(replace(wanted, only=("tmu-scratch", "tmu-beta-0"))) == 0
    first, second = (arm.seeds[0] for arm in load(wanted.out).arms if arm.seeds)
    folder = wanted.out / first.run
    result = json.loads((folder / "result.json").read_text())
    assert first.seconds_per_batch == result["seconds_per_batch"]
    assert first.evaluation.data.split == "test"
    evaluated = first.evaluation.per_sequence
    other = second.evaluation.per_sequence
    assert evaluated is not None and other is not None
    scores = evaluated["model"].values_NT["mse_per_frame"]
    assert scores.shape == (5, 3)
    # From the saved forecasts and the true frames alone.
    forecasts = np.load(folder / "evaluation-test" / "predictions.npy").astype(np.float64)
    frames = open_archive(wanted.recipe.config.data.url).read("test", range(5))[:, 3:]
    errors = (255 * forecasts.clip(0, 1) - frames) / 255
    assert scores == pytest.approx((errors**2).sum((2, 3, 4)), rel=1e-6)
    assert np.array_equal(scores, other["model"].values_NT["mse_per_frame"]), (
        "beta 0 is no transfer"
    )


def test_teachers_of_a_recipe_are_trained_first(
    wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = wanted.recipe.config
    folders = {str(tmp_path / f"digits-teacher-{name}"): name for name in ("1", "2")}

    def teacher(name: str) -> Recipe:
        training = replace(config.training, seed=int(name), num_steps=2)
        return Recipe(
            config=replace(
                config,
                output=str(tmp_path / f"digits-teacher-{name}"),
                transfer=TransferConfig(),
                training=training,
            )
        )

    monkeypatch.setattr(train, "get_recipe", teacher)
    transfer = replace(config.transfer, teachers=tuple(folders))
    recipe = Recipe(config=replace(config, transfer=transfer), teachers=folders)
    only_scratch = replace(wanted, recipe=recipe, only=("scratch",))
    assert run_ledger(only_scratch) == 0
    assert all(Path(folder, "result.json").exists() for folder in folders)
    assert load(wanted.out).sources == ("1", "2")
    assert train_teachers([recipe], None) == {}

    shutil.rmtree(tmp_path / "digits-teacher-2")
    broken = replace(config, data=replace(config.data, url=str(tmp_path / "nowhere")))
    monkeypatch.setattr(train, "get_recipe", lambda name: replace(
        teacher(name), config=replace(teacher(name).config, data=broken.data)
    ))  # fmt: skip
    assert run_ledger(replace(only_scratch, seeds=(5,))) == 1
    assert not list(wanted.out.glob("runs/*seed5*")), "nothing to be taught by"


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--seeds 3 1 3 --only tmu scratch --launcher local --training.num_steps 9 --parallel 2"
    wanted = parse(words.split())
    assert (wanted.seeds, wanted.only, wanted.parallel) == ((3, 1), ("tmu", "scratch"), 2)
    assert wanted.recipe.config.training.num_steps == 9
    assert wanted.recipe.config.launch.launcher == "local"
    assert wanted.out == tmp_path / "runs/ledger-digits-tmu"
    assert wanted.command == f"python -m tmu_dist.ledger {words}"
    for bad, named in (
        ("--only tmu-3", "--only tmu-3: no such arm. Arms: scratch, scratch-longer"),
        ("--recipe digits-scratch", "needs transfer.method=tmu, not scratch"),
        ("--output here", "--output has no effect here: say with --out"),
        ("--out s3://bucket/ledger", "a ledger lies on a disk"),
        ("--parallel 0", "at least one run"),
        ("--transfer.control shuffled", "both are arms of every ledger"),
    ):
        with pytest.raises(ConfigError, match=named):
            run_ledger(parse(bad.split()))
    assert not list(tmp_path.iterdir()), "refused before anything is made"


def test_pages_of_folders_without_a_ledger_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("page", "check"):
        with pytest.raises(SystemExit) as end:
            ledger.main([form, str(tmp_path)])
        assert end.value.code == 2
        assert "holds no ledger.json" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            ledger.main([form])
        assert f"`{form}` takes the folder of one ledger" in capsys.readouterr().err
