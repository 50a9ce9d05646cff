"""Many runs side by side: each as if it were alone, whatever happens to the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_training import assert_same, final_state, run
from tmu_dist.config import (
    ConfigError,
    LaunchConfig,
    RunConfig,
    ScaleConfig,
    to_json,
    with_overrides,
)
from tmu_dist.run_folder import RESULT_FILE, read_log
from tmu_dist.training.launch import with_absolute_paths
from tmu_dist.training.many import Job, run_job, run_many
from tmu_dist.training.run_lock import lock_run

LOCAL = LaunchConfig(launcher="local")


def named(config: RunConfig, name: str, **changes: object) -> RunConfig:
    output = str(Path(config.output).with_name(name))
    return with_overrides(config, {"output": output, **changes})


def die(config: RunConfig) -> None:
    """Stands for a process that the system kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(config: RunConfig) -> None:
    mark = Path(config.output, "died")
    if not mark.exists():
        mark.touch()
        die(config)


def leave_a_mark(config: RunConfig) -> None:
    Path(config.output, f"{Path(config.output).name}.mark").touch()


def test_runs_end_each_in_its_own_way(
    tmu_config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    dying = Job(config=named(tmu_config, "dies"), then=die_once)
    unfit = Job(config=named(tmu_config, "unfit", **{"model.hidden_channels": 6}))
    other = Job(config=named(tmu_config, "other", **{"training.seed": 3}), then=leave_a_mark)
    dies, fails, done, again = run_many([dying, unfit, other, dying], LOCAL, parallel=1)

    assert dies.result is None and "exit code -9" in (dies.error or "")
    assert (fails.error or "").startswith("TeacherError: ")
    assert "hidden channels: teacher 4, student 6" in (fails.error or "")
    assert "Traceback" in (fails.trace or "")
    alone = run(named(tmu_config, "alone", **{"training.seed": 3}))
    assert done.result is not None and again.result is not None
    assert done.result.best_mse_per_frame == alone.best_mse_per_frame
    assert again.result.best_mse_per_frame != alone.best_mse_per_frame
    assert_same(final_state(str(tmp_path / "other")), final_state(alone.run))
    assert (tmp_path / "other" / "other.mark").exists()
    starts = [event["event"] for event in read_log(tmp_path / "dies")]
    assert "resume" not in starts and again.error is None, "what is finished is not trained again"
    lines = [message for message in caplog.messages if " of 4: " in message]
    assert [line.split(":")[0] for line in lines] == [f"{n} of 4" for n in (1, 2, 3, 4)]
    assert ["failed" in line for line in lines] == [True, True, False, False]


DRIVER = """
import sys
from pathlib import Path
from tmu_dist.config import LaunchConfig, from_dict
from tmu_dist.training.launch import with_absolute_paths
from tmu_dist.training.many import Job, run_many
import json
if __name__ == "__main__":
    config = from_dict(json.loads(Path(sys.argv[1]).read_text()))
    run_many([Job(config=config)], LaunchConfig(launcher="local"), parallel=1)
"""


def test_killed_driver_takes_its_processes_with_it_and_the_jobs_continue(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    few = {"schedule.checkpoint_every": 10, "schedule.validate_every": 100}
    config = with_overrides(tiny_config, {"training.num_steps": 100, **few})
    script, settings = tmp_path / "driver.py", tmp_path / "config.json"
    script.write_text(DRIVER)
    settings.write_text(to_json(config))
    place = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    driver = subprocess.Popen([sys.executable, str(script), str(settings)], env=place)
    while not any(Path(config.output, "checkpoints").glob("step-*")):
        assert driver.poll() is None
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    lock_run(config.output, patience_seconds=5.0).close()
    assert not Path(config.output, RESULT_FILE).exists(), "killed too late to prove anything"
    assert run_job(Job(config=config)).error is None
    assert any(event["event"] == "resume" for event in read_log(config.output))
    assert_same(final_state(config.output), final_state(run(named(config, "straight")).run))


def test_launchers_that_run_one_run_are_refused(tiny_config: RunConfig) -> None:
    jobs = [Job(config=tiny_config)]
    with pytest.raises(ConfigError, match="torchrun starts the processes of one run"):
        run_many(jobs, LaunchConfig(launcher="torchrun"))
    ray = LaunchConfig(launcher="ray")
    wide = replace(tiny_config, launch=ray, scale=ScaleConfig(num_workers=2))
    with pytest.raises(ConfigError, match="3 runs at once with scale.num_workers=2"):
        run_many([Job(config=wide)], ray, parallel=3)
    assert not Path(tiny_config.output).exists()


def test_nothing_to_do_starts_nothing() -> None:
    assert run_many([], LaunchConfig(launcher="ray")) == []


def test_local_addresses_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmu_config: RunConfig
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "output": "here",
        "data.url": "s3://bucket/archive",
        "transfer.teachers": ["a", "b"],
    }
    config = with_absolute_paths(with_overrides(tmu_config, settings))
    assert config.output == str(tmp_path / "here")
    assert config.data.url == "s3://bucket/archive"
    assert config.transfer.teachers == (str(tmp_path / "a"), str(tmp_path / "b"))
