"""A student of two teachers that trains at once, for drills and stopwatches that start it often."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from tmu_dist.config import (
    DataConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    TransferConfig,
    WindowConfig,
)
from tmu_dist.training.launch import launch


def prepare_student(folder: Path, *, hidden_channels: int, num_steps: int) -> RunConfig:
    """Make an archive of digits and two teachers, and say how a student is trained with them.

    Args:
        folder: for all of it; the student's run is to be in `folder / "student"`.
        hidden_channels: of all networks, which have two layers.
        num_steps: of the teachers' training, and of the student's.
    """
    settings = MovingMNISTConfig(
        digits=2, train=64, val=8, test=8, frames=10, frame_size=32, digit_size=14
    )
    url = str(folder / "archive")
    write_moving_mnist(settings, url, workers=1, show_progress=False)
    config = RunConfig(
        output=str(folder / "student"),
        window=WindowConfig(num_input_frames=5, num_target_frames=5),
        data=DataConfig(url=url),
        model=ModelConfig(num_layers=2, hidden_channels=hidden_channels),
        training=TrainingConfig(num_steps=num_steps, batch_size=8),
        schedule=ScheduleConfig(log_every=1),
        launch=LaunchConfig(launcher="local"),
    )
    teachers = []
    for seed in (1, 2):
        training = replace(config.training, seed=seed)
        output = str(folder / f"teacher-{seed}")
        teachers.append(launch(replace(config, output=output, training=training)).run)
    return replace(config, transfer=TransferConfig(method="tmu", teachers=tuple(teachers)))
