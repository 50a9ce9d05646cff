"""From the arms of a ledger to its finished and evaluated runs.

A run counts as done when its folder has both its result and its evaluation; nothing else is
remembered, so every call looks at the disk and adds what is missing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tmu_dist.config import RunConfig
from tmu_dist.data.loader import Archive, open_archives
from tmu_dist.data.storage import exists, join_url
from tmu_dist.evaluate import evaluate_model
from tmu_dist.evaluation.predictions import PREDICTIONS_NAME
from tmu_dist.evaluation.result import JSON_NAME
from tmu_dist.evaluation.training_operations import cost_of_transfer
from tmu_dist.files import atomic_write_text
from tmu_dist.folders import local_folder
from tmu_dist.ledger.arms import Arm, make_arms, run_configs
from tmu_dist.ledger.records import EVALUATION_FOLDERS, ArmRecord, SeedRecord, Weights, read_seed
from tmu_dist.models.build import skeleton
from tmu_dist.recipes.base import Recipe
from tmu_dist.run_folder import RESULT_FILE
from tmu_dist.teachers.card import frame_shape
from tmu_dist.teachers.store import load_card, load_model
from tmu_dist.train import make_archive, missing_teachers
from tmu_dist.training.checkpoint import checkpoint_of
from tmu_dist.training.launch import pick_device, with_absolute_paths
from tmu_dist.training.many import Job, Outcome, run_many

log = logging.getLogger(__name__)

RUNS_FOLDER = "runs"
FAILURES_FILE = "failures.txt"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every run that there could be."""

    arms: tuple[Arm, ...]
    configs: Mapping[tuple[str, int], RunConfig]
    """By arm and seed."""
    facts: Mapping[str, Any]
    """Of the experiment, for the page."""


def train_teachers(recipes: Sequence[Recipe], parallel: int | None) -> dict[str, Outcome]:
    """Make the archives of recipes and train their teachers, side by side; what is there stays.

    Returns:
        How each teacher that was missing ended, by run folder.
    """
    missing = {
        teacher.config.output: teacher for recipe in recipes for teacher in missing_teachers(recipe)
    }
    for recipe in (*recipes, *missing.values()):
        make_archive(recipe, recipe.config.data.url)
    jobs = [Job(config=with_absolute_paths(teacher.config)) for teacher in missing.values()]
    if jobs:
        log.info("%d teachers are to be trained first", len(jobs))
    return _run(jobs, recipes[0].config, parallel)


def make_plan(recipe: Recipe, seeds: Sequence[int], out: Path) -> Plan:
    """The runs of all arms, when archives and teachers are there.

    Raises:
        ManifestError, TeacherError: an archive or a teacher cannot be read.
    """
    config = with_absolute_paths(recipe.config)
    urls = (config.data.url, *config.data.mix_with)
    archives = open_archives(urls)
    manifest = archives[0].manifest
    teachers = [load_model(address) for address in config.transfer.teachers]
    frame = frame_shape(manifest)
    cost = cost_of_transfer(config, frame, [teacher.card for teacher in teachers])
    arms = make_arms(config, cost)
    contents = {url: archive.manifest.content_hash for url, archive in zip(urls, archives)}
    for address, teacher in zip(config.transfer.teachers, teachers):
        contents[address] = teacher.card.weights_sha256
    return Plan(
        arms=arms,
        configs=run_configs(arms, seeds, str(out / RUNS_FOLDER), contents),
        facts=_facts(config, archives[0], cost),
    )


def run_missing(
    plan: Plan,
    wanted: Sequence[tuple[str, int]],
    parallel: int | None,
    *,
    num_samples: int | None = None,
    weights: Weights = "chosen",
) -> dict[str, Outcome]:
    """Train and evaluate what is not done yet.

    Args:
        plan: of all runs.
        wanted: arms and seeds to look after.
        parallel: as in `run_many`.
        num_samples: forecasts of each sequence by a stochastic network; None: as usual.
        weights: which are to be evaluated.

    Returns:
        How each run that was missing ended, by run folder.
    """
    chosen = {plan.configs[key].output: plan.configs[key] for key in wanted}
    jobs = [
        Job(config=config, then=partial(evaluate_run, num_samples=num_samples, weights=weights))
        for folder, config in chosen.items()
        if not is_done(Path(folder), weights)
    ]
    log.info("%d runs, %d of them are done", len(chosen), len(chosen) - len(jobs))
    return _run(jobs, plan.configs[wanted[0]], parallel)


