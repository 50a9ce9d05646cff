"""Snapshots are written beside training: in order, whole, as they were taken, or told of."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.test_training import Killed, assert_same, final_state, run, run_until
from tmu_dist.config import FaultConfig, RunConfig, ScheduleConfig
from tmu_dist.data.storage import StorageError
from tmu_dist.files import WriteError
from tmu_dist.folders import list_folders
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.run_folder import SELECTED_FILE, Event, read_json, read_log
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import load_card, load_weights
from tmu_dist.training import checkpoint
from tmu_dist.training.checkpoint import CheckpointStore, Progress, ResumeError
from tmu_dist.training.checkpoint_writer import CheckpointWriter


class Student:
    """A run whose weights, optimiser and progress all hold the number of its step."""

    def __init__(self, config: RunConfig, card: TeacherCard) -> None:
        self.store = CheckpointStore(config.output, config, [], keep=2)
        self.card = card
        self.model: Predictor = build_predictor(
            FrameShape(channels=1, height=16, width=16), config.model
        )
        self.state = {"optimizer": {"state": {0: {"sum": torch.zeros(3)}}, "lr": [0.0]}}
        self.progress = Progress()

    def advance(self, step: int) -> None:
        """Everything changes in place, as in training."""
        with torch.no_grad():
            for value in self.model.state_dict().values():
                value.fill_(step)
        self.state["optimizer"]["state"][0]["sum"].fill_(step)  # type: ignore[index]
        self.progress.step = step

    def offer(self, writer: CheckpointWriter) -> None:
        self.progress.offered_step = self.progress.step
        writer.offer(self.model, replace(self.card, step=self.progress.step))

    def save(self, writer: CheckpointWriter) -> None:
        writer.save(
            self.model,
            replace(self.card, step=self.progress.step),
            self.state,
            progress=self.progress,
            data={"position": self.progress.step},
            rng_by_rank=[checkpoint.rng_state()],
        )

    def saved(self) -> list[int]:
        """Steps of the whole checkpoints."""
        found = list_folders(self.store.run, "checkpoints", "training.json")
        return [int(path.rpartition("-")[2]) for path in found]


@pytest.fixture
def student(tiny_config: RunConfig, teacher_runs: tuple[str, str]) -> Student:
    return Student(tiny_config, load_card(teacher_runs[0]))


@contextmanager
def writing(
    student: Student, before: Callable[[], None] = lambda: None, *, max_failed: int = 1
) -> Iterator[CheckpointWriter]:
    writer = CheckpointWriter(student.store, before, max_failed=max_failed)
    try:
        yield writer
    finally:
        writer.close()


class Gate:
    """Holds the writing thread up until it is opened, and counts who came."""

    def __init__(self) -> None:
        self.open, self.reached, self.count = threading.Event(), threading.Event(), 0

    def __call__(self) -> None:
        self.count += 1
        self.reached.set()
        assert self.open.wait(30)


def test_a_snapshot_is_of_the_step_it_was_taken_at(student: Student) -> None:
    gate = Gate()
    with writing(student, gate) as writer:
        student.advance(1)
        student.offer(writer)
        student.save(writer)  # neither waits for the thread
        assert gate.reached.wait(30)
        student.advance(2)
        assert student.saved() == []
        gate.open.set()
        writer.finish()
    assert student.saved() == [1]
    folder = f"{student.store.run}/checkpoints/step-00000001"
    for where in (folder, student.store.run):
        card, weights = load_weights(where)
        assert card.step == 1
        assert all((value == 1).all() for value in weights.values())
    saved = student.store.restore(folder, student.model)
    assert saved.progress == Progress(step=1, offered_step=1)
    assert saved.data == {"position": 1}
    assert saved.training_step["optimizer"]["lr"] == [0.0]
    assert saved.training_step["optimizer"]["state"][0]["sum"].tolist() == [1, 1, 1]
    assert saved.rng_by_rank[0]["torch"] == checkpoint.rng_state()["torch"]


def test_memory_is_used_again_only_when_it_is_written(student: Student) -> None:
    gate = Gate()
    with writing(student, gate) as writer:
        student.advance(1)
        student.save(writer)
        student.advance(2)
        second = threading.Thread(target=student.save, args=(writer,))
        second.start()
        assert gate.reached.wait(30)
        second.join(0.2)
        assert second.is_alive()  # one waits for the one before
        gate.open.set()
        second.join(30)
        writer.finish()
    assert student.saved() == [1, 2]
    for step in (1, 2):
        weights = load_weights(f"{student.store.run}/checkpoints/step-0000000{step}")[1]
        assert all((value == step).all() for value in weights.values())


def test_only_the_newest_and_what_they_offer_are_kept(student: Student) -> None:
    with writing(student) as writer:
        for step in range(1, 7):
            student.advance(step)
            if step in (1, 2, 5):
                student.offer(writer)
            student.save(writer)
        writer.finish()
    assert student.saved() == [5, 6]
    models = list_folders(student.store.run, "models", "card.json")
    assert models == ["models/step-00000005"]
    assert read_json(student.store.run, SELECTED_FILE) == {"model": models[0]}


def failing(monkeypatch: pytest.MonkeyPatch, errors: Mapping[str, Exception]) -> None:
    """Let folders of such addresses fail to be written, while they are in `errors`."""
    real = checkpoint.write_folder

    def write(address: str, *rest: Any) -> None:
        for part, error in errors.items():
            if part in address:
                raise error
        real(address, *rest)

    monkeypatch.setattr(checkpoint, "write_folder", write)


@pytest.mark.parametrize("error", [WriteError("disk full"), StorageError("timeout")])
def test_a_few_failures_are_outlived_and_told(
    student: Student, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    errors = {f"checkpoints/step-0000000{step}": error for step in (2, 4)}
    failing(monkeypatch, errors)
    with writing(student, max_failed=1) as writer:
        for step in range(1, 6):
            student.advance(step)
            student.save(writer)
        writer.finish()
        assert writer.failures() == [
            f"{error} The checkpoint of step {step} was not written." for step in (2, 4)
        ]
        assert writer.failures() == []
    assert student.saved() == [3, 5]


def test_too_many_in_a_row_end_the_run(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {"checkpoints/step-": WriteError("disk full")})
    with writing(student, max_failed=1) as writer:
        for step in (1, 2):
            student.save(writer)
            student.advance(step)
        with pytest.raises(WriteError, match=r"disk full .* written: 2, .*checkpoints=1\. Older"):
            student.save(writer)
        with pytest.raises(WriteError, match="disk full"):
            writer.finish()


def test_the_newest_snapshot_must_be_written_in_the_end(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: dict[str, Exception] = {"step-00000001": WriteError("disk full")}
    failing(monkeypatch, errors)
    with writing(student) as writer:
        for act in (student.save, student.offer):
            student.advance(1)
            act(writer)
            with pytest.raises(WriteError, match="disk full"):
                writer.finish()
            errors.clear()
            student.advance(2)
            student.save(writer)
            writer.finish()
            errors["step-00000001"] = WriteError("disk full")
    assert student.saved() == [2]


def test_a_checkpoint_comes_after_the_weights_that_it_refers_to(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: dict[str, Exception] = {"models/step-00000001": StorageError("timeout")}
    failing(monkeypatch, errors)
    with writing(student, max_failed=5) as writer:
        student.advance(1)
        student.offer(writer)
        student.save(writer)
        student.advance(2)
        student.save(writer)
        with pytest.raises(StorageError, match="timeout"):
            writer.finish()
        assert student.saved() == []
        assert "weights to offer" in writer.failures()[0]
        errors.clear()
        student.advance(3)
        student.save(writer)
        writer.finish()
    assert student.saved() == [3]
    card, weights = load_weights(student.store.run)
    assert card.step == 1 and all((value == 1).all() for value in weights.values())


def test_who_was_replaced_learns_it_at_once_and_writes_nothing(student: Student) -> None:
    def forbid() -> None:
        raise ResumeError("taken over")

    with writing(student, forbid) as writer:
        student.save(writer)
        with suppress(ResumeError):
            student.save(writer)
        for call in (student.save, student.offer, CheckpointWriter.finish):
            with pytest.raises(ResumeError, match="taken over"):
                call(writer)
    assert student.saved() == []
    assert list(Path(student.store.run, "checkpoints").iterdir()) == []


def test_closing_writes_what_was_taken(student: Student) -> None:
    gate = Gate()
    with writing(student, gate) as writer:
        student.advance(1)
        student.offer(writer)
        student.save(writer)
        gate.open.set()
    assert student.saved() == [1]
    assert load_card(student.store.run).step == 1


# In runs


def test_a_run_on_a_full_disk_goes_on_and_says_so(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {f"checkpoints/step-0000000{step}": WriteError("disk full") for step in (2, 4)}
    with monkeypatch.context() as patch:
        failing(patch, errors)
        folder = run(tiny_config).run
    told = [e["reason"] for e in read_log(folder) if e["event"] == "checkpoint_failed"]
    assert told == [f"disk full The checkpoint of step {n} was not written." for n in (2, 4)]
    straight = run(replace(tiny_config, output=tiny_config.output + "-straight"))
    assert_same(final_state(folder), final_state(straight.run))


@pytest.mark.parametrize("moment", ["staged", "renamed"])
def test_killed_in_the_middle_of_a_checkpoint(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What a killed process leaves is not loaded; the next start sweeps it and ends the same."""
    folder = Path(tiny_config.output, "checkpoints")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.name == "step-00000004":
            if moment == "renamed":
                real(self, target)
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", rename)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        patch.setattr("tmu_dist.files._PROCESS", "0a")
        run(tiny_config)
    left = {path.name for path in folder.iterdir() if path.name[0] == "."}
    assert len(left) == (moment == "staged")
    seen: list[Event] = []
    resumed = run(tiny_config, seen.append)
    assert [e["step"] for e in seen if e["event"] == "resume"] == [2 if left else 4]
    assert {path.name for path in folder.iterdir()} == {"step-00000006", "step-00000007"}
    straight = run(replace(tiny_config, output=tiny_config.output + "-straight"))
    assert_same(final_state(resumed.run), final_state(straight.run))


