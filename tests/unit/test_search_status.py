"""What a search's status says is what its folder holds, and looking at it changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.s3_servers import moto
from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.data.storage import changed_at, join_url
from tmu_dist.folders import write_text
from tmu_dist.training import run_lock
from tmu_dist.training.run_lock import holder, lock_run
from tuning.journal import Journal
from tuning.plan import Search, SearchConfig, save_search
from tuning.space import Axis, Space
from tuning.status import Status, read_status, status, terminal_status

RATE = "training.learning_rate"
THIS = f"Process {os.getpid()} on "


@pytest.fixture(autouse=True)
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "_DEAD_AFTER_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "_LOOK_SECONDS", 0.02)


@pytest.fixture(params=["disk", "store"])
def address(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "search")
        return
    with moto() as server:
        server.use(monkeypatch)
        server.make_bucket("bucket")
        yield "s3://bucket/search"


def searched(base: RunConfig, folder: str, **options: Any) -> Search:
    """A grid of four points with two seeds."""
    axis = Axis(name=RATE, values=(0.001, 0.002, 0.003, 0.004))
    return Search(
        folder=folder,
        recipe="digits-tmu",
        command="python tuning/search.py --out it",
        base=base,
        space=Space(name="test", axes=(axis,)),
        options=SearchConfig(**{"seeds": (0, 1), **options}),
    )


def trial(
    search: Search, point: int, seed: int, state: str, *reports: tuple[int, float, float]
) -> None:
    """Add a trial whose run has validated: step, error and seconds of each time."""
    journal = Journal(search.folder)
    added = journal.add(point, {RATE: (point + 1) / 1000}, seed)
    journal.note(added.number, state=state)
    stage = search.stages(added.number, added.point, seed)[0]
    events = [
        {"event": "validation", "step": step, "mse_per_frame": error, "seconds": seconds}
        for step, error, seconds in reports
    ]
    if reports:
        events.append({"event": "train", "step": reports[-1][0] + 1})
        text = "".join(json.dumps(event) + "\n" for event in events)
        write_text(stage.config.output, "log.jsonl", text)


@pytest.fixture
def search(tiny_config: RunConfig, tmp_path: Path) -> Search:
    """Two of four points are over but for one trial that runs and one that has not begun."""
    made = searched(tiny_config, str(tmp_path / "search"))
    trial(made, 0, 0, "finished", (3, 9.0, 4.0), (7, 8.0, 10.0))
    trial(made, 0, 1, "finished", (3, 7.0, 4.0), (7, 6.0, 14.0))
    trial(made, 1, 0, "stopped", (3, 20.0, 6.0))
    trial(made, 1, 1, "failed")
    trial(made, 2, 0, "open", (3, 5.5, 3.0))
    trial(made, 2, 1, "open")
    save_search(made)
    return made


def text_of(found: Status) -> str:
    console = Console(width=120, record=True, file=StringIO())
    console.print(terminal_status(found))
    return "\n".join(line.rstrip() for line in console.export_text().split("\n"))


def test_a_running_search(search: Search) -> None:
    lock = lock_run(search.folder)
    before = {path: path.stat().st_mtime_ns for path in Path(search.folder).rglob("*")}
    found = read_status(search)
    after = {path: path.stat().st_mtime_ns for path in Path(search.folder).rglob("*")}
    lock.close()
    assert after == before
    assert found.driver is not None and found.driver.startswith(THIS)
    assert found.counts == {"finished": 2, "stopped": 1, "failed": 1, "open": 2}
    assert found.to_come == 2
    running, waiting = found.open_trials
    assert (running.number, running.label, running.seed) == (4, "learning_rate=0.003", 0)
    assert (running.step, running.num_steps, running.error) == (4, 7, 5.5)
    assert running.silent_seconds is not None and running.silent_seconds < 60
    assert (waiting.step, waiting.error, waiting.silent_seconds) == (None, None, None)
    assert found.best is not None and found.best.error is not None
    assert (found.best.label, found.best.error.mean) == ("learning_rate=0.001", 7.0)
    # Trials took 10, 14 and 6 s; of the open ones one has had 3; two are to come; one runs.
    assert found.seconds_left == pytest.approx(10.0 + 7.0 + 2 * 10.0)


def test_a_dead_search(search: Search) -> None:
    log = Path(search.folder, "trials/0004/log.jsonl")
    os.utime(log, (time.time() - 1000, time.time() - 1000))
    found = read_status(search)
    assert found.driver is None and found.seconds_left is None
    assert found.open_trials[0].silent_seconds == pytest.approx(1000, abs=60)
    assert found.open_trials[0].is_stale and not found.open_trials[1].is_stale
    assert text_of(found).startswith(
        f"search ({search.folder})\n"
        "Nobody runs it. To continue: python tuning/search.py --out it\n"
        "Trials: 2 finished, 1 stopped early, 1 failed, 2 open, 2 to come.\n"
        "\n"
        "trial  settings             seed    step  mse_per_frame  last heard of\n"
        "    4  learning_rate=0.003     0  4 of 7            5.5  17 min ago\n"
        "    5  learning_rate=0.003     1  0 of 7                 not begun\n"
        "\n"
        "Best so far: learning_rate=0.001, validation mse_per_frame 7 ± 1.41 over 2 seeds.\n"
    )


def test_the_command_prints_it(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    log = Path(search.folder, "trials/0004/log.jsonl")
    os.utime(log, (time.time() - 400, time.time() - 400))
    lock = lock_run(search.folder)
    status(search.folder)
    lock.close()
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{THIS}" in shown and "runs it." in shown
    assert "4 of 7 5.5 7 min ago: stale" in shown
    assert "About 37 s left, if further trials take as long" in shown
    with pytest.raises(ConfigError, match=r"holds no search.json"):
        status(f"{search.folder}/trials")


def test_before_anything_is_known_and_when_all_is_over(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    search = searched(tiny_config, str(tmp_path / "new"), seeds=(0,))
    found = read_status(search)
    assert (found.to_come, found.best, found.open_trials) == (4, None, ())
    assert "Nobody runs it" in text_of(found) and "No point is whole yet" in text_of(found)
    for point in range(4):
        trial(search, point, 0, "finished", (7, 4.0 - point, 1.0))
    found = read_status(search)
    assert found.to_come == 0 and "It is over." in text_of(found)
    assert "Best so far: learning_rate=0.004, validation mse_per_frame 1.\n" in text_of(found)


def test_numbers_of_trials(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Seeds of an earlier start that are no longer asked for count for nothing."""
    random = searched(
        tiny_config, str(tmp_path / "random"), sampler="random", num_samples=3, seeds=(1, 2)
    )
    for seed in (0, 1):
        trial(random, 0, seed, "finished", (7, 1.0, 1.0))
    assert read_status(random).to_come == 5


