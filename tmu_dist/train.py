"""Train one run.

    python -m tmu_dist.train [--recipe NAME] [--config FILE] [--launcher L] [--section.field value]

Without arguments: the default recipe, a TMU student of three flying digits with two frozen
teachers, on digits that need no download. What a recipe needs and does not find (archives,
teachers) is made first. The same command again continues an interrupted run.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from tmu_dist.bundle import bundle_on_crash
from tmu_dist.collectives import Collectives, joined_ranks
from tmu_dist.commands import command_errors
from tmu_dist.config import (
    ConfigError,
    RunConfig,
    load_overrides,
    parse_overrides,
    with_overrides,
)
from tmu_dist.data.manifest import MANIFEST_PATH
from tmu_dist.data.storage import exists, read_text
from tmu_dist.recipes import DEFAULT_RECIPE, get_recipe, overview
from tmu_dist.recipes.base import Recipe
from tmu_dist.recipes.originals import missing_originals
from tmu_dist.run_folder import RESULT_FILE

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.train`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = parse_command(sys.argv[1:] if arguments is None else arguments)
    config = recipe.config
    timeout = config.faults.collective_timeout_seconds
    with (
        command_errors(),
        joined_ranks(config.launch.launcher, timeout_seconds=timeout) as collectives,
    ):
        run_recipe(recipe, collectives)


def parse_command(
    arguments: Sequence[str],
    *,
    prog: str = "python -m tmu_dist.train",
    summary: str = "Train one run.",
) -> Recipe:
    """Resolve recipe, file and flags, later ones winning, into a recipe.

    Args:
        arguments: of the command line.
        prog: the command that they belong to.
        summary: first sentences of its help.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--launcher")
    known, flags = parser.parse_known_args(arguments)
    with command_errors():
        recipe = get_recipe(known.recipe)
        config = recipe.config
        for file in known.config:
            config = with_overrides(config, _overrides_in(file))
        if known.launcher is not None:
            config = with_overrides(config, {"launch.launcher": known.launcher})
        config = tyro.cli(
            RunConfig,
            prog=prog,
            description=f"{summary} {_help(known.recipe)}",
            default=config,
            args=flags,
        )
    return replace(recipe, config=config)


def _overrides_in(file: str) -> dict[str, Any]:
    """The settings of a file in a store, or on a disk: a job's come with its working directory."""
    if "://" not in file:
        return load_overrides(file)
    folder, _, name = file.rpartition("/")
    return parse_overrides(read_text(folder, name), where=file)


def run_recipe(recipe: Recipe, collectives: Collectives) -> str:
    """Make what is missing, train, and say where the results are; returns the run folder.

    Every rank calls this; files are made by rank 0 alone. A crash leaves a bundle.
    """
    with bundle_on_crash(recipe.config, is_main=collectives.ranks.is_main):
        return _run_recipe(recipe, collectives)


def _run_recipe(recipe: Recipe, collectives: Collectives) -> str:
    from tmu_dist.training.launch import launch

    config = recipe.config
    collectives.on_main(lambda: make_archive(recipe, config.data.url))
    for teacher in collectives.on_main(lambda: missing_teachers(recipe)):
        student, name = Path(config.output).name, Path(teacher.config.output).name
        _say(collectives, f"{student} needs a teacher: training {name}")
        run_recipe(teacher, collectives)
    result = launch(config, collectives)
    _say(
        collectives,
        f"{Path(result.run).name}: {result.steps} steps, {result.seconds_per_batch:.3f} "
        f"s/batch; best validation MSE/frame {result.best_mse_per_frame:.2f} at step "
        f"{result.best_step}. Results: {result.run}",
    )
    return result.run


def missing_teachers(recipe: Recipe) -> list[Recipe]:
    """The teachers that a recipe can have trained and that are not, to be trained as it will be.

    Raises:
        ConfigError: one would not fit the student; said before hours are spent on it.
    """
    return [
        _teacher_for(recipe.config, get_recipe(recipe.teachers[teacher]))
        for teacher in recipe.config.transfer.teachers
        if teacher in recipe.teachers and not exists(teacher, RESULT_FILE)
    ]


def lacks_archive(recipe: Recipe, url: str) -> bool:
    """Whether an archive is one that a recipe can have made, and not there yet.

    Raises:
        StorageError: a store cannot be reached.
    """
    return url in recipe.archives and not exists(url, MANIFEST_PATH)


def make_archive(recipe: Recipe, url: str) -> None:
    """Write the archive that a recipe names, if it is the recipe's own and not there yet.

    A finished archive is taken as it is: original files are needed only once, on one machine.

    Raises:
        ConfigError: original files are missing; or it could not be written, and data_prep has said
            why.
    """
    if not lacks_archive(recipe, url):
        return
    from data_prep.__main__ import main as data_prep

    arguments = recipe.archives[url]
    if problem := missing_originals(arguments):
        raise ConfigError(problem)
    log.info("python -m data_prep %s", shlex.join(arguments))
    if data_prep(arguments) != 0:
        raise ConfigError(f"The archive {url} could not be prepared, see above.")


def _say(collectives: Collectives, message: str) -> None:
    if collectives.ranks.is_main:
        log.info("%s", message)


def _teacher_for(config: RunConfig, recipe: Recipe) -> Recipe:
    """A teacher's recipe, to be trained where the student will be.

    Raises:
        ConfigError: the teacher would not fit the student; said before hours are spent on it.
    """
    model = recipe.config.model
    if config.transfer.adapter.frames == "resize":  # frames and patches of its own
        model = replace(model, patch_size=config.model.patch_size)
    if model != config.model:
        raise ConfigError(
            f"{Path(config.output).name} has another network ({config.model}) than the teacher "
            f"{Path(recipe.config.output).name} that its recipe would train "
            f"({recipe.config.model}). Train teachers with these model.* settings first, and name "
            "them in transfer.teachers."
        )
    there = replace(recipe.config, launch=config.launch, scale=config.scale, faults=config.faults)
    return replace(recipe, config=there)


def _help(recipe: str) -> str:
    return (
        f"The defaults below are those of --recipe {recipe}. Also: --recipe NAME "
        f"({overview()}), --config FILE.yaml (settings of the same names, may be "
        "repeated), --launcher ray|local|torchrun."
    )


if __name__ == "__main__":
    main()
