"""Teachers that begin early teach the same, once, in an order that every rank can keep.

On the CPU nobody begins early unless made to: here all are, so that the order is seen.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.transfer_methods import (
    CASES,
    CPU,
    STEPS,
    batch,
    built,
    case_of,
    same_bits,
    teachers_of,
)
from tests.unit.test_training import Killed, assert_same, final_state
from tests.unit.test_training import run as train
from tmu_dist.config import RunConfig, ScaleConfig
from tmu_dist.data.loader import SequenceLoader
from tmu_dist.run_folder import Event, read_log
from tmu_dist.teachers.ahead import TeachingAhead
from tmu_dist.teachers.bank import Teaching
from tmu_dist.training import loop
from tmu_dist.training.loop import Run
from tmu_dist.transfer.base import TaughtMethod, TrainingBatch

TAUGHT = [name for name, case in CASES.items() if case.terms and not case.starts]
"""Cases whose teachers run beside the student."""


# What is begun, and what is taken


class Batch:
    """Stands for one; all are equal."""

    def __eq__(self, other: object) -> bool:
        return True


def teaching(asked: list[int], number: int) -> Any:
    def teach() -> tuple[Teaching, ...]:
        asked.append(number)
        return (Teaching({"memory": {0: torch.full((1,), float(number))}}),)

    return teach


def test_what_was_begun_is_taken_and_the_rest_is_asked_for_at_once() -> None:
    ahead, asked = TeachingAhead(CPU), []
    batches = [Batch() for _ in range(4)]

    def take(number: int) -> float:
        (taught,) = ahead.take(batches[number], teaching(asked, number))
        return taught.states["memory"][0].item()

    ahead.begin(batches[1], teaching(asked, 1))
    ahead.begin(batches[1], teaching(asked, 1))
    assert take(0) == 0  # nobody announced it
    ahead.begin(batches[2], teaching(asked, 2))
    assert asked == [1, 0, 2]
    assert [take(1), take(2), take(3)] == [1, 2, 3]
    assert asked == [1, 0, 2, 3]
    assert take(2) == 2  # a second time, it is asked for again
    assert asked == [1, 0, 2, 3, 2]


def test_no_more_than_one_is_ahead_of_the_present_one() -> None:
    ahead, asked = TeachingAhead(CPU), []
    batches = [Batch() for _ in range(3)]
    kept = [weakref.ref(each) for each in batches]
    for number, each in enumerate(batches):
        ahead.begin(each, teaching(asked, number))
    del each
    batches.clear()
    gc.collect()
    assert [reference() is not None for reference in kept] == [False, True, True]


# Every method whose teachers run beside its student


def run_of(config: RunConfig, *, ahead: bool) -> Run:
    run = built(config)
    method = run.transfer.method
    assert isinstance(method, TaughtMethod)
    assert method.ahead is None, "on the CPU teachers would only be in the student's way"
    method.ahead = TeachingAhead(CPU) if ahead else None
    return run


def learned(run: Run) -> list[dict[str, float]]:
    """Iterations of every phase, each of which is told of the one after it."""
    steps = [batch(step) for step in range(1, STEPS + 1)]
    return [run.training_step(*pair) for pair in zip(steps, [*steps[1:], None], strict=True)]


def heard(run: Run) -> list[str]:
    """Filled with who runs when: the teachers ("teach") and the student ("learn")."""
    events: list[str] = []
    teachers_of(run)[0].register_forward_hook(lambda *_: events.append("teach"))
    run.student.register_forward_hook(lambda *_: events.append("learn"))
    return events


@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("name", TAUGHT)
def test_no_bit_depends_on_who_began_when(
    name: str, at_once: int | None, tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    config = case_of(tiny_config, name, teacher_runs)
    if at_once is not None:
        flow = replace(config.transfer.knowledge_flow, consistency=0.0)
        transfer = replace(config.transfer, knowledge_flow=flow)
        scale = ScaleConfig(sequences_at_once=at_once)
        config = replace(config, transfer=transfer, scale=scale)
    late, early = (run_of(config, ahead=ahead) for ahead in (False, True))
    by_late, by_early = heard(late), heard(early)
    assert learned(early) == learned(late)
    expected = late.trainee.state_dict()
    assert all(same_bits(value, expected[k]) for k, value in early.trainee.state_dict().items())
    # The same work, nothing twice, and begun early wherever the student's rollout is not needed.
    assert sorted(by_early) == sorted(by_late)
    needs_rollout = config.transfer.teacher_input == "student"
    assert (by_early == by_late) == needs_rollout


def test_teachers_begin_with_the_next_part_before_the_student_learns_the_present_one(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """Two updates an iteration, four parts; the very first is taught when it is asked for."""
    config = case_of(tiny_config, "knowledge_flow-all", teacher_runs)
    run = run_of(replace(config, scale=ScaleConfig(sequences_at_once=2)), ahead=True)
    events = heard(run)
    run.training_step(batch(1), batch(1))
    assert events == ["teach", "teach", "learn", *["teach", "learn"] * 3]


@pytest.mark.parametrize(
    ("name", "taught_steps"), [("knowledge_flow", [1, 2, 3]), ("tmu-annealed", [1, 2, 3, 4, 5])]
)
def test_who_does_not_teach_does_not_begin(
    name: str, taught_steps: list[int], tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """Both end without teachers."""
    run = run_of(case_of(tiny_config, name, teacher_runs), ahead=True)
    events = heard(run)
    method = run.transfer.method
    for step in range(1, STEPS + 1):
        given, asked = batch(step), len(events)
        method.announce(given)
        method.loss(run.trainee, given)
        assert events[asked:] == (["teach", "learn"] if step in taught_steps else ["learn"])


# A whole run


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Runs whose teachers begin early; filled with the steps announced, and while at which."""
    found: list[tuple[int, int]] = []
    prepare, advance = loop.prepare_transfer, Run.advance
    announce = TaughtMethod.announce
    present = []

    def prepared(*given: Any, **more: Any) -> Any:
        transfer = prepare(*given, **more)
        transfer.method.ahead = TeachingAhead(CPU)  # type: ignore[attr-defined]
        return transfer

    def announced(self: TaughtMethod, batch: TrainingBatch) -> None:
        found.append((present[-1], batch.step))
        announce(self, batch)

    def advanced(self: Run, *given: Any) -> None:
        present.append(self.progress.step + 1)
        advance(self, *given)

    monkeypatch.setattr(loop, "prepare_transfer", prepared)
    monkeypatch.setattr(TaughtMethod, "announce", announced)
    monkeypatch.setattr(Run, "advance", advanced)
    return found