def test_trials_on_growing_data(tiny_config: RunConfig, tmp_path: Path) -> None:
    search = searched(
        tiny_config,
        str(tmp_path / "search"),
        seeds=(0,),
        scheduler="asha",
        fidelity="fraction",
        fractions=(0.5, 1.0),
    )
    trial(search, 0, 0, "open", (3, 5.0, 1.0))
    (found,) = read_status(search).open_trials
    assert (found.fraction, found.step, found.num_steps) == (0.5, 4, 4)
    assert "seed  fraction    step" in text_of(read_status(search))


def test_a_search_in_a_store(tiny_config: RunConfig, address: str) -> None:
    search = searched(tiny_config, address)
    trial(search, 0, 0, "open", (3, 5.5, 3.0))
    started = time.time()
    lock = lock_run(search.folder)
    found = read_status(search)
    lock.close()
    assert found.driver is not None and found.driver.startswith(THIS)
    assert (found.open_trials[0].step, found.open_trials[0].error) == (4, 5.5)
    changed = changed_at(join_url(address, "trials/0000"), "log.jsonl")
    assert started - 60 < changed < time.time() + 60
    assert read_status(search).driver is None


HOLD = """
import sys
from tmu_dist.training import run_lock
run_lock._SETTLE_SECONDS = 0.02
run_lock._BEAT_SECONDS = 0.05
lock = run_lock.lock_run(sys.argv[1])
print("holds", flush=True)
sys.stdin.read()
"""


def test_who_holds_a_folder(address: str) -> None:
    """Nobody; another process; nobody, after it was killed; and looking takes nothing away."""
    assert holder(address) is None
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"holds\n"
        name = holder(address)
        assert name is not None and name.startswith(f"Process {process.pid} on ")
        assert holder(address) == name
        process.send_signal(signal.SIGKILL)
    assert holder(address) is None
    lock_run(address, patience_seconds=0.0).close()


def test_a_lease_of_another_machine_is_dead_when_it_stands_still() -> None:
    lease = {"owner": "1", "host": "far", "pid": 3, "pid_space": "other", "beat": 0}
    for is_free in (True, False):
        write_text("memory://far", "lease.json", json.dumps({**lease, "is_free": is_free}))
        started = time.monotonic()
        assert holder("memory://far") is None
        waited = time.monotonic() - started
        assert is_free or waited > run_lock._DEAD_AFTER_SECONDS
