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

import tyro

from tmu_dist.commands import command_errors
from tmu_dist.config import ConfigError, RunConfig, load_overrides, with_overrides
from tmu_dist.recipes import DEFAULT_RECIPE, RECIPES, get_recipe
from tmu_dist.recipes.base import Recipe

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.train`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = parse_command(sys.argv[1:] if arguments is None else arguments)
    with command_errors():
        run_recipe(recipe)


def parse_command(arguments: Sequence[str]) -> Recipe:
    """Resolve recipe, file and flags, later ones winning, into a recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--launcher")
    known, flags = parser.parse_known_args(arguments)
    with command_errors():
        recipe = get_recipe(known.recipe)
        config = recipe.config
        for file in known.config:
            config = with_overrides(config, load_overrides(file))
        if known.launcher is not None:
            config = with_overrides(config, {"launch.launcher": known.launcher})
        config = tyro.cli(
            RunConfig,
            prog="python -m tmu_dist.train",
            description=_help(known.recipe),
            default=config,
            args=flags,
        )
    return replace(recipe, config=config)


def run_recipe(recipe: Recipe) -> str:
    """Make what is missing, train, and say where the results are; returns the run folder."""
    from tmu_dist.training.launch import launch

    config = recipe.config
    make_archive(recipe, config.data.url)
    for teacher in config.transfer.teachers:
        if teacher in recipe.teachers and not (Path(teacher) / "result.json").is_file():
            name = recipe.teachers[teacher]
            log.info("%s needs a teacher: training recipe %s", Path(config.output).name, name)
            run_recipe(_launched_alike(get_recipe(name), config))
    result = launch(config)
    log.info(
        "%s: %d steps; best validation MSE/frame %.2f at step %d. Results: %s",
        Path(result.run).name,
        result.steps,
        result.best_mse_per_frame,
        result.best_step,
        result.run,
    )
    return result.run


def make_archive(recipe: Recipe, url: str) -> None:
    """Write the archive that a recipe names, if it is the recipe's own and not there yet."""
    if url not in recipe.archives or (Path(url) / "manifest.json").is_file():
        return
    from data_prep.__main__ import main as data_prep

    arguments = recipe.archives[url]
    log.info("python -m data_prep %s", shlex.join(arguments))
    status = data_prep(arguments)
    if status:
        raise ConfigError(f"The archive {url} could not be prepared (see above).")


def _launched_alike(recipe: Recipe, config: RunConfig) -> Recipe:
    return replace(recipe, config=replace(recipe.config, launch=config.launch))


def _help(recipe: str) -> str:
    return (
        f"Train one run. The defaults below are those of --recipe {recipe}. Also: --recipe NAME "
        f"({', '.join(RECIPES)}), --config FILE.yaml (settings of the same names, may be "
        "repeated), --launcher ray|local|torchrun."
    )


if __name__ == "__main__":
    main()
