"""`ray job submit` of the repository, as a user does: every command, its output and exit code.

A machine of its own (a set of namespaces) runs Ray as the cluster files start it: with a token, the
dashboard on loopback, the environment of cluster/node_env.sh. Commands are given with relative
paths, from a copy of the working tree that holds what a user's would.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TINY_MODEL
from tests.hosts.machines import RAY, Machine, machines, why_not
from tests.ray.conftest import until
from tmu_dist.run_folder import LOG_FILE, read_log
from tuning.report import PAGE_FILE

pytestmark = [pytest.mark.ray]

ROOT = Path(__file__).parents[2]
DASHBOARD = "http://127.0.0.1:8265"
RUN: dict[str, Any] = {
    "window": {"num_input_frames": 3, "num_target_frames": 3},
    "model": {
        name: getattr(TINY_MODEL, name)
        for name in ("num_layers", "hidden_channels", "kernel_size", "patch_size")
    },
    "data": {"url": "archives/tiny"},
    "training": {"num_steps": 100_000, "batch_size": 4, "sampling_stop_step": 10},
    "scale": {"num_workers": 1},
    "schedule": {"log_every": 1, "validate_every": 100_000, "checkpoint_every": 100_000},
}
"""As run.yaml; more steps than are taken until it is stopped."""
SPACE = {
    "about": "tiny",
    "recipe": "digits-scratch",
    "search": {"sampler": "grid"},
    "settings": {"training.num_steps": 4, "schedule": {"validate_every": 2}},
    "axes": {"training.learning_rate": [0.001, 0.0001]},
}
PREPARE = (
    "python -m data_prep moving-mnist --out archives/tiny --workers 1 --train 22 --val 5 --test 5 "
    "--digits 2 --frames 6 --frame-size 16 --digit-size 7 --speed 1 2"
)
TRAIN = "python -m tmu_dist.train --recipe digits-scratch --config run.yaml --output runs/tiny"
EVALUATE = "python -m tmu_dist.evaluate runs/tiny --data archives/tiny"
SEARCH = "python tuning/search.py --space space.yaml --config run.yaml --out runs/search"
WRONG = "python -m tmu_dist.train --training.num-stepps 3"

LOOK = """
import json, os, sys
from pathlib import Path
from tmu_dist.doctor.here import judge_here, look_here
for variables in [{}, {"RAY_AUTH_TOKEN": "0" * 64}]:
    os.environ.update(variables)
    findings = judge_here(look_here(Path(sys.argv[1]), sys.argv[2]))
    print(json.dumps({each.check: [each.status, each.found] for each in findings}))
"""
"""What the doctor says to the user, and to one with another token."""


@dataclass(frozen=True)
class Client:
    """A user at a machine, in a copy of the repository."""

    machine: Machine
    project: Path

    @property
    def workspace(self) -> Path:
        """Where relative paths of jobs lie."""
        return self.machine.home / "tmu_dist"

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray to its end."""
        command, environment = self.machine.command(
            ["env", f"--chdir={self.project}", RAY, *words],
            RAY_AUTH_MODE="token",
            RAY_API_SERVER_ADDRESS=DASHBOARD,
        )
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )

    def submit(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Submit a command as the README says."""
        words = ["--working-dir", ".", *options, "--", *command.split()]
        return self.ray("job", "submit", *words)

    def succeed(self, command: str, *options: str) -> str:
        """Submit what must end well; what came back of its output."""
        done = self.submit(command, *options)
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("job-submit")
    project = folder / "project"
    _copy_working_tree(project)
    (project / "run.yaml").write_text(yaml.safe_dump(RUN))
    (project / "space.yaml").write_text(yaml.safe_dump(SPACE))
    with machines(1, folder) as (machine,):
        (machine.home / "tmu-dist-venv").symlink_to(sys.prefix)
        token = f"umask 077; {RAY} get-auth-token --generate > /dev/null"
        machine.run(["bash", "-c", token])
        start = f"{RAY} start --head --port=6379 --num-cpus=2 --dashboard-host=127.0.0.1"
        limits = f"--node-ip-address={machine.address} --object-store-memory=100000000"
        machine.run(
            ["bash", "-c", f". {ROOT}/cluster/node_env.sh; {start} {limits}"], PYTHONPATH=""
        )
        user = Client(machine, project)
        until(lambda: user.ray("job", "list").returncode == 0)
        yield user


def _copy_working_tree(to: Path) -> None:
    """The files that git has or would add: what lies in a user's folder, too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in listed.stdout.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def test_the_whole_way(client: Client) -> None:
    """Prepare, train, stop, continue, evaluate, search; results stay when the jobs are gone."""
    with ThreadPoolExecutor() as both:
        refused = both.submit(client.submit, WRONG)
        assert "archives/tiny" in client.succeed(PREPARE)
    assert refused.result().returncode == 1
    assert "--training.num-stepps" in refused.result().stdout, "the reason does not come back"
    assert "failed with exit code 2" in refused.result().stdout

    run = client.workspace / "runs/tiny"
    client.succeed(TRAIN, "--no-wait", "--submission-id", "first")
    until(lambda: (run / LOG_FILE).exists() and '"train"' in (run / LOG_FILE).read_text())
    begun = time.monotonic()
    stopped = client.ray("job", "stop", "first")
    assert stopped.returncode == 0 and "was stopped" in stopped.stdout, stopped.stdout
    assert time.monotonic() - begun < 60, "it was killed, not stopped"
    said = client.ray("job", "logs", "first").stdout
    assert "the same command continues" in said and "Traceback" not in said
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))

    shorter = {**RUN, "training": {**RUN["training"], "num_steps": step + 20}}
    (client.project / "run.yaml").write_text(yaml.safe_dump(shorter))  # and the same command
    said = client.succeed(TRAIN)
    assert f"continues at step {step}" in said and f"{step + 20} steps" in said
    steps = [event["step"] for event in read_log(run) if event["event"] == "train"]
    assert steps == list(range(1, step + 21))

    with ThreadPoolExecutor() as both:
        searched = both.submit(client.succeed, SEARCH)
        assert "persistence" in client.succeed(EVALUATE)
    assert (run / "evaluation-test/evaluation.json").exists()
    assert "runs/search" in searched.result()
    assert (client.workspace / "runs/search" / PAGE_FILE).exists()


def test_the_doctor_agrees_with_the_dashboard(client: Client) -> None:
    said = client.machine.run(
        [sys.executable, "-c", LOOK, str(client.project), DASHBOARD], RAY_AUTH_MODE="token"
    )
    user, stranger = map(json.loads, said.splitlines())
    assert {status for status, _ in user.values()} == {"ok"}, user
    assert stranger["token"][0] == "fault" and "does not take" in stranger["token"][1]
