"""How long does a run stand still when a worker, a node, a link or the head is lost?

    python -m benchmarks.recovery [--quick] [--faults worker node link head] [--repeats 3]

Needs root: a head and two nodes are machines in network namespaces (`tests/hosts/machines.py`), and
a run with scale.num_workers=1..2 and two teachers trains over them with the real command, on a disk
that all of them see. Then, again and again,

    worker    the process of rank 1 is killed (SIGKILL); its node stays
    node      a node loses its power: it is silent from one moment to the next, like a pulled plug
    link      a node's link is cut for good; its worker goes on waiting for the other one
    head      the head loses its power, and with it the command; Ray is started again everywhere,
              and the same command is given

After `node` and `link` the machine is started again and joins, and the run grows back: `return`.

Times are of what can be seen from outside: `noticed` when Ray Train tells that its workers failed,
`resumed` when new workers have loaded the checkpoint, `training` when their first step is logged,
all in seconds from the fault; of `return` from the end of `ray start`, of `head` from the command.
`repeated` steps are those done since the checkpoint.

Ray's health checks are set as docs/faults.md advises; `--health-checks ray` leaves Ray's own.
Prints the table and writes results.json and table.md to docs/results/recovery. All of it takes
less than ten minutes on two idle cores, --quick (once each) less than five.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.provenance import (
    command_line,
    median_and_range,
    provenance,
    publish,
    record_folder,
    say,
)
from benchmarks.small_run import prepare_student
from tests.hosts.machines import QUICK_HEALTH_CHECKS, Cluster, machines, why_not
from tmu_dist.config import (
    FaultConfig,
    LaunchConfig,
    RunConfig,
    ScaleConfig,
    ScheduleConfig,
    to_json,
)
from tmu_dist.run_folder import read_log_lines

FAULTS = ("worker", "node", "link", "head")
GOALS = {"worker": ("after", 15.0), "node": ("in all", 40.0), "link": ("in all", 40.0)}
"""Seconds until it trains again: after the loss was noticed, or in all."""
CHECKPOINT_EVERY = 20
RESIZE_SECONDS = 5.0
START_TIMEOUT_SECONDS = 15.0
_WORKER = "RayTrainWorker"
"""In the title of every process that Ray Train starts for a rank."""
_LOSS_FILE = "ray/lost.txt"
"""In the run folder from when Ray Train notices a loss until the user is told of it."""
_TIMEOUT_SECONDS = 300.0


class Trial:
    """A run on machines, and what is done to it.

    Args:
        cluster: its machines, with Ray on them.
        config: of the run.
        folder: for the command's file and what it says.
    """

    def __init__(self, cluster: Cluster, config: RunConfig, folder: Path) -> None:
        self._cluster = cluster
        self._node = cluster.nodes[1]
        self._run = config.output
        self._loss_file = Path(config.output, "ray/lost.txt")  # from a loss until it was told
        self._said = folder / "said.txt"
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(to_json(config))))
        words = [sys.executable, "-m", "tmu_dist.train", "--recipe", "digits-scratch"]
        self._words = [*words, "--config", str(file)]
        self._begin()

    def settle(self) -> None:
        """Wait until two ranks train and have written a checkpoint."""
        self._wait(lambda: sum(len(n.processes(_WORKER)) for n in self._cluster.nodes) == 2)
        self._wait(lambda: not self._loss_file.exists())
        enough = self._look().step + 1.5 * CHECKPOINT_EVERY
        self._wait(lambda: self._look().step >= enough)

    def worker(self) -> dict[str, float]:
        """Kill the process of a rank."""
        (worker,) = self._node.processes(_WORKER)
        return self._loss(lambda: os.kill(worker, signal.SIGKILL))

    def node(self) -> dict[str, float]:
        """Take a node's power away."""
        return self._loss(self._node.kill)

    def link(self) -> dict[str, float]:
        """Cut a node off."""
        return self._loss(self._node.cut)

    def head(self) -> dict[str, float]:
        """Lose the head and the command; start Ray again, and give the command again."""
        everything = (self._cluster.head, *self._cluster.nodes)
        for machine in everything:
            machine.kill()
        self._command.wait(_TIMEOUT_SECONDS)
        for machine in everything:
            machine.start()
        self._cluster.start()
        started, known = time.time(), len(self._look().resumes)
        self._begin()
        return self._until_training(started, known)

    def mend(self) -> dict[str, float]:
        """Switch the lost node off and on again, and wait until the run has grown onto it."""
        self._node.kill()
        self._node.start()
        self._cluster.join(self._node)
        return self._until_training(time.time(), len(self._look().resumes))

    def _loss(self, fault: Callable[[], None]) -> dict[str, float]:
        """Let something happen, and time what follows."""
        started, known = time.time(), len(self._look().resumes)
        fault()
        self._wait(self._loss_file.exists)
        noticed = time.time() - started
        return {"noticed": noticed, **self._until_training(started, known)}

    def _until_training(self, started: float, known: int) -> dict[str, float]:
        """Wait for new workers, the ones after so many, and for their first step."""
        reached = 0

        def have_resumed() -> bool:
            nonlocal reached
            look = self._look()
            if len(look.resumes) > known:
                return True
            reached = max(reached, look.step)  # new workers cut the log back
            return False

        self._wait(have_resumed)
        resumed, step = time.time() - started, self._look().resumes[known]
        self._wait(lambda: self._look().step > step)
        training = time.time() - started
        return {"resumed": resumed, "training": training, "repeated": reached - step}

    def _begin(self) -> None:
        self._command = self._cluster.head.begin(
            self._words, self._said, RAY_ADDRESS=self._cluster.address
        )

    def _wait(self, happened: Callable[[], bool]) -> None:
        self._command.wait_for(happened, _TIMEOUT_SECONDS)

    def _look(self) -> _Look:
        """What the log has now; parses few of its lines, since it shares the cores."""
        lines = read_log_lines(self._run)
        resumes = [json.loads(line)["step"] for line in lines if '"event": "resume"' in line]
        return _Look(resumes, json.loads(lines[-1])["step"] if lines else 0)


