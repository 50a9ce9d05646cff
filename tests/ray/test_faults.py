"""Workers that die, hang or are told to stop: the run goes on, and nothing changes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.ray.conftest import on_ray, train_workers, until
from tests.ray.test_launchers import by_torchrun
from tests.unit.test_training import assert_same, final_state
from tmu_dist.config import FaultConfig, RunConfig
from tmu_dist.run_folder import read_log
from tmu_dist.training.launch import launch
from tmu_dist.training.stopping import STOP_FILE, RunStoppedError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


ENDLESS = 1_000_000


@pytest.fixture
def endless(tmu_config: RunConfig) -> RunConfig:
    """Goes on until it is stopped, with checkpoints and little else."""
    return replace(
        tmu_config,
        training=replace(tmu_config.training, num_steps=ENDLESS),
        schedule=replace(tmu_config.schedule, checkpoint_every=5, validate_every=ENDLESS),
    )


def until_step(config: RunConfig, steps: int) -> RunConfig:
    return replace(config, training=replace(config.training, num_steps=steps))


@contextmanager
def once(happened: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Do something, while the block runs, when something has happened."""

    def wait_and_act() -> None:
        until(happened)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield
    thread.join()


def at_step(run: str, step: int, act: Callable[[], object]) -> AbstractContextManager[None]:
    return once(lambda: any(event["step"] >= step for event in read_log(run)), act)


def after_restart(run: str, act: Callable[[], object]) -> AbstractContextManager[None]:
    """When a run has gone on for some steps after it was started again."""
    return once(lambda: resumes(run) and read_log(run)[-1]["step"] >= resumes(run)[0] + 3, act)


def resumes(run: str) -> list[int]:
    return [event["step"] for event in read_log(run) if event["event"] == "resume"]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_killed_worker_and_sigterm_of_the_command_change_nothing(
    endless: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)  # Ray has one, too
    config = on_ray(endless, 2, "disturbed", max_failures=1)
    with (
        at_step(config.output, 11, lambda: os.kill(max(train_workers()), signal.SIGKILL)),
        after_restart(config.output, stop),
        pytest.raises(RunStoppedError, match=f"of {ENDLESS}"),
    ):
        launch(config)
    (killed,) = resumes(config.output)
    shown = capfd.readouterr()
    line = f"lost (its process died): started again, continues at step {killed} with 2 ranks"
    assert line in shown.err
    assert "worker died" not in shown.out, "Ray's own page about it"
    stopped = read_log(config.output)[-1]
    assert stopped["event"] == "stop" and stopped["step"] > killed >= 10
    assert not Path(config.output, STOP_FILE).exists()
    assert signal.getsignal(signal.SIGTERM) is handler

    result = launch(until_step(config, stopped["step"] + 5))
    assert resumes(config.output) == [killed, stopped["step"]]
    straight = by_torchrun(until_step(endless, result.steps), 2, tmp_path)
    assert_same(final_state(result.run), final_state(straight.output))


def test_a_worker_that_hangs_is_replaced(
    endless: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    faults = FaultConfig(collective_timeout_seconds=8.0)
    config = on_ray(endless, 2, "hangs", faults=faults, max_failures=1)
    with (
        at_step(config.output, 11, lambda: os.kill(max(train_workers()), signal.SIGSTOP)),
        after_restart(config.output, stop),
        pytest.raises(RunStoppedError),
    ):
        launch(config)
    assert "started again, continues at step" in capfd.readouterr().err


def test_a_failure_is_told_in_one_line_and_by_its_cause() -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError
    from ray.train.v2.api.exceptions import WorkerGroupError

    from tmu_dist.training.ray_failures import explain, told_failure

    closed = RuntimeError("Connection closed by peer")
    dead = SimpleNamespace(health_check_failure=ActorDiedError())
    assert told_failure({0: closed, 1: dead}) == "rank 1 lost (its process died)"  # type: ignore[dict-item]
    assert (
        told_failure({2: OutOfMemoryError("killed")}) == "rank 2 lost (its node ran out of memory)"
    )
    away = ActorUnavailableError("no answer", None)
    assert told_failure({0: closed, 3: away}) == "rank 3 lost (it is out of reach)"
    assert told_failure({0: closed, 1: OSError("no\nspace")}) == "rank 1 failed (OSError: no space)"

    config = RunConfig(faults=FaultConfig(collective_timeout_seconds=9.0))
    full = WorkerGroupError("", {0: closed, 1: torch.OutOfMemoryError("tried to allocate")})
    assert "It was out of memory: train fewer sequences at once (scale.seq" in explain(full, config)
    waited = WorkerGroupError("", {0: RuntimeError("Timed out waiting 9000ms for recv")})
    assert "faults.collective_timeout_seconds=9" in explain(waited, config)
    assert "launch.max_failures=3 restarts did not help: rank 0 failed" in explain(waited, config)


@pytest.mark.parametrize("rank", [0, 1])
def test_notices_are_told_once_by_rank_0(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    from tmu_dist.training import ray_worker

    soon = SimpleNamespace(preempted_ranks=[1, 3], deadline_ms=1000 * (time.time() + 30.2))
    never = SimpleNamespace(preempted_ranks=[2], deadline_ms=None)
    answers = [None, soon, soon, never]
    ended = threading.Event()

    def answer() -> object:
        if answers:
            return answers.pop(0)
        ended.set()
        raise ray_worker.RayError

    monkeypatch.setattr(ray_worker.ray.train, "get_preemption_info", answer)
    monkeypatch.setattr(ray_worker, "_NOTICE_SECONDS", 0.0)
    notice = ray_worker._PreemptionNotice(rank)
    assert ended.wait(10)
    expected = [
        "the node of ranks 1, 3 will be taken away in 30 s",
        "the node of rank 2 will be taken away soon",
        None,
    ]
    assert [notice(), notice(), notice()] == (expected if rank == 0 else [None] * 3)
