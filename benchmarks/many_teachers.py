"""Question: does a student train stably as its teachers grow from 1 to 41?

    python -m benchmarks.many_teachers [--quick] [--steps N] [--seeds 0 1 2] [--processes 2]

The combination of Eq. 5 as printed (transfer.tmu.combine=paper) multiplies the memory by up to
1 + M a step; `mean` divides the same sum by 1 + M. Students of the recipe digits-tmu (two layers of
32, 32x32 frames) learn three digits with 1, 2, 4, 8, 16 and 41 teachers, the most that the paper
fits on its GPU, with both combinations, with and without clipped gradients, with three seeds.

Teachers: 6 runs of the recipes digits-teacher-1 and digits-teacher-2 with the seeds 0, 1 and 2,
each with 7 checkpoints at equal distances: 42 networks. Checkpoints of one run are different
networks but no independent ones. M teachers are the first M of this order: latest checkpoint
first, then by seed, then by source.

Every run is an ordinary one (`tmu_dist.training.loop`), kept below --work: the same command
continues. Each is probed twenty times (its liveness events): root mean square of the memories and
norms of the gradients, before clipping, on one training batch. Writes results.json and table.md;
commands with other numbers of teachers or other seeds add to them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from benchmarks.provenance import publish
from tmu_dist.collectives import Collectives
from tmu_dist.config import RunConfig, with_overrides
from tmu_dist.provenance import git_revision
from tmu_dist.recipes import get_recipe
from tmu_dist.run_folder import RESULT_FILE, read_log
from tmu_dist.train import make_archive
from tmu_dist.training.loop import NonFiniteLossError, train
from tmu_dist.transfer.base import DeadDistillationError

COUNTS = (1, 2, 4, 8, 16, 41)
COMBINATIONS = ("paper", "mean")
CLIPS = (None, 1.0)
SOURCES = ("1", "2")
SEEDS = (0, 1, 2)
CHECKPOINTS = 7
PROBES = 20
STOPPED_FILE = "stopped.txt"
"""Why a run was given up; it is not tried again."""

Found: TypeAlias = Mapping[str, Any]
"""A run in the record (`summary`)."""


class Student(NamedTuple):
    """One run of the study."""

    teachers: int
    combine: str
    clip: float | None
    seed: int

    def __str__(self) -> str:
        clip = "off" if self.clip is None else f"{self.clip:g}"
        return f"{self.teachers}-teachers-{self.combine}-clip-{clip}-seed-{self.seed}"


def teacher_configs(work: Path, steps: int) -> list[RunConfig]:
    """The runs of all teachers."""
    return [
        with_overrides(
            get_recipe(f"digits-teacher-{source}").config,
            {
                "output": f"{work}/teacher-{source}-seed-{seed}",
                "training.seed": seed,
                **_length(steps),
                "schedule.validate_every": steps,
                "schedule.checkpoint_every": steps // CHECKPOINTS,
                "schedule.keep_checkpoints": CHECKPOINTS,
            },
        )
        for seed, source in itertools.product(SEEDS, SOURCES)
    ]


def teacher_folders(work: Path, steps: int) -> list[str]:
    """Model folders of all teachers, in the order in which students take them."""
    every = steps // CHECKPOINTS
    return [
        f"{config.output}/checkpoints/step-{every * number:08d}"
        for number in range(CHECKPOINTS, 0, -1)
        for config in teacher_configs(work, steps)
    ]


def student_config(work: Path, student: Student, folders: Sequence[str], steps: int) -> RunConfig:
    """The run of one student."""
    return with_overrides(
        get_recipe("digits-tmu").config,
        {
            "output": f"{work}/{student}",
            "transfer.teachers": tuple(folders[: student.teachers]),
            "transfer.tmu.combine": student.combine,
            "training.grad_clip_norm": student.clip,
            "training.seed": student.seed,
            **_length(steps),
            "schedule.validate_every": max(steps // PROBES, 1),
            "schedule.checkpoint_every": steps,
        },
    )


def _length(steps: int) -> dict[str, object]:
    return {
        "training.num_steps": steps,
        "training.sampling_stop_step": max(steps // 2, 1),
        "data.max_validation_samples": 64,
        "launch.launcher": "local",
    }


def run(config: RunConfig) -> None:
    """Train to the end, or until there is no point in going on."""
    torch.set_num_threads(1)
    folder = Path(config.output)
    if (folder / RESULT_FILE).exists() or (folder / STOPPED_FILE).exists():
        return
    try:
        train(config, Collectives(), torch.device("cpu"))
    except (NonFiniteLossError, DeadDistillationError, ValueError) as error:
        # A forecast that is not finite cannot be validated; other values are wrong settings.
        if isinstance(error, ValueError) and "diverged" not in str(error):
            raise
        why, *_ = str(error).split(". ")  # what follows is advice, and names folders
        (folder / STOPPED_FILE).write_text(f"{type(error).__name__}: {why}\n")


def run_all(what: str, configs: Iterable[RunConfig], processes: int) -> None:
    """Train all of them, as many at a time as there are processes."""
    waiting = list(configs)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for number, _ in enumerate(pool.map(run, waiting), start=1):
            print(time.strftime("%H:%M:%S"), f"{what}: {number} of {len(waiting)}", flush=True)


def summary(student: Student, config: RunConfig) -> dict[str, Any]:
    """What the log of a student's run says."""
    folder = Path(config.output)
    events = read_log(folder)
    probes = [event for event in events if event["event"] == "liveness"]
    validations = [event for event in events if event["event"] == "validation"]
    stopped = folder / STOPPED_FILE
    return {
        **student._asdict(),
        "probe_steps": [event["step"] for event in probes],
        "memory_rms": [event["memory_rms"] for event in probes],
        "gradient_norms": {
            term: [event[f"{term}_gradient_norm"] for event in probes]
            for term in ("prediction", "distillation")
        },
        "validation_steps": [event["step"] for event in validations],
        "validation_mse_per_frame": [event["mse_per_frame"] for event in validations],
        "persistence_mse_per_frame": [e["persistence_mse_per_frame"] for e in validations][-1:],
        "stopped": stopped.read_text().strip() if stopped.exists() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="few steps, one seed: a smoke test")
    parser.add_argument("--steps", type=int, default=300, help="iterations of every student")
    parser.add_argument("--teacher-steps", type=int, default=420)
    parser.add_argument("--teachers", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the students")
    parser.add_argument("--no-clip", action="store_true", help="leave out clipped gradients")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/many-teachers"))
    parser.add_argument("--out", type=Path, help="docs/results/many-teachers; of --quick, --work")
    chosen = parser.parse_args()
    steps, teacher_steps = chosen.steps, chosen.teacher_steps
    counts: Sequence[int] = chosen.teachers
    seeds: Sequence[int] = chosen.seeds
    clips = CLIPS[:1] if chosen.no_clip else CLIPS
    if chosen.quick:
        steps, teacher_steps, counts, seeds = 4, CHECKPOINTS, (1, 4, 41), (0,)
    if teacher_steps % CHECKPOINTS:
        parser.error(f"--teacher-steps must be a multiple of {CHECKPOINTS}, got {teacher_steps}")
    started = time.monotonic()
    for name in ("digits-tmu", *(f"digits-teacher-{source}" for source in SOURCES)):
        recipe = get_recipe(name)
        make_archive(recipe, recipe.config.data.url)
    # Runs of other lengths are other runs.
    work = chosen.work.absolute() / f"teachers-{teacher_steps}-students-{steps}"
    out: Path = chosen.out or (work if chosen.quick else Path("docs/results/many-teachers"))
    run_all("teachers", teacher_configs(work, teacher_steps), chosen.processes)
    # The longest first, so that no process waits for one at the end.
    students = [
        Student(*settings)
        for settings in itertools.product(sorted(counts, reverse=True), COMBINATIONS, clips, seeds)
    ]
    folders = teacher_folders(work, teacher_steps)
    configs = [student_config(work, student, folders, steps) for student in students]
    run_all("students", configs, chosen.processes)
    command = "python -m benchmarks.many_teachers " + shlex.join(_without_folders())
    record = {
        "commands": [{"command": command, "minutes": round((time.monotonic() - started) / 60, 1)}],
        "git_revision": git_revision(),
        "torch": torch.__version__,
        "steps": steps,
        "teacher_steps": teacher_steps,
        "runs": [summary(*pair) for pair in zip(students, configs)],
    }
    _keep_others(record, out / "results.json", students)
    publish(record, table(record), out)


def _keep_others(record: dict[str, Any], file: Path, students: Sequence[Student]) -> None:
    """Take over what an earlier command found of other students of the same length."""
    before = json.loads(file.read_text()) if file.exists() else {}
    if any(before.get(name) != record[name] for name in ("steps", "teacher_steps")):
        return
    record["commands"] = before["commands"] + record["commands"]
    record["runs"] += [
        run
        for run in before["runs"]
        if Student(run["teachers"], run["combine"], run["clip"], run["seed"]) not in students
    ]


def table(record: Mapping[str, Any]) -> str:
    """Markdown: every setting over its seeds, and what `paper` costs against `mean`."""
    groups: dict[tuple[int, str, float | None], list[Found]] = {}
    for found in record["runs"]:
        key = (found["teachers"], found["combine"], found["clip"])
        groups.setdefault(key, []).append(found)
    ordered = sorted(groups, key=lambda key: (key[0], COMBINATIONS.index(key[1]), key[2] or 0.0))
    lines = [
        "| teachers | combine | clip | RMS of memories at the start | largest | at the end "
        "| largest gradient norm | validation MSE/frame, last | best | given up |",
        "|---" * 10 + "|",
    ]
    for key in ordered:
        count, combine, clip = key
        own = groups[key]
        columns = [
            str(count),
            combine,
            "off" if clip is None else f"{clip:g}",
            *_growth([found for found in own if found["memory_rms"]]),
            _largest_gradient(own),
            _mean([found["validation_mse_per_frame"][-1] for found in _finished(own)]),
            _mean([min(found["validation_mse_per_frame"]) for found in _finished(own)]),
            f"{sum(found['stopped'] is not None for found in own)} of {len(own)}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join([*lines, "", *_differences(groups), "", *_given_up(record["runs"])]) + "\n"


def _growth(probed: Sequence[Found]) -> list[str]:
    """Root mean squares of the memories by layer: at the start and at the end (medians over seeds),
    and between them the largest of all probes."""

    def shown(by_layer: Iterable[Sequence[float]], pick: Callable[[Sequence[float]], float]) -> str:
        return " / ".join(f"{pick(values):.3g}" for values in zip(*by_layer))

    return [
        shown((found["memory_rms"][0] for found in probed), statistics.median),
        shown((probe for found in probed for probe in found["memory_rms"]), max),
        shown((found["memory_rms"][-1] for found in probed), statistics.median),
    ]


def _largest_gradient(runs: Sequence[Found]) -> str:
    norms = [n for found in runs for term in found["gradient_norms"].values() for n in term]
    return f"{max(norms):.3g}" if norms else ""


def _differences(groups: Mapping[tuple[int, str, float | None], list[Found]]) -> list[str]:
    """Last validation errors of `paper` minus those of `mean`, paired by seed."""
    lines = ["| teachers | clip | MSE/frame, paper minus mean | by seed |", "|---" * 4 + "|"]
    settings = {(count, clip) for count, _, clip in groups}
    for count, clip in sorted(settings, key=lambda setting: (setting[0], setting[1] or 0.0)):
        errors: list[dict[int, float]] = [
            {f["seed"]: f["validation_mse_per_frame"][-1] for f in _finished(groups[key])}
            for key in ((count, combine, clip) for combine in COMBINATIONS)
        ]
        paper, mean = errors
        pairs = [paper[seed] - mean[seed] for seed in sorted(paper.keys() & mean.keys())]
        by_seed = ", ".join(f"{pair:+.2f}" for pair in pairs)
        shown = "off" if clip is None else f"{clip:g}"
        lines.append(f"| {count} | {shown} | {_mean(pairs, '+.2f')} | {by_seed} |")
    return lines


def _given_up(runs: Sequence[Found]) -> list[str]:
    stopped = [found for found in runs if found["stopped"]]
    if not stopped:
        return ["No run was given up."]
    return [
        f"- {found['teachers']} teachers, {found['combine']}, clip {found['clip']}, seed "
        f"{found['seed']}: {found['stopped']}"
        for found in stopped
    ]


def _finished(runs: Sequence[Found]) -> list[Found]:
    return [found for found in runs if found["stopped"] is None]


def _mean(values: Sequence[float], style: str = ".2f") -> str:
    if not values:
        return ""
    mean = format(statistics.fmean(values), style)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _without_folders() -> list[str]:
    """The command's arguments as they would be on another machine."""
    arguments = ["", *sys.argv[1:]]
    return [
        "FOLDER" if before in ("--work", "--out") else given
        for before, given in itertools.pairwise(arguments)
    ]


if __name__ == "__main__":
    main()
