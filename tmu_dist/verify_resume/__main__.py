"""The drill: does a run that is killed in mid-step continue as if nothing had happened?

    python -m tmu_dist.verify_resume [--recipe NAME] [--config FILE] [--section.field value]
        [--ranks 2] [--then 2 1] [--steps 24] [--kill-after STEP ...] [--signal KILL|TERM]
        [--seed N] [--tolerance 1e-4] [--launcher torchrun|ray] [--timeout 600]
        [--work FOLDER] [--json FILE]

Trains a recipe for a few steps without interruption, and once more in another folder, where every
rank's process is killed in mid-step. From there it continues on each number of ranks in --then, and
what came of it is compared with the run that nobody touched: the loss of every step, validation
scores, the position in the data, and the final weights. On a CPU the same number of ranks must give
the same bits; other numbers sum in another order and may differ by --tolerance. Ends with PASS and
code 0, or with FAIL and code 1.

Archives and teachers of the recipe are made below --work, which may be in a store, teachers with
few steps; runs lie in a new folder there. docs/verify_resume.md says more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tmu_dist.commands import command_errors
from tmu_dist.config import ConfigError, RunConfig, with_overrides
from tmu_dist.data.storage import exists, join_url, list_paths, local_path, read_bytes, write_bytes
from tmu_dist.files import atomic_write_text
from tmu_dist.recipes import DEFAULT_RECIPE
from tmu_dist.recipes.base import Recipe
from tmu_dist.run_folder import RESULT_FILE, read_json, read_log
from tmu_dist.train import make_archive, missing_teachers, parse_command, run_recipe
from tmu_dist.verify_resume.processes import DrillError, started_job
from tmu_dist.workspace import WORKSPACE, in_workspace

if TYPE_CHECKING:
    from tmu_dist.verify_resume.comparing import Check

log = logging.getLogger(__name__)

TEACHER_STEPS = 20
"""Of teachers that are made for a drill: they need to be there, not to be good."""
VALIDATION_SAMPLES = 32
_NOT_COPIED = ("tensorboard/", "ray/")
"""Parts of a run folder that say nothing about it, or are Ray's, for the folder they lie in."""


