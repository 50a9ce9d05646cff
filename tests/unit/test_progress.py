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


def test_what_happens_now_and_then_is_one_line_each(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, resume_step=0, listener=ProgressDisplay("run", 9, stream))
    log.write("placement", 0, kind="placed", holders=[1], resident_bytes=[0, 3 * 2**20])
    log.write("placement", 0, kind="replicated", holders=[], resident_bytes=[2**20])
    log.write("resume", 4, world_size=3)
    log.write("checkpoint_failed", 6, reason="No space left. The one of step 4 was not written.")
    log.write("stop", 7, reason="SIGTERM")
    log.write("unheard-of", 8)
    log.close()
    assert stream.getvalue().splitlines() == [
        "run: teachers are placed: at most 3 MiB of weights a rank in a group of 2",
        "run: teachers are replicated: at most 1 MiB of weights a rank",
        "run: continues at step 4 with 3 ranks",
        "run: step 6: No space left. The one of step 4 was not written.",
        "run: step 7: asked to stop (SIGTERM)",
    ]


def test_many_teachers_fit_on_a_line() -> None:
    stream = io.StringIO()
    gates = [[0.25, 0.5], [0.1 * number for number in range(9)]]
    norms = {"teaching_gradient_norm": 1.0, "prediction_gradient_norm": 2.0}
    ProgressDisplay("run", 9, stream)({"event": "liveness", "step": 3, "gate_means": gates} | norms)
    assert stream.getvalue().endswith(", gates [0.25 0.50; 0.00 to 0.80]\n")
