"""A rank's batch learned in parts is the batch learned at once, whatever the method.

Everything here is float64, so that nothing but a wrong share or weight can make a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.contracts.test_transfer_method import check_parts_add_up
from tests.transfer_methods import CASES, STEPS, batch, built, case_of, masked, same_bits
from tmu_dist.config import ConfigError, RunConfig, ScaleConfig
from tmu_dist.transfer import prepare
from tmu_dist.transfer.base import LossTerms, TrainingBatch, TransferMethod
from tmu_dist.transfer.l2_sp import L2SP


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config_of(
    config: RunConfig, name: str, teachers: tuple[str, str], at_once: int | None, **training: Any
) -> RunConfig:
    """A case's run; knowledge flow without the term that accumulation does not go with."""
    whole = case_of(config, name, teachers)
    flow = replace(whole.transfer.knowledge_flow, consistency=0.0)
    return replace(
        whole,
        transfer=replace(whole.transfer, knowledge_flow=flow),
        training=replace(whole.training, **training),
        scale=ScaleConfig(sequences_at_once=at_once),
    )


def uneven(step: int) -> TrainingBatch:
    """Four sequences that count differently, one of them nothing, one with nothing observed."""
    return replace(masked(batch(step)), weights_B=torch.tensor([0.5, 0.0, 0.3, 0.2]))


def learned(config: RunConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logs and weights after iterations of every phase of a method."""
    run = built(config)
    logs = [run.training_step(each) for each in (batch(1), uneven(2), batch(STEPS))]
    gradients = {
        f"gradient of {name}": parameter.grad
        for name, parameter in run.trainee.named_parameters()
        if parameter.grad is not None
    }
    assert gradients
    return logs, run.trainee.state_dict() | gradients


@pytest.mark.parametrize("name", CASES)
def test_parts_of_any_size_make_the_same_update(
    name: str, tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """Parts of 1, 2 and 3 of four sequences; partners of shuffled teachers stay together."""
    logs, state = learned(config_of(tiny_config, name, teacher_runs, None))
    penalties = CASES[name].terms & {"l2_sp_start", "independence"}
    # Not 0 as at the start: what counts once an update, and not once a part, is there.
    assert all(logs[1][f"loss/{term}"] > 0 for term in penalties)
    for at_once in (2,) if name == "tmu-shuffled" else (1, 2, 3):
        own_logs, own_state = learned(config_of(tiny_config, name, teacher_runs, at_once))
        assert own_logs == [pytest.approx(log, rel=1e-9, abs=1e-12) for log in logs]
        torch.testing.assert_close(own_state, state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reverse_input", ["off", "average"])
def test_parts_in_both_directions_of_time(
    reverse_input: str, tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """One update of both directions is of all parts of both; the gradient is cut after all."""
    settings = {"reverse_input": reverse_input, "grad_clip_norm": 1e-3}
    for name in ("tmu", "l2_sp", "knowledge_flow"):
        whole, parts = (
            learned(config_of(tiny_config, name, teacher_runs, at_once, **settings))
            for at_once in (None, 3)
        )
        assert parts[0] == [pytest.approx(log, rel=1e-9, abs=1e-12) for log in whole[0]]
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-9, atol=1e-9)


def test_a_rank_that_has_no_more_than_one_part_changes_no_bit(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """So that many ranks need not know how few ranks would have to cut."""
    (whole_logs, whole), *others = (
        learned(config_of(tiny_config, "tmu", teacher_runs, at_once)) for at_once in (None, 4, 9)
    )
    for logs, state in others:
        assert logs == whole_logs
        assert all(same_bits(state[name], value) for name, value in whole.items())


def test_partners_must_lie_in_one_part(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError, match=r"shuffled.*scale\.sequences_at_once"):
        learned(config_of(tiny_config, "tmu-shuffled", teacher_runs, 3))


def test_what_looks_at_the_whole_batch_is_refused(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    flowing = case_of(tiny_config, "knowledge_flow", teacher_runs)
    assert flowing.transfer.knowledge_flow.consistency > 0
    with pytest.raises(ConfigError, match=r"sequences_at_once .*consistency"):
        replace(flowing, scale=ScaleConfig(sequences_at_once=2))


class PaysForEveryPart(L2SP):
    """Its penalty counts once a part."""

    def loss(self, forward: Any, batch: TrainingBatch) -> LossTerms:
        return super().loss(forward, replace(batch, share=1.0))


def test_the_contract_notices_a_penalty_that_counts_too_often(
    tiny_config: RunConfig, teacher_runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case_of(tiny_config, "l2_sp", teacher_runs)
    check_parts_add_up(config)
    monkeypatch.setattr(prepare, "L2SP", PaysForEveryPart)
    with pytest.raises(AssertionError):
        check_parts_add_up(config)


# Shares of a batch


def test_shares_of_parts_of_parts() -> None:
    whole = batch(size=6)
    thirds = [whole.rows(slice(k, k + 2)) for k in (0, 2, 4)]
    assert [part.share for part in thirds] == [pytest.approx(1 / 3)] * 3
    assert thirds[1].rows(slice(1)).share == pytest.approx(1 / 6)
    assert whole.rows(slice(4, 9)).share == pytest.approx(1 / 3)
    assert thirds[2].backwards().share == thirds[2].share
    assert torch.equal(thirds[2].frames_BTCHW, whole.frames_BTCHW[4:])


# What a step tells its method


class Listening(TransferMethod):
    """Writes down what it is told, and what it learns from."""

    def __init__(self, method: TransferMethod) -> None:
        super().__init__(method.task)
        self.method = method
        self.heard: list[tuple[str, TrainingBatch]] = []

    def build_student(self) -> Any:
        return self.method.build_student()

    def announce(self, batch: TrainingBatch) -> None:
        self.heard.append(("announced", batch))

    def loss(self, forward: Any, batch: TrainingBatch) -> Any:
        self.heard.append(("learned", batch))
        return self.method.loss(forward, batch)


@pytest.mark.parametrize(
    ("at_once", "reverse_input", "parts", "share"),
    [
        (None, "off", 1, 1),
        (None, "update", 2, 1),
        (2, "update", 4, 1 / 2),
        (1, "average", 8, 1 / 4),
    ],
)
def test_every_part_is_announced_once_before_the_one_ahead_of_it(
    at_once: int | None, reverse_input: str, parts: int, share: float, tiny_config: RunConfig
) -> None:
    """But for the very first; and each is the very object that is learned from later."""
    config = replace(
        tiny_config,
        scale=ScaleConfig(sequences_at_once=at_once),
        training=replace(tiny_config.training, reverse_input=reverse_input),  # type: ignore[arg-type]
    )
    run = built(config)
    listening = run.training_step.method = Listening(run.transfer.method)
    given = [batch(1), batch(2)]
    run.training_step(given[0], given[1])
    run.training_step(given[1])
    whats, each = zip(*listening.heard, strict=True)
    assert list(whats) == ["announced", "learned"] * (2 * parts - 1) + ["learned"]
    learned_from = each[1::2] + each[-1:]
    assert len({id(part) for part in learned_from}) == 2 * parts
    # The very same objects, one ahead.
    assert [id(part) for part in each[:-1:2]] == [id(part) for part in learned_from[1:]]
    assert sum(part.share for part in learned_from) == pytest.approx(2 * parts * share)
