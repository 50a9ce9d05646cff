"""Errors for the user are one line; bugs keep their trace."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

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
