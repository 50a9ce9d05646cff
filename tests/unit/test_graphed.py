"""Recorded parts teach what unrecorded ones do; what cannot be recorded is refused by name.

There is no card here: a recorder stands for it that goes through a recording without its being
done, and replays it by doing it on the same tensors. tests/gpu has the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.transfer_methods import (
    CASES,
    CPU,
    FRAME,
    STEPS,
    batch,
    built,
    case_of,
    learning,
    masked,
    same_bits,
)
from tests.unit.test_training import MODELS
from tmu_dist.collectives import Collectives
from tmu_dist.config import (
    AdversarialConfig,
    ComputeConfig,
    ConfigError,
    KLConfig,
    PlacementConfig,
    RunConfig,
    ScaleConfig,
)
from tmu_dist.training.build import build_step, uses_graph
from tmu_dist.training.graphed import REHEARSALS, RecordedParts
from tmu_dist.training.loop import Run
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import TrainingBatch
from tmu_dist.transfer.prepare import outline_method
from tmu_dist.transfer.scratch import Scratch

Found = TypeVar("Found")
CARD = torch.device("cuda", 0)
STEADY = [
    name for name in CASES if name not in ("knowledge_flow", "knowledge_flow-all", "tmu-annealed")
]


class Rerun:
    """Stands for a card's recorder; counts what it is asked for.

    Args:
        parameters: whose gradients a recording must leave alone.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.asked: list[str] = []

    def rehearse(self, run: Callable[[], Found]) -> Found:
        self.asked.append("rehearse")
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        self.asked.append("record")
        before = {p: p.grad.clone() for p in self.parameters if p.grad is not None}
        found = run()
        places = {p: p.grad for p in self.parameters}
        for parameter, gradient in before.items():
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        assert all((p in before) == (p.grad is not None) for p in self.parameters)

        def replay() -> None:
            self.asked.append("replay")
            assert all(p.grad is places[p] for p in self.parameters), "a gradient has moved"
            for name, value in run().items():
                found[name].copy_(value)

        return found, replay


def recorded(run: Run) -> tuple[TrainingStep, Rerun]:
    """A run's step, made again with a recorder."""
    config, recorder = run.config, Rerun(list(learning(run.trainee).values()))
    training = config.training
    step = TrainingStep(
        run.transfer.method,
        run.student,
        run.trainee,
        run.trainee,
        device=CPU,
        learning_rate=lambda step: training.learning_rate,
        groups=run.training_step.optimizer.param_groups,
        reverse_input=training.reverse_input,
        grad_clip_norm=training.grad_clip_norm,
        sequences_at_once=config.scale.sequences_at_once,
        precision=training.precision,
        recorder=recorder,
    )
    return step, recorder


def assert_same_training(config: RunConfig, steps: int = STEPS) -> Rerun:
    """With a recorder and without one, the same terms and weights, bit for bit."""
    expected, run = built(config), built(config)
    step, recorder = recorded(run)
    for number in range(1, steps + 1):
        given = masked(batch(number))
        told = step(given, masked(batch(number + 1)))
        assert told == expected.training_step(given)
    weights = expected.trainee.state_dict()
    assert all(same_bits(value, weights[k]) for k, value in run.trainee.state_dict().items())
    return recorder


# What is recorded is what would have been done