def evaluate_run(
    config: RunConfig, num_samples: int | None = None, weights: Weights = "chosen"
) -> None:
    """Evaluate a finished run on the test split, once, with its forecasts kept if it has one each.

    On a disk `evaluation.json` is written last, so where it is, the rest is, too.
    """
    run = config.output
    if is_done(run, weights):
        return
    model = run if weights == "chosen" else checkpoint_of(run, config.training.num_steps)
    card = load_card(model)
    is_stochastic = skeleton(card.frame, card.model).noise_size > 0
    with local_folder(join_url(run, EVALUATION_FOLDERS[weights])) as folder:
        result = evaluate_model(
            model,
            config.data.url,
            num_samples=num_samples if is_stochastic else None,
            predictions_to=None if is_stochastic else folder / PREDICTIONS_NAME,
            device=pick_device(config.launch.device, local_rank=0),
        )
        result.save(folder)


def is_done(run: str | Path, weights: Weights = "chosen") -> bool:
    """Whether a run, on a disk or in a store, is finished and some of its weights evaluated."""
    evaluation = join_url(EVALUATION_FOLDERS[weights], JSON_NAME)
    return exists(str(run), RESULT_FILE) and exists(str(run), evaluation)


def arm_records(
    plan: Plan,
    seeds: Sequence[int],
    out: Path,
    outcomes: Mapping[str, Outcome],
    weights: Weights = "chosen",
) -> tuple[ArmRecord, ...]:
    """What is known of every arm.

    Args:
        plan: of all runs.
        seeds: to look for.
        out: folder that runs are named from.
        outcomes: of the runs of this call, by run folder.
        weights: whose evaluations.
    """
    read: dict[str, SeedRecord] = {}

    def record(arm: Arm) -> ArmRecord:
        done, failed = {}, {}
        for seed in seeds:
            folder = plan.configs[arm.name, seed].output
            run = os.path.relpath(folder, out)
            if is_done(Path(folder), weights):
                if run not in read:
                    read[run] = read_seed(out, run, weights)
                done[seed] = read[run]
            elif folder in outcomes and (error := outcomes[folder].error) is not None:
                failed[seed] = error
        return ArmRecord(
            name=arm.name,
            label=arm.label,
            group=arm.group,
            sources=arm.sources,
            method=arm.config.transfer.method,
            seeds=done,
            failures=failed,
        )

    return tuple(record(arm) for arm in plan.arms)


def report_failures(out: Path, outcomes: Mapping[str, Outcome]) -> int:
    """Say what failed, at the end, where it is seen, and keep the traces; returns the exit code."""
    file = out / FAILURES_FILE
    failed = {run: outcome for run, outcome in outcomes.items() if outcome.error is not None}
    file.unlink(missing_ok=True)
    if not failed:
        return 0
    traces = [f"{run}\n{outcome.trace or outcome.error}" for run, outcome in failed.items()]
    atomic_write_text(file, "\n\n".join(traces) + "\n")
    for run, outcome in failed.items():
        log.error("%s failed: %s", Path(run).name, outcome.error)
    log.error("%d of %d failed; traces are in %s", len(failed), len(outcomes), file)
    return 1


def _run(jobs: Sequence[Job], config: RunConfig, parallel: int | None) -> dict[str, Outcome]:
    """How each job ended, by run folder; all are launched as `config` is."""
    outcomes = run_many(jobs, config.launch, parallel)
    return {job.config.output: outcome for job, outcome in zip(jobs, outcomes)}


def _facts(config: RunConfig, archive: Archive, cost: float) -> dict[str, Any]:
    manifest, model, training = archive.manifest, config.model, config.training
    return {
        "archive": manifest.name,
        "sequences": {split: manifest.num_samples(split) for split in manifest.splits},
        "frame": [manifest.channels, manifest.height, manifest.width],
        "num_input_frames": config.window.num_input_frames,
        "num_target_frames": config.window.num_target_frames,
        "cell": model.cell,
        "num_layers": model.num_layers,
        "hidden_channels": model.hidden_channels,
        "num_steps": training.num_steps,
        "batch_size": training.batch_size,
        "fraction": config.data.fraction,
        "cost_of_transfer": cost,
    }