@dataclass(frozen=True, kw_only=True)
class Drill:
    """What one drill does."""

    config: RunConfig
    """Of all its runs, but for their folders and numbers of ranks."""
    folder: str
    """Of its runs."""
    ranks: int
    then: tuple[int, ...]
    """Numbers of ranks to continue with."""
    kill_after: tuple[int, ...]
    """Steps after which to kill, ascending."""
    part_of_step: tuple[float, ...]
    """How far into the next step, for each kill."""
    signal: Literal["KILL", "TERM"]
    tolerance: float
    timeout: float
    """Seconds that one start of a run may take."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What a kill left behind."""

    after_step: int
    """In the next step, that is."""
    logged_step: int
    """The last one in the log."""
    checkpoint_step: int
    """Of the newest whole checkpoint."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.verify_resume`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, flags = _own_flags().parse_known_args(words)
    with command_errors(), _workspace(own.work):
        recipe = parse_command(
            ["--recipe", own.recipe, "--launcher", own.launcher, *flags],
            prog="python -m tmu_dist.verify_resume",
            summary=f"{__doc__}\n",
        )
        drill = plan(own, recipe.config)
        make_ready(replace(recipe, config=drill.config))
        kills, checks = run_drill(drill)
    passed = all(check.passed for check in checks)
    log.info("%s\n%s", "\n".join(map(str, checks)), "PASS" if passed else "FAIL")
    if own.json is not None:
        record = {
            "command": shlex.join(["python", "-m", "tmu_dist.verify_resume", *words]),
            "seed": own.seed,
            "drill": asdict(drill),
            "kills": [asdict(kill) for kill in kills],
            "checks": [{**asdict(check), "passed": check.passed} for check in checks],
            "passed": passed,
        }
        atomic_write_text(Path(own.json), json.dumps(record, indent=1) + "\n")
    raise SystemExit(0 if passed else 1)


@contextmanager
def _workspace(address: str) -> Iterator[None]:
    """Have recipes, also in the processes of the ranks, put and seek what they name there."""
    before = os.environ.get(WORKSPACE)
    os.environ[WORKSPACE] = address
    try:
        yield
    finally:
        del os.environ[WORKSPACE]
        if before is not None:
            os.environ[WORKSPACE] = before


def _own_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--launcher", choices=("torchrun", "ray"), default="torchrun")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--then", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--kill-after", type=int, nargs="+")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--work", default=in_workspace("runs/verify-resume"))
    parser.add_argument("--json")
    return parser


def plan(own: argparse.Namespace, config: RunConfig) -> Drill:
    """Choose the moments to kill, and the settings of all runs.

    Raises:
        ConfigError: a drill that would show nothing.
    """
    every = max(own.steps // 6, 1)
    if own.steps < 5 or min(own.ranks, *own.then) < 1:
        raise ConfigError(
            f"A drill needs --steps >= 5 and at least one rank, got {own.steps} steps, --ranks "
            f"{own.ranks} and --then {own.then}."
        )
    draw = random.Random(own.seed)
    kill_after = own.kill_after or [draw.randint(2 * every + 1, max(2 * every + 1, own.steps - 4))]
    is_ascending = kill_after == sorted(set(kill_after))
    if not is_ascending or not every < kill_after[0] <= kill_after[-1] < own.steps:
        raise ConfigError(
            f"--kill-after {kill_after}: with {own.steps} steps there is a checkpoint every "
            f"{every}, so kill after one of the steps {every + 1} to {own.steps - 1}, in ascending "
            "order."
        )
    overrides = {
        "training.num_steps": own.steps,
        "data.max_validation_samples": VALIDATION_SAMPLES,
        "schedule.log_every": 1,
        "schedule.validate_every": 2 * every,
        "schedule.checkpoint_every": every,
        "launch.max_failures": 0,  # what is killed stays dead until the drill continues it
    }
    log.info("seed %d", own.seed)
    return Drill(
        config=with_overrides(config, overrides),
        folder=join_url(own.work, f"drills/{time.strftime('%Y%m%d-%H%M%S')}"),
        ranks=own.ranks,
        then=tuple(dict.fromkeys(own.then)),
        kill_after=tuple(kill_after),
        part_of_step=tuple(round(draw.random(), 3) for _ in kill_after),
        signal=own.signal,
        tolerance=own.tolerance,
        timeout=own.timeout,
    )


def make_ready(recipe: Recipe) -> None:
    """Make the archives and teachers that the recipe names and that are not there."""
    from tmu_dist.collectives import Collectives

    make_archive(recipe, recipe.config.data.url)
    for teacher in missing_teachers(recipe):
        quick = {"training.num_steps": TEACHER_STEPS, "launch.launcher": "local"}
        run_recipe(replace(teacher, config=with_overrides(teacher.config, quick)), Collectives())


def run_drill(drill: Drill) -> tuple[list[Kill], list[Check]]:
    """Run straight, kill, continue and compare.

    Raises:
        DrillError: a run failed by itself, or could not be killed before its end.
    """
    from tmu_dist.verify_resume.comparing import Check, compare, outcome_of

    straight = run_on(drill, "straight", drill.ranks)
    expected = outcome_of(straight)
    seconds = read_json(straight, RESULT_FILE)["seconds_per_batch"]
    killed, kills = join_url(drill.folder, "killed"), []
    for step, part in zip(drill.kill_after, drill.part_of_step, strict=True):
        kills.append(kill(drill, killed, step, part * seconds))
    checks = []
    if drill.signal == "TERM":
        lost = sum(each.logged_step - each.checkpoint_step for each in kills)
        checks.append(Check(run="killed", what="steps lost", difference=lost, allowed=0.0))
    for size in drill.then:
        name = f"then-{size}"
        copy_run(killed, join_url(drill.folder, name))
        found = outcome_of(run_on(drill, name, size))
        began = (found.from_step, found.world_size)
        went_astray = began != (kills[-1].checkpoint_step, size)
        exact = size == drill.ranks and found.device == expected.device == "cpu"
        tolerance = 0.0 if exact else drill.tolerance
        checks += [
            Check(run=name, what="begins elsewhere", difference=float(went_astray), allowed=0.0),
            *compare(name, expected, found, tolerance=tolerance),
        ]
    return kills, checks


def run_on(drill: Drill, name: str, size: int) -> str:
    """Train to the end, or continue to it, on so many ranks; returns the run folder.

    Raises:
        DrillError: it did not come to the end.
    """
    run = join_url(drill.folder, name)
    started = time.monotonic()
    with started_job(drill.config, run, size) as job:
        job.wait(drill.timeout)
        if not exists(run, RESULT_FILE):
            raise DrillError(f"{run} on {size} rank(s) failed by itself:\n{job.said()}")
    log.info("%s: %d rank(s) to the end in %.0f s", run, size, time.monotonic() - started)
    return run


def kill(drill: Drill, run: str, step: int, seconds: float) -> Kill:
    """Start or continue a run, and kill all its ranks so many seconds after a step.

    Raises:
        DrillError: it ended before, or has no checkpoint to continue from.
    """
    from tmu_dist.verify_resume.comparing import newest_checkpoint

    with started_job(drill.config, run, drill.ranks) as job:
        pause = 0.01 if local_path(run) else 0.5
        job.wait(drill.timeout, until=lambda: _logged_step(run) >= step, look_every=pause)
        if job.is_over:
            raise DrillError(f"{run} ended before it was killed after step {step}:\n{job.said()}")
        time.sleep(seconds)
        job.send(signal.Signals[f"SIG{drill.signal}"])
        job.wait(drill.timeout)
    if exists(run, RESULT_FILE) or (checkpoint := newest_checkpoint(run)) is None:
        raise DrillError(
            f"{run} was killed after step {step}, but it had come to its end, or had no checkpoint "
            "yet: take more --steps, or another --kill-after."
        )
    step_of_checkpoint = int(checkpoint.rpartition("-")[2])
    found = Kill(after_step=step, logged_step=_logged_step(run), checkpoint_step=step_of_checkpoint)
    log.info(
        "%s: %d rank(s), SIG%s %.2f s after step %d, newest checkpoint of step %d",
        *(run, drill.ranks, drill.signal, seconds, step, step_of_checkpoint),
    )
    return found


def copy_run(run: str, to: str) -> None:
    """Copy a run folder that nobody writes to."""
    for path in list_paths(run):
        if not path.startswith(_NOT_COPIED):
            write_bytes(to, path, read_bytes(run, path))


def _logged_step(run: str) -> int:
    """The last step in the log; 0 if there is none."""
    return max((event["step"] for event in read_log(run) if event["event"] == "train"), default=0)


if __name__ == "__main__":
    main()