class _Look(NamedTuple):
    resumes: list[int]
    """The step from which each start of workers after the first went on."""
    step: int
    """The newest one."""


def prepare_run(folder: Path) -> RunConfig:
    """A student that trains until it is ended, on as many ranks as there are."""
    student = prepare_student(folder, hidden_channels=16, num_steps=2)
    return replace(
        student,
        training=replace(student.training, num_steps=1_000_000),
        schedule=ScheduleConfig(
            log_every=1, validate_every=1_000_000, checkpoint_every=CHECKPOINT_EVERY
        ),
        launch=LaunchConfig(launcher="ray", max_failures=1000),
        scale=ScaleConfig(num_workers="1..2", resize_seconds=RESIZE_SECONDS),
        faults=FaultConfig(start_timeout_seconds=START_TIMEOUT_SECONDS),
    )


def measure(
    faults: Sequence[str], repeats: int, health_checks: Mapping[str, str]
) -> dict[str, list[dict[str, float]]]:
    """Seconds of every repeat, by fault and "return"."""
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        config = prepare_run(folder)
        with machines(3, folder / "machines") as (head, *nodes):
            cluster = Cluster(head, tuple(nodes), health_checks)
            cluster.start()
            trial = Trial(cluster, config, folder)
            for number, fault in itertools.product(range(1, repeats + 1), faults):
                trial.settle()
                found.setdefault(fault, []).append(getattr(trial, fault)())
                say(f"{number} of {repeats}, {fault}: {found[fault][-1]}")
                if fault in ("node", "link"):
                    found.setdefault("return", []).append(trial.mend())
                    say(f"{number} of {repeats}, return: {found['return'][-1]}")
    return found


def table(record: Mapping[str, Any]) -> str:
    """Markdown: median seconds of every fault, with the least and the most."""
    machine, settings = record["machine"], record["settings"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores for all machines, torch "
        f"{record['versions']['torch']}, Ray {record['versions']['ray']}; health checks: "
        f"{record['health_checks']}; a checkpoint every {settings['checkpoint_every']} steps. "
        f"Seconds, median (least - most) of {record['repeats']}.",
        "",
        "| lost | noticed | training again after that | in all | wanted | steps repeated |",
        "|---" * 6 + "|",
    ]
    for fault, repeats in record["seconds"].items():
        noticed = [each["noticed"] for each in repeats if "noticed" in each]
        after = [each["training"] - each["noticed"] for each in repeats if "noticed" in each]
        total = [each["training"] for each in repeats]
        columns = [
            *(median_and_range(each, 1) for each in (noticed, after, total)),
            _wanted(fault, after, total),
        ]
        columns.append(median_and_range([each["repeated"] for each in repeats], 0))
        lines.append(f"| {fault} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _wanted(fault: str, after: Sequence[float], total: Sequence[float]) -> str:
    """What was wanted, and whether the median reaches it."""
    if fault not in GOALS:
        return ""
    what, goal = GOALS[fault]
    is_reached = statistics.median(after if what == "after" else total) <= goal
    return f"{what} {goal:.0f}" + ("" if is_reached else " (**missed**)")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--faults", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--health-checks", choices=("quick", "ray"), default="quick")
    chosen = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    repeats = 1 if chosen.quick else chosen.repeats
    health_checks = QUICK_HEALTH_CHECKS if chosen.health_checks == "quick" else {}
    where = provenance("benchmarks.recovery", "cpu", chosen.revision)
    where["versions"]["ray"] = version("ray")
    record = {
        **where,
        "repeats": repeats,
        "health_checks": chosen.health_checks,
        "settings": {
            **health_checks,
            "checkpoint_every": CHECKPOINT_EVERY,
            "resize_seconds": RESIZE_SECONDS,
            "start_timeout_seconds": START_TIMEOUT_SECONDS,
        },
        "seconds": measure(chosen.faults, repeats, health_checks),
    }
    publish(record, table(record), record_folder(chosen, "recovery"))


if __name__ == "__main__":
    main()
