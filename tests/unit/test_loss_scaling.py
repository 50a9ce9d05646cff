"""Updates in float16: scaled, skipped where they overflow, counted, continued; and lazy terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transfer_methods import CPU, batch, built, same_bits
from tests.unit.test_adversarial import CONVLSTM, FULL, SAVP, make
from tests.unit.test_adversarial import batch as adversarial_batch
from tests.unit.test_training import assert_same, final_state, run, run_until
from tmu_dist.config import ModelConfig, Precision, RunConfig
from tmu_dist.run_folder import Event, read_log
from tmu_dist.training import adversarial
from tmu_dist.training.adversarial import AdversarialStep
from tmu_dist.training.loop import NonFiniteLossError
from tmu_dist.training.scaling import SMALLEST_SCALE, LossScaling
from tmu_dist.training.step import StepTerms, TrainingStep
from tmu_dist.transfer.base import LossTerms, Term, TrainingBatch
from tmu_dist.transfer.tmu import MemoryDistillation


def fused_adam(weight: nn.Parameter) -> torch.optim.Adam:
    return torch.optim.Adam([weight], lr=0.1, fused=True)


def in_float16(config: RunConfig, **training: Any) -> RunConfig:
    return replace(config, training=replace(config.training, precision="fp16", **training))


def begin_at(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))


def events(folder: str, kind: str) -> list[Event]:
    return [event for event in read_log(Path(folder)) if event["event"] == kind]


# Of one optimiser


def test_an_update_that_overflows_is_skipped_and_counted() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaling = fused_adam(weight), LossScaling(CPU, is_on=True)
    assert scaling.facts(optimizer) == {"loss_scale": 2.0**16, "skipped_updates": 0}
    for factor, skipped in ((1.0, 0), (float("inf"), 1), (1.0, 1), (1e38, 2), (1.0, 2)):
        optimizer.zero_grad()
        before = weight.detach().clone()
        scaling.backward((factor * weight).sum())
        scaling.unscale(optimizer)
        scaling.update(optimizer)
        assert same_bits(before, weight.detach()) == (factor > 1)
        assert scaling.facts(optimizer) == {
            "loss_scale": 2.0 ** (16 - skipped),
            "skipped_updates": skipped,
        }


def test_scaling_changes_no_bit_of_what_does_not_overflow() -> None:
    """The scale is a power of two."""
    found = []
    for is_on in (True, False):
        weight = nn.Parameter(torch.linspace(-1, 1, 9))
        optimizer, scaling = fused_adam(weight), LossScaling(CPU, is_on=is_on)
        for _ in range(3):
            optimizer.zero_grad()
            scaling.backward((weight.exp() - weight).square().sum())
            scaling.unscale(optimizer)
            scaling.update(optimizer)
        found.append((weight.detach(), weight.grad))
        if not is_on:
            assert scaling.facts(optimizer) == {} == scaling.state_dict()
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_scale_and_count_continue() -> None:
    first, second = LossScaling(CPU, is_on=True), LossScaling(CPU, is_on=True)
    weight = nn.Parameter(torch.ones(1))
    optimizer = fused_adam(weight)
    for factor in (float("nan"), 1.0):
        optimizer.zero_grad()
        first.backward((factor * weight).sum())
        first.unscale(optimizer)
        first.update(optimizer)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.facts(optimizer) == {"loss_scale": 2.0**15, "skipped_updates": 1}
    assert second.state_dict()["scaler"]["_growth_tracker"] == 1


# Of a training step


def test_gradients_are_clipped_as_they_are_and_not_as_they_were_scaled(
    tmu_config: RunConfig,
) -> None:
    """Unscaled they are below the limit, scaled far above."""
    expected = built(in_float16(tmu_config))
    norm = 10.0
    clipped = built(in_float16(tmu_config, grad_clip_norm=norm))
    for each in (expected, clipped):
        each.training_step(batch())
    gradients = [p.grad for p in expected.trainee.parameters() if p.grad is not None]
    assert nn.utils.get_total_norm(gradients) < norm
    assert_same(dict(clipped.trainee.state_dict()), dict(expected.trainee.state_dict()))


def test_parts_add_up_before_they_are_unscaled(tmu_config: RunConfig) -> None:
    at_once = replace(tmu_config.scale, sequences_at_once=2)
    whole, parts = (
        built(config)
        for config in (in_float16(tmu_config), replace(in_float16(tmu_config), scale=at_once))
    )
    terms = [each.training_step(batch()) for each in (whole, parts)]
    assert terms[1] == pytest.approx(dict(terms[0]), rel=1e-3)
    assert whole.training_step.facts()["skipped_updates"] == 0
    gradients = [
        torch.cat([p.grad.flatten() for p in each.trainee.parameters() if p.grad is not None])
        for each in (whole, parts)
    ]
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize("model", [SAVP, CONVLSTM])
def test_discriminators_and_student_are_scaled_each_by_itself(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned(precision: Precision) -> AdversarialStep:
        step = make(model, FULL, precision=precision)
        assert isinstance(step, AdversarialStep)
        for number in (1, 2, 3):
            step(replace(adversarial_batch(model), step=number))
        return step

    exact, rough = (learned("fp32"), learned("fp16"))
    assert exact.facts() == {}
    names = ("loss_scale", "skipped_updates")
    assert set(rough.facts()) == {*names, *(f"discriminator_{name}" for name in names)}
    for one, other in (
        (exact.trainee, rough.trainee),
        (exact.discriminators, rough.discriminators),
    ):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert q.dtype == torch.float32
            torch.testing.assert_close(q, p, atol=2e-2, rtol=0.0)
    continued = make(model, FULL, precision="fp16")
    continued.load_state_dict(rough.state_dict())
    assert continued.facts() == rough.facts()

    begin_at(monkeypatch, 2.0**120)
    wild = learned("fp16")
    assert wild.facts()["discriminator_skipped_updates"] == wild.facts()["skipped_updates"] == 3


def test_vectors_of_zeros_have_a_direction_in_half_precision_too() -> None:
    """What keeps a division by 0 away in float32 is 0 itself in float16."""
    zeros = torch.zeros(1, 2, 3, 3, dtype=torch.float16, requires_grad=True)
    distance = adversarial._feature_distance(zeros.detach(), zeros)
    distance.sum().backward()
    assert distance.isfinite().all() and zeros.grad is not None and zeros.grad.isfinite().all()


# Of a run


def test_skipped_updates_are_logged_and_no_reason_to_stop(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_at(monkeypatch, 2.0**26)
    logged = events(run(in_float16(tmu_config, num_steps=12)).run, "train")
    skipped = [event["skipped_updates"] for event in logged]
    assert skipped[:2] == [2, 4]  # both directions of the first two iterations
    assert skipped[-1] == skipped[-2] < 24
    assert [event["loss_scale"] for event in logged] == [2.0 ** (26 - each) for each in skipped]
    assert logged[0]["loss/total"] != logged[-1]["loss/total"]
    assert not events(tmu_config.output, "overflow")
    plain = run(replace(tmu_config, output=tmu_config.output + "-fp32")).run
    assert not any("loss_scale" in event for event in events(plain, "train"))


@pytest.mark.parametrize("stop", [3, 5])
def test_a_continued_run_in_float16_equals_an_uninterrupted_one(
    tmu_config: RunConfig, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With updates skipped before and after the stop."""
    begin_at(monkeypatch, 2.0**26)
    config = in_float16(tmu_config)
    straight = run(replace(config, output=config.output + "-straight")).run
    run_until(config, stop)
    assert_same(final_state(run(config).run), final_state(straight))
    counts = [event["skipped_updates"] for event in events(straight, "train")]
    assert 0 < counts[1] < counts[-1] == counts[-2] < 14


