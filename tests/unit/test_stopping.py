"""Whatever asks a run to stop or to save is heard once, by all ranks after the same step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_ranks import spawn
from tests.unit.test_training import CPU, assert_same, final_state, run
from tmu_dist.collectives import Collectives
from tmu_dist.config import RunConfig
from tmu_dist.data import storage
from tmu_dist.data.storage import StorageError
from tmu_dist.run_folder import Event, read_log
from tmu_dist.training import stopping
from tmu_dist.training.loop import train
from tmu_dist.training.stopping import STOP_FILE, Request, Requests, RunStoppedError


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def requests_of(tmp_path: Path) -> Iterator[Callable[..., Requests]]:
    made: list[Requests] = []

    def make(notice: Callable[[], str | None] | None = None) -> Requests:
        made.append(Requests(str(tmp_path), Collectives(), notice))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_signals_are_heard_once_and_given_back(requests_of: Callable[..., Requests]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    requests = requests_of()
    assert requests.heard() is None
    for _ in range(3):
        send(signal.SIGUSR1)
    assert requests.heard() == Request("save", "SIGUSR1")
    assert requests.heard() is None
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    send(signal.SIGTERM)  # as a launcher passes it on
    assert requests.heard() == Request("stop", "SIGTERM")
    assert requests.heard() is None
    requests.close()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_notice_asks_for_one_checkpoint(requests_of: Callable[..., Requests]) -> None:
    said = iter([None, "node 1 drains", "node 1 drains", None, "node 1 drains", "node 2 drains"])
    requests = requests_of(lambda: next(said))
    heard = [requests.heard() for _ in range(6)]
    expected = {1: Request("save", "node 1 drains"), 5: Request("save", "node 2 drains")}
    assert heard == [expected.get(step) for step in range(6)]


def wait_for(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def test_the_stop_file_is_found_and_an_old_one_removed(
    requests_of: Callable[..., Requests], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LOOK_SECONDS", 0.01)
    file = tmp_path / STOP_FILE
    file.write_text("")
    looked, real = [], stopping.exists

    def look(url: str, path: str) -> bool:
        looked.append(path)
        if len(looked) in (3, 4):
            raise StorageError("out of reach")
        return real(url, path)

    monkeypatch.setattr(stopping, "exists", look)
    requests = requests_of()
    assert not file.exists()
    wait_for(lambda: len(looked) > 5)
    assert requests.heard() is None
    file.write_text("")
    assert wait_for(requests.heard) == Request("stop", str(file))


def test_outside_the_main_thread_signals_stay_as_they_are(
    requests_of: Callable[..., Requests],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=requests_of)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_sigterm_ends_the_process(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from tmu_dist.collectives import Collectives
from tmu_dist.training import stopping
stopping._SAME_SECONDS = 0.0
requests = stopping.Requests(sys.argv[1], Collectives())
for _ in range(2):
    print("alive", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == b"alive\nalive\n", done.stderr


# Several ranks


def _listen(collectives: Collectives, folder: Path) -> None:
    rank = collectives.ranks.rank
    notices = ([None] * 6 + ["drains"] * 4, [None] * 7 + ["drains"] * 3)[rank]
    signals = {(1, 1): signal.SIGUSR1, (0, 2): signal.SIGUSR1, (1, 10): signal.SIGTERM}
    marker, step = folder / "has-returned", 0
    heard = []
    with closing(Requests(str(folder), collectives, lambda: (notices + [None] * 9)[step])) as asked:
        for step in range(14):
            if (rank, step) in signals:
                send(signals[rank, step])
            if (rank, step) == (1, 0):
                wait_for(marker.exists)  # rank 0 does not wait for this one's call
            request = asked.heard()
            if (rank, step) == (0, 0):
                marker.write_text("")
            heard.append(request and [request.kind, request.reason])
    (folder / f"{rank}.json").write_text(json.dumps(heard))


@pytest.mark.distributed
def test_ranks_hear_the_same_after_the_same_step(tmp_path: Path) -> None:
    spawn(2, _listen, tmp_path)
    expected: list[list[str] | None] = [None] * 14
    expected[2] = ["save", "SIGUSR1"]  # rank 1's of step 1; rank 0's came before that checkpoint
    expected[7] = ["save", "drains"]  # on one rank from step 6, on the other from step 7
    expected[11] = ["stop", "SIGTERM"]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def _train_until_stopped(collectives: Collectives, config: RunConfig) -> None:
    def stop(event: Event) -> None:
        if event["event"] == "train" and event["step"] == 2:
            send(signal.SIGTERM)

    with pytest.raises(RunStoppedError, match=r"after step 3 of 7 \(SIGTERM\)"):
        train(config, collectives, CPU, listener=stop)


@pytest.mark.distributed
def test_two_ranks_stop_together_and_one_continues(tiny_config: RunConfig) -> None:
    spawn(2, _train_until_stopped, tiny_config)
    assert run(tiny_config).steps == 7
    straight = run(replace(tiny_config, output=tiny_config.output + "-straight"))
    continued = final_state(tiny_config.output)["weights"]
    for name, value in final_state(straight.run)["weights"].items():
        assert (continued[name] - value).abs().max() < 1e-4, name


# Runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_is_stopped_or_saved_by_a_signal(tiny_config: RunConfig, number: int) -> None:
    config = replace(
        tiny_config,
        schedule=replace(tiny_config.schedule, checkpoint_every=100, keep_checkpoints=9),
    )

    def ask(event: Event) -> None:
        if event["event"] == "train" and event["step"] == 3:
            send(number)

    checkpoints = Path(config.output, "checkpoints")
    if number == signal.SIGTERM:
        with pytest.raises(RunStoppedError, match=r"after step 3 of 7 \(SIGTERM\).* continues"):
            run(config, ask)
        assert [path.name for path in checkpoints.iterdir()] == ["step-00000003"]
        assert [e["reason"] for e in read_log(config.output) if e["event"] == "stop"] == ["SIGTERM"]
        assert RunStoppedError.exit_code == 128 + signal.SIGTERM
        run(config)
    else:
        run(config, ask)
        assert "stop" not in {event["event"] for event in read_log(config.output)}
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000003", "step-00000007"}
    straight = run(replace(config, output=config.output + "-straight"))
    assert_same(final_state(config.output), final_state(straight.run))


def test_a_stop_file_ends_a_run_once(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LOOK_SECONDS", 0.01)
    config = replace(tiny_config, training=replace(tiny_config.training, num_steps=10_000))

    def ask(event: Event) -> None:
        if event["event"] == "train" and event["step"] == 2:
            storage.write_bytes(config.output, STOP_FILE, b"")

    with pytest.raises(RunStoppedError, match="run/stop"):
        run(config, ask)
    steps = read_log(config.output)[-1]["step"]
    longer = replace(config, training=replace(config.training, num_steps=steps + 2))
    assert run(longer).steps == steps + 2