def test_another_number_of_ranks_continues(tiny_config: RunConfig) -> None:
    """A checkpoint of four ranks is loaded by one: nothing in it belongs to a world size."""
    run_until(tiny_config, 3)
    folder = Path(tiny_config.output, "checkpoints", "step-00000002")
    state = torch.load(folder / "state.pt", weights_only=True)
    state["rng_by_rank"] *= 4
    torch.save(state, folder / "state.pt")
    facts = json.loads((folder / "training.json").read_text())
    facts["state_sha256"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "training.json").write_text(json.dumps(facts))
    resumed = run(tiny_config)
    straight = run(replace(tiny_config, output=tiny_config.output + "-straight"))
    assert_same(final_state(resumed.run)["weights"], final_state(straight.run)["weights"])


def test_checkpoints_do_not_disturb_training(tiny_config: RunConfig) -> None:
    """Saved after every step or only in the end, with any luck of the threads: the same weights."""
    found: list[dict[str, Tensor]] = []
    for every in (1, 100):
        schedule = ScheduleConfig(log_every=1, validate_every=3, checkpoint_every=every)
        output = f"{tiny_config.output}-{every}"
        config = replace(
            tiny_config,
            output=output,
            schedule=schedule,
            faults=FaultConfig(max_failed_checkpoints=0),
        )
        found.append(final_state(run(config).run)["weights"])
    assert_same(*found)
