"""Question: which early stopping finds how good a point in a search of 1,000 trials, and at
which cost?

    python -m benchmarks.search_simulation [--quick] [--processes 2]

The search's own samplers, agenda and schedulers (Ray Tune's, as `tuning.scheduling` makes them)
run a search in virtual time (events.py), on assumed clusters whose trials crash and whose nodes are
unequal. What a trial reports comes from recorded curves of real runs (`benchmarks.search_curves`),
between which is interpolated, with the recorded spread between seeds as noise (landscape.py).

Recorded are errors by iteration, how they move with the seed, and what an iteration costs beside
others. Assumed are points between the recorded ones, that noise is independent of the point, how
long a trial takes, and everything about machines (`events.Cluster`, `study.SCENARIOS`). Writes
results.json and table.md to docs/results/search-simulation; a full run takes about an hour of one
core. --quick is two repetitions of small searches, to see that it works.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.provenance import command_line, provenance, publish, record_folder
from benchmarks.search_simulation.landscape import Landscape
from benchmarks.search_simulation.report import table
from benchmarks.search_simulation.study import HOURS_OF_TRIAL, SCENARIOS, Scenario, compare


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and write what came out."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument(
        "--curves", type=Path, default=Path("docs/results/search-curves/results.json")
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    chosen = parser.parse_args(arguments)
    recorded = json.loads(chosen.curves.read_text())
    scenarios, repetitions = SCENARIOS, chosen.repetitions
    if chosen.quick:
        scenarios, repetitions = {k: _small(s) for k, s in SCENARIOS.items()}, 2
    record = {
        "repetitions": repetitions,
        "hours_of_trial": HOURS_OF_TRIAL,
        "curves": about(recorded),
        "scenarios": {
            name: {
                **asdict(scenario),
                "contenders": compare(recorded, scenario, repetitions, chosen.processes),
            }
            for name, scenario in scenarios.items()
        },
        **provenance("benchmarks.search_simulation", "cpu", chosen.revision),
    }
    publish(record, table(record), record_folder(chosen, "search-simulation"))


def about(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the recorded curves."""
    landscape = Landscape(recorded)
    return {
        "recipe": recorded["recipe"],
        "num_curves": len(recorded["curves"]),
        "num_steps": landscape.num_steps,
        "seeds": recorded["seeds"],
        "spread_of_final": landscape.spread_of_final,
        "git_revision": recorded["git_revision"],
    }


def _small(scenario: Scenario) -> Scenario:
    cluster = replace(scenario.cluster, places=8, places_per_node=1)
    return replace(
        scenario, num_points=30, about=f"{scenario.about}, shrunk to 30", cluster=cluster
    )


if __name__ == "__main__":
    main()
