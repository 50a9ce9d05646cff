"""Errors for the user are one line; bugs keep their trace."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tmu_dist.__main__ import COMMANDS
from tmu_dist.__main__ import main as tmu_dist
from tmu_dist.commands import command_errors
from tmu_dist.config import ConfigError
from tmu_dist.data.loader import open_archive
from tmu_dist.teachers.store import load_model


def refuse() -> None:
    raise ConfigError("no such thing")


@pytest.mark.parametrize(
    ("action", "named"),
    [
        (refuse, "no such thing"),
        (lambda: load_model("nowhere"), "nowhere"),
        (lambda: open_archive("nowhere"), "nowhere"),
    ],
)
def test_the_project_s_own_errors_are_one_line(
    action: Callable[[], object], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving, command_errors():
        action()
    assert leaving.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and named in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    "bug", [lambda: json.loads("{"), lambda: list(zip([1], [], strict=True)), lambda: 1 / 0]
)
def test_bugs_keep_their_trace(bug: Callable[[], object]) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)), command_errors():
        bug()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tmu-dist", command, "--help"])
    with pytest.raises(SystemExit) as leaving:
        tmu_dist()
    assert leaving.value.code == 0
    assert f"tmu_dist.{command}" in capsys.readouterr().out


def test_unknown_command_lists_the_known_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tmu-dist", "trian"])
    with pytest.raises(SystemExit) as leaving:
        tmu_dist()
    assert leaving.value.code == 2
    shown = capsys.readouterr().err
    assert all(command in shown for command in COMMANDS)
