"""What do the recipes cost: time, memory, storage?

    python -m benchmarks.costs [--experiments digits paper-digits ...] [--processes 2]
                               [--teraflops 67] [--utilisation 0.15]

Of every experiment of `tmu_dist.recipes` the first teacher and the student `tmu` are trained for
3 to 21 iterations at their real size, by the real loop, in a process and on a core of their own,
from archives of a few sequences that are made first; all in a temporary folder. Batches are as
large as a core does in seconds, at most the recipe's. Then:

- core-hours: processor seconds of all iterations but the first, taken up to the recipe's batch
  (twice where it learns reversed sequences, too) and to its steps; validations are not in it;
- GPU-hours: counted operations of the whole run by `--teraflops` x `--utilisation`, which are
  assumed: no GPU was measured. Convolutions and matrix products count, discriminators do not;
- memory: the most that the process had, less what it had before;
- storage: bytes of checkpoint, model and log; those of the log taken up to the recipe's length;
- of all other recipes: counted operations, by those of `scratch`.

Archives of radar stand for themselves by digits in frames of their shape, so their bytes are given
as pixels. Prints the table and writes results.json and table.md to docs/results/costs.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.costs.report import Row, table
from benchmarks.costs.runs import (
    count,
    count_others,
    facts_of,
    measure,
    name_of,
    prepare_process,
    shortened,
    updates,
)
from benchmarks.provenance import command_line, provenance, publish, say
from data_prep.__main__ import main as data_prep
from tmu_dist.config import RunConfig
from tmu_dist.data.archive import open_archive
from tmu_dist.data.storage import list_objects
from tmu_dist.recipes import EXPERIMENTS, get_recipe
from tmu_dist.recipes.base import Recipe
from tmu_dist.workspace import WORKSPACE
from tuning.records import Operations

SEQUENCES = {"--train": 64, "--val": 8, "--test": 8}
"""Of the archives that are made here."""
TERAFLOPS, UTILISATION = 67.0, 0.15
"""Peak of an H100 in float32; and between what the batches of the paper's Table 1, 0.35 and 0.43 s,
are of a TITAN RTX's 16.3 for its plain network (0.12) and its TMU student (0.17)."""


def main() -> None:
    parser = command_line(__doc__, out="docs/results/costs")
    parser.add_argument("--experiments", nargs="+", choices=tuple(EXPERIMENTS))
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--teraflops", type=float, default=TERAFLOPS, help="peak of a GPU")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="part of the peak")
    chosen = parser.parse_args()
    prepare_process()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="costs-") as work:
        os.environ[WORKSPACE] = str(Path(work).absolute())
        found = measure_all(chosen.experiments or tuple(EXPERIMENTS), chosen.processes)
    record = {
        **provenance("benchmarks.costs", "cpu", chosen.revision),
        "seconds": round(time.monotonic() - started),
        "processes": chosen.processes,
        "assumed": {"teraflops": chosen.teraflops, "utilisation": chosen.utilisation},
        **found,
    }
    publish(record, table(record), chosen.out)


def measure_all(experiments: Sequence[str], processes: int) -> dict[str, Any]:
    """Make archives, run teachers, then students; count the rest.

    Args:
        experiments: prefixes of recipes.
        processes: runs at once.

    Returns:
        `recipes`: rows by name, a teacher and its student in turn; `others`: operations by
        experiment and name of the student; `archives`: rows by name.
    """
    students = [get_recipe(f"{prefix}-tmu") for prefix in experiments]
    taught_by = [[get_recipe(name) for name in student.teachers.values()] for student in students]
    teachers = [first for first, *_ in taught_by]
    archives = make_archives([*teachers, *students])
    operations = Operations()
    rows = measure_runs([recipe.config for recipe in teachers], operations, processes)
    for first, *others in taught_by:  # the others cost what the first did
        for other in others:
            shutil.copytree(first.config.output, other.config.output)
    rows |= measure_runs([recipe.config for recipe in students], operations, processes)
    with fresh_processes(processes) as pool:
        counts = list(pool.map(count_others, experiments))
    found = {}
    for first, student, all_of_them in zip(teachers, students, taught_by, strict=True):
        teacher, name = name_of(first.config), name_of(student.config)
        found[teacher] = {**rows[teacher], "teachers": []}
        found[name] = {**rows[name], "teachers": [teacher] * len(all_of_them)}
    return {
        "recipes": found,
        "others": dict(zip(experiments, counts, strict=True)),
        "archives": archives,
    }


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """So many at once, each for one task: a peak of memory is a task's own."""
    return ProcessPoolExecutor(
        number,
        multiprocessing.get_context("spawn"),
        initializer=prepare_process,
        max_tasks_per_child=1,
    )


def make_archives(recipes: Iterable[Recipe]) -> dict[str, Row]:
    """Write an archive of few sequences for each one that recipes learn from.

    Returns:
        Their `bytes_per_sequence` and how many `sequences` the recipe's has, by name; of radar the
        pixels, and None.
    """
    found: dict[str, Row] = {}
    for url, arguments in {u: a for recipe in recipes for u, a in recipe.archives.items()}.items():
        say(f"archive {Path(url).name}")
        if data_prep([*of_few_sequences(arguments), "--workers", "1"]) != 0:
            raise SystemExit(f"{url} could not be made.")
        manifest = open_archive(url).manifest
        pixels = manifest.num_frames * manifest.channels * manifest.height * manifest.width
        if arguments[0] == "moving-mnist":
            made = sum(list_objects(url).values()) / sum(SEQUENCES.values())
            sequences = sum(int(_value(arguments, flag)) for flag in SEQUENCES)
            found[Path(url).name] = {"bytes_per_sequence": made, "sequences": sequences}
        else:
            found[Path(url).name] = {"bytes_per_sequence": pixels, "sequences": None}
    return found


def of_few_sequences(arguments: Sequence[str]) -> list[str]:
    """Arguments of `python -m data_prep` for few sequences of digits in frames of that shape."""
    if arguments[0] == "moving-mnist":
        few = list(arguments)
        for flag, number in SEQUENCES.items():
            few[few.index(flag) + 1] = str(number)
        return few
    shape = ("--frames", _value(arguments, "--frames"), "--frame-size", _value(arguments, "--tile"))
    counts = [text for flag, number in SEQUENCES.items() for text in (flag, str(number))]
    return ["moving-mnist", "--digits", "3", "--out", _value(arguments, "--out"), *shape, *counts]


def _value(arguments: Sequence[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def measure_runs(
    configs: Sequence[RunConfig], operations: Operations, processes: int
) -> dict[str, Row]:
    """Run each in a process of its own, the longest first; rows by name of the recipe."""
    totals = [count(operations, config) for config in configs]
    shorts = [shortened(*each) for each in zip(configs, totals, strict=True)]
    order = sorted(range(len(configs)), key=lambda k: -totals[k] / updates(configs[k]))
    with fresh_processes(processes) as pool:
        found = dict(zip(order, pool.map(measure, [shorts[k] for k in order]), strict=True))
    return {
        name_of(config): {**facts_of(config), "operations": total, **found[k]}
        for k, (config, total) in enumerate(zip(configs, totals, strict=True))
    }


if __name__ == "__main__":
    main()
