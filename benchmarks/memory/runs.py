"""What a process of the study does: train a recipe for two iterations, and see what it takes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.report import Row
from benchmarks.provenance import say
from tmu_dist.collectives import Collectives
from tmu_dist.config import LaunchConfig, RunConfig, with_overrides
from tmu_dist.data.archive import open_archive
from tmu_dist.models.build import build_predictor
from tmu_dist.recipes import get_recipe
from tmu_dist.teachers.card import DataFacts, TeacherCard, frame_shape
from tmu_dist.teachers.store import load_card, write_model
from tmu_dist.training.launch import pick_device
from tmu_dist.training.loop import train
from tmu_dist.training.memory import training_memory

STEPS = 2
"""Iterations: the second one finds the optimiser's state."""
SMALLEST: Mapping[str, Any] = {"window.num_input_frames": 1, "window.num_target_frames": 2}
"""A run that loads whatever is loaded late."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one process measures."""

    name: str
    """Of the recipe."""
    device: str
    changes: Mapping[str, Any]
    """Settings that differ from it."""


def measure(trial: Trial, sequences: int) -> Row:
    """Train in this process, which did nothing before, and predict what that should have taken.

    Args:
        trial: the run.
        sequences: of a batch.
    """
    config = shortened(trial, sequences)
    device = pick_device(config.launch.device, local_rank=0)
    rehearsal = with_overrides(config, {**SMALLEST, "output": f"{config.output}-rehearsal"})
    train(rehearsal, Collectives(), device)
    _give_back()
    result = train(config, Collectives(), device)
    manifest = open_archive(config.data.url).manifest
    memory = training_memory(
        config,
        frame_shape(manifest),
        [load_card(teacher) for teacher in config.transfer.teachers],
        device=device,
        has_missing=manifest.units.missing_code is not None,
    )
    say(f"measured {Path(config.output).name} {dict(trial.changes)}")
    return {
        "recipe": trial.name,
        "changes": dict(trial.changes),
        "sequences": sequences,
        "predicted_bytes": memory.peak_bytes,
        "parts": dict(memory.parts),
        "measured_bytes": result.measured_peak_bytes,
    }


def shortened(trial: Trial, sequences: int) -> RunConfig:
    """A run of few iterations and few sequences."""
    config = get_recipe(trial.name).config
    training, schedule = config.training, config.schedule
    changes = (f"{name}={value}" for name, value in trial.changes.items())
    short = replace(
        config,
        output="-".join([config.output, *changes]),
        data=replace(config.data, max_validation_samples=1),
        training=replace(training, num_steps=STEPS, batch_size=sequences, decay_from=None),
        schedule=replace(schedule, log_every=1, validate_every=STEPS, checkpoint_every=STEPS),
        launch=LaunchConfig(launcher="local", device=trial.device),  # type: ignore[arg-type]
    )
    return with_overrides(short, trial.changes)


def write_untrained(config: RunConfig) -> None:
    """A teacher as it is before any training, where its run would be."""
    manifest = open_archive(config.data.url).manifest
    card = TeacherCard(
        name=Path(config.output).name,
        method="scratch",
        step=1,
        seed=config.training.seed,
        frame=frame_shape(manifest),
        window=config.window,
        model=config.model,
        tmu=config.transfer.tmu,
        num_slots=0,
        data=DataFacts.of(manifest),
    )
    torch.manual_seed(config.training.seed)
    write_model(Path(config.output), build_predictor(card.frame, config.model), card)


def _give_back() -> None:
    """Let the C library give the system what it only keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
