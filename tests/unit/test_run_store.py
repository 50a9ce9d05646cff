"""A run folder in a store: the same numbers as on a disk, and never half a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.s3_servers import S3Server, moto
from tests.unit.test_training import Killed, assert_same, run, run_until
from tmu_dist import evaluate, predict
from tmu_dist.config import ConfigError, FaultConfig, RunConfig
from tmu_dist.data import storage
from tmu_dist.data.storage import StorageError
from tmu_dist.files import atomic_directory
from tmu_dist.folders import (
    Mirror,
    keep_folders,
    list_folders,
    local_folder,
    sweep_unfinished,
    write_folder,
)
from tmu_dist.run_folder import Event, RunResult, read_json, read_log
from tmu_dist.teachers.card import TeacherError
from tmu_dist.teachers.store import load_card, load_model, load_weights, locate
from tmu_dist.training import run_lock
from tmu_dist.training.checkpoint import ResumeError
from tmu_dist.training.launch import launch
from tmu_dist.training.run_lock import claim_run, lock_run
from tmu_dist.zoo import add_teacher, list_cards

MARK = "mark.json"
FILES = {"first": b"1", "second": b"2", MARK: b"3"}


@pytest.fixture(autouse=True)
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "_DEAD_AFTER_SECONDS", 1.5)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "_LOOK_SECONDS", 0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto() as running:
        running.make_bucket("bucket")
        yield running


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of its own in a store."""
    server.use(monkeypatch)
    return f"s3://bucket/{uuid4().hex}/run"


