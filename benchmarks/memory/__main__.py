"""Does training take the memory that is predicted for it?

    python -m benchmarks.memory [--recipes digits-tmu ...] [--device cpu | cuda]
                                [--operations 4e11] [--revision REVISION]

Of every experiment of `tmu_dist.recipes` the first teacher and the student `tmu` are trained for
two iterations at their real size by the real loop, each in a fresh process on one core, from
archives of a few sequences that are made first; all in a temporary folder. Teachers are untrained:
they take as much. Batches are the recipe's, or as many sequences as take about `--operations` an
iteration. Some settings that change the memory are tried on one recipe beside.

- predicted: `tmu_dist.training.memory.training_memory`, from settings and cards alone;
- measured: the most that the process had, less what it had before, when all libraries were loaded
  by a run of two frames; on a GPU the most that tensors held;
- ratio: predicted by measured.

Prints the table and writes results.json and table.md to docs/results/memory.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.costs.__main__ import fresh_processes, make_archives
from benchmarks.costs.runs import count, prepare_process, updates
from benchmarks.memory.report import Row, table
from benchmarks.memory.runs import Trial, measure, write_untrained
from benchmarks.provenance import command_line, provenance, publish, say
from tmu_dist.recipes import EXPERIMENTS, get_recipe
from tmu_dist.recipes.base import Recipe
from tmu_dist.workspace import WORKSPACE
from tuning.records import Operations

OPERATIONS = 4e11
"""Of an iteration, about: seconds of a core."""
VARIED = "paper-digits-tmu"
SETTINGS: tuple[dict[str, Any], ...] = (
    {"training.precision": "bf16"},
    {"compute.convolution": "direct"},
    {"compute.arithmetic": "plain"},
    {"compute.recompute": True},
    {"scale.sequences_at_once": 1},
    {"training.reverse_input": "average"},
)
"""What is tried on that recipe."""


def main() -> None:
    parser = command_line(__doc__, out="docs/results/memory", takes_device=True)
    names = [name for prefix in EXPERIMENTS for name in measured_of(prefix)]
    parser.add_argument("--recipes", nargs="+", choices=names, default=names)
    parser.add_argument("--operations", type=float, default=OPERATIONS, help="of an iteration")
    chosen = parser.parse_args()
    prepare_process()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="memory-") as work:
        os.environ[WORKSPACE] = str(Path(work).absolute())
        rows = measure_all(chosen.recipes, chosen.operations, chosen.device)
    record = {
        **provenance("benchmarks.memory", chosen.device, chosen.revision),
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }
    publish(record, table(record), chosen.out)


def measured_of(prefix: str) -> tuple[str, str]:
    """The recipes of an experiment that are measured."""
    first = next(name for name in EXPERIMENTS[prefix] if name.startswith("teacher-"))
    return f"{prefix}-{first}", f"{prefix}-tmu"


def measure_all(names: Sequence[str], operations: float, device: str) -> list[Row]:
    """One row a recipe, and one a setting of the recipe that is varied, if that is among them."""
    recipes = {name: get_recipe(name) for name in names}
    make_inputs(list(recipes.values()))
    trials = [Trial(name=name, device=device, changes={}) for name in names]
    if VARIED in names:
        trials += [Trial(name=VARIED, device=device, changes=changes) for changes in SETTINGS]
    rows = []
    counted = Operations()
    for trial in trials:
        config = recipes[trial.name].config
        of_sequence = count(counted, config) / updates(config) / config.training.batch_size
        # An even number: pairs of sequences are the least for some settings.
        sequences = min(max(int(operations / of_sequence), 2), config.training.batch_size)
        with fresh_processes(1) as pool:
            rows.append(pool.submit(measure, trial, sequences).result())
    return rows


def make_inputs(recipes: Sequence[Recipe]) -> None:
    """Archives, and untrained teachers."""
    teachers = {name: get_recipe(name) for each in recipes for name in each.teachers.values()}
    make_archives([*recipes, *teachers.values()])
    for name, teacher in teachers.items():
        say(f"teacher {name}")
        write_untrained(teacher.config)


if __name__ == "__main__":
    main()
