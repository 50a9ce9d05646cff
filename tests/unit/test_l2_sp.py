"""L2-SP: the penalty is the paper's, sees what it should, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.test_ranks import spawn
from tests.unit.test_start import SMALLER_PATCHES, start_from
from tests.unit.test_training import MODELS, assert_same, final_state, run, run_until
from tests.unit.test_transfer import FRAME, batch, part_of_batch, student_of, task, teacher
from tmu_dist.collectives import Collectives
from tmu_dist.config import ConfigError, L2SPConfig, RunConfig, TrainingConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.store import load_weights
from tmu_dist.training.build import build_step
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.l2_sp import L2SP, HeldStudent
from tmu_dist.transfer.scratch import Scratch

CPU = torch.device("cpu")
SMALL_PATCH_TASK = replace(task(), model=SMALLER_PATCHES)
"""Of whose network all fits the source but the lowest gates' weights and the output."""
STRANGERS = {"stack.layers.0.cell.gates.weight", "output.weight"}


def method_of(*, partly: bool = False, **settings: Any) -> L2SP:
    """From the weights of teacher 1; `partly`: by a student with other patches."""
    return L2SP(
        SMALL_PATCH_TASK if partly else task(),
        settings=L2SPConfig(**({"alpha": 0.3, "beta": 0.07} | settings)),
        start=start_from(teacher(1), "random"),
    )


def started(method: L2SP) -> tuple[Predictor, nn.Module]:
    """The student with its first weights, and the trainee, as a run makes them."""
    student = student_of(method)
    method.start.apply(student, frozenset(student.state_dict()))
    return student, method.trainee(student)


def moved(student: Predictor) -> None:
    """Weights that are elsewhere than at the start, and no numbers of bfloat16."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.1 * noise.to(parameter))


def half_squares(student: Predictor, names: set[str], points: dict[str, Tensor] | None) -> float:
    """The paper's sums in float64, one tensor after the other."""
    total = 0.0
    for name in names:
        weight = student.state_dict()[name].double()
        point = torch.zeros_like(weight) if points is None else points[name].double()
        total += 0.5 * float(((weight - point) ** 2).sum())
    return total


@pytest.mark.parametrize("partly", [False, True])
def test_terms_are_half_the_squared_distances(partly: bool) -> None:
    method = method_of(partly=partly)
    student, trainee = started(method)
    at_start = method.loss(trainee, batch()).terms
    assert at_start["l2_sp_start"].value.item() == 0.0
    moved(student)
    found = method.loss(trainee, batch())
    strangers = STRANGERS if partly else set()
    names = set(student.state_dict())
    distance = half_squares(student, names - strangers, dict(teacher(1).state_dict()))
    assert distance > 1.0
    assert found.terms["l2_sp_start"].value.item() == pytest.approx(distance, rel=1e-6)
    expected = Scratch(method.task).loss(student, batch()).total().item() + 0.3 * distance
    assert set(found.terms) == {"prediction", "l2_sp_start"} | ({"l2_sp_rest"} if partly else set())
    if partly:
        norm = half_squares(student, strangers, None)
        assert found.terms["l2_sp_rest"].value.item() == pytest.approx(norm, rel=1e-6)
        expected += 0.07 * norm
    assert found.total().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "terms"),
    [
        ({"alpha": 0.0}, {"l2_sp_rest"}),
        ({"beta": 0.0}, {"l2_sp_start"}),
        ({"alpha": 0.0, "beta": 0.0}, set()),
    ],
)
def test_a_term_without_weight_is_not_there(weights: dict[str, float], terms: set[str]) -> None:
    method = method_of(partly=True, **weights)
    student, trainee = started(method)
    assert set(method.loss(trainee, batch()).terms) == {"prediction"} | terms
    assert (trainee is student) == (not terms)


@pytest.mark.parametrize("reverse_input", ["off", "average"])
def test_the_gradient_draws_each_tensor_back_once(reverse_input: str) -> None:
    """One update by plain descent in float64: prediction's gradient plus alpha (w - w0)."""
    method = method_of(partly=True)
    student, trainee = started(method)
    student.double()
    moved(student)
    given = replace(batch(), frames_BTCHW=batch().frames_BTCHW.double(), step=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    passes = [given]
    if reverse_input == "average":
        passes.append(replace(given, frames_BTCHW=given.frames_BTCHW.flip(1)))
    named = dict(student.named_parameters())
    losses = [Scratch(method.task).loss(student, each).total() for each in passes]
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(named.values()))  # type: ignore[arg-type]
    source = teacher(1).state_dict()

    step = TrainingStep(
        method,
        student,
        trainee,
        trainee,
        device=CPU,
        learning_rate=lambda step: 0.1,
        reverse_input=reverse_input,  # type: ignore[arg-type]
    )
    step.optimizer = torch.optim.SGD(trainee.parameters())  # type: ignore[assignment]
    step(given)
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        pull = 0.07 * before[name]
        if name not in STRANGERS:
            pull = 0.3 * (before[name] - source[name].double())
        expected = before[name] - 0.1 * (gradient + pull)
        torch.testing.assert_close(parameter.data, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", ["convlstm", "e3d_lstm", "e3d_openstl", "savp", "vpn"])
def test_weights_are_the_convolutions_and_linear_layers(cell: str) -> None:
    """Found by kind of module here; by name and axes there."""
    model = MODELS.get(cell) or replace(task().model, cell=cell)
    torch.manual_seed(1)
    source = build_predictor(FRAME, model)
    method = L2SP(
        replace(task(), model=model),
        settings=L2SPConfig(include="weights"),
        start=start_from(source),
    )
    student, trainee = started(method)
    norms = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase)
    weights = {
        f"{name}.weight"
        for name, module in student.named_modules()
        if hasattr(module, "weight") and not isinstance(module, norms)
    }
    left_out = {name for name, _ in student.named_parameters()} - weights
    assert weights and left_out
    moved(student)
    assert isinstance(trainee, HeldStudent)
    found = {id(p) for p in trainee._parameters_of["l2_sp_start"]}
    assert found == {id(p) for n, p in student.named_parameters() if n in weights}


