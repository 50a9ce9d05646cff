"""Question: how much do the demo's scores move with the training seed?

    python benchmarks/digits_seeds.py --seeds 0 1 2 --out docs/results/digits-seeds

Trains the demo's students with every seed (same archives, same two teachers), scores each on the
test split, and writes results.json and table.md: mean and standard deviation over seeds, and the
difference from scratch paired by seed. Runs are resumable: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tmu_dist.collectives import Collectives
from tmu_dist.config import with_overrides
from tmu_dist.demo import STUDENTS
from tmu_dist.evaluate import evaluate_model
from tmu_dist.evaluation.result import MODEL, PERSISTENCE
from tmu_dist.recipes import get_recipe
from tmu_dist.train import run_recipe
from tmu_dist.training.run_log import git_revision

METRICS = ("mse_per_frame", "mae_per_frame", "ssim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--launcher", choices=("ray", "local"), default="local")
    parser.add_argument("--out", type=Path, default=Path("runs/digits-seeds"))
    chosen = parser.parse_args()
    scores: dict[str, list[dict[str, float]]] = {}
    persistence: dict[str, float] = {}
    for label, name in STUDENTS.items():
        for seed in chosen.seeds:
            result = evaluate_model(*_train(name, seed, chosen.launcher))
            scores.setdefault(label, []).append(dict(result.overall[MODEL]))
            persistence = dict(result.overall[PERSISTENCE])
    chosen.out.mkdir(parents=True, exist_ok=True)
    record = {
        "seeds": chosen.seeds,
        "launcher": chosen.launcher,
        "git_revision": git_revision(),
        "recipes": STUDENTS,
        "persistence": persistence,
        "scores": scores,
    }
    (chosen.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    (chosen.out / "table.md").write_text(table(persistence, scores))


def _train(name: str, seed: int, launcher: str) -> tuple[str, str]:
    """Train one student; returns its run folder and its archive."""
    recipe = get_recipe(name)
    changes: dict[str, object] = {"training.seed": seed, "launch.launcher": launcher}
    if seed:
        changes["output"] = f"{recipe.config.output}-seed-{seed}"
    config = with_overrides(recipe.config, changes)
    return run_recipe(replace(recipe, config=config), Collectives()), config.data.url


def table(persistence: dict[str, float], scores: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean ± standard deviation over seeds, and the paired difference from scratch."""
    lines = [
        "| method | MSE/frame | MAE/frame | SSIM | MSE/frame minus scratch, by seed |",
        "|---|---|---|---|---|",
        "| persistence | " + " | ".join(_number(m, [persistence[m]]) for m in METRICS) + " | |",
    ]
    for label, by_seed in scores.items():
        cells = [_number(metric, [s[metric] for s in by_seed]) for metric in METRICS]
        differences = [
            f"{own['mse_per_frame'] - scratch['mse_per_frame']:+.2f}"
            for own, scratch in zip(by_seed, scores["scratch"], strict=True)
        ]
        paired = "" if label == "scratch" else ", ".join(differences)
        lines.append(f"| {label} | {' | '.join(cells)} | {paired} |")
    return "\n".join(lines) + "\n"


def _number(metric: str, values: Sequence[float]) -> str:
    decimals = 3 if metric == "ssim" else 1
    mean = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}"


if __name__ == "__main__":
    main()
