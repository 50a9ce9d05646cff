"""What the runs of a ledger found, in memory and on disk.

OUT/ledger.json      which runs belong to which arm, and which failed
OUT/runs/NAME/       ordinary run folders, each with its evaluation in it
OUT/failures.txt     traces of what failed in the last call; absent if nothing did

Scores are never copied: they are read from the evaluations, so the ledger cannot contradict them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tmu_dist.evaluation.result import EvaluationResult
from tmu_dist.files import atomic_write_text
from tmu_dist.ledger.arms import Group
from tmu_dist.run_folder import RESULT_FILE, read_json

LEDGER_FILE = "ledger.json"
Weights: TypeAlias = Literal["chosen", "last"]
"""Of a run: those that validation chose, or those of the last iteration."""
EVALUATION_FOLDER = "evaluation-test"
"""In each run folder, as `python -m tmu_dist.evaluate` names it."""
EVALUATION_FOLDERS: Mapping[Weights, str] = {
    "chosen": EVALUATION_FOLDER,
    "last": f"{EVALUATION_FOLDER}-last",
}


@dataclass(frozen=True, kw_only=True)
class SeedRecord:
    """One finished and evaluated run."""

    run: str
    """Folder, from the ledger's; arms with equal settings share one."""
    evaluation: EvaluationResult
    """On the test split, with the scores of every sequence."""
    seconds_per_batch: float
    """Of training; of runs side by side on shared cores no benchmark."""
    weights: Weights = "chosen"
    """Which ones were evaluated."""


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """One arm, with what its runs found by seed."""

    name: str
    label: str
    group: Group
    sources: tuple[str, ...]
    method: str
    seeds: Mapping[int, SeedRecord]
    failures: Mapping[int, str]
    """Why there is no record of a seed, of those that were tried."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Everything that the page says, and nothing else."""

    recipe: str
    command: str
    """That adds what is missing."""
    git_revision: str | None
    sources: tuple[str, ...]
    """Short names of all teachers, in the order of the transfer gates."""
    facts: Mapping[str, Any]
    """Of the experiment (`runs.make_plan`)."""
    arms: tuple[ArmRecord, ...]
    """Every arm there is, in the order of Table 1; those not run yet have no seeds."""

    def arm(self, name: str) -> ArmRecord | None:
        """An arm by name."""
        return next((arm for arm in self.arms if arm.name == name), None)


def read_seed(folder: Path, run: str, weights: Weights = "chosen") -> SeedRecord:
    """What one run found with some of its weights.

    Raises:
        ValueError: it is not finished, or not evaluated.
    """
    return SeedRecord(
        run=run,
        evaluation=EvaluationResult.load(folder / run / EVALUATION_FOLDERS[weights]),
        seconds_per_batch=float(read_json(folder / run, RESULT_FILE)["seconds_per_batch"]),
        weights=weights,
    )


def save(ledger: Ledger, folder: Path) -> None:
    """Write `ledger.json`."""
    arms = [
        {
            "name": arm.name,
            "label": arm.label,
            "group": arm.group,
            "sources": arm.sources,
            "method": arm.method,
            "runs": {str(seed): record.run for seed, record in arm.seeds.items()},
            "failures": {str(seed): why for seed, why in arm.failures.items()},
        }
        for arm in ledger.arms
    ]
    tree = {
        "recipe": ledger.recipe,
        "command": ledger.command,
        "git_revision": ledger.git_revision,
        "sources": ledger.sources,
        "facts": dict(ledger.facts),
        "arms": arms,
    }
    atomic_write_text(folder / LEDGER_FILE, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def load(folder: Path) -> Ledger:
    """Read what `save` wrote, and the evaluations that it names.

    Raises:
        ValueError: there is no ledger, it was written by another version, or a run of it is gone.
    """
    tree = read_tree(folder)
    try:
        arms = tuple(
            ArmRecord(
                name=arm["name"],
                label=arm["label"],
                group=arm["group"],
                sources=tuple(arm["sources"]),
                method=arm["method"],
                seeds={int(seed): read_seed(folder, run) for seed, run in arm["runs"].items()},
                failures={int(seed): why for seed, why in arm["failures"].items()},
            )
            for arm in tree["arms"]
        )
        return Ledger(
            recipe=tree["recipe"],
            command=tree["command"],
            git_revision=tree["git_revision"],
            sources=tuple(tree["sources"]),
            facts=tree["facts"],
            arms=arms,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / LEDGER_FILE} was not written by this version ({error}): run the ledger's "
            "command again, which keeps all finished runs."
        ) from None


def read_tree(folder: Path) -> dict[str, Any]:
    """`ledger.json` as it stands there.

    Raises:
        ValueError: there is none.
    """
    file = folder / LEDGER_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {LEDGER_FILE}: name the --out folder of "
            "`python -m tmu_dist.ledger`, or run that first."
        )
    return dict(json.loads(file.read_text()))
