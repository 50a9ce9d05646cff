"""Errors for the user are one line; bugs keep their trace."""

from __future__ import annotations

import json
import subprocess
import sys
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


READER_LEAVES = """
import os, sys
from tmu_dist.commands import command_errors
from tmu_dist.config import ConfigError
reading, writing = os.pipe()
os.dup2(writing, 1)
os.close(reading)
with command_errors():
    {action}
"""


def after_the_reader_left(action: str) -> subprocess.CompletedProcess[str]:
    """A command that does this; its output is buffered, whatever the environment says (-E)."""
    script = READER_LEAVES.format(action=action)
    return subprocess.run([sys.executable, "-E", "-c", script], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("action", "code", "trace"),
    [
        ("print('x' * 100_000)", 141, ""),
        ("print('little, which waits in the buffer')", 141, ""),
        ("print('help'); sys.exit(0)", 141, ""),
        ("os.dup2(2, 1); raise BrokenPipeError('a worker has ended')", 1, "a worker has ended"),
    ],
    ids=["much", "little", "help", "another pipe"],
)
def test_a_reader_who_leaves_ends_a_command_quietly(action: str, code: int, trace: str) -> None:
    done = after_the_reader_left(action)
    assert done.returncode == code
    assert trace in done.stderr if trace else done.stderr == ""


def test_a_failure_is_told_even_if_nobody_reads_the_output() -> None:
    done = after_the_reader_left("print('first'); raise ConfigError('no such thing')")
    assert done.returncode not in (0, 141)
    assert done.stderr.startswith("error: no such thing")


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