@pytest.fixture(params=["disk", "store"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "disk" else request.getfixturevalue("url")


def fail_at(
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    error: BaseException,
    when: Callable[[str], bool],
) -> None:
    """Let a function of the storage fail for the objects whose URL `when` picks."""
    real = getattr(storage, action)

    def failing(url: str, path: Any, *rest: Any) -> Any:
        paths = [path] if isinstance(path, str) else path
        if any(when(storage.join_url(url, p)) for p in paths):
            raise error
        return real(url, path, *rest)

    monkeypatch.setattr(storage, action, failing)


# Folders


def test_a_folder_is_whole_or_not_there(address: str) -> None:
    for name in ("b", "a"):
        write_folder(f"{address}/things/{name}", FILES)
    assert list_folders(address, "things", MARK) == ["things/a", "things/b"]
    assert list_folders(address, "others", MARK) == []
    assert list_folders(f"{address}/things", "", MARK) == ["a", "b"]
    keep_folders(address, "things", MARK, ["things/b"])
    assert list_folders(address, "things", MARK) == ["things/b"]
    assert storage.list_paths(address) == [f"things/b/{name}" for name in sorted(FILES)]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_whose_writer_was_killed_is_never_seen(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(f"{url}/things/a", FILES)
    for attempt in ("things/b", "things/a"):  # a new one, and one that replaces another
        with monkeypatch.context() as patch, pytest.raises(Killed):
            fail_at(patch, "write_bytes", Killed(), lambda full: full.endswith(f"/{name}"))
            write_folder(f"{url}/{attempt}", dict.fromkeys(FILES, b"new"))
        assert attempt not in list_folders(url, "things", MARK)
    keep_folders(url, "things", MARK, [])
    assert storage.list_paths(url) == []


def test_a_folder_whose_removal_was_cut_short_is_never_seen(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(f"{url}/things/a", FILES)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_at(patch, "delete_many", Killed(), lambda full: full.endswith("/first"))
        keep_folders(url, "things", MARK, [])
    assert list_folders(url, "things", MARK) == []
    keep_folders(url, "things", MARK, [])
    assert storage.list_paths(url) == []


def test_what_is_left_on_a_disk_is_not_listed_and_is_swept(tmp_path: Path) -> None:
    things = tmp_path / "things"
    write_folder(str(things / "whole"), FILES)
    for name in (".a.writing-1-0a", ".whole.retired-1-0a", ".lost.retired-1-0a"):
        (things / name).mkdir()
        (things / name / MARK).write_text("")
    (things / ".plot.writing-1-0a.png").write_text("")
    with atomic_directory(things / "own") as staging:
        (staging / MARK).write_text("")
        assert list_folders(str(tmp_path), "things", MARK) == ["things/whole"]
        keep_folders(str(tmp_path), "things", MARK, ["things/whole"])
        sweep_unfinished(str(tmp_path), "things", "lost")
        assert len(list(things.iterdir())) == 6 and (things / "lost").exists()
        sweep_unfinished(str(tmp_path), "things")
        # What this process writes stays; what was about to be replaced is back.
        assert {path.name for path in things.iterdir()} == {staging.name, "whole", "lost"}
    assert list_folders(str(tmp_path), "things", MARK) == [
        f"things/{name}" for name in ("lost", "own", "whole")
    ]
    sweep_unfinished(str(tmp_path), "nothing")


def test_nothing_changes_once_it_is_forbidden(address: str) -> None:
    """A process that is told so in the middle leaves the old folder, or one that is not seen."""
    write_folder(f"{address}/a", FILES)
    asked = []

    def forbid_the_last() -> None:
        asked.append(1)
        if address.startswith("/") or len(asked) == 1 + len(FILES):
            raise ResumeError("no")

    with pytest.raises(ResumeError, match="no"):
        write_folder(f"{address}/a", dict.fromkeys(FILES, b"new"), forbid_the_last)
    if address.startswith("/"):
        assert {n: storage.read_bytes(f"{address}/a", n) for n in FILES} == FILES
        assert [path.name for path in Path(address).iterdir()] == ["a"]
    else:
        assert list_folders(address, "", MARK) == []


def test_results_are_put_at_the_end_or_not_at_all(address: str) -> None:
    with local_folder(f"{address}/results") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.txt").write_text("1")
    assert storage.read_text(f"{address}/results", "a.txt") == "1"


def test_growing_files_are_put_when_they_changed(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tmu_dist.folders.PUBLISH_SECONDS", 0.02)
    puts: list[str] = []
    fail_at(monkeypatch, "write_bytes", Killed(), lambda full: bool(puts.append(full)))
    mirror = Mirror(url)
    (mirror.folder / "still").write_text("same")
    growing = mirror.folder / "growing"
    growing.write_text("a")
    mirror.start()
    with monkeypatch.context() as patch:
        fail_at(patch, "write_bytes", StorageError("gone"), lambda full: full.endswith("growing"))
        wait_until(lambda: "is not up to date: gone" in caplog.text)
    for text in ("ab", "abc"):
        growing.write_text(text)
        wait_until(lambda sought=text: published(url, "growing") == sought.encode())  # type: ignore[misc]
    growing.write_text("abcd")
    mirror.close()
    assert published(url, "growing") == b"abcd"
    assert puts.count(f"{url}/still") == 1
    assert not mirror.folder.exists()


def published(url: str, path: str) -> bytes | None:
    with suppress(StorageError):
        return storage.read_bytes(url, path)
    return None


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


# Leases


@pytest.fixture
def holder(url: str) -> Iterator[run_lock.RunLock]:
    lock = lock_run(url)
    yield lock
    lock.close()


def test_a_lease_that_moves_is_respected_until_it_is_given_back(
    url: str, holder: run_lock.RunLock
) -> None:
    with pytest.raises(ResumeError, match=rf"Process {os.getpid()} on .* is training in {url}"):
        lock_run(url, patience_seconds=0.3)
    holder.check()
    threading.Timer(0.2, holder.close).start()
    lock_run(url).close()


def fall_asleep(lock: run_lock.RunLock) -> None:
    """Let a holder's lease stand still, as that of a process that was stopped."""
    lease = lock._keeper  # type: ignore[attr-defined]
    lease._closed.set()
    lease._thread.join()


def test_a_lease_that_stands_still_is_taken_and_its_holder_learns_it(
    url: str, holder: run_lock.RunLock
) -> None:
    fall_asleep(holder)
    started = time.monotonic()
    next_one = lock_run(url)
    assert time.monotonic() - started > run_lock._DEAD_AFTER_SECONDS
    with pytest.raises(ResumeError, match=rf"Process {os.getpid()} on .* has taken over {url}"):
        holder.check()
    holder.close()
    next_one.check()  # who lost the lease does not give it back
    next_one.close()


def test_who_lost_the_lease_leaves_it_alone(url: str, holder: run_lock.RunLock) -> None:
    taken = take_over(url)
    time.sleep(5 * run_lock._BEAT_SECONDS)
    assert storage.read_text(url, "lease.json") == taken


def take_over(url: str) -> str:
    lease = storage.read_text(url, "lease.json").replace('"owner": "', '"owner": "another ')
    storage.write_bytes(url, "lease.json", lease.encode())
    return lease


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_DEAD_AFTER_SECONDS", 1000.0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: gone.pid)
        fall_asleep(lock_run(url))
    lock_run(url, patience_seconds=0.0).close()


def test_of_several_that_start_at_once_one_trains(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.5)
    start, locks, refused = threading.Barrier(5), [], []

    def try_it() -> None:
        start.wait()
        try:
            locks.append(lock_run(url, patience_seconds=1.0))
        except ResumeError as error:
            refused.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(locks), len(refused)) == (1, 4)
    locks[0].close()


# Training


def in_store(config: RunConfig, url: str) -> RunConfig:
    return replace(config, output=url)


def weights_of(run_folder: str) -> Any:
    newest = list_folders(run_folder, "checkpoints", "training.json")[-1]
    return load_weights(f"{run_folder}/{newest}")[1]


@pytest.mark.parametrize("stops", [[], [1], [3], [4, 6]])
def test_a_run_in_a_store_equals_one_on_a_disk(
    tmu_config: RunConfig, url: str, stops: list[int]
) -> None:
    local = run(tmu_config)
    config = in_store(tmu_config, url)
    for stop in stops:
        run_until(config, stop)
    result = run(config)
    assert facts(result) == facts(local)
    assert_same(weights_of(url), weights_of(local.run))
    assert_same(load_weights(url)[1], load_weights(local.run)[1])
    steps, losses = (
        [[e[key] for e in read_log(r) if e["event"] == "train"] for r in (url, local.run)]
        for key in ("step", "loss/total")
    )
    assert steps[0] == steps[1] == list(range(1, 8))
    assert losses[0] == losses[1]
    files = storage.list_paths(url)
    on_disk = storage.list_paths(local.run)
    # The local one has its lock, and any number of starts one file of TensorBoard each.
    assert without_tensorboard(files) - {"lease.json"} == without_tensorboard(on_disk) - {".lock"}
    assert len(files) - len(without_tensorboard(files)) == len(stops) + 1
    assert len(read_json(url, "run.json")["starts"]) == len(stops) + 1
    assert read_json(url, "result.json")["steps"] == 7


def facts(result: RunResult) -> RunResult:
    """What does not depend on where and how fast it ran."""
    return replace(result, run="", seconds=0, seconds_per_batch=0, measured_peak_bytes=None)


def without_tensorboard(paths: list[str]) -> set[str]:
    return {path for path in paths if not path.startswith("tensorboard/")}


@pytest.mark.parametrize(
    "file", ["weights.safetensors", "card.json", "state.pt", "config.json", "training.json"]
)
def test_killed_while_it_writes_a_checkpoint(
    tiny_config: RunConfig, url: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_store(tiny_config, url)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_at(patch, "write_bytes", Killed(), lambda u: u.endswith(f"step-00000004/{file}"))
        run(config)
    assert list_folders(url, "checkpoints", "training.json") == ["checkpoints/step-00000002"]
    seen: list[Event] = []
    assert run(config, seen.append).steps == 7
    assert [e["step"] for e in seen if e["event"] == "resume"] == [2]
    assert_same(weights_of(url), weights_of(run(tiny_config).run))


def out_of_reach(patch: pytest.MonkeyPatch, url: str, *endings: str) -> None:
    """Let what ends so not be written."""
    for ending in endings:
        gone = StorageError(f"Could not write {url}/{ending}: timeout")
        fail_at(patch, "write_bytes", gone, lambda u, ending=ending: u.endswith(ending))  # type: ignore[misc]


def test_an_outage_is_told_and_outlived(
    tiny_config: RunConfig, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_store(tiny_config, url)
    with monkeypatch.context() as patch:
        out_of_reach(patch, url, "step-00000004/state.pt", "models/step-00000003/card.json")
        run_until(config, 6)
    # The weights of step 3 could not be offered, so a checkpoint that refers to them is not there.
    assert list_folders(url, "checkpoints", "training.json") == ["checkpoints/step-00000002"]
    assert not storage.exists(url, "selected.json")
    assert run(config).steps == 7
    assert_same(weights_of(url), weights_of(run(tiny_config).run))

    other = in_store(tiny_config, f"{url}-other")
    with monkeypatch.context() as patch:
        out_of_reach(patch, other.output, "step-00000004/state.pt")
        assert run(other).steps == 7
    (failure,) = [e for e in read_log(other.output) if e["event"] == "checkpoint_failed"]
    assert "state.pt: timeout" in failure["reason"]
    assert failure["reason"].endswith("The checkpoint of step 4 was not written.")
    assert list_folders(other.output, "checkpoints", "training.json") == [
        "checkpoints/step-00000006",
        "checkpoints/step-00000007",
    ]
    assert_same(weights_of(other.output), weights_of(tiny_config.output))


def test_an_outage_that_lasts_names_the_object_and_what_remains(
    tiny_config: RunConfig, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(in_store(tiny_config, url), faults=FaultConfig(max_failed_checkpoints=0))
    with monkeypatch.context() as patch:
        out_of_reach(patch, url, "step-00000004/state.pt")
        with pytest.raises(
            StorageError, match=r"state\.pt: timeout .*max_failed_checkpoints=0.* are whole"
        ):
            run(config)
    assert list_folders(url, "checkpoints", "training.json") == ["checkpoints/step-00000002"]
    assert run(config).steps == 7


def test_what_cannot_be_deleted_does_not_stop_a_run(
    tiny_config: RunConfig,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = in_store(tiny_config, url)
    with monkeypatch.context() as patch:
        for action in ("delete", "delete_many"):
            fail_at(patch, action, StorageError("forbidden"), lambda u: True)
        assert run(config).steps == 7
    assert "stay for now: forbidden" in caplog.text
    assert len(list_folders(url, "checkpoints", "training.json")) == 4
    run(replace(config, training=replace(config.training, num_steps=8)))
    assert len(list_folders(url, "checkpoints", "training.json")) == 2


@pytest.mark.parametrize("file", ["state.pt", "config.json", "weights.safetensors"])
def test_a_damaged_checkpoint_is_named(tiny_config: RunConfig, url: str, file: str) -> None:
    config = in_store(tiny_config, url)
    run_until(config, 3)
    folder = f"{url}/checkpoints/step-00000002"
    content = storage.read_bytes(folder, file)
    storage.write_bytes(folder, file, content[: len(content) // 2])
    with pytest.raises((ResumeError, TeacherError), match=rf"step-00000002/{file} is damaged"):
        run(config)
    storage.delete(folder, file)
    with pytest.raises((ResumeError, TeacherError), match=rf"{file}"):
        run(config)


def test_whole_weights_of_another_checkpoint_are_damage(tiny_config: RunConfig, url: str) -> None:
    """What two processes that write one checkpoint at once could leave."""
    config = in_store(tiny_config, url)
    run(config)
    older, newer = (f"{url}/checkpoints/step-0000000{step}" for step in (6, 7))
    for file in ("weights.safetensors", "card.json"):
        storage.write_bytes(newer, file, storage.read_bytes(older, file))
    with pytest.raises(ResumeError, match=r"weights\.safetensors is damaged"):
        run(config)


def test_two_runs_in_one_folder(tiny_config: RunConfig, url: str) -> None:
    config = in_store(tiny_config, url)
    refusals = []

    def start_another(event: Event) -> None:
        if event["event"] == "validation" and not refusals:
            with pytest.raises(ResumeError, match="is training in") as refusal:
                lock_run(url, patience_seconds=0.2)
            refusals.append(refusal)

    assert run(config, start_another).steps == 7
    assert refusals and run(config).steps == 7


def test_who_lost_the_run_writes_no_more_of_it(
    tiny_config: RunConfig, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An object that was already on its way when the run was lost may still arrive.
    monkeypatch.setattr("tmu_dist.folders.PUBLISH_SECONDS", 600.0)
    config = in_store(tiny_config, url)
    others = {"log.jsonl": b"another log", "selected.json": b"another choice"}
    written = [f"checkpoints/step-0000000{n}" for n in (2, 4)]

    def checkpoints() -> list[str]:
        return list_folders(url, "checkpoints", "training.json")

    def lose(event: Event) -> None:
        if event["event"] == "train" and event["step"] == 5:
            wait_until(lambda: checkpoints() == written, seconds=60.0)
            claim_run(url)
            for name, content in others.items():
                storage.write_bytes(url, name, content)

    with pytest.raises(ResumeError, match="has taken over"):
        run(config, lose)
    assert checkpoints() == written
    assert {name: storage.read_bytes(url, name) for name in others} == others
    assert not storage.exists(url, "result.json")


def test_where_a_run_folder_cannot_be(tiny_config: RunConfig) -> None:
    for url in ("https://host/run", "memory://run"):
        with pytest.raises(ConfigError, match="a store that can be written"):
            launch(in_store(tiny_config, url))
    with pytest.raises(StorageError, match="the scheme must be one of"):
        launch(in_store(tiny_config, "ftp://host/run"))


# Runs in stores as models


@pytest.fixture
def stored_run(tiny_config: RunConfig, url: str) -> str:
    return launch(in_store(tiny_config, url)).run


def test_a_stored_run_teaches_and_is_finetuned(tiny_config: RunConfig, stored_run: str) -> None:
    for method in ("tmu", "finetune"):
        transfer = replace(tiny_config.transfer, method=method, teachers=(stored_run,))  # type: ignore[arg-type]
        config = replace(tiny_config, output=f"{tiny_config.output}-{method}", transfer=transfer)
        assert load_card(launch(config).run).teachers == ("run",)


def test_a_stored_run_goes_to_a_stored_zoo(stored_run: str, url: str, tmp_path: Path) -> None:
    for zoo in (f"{url}-zoo", str(tmp_path / "zoo")):
        folder = add_teacher(stored_run, zoo, name="first")
        assert [card.name for card in list_cards(zoo)] == ["first"]
        assert_same(load_weights(folder)[1], load_weights(stored_run)[1])
        with pytest.raises(TeacherError, match="already has"):
            add_teacher(stored_run, zoo, name="first")
    checkpoint = f"{stored_run}/checkpoints/step-00000006"
    assert locate(checkpoint + "/") == checkpoint
    assert load_model(checkpoint).card.step == 6
    with pytest.raises(TeacherError, match=r"neither card.json .* nor selected.json"):
        load_card(f"{url}/nothing")


def test_a_stored_run_is_evaluated_where_it_lies(stored_run: str, archive_url: str) -> None:
    evaluate.main([stored_run, "--data", archive_url])
    predict.main([stored_run, "--data", archive_url, "--samples", "0"])
    written = set(storage.list_paths(stored_run))
    assert {
        "evaluation-test/evaluation.json",
        "evaluation-test/per_sequence.npz",
        "evaluation-test/lead_time_ssim.png",
        "pictures-test/test-000000.gif",
    } <= written
