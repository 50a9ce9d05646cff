"""What the simulated searches say: tables by scenario, and which defaults to take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from benchmarks.search_simulation.study import CONTENDERS, DEFAULT, FEWER, NONE, Contender
from tmu_dist.ledger.words import spread

Columns: TypeAlias = Mapping[str, Sequence[float | None]]
"""By measure: its values by repetition."""

TOLERANCE = 0.25
"""What early stopping may lose, in standard deviations between seeds of one point: so little widens
the spread of what a single run reaches by 3 %."""

HEADINGS = (
    "scheduler",
    "regret, %",
    "more than none, %",
    "compute, %",
    "hours",
    "best 1 % stopped, %",
    "finished / stopped / failed",
)


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a table for each scenario, what was recorded and assumed, and what follows."""
    lines = [conclusion(record), ""]
    for scenario in record["scenarios"].values():
        lines += [f"**{scenario['about']}**, {_cluster(scenario['cluster'])}", ""]
        lines += ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
        lines += _rows(scenario["contenders"])
        lines.append("")
    return "\n".join([*lines, *_notes(record)]) + "\n"


def conclusion(record: Mapping[str, Any]) -> str:
    """Which early stopping costs least without losing more than `TOLERANCE`."""
    tolerance = TOLERANCE * record["curves"]["spread_of_final"]
    scenarios = [scenario["contenders"] for scenario in record["scenarios"].values()]
    tried = [contender for contender in CONTENDERS if contender.name in scenarios[0]]
    stopping = [contender for contender in tried if contender.scheduler != "none"]
    good = [c for c in stopping if all(_loses(s, c.name) <= tolerance for s in scenarios)]
    good.sort(key=lambda contender: _compute(scenarios, contender))
    rule = f"a quarter of the spread between seeds ({100 * tolerance:.2f} %)"
    if good:
        said = [f"Cheapest that loses no more than {rule} in any scenario: **{good[0].name}**"]
    else:
        said = [f"Every early stopping loses more than {rule} in some scenario"]
    said += [
        f"{contender.name}: {_shown(scenarios, contender)}"
        for contender in dict.fromkeys((*good[:1], DEFAULT, FEWER))
        if contender in tried
    ]
    return ". ".join(said) + "."


def _shown(scenarios: Sequence[Mapping[str, Columns]], contender: Contender) -> str:
    lost = max(_loses(scenario, contender.name) for scenario in scenarios)
    said = f"{100 * _compute(scenarios, contender):.0f} % of the compute"
    if math.isinf(lost):
        return f"{said}, but some searches were left without a point to choose"
    return f"{said}, at worst {100 * lost:+.2f} % in the error of the chosen point"


def _compute(scenarios: Iterable[Mapping[str, Columns]], contender: Contender) -> float:
    return statistics.fmean(
        statistics.fmean(_known(scenario[contender.name]["compute"])) for scenario in scenarios
    )


def _loses(scenario: Mapping[str, Columns], name: str) -> float:
    """Regret more than that of none, paired by repetition; infinite if nothing could be chosen."""
    differences = _paired(scenario, name)
    if len(differences) < len(scenario[name]["regret"]):
        return math.inf
    return statistics.fmean(differences)


def _paired(scenario: Mapping[str, Columns], name: str) -> list[float]:
    pairs = zip(scenario[name]["regret"], scenario[NONE.name]["regret"], strict=True)
    return [ours - none for ours, none in pairs if ours is not None and none is not None]


def _rows(contenders: Mapping[str, Columns]) -> list[str]:
    lines = []
    for name, columns in contenders.items():
        ends = (statistics.fmean(_known(columns[s])) for s in ("finished", "stopped", "failed"))
        cells = [
            name,
            _percent(columns["regret"], 2),
            _percent(_paired(contenders, name), 2) if name != NONE.name else "",
            _percent(columns["compute"], 0),
            spread(_known(columns["hours"]), 1),
            _percent(columns["top_stopped"], 0),
            " / ".join(f"{mean:.0f}" for mean in ends),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(values: Sequence[float | None], decimals: int) -> str:
    known = [100 * value for value in _known(values)]
    missing = len(values) - len(known)
    shown = spread(known, decimals) if known else "none"
    return f"{shown} (unknown in {missing})" if missing else shown


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _cluster(cluster: Mapping[str, Any]) -> str:
    nodes = -(-cluster["places"] // cluster["places_per_node"])
    return (
        f"{cluster['places']} places on {nodes} nodes, {cluster['slow_nodes']} of them "
        f"{cluster['slow_factor']:g} times slower, {cluster['crashes_per_hour']:g} crashes an hour "
        "of a trial"
    )


def _notes(record: Mapping[str, Any]) -> list[str]:
    curves = record["curves"]
    return [
        f"Mean ± standard deviation over {record['repetitions']} repetitions; all schedulers see "
        "the same points, curves, speeds and crashes. Regret: expected error of the chosen point "
        "over the best that random search is given. Compute: of all trials' to the end.",
        "",
        f"Recorded: {curves['num_curves']} curves of {curves['num_steps']} iterations of "
        f"{curves['recipe']}, seeds {', '.join(map(str, curves['seeds']))} (revision "
        f"{curves['git_revision']}); their costs beside each other. Everything else is assumed: "
        "points between recorded ones, machines, crashes, "
        f"{record['hours_of_trial']:g} hours a trial.",
    ]
