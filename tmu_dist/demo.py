"""From raw digits to a transferred student: `python -m tmu_dist.demo`.

Prepares digits, pretrains two teachers, trains students from scratch, by finetuning and by memory
transfer on Ray Train, scores all of them on the test split, and writes one page that compares
them. Everything is an ordinary recipe and run; the commands on the page repeat it by hand.
Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from tmu_dist.collectives import Collectives
from tmu_dist.commands import command_errors
from tmu_dist.config import with_overrides
from tmu_dist.data.loader import open_archive
from tmu_dist.evaluate import evaluate_model
from tmu_dist.evaluation.comparison import RunEntry
from tmu_dist.evaluation.examples import predict_example
from tmu_dist.evaluation.report import PageSettings, write_comparison_page
from tmu_dist.evaluation.terminal import comparison_table
from tmu_dist.recipes import get_recipe
from tmu_dist.recipes.digits import workspace
from tmu_dist.run_folder import CONFIG_FILE, RESULT_FILE, read_json
from tmu_dist.teachers.store import load_model
from tmu_dist.train import run_recipe
from tmu_dist.training.run_log import git_revision

log = logging.getLogger(__name__)

STUDENTS = {
    "scratch": "digits-scratch",
    "TMU from scratch": "digits-tmu-scratch",
    "finetune, 2 digits": "digits-finetune-2",
    "TMU, 2 teachers": "digits-tmu",
}
"""Label on the page and recipe, in the order of the paper's Table 1."""

EXAMPLE_SEQUENCES = (0, 1, 2)
"""The first ones of the test split: not chosen by how good they look."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.demo`."""
    parser = argparse.ArgumentParser(prog="python -m tmu_dist.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--launcher", choices=("ray", "local"), default="ray")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with command_errors():
        run_demo(chosen.launcher)


def run_demo(launcher: str) -> Path:
    """Run all students, evaluate, write the page; returns its path."""
    started = time.monotonic()
    runs = {label: _train(recipe, launcher) for label, recipe in STUDENTS.items()}
    entries = [_evaluate(label, run) for label, run in runs.items()]
    page = workspace() / "runs" / "demo" / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    _write_page(page, entries, runs, launcher)
    console = Console()
    console.print(comparison_table(entries))
    minutes = (time.monotonic() - started) / 60
    console.print(f"\n{minutes:.1f} minutes. Open {page.absolute()}", soft_wrap=True)
    return page


def _train(name: str, launcher: str) -> str:
    recipe = get_recipe(name)
    config = with_overrides(recipe.config, {"launch.launcher": launcher})
    return run_recipe(replace(recipe, config=config), Collectives())


def _evaluate(label: str, run: str) -> RunEntry:
    log.info("evaluating %s on the test split", label)
    url = read_json(Path(run), CONFIG_FILE)["data"]["url"]
    result = evaluate_model(run, url)
    result.save(Path(run) / "evaluation-test")
    seconds = read_json(Path(run), RESULT_FILE)["seconds_per_batch"]
    return RunEntry(label=label, result=result, run_directory=Path(run), seconds_per_batch=seconds)


def _write_page(page: Path, entries: list[RunEntry], runs: dict[str, str], launcher: str) -> None:
    config = get_recipe(STUDENTS["scratch"]).config
    archive = open_archive(config.data.url)
    models = {label: load_model(run) for label, run in runs.items()}
    examples = [
        predict_example(models, archive, "test", sample, device=torch.device("cpu"))
        for sample in EXAMPLE_SEQUENCES
    ]
    training = archive.manifest.num_samples("train")
    command = f"python -m tmu_dist.demo --launcher {launcher}"
    settings = PageSettings(
        title="Flying digits: what two teachers add to a student",
        summary=(
            "Two ConvLSTM teachers learned to predict one and two flying digits. Each student has "
            f"only {training} sequences of three digits to learn from, for "
            f"{config.training.num_steps} iterations: from scratch, from a teacher's weights, "
            "or with both teachers' memories beside it (Transferable Memory Unit)."
        ),
        command=command,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        git_revision=git_revision(),
        reference_label="scratch",
        notes=(
            f"Frames of {archive.manifest.height}x{archive.manifest.width} pixels, "
            f"{config.model.num_layers} layers of {config.model.hidden_channels} channels and "
            f"{config.training.num_steps} iterations are far from the paper's 64x64, 4 x 64 and "
            "80,000: this page shows that the path works, not what the paper reports.",
        ),
        repeat_commands=(
            command,
            *(f"python -m tmu_dist.train --recipe {name}" for name in STUDENTS.values()),
            f"python -m tmu_dist.evaluate {runs['TMU, 2 teachers']} --data {config.data.url}",
        ),
    )
    write_comparison_page(page, entries, settings, examples=examples)


if __name__ == "__main__":
    main()
