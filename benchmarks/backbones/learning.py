"""Question: does every backbone learn real digits, as a teacher and as a TMU student?

    python -m benchmarks.backbones.learning                          # all backbones, seed 0
    python -m benchmarks.backbones.learning --backbones mim savp --seeds 0 1 2 --steps 300

Trains the recipes digits-BACKBONE-* (two teachers, and students of few three-digit sequences),
scores each on the test split of what it learned, and writes results.json and table.md: beside each
backbone stands persistence, which any network must beat. Stochastic networks forecast once,
without noise. Runs are resumable: the same command continues, and adds to the record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tmu_dist.collectives import Collectives
from tmu_dist.config import with_overrides
from tmu_dist.data.loader import SequenceLoader, open_archive
from tmu_dist.evaluation.result import MODEL, PERSISTENCE
from tmu_dist.evaluation.runner import score_predictor
from tmu_dist.ledger.words import spread
from tmu_dist.provenance import git_revision
from tmu_dist.recipes import get_recipe
from tmu_dist.teachers.store import load_model
from tmu_dist.train import run_recipe

PREFIXES = {
    "convlstm": "digits",
    "predrnn": "digits-predrnn",
    "mim": "digits-mim",
    "e3d_lstm": "digits-e3d",
    "savp": "digits-savp",
    "vpn": "digits-vpn",
}
"""First part of the names of each backbone's recipes."""
RUNS = {
    "teacher-1": "teacher, 1 digit",
    "teacher-2": "teacher, 2 digits",
    "scratch": "student from scratch",
    "tmu": "TMU student of both",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--backbones", nargs="+", choices=tuple(PREFIXES), default=list(PREFIXES))
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the students")
    parser.add_argument("--steps", type=int, help="iterations of every run (default: the recipe's)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/backbones-digits"))
    chosen = parser.parse_args()
    for backbone in chosen.backbones:
        scores = {
            run: [
                _scores(f"{PREFIXES[backbone]}-{run}", seed, chosen.steps)
                for seed in (chosen.seeds if not run.startswith("teacher") else [0])
            ]
            for run in chosen.runs
        }
        _add(chosen.out, backbone, {"steps": chosen.steps, "seeds": chosen.seeds, "runs": scores})


def _scores(name: str, seed: int, steps: int | None) -> dict[str, dict[str, float]]:
    """Train a recipe and score it on the test split, beside persistence."""
    recipe = get_recipe(name)
    changes: dict[str, object] = {"training.seed": seed, "launch.launcher": "local"}
    if steps:
        changes["training.num_steps"] = steps
    if seed:
        changes["output"] = f"{recipe.config.output}-seed-{seed}"
    config = with_overrides(recipe.config, changes)
    trained = load_model(run_recipe(replace(recipe, config=config), Collectives()))
    archive = open_archive(config.data.url)
    loader = SequenceLoader(archive, "test", global_batch_size=16, rank=0, world_size=1)
    scores = score_predictor(
        trained.model,
        loader.one_pass(),
        window=trained.card.window,
        units=archive.manifest.units,
        device=torch.device("cpu"),
    )
    return {MODEL: scores.model.overall(), PERSISTENCE: scores.persistence.overall()}


def _add(out: Path, backbone: str, found: Mapping[str, Any]) -> None:
    """Write one backbone's scores into the record, keeping the others'."""
    file = out / "results.json"
    record = json.loads(file.read_text()) if file.exists() else {"backbones": {}}
    record["backbones"][backbone] = {"git_revision": git_revision(), **found}
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")
    (out / "table.md").write_text(table(record))


def table(record: Mapping[str, Any]) -> str:
    """Markdown: MSE per frame and SSIM of every run, mean ± standard deviation over seeds."""
    lines = [
        f"| MSE/frame (SSIM) | iterations | {' | '.join(RUNS.values())} |",
        "|---" * (len(RUNS) + 2) + "|",
    ]
    found = {name: record["backbones"][name] for name in PREFIXES if name in record["backbones"]}
    baseline: dict[str, Any] = {}
    for own in found.values():
        baseline |= {run: [scores[0][PERSISTENCE]] for run, scores in own["runs"].items()}
    lines.append(_row(PERSISTENCE, "", baseline))
    for name, own in found.items():
        steps = str(own["steps"] or "the recipe's")
        scores = {run: [each[MODEL] for each in by_seed] for run, by_seed in own["runs"].items()}
        lines.append(_row(name, steps, scores))
    return "\n".join(lines) + "\n"


def _row(label: str, steps: str, scores: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    cells = [_cell(scores[run]) if run in scores else "" for run in RUNS]
    return f"| {label} | {steps} | {' | '.join(cells)} |"


def _cell(by_seed: Sequence[Mapping[str, float]]) -> str:
    mse = spread([scores["mse_per_frame"] for scores in by_seed], 1)
    return f"{mse} ({spread([scores['ssim'] for scores in by_seed], 3)})"


if __name__ == "__main__":
    main()
