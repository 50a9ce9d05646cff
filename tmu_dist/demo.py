"""From raw files to a transferred student: `python -m tmu_dist.demo [--experiment digits|radar]`.

Prepares the archives, pretrains two teachers, trains students from scratch, by finetuning and by
memory transfer on Ray Train, scores all of them on the test split, and writes one page that
compares them. Digits need no download; radar needs files of three weather services
(docs/radar.md). Everything is an ordinary recipe and run; the commands on the page repeat it by
hand. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from tmu_dist.collectives import Collectives
from tmu_dist.commands import command_errors
from tmu_dist.config import with_overrides
from tmu_dist.data.loader import open_archive
from tmu_dist.data.storage import join_url, local_path
from tmu_dist.evaluate import evaluate_model
from tmu_dist.evaluation.comparison import RunEntry
from tmu_dist.evaluation.examples import predict_example
from tmu_dist.evaluation.report import PageSettings, write_comparison_page
from tmu_dist.evaluation.terminal import comparison_table
from tmu_dist.folders import local_folder
from tmu_dist.provenance import git_revision
from tmu_dist.recipes import get_recipe
from tmu_dist.run_folder import CONFIG_FILE, RESULT_FILE, read_json
from tmu_dist.teachers.store import load_model
from tmu_dist.train import run_recipe
from tmu_dist.workspace import in_workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Students that are compared, and the words around them."""

    students: Mapping[str, str]
    """Label on the page and recipe, in the order of the paper's tables."""
    title: str
    summary: str
    """With {sequences} and {steps} for the students' training sequences and iterations."""
    caveat: str
    """What keeps this from being the paper's experiment; {size} and {network} are filled in."""


EXPERIMENTS = {
    "digits": Experiment(
        students={
            "scratch": "digits-scratch",
            "TMU from scratch": "digits-tmu-scratch",
            "finetune, 2 digits": "digits-finetune-2",
            "TMU, 2 teachers": "digits-tmu",
        },
        title="Flying digits: what two teachers add to a student",
        summary="Two ConvLSTM teachers learned to predict one and two flying digits. Each student "
        "has only {sequences} sequences of three digits to learn from, for {steps} iterations: "
        "from scratch, from a teacher's weights, or with both teachers' memories beside it "
        "(Transferable Memory Unit).",
        caveat="{size} and {network} are far from the paper's 64x64, 4 x 64 and 80,000 iterations: "
        "this page shows that the path works, not what the paper reports.",
    ),
    "radar": Experiment(
        students={
            "scratch": "radar-scratch",
            "TMU from scratch": "radar-tmu-scratch",
            "finetune, Switzerland": "radar-finetune-mch",
            "TMU, 2 teachers": "radar-tmu",
        },
        title="Rain: what Swiss and Finnish teachers add to a Dutch student",
        summary="Two ConvLSTM teachers learned from radar composites of Switzerland (two events) "
        "and Finland (one). Each student has {sequences} sequences of one Dutch event to learn "
        "from, for {steps} iterations, and is tested on the last two hours of that event.",
        caveat="{size} and {network}, one event of one night: this page shows that the path works "
        "on real rain, not what the paper reports on its 55,466 maps. Test sequences overlap in "
        "time and space, so they are far fewer independent cases than their number.",
    ),
}

EXAMPLE_SEQUENCES = (0, 1, 2)
"""The first ones of the test split: not chosen by how good they look."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.demo`."""
    parser = argparse.ArgumentParser(prog="python -m tmu_dist.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--experiment", choices=tuple(EXPERIMENTS), default="digits")
    parser.add_argument("--launcher", choices=("ray", "local"), default="ray")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with command_errors():
        run_demo(chosen.experiment, chosen.launcher)


def run_demo(name: str, launcher: str) -> str:
    """Run all students of an experiment, evaluate, write the page; returns its path or URL."""
    started = time.monotonic()
    experiment = EXPERIMENTS[name]
    runs = {label: _train(recipe, launcher) for label, recipe in experiment.students.items()}
    entries = [_evaluate(label, run) for label, run in runs.items()]
    folder = "demo" if name == "digits" else f"demo-{name}"
    command = f"python -m tmu_dist.demo --experiment {name} --launcher {launcher}"
    with local_folder(in_workspace(f"runs/{folder}")) as place:
        _write_page(place / "report.html", experiment, entries, runs, command)
    console = Console()
    console.print(comparison_table(entries))
    minutes = (time.monotonic() - started) / 60
    page = in_workspace(f"runs/{folder}/report.html")
    console.print(f"\n{minutes:.1f} minutes. Open {local_path(page) or page}", soft_wrap=True)
    return page


def _train(name: str, launcher: str) -> str:
    recipe = get_recipe(name)
    config = with_overrides(recipe.config, {"launch.launcher": launcher})
    return run_recipe(replace(recipe, config=config), Collectives())


def _evaluate(label: str, run: str) -> RunEntry:
    log.info("evaluating %s on the test split", label)
    url = read_json(run, CONFIG_FILE)["data"]["url"]
    result = evaluate_model(run, url)
    with local_folder(join_url(run, "evaluation-test")) as folder:
        result.save(folder)
    seconds = read_json(run, RESULT_FILE)["seconds_per_batch"]
    return RunEntry(label=label, result=result, run_directory=run, seconds_per_batch=seconds)


def _write_page(
    page: Path,
    experiment: Experiment,
    entries: list[RunEntry],
    runs: dict[str, str],
    command: str,
) -> None:
    config = get_recipe(experiment.students["scratch"]).config
    archive = open_archive(config.data.url)
    manifest, model = archive.manifest, config.model
    models = {label: load_model(run) for label, run in runs.items()}
    examples = [
        predict_example(models, archive, "test", sample, device=torch.device("cpu"))
        for sample in EXAMPLE_SEQUENCES
    ]
    steps = config.training.num_steps
    settings = PageSettings(
        title=experiment.title,
        summary=experiment.summary.format(sequences=manifest.num_samples("train"), steps=steps),
        command=command,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        git_revision=git_revision(),
        reference_label="scratch",
        notes=(
            experiment.caveat.format(
                size=f"Frames of {manifest.height}x{manifest.width} pixels",
                network=f"{model.num_layers} layers of {model.hidden_channels} channels",
            ),
        ),
        repeat_commands=(
            command,
            *(f"python -m tmu_dist.train --recipe {name}" for name in experiment.students.values()),
            f"python -m tmu_dist.evaluate {runs['TMU, 2 teachers']} --data {config.data.url}",
        ),
    )
    write_comparison_page(page, entries, settings, examples=examples)


if __name__ == "__main__":
    main()
