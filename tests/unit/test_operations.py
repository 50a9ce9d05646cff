"""docs/operations.md: messages that it explains and checks that it lists are the project's."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tmu_dist.doctor.findings import CHECKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
UNKNOWN = "\0"
"""Stands for what a message says only when it is raised."""


def rows_of(section: str) -> list[str]:
    """What stands between backquotes in the first cells of a section's first table."""
    text = PAGE.split(f"\n## {section}\n")[1]
    _, _, *rows = text[text.index("\n|") + 1 :].split("\n\n")[0].split("\n")
    return [row.split("`")[1] for row in rows]


@cache
def texts() -> tuple[str, ...]:
    """Every string of the sources, and the scripts of cluster/ whole."""
    found = [path.read_text() for path in (ROOT / "cluster").glob("*.sh")]
    for package in ("tmu_dist", "data_prep", "tuning"):
        for path in (ROOT / package).rglob("*.py"):
            found += [
                text for node in ast.walk(ast.parse(path.read_text())) if (text := text_of(node))
            ]
    return tuple(found)


def text_of(node: ast.AST) -> str:
    """What a string literal says; UNKNOWN for what is formatted into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or UNKNOWN for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_said(message: str) -> bool:
    """Whether one text has all parts of a message in their order."""
    parts = re.split(r" ?\.\.\. ?", message)
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in texts())


@pytest.mark.parametrize("message", rows_of("When it goes wrong"))
def test_every_message_is_in_the_sources(message: str) -> None:
    assert is_said(message)


def test_messages_that_nobody_says_are_seen() -> None:
    assert is_said("is training in ...: wait for it")
    assert not is_said("is training in ...: give it up")
    assert not is_said("wait for it, or ... is training in")


def test_every_check_of_the_doctor_has_its_row() -> None:
    assert rows_of("The doctor") == list(CHECKS)
