"""The walk-through of docs/adding_a_backbone.md works: its file and its line pass the suite."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.contracts import test_predictor as suite
from tmu_dist.backbones import BACKBONES
from tmu_dist.config import TMUConfig
from tmu_dist.models.build import build_predictor

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_backbone.md"
CASES = [
    case
    for name, case in vars(suite).items()
    if name.startswith("test_") and "network" in inspect.signature(case).parameters
]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's cell, registered by the page's line under a module of its own."""
    code, line, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    name, module, attribute = re.findall(r'"(\w+)": "([\w.]+):(\w+)"', line)[0]
    (tmp_path / "example_backbone.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert module == "tmu_dist.models.cells.coupled"
    monkeypatch.setitem(BACKBONES, name, f"example_backbone:{attribute}")
    return name


@pytest.mark.parametrize("num_slots", [0, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_example_passes_the_suite(
    example: str, case: Callable[..., None], num_slots: int
) -> None:
    torch.manual_seed(0)
    model = suite.small(example)
    case(build_predictor(suite.FRAME, model, tmu=TMUConfig(), num_slots=num_slots))


def test_the_suite_is_not_empty() -> None:
    assert len(CASES) >= 10
