"""Find the transfer scheme for a target: beta, sources, amount of data, any other setting.

    python tuning/search.py [--space NAME|FILE] [--recipe NAME] [--out FOLDER]
        [--sampler grid|random|tpe] [--num-samples N] [--scheduler none|asha|median] [--seeds 0 1 2]
        [--launcher ray|local] [--config FILE] [--section.field value ...]
    python tuning/search.py status FOLDER
    python tuning/search.py report FOLDER

The first form tries points of a space (docs/searches.md) on Ray, each with every seed as an
ordinary run, chooses the best by the validation split, scores it once on the test split, and writes
OUT/report.html and OUT/best.yaml. Without arguments it is a search of minutes on digits that need
no download. The same command continues after any interruption. `status` tells of a running or dead
search, `report` writes the page again from what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run by path, Python would look for modules beside this file and not in the repository.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import logging
import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import tyro

from tmu_dist.commands import command_errors
from tmu_dist.config import ConfigError, with_overrides
from tmu_dist.data.storage import join_url
from tmu_dist.folders import write_text
from tmu_dist.recipes import get_recipe
from tmu_dist.recipes.base import Recipe
from tmu_dist.train import parse_command
from tmu_dist.workspace import in_workspace
from tuning.plan import Search, SearchConfig, load_search, save_search
from tuning.refusals import naming
from tuning.space_files import (
    SpaceFile,
    check_fractions,
    make_space,
    overview,
    read_space_file,
)

if TYPE_CHECKING:
    from tmu_dist.training.run_lock import RunLock
    from tuning.findings import Findings

log = logging.getLogger(__name__)

DEFAULT_SPACE = "small"
_PROG = "python tuning/search.py"
_MUTED = {
    ("sampler", "grid"): ("sampler", "num_samples", "objectives"),
    ("scheduler", "none"): ("scheduler", "grace_steps", "fidelity", "fractions"),
    ("scheduler", "median"): ("fidelity", "fractions"),
    ("fidelity", "step"): ("fidelity", "fractions"),
    ("fidelity", "fraction"): ("grace_steps",),
}
"""Options of a file that a flag leaves no room for."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one call is asked for."""

    file: SpaceFile
    name: str
    """Of the recipe."""
    recipe: Recipe
    options: SearchConfig
    out: str
    command: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python tuning/search.py`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    with command_errors():
        match words:
            case ["status", folder]:
                from tuning.status import status

                status(folder)
            case ["report", folder]:
                write_again(folder)
            case ["status" | "report" as form, *_]:
                raise ConfigError(f"`{form}` takes the folder of one search, and nothing else.")
            case _:
                run_search(parse(words))


def parse(words: Sequence[str]) -> Wanted:
    """What a command line asks for; what it leaves out, the space's file may say.

    Raises:
        ConfigError: something unknown, or options that do not go with each other.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--space", default=DEFAULT_SPACE)
    parser.add_argument("--recipe")
    parser.add_argument("--out")
    known, flags = parser.parse_known_args(words)
    file = read_space_file(known.space)
    name = known.recipe or file.recipe
    options, rest = tyro.cli(
        SearchConfig,
        prog=_PROG,
        description=f"{__doc__}\nSpaces:{overview()}\n\nSettings of every trial are those of "
        "`python -m tmu_dist.train`, as --section.field.",
        default=_defaults(file, flags),
        args=flags,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
    recipe = parse_command(["--recipe", name, *rest], prog=_PROG, summary="Search.")
    if recipe.config.output != get_recipe(name).config.output:
        raise ConfigError("--output has no effect here: say with --out where the search lies.")
    return Wanted(
        file=file,
        name=name,
        recipe=recipe,
        options=options,
        out=known.out or in_workspace(f"runs/search-{name}-{file.name}"),
        command=shlex.join(["python", "tuning/search.py", *words]),
    )


def _defaults(file: SpaceFile, flags: Sequence[str]) -> SearchConfig:
    """The options of a space's file, without those that the command line leaves no room for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("sampler", "scheduler", "fidelity"):
        parser.add_argument(f"--{name}")
    said = vars(parser.parse_known_args(flags)[0]).items()
    mute = set[str]().union(*(_MUTED.get(each, ()) for each in said))
    with naming(file.origin):
        options = {name: value for name, value in file.search.items() if name not in mute}
        return with_overrides(SearchConfig(), options)


def run_search(wanted: Wanted) -> None:
    """Make what is missing, try what is left, choose, score, and write the page.

    Raises:
        ConfigError: the space does not go with the recipe, the folder holds another search, ...
        RunStoppedError: it was asked to stop.
    """
    # What follows loads torch and Ray, which --help and mistakes in a space do not need.
    from tmu_dist.training.launch import absolute, with_absolute_paths
    from tmu_dist.training.stopping import RunStoppedError

    base = wanted.recipe.config
    search = Search(
        folder=absolute(wanted.out),
        recipe=wanted.name,
        command=wanted.command,
        base=with_absolute_paths(base),
        space=make_space(wanted.file, base),
        options=wanted.options,
    )
    log.info("%s: %s", search.folder, _extent(search))
    with closing(_lock(search.folder)):
        save_search(search)
        _make_inputs(wanted.recipe, search)
        try:
            _try_points(search)
        except RunStoppedError:
            _report(search)
            raise
        _conclude(search)


def _lock(folder: str) -> RunLock:
    """Keep other drivers out of the search.

    Raises:
        ConfigError: another one is at work.
    """
    from tmu_dist.training.checkpoint import ResumeError
    from tmu_dist.training.run_lock import holder, lock_run

    try:
        return lock_run(folder)
    except ResumeError:
        raise ConfigError(
            f"{holder(folder) or 'Another process'} runs this search: wait for it, look at it with "
            f"`{_PROG} status {folder}`, or choose another --out."
        ) from None


def _extent(search: Search) -> str:
    """How much it is going to be.

    Raises:
        ConfigError: a range has no points for a grid.
    """
    options = search.options
    count = options.num_samples or sum(1 for _ in search.space.grid())
    points = f"{count} points{' of a grid' if options.sampler == 'grid' else ''}"
    return f"{points}, {len(options.seeds)} seed{'s' if len(options.seeds) > 1 else ''} each"


def _make_inputs(recipe: Recipe, search: Search) -> None:
    """Archives and teachers that the recipe can make, and whether there is as much data as asked.

    Raises:
        ConfigError: an archive or a teacher could not be made, or a fraction is too large.
        TeacherError: a teacher is missing, or does not fit.
    """
    from tmu_dist.data.archive import open_archive
    from tmu_dist.ledger.runs import train_teachers
    from tmu_dist.teachers.card import DataFacts, frame_shape
    from tmu_dist.transfer.prepare import planned_teachers

    outcomes = train_teachers([recipe], parallel=None)
    if errors := [f"{run}: {end.error}" for run, end in outcomes.items() if end.error is not None]:
        raise ConfigError(f"A teacher could not be trained: {'; '.join(errors)}")
    manifest = open_archive(search.base.data.url).manifest
    check_fractions(
        search.space,
        search.options.fractions,
        num_train_samples=manifest.num_samples("train"),
        full=manifest.full_train_samples,
    )
    frame = frame_shape(manifest)
    run = with_overrides(search.base, search.space.settings)
    planned_teachers(run, frame, DataFacts.of(manifest))


def _try_points(search: Search) -> None:
    """Run every trial that is left."""
    from tuning.agenda import Agenda
    from tuning.engine import run_trials
    from tuning.journal import Journal
    from tuning.records import Operations, outcome_of, read_records
    from tuning.samplers import make_sampler

    journal, operations = Journal(search.folder), Operations()
    agenda = Agenda(
        journal,
        make_sampler(search.space, search.options),
        search.options.seeds,
        search.options.scheduler != "none",
        lambda trial: outcome_of(search, trial, operations),
    )
    ended = [trial for trial in journal.trials if trial.state in ("finished", "stopped")]
    run_trials(search, agenda, read_records(search, ended))


def _conclude(search: Search) -> None:
    """Choose by the validation split, score on the test split, tell; no choice is exit code 1."""
    from tuning.best import SETTINGS_FILE, choose, export, score
    from tuning.report import PAGE_FILE, write_report

    findings = _report(search)  # now, in case that scoring fails
    point = choose(findings)
    if point is None or point.error is None:
        log.error("No point has all its trials whole, so there is no best one: %s", search.folder)
        raise SystemExit(1)
    write_text(search.folder, SETTINGS_FILE, export(search, point))
    best = score(search, point)
    write_report(search, findings, best)
    test = fmean(best.test[search.options.error].values())
    log.info(
        "Best: %s; validation %s %.2f, test %.2f. Train it: %s",
        *(point.label or "the recipe", search.options.error, point.error.mean, test, best.command),
    )
    log.info("Report: %s", join_url(search.folder, PAGE_FILE))


def write_again(folder: str) -> None:
    """Write the page and tables of a search from what is there.

    Raises:
        ConfigError: there is no search.
    """
    from tmu_dist.training.launch import absolute

    _report(load_search(absolute(folder)))


def _report(search: Search) -> Findings:
    """Write the page and tables of all trials so far; returns what they say."""
    from tuning.best import read_best
    from tuning.findings import find
    from tuning.journal import read_trials
    from tuning.records import read_records
    from tuning.report import write_report

    findings = find(search, read_records(search, read_trials(search.folder)))
    write_report(search, findings, read_best(search.folder))
    return findings


if __name__ == "__main__":
    main()
