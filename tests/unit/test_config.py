"""Settings: one path to change them, and errors that say which one to change."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tmu_dist.config import (
    BetaSchedule,
    ConfigError,
    RunConfig,
    TMUConfig,
    from_dict,
    load_overrides,
    resume_conflicts,
    with_overrides,
)
from tmu_dist.folders import write_text
from tmu_dist.recipes import RECIPES, get_recipe
from tmu_dist.train import parse_command


def test_eq_5_is_as_printed_for_the_papers_numbers_of_teachers() -> None:
    auto = TMUConfig()
    assert [auto.combination(m) for m in (1, 2, 3, 4, 41)] == ["paper"] * 3 + ["mean"] * 2
    assert TMUConfig(combine="paper").combination(41) == "paper"
    assert TMUConfig(combine="mean").combination(1) == "mean"


def test_dotted_overrides_change_one_field() -> None:
    config = with_overrides(RunConfig(), {"training.learning_rate": "3e-4", "output": "there"})
    assert config.training.learning_rate == 3e-4
    assert config.output == "there"
    assert config.model == RunConfig().model


def test_settings_that_belong_together_may_come_in_any_order() -> None:
    for order in (1, -1):
        pair = [("transfer.teachers", ["a", "b"]), ("transfer.method", "tmu")][::order]
        transfer = with_overrides(RunConfig(), dict(pair)).transfer
        assert transfer.teachers == ("a", "b")
        assert transfer.num_tmu_slots == 2


TAUGHT = {"transfer.method": "tmu", "transfer.teachers": ["a", "b"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.learning_rte": 1}, "Did you mean 'training.learning_rate'"),
        ({"trainig.seed": 1}, "Did you mean 'training'"),
        ({"training.seed": "many"}, "training.seed='many': .*integer"),
        ({"training": 3}, "'training' is a section"),
        ({"transfer.method": "magic"}, "'scratch', 'finetune', 'l2_sp'"),
        ({"transfer.method": "tmu"}, "at least one teacher"),
        ({"transfer.teachers": ["a"]}, "uses no teachers"),
        ({"transfer.method": "finetune", "transfer.teachers": ["a", "b"]}, "exactly one teacher"),
        ({"transfer.num_slots": 2}, "only has an effect with transfer.method=tmu_scratch"),
        (
            {"transfer.method": "tmu", "transfer.teachers": ["a"], "transfer.tmu.layers": [1, 1]},
            "must be different numbers from 0 on",
        ),
        ({"transfer.beta": 0.5}, "transfer.beta only has an effect with transfer.method=tmu"),
        (
            {"transfer.tmu.combine": "mean"},
            "transfer.tmu only has an effect with transfer.method=tmu, tmu_scratch",
        ),
        ({"training.seed": 1, "training": {"seed": 2}}, "given twice"),
        ({"model.kernel_size": 4}, "must be odd"),
        ({"model.cell": "convltsm"}, "'convlstm', 'predrnn'"),
        ({"model.recall_window": 0}, "must be >= 1 or left out"),
        ({"model.savp.latent_size": 0, "model.savp.prior": "learned"}, "has no effect"),
        ({"training.adversarial.feature_weight": 10.0}, "no effect without discriminators"),
        ({"training.decay_from": 80_000}, "must lie before the last iteration"),
        ({"training.adam_beta1": 1.0}, r"must be in \[0, 1\)"),
        (
            {"transfer.adapter.grid": "resample"},
            "transfer.adapter only has an effect with transfer.method=finetune, l2_sp",
        ),
        ({"transfer.method": "l2_sp", "transfer.teachers": ["a", "b"]}, "exactly one teacher"),
        ({"transfer.method": "art"}, "needs at least one teacher"),
        ({"transfer.l2_sp.alpha": 0.1}, "transfer.l2_sp only has an effect with"),
        ({"transfer.art.window": 3}, "transfer.art only has an effect with transfer.method=art"),
        ({**TAUGHT, "transfer.start.teacher": 2}, "is none of the 2 teachers"),
        ({**TAUGHT, "transfer.start.unmatched": "random"}, "no effect without transfer.start.te"),
        ({**TAUGHT, "transfer.imitation.teacher_weights": [1]}, "one number for each of the 2"),
        ({**TAUGHT, "transfer.imitation.layers": [-1]}, "different numbers from 0 on, or all"),
        ({"transfer.imitation_start": "memories"}, "only has an effect with transfer.method=tmu,"),
        (
            {**TAUGHT, "transfer.imitation_start": "memories", "model.norm_affine": "none"},
            "they have none",
        ),
        (
            {
                **TAUGHT,
                "transfer.imitation_start": "memories",
                "transfer.adapter.channels": "project",
            },
            "needs teachers with the student's channels",
        ),
        ({**TAUGHT, "transfer.beta_schedule.stop": 9}, "no effect with transfer.beta_schedule.sh"),
        ({**TAUGHT, "transfer.beta_schedule.shape": "linear"}, "needs 0 <= start < stop"),
        ({**TAUGHT, "transfer.method": "finetune"}, "exactly one teacher"),
        (
            {**TAUGHT, "transfer.method": "art", "transfer.control": "shuffled"},
            "part of the tested network",
        ),
        (
            {**TAUGHT, "transfer.method": "knowledge_flow", "transfer.teacher_input": "student"},
            "reads the teachers' states",
        ),
        (
            {
                "transfer.method": "finetune",
                "transfer.teachers": ["a"],
                "transfer.start.teacher": 0,
            },
            "starts from its only teacher",
        ),
        ({"data.fraction": 0}, r"must be > 0 and finite"),
        ({"data.fraction": float("inf")}, r"must be > 0 and finite"),
        ({"launch.launcher": "local", "scale.num_workers": 2}, "only has an effect"),
        ({"scale.num_workers": "8..2"}, "the fewest"),
        ({"scale.num_workers": "2-8"}, r"such as 2\.\.8"),
        (
            {"scale.sequences_at_once": 1, "training.adversarial.video_weight": 0.1},
            "learn from a rank's whole batch",
        ),
        ({"placement.kind": "placed"}, "no teacher runs beside"),
        ({**TAUGHT, "transfer.method": "art", "placement.group": "all"}, "are a part of it"),
        ({**TAUGHT, "transfer.method": "tmu", "placement.kind": "cached"}, "placement.cache goes"),
        (
            {
                **TAUGHT,
                "transfer.method": "tmu",
                "placement.kind": "cached",
                "placement.cache": "memories",
            },
            "same frames in every epoch",
        ),
    ],
)
def test_nonsense_is_refused_with_the_way_out(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(RunConfig(), overrides)


def test_saved_config_comes_back_equal() -> None:
    config = with_overrides(
        RunConfig(),
        {"transfer.method": "tmu", "transfer.teachers": ["a"], "transfer.tmu.layers": [1]},
    )
    assert from_dict(asdict(config)) == config


def test_yaml_files_are_partial_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training:\n  seed: 3\nmodel.num_layers: 2\n")
    config = with_overrides(RunConfig(), load_overrides(file))
    assert (config.training.seed, config.model.num_layers) == (3, 2)
    file.write_text("training: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_overrides(file)
    with pytest.raises(ConfigError, match="does not exist"):
        load_overrides(tmp_path / "none.yaml")


def test_what_may_change_between_starts() -> None:
    saved = RunConfig()
    moved = with_overrides(
        saved, {"data.url": "s3://elsewhere", "launch.max_failures": 0, "training.num_steps": 1}
    )
    assert resume_conflicts(saved, moved) == []
    taught = with_overrides(saved, {"transfer.method": "tmu", "transfer.teachers": ["a"]})
    elsewhere = {"scale.num_workers": "2..8", "placement.kind": "placed", "placement.group": 4}
    assert resume_conflicts(taught, with_overrides(taught, elsewhere)) == []
    rounded = with_overrides(taught, {"placement.kind": "placed", "placement.memories": "bf16"})
    (line,) = resume_conflicts(taught, rounded)
    assert "placement.memories" in line
    other = replace(saved, training=replace(saved.training, learning_rate=0.1))
    (line,) = resume_conflicts(saved, other)
    assert "training.learning_rate" in line and "0.001" in line and "0.1" in line
    flowing = with_overrides(
        saved, {"transfer.method": "knowledge_flow", "transfer.teachers": ["a"]}
    )
    longer = replace(flowing, training=replace(flowing.training, num_steps=90_000))
    (line,) = resume_conflicts(flowing, longer)  # its curriculum is laid out over all iterations
    assert "training.num_steps" in line


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.2] * 5),
        ("linear", [0.2, 0.2, 0.1, 0.0, 0.0]),
        ("cosine", [0.2, 0.2, 0.1, 0.0, 0.0]),
    ],
)
def test_beta_moves_from_one_value_to_another(shape: str, expected: list[float]) -> None:
    ends = {} if shape == "constant" else {"start": 10, "stop": 30}
    schedule = BetaSchedule(shape=shape, **ends)  # type: ignore[arg-type]
    found = [schedule.at(step, 0.2) for step in (1, 10, 20, 30, 99)]
    assert found == pytest.approx(expected)
    if shape == "cosine":  # slow at both ends
        assert schedule.at(15, 0.2) == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)) / 2)


def test_every_recipe_is_valid_and_knows_how_to_make_what_it_needs() -> None:
    for name in RECIPES:
        recipe = get_recipe(name)
        assert recipe.config.data.url in recipe.archives
        assert set(recipe.config.transfer.teachers) == recipe.teachers.keys()
        for folder, teacher in recipe.teachers.items():
            assert get_recipe(teacher).config.output == folder
    with pytest.raises(ConfigError, match="Did you mean 'digits-tmu'"):
        get_recipe("digit-tmu")


@pytest.mark.parametrize(("prefix", "full"), [("digits", 200), ("paper-digits-mim", 10_000)])
def test_recipe_for_fractions_learns_from_twice_the_data(prefix: str, full: int) -> None:
    usual, larger = get_recipe(f"{prefix}-tmu"), get_recipe(f"{prefix}-fractions")
    same = {"output": usual.config.output, "data.url": usual.config.data.url}
    assert with_overrides(larger.config, same) == usual.config
    (url, arguments), ((_, before),) = *larger.archives.items(), usual.archives.items()
    flags = dict(zip(arguments[1::2], arguments[2::2]))
    assert flags["--out"] == url == larger.config.data.url != usual.config.data.url
    assert (flags["--train"], flags["--full-train-samples"]) == (str(2 * full), str(full))
    assert {*before} - {*arguments} == {usual.config.data.url}


def test_paper_recipe_is_the_paper() -> None:
    config = get_recipe("paper-digits-tmu").config
    assert config.model.num_layers == 4 and config.model.hidden_channels == 64
    assert config.training.num_steps == 80_000 and config.training.batch_size == 8
    assert config.training.learning_rate == 1e-3 and config.transfer.beta == 0.1
    assert config.window.num_input_frames == config.window.num_target_frames == 10


def test_command_line_wins_over_file_over_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {seed: 3, batch_size: 6}\n")
    words = f"--recipe digits-scratch --config {file} --training.seed 4 --launcher local"
    recipe = parse_command(words.split())
    assert recipe.config.training.seed == 4
    assert recipe.config.training.batch_size == 6
    assert (
        recipe.config.training.num_steps == get_recipe("digits-scratch").config.training.num_steps
    )
    assert recipe.config.launch.launcher == "local"


@pytest.mark.parametrize(
    "words",
    ["--recipe nothing", "--config none.yaml", "--training.sed 4", "--launcher cloud"],
)
def test_wrong_commands_end_with_code_2_and_say_why(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_command(words.split())
    assert leaving.value.code == 2
    shown = capsys.readouterr()
    assert words.split()[-1].lstrip("-") in shown.err + shown.out


def test_a_file_of_settings_may_lie_in_a_store() -> None:
    write_text("memory://settings", "best.yaml", "training: {seed: 7}\n")
    words = ["--config", "memory://settings/best.yaml"]
    assert parse_command(words).config.training.seed == 7
    with pytest.raises(SystemExit):
        parse_command(["--config", "memory://settings/none.yaml"])
