"""Flying digits: teachers learn one and two digits, the student must predict three (Table 1).

Each recipe exists in two sizes: `digits-*` finishes in minutes on two cores, and
`paper-digits-*` is the paper's protocol (Sec. 4 and 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tmu_dist.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TMUConfig,
    TrainingConfig,
    TransferConfig,
    WindowConfig,
)
from tmu_dist.recipes.base import Recipe, workspace


@dataclass(frozen=True, kw_only=True)
class Size:
    """Everything in which the small and the paper's experiment differ."""

    prefix: str
    source_sequences: tuple[int, int, int]
    """Training, validation and test sequences of the 1- and 2-digit archives."""
    target_sequences: tuple[int, int, int]
    archive_arguments: tuple[str, ...]
    window: WindowConfig
    model: ModelConfig
    training: TrainingConfig
    teacher_steps: int
    schedule: ScheduleConfig


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
        for digits in (1, 2):
            found[f"{size.prefix}-teacher-{digits}"] = partial(_teacher, size, digits)
            found[f"{size.prefix}-finetune-{digits}"] = partial(_finetune, size, digits)
        found[f"{size.prefix}-scratch"] = partial(
            _student, size, "scratch", TransferConfig(method="scratch")
        )
        found[f"{size.prefix}-tmu-scratch"] = partial(
            _student, size, "tmu-scratch", TransferConfig(method="tmu_scratch", num_slots=2)
        )
        found[f"{size.prefix}-tmu"] = partial(_tmu, size)
    return found


def _archive(
    size: Size, digits: int, sequences: tuple[int, int, int]
) -> dict[str, tuple[str, ...]]:
    url = str(workspace() / "archives" / f"{size.prefix}-{digits}")
    counts = zip(("--train", "--val", "--test"), map(str, sequences), strict=True)
    arguments = (
        *("moving-mnist", "--digits", str(digits), "--out", url),
        *(word for pair in counts for word in pair),
        *size.archive_arguments,
    )
    return {url: arguments}


def _run(size: Size, name: str, url: str, transfer: TransferConfig) -> RunConfig:
    return RunConfig(
        output=str(workspace() / "runs" / f"{size.prefix}-{name}"),
        window=size.window,
        data=DataConfig(url=url),
        model=size.model,
        transfer=transfer,
        training=size.training,
        schedule=size.schedule,
    )


def _teacher(size: Size, digits: int) -> Recipe:
    archives = _archive(size, digits, size.source_sequences)
    (url,) = archives
    config = _run(size, f"teacher-{digits}", url, TransferConfig(method="scratch"))
    training = replace(config.training, num_steps=size.teacher_steps)
    config = replace(config, training=training)
    return Recipe(config=config, archives=archives)


def _student(
    size: Size, name: str, transfer: TransferConfig, teachers: dict[str, str] | None = None
) -> Recipe:
    archives = _archive(size, 3, size.target_sequences)
    (url,) = archives
    config = _run(size, name, url, transfer)
    return Recipe(config=config, archives=archives, teachers=teachers or {})


def _teachers(size: Size, *digits: int) -> dict[str, str]:
    names = [f"{size.prefix}-teacher-{number}" for number in digits]
    return {str(workspace() / "runs" / name): name for name in names}


def _finetune(size: Size, digits: int) -> Recipe:
    teachers = _teachers(size, digits)
    transfer = TransferConfig(method="finetune", teachers=tuple(teachers))
    return _student(size, f"finetune-{digits}", transfer, teachers)


def _tmu(size: Size) -> Recipe:
    teachers = _teachers(size, 1, 2)
    transfer = TransferConfig(method="tmu", teachers=tuple(teachers), tmu=TMUConfig())
    return _student(size, "tmu", transfer, teachers)
