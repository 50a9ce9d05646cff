"""Plain distillation: features, responses, and neither.

Legend: B batch, T time, P, Q channels of student and teacher, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TINY_MODEL
from tests.unit.test_adapters import (
    ANY,
    E3D,
    PREDRNN,
    RGB,
    VPN,
    card_of,
    network_of,
    plan_of,
)
from tests.unit.test_masks import masked_batch
from tests.unit.test_training import assert_same, final_state, run, run_until
from tests.unit.test_transfer import FRAME, INPUTS, batch, student_of, task
from tmu_dist.config import (
    AdapterConfig,
    ConfigError,
    DistillationConfig,
    ImitationConfig,
    ModelConfig,
    RunConfig,
    TMUConfig,
)
from tmu_dist.models.build import count_parameters
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, Shown, Teaching
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import load_weights
from tmu_dist.transfer.base import (
    DeadDistillationError,
    Objective,
    Reduction,
    TrainingBatch,
)
from tmu_dist.transfer.distillation import Distillation, DistillationLiveness, RegressedStudent
from tmu_dist.transfer.scratch import Scratch

SAME = (card_of(FRAME, TINY_MODEL),) * 2
WIDE = card_of(FRAME, replace(TINY_MODEL, hidden_channels=6))


class NoBank(ReplicatedBank):
    """Whose teachers must not be run."""

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        raise AssertionError("The teachers were run.")


def method_of(
    cards: Sequence[TeacherCard] = SAME,
    *,
    model: ModelConfig = TINY_MODEL,
    seeds: Sequence[int] = (1, 2),
    imitation: ImitationConfig | None = None,
    reduction: Reduction = "mean",
    bank: type[ReplicatedBank] = ReplicatedBank,
    teacher_input: Any = "own",
    double: bool = False,
    **settings: Any,
) -> Distillation:
    chosen = DistillationConfig(**settings)
    wanted: list[Any] = [chosen.state] if chosen.features else []
    wanted += ["predictions"] if chosen.responses else []
    teachers = [
        FrozenTeacher(network_of(card, seed), plan_of(card, ANY, model), wanted)
        for card, seed in zip(cards, seeds, strict=False)
    ]
    return Distillation(
        replace(
            task(reduction),
            model=model,
            objective=Objective("likelihood" if model == VPN else "l2", reduction=reduction),
        ),
        settings=chosen,
        imitation=imitation or ImitationConfig(),
        bank=bank([each.double() if double else each for each in teachers]),
        teacher_input=teacher_input,
    )


def trainee_of(method: Distillation) -> nn.Module:
    torch.manual_seed(0)
    return method.trainee(method.build_student())


def rollout_of(network: Predictor, given: TrainingBatch) -> Rollout:
    return network(
        given.frames_BTCHW,
        num_input_frames=INPUTS,
        num_frames=6,
        sampling_mask_BT=given.sampling_mask_BT,
    )


def in_double(given: TrainingBatch) -> TrainingBatch:
    return replace(
        given, frames_BTCHW=given.frames_BTCHW.double(), weights_B=given.weights_B.double()
    )


def average(
    squares_BTCHW: Tensor, counts_BTCHW: Tensor, given: TrainingBatch, reduction: Reduction
) -> float:
    """Mean, or sum, of what counts in each sequence, averaged over sequences one by one."""
    total = 0.0
    for squares, counts, weight in zip(squares_BTCHW, counts_BTCHW, given.weights_B, strict=True):
        counts = counts.expand_as(squares)
        value = float((squares * counts).sum())
        if reduction == "mean":
            value = value / float(counts.sum()) if counts.any() else 0.0
        total += value * float(weight)
    return total


# The two terms


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("state", ["hidden", "memory"])
@pytest.mark.parametrize("masked", [False, True])
def test_features_are_distances_of_regressed_states(
    reduction: Reduction, state: Any, masked: bool
) -> None:
    """Written out for a teacher like the student and one of other channels."""
    cards, weights = (SAME[0], WIDE), (0.5, 2.0)
    imitation = ImitationConfig(layers=(1,), teacher_weights=weights)
    method = method_of(
        cards, state=state, imitation=imitation, reduction=reduction, features=0.3, double=True
    )
    trainee = trainee_of(method).double()
    assert isinstance(trainee, RegressedStudent)
    given = in_double(masked_batch() if masked else batch())
    own = rollout_of(trainee.student, given)
    counts = torch.ones(len(given.weights_B), 5, 1, 4, 4).double()
    if given.observed_BTCHW is not None:
        patches = given.observed_BTCHW[:, :-1].double().unflatten(4, (4, 4)).unflatten(3, (4, 4))
        counts = patches.mean((4, 6))
        assert len(counts.unique()) > 2
    expected = 0.0
    for m, card in enumerate(cards):
        weight_QP = trainee.regressors[f"layer1_teacher{m}"].weight[:, :, 0, 0]
        regressed = torch.einsum("btphw,qp->btqhw", own.states(state)[1], weight_QP)
        theirs = rollout_of(network_of(card, m + 1).double(), given).states(state)[1]
        squares = (regressed - theirs).detach() ** 2
        expected += weights[m] * average(squares, counts, given, reduction)
    terms = method.loss(trainee, given)
    value, weight = terms.terms["features"]
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert weight == 0.3 and set(terms.terms) == {"prediction", "features"}
    total = terms.terms["prediction"].value.item() + 0.3 * expected
    assert terms.total().item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_responses_are_distances_of_predictions(reduction: Reduction, masked: bool) -> None:
    weights = (0.5, 2.0)
    # How features are masked is no matter of the responses.
    imitation = ImitationConfig(teacher_weights=weights, masking="off")
    method = method_of(
        features=0.0, responses=0.7, imitation=imitation, reduction=reduction, double=True
    )
    trainee = trainee_of(method).double()
    assert isinstance(trainee, Predictor)
    given = in_double(masked_batch() if masked else batch())
    own = rollout_of(trainee, given).predictions_BTCHW
    counts = torch.ones_like(own)
    if given.observed_BTCHW is not None:
        counts = given.observed_BTCHW[:, 1:].double()
    expected = 0.0
    for m, weight in enumerate(weights):
        theirs = rollout_of(network_of(SAME[m], m + 1).double(), given).predictions_BTCHW
        expected += weight * average((own - theirs).detach() ** 2, counts, given, reduction)
    terms = method.loss(trainee, given)
    value, weight = terms.terms["responses"]
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert weight == 0.7 and set(terms.terms) == {"prediction", "responses"}
    (gradient,) = torch.autograd.grad(value, terms.rollout.predictions_BTCHW)
    if masked:
        assert torch.equal(gradient != 0, counts > 0)


def test_both_terms_together_and_teachers_that_matter() -> None:
    gradients = []
    for seeds in ((1, 2), (1, 3)):
        method = method_of(seeds=seeds, responses=0.5)
        trainee = trainee_of(method)
        terms = method.loss(trainee, batch())
        assert set(terms.terms) == {"prediction", "features", "responses"}
        terms.total().backward()
        gradients.append({name: p.grad for name, p in trainee.named_parameters()})
        assert all(grad is not None and grad.any() for grad in gradients[-1].values())
    different = {name for name, g in gradients[0].items() if not torch.equal(g, gradients[1][name])}
    assert "student.stack.layers.0.cell.gates.weight" in different
    assert "regressors.layer0_teacher0.weight" not in different


def test_a_teacher_of_weight_0_says_nothing_and_its_regressors_have_gradients() -> None:
    found = []
    for last in (2, 3):
        imitation = ImitationConfig(teacher_weights=(1.0, 0.0))
        method = method_of(seeds=(1, last), responses=0.5, imitation=imitation)
        trainee = trainee_of(method)
        method.loss(trainee, batch()).total().backward()
        found.append({name: p.grad for name, p in trainee.named_parameters()})
    assert_same(*found)
    assert not found[0]["regressors.layer1_teacher1.weight"].any()


def test_what_teachers_read_is_a_choice() -> None:
    values = {
        choice: method.loss(trainee_of(method), batch()).terms["features"].value.item()
        for choice in ("own", "student", "truth")
        for method in [method_of(teacher_input=choice)]
    }
    assert len(set(values.values())) == 3


# Neither


def test_without_weights_it_is_training_from_scratch_bit_for_bit() -> None:
    alone = Scratch(task(), tmu=TMUConfig(), num_slots=0)
    weights = []
    for method in (method_of(features=0.0, bank=NoBank), alone):
        torch.manual_seed(0)
        trainee = method.trainee(method.build_student())
        optimizer = torch.optim.Adam(trainee.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            terms = method.loss(trainee, batch())
            assert set(terms.terms) == {"prediction"}
            terms.total().backward()
            optimizer.step()
        assert method.liveness(trainee, batch()) is None
        weights.append(dict(trainee.state_dict()))
    assert_same(*weights)


def test_regressors_stand_beside_a_plain_student() -> None:
    method = method_of((SAME[0], WIDE))
    trainee = trainee_of(method)
    assert isinstance(trainee, RegressedStudent)
    torch.manual_seed(0)
    plain = network_of(SAME[0], 0)
    assert_same(dict(trainee.student.state_dict()), dict(plain.state_dict()))
    assert method.plain_part(trainee.student) is trainee.student
    shapes = {name: tuple(p.shape) for name, p in trainee.regressors.named_parameters()}
    assert shapes == {
        f"layer{k}_teacher{m}.weight": (channels, 4, 1, 1)
        for k in range(2)
        for m, channels in enumerate((4, 6))
    }
    assert count_parameters(trainee) == count_parameters(plain) + 2 * (4 * 4 + 6 * 4)
    one = method_of(imitation=ImitationConfig(layers=(1,)))
    only = trainee_of(one)
    assert isinstance(only, RegressedStudent)
    assert list(only.regressors) == ["layer1_teacher0", "layer1_teacher1"]


def test_features_draw_a_student_to_its_teachers() -> None:
    method = method_of(features=1.0)
    trainee = trainee_of(method)
    optimizer = torch.optim.Adam(trainee.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        distance = method.loss(trainee, batch()).terms["features"].value
        distance.backward()
        optimizer.step()
        losses.append(distance.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("model", [TINY_MODEL, PREDRNN, E3D, VPN], ids=lambda model: model.cell)
@pytest.mark.parametrize("state", ["hidden", "memory"])
def test_teachers_of_other_kinds(model: ModelConfig, state: Any) -> None:
    cards = [
        card_of(RGB, replace(PREDRNN, hidden_channels=3)),
        card_of(FRAME, replace(E3D, num_layers=3)),
    ]
    method = method_of(cards, model=model, state=state)
    trainee = trainee_of(method)
    method.loss(trainee, batch()).total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainee.parameters())
    report = method.liveness(trainee, batch())
    assert report is not None and report.teaching_gradient_norm > 0


# What is refused


def test_responses_of_other_frames_are_refused() -> None:
    cards = [SAME[0], card_of(RGB, TINY_MODEL)]
    with pytest.raises(ConfigError, match=r"teachers \[1\].*transfer.adapter.frames=resize"):
        method_of(cards, responses=0.1)
    method_of(cards)  # features alone may differ


def test_responses_of_a_likelihood_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.cell=vpn has no differentiable forecasts"):
        method_of([card_of(FRAME, VPN)], model=VPN, responses=0.1)


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[5\] are no layers"):
        method_of(imitation=ImitationConfig(layers=(5,)))


# Liveness


def test_liveness_is_the_gradient_of_what_teachers_say() -> None:
    given = masked_batch()
    method = method_of((SAME[0], WIDE), features=0.3, responses=0.0)
    both = method_of(features=0.3, responses=0.2)
    for each in (method, both):
        trainee = trainee_of(each)
        assert isinstance(trainee, RegressedStudent)
        terms = each.loss(trainee, given).terms
        teaching = sum(
            term.weight * term.value for name, term in terms.items() if name != "prediction"
        )
        of_student = list(trainee.student.parameters())
        found = torch.autograd.grad(teaching, of_student, allow_unused=True)  # type: ignore[arg-type]
        norm = torch.cat([g.flatten() for g in found if g is not None]).norm()
        report = each.liveness(trainee, given)
        assert isinstance(report, DistillationLiveness)
        assert report.teaching_gradient_norm == pytest.approx(norm.item(), rel=1e-5)
        assert [len(layer) for layer in report.feature_correlation] == [2, 2]
        assert all(-1 <= c <= 1 for layer in report.feature_correlation for c in layer)
        assert all(p.grad is None for p in trainee.parameters())
    assert len(report.response_correlation) == 2


def test_a_correlation_is_of_observed_pixels_alone() -> None:
    given = masked_batch()
    assert given.observed_BTCHW is not None
    method = method_of(features=0.0, responses=0.2)
    student = trainee_of(method)
    report = method.liveness(student, given)
    assert isinstance(report, DistillationLiveness) and report.feature_correlation == []
    seen = given.observed_BTCHW[:, 1:]
    theirs = rollout_of(network_of(SAME[1], 2), given).predictions_BTCHW[seen]
    own = rollout_of(student_of(method), given).predictions_BTCHW[seen]  # type: ignore[arg-type]
    expected = torch.corrcoef(torch.stack([own, theirs]).detach().double())[0, 1]
    assert report.response_correlation[1] == pytest.approx(expected.item(), rel=1e-5)


def only_frames(place: slice) -> Callable[[TrainingBatch], TrainingBatch]:
    def masked(given: TrainingBatch) -> TrainingBatch:
        observed = torch.zeros_like(given.frames_BTCHW, dtype=torch.bool)
        observed[:, place] = True
        frames = given.frames_BTCHW * observed
        return replace(given, frames_BTCHW=frames, observed_BTCHW=observed)

    return masked


def test_a_batch_that_teaches_nothing_is_passed_over() -> None:
    first, last = only_frames(slice(0, 1))(batch()), only_frames(slice(5, 6))(batch())
    for settings, silent, loud in (
        ({"features": 0.1}, last, first),
        ({"features": 0.0, "responses": 0.1}, first, last),
    ):
        method = method_of(**settings)
        trainee = trainee_of(method)
        assert method.liveness(trainee, silent) is None
        report = method.liveness(trainee, loud)
        assert report is not None and report.teaching_gradient_norm > 0


def test_dead_distillation_is_an_error() -> None:
    method = method_of()
    trainee = trainee_of(method)
    assert isinstance(trainee, RegressedStudent)
    for weight in trainee.regressors.parameters():
        nn.init.zeros_(weight)
    with pytest.raises(DeadDistillationError, match=r"distillation.features=0.1 or responses=0"):
        method.liveness(trainee, batch())


# Whole runs


def test_a_run_is_scratch_without_weights_and_continues_bit_for_bit_with_them(
    tiny_config: RunConfig, teacher_runs: tuple[str, str]
) -> None:
    def config(name: str, model: ModelConfig = TINY_MODEL, **settings: Any) -> RunConfig:
        transfer = replace(
            tiny_config.transfer,
            method="distillation",
            teachers=teacher_runs,
            distillation=DistillationConfig(**settings),
            adapter=ANY if model != TINY_MODEL else AdapterConfig(),
        )
        training = replace(tiny_config.training, num_steps=4)
        output = f"{tiny_config.output}-{name}"
        return replace(
            tiny_config, output=output, model=model, transfer=transfer, training=training
        )

    off = config("off", features=0.0)
    scratch = replace(off, output=off.output + "-scratch", transfer=tiny_config.transfer)
    states = [final_state(run(each).run)["weights"] for each in (off, scratch)]
    assert_same(*states)

    small = replace(TINY_MODEL, hidden_channels=3, num_layers=3)
    straight = run(config("straight", small, responses=0.1))
    stopped = config("stopped", small, responses=0.1)
    run_until(stopped, 3)
    result = run(stopped)
    assert_same(final_state(straight.run), final_state(result.run))
    card, weights = load_weights(result.run)
    assert not any("regressor" in name for name in weights)
    assert card.auxiliary_parameters == 2 * 3 * 3 * 4
    liveness = [e for e in read_log(Path(result.run)) if e["event"] == "liveness"]
    assert liveness and all(e["teaching_gradient_norm"] > 0 for e in liveness)
    assert len(liveness[0]["response_correlation"]) == 2