def test_excluded_tensors_are_free() -> None:
    method = method_of(exclude=("*.layers.0.*", "output.weight"))
    student, trainee = started(method)
    moved(student)
    kept = {n for n in student.state_dict() if ".layers.1." in n}
    distance = half_squares(student, kept, dict(teacher(1).state_dict()))
    terms = method.loss(trainee, batch()).terms
    assert terms["l2_sp_start"].value.item() == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ("gates",)}, r"transfer.l2_sp.exclude: .*'gates'.*nearest: .*gates\.weight"),
        ({"exclude": ("*",)}, "leave out every parameter.*alpha=0.3 has no effect"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        started(method_of(**settings))


def test_penalties_are_float32_under_autocast() -> None:
    method = method_of(partly=True)
    student, trainee = started(method)
    moved(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method.loss(trainee, batch()).terms
    names = set(student.state_dict())
    for term, expected in (
        ("l2_sp_start", half_squares(student, names - STRANGERS, dict(teacher(1).state_dict()))),
        ("l2_sp_rest", half_squares(student, STRANGERS, None)),
    ):
        assert terms[term].value.dtype == torch.float32
        assert terms[term].value.item() == pytest.approx(expected, rel=1e-6)


def l2_sp_run(config: RunConfig, source: str, name: str, **settings: Any) -> RunConfig:
    transfer = replace(
        config.transfer, method="l2_sp", teachers=(source,), l2_sp=L2SPConfig(**settings)
    )
    return replace(config, output=f"{config.output}-{name}", transfer=transfer)


def test_without_weights_it_is_finetuning_bit_for_bit(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    source = teacher_runs[0]
    finetune = replace(tiny_config.transfer, method="finetune", teachers=(source,))
    finetuned = replace(tiny_config, transfer=finetune)
    free = l2_sp_run(tiny_config, source, "free", alpha=0.0, beta=0.0)
    held = l2_sp_run(tiny_config, source, "held", alpha=10.0)
    for config in (finetuned, free, held):
        run(config)
    assert_same(final_state(free.output), final_state(finetuned.output))

    start = load_weights(source)[1]
    distances = {
        config.output: sum(
            float((value.double() - start[name].double()).square().sum())
            for name, value in final_state(config.output)["weights"].items()
        )
        for config in (free, held)
    }
    assert 0 < distances[held.output] < 0.5 * distances[free.output]


def test_a_run_is_held_to_the_teacher_also_when_it_continues(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    straight = l2_sp_run(tiny_config, teacher_runs[0], "straight", alpha=1.0)
    stopped = l2_sp_run(tiny_config, teacher_runs[0], "stopped", alpha=1.0)
    run(straight)
    run_until(stopped, 5)
    run(stopped)
    assert_same(final_state(stopped.output), final_state(straight.output))
    assert final_state(stopped.output)["training_step"]["trainee"] == {}
    card, weights = load_weights(stopped.output)
    assert weights.keys() == load_weights(teacher_runs[0])[1].keys()
    assert card.teacher_parameters == () and card.auxiliary_parameters == 0
    losses = [e for e in read_log(stopped.output) if e["event"] == "train"]
    assert all(e["loss/l2_sp_start"] > 0 for e in losses)
    for event in losses:
        whole = event["loss/prediction"] + event["loss/l2_sp_start"]
        assert event["loss/total"] == pytest.approx(whole, rel=1e-5)


def _updates(collectives: Collectives, folder: str) -> None:
    """Two iterations in float64 on this rank's half of the sequences."""
    torch.set_default_dtype(torch.float64)
    method = method_of(partly=True)
    student, trainee = started(method)
    config = RunConfig(training=TrainingConfig(learning_rate=0.01, reverse_input="average"))
    step = build_step(config, method, student, trainee, CPU, collectives)
    ranks = collectives.ranks
    for count in (1, 2):
        terms = step(part_of_batch(ranks, count))
    kept = {name: terms[f"loss/{name}"] for name in ("l2_sp_start", "l2_sp_rest")}
    state = {"student": student.state_dict(), "terms": kept, "step": step.state_dict()}
    torch.save(state, f"{folder}/{ranks.world_size}-{ranks.rank}.pt")


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    for world_size in (1, 2):
        spawn(world_size, _updates, str(tmp_path))
    one, *two = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert one["terms"]["l2_sp_start"] > 0 and one["terms"]["l2_sp_rest"] > 0
    for state in two:
        torch.testing.assert_close(state, one, rtol=1e-9, atol=1e-9)