def losses(folder: str) -> list[Any]:
    return [(e["step"], e["loss/total"]) for e in read_log(Path(folder)) if e["event"] == "train"]


def test_a_run_whose_teachers_begin_early_is_the_same_run(
    tmu_config: RunConfig, early: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two steps, when the next batch was prepared, taught, and not learned from."""
    with monkeypatch.context() as late:
        late.setattr(TeachingAhead, "begin", pytest.fail)
        late.setattr(TaughtMethod, "announce", lambda *_: None)
        late.setattr(TeachingAhead, "take", lambda _, __, teach: teach())
        expected = train(replace(tmu_config, output=tmu_config.output + "-late"))

    def kill(event: Event) -> None:
        if event["event"] == "train" and event["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train(tmu_config, kill)
    result = train(tmu_config)
    assert_same(final_state(result.run), final_state(expected.run))
    assert losses(result.run) == losses(expected.run)
    # Each second update's part within its step, each first one's a step ahead; the run that was
    # killed at step 5 continued after the checkpoint of step 4, and its last step has none ahead.
    steps = [*range(1, 6), *range(5, 8)]
    assert early == [
        each for step in steps for each in ((step, step), (step, step + 1)) if each != (7, 8)
    ]


def test_what_is_read_ahead_is_not_consumed(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 sequences in batches of 4: the sixth has 2. One batch more is read, and none beyond."""
    read: list[int] = []
    stream = SequenceLoader.stream

    def counted(self: SequenceLoader, start: int) -> Any:
        for each in stream(self, start):
            read.append(each.consumed)
            yield each

    monkeypatch.setattr(SequenceLoader, "stream", counted)
    run = Run(tmu_config, loop.Collectives(), CPU)
    seen = []
    try:
        run.start()
        for given, following in run.batches():
            run.advance(given, following)
            seen.append((run.progress.step, run.progress.consumed, read[-1]))
    finally:
        run.close()
    consumed = [4, 8, 12, 16, 20, 22, 26]
    assert seen == [
        (step, done, ahead)
        for step, done, ahead in zip(range(1, 8), consumed, [*consumed[1:], 26], strict=True)
    ]
