"""Many runs as Ray tasks: the same numbers as alone, and lost workers are replaced."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.descriptors import others_with_open
from tests.unit.test_many import die, named
from tests.unit.test_training import assert_same, final_state, run
from tmu_dist.config import LaunchConfig, RunConfig
from tmu_dist.run_folder import read_log
from tmu_dist.training.many import Job, run_many

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

RAY = LaunchConfig(launcher="ray", max_failures=2)


def kill_the_worker_of(folder: str, killed: list[int]) -> None:
    """Kill the process that trains in a folder, once it is beyond a checkpoint."""
    while not any(event["step"] >= 5 for event in read_log(folder)):
        time.sleep(0.02)
    for process in others_with_open(f"{folder}/.lock"):
        os.kill(process, signal.SIGKILL)
        killed.append(process)


def test_runs_side_by_side_survive_the_loss_of_a_worker(tmu_config: RunConfig) -> None:
    longer = {"training.num_steps": 60}
    configs = [
        named(tmu_config, f"ray-{seed}", **longer, **{"training.seed": seed}) for seed in (0, 1)
    ]
    killed: list[int] = []
    folders = [config.output for config in configs]
    killer = threading.Thread(target=kill_the_worker_of, args=(folders[0], killed))
    killer.start()
    outcomes = run_many([Job(config=config) for config in configs], RAY)
    killer.join()
    assert len(killed) == 1
    assert [outcome.error for outcome in outcomes] == [None, None]
    resumed = [any(e["event"] == "resume" for e in read_log(folder)) for folder in folders]
    assert resumed == [True, False]
    began, ended = Path(folders[1], "config.json").stat(), Path(folders[0], "result.json").stat()
    assert began.st_mtime < ended.st_mtime, "one after the other"
    for seed, folder in enumerate(folders):
        straight = run(named(tmu_config, f"straight-{seed}", **longer, **{"training.seed": seed}))
        assert_same(final_state(folder), final_state(straight.run))


def test_errors_are_told_once_and_workers_lost_too_often_given_up(tmu_config: RunConfig) -> None:
    jobs = [
        Job(config=named(tmu_config, "unfit", **{"model.hidden_channels": 6})),
        Job(config=named(tmu_config, "dies"), then=die),
        Job(config=named(tmu_config, "done")),
    ]
    launch = LaunchConfig(launcher="ray", max_failures=1)
    unfit, dies, done = run_many(jobs, launch, parallel=2)
    assert (unfit.error or "").startswith("TeacherError: ") and "Traceback" in (unfit.trace or "")
    assert (dies.error or "").startswith("its worker was lost 2 times (WorkerCrashedError).")
    assert done.error is None
    assert_same(final_state(jobs[2].config.output), final_state(run(named(tmu_config, "b")).run))
