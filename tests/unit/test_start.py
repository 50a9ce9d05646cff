"""Where students start: which tensors are a trained network's, and is the rest told?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import TINY_MODEL
from tests.unit.test_training import assert_same, final_state, run, run_until
from tests.unit.test_transfer import FRAME, student_of, task, teacher, tmu_method
from tmu_dist.config import RunConfig, TMUConfig
from tmu_dist.models.build import build_predictor, weight_shapes
from tmu_dist.models.rollout import Predictor
from tmu_dist.run_folder import Event, read_log
from tmu_dist.teachers.card import TeacherError
from tmu_dist.teachers.store import load_weights
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.start import Start, StartReport

PLAIN = frozenset(weight_shapes(FRAME, TINY_MODEL))
SMALLER_PATCHES = replace(TINY_MODEL, patch_size=2)
DIFFERENT = {"stack.layers.0.cell.gates.weight", "output.weight"}
"""Tensors of the tiny network that depend on the size of its patches."""


def start_from(source: Predictor, unmatched: str = "refuse") -> Start:
    return Start(name="source", weights=source.state_dict(), unmatched=unmatched)  # type: ignore[arg-type]


def finetuning(config: RunConfig, source: str, **start: Any) -> RunConfig:
    settings = replace(config.transfer.start, **start)
    transfer = replace(config.transfer, method="finetune", teachers=(source,), start=settings)
    return replace(config, transfer=transfer)


def start_event(config: RunConfig) -> Event:
    (event,) = (e for e in read_log(run(config).run) if e["event"] == "start")
    return event


def test_finetuning_is_training_from_those_weights_bit_for_bit(
    tiny_config: RunConfig, teacher_runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetuning(tiny_config, teacher_runs[0])
    event = start_event(config)
    weights = load_weights(teacher_runs[0])[1]
    assert set(event["matched"]) == set(weights) and event["source"] == "teacher-1"
    assert event["step"] == 0 and event["random"] == {} and event["unused"] == []

    alone = replace(tiny_config, output=tiny_config.output + "-alone")
    run(alone)
    build = Scratch.build_student

    def started(method: Scratch) -> Predictor:
        student = build(method)
        student.load_state_dict(weights)
        return student

    monkeypatch.setattr(Scratch, "build_student", started)
    by_hand = replace(tiny_config, output=tiny_config.output + "-by-hand")
    run(by_hand)
    assert_same(final_state(config.output), final_state(by_hand.output))
    of_scratch = final_state(alone.output)["weights"]
    assert not any(
        torch.equal(value, of_scratch[name])
        for name, value in final_state(config.output)["weights"].items()
    )


def test_a_finetuning_run_continues_and_tells_its_start_once(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    config = finetuning(tiny_config, teacher_runs[0])
    straight = replace(config, output=config.output + "-straight")
    run(straight)
    run_until(config, 5)
    run(config)
    assert_same(final_state(config.output), final_state(straight.output))
    kinds = [event["event"] for event in read_log(config.output)]
    assert kinds.count("start") == kinds.count("resume") == 1


def test_another_patch_size_is_refused_by_name_or_starts_the_rest_at_random(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    other = replace(tiny_config, model=SMALLER_PATCHES)
    with pytest.raises(TeacherError, match=r"7 tensors 5 .*gates.weight is 16x20x3x3 there, 16x8"):
        run(finetuning(other, teacher_runs[0]))
    event = start_event(finetuning(other, teacher_runs[0], unmatched="random"))
    assert set(event["random"]) == DIFFERENT
    assert set(event["matched"]) == PLAIN - DIFFERENT and event["unused"] == []
    assert event["random"]["output.weight"] == "16x4x1x1 there, 4x4x1x1 here"


def test_what_fits_is_copied_and_the_rest_keeps_its_random_start() -> None:
    source = teacher(1)
    student, untouched = (build_with_seed_0(SMALLER_PATCHES) for _ in range(2))
    start_from(source, "random").apply(student, PLAIN)
    for name, value in student.state_dict().items():
        expected = untouched if name in DIFFERENT else source
        assert torch.equal(value, expected.state_dict()[name])
    before = {name: value.clone() for name, value in source.state_dict().items()}
    torch.nn.utils.vector_to_parameters(
        torch.zeros(sum(p.numel() for p in student.parameters())), student.parameters()
    )
    assert_same(before, dict(source.state_dict()))  # the student has copies


def build_with_seed_0(model: Any, **slots: Any) -> Predictor:
    torch.manual_seed(0)
    return build_predictor(FRAME, model, **slots)


def test_a_tmu_student_has_the_plain_tensors_and_its_own_distillers() -> None:
    source = teacher(1)
    method = tmu_method(1, 2)
    student, untouched = student_of(method), student_of(method)
    report = start_from(source).apply(method.plain_part(student), PLAIN)
    assert set(report.matched) == PLAIN and not report.random and not report.unused
    beside = student.state_dict().keys() - PLAIN
    assert any("distiller" in name for name in beside)
    for name, value in student.state_dict().items():
        expected = untouched if name in beside else source
        assert torch.equal(value, expected.state_dict()[name])


def test_a_run_of_a_tmu_student_starts_from_the_teacher_it_names(
    tmu_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    start = replace(tmu_config.transfer.start, teacher=1)
    config = replace(
        tmu_config,
        transfer=replace(tmu_config.transfer, start=start),
        training=replace(tmu_config.training, num_steps=1, rates=("stack.*.cell.*=0",)),
    )
    event = start_event(config)
    assert event["source"] == "teacher-2" and set(event["matched"]) == PLAIN
    source = load_weights(teacher_runs[1])[1]
    weights = final_state(config.output)["weights"]
    frozen = [name for name in PLAIN if ".cell." in name]
    assert frozen and all(torch.equal(weights[name], source[name]) for name in frozen)
    assert not torch.equal(weights["output.weight"], source["output.weight"])


@pytest.mark.parametrize("unmatched", ["refuse", "random"])
def test_tensors_of_the_source_that_find_no_place_are_told(unmatched: str) -> None:
    source = build_with_seed_0(TINY_MODEL, tmu=TMUConfig(), num_slots=1)
    start = start_from(source, unmatched)
    student = Scratch(task()).build_student()
    if unmatched == "refuse":
        before = {name: value.clone() for name, value in student.state_dict().items()}
        with pytest.raises(TeacherError, match=r"transfer\.\S+ is unknown here.*unmatched=random"):
            start.apply(student, PLAIN)
        assert_same(before, dict(student.state_dict()))  # not half a start
        return
    report = start.apply(student, PLAIN)
    assert report == StartReport(
        source="source",
        matched=tuple(student.state_dict()),
        random={},
        unused=tuple(sorted(source.state_dict().keys() - PLAIN)),
    )


@pytest.mark.parametrize("unmatched", ["refuse", "random"])
def test_a_start_that_gives_nothing_is_no_start(unmatched: str) -> None:
    stranger = Start(
        name="stranger",
        weights={"elsewhere": torch.zeros(3)},
        unmatched=unmatched,  # type: ignore[arg-type]
    )
    with pytest.raises(TeacherError, match=r"7 tensors 0 .*settings of its card\.$"):
        stranger.apply(student_of(Scratch(task())), PLAIN)
