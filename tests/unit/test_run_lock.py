"""One start after the other writes a run: whoever came before it cannot any more."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.unit.test_training import CPU
from tmu_dist.collectives import Collectives
from tmu_dist.config import RunConfig
from tmu_dist.files import WriteError
from tmu_dist.folders import list_folders
from tmu_dist.run_folder import read_log
from tmu_dist.training import run_lock
from tmu_dist.training.checkpoint import ResumeError
from tmu_dist.training.loop import Run
from tmu_dist.training.run_lock import claim_run, lock_run
from tmu_dist.training.run_log import RunLog


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_LOOK_SECONDS", 0.02)


def test_the_newest_claim_counts(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    launcher = lock_run(folder)
    launcher.check()
    first, second = claim_run(folder), claim_run(folder)
    second.check()
    for lost in (launcher, first):
        with pytest.raises(ResumeError, match=rf"^Process {os.getpid()} on {platform.node()} has"):
            lost.check()
    for each in (second, first):
        each.close()
    second.check()  # the token stays, the launcher's lock too
    with pytest.raises(ResumeError, match="is training in"):
        lock_run(folder, patience_seconds=0.0)
    launcher.close()
    lock_run(folder, patience_seconds=0.0).close()
    (tmp_path / "run" / "owner.json").unlink()
    with pytest.raises(ResumeError, match="no longer there"):
        second.check()


def test_who_waits_says_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The holder is another process, which ends by being killed."""
    code = (
        "import sys; from tmu_dist.training.run_lock import lock_run; lock = lock_run(sys.argv[1]);"
        "print('holds', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"holds\n"
        name = rf"Process {holder.pid} on {platform.node()}"
        with pytest.raises(ResumeError, match=f"{name} is training in"):
            lock_run(str(tmp_path), patience_seconds=0.1)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            threading.Timer(0.2, holder.kill).start()
            lock = lock_run(str(tmp_path), patience_seconds=30.0)
    assert [message for message in caplog.messages if "waiting" in message] == [
        f"{name} holds {tmp_path}: waiting up to 30 s for it to end"
    ]
    lock.check()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.close()


def test_a_cut_off_worker_group_cannot_write_over_the_new_one(tiny_config: RunConfig) -> None:
    """Two groups of one launcher: the first goes on while the second has taken over."""
    device = CPU
    launcher = lock_run(tiny_config.output)
    zombie = Run(tiny_config, Collectives(), device)
    zombie.start(is_locked=True)
    steps = iter(zombie.batches())
    for _ in range(2):
        zombie.advance(*next(steps))
    zombie.save()
    zombie.writer.finish()

    group = Run(tiny_config, Collectives(), device)
    group.start(is_locked=True)
    assert group.progress.step == 2
    zombie.advance(*next(steps))
    with pytest.raises(ResumeError, match="has taken over"):
        zombie.validate()
        zombie.save()
        zombie.finish()
    zombie.close()
    for batch in group.batches():
        group.advance(*batch)
    group.validate()
    group.save()
    group.finish()
    group.close()
    launcher.close()

    assert list_folders(tiny_config.output, "checkpoints", "training.json") == [
        "checkpoints/step-00000002",
        "checkpoints/step-00000007",
    ]
    assert list_folders(tiny_config.output, "models", "card.json") == ["models/step-00000007"]
    log = [(e["event"], e["step"]) for e in read_log(tiny_config.output)]
    assert [step for event, step in log if event == "train"] == list(range(1, 8))
    assert [step for event, step in log if event == "validation"] == [7]


def test_lines_that_a_full_disk_refused_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path, resume_step=0)
    real = log._file

    class Full:
        name = real.name

        def __init__(self) -> None:
            self.room = 30

        def write(self, content: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            taken = real.write(content[: self.room])
            self.room -= taken or 0
            return taken or 0

        def fileno(self) -> int:
            return real.fileno()

    log.write("one", 1)
    monkeypatch.setattr(log, "_file", Full())
    for step in (2, 3):
        log.write("more", step)
    with pytest.raises(WriteError, match=r"log\.jsonl: No space left"):
        log.flush()
    monkeypatch.setattr(log, "_file", real)
    log.flush()
    assert [(e["event"], e["step"]) for e in read_log(tmp_path)] == [
        ("one", 1),
        ("more", 2),
        ("more", 3),
    ]
    log.close()