class Overflowing:
    """A method's loss that is infinite in some iterations."""

    def __init__(self, loss: Callable[..., LossTerms], is_infinite: Callable[[int], bool]) -> None:
        self.loss = loss
        self.is_infinite = is_infinite

    def __call__(self, method: Any, forward: Any, batch: TrainingBatch) -> LossTerms:
        terms = self.loss(method, forward, batch)
        if not self.is_infinite(batch.step):
            return terms
        value = terms.terms["prediction"].value * float("inf")
        return terms.with_terms({"prediction": Term(value)})


def overflow(monkeypatch: pytest.MonkeyPatch, is_infinite: Callable[[int], bool]) -> None:
    loss = Overflowing(MemoryDistillation.loss, is_infinite)
    monkeypatch.setattr(
        MemoryDistillation, "loss", lambda self, forward, batch: loss(self, forward, batch)
    )


def test_an_iteration_whose_loss_overflows_is_told_of_and_passed_over(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, lambda step: step == 4)
    result = run(in_float16(tmu_config))
    assert result.steps == 7
    (told,) = events(result.run, "overflow")
    assert told["step"] == 4 and told["skipped_updates"] >= 2
    assert [event["step"] for event in events(result.run, "train")] == [1, 2, 3, 5, 6, 7]
    with pytest.raises(NonFiniteLossError, match="The loss is .* not finite at step 4"):
        run(replace(tmu_config, output=tmu_config.output + "-fp32"))


def test_gradients_that_no_scale_helps_end_the_run(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_at(monkeypatch, 8 * SMALLEST_SCALE)
    overflow(monkeypatch, lambda step: True)
    with pytest.raises(NonFiniteLossError, match="however small the loss.* at step 2.*bf16"):
        run(in_float16(tmu_config))


# Terms that stay on the device


def test_terms_are_read_once_and_only_when_somebody_looks(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    stack = torch.stack

    def read(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        reads.append(len(tensors))
        return stack(tensors, *args, **kwargs)

    terms = StepTerms({"loss/a": torch.tensor(3.0), "loss/total": torch.tensor(5.0)}, 2)
    monkeypatch.setattr(torch, "stack", read)
    assert len(terms) == 2 and list(terms) == ["loss/a", "loss/total"] and not reads
    assert terms["loss/total"] == 2.5
    assert dict(terms) == {"loss/a": 1.5, "loss/total": 2.5} == terms.read()
    assert terms == {"loss/a": 1.5, "loss/total": 2.5} and reads == [2]
    assert isinstance(terms, Mapping) and repr(terms) == "{'loss/a': 1.5, 'loss/total': 2.5}"


def test_a_run_looks_at_terms_when_something_is_due(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[StepTerms] = []
    made: list[StepTerms] = []
    call, read = TrainingStep.__call__, StepTerms.read

    def step(self: TrainingStep, *args: Any) -> StepTerms:
        made.append(call(self, *args))
        return made[-1]

    def note(self: StepTerms) -> dict[str, float]:
        looked.append(self)
        return read(self)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    monkeypatch.setattr(StepTerms, "read", note)
    rarely = replace(tmu_config.schedule, log_every=3, validate_every=5, checkpoint_every=100)
    run(replace(tmu_config, schedule=rarely))
    assert [number for number, each in enumerate(made, 1) if any(each is x for x in looked)] == [
        3,
        5,
        6,
        7,
    ]