@pytest.mark.parametrize("name", STEADY)
def test_recorded_parts_change_no_bit(
    name: str, tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """Two parts an iteration, one for each direction of time, of one recording."""
    recorder = assert_same_training(case_of(tiny_config, name, teacher_runs))
    replays = 2 * STEPS - REHEARSALS
    assert recorder.asked == ["rehearse"] * REHEARSALS + ["record"] + ["replay"] * replays


@pytest.mark.parametrize("reverse_input", ["off", "update", "average"])
@pytest.mark.parametrize(
    ("precision", "grad_clip_norm"), [("fp32", 1e-2), ("bf16", None), ("fp16", 1e-2)]
)
def test_recorded_parts_in_every_kind_of_iteration(
    reverse_input: str,
    precision: str,
    grad_clip_norm: float | None,
    tiny_config: RunConfig,
    teacher_runs: tuple[str, str],
) -> None:
    config = case_of(tiny_config, "tmu", teacher_runs)
    training = replace(
        config.training,
        reverse_input=reverse_input,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        grad_clip_norm=grad_clip_norm,
    )
    if precision == "fp32":
        assert_same_training(replace(config, training=training))
        return
    # Autocast rounds the weights anew at every use where it is recorded: other sums of gradients.
    config = replace(config, training=training)
    run, expected = built(config), built(config)
    step, _ = recorded(run)
    for number in range(1, STEPS + 1):
        given = batch(number)
        assert step(given) == pytest.approx(dict(expected.training_step(given)), rel=3e-2)
    assert step.facts() == expected.training_step.facts()


def test_parts_of_another_kind_are_learned_from_without_it(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    """Of four sequences at three a time, one is left over; later batches have no missing pixels."""
    config = replace(
        case_of(tiny_config, "l2_sp", teacher_runs), scale=ScaleConfig(sequences_at_once=3)
    )
    recorder = assert_same_training(config)
    assert recorder.asked.count("replay") == 2 * STEPS - REHEARSALS

    run = built(config)
    step, recorder = recorded(run)
    for number in range(1, 4):
        step(masked(batch(number)))
    before = list(recorder.asked)
    step(batch(4))
    step(masked(batch(5, size=2)))
    assert recorder.asked == before
    step(masked(batch(6)))
    assert recorder.asked[len(before) :] == ["replay"] * 2


def test_the_weight_of_a_part_belongs_to_its_kind() -> None:
    """A whole batch of three sequences is no part of three of six: penalties count otherwise."""
    learned: list[TrainingBatch] = []

    def learn(part: TrainingBatch, scale: float) -> dict[str, torch.Tensor]:
        learned.append(part)
        return {"loss": part.frames_BTCHW.mean() * scale}

    recorder = Rerun([])
    parts = RecordedParts(learn, recorder)
    six = batch(size=6)
    for _ in range(REHEARSALS + 2):
        parts(six.rows(slice(0, 3)), 1.0)
    asked = list(recorder.asked)
    parts(six.rows(slice(3, 6)), 1.0)
    assert recorder.asked == [*asked, "replay"]
    whole = replace(six.rows(slice(0, 3)), share=1.0)
    parts(whole, 1.0)
    assert learned[-1] is whole
    parts(six.rows(slice(0, 3)), 0.5)
    assert recorder.asked == [*asked, "replay"]


def test_terms_outlive_the_next_replay() -> None:
    """The caller adds up terms of several parts."""
    parts = RecordedParts(lambda part, scale: {"loss": part.frames_BTCHW.mean()}, Rerun([]))
    found = [parts(batch(step), 1.0)["loss"] for step in range(1, REHEARSALS + 4)]
    assert found == [batch(step).frames_BTCHW.mean() for step in range(1, REHEARSALS + 4)]


# What may be recorded


class ReadsBack(TorchDispatchMode):
    """Notes operations that wait for values, or bring numbers from the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operation.overloadpacket.__name__
        if name in self.FORBIDDEN:
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_what_is_steady_reads_nothing_back_and_asks_for_no_iteration(
    name: str,
    tiny_config: RunConfig,
    teacher_runs: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Looked at on CPUs only.
    monkeypatch.setattr("tmu_dist.models.rollout._hides_nothing", lambda sampling_mask_BT: False)
    run = built(case_of(tiny_config, name, teacher_runs))
    method, given = run.transfer.method, masked(batch())
    assert (method.unsteady is None) == (name in STEADY)
    if name not in STEADY:
        return

    def total(batch: TrainingBatch) -> torch.Tensor:
        return method.loss(run.trainee, batch).total()

    with ReadsBack() as reads:
        total(given).backward()
    assert not reads.found
    others = [replace(given, step=10_000), replace(given, is_backwards=True)]
    assert all(same_bits(total(given), total(other)) for other in others)


def test_the_watch_notices_what_it_is_for() -> None:
    with ReadsBack() as reads:
        values = torch.tensor([1.0, 2.0])
        float(values.sum())
        values[values > 1]
    assert set(reads.found) >= {"lift_fresh", "_local_scalar_dense"}


@pytest.mark.parametrize(
    ("kl", "is_steady"),
    [
        (KLConfig(), False),
        (KLConfig(weight=0.0), True),
        (KLConfig(anneal_from=0, anneal_until=1), True),
    ],
)
def test_annealed_divergences_are_not_steady(
    kl: KLConfig, is_steady: bool, tiny_config: RunConfig
) -> None:
    training = replace(tiny_config.training, kl=kl)
    config = replace(tiny_config, model=MODELS["savp"], training=training)
    unsteady = outline_method(config, FRAME, ()).unsteady
    assert (unsteady is None) == is_steady
    assert is_steady or "training.kl" in str(unsteady)


def test_a_new_method_is_not_steady_until_it_says_so(tiny_config: RunConfig) -> None:
    class New(Scratch):
        unsteady = Scratch.__mro__[1].unsteady  # type: ignore[attr-defined]

    method = New(outline_method(tiny_config, FRAME, ()).task)
    assert method.unsteady == "New does not say that its loss is the same in every iteration"


def on(config: RunConfig) -> RunConfig:
    return replace(config, compute=ComputeConfig(cuda_graph="on"))


def refusal(config: RunConfig, *, ranks: int = 1) -> str:
    """Why a run on a card is not recorded though it is to be."""
    method = built(replace(config, compute=ComputeConfig())).transfer.method
    assert not uses_graph(config, method, CARD, ranks)
    with pytest.raises(ConfigError, match="compute.cuda_graph=on is not possible") as refused:
        uses_graph(on(config), method, CARD, ranks)
    return str(refused.value)


def test_one_card_and_a_steady_method_are_recorded(tmu_config: RunConfig) -> None:
    method = built(tmu_config).transfer.method
    assert uses_graph(on(tmu_config), method, CARD, 1)
    assert not uses_graph(tmu_config, method, CARD, 1)


def test_what_cannot_be_recorded_is_refused_by_name(
    tiny_config: RunConfig, tmu_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    assert "4 ranks exchange gradients" in refusal(tmu_config, ranks=4)
    flow = case_of(tiny_config, "knowledge_flow", teacher_runs)
    assert "transfer.method=knowledge_flow" in refusal(flow)
    annealed = case_of(tiny_config, "tmu-annealed", teacher_runs)
    assert "transfer.beta_schedule" in refusal(annealed)
    adversarial = replace(tiny_config.training, adversarial=AdversarialConfig(video_weight=0.1))
    assert "training.adversarial" in refusal(replace(tiny_config, training=adversarial))
    placed = replace(tmu_config, placement=PlacementConfig(kind="placed"))
    assert "placement.kind=placed" in refusal(placed)


def test_on_needs_a_card(tmu_config: RunConfig) -> None:
    run = built(tmu_config)
    with pytest.raises(ConfigError, match="computes on cpu, and only CUDA"):
        build_step(
            on(tmu_config), run.transfer.method, run.student, run.trainee, CPU, Collectives()
        )
