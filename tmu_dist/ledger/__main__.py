"""Is it the teachers' knowledge that helps, or only the extra parameters?

    python -m tmu_dist.ledger [--recipe NAME] [--seeds 0 1 2] [--only ARM ...] [--out FOLDER]
        [--launcher ray|local] [--parallel N] [--section.field value ...]
    python -m tmu_dist.ledger page FOLDER
    python -m tmu_dist.ledger check FOLDER

The first form trains every arm of a recipe of memory transfer with every seed, scores all on the
test split, and writes OUT/report.html and OUT/table.md (docs/ledger.md). Runs are ordinary ones in
OUT/runs: what is finished is not run again, so the same command continues, and more seeds or arms
add to the page. `page` writes the page again from what is there; `check` takes every score again
from the saved predictions.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tmu_dist.commands import command_errors
from tmu_dist.config import ConfigError
from tmu_dist.data.storage import local_path
from tmu_dist.provenance import git_revision
from tmu_dist.recipes import DEFAULT_RECIPE, get_recipe
from tmu_dist.recipes.base import Recipe
from tmu_dist.train import parse_command
from tmu_dist.workspace import in_workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one call is asked for."""

    name: str
    """Of the recipe."""
    recipe: Recipe
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    """Arms to run; empty: all."""
    out: Path
    parallel: int | None
    command: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.ledger`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    with command_errors():
        match words:
            case ["page", folder]:
                rewrite_page(Path(folder))
            case ["check", folder]:
                raise SystemExit(check(Path(folder)))
            case ["page" | "check" as form, *_]:
                raise ConfigError(f"`{form}` takes the folder of one ledger, and nothing else.")
            case _:
                raise SystemExit(run_ledger(parse(words)))


def parse(words: Sequence[str]) -> Wanted:
    """What a command line asks for.

    Raises:
        ConfigError: options that do not go with each other, or with this command.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--out")
    parser.add_argument("--parallel", type=int)
    known, flags = parser.parse_known_args(words)
    recipe = parse_command(
        ["--recipe", known.recipe, *flags],
        prog="python -m tmu_dist.ledger",
        summary="Train every arm that tells knowledge from parameters. Takes also: --seeds 0 1 2, "
        "--only ARM ..., --out FOLDER, --parallel N; or `page FOLDER`, `check FOLDER` alone.",
    )
    address = known.out or in_workspace(f"runs/ledger-{known.recipe}")
    out = local_path(address)
    if out is None:
        raise ConfigError(f"--out {address}: a ledger lies on a disk, its archives may be remote.")
    if recipe.config.output != get_recipe(known.recipe).config.output:
        raise ConfigError("--output has no effect here: say with --out where the ledger lies.")
    if known.parallel is not None and known.parallel < 1:
        raise ConfigError(f"--parallel {known.parallel}: at least one run has to go on.")
    return Wanted(
        name=known.recipe,
        recipe=recipe,
        seeds=tuple(dict.fromkeys(known.seeds)),
        only=tuple(known.only),
        out=out,
        parallel=known.parallel,
        command=shlex.join(["python", "-m", "tmu_dist.ledger", *words]),
    )


def run_ledger(wanted: Wanted) -> int:
    """Make what is missing, run what is missing, write the page; returns the exit code.

    Raises:
        ConfigError: the recipe is not one of memory transfer, or an arm is unknown.
        ManifestError, TeacherError: its archive or a teacher cannot be read.
    """
    from tmu_dist.ledger.records import Ledger, save
    from tmu_dist.ledger.runs import (
        arm_records,
        make_plan,
        report_failures,
        run_missing,
        train_teachers,
    )

    names = _chosen_arms(wanted)
    outcomes = train_teachers([wanted.recipe], wanted.parallel)
    if any(outcome.error for outcome in outcomes.values()):
        return report_failures(wanted.out, outcomes)
    seeds = sorted({*wanted.seeds, *_known_seeds(wanted.out)})
    plan = make_plan(wanted.recipe, seeds, wanted.out)
    keys = [(name, seed) for seed in wanted.seeds for name in names]
    outcomes = run_missing(plan, keys, wanted.parallel)
    ledger = Ledger(
        recipe=wanted.name,
        command=wanted.command,
        git_revision=git_revision(),
        sources=next(arm.sources for arm in plan.arms if arm.name == "tmu"),
        facts=plan.facts,
        arms=arm_records(plan, seeds, wanted.out, outcomes),
    )
    save(ledger, wanted.out)
    if any(arm.seeds for arm in ledger.arms):
        rewrite_page(wanted.out)
    return report_failures(wanted.out, outcomes)


def rewrite_page(folder: Path) -> None:
    """Write the page and the table from the records, without running anything."""
    from tmu_dist.ledger.page import write_ledger
    from tmu_dist.ledger.records import load

    write_ledger(folder, load(folder))
    log.info("Written to %s", folder)


def check(folder: Path) -> int:
    """Take every score again from the saved predictions; returns the exit code."""
    from tmu_dist.ledger.page import check_ledger

    findings = check_ledger(folder)
    for finding in findings:
        log.error("%s", finding)
    if not findings:
        log.info("Every score of %s is what its saved predictions give.", folder)
    return 1 if findings else 0


def _chosen_arms(wanted: Wanted) -> list[str]:
    """Names of the arms to run, before anything is made."""
    from tmu_dist.ledger.arms import make_arms

    names = [arm.name for arm in make_arms(wanted.recipe.config, cost_of_transfer=1.0)]
    unknown = [name for name in wanted.only if name not in names]
    if unknown:
        raise ConfigError(f"--only {' '.join(unknown)}: no such arm. Arms: {', '.join(names)}.")
    return [name for name in names if not wanted.only or name in wanted.only]


def _known_seeds(out: Path) -> set[int]:
    """Seeds of an earlier call, which stay on the page."""
    from tmu_dist.ledger.records import LEDGER_FILE, read_tree

    if not (out / LEDGER_FILE).is_file():
        return set()
    return {int(seed) for arm in read_tree(out)["arms"] for seed in arm["runs"]}


if __name__ == "__main__":
    main()
