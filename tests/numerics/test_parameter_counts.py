"""Table 1's parameter counts: 3.0M; with memory transfer 3.6M at test and 9.5M at train time."""

from __future__ import annotations

from typing import Any

import pytest

from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.shapes import FrameShape

FLYING_DIGITS = FrameShape(channels=1, height=64, width=64)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ({}, 2_972_416),
        ({"peephole": "none"}, 2_971_648),
        ({"peephole": "full"}, 3_168_256),
        ({"peephole": "none", "gate_norm": "layer"}, 3_495_936),
    ],
)
def test_convlstm(model: dict[str, Any], count: int) -> None:
    assert count_parameters(build_predictor(FLYING_DIGITS, ModelConfig(**model))) == count


@pytest.mark.parametrize(
    ("model", "tmu", "count"),
    [
        ({}, {}, 3_589_376),
        ({"peephole": "none"}, {}, 3_588_608),
        ({"peephole": "none"}, {"gate_kernel_size": 5, "gate_norm": "none"}, 4_751_872),
        ({"peephole": "none"}, {"gate_kernel_size": 3, "gate_norm": "none"}, 3_801_600),
        ({"peephole": "none"}, {"gate_norm": "none"}, 3_326_464),
    ],
)
def test_tmu_with_two_teachers(model: dict[str, Any], tmu: dict[str, Any], count: int) -> None:
    network = build_predictor(
        FLYING_DIGITS, ModelConfig(**model), tmu=TMUConfig(**tmu), num_slots=2
    )
    assert count_parameters(network) == count


def test_default_prints_as_table_1() -> None:
    teacher = count_parameters(build_predictor(FLYING_DIGITS, ModelConfig()))
    student = count_parameters(
        build_predictor(FLYING_DIGITS, ModelConfig(), tmu=TMUConfig(), num_slots=2)
    )
    millions = [f"{n / 1e6:.1f}M" for n in (teacher, student, student + 2 * teacher)]
    assert millions == ["3.0M", "3.6M", "9.5M"]
