"""The command as a process: killed twice, it goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import tuning.search
from tests.conftest import TINY_MODEL
from tests.e2e.test_run_in_store import newest_step
from tests.ray.conftest import until
from tmu_dist import train
from tmu_dist.data.storage import exists
from tmu_dist.run_folder import RESULT_FILE, read_log
from tmu_dist.training.run_lock import lock_run
from tuning.best import SETTINGS_FILE
from tuning.journal import read_trials
from tuning.plan import load_search
from tuning.report import PAGE_FILE
from tuning.samplers import make_sampler

pytestmark = pytest.mark.ray

NUM_POINTS, STEPS = 5, 600


@pytest.fixture
def words(archive_url: str, teacher_runs: tuple[str, str], tmp_path: Path) -> list[str]:
    """A command of five short trials, but for its --out."""
    space = {
        "about": "tiny",
        "recipe": "digits-tmu",
        "search": {"sampler": "tpe", "num_samples": NUM_POINTS},
        "axes": {
            "sources": {"sets": "all"},
            "transfer.beta": {"from": 0.001, "to": 1, "scale": "log"},
        },
    }
    run = {
        "window": {"num_input_frames": 3, "num_target_frames": 3},
        "model": {
            name: getattr(TINY_MODEL, name)
            for name in ("num_layers", "hidden_channels", "kernel_size", "patch_size")
        },
        "training": {"num_steps": STEPS, "batch_size": 4, "sampling_stop_step": 10},
        "schedule": {"log_every": 8, "validate_every": 40, "checkpoint_every": 4},
    }
    for name, content in (("space", space), ("run", run)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [
        *("--space", str(tmp_path / "space.yaml"), "--config", str(tmp_path / "run.yaml")),
        *("--launcher", "local", "--data.url", archive_url),
        *("--transfer.teachers", *teacher_runs),
    ]


def start(words: list[str]) -> subprocess.Popen[str]:
    script = tuning.search.__file__
    return subprocess.Popen(
        [sys.executable, script, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def shown_by(process: subprocess.Popen[str], code: int) -> str:
    """What a process said until it ended as expected."""
    shown, _ = process.communicate(timeout=400)
    assert process.returncode == code, shown
    assert "Traceback" not in shown, shown
    return shown


def in_the_middle(folder: str, finished: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many trials have finished and another one has a checkpoint, and far to go."""

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()
        trials = read_trials(folder)
        open_ones = [t for t in trials if t.state == "open"]
        return len(trials) - len(open_ones) >= finished and any(
            8 <= newest_step(f"{folder}/trials/{trial.number:04d}") <= STEPS // 2
            for trial in open_ones
        )

    until(is_there)


def descendants(process: int) -> set[int]:
    """Processes that a process started, and those that they started, as far as they live."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone since
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(status.parent.name)] = int(parent)
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {process}


def trainers(family: set[int]) -> set[int]:
    """Those of some processes that train."""
    found = set()
    for process in family:
        with suppress(OSError):
            if b"ImplicitFunc" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.add(process)
    return found


def resumes(run: str) -> list[int]:
    return [event["step"] for event in read_log(run) if event["event"] == "resume"]


def states(folder: str) -> dict[int, str]:
    return {trial.number: trial.state for trial in read_trials(folder)}


@dataclass(frozen=True)
class Left:
    """What a start of a search has left behind."""

    finished: dict[str, int]
    """Runs, and when their results were written."""
    begun: dict[str, int]
    """Runs of open trials that have checkpoints and are not at their end, and the newest ones."""

    @classmethod
    def of(cls, folder: str) -> Left:
        runs = {f"{folder}/trials/{number:04d}": state for number, state in states(folder).items()}
        finished = [run for run, state in runs.items() if state == "finished"]
        begun = {run: newest_step(run) for run, state in runs.items() if state == "open"}
        return cls(
            finished={run: Path(run, RESULT_FILE).stat().st_mtime_ns for run in finished},
            begun={run: step for run, step in begun.items() if 0 < step < STEPS},
        )

    def assert_kept(self, later: Left) -> None:
        """What had finished was left alone, and what had begun went on from its checkpoint."""
        assert self.finished and self.begun, "killed at the wrong moment to prove anything"
        assert self.finished.items() <= later.finished.items()
        for run, step in self.begun.items():
            assert step in resumes(run)


def test_killed_twice_and_the_same_command_again(words: list[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "search")
    words = [*words, "--out", folder]

    process = start(words)
    in_the_middle(folder, finished=1, process=process)
    process.send_signal(signal.SIGTERM)
    shown = shown_by(process, code=128 + signal.SIGTERM)
    assert "the same command continues" in shown
    after_sigterm = Left.of(folder)
    for run, step in after_sigterm.begun.items():
        last = read_log(run)[-1]
        assert (last["event"], last["step"]) == ("stop", step), "a checkpoint of its last step"
    assert Path(folder, PAGE_FILE).exists()

    process = start(words)
    in_the_middle(folder, finished=len(after_sigterm.finished) + 1, process=process)
    family = descendants(process.pid)
    assert trainers(family)
    process.kill()
    process.wait()
    until(lambda: not trainers(family), 60)
    after_sigkill = Left.of(folder)
    after_sigterm.assert_kept(after_sigkill)

    shown = shown_by(start(words), code=0)
    after_sigkill.assert_kept(Left.of(folder))
    trials = read_trials(folder)
    assert [trial.state for trial in trials] == NUM_POINTS * ["finished"]
    assert {trial.failures for trial in trials} == {0}
    for number in range(NUM_POINTS):
        assert (
            json.loads(Path(folder, f"trials/{number:04d}", RESULT_FILE).read_text())["steps"]
            == STEPS
        )

    search = load_search(folder)
    alone = make_sampler(search.space, search.options)
    assert [trial.point for trial in trials] == [alone.ask() for _ in trials]

    assert all(Path(folder, name).exists() for name in (PAGE_FILE, "trials.csv", "trials.parquet"))
    best = Path(folder, SETTINGS_FILE)
    assert f"--config {best}" in shown
    short = ["--training.num-steps", "4", "--output", str(tmp_path / "best")]
    train.main(["--config", str(best), *short])
    assert Path(tmp_path, "best", RESULT_FILE).exists()

    kept = Left.of(folder)
    assert "Best: " in shown_by(start([*words, "--seeds", "0"]), code=0), "nothing is left to do"
    assert Left.of(folder) == kept


def test_a_search_in_a_bucket(words: list[str], bucket: str) -> None:
    folder = f"{bucket}/searches/tiny"
    flags = ["--out", folder, "--num-samples", "2", "--training.num-steps", "12"]
    shown = shown_by(start([*words, *flags]), code=0)
    assert set(states(folder).values()) == {"finished"} and len(states(folder)) == 2
    for number in states(folder):
        assert newest_step(f"{folder}/trials/{number:04d}") == 12
    assert all(exists(folder, name) for name in (PAGE_FILE, "trials.csv", SETTINGS_FILE))
    assert f"{folder}/{SETTINGS_FILE}" in shown


def test_a_second_driver_is_refused(words: list[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "search")
    with closing(lock_run(folder)):
        shown = shown_by(start([*words, "--out", folder]), code=2)
    assert f"Process {os.getpid()} on " in shown and folder in shown
    assert not read_trials(folder)
