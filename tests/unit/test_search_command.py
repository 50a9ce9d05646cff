"""What a command line of `tuning/search.py` asks for, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tmu_dist.config import ConfigError
from tuning.search import main, parse

SPACE = """
about: a test
recipe: digits-tmu
search: {sampler: tpe, num_samples: 9, scheduler: asha, grace_steps: 8, seeds: [4, 5]}
axes:
  transfer.beta: [0.1, 1.0]
"""


@pytest.fixture
def space(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(SPACE)
    return str(file)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command line ends."""
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def test_flags_win_over_the_file_and_the_file_over_defaults(space: str) -> None:
    wanted = parse(["--space", space])
    options = wanted.options
    assert (options.sampler, options.num_samples, options.seeds) == ("tpe", 9, (4, 5))
    assert (options.scheduler, options.grace_steps, options.retries) == ("asha", 8, 2)
    wanted = parse(["--space", space, "--seeds", "1", "2", "3", "--num-samples", "3"])
    assert (wanted.options.seeds, wanted.options.num_samples) == ((1, 2, 3), 3)
    assert (wanted.options.sampler, wanted.options.grace_steps) == ("tpe", 8)


@pytest.mark.parametrize("joined", [False, True])
def test_flags_leave_no_room_for_what_the_file_says_beside_them(space: str, joined: bool) -> None:
    def flag(name: str, value: str) -> list[str]:
        return [f"{name}={value}"] if joined else [name, value]

    assert parse(["--space", space, *flag("--sampler", "grid")]).options.num_samples is None
    assert parse(["--space", space, *flag("--scheduler", "none")]).options.grace_steps is None
    fractions = ["--fractions", "0.5", "1"]
    by_fraction = parse(["--space", space, *flag("--fidelity", "fraction"), *fractions]).options
    assert (by_fraction.grace_steps, by_fraction.fractions) == (None, (0.5, 1.0))


def test_the_run_is_that_of_the_train_command(space: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{training: {num_steps: 77, batch_size: 3}}")
    words = ["--space", space, "--config", str(config), "--training.batch-size", "5"]
    wanted = parse([*words, "--launcher", "local", "--out", "somewhere"])
    run = wanted.recipe.config
    assert (run.training.num_steps, run.training.batch_size) == (77, 5)
    assert run.launch.launcher == "local"
    assert (wanted.name, wanted.out) == ("digits-tmu", "somewhere")
    assert wanted.command.startswith(f"python tuning/search.py --space {space} --config")


def test_a_search_has_a_folder_of_its_own_and_a_recipe_from_its_space(space: str) -> None:
    wanted = parse(["--space", space])
    assert (wanted.name, wanted.out.endswith("runs/search-digits-tmu-mine")) == ("digits-tmu", True)
    other = parse(["--space", space, "--recipe", "digits-scratch"])
    assert other.out.endswith("runs/search-digits-scratch-mine")
    assert parse([]).out.endswith("runs/search-digits-tmu-small")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--space", "nonsense"], "nonsense"),
        (["--recipe", "nonsense"], "nonsense"),
        (["--seeds", "1", "1"], "--seeds (1, 1) names a seed twice"),
        (["--scheduler", "none", "--grace-steps", "5"], "--grace-steps only has an effect"),
        (["--best", "retrain"], "--retrain-seeds"),
        (["--output", "elsewhere"], "--out"),
        (["status"], "`status` takes the folder of one search"),
        (["report", "a", "b"], "`report` takes the folder of one search"),
        (["status", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(words, capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--nonsense", "1"], "nonsense"),
        (["--scheduler", "magic"], "scheduler"),
        (["--training.learning-rat", "1"], "learning-rat"),
        (["--num-samples", "many"], "num-samples"),
    ],
)
def test_flags_that_do_not_exist_are_named(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(words)
    shown = capsys.readouterr()
    assert leaving.value.code == 2 and named in shown.err + shown.out


def test_what_a_file_says_is_refused_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(SPACE.replace("num_samples: 9", "num_samples: 0"))
    with pytest.raises(ConfigError, match=r"bad\.yaml: .*--num-samples 0 must be at least 1"):
        parse(["--space", str(file)])


def test_help_and_mistakes_need_neither_torch_nor_ray() -> None:
    script = Path(sys.modules["tuning.search"].__file__ or "")
    code = (
        f"import runpy, sys; sys.argv = [{str(script)!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('LOADED', sorted({'torch', 'ray', 'optuna'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert "LOADED []" in ended.stdout, ended.stderr
    assert "--num-samples" in ended.stdout and "--space" in ended.stdout
