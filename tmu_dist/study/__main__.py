"""The tables and figures of the paper, run again and set beside what the paper says.

    python -m tmu_dist.study NAME|all [--scale small|paper] [--seeds 0 1 2] [--only ROW ...]
        [--weights chosen|last] [--out FOLDER] [--record FOLDER] [--launcher ray|local]
        [--parallel N] [--section.field value ...]
    python -m tmu_dist.study list
    python -m tmu_dist.study page FOLDER
    python -m tmu_dist.study check FOLDER
    python -m tmu_dist.study compare FOLDER FOLDER
    python -m tmu_dist.study summary [FOLDER]

The first form makes archives and teachers, trains every row of a study with every seed, scores all
on the test split, and writes OUT/NAME-SCALE/report.html, table.md and results.json
(docs/studies.md). What is finished is not run again, so the same command continues; `all` runs
every table and figure, one after another. --weights last scores the weights of the last iteration
in place of those that validation chose, of the same runs, and writes to OUT/NAME-SCALE-last; with
settings of your own the name says these, too (OUT/NAME-SCALE-num_steps=6000). --record copies what
was written to FOLDER/study-NAME, likewise.
`list` says which studies there are and what they need; `page` writes a page again from its record;
`check` takes every score again from the saved predictions; `compare` sets two records of a study
side by side, such as your own and the committed one; `summary` writes the tables of claims that
docs/results/README.md leads with. Settings of the runs are those of `tmu_dist.train --help`.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from tmu_dist.commands import command_errors, is_explained
from tmu_dist.config import ConfigError, RunConfig, with_overrides
from tmu_dist.data.storage import local_path
from tmu_dist.recipes.base import Recipe
from tmu_dist.study.design import (
    PAGE_FILE,
    RESULTS_FILE,
    SCALES,
    TABLE_FILE,
    Scale,
    Study,
    folder_name,
    settings_for_all,
)
from tmu_dist.study.studies import ALL, STUDIES, get_study
from tmu_dist.workspace import in_workspace

if TYPE_CHECKING:
    from tmu_dist.ledger.records import Weights
    from tmu_dist.training.many import Outcome

log = logging.getLogger(__name__)

RECORDS = "docs/results"
_PROG = "python -m tmu_dist.study"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one call is asked for."""

    studies: tuple[Study, ...]
    scale: Scale
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    """Rows to run; empty: all."""
    out: Path
    weights: Weights
    """Of each run, to be scored."""
    record: Path | None
    launcher: str | None
    parallel: int | None
    flags: tuple[str, ...]
    """Settings of the runs, as they were given."""
    command: str

    def folder(self, study: Study, recipes: Mapping[str, Recipe]) -> Path:
        """Of one study, with the runs of its rows."""
        settings = settings_for_all(study, self.scale, recipes)
        return self.out / folder_name(
            study.name, self.scale, settings=settings, weights=self.weights
        )

    def recipes(self, study: Study) -> dict[str, Recipe]:
        """The run of every row with the settings of the command.

        Raises:
            ConfigError: a row refuses them.
        """
        return {row.key: row.recipe_at(self.scale, self._for_all) for row in study.rows}

    def _for_all(self, plain: RunConfig) -> RunConfig:
        """What the command changes in every row."""
        config = plain
        if self.launcher is not None:
            config = with_overrides(config, {"launch.launcher": self.launcher})
        if self.flags:
            config = tyro.cli(RunConfig, prog=_PROG, default=config, args=list(self.flags))
        if config.output != plain.output:
            raise ConfigError("--output has no effect here: say with --out where studies lie.")
        if config.training.seed != plain.training.seed:
            raise ConfigError("--training.seed has no effect here: say --seeds 0 1 2.")
        return config


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.study`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    with command_errors():
        match words:
            case ["list"]:
                sys.stdout.write(overview())
            case ["page", folder]:
                rewrite_page(Path(folder))
            case ["check", folder]:
                raise SystemExit(check(Path(folder)))
            case ["compare", first, second]:
                sys.stdout.write(comparison(Path(first), Path(second)))
            case ["summary", *folders] if len(folders) <= 1:
                summarise(Path(folders[0] if folders else RECORDS))
            case ["list", *_]:
                raise ConfigError("`list` takes nothing else.")
            case ["compare", *_]:
                raise ConfigError("`compare` takes two folders, and nothing else.")
            case ["page" | "check" | "summary" as form, *_]:
                raise ConfigError(f"`{form}` takes one folder, and nothing else.")
            case _:
                raise SystemExit(run_studies(parse(words)))


def parse(words: Sequence[str]) -> Wanted:
    """What a command line asks for.

    Raises:
        ConfigError: an unknown study or row, or options that do not go with each other.
    """
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=f"all, {', '.join(STUDIES)}")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--out", default=in_workspace("runs/studies"))
    parser.add_argument("--weights", choices=("chosen", "last"), default="chosen")
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    parser.add_argument("--launcher", choices=("ray", "local"))
    parser.add_argument("--parallel", type=int)
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        raise ConfigError(f"{words[0]}: the name of a study comes first, or all.")
    known, flags = parser.parse_known_args(words)
    studies = tuple(STUDIES[name] for name in ALL) if known.name == "all" else (
        get_study(known.name),
    )  # fmt: skip
    out = local_path(known.out)
    if out is None:
        raise ConfigError(
            f"--out {known.out}: studies lie on a disk, their archives may be remote."
        )
    if known.parallel is not None and known.parallel < 1:
        raise ConfigError(f"--parallel {known.parallel}: at least one run has to go on.")
    rows = {row.key for study in studies for row in study.rows}
    if unknown := [key for key in known.only if key not in rows]:
        raise ConfigError(
            f"--only {' '.join(unknown)}: no such row. Rows: {', '.join(sorted(rows))}."
        )
    return Wanted(
        studies=studies,
        scale=known.scale,
        seeds=tuple(dict.fromkeys(known.seeds)),
        only=tuple(known.only),
        out=out,
        weights=known.weights,
        record=known.record,
        launcher=known.launcher,
        parallel=known.parallel,
        flags=tuple(flags),
        command=shlex.join([*_PROG.split(), *words]),
    )


def run_studies(wanted: Wanted) -> int:
    """Run every study that is wanted, and say at the end which could not be; the exit code."""
    plans = {study.name: wanted.recipes(study) for study in wanted.studies}  # refused before hours
    codes, problems = [], []
    for study in wanted.studies:
        log.info("%s, %s scale", study.title, wanted.scale)
        try:
            codes.append(run_study(wanted, study, plans[study.name]))
        except Exception as error:
            if len(wanted.studies) == 1 or not is_explained(error):
                raise
            problems.append(f"{study.name} was not run: {error}")
    for problem in problems:
        log.error("%s", problem)
    return 1 if problems or any(codes) else 0


def run_study(wanted: Wanted, study: Study, recipes: Mapping[str, Recipe]) -> int:
    """Make what is missing, run what is missing, write the page; returns the exit code.

    Raises:
        ConfigError: original files are missing, and which variable names them.
        ManifestError, TeacherError: an archive or a teacher cannot be read.
    """
    from tmu_dist.ledger.runs import report_failures, run_missing, train_teachers
    from tmu_dist.study.page import as_markdown, write_study
    from tmu_dist.study.record import make_record
    from tmu_dist.study.runs import (
        circumstances,
        has_inputs,
        make_plan,
        read_ledger,
        read_validations,
    )
    from tmu_dist.study.summary import record_name
    from tmu_dist.study.verdicts import find

    folder = wanted.folder(study, recipes)
    rows = [row.key for row in study.rows if not wanted.only or row.key in wanted.only]
    outcomes: dict[str, Outcome] = {}
    if rows:  # of several studies, some may have none that is wanted
        outcomes = train_teachers([recipes[key] for key in rows], wanted.parallel)
    folder.mkdir(parents=True, exist_ok=True)
    if any(outcome.error for outcome in outcomes.values()):
        return report_failures(folder, outcomes)
    seeds = sorted({*wanted.seeds, *_known_seeds(folder)})
    ready = {key: recipe for key, recipe in recipes.items() if has_inputs(recipe)}
    plan = make_plan(study, ready, seeds, wanted.out)
    if rows:
        keys = [(key, seed) for seed in wanted.seeds for key in rows]
        samples = study.samples.get(wanted.scale)
        outcomes = run_missing(
            plan, keys, wanted.parallel, num_samples=samples, weights=wanted.weights
        )
    ledger = read_ledger(study, plan, seeds, folder, outcomes, wanted.weights)
    if any(arm.seeds for arm in ledger.arms):
        known = circumstances(study, wanted.scale, recipes, ready, wanted.command, wanted.weights)
        validations = read_validations(ledger, folder)
        record = make_record(study, ledger, find(study, ledger), known, validations)
        write_study(folder, record)
        log.info("%s", as_markdown(record))
        log.info("Written to %s", folder)
        if wanted.record is not None:
            _keep(folder, wanted.record / record_name(record))
    return report_failures(folder, outcomes)


def _keep(folder: Path, kept: Path) -> None:
    """Copy what a study wrote to where records are kept."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS_FILE, TABLE_FILE, PAGE_FILE):
        shutil.copyfile(folder / name, kept / name)
    log.info("Recorded in %s", kept)


def _known_seeds(folder: Path) -> set[int]:
    """Seeds of an earlier call, perhaps of an older version, which stay on the page."""
    from tmu_dist.run_folder import read_json

    if not (folder / RESULTS_FILE).is_file():
        return set()
    return {int(seed) for row in read_json(folder, RESULTS_FILE)["rows"] for seed in row["seeds"]}


def rewrite_page(folder: Path) -> None:
    """Write the page and the table from the record, without running anything."""
    from tmu_dist.study.page import write_study
    from tmu_dist.study.record import StudyRecord

    write_study(folder, StudyRecord.load(folder))
    log.info("Written to %s", folder)


def check(folder: Path) -> int:
    """Take every score again from the saved predictions; returns the exit code."""
    from tmu_dist.study.page import check_study

    findings = check_study(folder)
    for finding in findings:
        log.error("%s", finding)
    if not findings:
        log.info("Every score of %s is what its saved predictions give.", folder)
    return 1 if findings else 0


def comparison(first: Path, second: Path) -> str:
    """Two records of a study side by side, as text."""
    from tmu_dist.study.comparison import compare

    return compare(first, second)


def summarise(folder: Path) -> None:
    """Write what became of all claims."""
    from tmu_dist.study.summary import write_summary

    log.info("Written to %s", write_summary(folder))


def overview() -> str:
    """Every study with its number of runs and claims, as text."""
    texts = {
        study.name: f"{study.title} (rows: {len(study.rows)}, claims: {len(study.claims)})"
        for study in STUDIES.values()
    }
    texts["all"] = ", ".join(ALL)
    width = max(map(len, texts))
    return "".join(f"{name:{width}} {text}\n" for name, text in texts.items())


if __name__ == "__main__":
    main()
