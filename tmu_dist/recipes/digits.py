"""Flying digits: teachers learn one and two digits, the student must predict three (Table 1).

Each recipe exists in two sizes: `digits-*` finishes in minutes on two cores, and
`paper-digits-*` is the paper's protocol (Sec. 4 and 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tmu_dist.config import ModelConfig, ScheduleConfig, TrainingConfig, WindowConfig
from tmu_dist.recipes.base import Archives, ExperimentSize, Recipe, in_workspace, transfer_recipes

SOURCES = ("1", "2")
TARGET = "3"
"""Digits in a sequence."""


@dataclass(frozen=True, kw_only=True)
class Size(ExperimentSize):
    """Everything in which the small and the paper's experiment differ."""

    source_sequences: tuple[int, int, int]
    """Training, validation and test sequences of the 1- and 2-digit archives."""
    target_sequences: tuple[int, int, int]
    archive_arguments: tuple[str, ...]


SMALL = Size(
    prefix="digits",
    source_sequences=(2000, 100, 100),
    # A target with few sequences: the situation that the paper's method is for.
    target_sequences=(200, 100, 500),
    archive_arguments=(
        *("--frames", "10"),
        *("--frame-size", "32"),
        *("--digit-size", "14"),
        *("--speed", "1.5", "2.5"),
    ),
    window=WindowConfig(num_input_frames=5, num_target_frames=5),
    model=ModelConfig(num_layers=2, hidden_channels=32),
    training=TrainingConfig(num_steps=500, batch_size=8, sampling_stop_step=250),
    teacher_steps=600,
    schedule=ScheduleConfig(log_every=10, validate_every=50, checkpoint_every=100),
)

PAPER = Size(
    prefix="paper-digits",
    source_sequences=(10_000, 2_000, 3_000),
    target_sequences=(10_000, 2_000, 3_000),
    archive_arguments=(),
    window=WindowConfig(),
    model=ModelConfig(),
    training=TrainingConfig(),
    teacher_steps=80_000,
    schedule=ScheduleConfig(),
)


def recipes() -> dict[str, Callable[[], Recipe]]:
    """Every recipe of this file, by name."""
    found: dict[str, Callable[[], Recipe]] = {}
    for size in (SMALL, PAPER):
        found |= transfer_recipes(size, partial(_archive, size), sources=SOURCES, target=TARGET)
    return found


def _archive(size: Size, digits: str) -> Archives:
    url = in_workspace(f"archives/{size.prefix}-{digits}")
    sequences = size.target_sequences if digits == TARGET else size.source_sequences
    counts = zip(("--train", "--val", "--test"), map(str, sequences), strict=True)
    arguments = (
        *("moving-mnist", "--digits", digits, "--out", url),
        *(word for pair in counts for word in pair),
        *size.archive_arguments,
    )
    return {url: arguments}
