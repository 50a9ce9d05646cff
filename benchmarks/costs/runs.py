"""What a process of the study does: measure a recipe's run, shortened; or count operations."""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.backbones.costs import peak_memory
from benchmarks.costs.report import Row
from benchmarks.provenance import say
from tmu_dist.collectives import Collectives
from tmu_dist.config import LaunchConfig, RunConfig
from tmu_dist.data.archive import open_archive
from tmu_dist.data.storage import list_objects
from tmu_dist.models.build import skeleton
from tmu_dist.recipes import EXPERIMENTS, get_recipe
from tmu_dist.run_folder import Event, read_log_lines
from tmu_dist.teachers.card import frame_shape
from tmu_dist.training.loop import train
from tuning.records import Operations

OPERATIONS_AT_ONCE, OPERATIONS = 4e11, 8e11
"""Of a measured iteration, and of all that are timed, about: seconds of a core."""
FEWEST_STEPS, MOST_STEPS = 2, 20
"""Iterations that are timed; one before them is not."""
OF_ONE_SOURCE = ("finetune", "l2sp", "tmu")
OF_ALL_SOURCES = ("tmu-scratch", "knowledge-flow", "art", "distillation", "tmu")
"""Names of recipes; the first ones end with a source's."""
FLOAT_BYTES = 4


def name_of(config: RunConfig) -> str:
    """The recipe's."""
    return Path(config.output).name


def shortened(config: RunConfig, operations: float) -> RunConfig:
    """A few iterations of a run, one update each, with as many sequences as are done in seconds.

    Args:
        config: of the run.
        operations: of the whole run.
    """
    training = config.training
    of_sequence = operations / updates(config) / training.batch_size
    sequences = min(max(int(OPERATIONS_AT_ONCE / of_sequence), 1), training.batch_size)
    timed = int(OPERATIONS / of_sequence / sequences)
    steps = 1 + min(max(timed, FEWEST_STEPS), MOST_STEPS)
    return replace(
        config,
        data=replace(config.data, max_validation_samples=1),
        training=replace(
            training, num_steps=steps, batch_size=sequences, reverse_input="off", decay_from=None
        ),
        schedule=replace(
            config.schedule, log_every=1, validate_every=steps, checkpoint_every=steps
        ),
        launch=LaunchConfig(launcher="local", device="cpu"),
    )


def updates(config: RunConfig) -> int:
    """How often a run learns from a batch."""
    directions = 1 if config.training.reverse_input == "off" else 2
    return directions * config.training.num_steps


def prepare_process() -> None:
    """One core, and no words of single runs."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def measure(config: RunConfig) -> Row:
    """Train in this process.

    Returns:
        `sequences` of an iteration; `seconds` of the processor for each iteration but the first;
        `on_core`, which part of their time that is; `peak_bytes` of the process; bytes of a
        checkpoint, of a model, and of a line of the log by its kind.
    """
    marks: list[tuple[float, float]] = []

    def listen(event: Event) -> None:
        if event["event"] == "train":
            marks.append((time.process_time(), time.perf_counter()))

    before = peak_memory("cpu")
    train(config, Collectives(), torch.device("cpu"), listener=listen)
    say(f"measured {name_of(config)}")
    run = config.output
    worked, passed = ([b - a for a, b in pairwise(times)] for times in zip(*marks, strict=True))
    return {
        "sequences": config.training.batch_size,
        "seconds": worked,
        "on_core": sum(worked) / sum(passed),
        "peak_bytes": peak_memory("cpu") - before,
        "checkpoint_bytes": sum(list_objects(run, "checkpoints").values()),
        "model_bytes": sum(list_objects(run, "models").values()),
        "log_bytes": _bytes_of_lines(run),
    }


def _bytes_of_lines(run: str) -> dict[str, float]:
    """Mean bytes of a line of the log by its event, what TensorBoard has of it included."""
    lines: dict[str, list[int]] = {}
    for line in read_log_lines(run):
        lines.setdefault(json.loads(line)["event"], []).append(len(line) + 1)
    all_bytes = sum(map(sum, lines.values()))
    drawn = 1 + sum(list_objects(run, "tensorboard").values()) / all_bytes
    return {event: drawn * statistics.fmean(sizes) for event, sizes in lines.items()}


def facts_of(config: RunConfig) -> Row:
    """What the config of a whole run says."""
    archive = open_archive(config.data.url).manifest
    network = skeleton(frame_shape(archive), config.model)
    numbers = sum(s.channels * s.slices * s.height * s.width for s in network.memory_shapes)
    told = (config.window.num_frames - 1) * numbers * FLOAT_BYTES  # not cached if latents are drawn
    training, schedule = config.training, config.schedule
    return {
        "archive": Path(config.data.url).name,
        "steps": training.num_steps,
        "batch_size": training.batch_size,
        "updates": updates(config),
        "lines": {
            "train": training.num_steps // schedule.log_every,
            "validation": training.num_steps // schedule.validate_every,
            "liveness": training.num_steps // schedule.validate_every + 1,
        },
        "kept_checkpoints": schedule.keep_checkpoints,
        "memory_bytes": None if network.latent_size else told,
    }


def count_others(prefix: str) -> dict[str, float]:
    """Operations of an experiment's students, by the names of their methods."""
    operations = Operations()
    source = next(name.removeprefix("teacher-") for name in EXPERIMENTS[prefix])
    recipes = {"scratch": "scratch"}
    recipes |= {f"{name}, one source": f"{name}-{source}" for name in OF_ONE_SOURCE}
    recipes |= {name: name for name in OF_ALL_SOURCES}
    return {
        label: count(operations, get_recipe(f"{prefix}-{name}").config)
        for label, name in recipes.items()
    }


def count(operations: Operations, config: RunConfig) -> float:
    """Of a whole run."""
    found = operations(config, config.training.num_steps)
    assert found is not None, f"{config.output}: archive or teachers are gone"
    return found
