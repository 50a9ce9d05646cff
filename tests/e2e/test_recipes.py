"""Recipes make what they need: the demo in miniature, and several ranks that need a teacher."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.test_ranks import spawn
from tmu_dist import recipes
from tmu_dist.collectives import Collectives
from tmu_dist.config import ModelConfig, ScheduleConfig, TrainingConfig, WindowConfig
from tmu_dist.demo import EXPERIMENTS, run_demo
from tmu_dist.recipes import digits, get_recipe
from tmu_dist.recipes.base import by_whole_name
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.store import load_card
from tmu_dist.train import main, run_recipe

MINIATURE = replace(
    digits.SMALL,
    source_sequences=(8, 4, 4),
    target_sequences=(8, 4, 4),
    archive_arguments=(
        *("--frames", "6"),
        *("--frame-size", "16"),
        *("--digit-size", "7"),
        *("--speed", "1", "2"),
        *("--workers", "1"),
    ),
    window=WindowConfig(num_input_frames=3, num_target_frames=3),
    model=ModelConfig(num_layers=2, hidden_channels=4, kernel_size=3),
    training=TrainingConfig(num_steps=3, batch_size=4),
    teacher_steps=2,
    schedule=ScheduleConfig(log_every=1, validate_every=2, checkpoint_every=2),
)


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The small recipes, shrunk to seconds, in a workspace of their own."""
    monkeypatch.setenv("TMU_DIST_HOME", str(tmp_path))
    monkeypatch.setattr(digits, "SMALL", MINIATURE)
    monkeypatch.setattr(recipes, "RECIPES", by_whole_name(digits.experiments()))
    return tmp_path


def test_demo_ends_in_one_page_that_needs_nothing_else(miniature: Path) -> None:
    page = Path(run_demo("digits", "local")).read_text()
    for label in EXPERIMENTS["digits"].students:
        assert label in page
    assert "persistence" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert {folder.name for folder in (miniature / "archives").iterdir()} == {
        "digits-1",
        "digits-2",
        "digits-3",
    }
    card = load_card(str(miniature / "runs" / "digits-tmu"))
    assert card.teachers == ("digits-teacher-1", "digits-teacher-2")
    assert (miniature / "runs" / "digits-tmu" / "evaluation-test" / "evaluation.json").is_file()


def test_command_runs_a_recipe_from_an_empty_disk_and_again(
    miniature: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--recipe", "digits-finetune-1", "--launcher", "local"]
    main(words)
    weights = (miniature / "runs" / "digits-finetune-1" / "selected.json").read_text()
    main(words)
    assert (miniature / "runs" / "digits-finetune-1" / "selected.json").read_text() == weights
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--training.seed", "5"])
    assert leaving.value.code == 2
    assert "training.seed" in capsys.readouterr().err


def test_teachers_that_would_not_fit_are_not_even_trained(
    miniature: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--launcher", "local", "--model.hidden-channels", "8"])
    assert "Train teachers with these model.* settings first" in capsys.readouterr().err
    assert not (miniature / "runs").exists()


def _run_tmu(collectives: Collectives, home: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMU_DIST_HOME", home)
        patch.setattr(digits, "SMALL", MINIATURE)
        patch.setattr(recipes, "RECIPES", by_whole_name(digits.experiments()))
        recipe = get_recipe("digits-tmu")
        local = replace(recipe.config.launch, launcher="local")
        config = replace(recipe.config, launch=local)
        run_recipe(replace(recipe, config=config), collectives)


@pytest.mark.distributed
def test_two_ranks_share_what_must_be_made_first(tmp_path: Path) -> None:
    spawn(2, _run_tmu, str(tmp_path))
    for run in ("digits-teacher-1", "digits-teacher-2", "digits-tmu"):
        events = read_log(tmp_path / "runs" / run)
        assert events[-1]["event"] == "validation"
