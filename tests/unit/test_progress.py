"""Progress is shown from the log, also across a restart that cuts the log back."""

from __future__ import annotations

import io
import json
from pathlib import Path

from tmu_dist.run_folder import read_log
from tmu_dist.training.progress import LogFollower, ProgressDisplay
from tmu_dist.training.run_log import RunLog


def numbers(speed: float) -> dict[str, float]:
    return {"loss/total": 0.5, "samples_per_second": speed, "data_wait_fraction": 0.1}


def shown(stream: io.StringIO) -> list[int]:
    return [int(line.split("step ")[1].split("/")[0]) for line in stream.getvalue().splitlines()]


def test_follower_shows_every_line_once_across_a_restart(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = ProgressDisplay("run", 9, stream)
    follower = LogFollower(tmp_path, display)
    log = RunLog(tmp_path, resume_step=0)
    for step in range(1, 6):
        log.write("train", step, **numbers(speed=10.0))
        display._last_line = -1e9  # show every line, not one in ten seconds
        follower._show_new()
    log.close()
    log = RunLog(tmp_path, resume_step=3)
    for step in range(4, 10):
        log.write("train", step, **numbers(speed=11.0))
        display._last_line = -1e9
        follower._show_new()
    log.close()
    assert shown(stream) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]
    assert [event["step"] for event in read_log(tmp_path)] == list(range(1, 10))


def test_half_written_line_waits(tmp_path: Path) -> None:
    stream = io.StringIO()
    follower = LogFollower(tmp_path, ProgressDisplay("run", 9, stream))
    line = json.dumps({"event": "resume", "step": 4}) + "\n"
    file = tmp_path / "log.jsonl"
    file.write_text(line[:10])
    follower._show_new()
    assert stream.getvalue() == "" and read_log(tmp_path) == []
    file.write_text(line)
    follower._show_new()
    assert stream.getvalue() == "run: continues at step 4\n"
