"""Question: how much do an experiment's scores move with the training seed?

    python benchmarks/seeds.py --experiment digits --seeds 0 1 2
    python benchmarks/seeds.py --experiment radar --seeds 0 1 2

Trains the students of an experiment of `tmu_dist.demo` with every seed (same archives, same two
teachers), scores each on the test split, and writes results.json and table.md to
docs/results/NAME-seeds: mean and standard deviation over seeds, and the difference from scratch
paired by seed. Runs are resumable: the same command continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tmu_dist.collectives import Collectives
from tmu_dist.config import with_overrides
from tmu_dist.demo import EXPERIMENTS
from tmu_dist.evaluate import evaluate_model
from tmu_dist.evaluation.result import MODEL, EvaluationResult
from tmu_dist.ledger.words import spread
from tmu_dist.provenance import git_revision
from tmu_dist.recipes import get_recipe
from tmu_dist.train import run_recipe

COLUMNS = {
    "mse_per_frame": ("MSE/frame", 1),
    "mae_per_frame": ("MAE/frame", 1),
    "ssim": ("SSIM", 3),
}
"""Heading and decimals of each metric; the first one is also compared with scratch."""
RADAR_COLUMNS = {"csi": ("CSI", 3), "far": ("FAR", 3), "pod": ("POD", 3)}
"""The same of the scores of radar at its first threshold, the paper's 20 dBZ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--experiment", choices=tuple(EXPERIMENTS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--launcher", choices=("ray", "local"), default="local")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    out = chosen.out or Path("docs/results") / f"{chosen.experiment}-seeds"
    students = EXPERIMENTS[chosen.experiment].students
    scores: dict[str, list[dict[str, float]]] = {}
    baselines: dict[str, dict[str, float]] = {}
    for label, name in students.items():
        for seed in chosen.seeds:
            result = evaluate_model(*_train(name, seed, chosen.launcher))
            by_forecast = _scores(result)
            scores.setdefault(label, []).append(by_forecast.pop(MODEL))
            baselines = by_forecast
    record = {
        "experiment": chosen.experiment,
        "seeds": chosen.seeds,
        "launcher": chosen.launcher,
        "git_revision": git_revision(),
        "recipes": students,
        "baselines": baselines,
        "scores": scores,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "table.md").write_text(table(record))


def _scores(result: EvaluationResult) -> dict[str, dict[str, float]]:
    """Every metric of the model and the baselines; of radar also at the first threshold."""
    scores = {forecast: dict(values) for forecast, values in result.overall.items()}
    if result.radar is not None:
        for forecast, own in result.radar.forecasts.items():
            scores[forecast] |= {name: float(own.mean(name)[0]) for name in RADAR_COLUMNS}
    return scores


def _train(name: str, seed: int, launcher: str) -> tuple[str, str]:
    """Train one student; returns its run folder and its archive."""
    recipe = get_recipe(name)
    changes: dict[str, object] = {"training.seed": seed, "launch.launcher": launcher}
    if seed:
        changes["output"] = f"{recipe.config.output}-seed-{seed}"
    config = with_overrides(recipe.config, changes)
    return run_recipe(replace(recipe, config=config), Collectives()), config.data.url


def table(record: Mapping[str, Any]) -> str:
    """Markdown: mean ± standard deviation over seeds, and the paired difference from scratch."""
    scores = record["scores"]
    columns = {
        metric: column
        for metric, column in (COLUMNS | RADAR_COLUMNS).items()
        if metric in scores["scratch"][0]
    }
    headings = " | ".join(heading for heading, _ in columns.values())
    first = next(iter(columns))
    lines = [
        f"| method | {headings} | {columns[first][0]} minus scratch, by seed |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for label, own in record["baselines"].items():
        cells = [spread([own[metric]], columns[metric][1]) for metric in columns]
        lines.append(f"| {label} | {' | '.join(cells)} | |")
    for label, by_seed in scores.items():
        cells = [spread([s[metric] for s in by_seed], columns[metric][1]) for metric in columns]
        differences = [
            f"{own[first] - scratch[first]:+.2f}"
            for own, scratch in zip(by_seed, scores["scratch"], strict=True)
        ]
        paired = "" if label == "scratch" else ", ".join(differences)
        lines.append(f"| {label} | {' | '.join(cells)} | {paired} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
