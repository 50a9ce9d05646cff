"""Question: how do errors fall under the settings that a search varies, and how much do seeds move?

    python -m benchmarks.search_curves [--quick] [--processes 2]

Trains every point of a grid (weight of the distillation, learning rate, sets of teachers, fraction
of the target data) with every seed to its end, without early stopping: small students of three
digits, recipe digits-tmu shortened to 128 iterations and validated after every eighth. Writes
results.json, which `benchmarks.search_simulation` draws large searches from, and table.md to
docs/results/search-curves.

Runs are ordinary ones of one worker, side by side, kept below --work (default: the workspace of the
recipes): the same command continues. --quick is 4 runs of 32 iterations, to see that it works.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.provenance import command_line, provenance, publish, record_folder
from tmu_dist.config import LaunchConfig, RunConfig, with_overrides
from tmu_dist.ledger.arms import stretched
from tmu_dist.ledger.runs import train_teachers
from tmu_dist.ledger.words import spread
from tmu_dist.recipes import get_recipe
from tmu_dist.run_folder import read_log
from tmu_dist.training.launch import with_absolute_paths
from tmu_dist.training.many import Job, run_many
from tmu_dist.workspace import in_workspace
from tuning.records import Operations
from tuning.space import FRACTION, SOURCES, Axis, Point, Space, run_of

RECIPE = "digits-tmu"
BETA, LEARNING_RATE = "transfer.beta", "training.learning_rate"


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is recorded."""

    axes: tuple[Axis, ...]
    num_steps: int
    validate_every: int


WHOLE = Size(
    axes=(
        Axis(name=SOURCES, values=(("1",),)),
        Axis(name=FRACTION, values=(0.5, 1.0)),
        Axis(name=LEARNING_RATE, values=(5e-4, 2e-3), is_log=True),
        Axis(name=BETA, values=(0.003, 0.1, 3.0), is_log=True),
    ),
    num_steps=128,
    validate_every=8,
)
QUICK = Size(
    axes=(
        Axis(name=SOURCES, values=(("1", "2"),)),
        Axis(name=BETA, values=(0.003, 3.0), is_log=True),
    ),
    num_steps=32,
    validate_every=4,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record, or continue to."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="4 short runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="two at least")
    parser.add_argument("--processes", type=int, help="runs at once; default: one a CPU")
    parser.add_argument("--work", default=in_workspace("runs/search-curves"))
    chosen = parser.parse_args(arguments)
    if len(chosen.seeds) < 2:
        parser.error("--seeds: two at least, or nothing is known of the spread between them.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = QUICK if chosen.quick else WHOLE
    curves = record_curves(size, chosen.seeds, chosen.work, chosen.processes)
    record = {
        "recipe": RECIPE,
        "num_steps": size.num_steps,
        "axes": [
            {"name": axis.name, "values": axis.values, "is_log": axis.is_log} for axis in size.axes
        ],
        "seeds": chosen.seeds,
        "curves": curves,
        **provenance("benchmarks.search_curves", "cpu", chosen.revision),
    }
    publish(record, table(record), record_folder(chosen, "search-curves"))


def record_curves(
    size: Size, seeds: Sequence[int], work: str, processes: int | None
) -> list[dict[str, Any]]:
    """Train every point with every seed, and read what their logs say.

    Returns:
        Of each run its point and seed, the validation errors by step, and operations a step.

    Raises:
        SystemExit: a run failed; the same command tries it again.
    """
    launch = LaunchConfig(launcher="local", device="cpu")
    recipe = get_recipe(RECIPE)
    recipe = replace(recipe, config=replace(recipe.config, launch=launch))
    train_teachers([recipe], processes)
    space = Space(name="search-curves", axes=size.axes)
    base = _shortened(recipe.config, size)
    runs: dict[str, tuple[Point, RunConfig]] = {}
    for number, point in enumerate(space.grid()):
        for seed in seeds:
            config = run_of(base, space, point, seed)
            folder = f"{work}/{size.num_steps}-steps/{number:03d}-seed{seed}"
            runs[folder] = point, with_absolute_paths(replace(config, output=folder))
    jobs = [Job(config=config) for _, config in runs.values()]
    outcomes = run_many(jobs, launch, processes)
    if failed := [outcome.error for outcome in outcomes if outcome.error is not None]:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed. The first: {failed[0]}")
    operations = Operations()
    return [_curve(point, config, operations) for point, config in runs.values()]


def _shortened(config: RunConfig, size: Size) -> RunConfig:
    shorter = stretched(config, size.num_steps / config.training.num_steps)
    every = size.validate_every
    return with_overrides(
        shorter, {"schedule.validate_every": every, "schedule.checkpoint_every": 2 * every}
    )


def _curve(point: Point, config: RunConfig, operations: Operations) -> dict[str, Any]:
    events = [e for e in read_log(config.output) if e["event"] == "validation"]
    return {
        "point": dict(point),
        "seed": config.training.seed,
        "steps": [event["step"] for event in events],
        "errors": [event["mse_per_frame"] for event in events],
        "operations_per_step": operations(config, 1),
    }


def table(record: Mapping[str, Any]) -> str:
    """Markdown: every point with its lowest errors by an eighth, a half and all of its steps."""
    axes = [axis["name"] for axis in record["axes"]]
    by_point: dict[str, list[Mapping[str, Any]]] = {}
    for curve in record["curves"]:
        cells = " | ".join(_show(curve["point"][name]) for name in axes)
        by_point.setdefault(cells, []).append(curve)
    names = " | ".join(name.rpartition(".")[2] for name in axes)
    lines = [
        f"| {names} | at 1/8 | at 1/2 | at the end | G operations/step |",
        "|---" * (len(axes) + 4) + "|",
    ]
    for cells, curves in by_point.items():
        lowest = [[_lowest(c, record["num_steps"] / part) for c in curves] for part in (8, 2, 1)]
        errors = [spread(values, 1) for values in lowest]
        giga = statistics.fmean(c["operations_per_step"] for c in curves) / 1e9
        lines.append(f"| {cells} | {' | '.join(errors)} | {giga:.1f} |")
    lines += [
        "",
        f"Lowest validation MSE/frame so far, mean ± standard deviation over seeds "
        f"{', '.join(map(str, record['seeds']))}; {record['num_steps']} iterations of "
        f"{record['recipe']} on {record['machine']['cpu']}, revision {record['git_revision']}.",
    ]
    return "\n".join(lines) + "\n"


def _lowest(curve: Mapping[str, Any], until: float) -> float:
    pairs = zip(curve["steps"], curve["errors"], strict=True)
    return min(error for step, error in pairs if step <= until)


def _show(value: Any) -> str:
    return "+".join(value) if isinstance(value, (list, tuple)) else f"{value:g}"


if __name__ == "__main__":
    main()
