"""Learning rates by parameter: who gets which, who is frozen, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import TINY_MODEL
from tests.distributed.test_ranks import spawn
from tests.unit.test_training import assert_same, final_state, run, run_until
from tests.unit.test_transfer import (
    INPUTS,
    batch,
    part_of_batch,
    student_of,
    task,
    teacher,
    tmu_method,
)
from tmu_dist.collectives import Collectives
from tmu_dist.config import AdversarialConfig, ConfigError, RunConfig, TrainingConfig, WindowConfig
from tmu_dist.models.rollout import Predictor
from tmu_dist.training.adversarial import AdversarialStep
from tmu_dist.training.build import build_step
from tmu_dist.training.rates import rate_groups
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.scratch import Scratch

CPU = torch.device("cpu")
WINDOW = WindowConfig(num_input_frames=INPUTS, num_target_frames=3)
RATES = ("stack.*=0.5", "*.gates.*=3", "*.layers.1.*=0")


def factor_of(name: str) -> float:
    """What `RATES` say of a tensor of the tiny network, in words."""
    if ".layers.1." in name:
        return 0.0
    if ".gates." in name:
        return 3.0
    return 0.5 if name.startswith("stack.") else 1.0


class Rated(Scratch):
    """A method with a rate of its own, and one for what is not there."""

    def rates(self) -> Mapping[str, float]:
        return {"output.*": 7.0, "stack.*": 9.0, "mixtures.*": 10.0}


def step_of(
    method: Scratch, student: Predictor, collectives: Collectives | None = None, **training: Any
) -> TrainingStep:
    config = RunConfig(
        window=WINDOW,
        model=TINY_MODEL,
        training=TrainingConfig(num_steps=8, learning_rate=0.01, reverse_input="off", **training),
    )
    return build_step(config, method, student, student, CPU, collectives or Collectives())


def groups_by_name(network: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(p)]: group["factor"] for group in groups for p in group["params"]}


def test_the_last_match_counts_and_the_users_come_last() -> None:
    method = Rated(task())
    student = student_of(method)
    step = step_of(method, student, rates=("output.*=2", *RATES[2:]))
    found = groups_by_name(student, step.optimizer.param_groups)
    assert found == {
        name: 2.0 if name.startswith("output.") else 9.0
        for name, _ in student.named_parameters()
        if ".layers.1." not in name
    }
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {
        n for n, _ in student.named_parameters() if ".layers.1." in n
    }


def test_without_rates_there_is_one_group_of_all_in_order() -> None:
    student = student_of(Scratch(task()))
    (group,) = step_of(Scratch(task()), student).optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, student.parameters()))
    assert group["factor"] == 1.0


def test_every_update_moves_each_tensor_at_its_rate() -> None:
    """Adam in float64, from its equations, over three updates of a falling learning rate."""
    student, reference = (student_of(Scratch(task())).double() for _ in range(2))
    step = step_of(Scratch(task()), student, rates=RATES, decay_from=2)
    given = replace(batch(), frames_BTCHW=batch().frames_BTCHW.double())
    tensors = dict(reference.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in tensors.items()}
    for count, rate in ((1, 0.01), (2, 0.01), (3, 0.01 * 6 / 6), (4, 0.01 * 5 / 6)):
        step(replace(given, step=count))
        for parameter in tensors.values():
            parameter.grad = None
        Scratch(task()).loss(reference, given).total().backward()
        for name, parameter in tensors.items():
            gradient = parameter.grad
            assert gradient is not None
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient.square())
            size = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            parameter.data -= rate * factor_of(name) * size
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, tensors[name], rtol=1e-9, atol=1e-12)
    assert {factor_of(name) for name in tensors} == {0.0, 0.5, 1.0, 3.0}


def test_clipping_asks_only_what_learns() -> None:
    method = Scratch(task())
    student = student_of(method)
    step = step_of(method, student, rates=("output.*=0",), grad_clip_norm=1e-3)
    step(replace(batch(), step=1))
    assert student.output.weight.grad is None  # type: ignore[union-attr]
    norms = [p.grad.norm() for p in student.parameters() if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_frozen_tensors_stay_and_the_run_continues_bit_for_bit(tmu_config: RunConfig) -> None:
    rates = ("stack.layers.0.cell.*=0", "*.transfer.*=2.5")
    config = replace(tmu_config, training=replace(tmu_config.training, rates=rates))
    straight = replace(config, output=config.output + "-straight")
    run(straight)
    run_until(config, 5)
    run(config)
    expected = final_state(straight.output)
    assert_same(final_state(config.output), expected)
    untrained = student_of(tmu_method(1, 2)).state_dict()  # under seed 0, the run's
    moved = {n for n, v in expected["weights"].items() if not torch.equal(v, untrained[n])}
    assert moved == {n for n in untrained if not n.startswith("stack.layers.0.cell.")}
    groups = expected["training_step"]["optimizer"]["param_groups"]
    assert sorted((group["factor"], group["lr"]) for group in groups) == [(1, 1e-3), (2.5, 2.5e-3)]


class Beside(nn.Module):
    """A student, a tensor beside it, and a frozen teacher that must never be trained."""

    def __init__(self, student: Predictor) -> None:
        super().__init__()
        self.source = teacher(1).requires_grad_(False)
        self.student = student
        self.projections = nn.ModuleDict({"layer0_teacher0": nn.Conv2d(4, 2, 1, bias=False)})


def test_the_student_goes_by_its_own_names_and_the_rest_by_the_trainees() -> None:
    student = student_of(Scratch(task()))
    trainee = Beside(student)
    chosen = ("projections.layer0_teacher0.*=4", "output.weight=5", "*.peepholes=0")
    found = groups_by_name(trainee, rate_groups(student, trainee, chosen=chosen))
    assert found == {
        "projections.layer0_teacher0.weight": 4.0,
        "student.output.weight": 5.0,
    } | {
        f"student.{name}": 1.0
        for name, _ in student.named_parameters()
        if name != "output.weight" and "peepholes" not in name
    }
    with pytest.raises(ConfigError, match="'source"):  # frozen by its method, not the user's
        rate_groups(student, trainee, chosen=("source.*=1",))
    with pytest.raises(ConfigError, match="freezes the whole student"):  # the rest is not offered
        rate_groups(student, trainee, chosen=("*=0", "projections.*=1"))


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (("gates=1",), r"training.rates: .*'gates'.*nearest: .*gates\.weight"),
        (("student.output.weight=1",), "nearest: output.weight"),
        (("stack.*",), r"'stack\.\*'.*write PATTERN=FACTOR"),
        (("stack.*=fast",), "fast.*PATTERN=FACTOR"),
        (("stack.*=-1",), "-1.*from 0"),
        (("stack.*=nan",), "nan.*from 0"),
        (("stack.*=inf",), "inf.*from 0"),
        (("=0.5",), "'=0.5'.*PATTERN=FACTOR"),
        (("*=0",), "freezes the whole student.*output.weight a factor above 0"),
    ],
)
def test_rates_that_mean_nothing_are_refused(rates: tuple[str, ...], message: str) -> None:
    method = Scratch(task())
    with pytest.raises(ConfigError, match=message):
        step_of(method, student_of(method), rates=rates)


def test_discriminators_keep_the_rate_of_the_run() -> None:
    method = Scratch(task())
    adversarial = AdversarialConfig(image_weight=0.1, base_channels=2)
    step = step_of(method, student_of(method), rates=("*=0.5",), adversarial=adversarial)
    assert isinstance(step, AdversarialStep)
    step(replace(batch(), step=1))
    assert [g["lr"] for g in step.optimizer.param_groups] == [0.005]
    assert [g["lr"] for g in step.discriminator_optimizer.param_groups] == [0.01]


def _updates(collectives: Collectives, folder: str) -> None:
    """Two iterations in float64 on this rank's half of the sequences."""
    torch.set_default_dtype(torch.float64)
    student = student_of(Scratch(task()))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    step = step_of(Scratch(task()), student, collectives, rates=RATES)
    ranks = collectives.ranks
    for count in (1, 2):
        step(part_of_batch(ranks, count))
    state = {"before": before, "after": dict(student.state_dict())}
    torch.save(state, f"{folder}/{ranks.world_size}-{ranks.rank}.pt")


@pytest.mark.distributed
def test_two_ranks_equal_one_process_with_frozen_and_faster_tensors(tmp_path: Path) -> None:
    for world_size in (1, 2):
        spawn(world_size, _updates, str(tmp_path))
    one, *two = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    for state in two:
        torch.testing.assert_close(state, one, rtol=1e-9, atol=1e-9)
    for name, value in one["before"].items():
        assert torch.equal(two[1]["after"][name], value) == (factor_of(name) == 0)
