"""What each rank says is found in the run folder, and keeping it disturbs nothing."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tmu_dist import folders
from tmu_dist.collectives import Ranks
from tmu_dist.config import RunConfig
from tmu_dist.data import storage
from tmu_dist.run_folder import newest_logs
from tmu_dist.training import loop
from tmu_dist.training.launch import launch
from tmu_dist.training.rank_log import rank_log
from tmu_dist.training.stopping import RunStoppedError
from tmu_dist.transfer.base import DeadDistillationError

RANKS = Ranks(rank=3, world_size=8)
OURS = logging.getLogger("tmu_dist.somewhere")


def said(run: str) -> str:
    (path,) = newest_logs(run)
    return storage.read_text(run, path)


@pytest.fixture(params=["disk", "store"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "disk" else request.getfixturevalue("bucket")


def test_a_rank_s_file_says_where_it_is_what_it_said_and_how_it_ended(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tmu_dist")
    with (
        pytest.raises(KeyError, match="planted"),
        rank_log(run, RANKS, "Ray's own log of it is /tmp/ray/w.err there"),
    ):
        OURS.info("ours at info")
        logging.getLogger("other").warning("others at warning")
        logging.getLogger("other").info("others at info")
        OURS.debug("ours at debug")
        raise KeyError("planted")
    OURS.warning("after it")
    first, *rest = said(run).splitlines()
    assert f"rank 3 of 8 on {platform.node()} (" in first and f"process {os.getpid()}" in first
    assert first.endswith("; Ray's own log of it is /tmp/ray/w.err there")
    text = "\n".join(rest)
    assert "INFO tmu_dist.somewhere: ours at info" in text
    assert "WARNING other: others at warning" in text
    assert "others at info" not in text and "ours at debug" not in text and "after" not in text
    assert "Traceback" in text and rest[-1] == "KeyError: 'planted'"
    (path,) = newest_logs(run)
    assert path.startswith("logs/rank-0003/20") and path.endswith("Z.txt")


def test_a_run_that_was_asked_to_stop_has_no_trace(tmp_path: Path) -> None:
    with pytest.raises(RunStoppedError), rank_log(str(tmp_path), RANKS):
        raise RunStoppedError("asked to")
    assert said(str(tmp_path)).splitlines()[1:][-1].endswith("INFO rank: asked to")
    assert "Traceback" not in said(str(tmp_path))


def test_a_file_in_a_store_is_there_while_the_rank_runs(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PUBLISH_SECONDS", 0.05)
    with rank_log(bucket, RANKS):
        OURS.warning("still running")
        deadline = time.monotonic() + 60
        while not newest_logs(bucket) or "still running" not in said(bucket):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_each_start_is_a_file_and_the_last_few_stay(run: str) -> None:
    for second in range(9):
        storage.write_bytes(run, f"logs/rank-0003/20200101T00000{second}Z.txt", b"old\n")
    storage.write_bytes(run, "logs/rank-0004/20200101T000000Z.txt", b"another rank\n")
    with rank_log(run, RANKS):
        pass
    kept = [path[-8:-4] for path in storage.list_paths(run, "logs/rank-0003")]
    assert kept[:4] == ["005Z", "006Z", "007Z", "008Z"] and len(kept) == 5
    assert storage.exists(run, "logs/rank-0004/20200101T000000Z.txt")
    assert len(newest_logs(run)) == 2


def test_warnings_are_still_shown_where_nobody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with rank_log(str(tmp_path), RANKS):
        OURS.warning("a warning")
    assert capsys.readouterr().err == "a warning\n"
    assert logging.getLogger().handlers == []


def no_folder(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "run")


def no_store(tmp_path: Path) -> str:
    return "s3://no-such-bucket/run"


@pytest.mark.parametrize("place", [no_folder, no_store])
@pytest.mark.usefixtures("bucket")
def test_a_place_that_cannot_be_written_hides_nothing(
    place: Callable[[Path], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError) as raised, rank_log(place(tmp_path), RANKS):
        1 / 0  # noqa: B018
    assert raised.value.__context__ is None
    assert place(tmp_path) in caplog.text


def test_every_run_has_them(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(tiny_config, training=replace(tiny_config.training, num_steps=1))
    launch(short)
    assert "rank 0 of 1" in said(short.output) and said(short.output).endswith("ended well\n")

    def die(run: loop.Run) -> None:
        raise DeadDistillationError("nothing is taught")

    monkeypatch.setattr(loop.Run, "validate", die)
    failing = replace(short, output=f"{short.output}-failing")
    with pytest.raises(DeadDistillationError):
        launch(failing)
    assert said(failing.output).endswith("DeadDistillationError: nothing is taught\n")
