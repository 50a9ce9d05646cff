"""Knowledge Flow: what flows, how it dries up, and that nothing of it stays in the student.

Legend: B batch, T time, C channels, P hidden channels, H, W height, width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import TINY_MODEL
from tests.unit.test_adapters import (
    ANY,
    E3D,
    MIM,
    PREDRNN,
    RGB,
    SAVP,
    VPN,
    card_of,
    network_of,
    plan_of,
)
from tests.unit.test_masks import masked_batch
from tests.unit.test_training import CPU, assert_same, final_state, run, run_until
from tests.unit.test_transfer import FRAME, INPUTS, batch
from tmu_dist.config import (
    AdapterConfig,
    ConfigError,
    KnowledgeFlowConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TransferConfig,
)
from tmu_dist.models.build import build_predictor, count_trained, skeleton
from tmu_dist.models.rollout import Rollout
from tmu_dist.models.shapes import FrameShape
from tmu_dist.models.stack import StackedPredictor
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, Shown, Teaching
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import load_weights
from tmu_dist.training.rates import rate_groups
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import DeadDistillationError, Objective, Task, TrainingBatch
from tmu_dist.transfer.knowledge_flow import FlowingStudent, KnowledgeFlow, KnowledgeFlowLiveness
from tmu_dist.transfer.scratch import Scratch

SAME = card_of(FRAME, TINY_MODEL)
WIDER = card_of(FRAME, replace(TINY_MODEL, hidden_channels=6))
STEPS = 10


def task_of(model: ModelConfig = TINY_MODEL) -> Task:
    objective = Objective("likelihood" if model == VPN else "l2")
    return Task(frame=FRAME, model=model, objective=objective, num_input_frames=INPUTS)


def flow_method(
    *teachers: TeacherCard,
    model: ModelConfig = TINY_MODEL,
    seeds: Sequence[int] = range(1, 9),
    adapter: AdapterConfig = ANY,
    num_steps: int = STEPS,
    **settings: Any,
) -> KnowledgeFlow:
    frozen = [
        FrozenTeacher(network_of(card, seed), plan_of(card, adapter, model), ("hidden",))
        for card, seed in zip(teachers, seeds, strict=False)
    ]
    return KnowledgeFlow(
        task_of(model),
        settings=KnowledgeFlowConfig(**settings),
        num_steps=num_steps,
        bank=ReplicatedBank(frozen),
        teacher_input="own",
    )


def trainee_of(method: KnowledgeFlow) -> FlowingStudent:
    torch.manual_seed(0)
    trainee = method.trainee(method.build_student())
    assert isinstance(trainee, FlowingStudent)
    return trainee


def disturbed(trainee: FlowingStudent, seed: int = 7) -> FlowingStudent:
    """With mixtures and transforms that are neither equal nor the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainee.flows.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return trainee


def double(
    method: KnowledgeFlow, given: TrainingBatch | None = None
) -> tuple[FlowingStudent, TrainingBatch]:
    """Everything in float64, so that references agree to the last digits."""
    for teacher in method.bank.own:
        teacher.double()
    given = given or batch()
    return disturbed(trainee_of(method).double()), replace(
        given, frames_BTCHW=given.frames_BTCHW.double(), weights_B=given.weights_B.double()
    )


def step_of(
    method: KnowledgeFlow | Scratch,
    student: torch.nn.Module,
    trainee: torch.nn.Module,
    **settings: Any,
) -> TrainingStep:
    chosen: dict[str, Any] = {"reverse_input": "update", "grad_clip_norm": 0.1, **settings}
    groups = rate_groups(student, trainee, of_method=method.rates())  # type: ignore[arg-type]
    return TrainingStep(
        method,
        student,  # type: ignore[arg-type]
        trainee,
        trainee,
        device=CPU,
        learning_rate=lambda step: 1e-2,
        groups=groups,
        **chosen,
    )


# References


def reference_rollout(
    trainee: FlowingStudent, teachings: Sequence[Teaching], read: Tensor, choice: str
) -> Tensor:
    """Predictions of a plain ConvLSTM stack between whose layers F flows, written out."""
    student, flows = trainee.student, trainee.flows
    assert isinstance(student, StackedPredictor)
    layers, output = student.stack.layers, student.output
    assert isinstance(output, torch.nn.Conv2d)
    found, states = [], list(student.initial_state(read[:, 0], num_input_frames=1).stack.layers)
    for t in range(read.shape[1]):
        x = student._patches(read[:, t])
        for k, layer in enumerate(layers):
            step = layer(x, states[k], None)
            states[k] = step.state
            weights = flows.mixtures[k].exp()
            x = weights[0] * step.state.hidden_BPHW
            candidates = [
                (m, j)
                for m in range(len(teachings))
                for j in (range(len(layers)) if choice == "all" else [k])
            ]
            for weight, (m, j) in zip(weights[1:], candidates, strict=True):
                filters = flows.transforms[f"layer{k}_teacher{m}_layer{j}"]
                hidden = teachings[m].states["hidden"][j][:, t]
                size = filters.shape[-1]
                columns = torch.nn.functional.unfold(hidden, size, padding=size // 2)
                moved = torch.einsum("pq,bql->bpl", filters.flatten(1), columns)
                x = x + weight * moved.unflatten(2, hidden.shape[2:])
            x = x / weights.sum()
        patches = torch.einsum("cp,bphw->bchw", output.weight[:, :, 0, 0], x)
        found.append(patches.reshape(-1, 4, 4, 4, 4).permute(0, 3, 1, 4, 2).reshape(-1, 1, 16, 16))
    return torch.stack(found, 1)


@pytest.mark.parametrize("choice", ["same", "all"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_layers_read_the_mixture_and_remember_their_own_state(
    choice: str, kernel_size: int
) -> None:
    method = flow_method(SAME, WIDER, candidates=choice, kernel_size=kernel_size)
    trainee, given = double(method)
    given = replace(given, sampling_mask_BT=torch.ones_like(given.sampling_mask_BT))
    teachings = method.teach(given)
    predictions = [
        method.unroll(trainee, given, teachings=teachings).predictions_BTCHW,
        reference_rollout(trainee, teachings, given.frames_BTCHW[:, :-1], choice),
    ]
    torch.testing.assert_close(*predictions, rtol=1e-11, atol=1e-12)
    parameters = [*trainee.flows.parameters(), *trainee.student.parameters()]
    gradients = [torch.autograd.grad(each.square().sum(), parameters) for each in predictions]
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    alone = method.unroll(trainee, given)
    assert not torch.allclose(predictions[0], alone.predictions_BTCHW, rtol=1e-2)


def test_the_first_mixture_is_uniform_and_the_first_transform_changes_nothing() -> None:
    flows = trainee_of(flow_method(SAME, WIDER, kernel_size=3)).flows
    assert flows.own_shares() == pytest.approx([1 / 3, 1 / 3])
    assert flows.dependence().item() == pytest.approx(math.log(3))
    maps = torch.randn(1, 4, 5, 5)
    same = torch.nn.functional.conv2d(maps, flows.transforms["layer1_teacher0_layer1"], padding=1)
    assert torch.equal(same, maps)
    assert flows.transforms["layer1_teacher1_layer1"].shape == (4, 6, 3, 3)


@pytest.mark.parametrize("masked", [False, True])
def test_the_objective_written_out(masked: bool) -> None:
    method = flow_method(SAME, WIDER, independence=0.5, ramp_fraction=0.8, consistency=0.3)
    trainee, given = double(method, masked_batch() if masked else None)
    given = replace(given, step=2)
    teachings = method.teach(given)
    last = disturbed(copy.deepcopy(trainee), seed=8)
    with torch.no_grad():
        for parameter in last.student.parameters():
            parameter.mul_(1.3)
    assert trainee.last is not None
    trainee.last.load_state_dict(last._now().state_dict())

    terms = method.loss(trainee, given)
    frames = [
        method.unroll(each, given, teachings=teachings).predictions_BTCHW
        for each in (trainee, last)
    ]
    observed = torch.ones_like(frames[0])
    if given.observed_BTCHW is not None:
        observed = given.observed_BTCHW[:, 1:].double()

    def mean_square(difference: Tensor) -> float:
        """Over what was observed of each sequence, then over sequences."""
        each = (difference.square() * observed).flatten(1).sum(1) / observed.flatten(1).sum(
            1
        ).clamp(min=1)
        return (each * given.weights_B).sum().item()

    shares = [
        math.exp(w[0]) / sum(map(math.exp, w)) for w in (m.tolist() for m in trainee.flows.mixtures)
    ]
    prediction = mean_square(frames[0] - given.frames_BTCHW[:, 1:])
    independence = -sum(math.log(share) for share in shares) / 2
    consistency = mean_square(frames[0] - frames[1]) / 2
    found = {name: term.value.item() for name, term in terms.terms.items()}
    assert found == pytest.approx(
        {"prediction": prediction, "independence": independence, "consistency": consistency},
        rel=1e-12,
    )
    expected = prediction + 0.5 * 2 / 8 * independence + 0.3 * consistency
    assert terms.total().item() == pytest.approx(expected, rel=1e-12)


def test_the_last_iterate_is_the_one_before_the_last_update() -> None:
    method = flow_method(SAME, consistency=0.3)
    trainee = trainee_of(method)
    assert trainee.last is not None
    step = step_of(method, trainee.student, trainee, reverse_input="off")
    for number in (1, 2, 3):
        before = copy.deepcopy(trainee._now().state_dict())
        loss = step(replace(batch(), step=number))["loss/consistency"]
        assert (loss > 0) is (number > 1)
        assert_same(dict(trainee.last.state_dict()), dict(before))
    # Looking does not count as an update.
    remembered = copy.deepcopy(trainee.last.state_dict())
    assert method.liveness(trainee, batch()) is not None
    assert_same(dict(trainee.last.state_dict()), dict(remembered))


@pytest.mark.parametrize(
    ("candidates", "kernel_size", "count"),
    [("same", 1, 3_004_428), ("all", 1, 3_102_756), ("same", 3, 3_266_572), ("all", 3, 4_151_332)],
)
def test_parameters_beside_table_1(candidates: str, kernel_size: int, count: int) -> None:
    frame = FrameShape(channels=1, height=64, width=64)
    model = ModelConfig(peephole="none")
    method = KnowledgeFlow(
        replace(task_of(model), frame=frame),
        settings=KnowledgeFlowConfig(candidates=candidates, kernel_size=kernel_size),  # type: ignore[arg-type]
        num_steps=1_000,
        bank=ReplicatedBank([FrozenTeacher(skeleton(frame, model)) for _ in range(2)]),
        teacher_input="own",
    )
    assert count_trained(method.trainee(method.build_student())) == count
    assert method.bank.parameters_per_teacher == (2_971_648, 2_971_648)


# The curriculum


class _Counting(ReplicatedBank):
    """Counts how often teachers are run."""

    asked = 0

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        self.asked += 1
        return super().teach(shown)


def test_independence_rises_and_then_the_student_is_alone() -> None:
    method = flow_method(SAME, num_steps=100)
    method.bank = bank = _Counting(method.bank.own)
    trainee = disturbed(trainee_of(method))
    weights, asked = {}, {}
    for step in (1, 30, 60, 61, 90, 91, 100):
        given = replace(batch(), step=step)
        terms = method.loss(trainee, given)
        weights[step], asked[step] = terms.terms["independence"].weight, bank.asked
        if step > 90:
            assert terms.terms["independence"].value.item() == 0
            alone = Scratch(task_of()).loss(trainee.student, given)
            assert torch.equal(terms.total(), alone.total())
            assert method.liveness(trainee, given) is None
    assert weights == pytest.approx(
        {1: 0.05 / 60, 30: 0.025, 60: 0.05, 61: 0.05, 90: 0.05, 91: 0.05, 100: 0.05}
    )
    assert asked == {1: 1, 30: 2, 60: 3, 61: 4, 90: 5, 91: 5, 100: 5}


@pytest.mark.parametrize("step", [1, 10])
@pytest.mark.parametrize("independence", [0.0, 0.05])
def test_every_parameter_has_a_gradient_in_every_phase(step: int, independence: float) -> None:
    method = flow_method(SAME, WIDER, independence=independence, consistency=0.1)
    trainee = trainee_of(method)
    method.loss(trainee, replace(batch(), step=step)).total().backward()
    gradients = {
        name: p.grad for name, p in trainee.named_parameters() if not name.startswith("last.")
    }
    assert all(gradient is not None for gradient in gradients.values())
    flowing = [
        float(g.abs().sum())
        for n, g in gradients.items()
        if n.startswith("flows.")
        if g is not None
    ]
    assert all(flowing) if step == 1 else not any(flowing)
    assert all(p.grad is None and not p.requires_grad for p in trainee.last.parameters())  # type: ignore[union-attr]


def test_always_alone_equals_scratch_bit_for_bit() -> None:
    states = []
    methods = (flow_method(SAME, alone_fraction=1.0, consistency=0.1), Scratch(task_of()))
    for method in methods:
        torch.manual_seed(0)
        student = method.build_student()
        step = step_of(method, student, method.trainee(student))
        for number in range(4):
            step(replace(batch(), step=number))
        states.append({"student": dict(student.state_dict()), **step.state_dict()})
    assert_same(*states)


def test_a_layer_of_its_own_share_alone_equals_the_plain_network_bit_for_bit() -> None:
    method = flow_method(SAME, WIDER)
    trainee = trainee_of(method)
    with torch.no_grad():
        for mixture in trainee.flows.mixtures:
            mixture[0] = 200.0
    rollouts = [
        method.unroll(trainee, batch(), teachings=method.teach(batch())),
        method.unroll(trainee.student, batch()),
    ]
    assert torch.equal(*(each.predictions_BTCHW for each in rollouts))
    # Nothing flows any more because nothing should.
    report = method.liveness(trainee, batch())
    assert report is not None and report.teaching_gradient_norm == 0


def test_mixtures_learn_faster() -> None:
    method = flow_method(SAME, mixture_rate=7.0)
    trainee = trainee_of(method)
    groups = rate_groups(trainee.student, trainee, of_method=method.rates())
    fast = {id(p) for group in groups if group["factor"] == 7.0 for p in group["params"]}
    assert fast == {id(p) for p in trainee.flows.mixtures}


def test_the_curriculum_makes_the_student_independent() -> None:
    method = flow_method(SAME, independence=1.0, mixture_rate=30.0)
    trainee = trainee_of(method)
    step = step_of(method, trainee.student, trainee)
    before = min(trainee.flows.own_shares())
    for number in range(1, 10):
        step(replace(batch(), step=number))
    assert before == pytest.approx(0.5) and min(trainee.flows.own_shares()) > 0.95


# The teachers


def gradients_of(method: KnowledgeFlow) -> dict[str, Tensor]:
    trainee = trainee_of(method)
    method.loss(trainee, batch()).total().backward()
    return {name: p.grad for name, p in trainee.student.named_parameters() if p.grad is not None}


def test_other_teachers_teach_otherwise() -> None:
    one = gradients_of(flow_method(SAME, SAME, seeds=[1, 2]))
    other = gradients_of(flow_method(SAME, SAME, seeds=[1, 3]))
    assert one.keys() == other.keys() and len(one) > 0
    assert all(not torch.equal(one[name], other[name]) for name in one if "peephole" not in name)


def test_teachers_stay_as_they_are() -> None:
    method = flow_method(SAME, WIDER, consistency=0.1)
    teachers = torch.nn.ModuleList(method.bank.own)
    before = copy.deepcopy(teachers.state_dict())
    trainee = trainee_of(method)
    step = step_of(method, trainee.student, trainee)
    start = copy.deepcopy(trainee.state_dict())
    for number in (1, 2):
        step(replace(batch(), step=number))
    assert_same(dict(teachers.state_dict()), dict(before))
    assert all(p.grad is None and not p.requires_grad for p in teachers.parameters())
    moved = [n for n, value in trainee.state_dict().items() if not torch.equal(value, start[n])]
    assert {name.split(".")[0] for name in moved} == {"student", "flows", "last"}


@pytest.mark.parametrize(
    "model", [TINY_MODEL, PREDRNN, MIM, E3D, SAVP, VPN], ids=lambda model: model.cell
)
def test_every_backbone_is_taught_by_others(model: ModelConfig) -> None:
    method = flow_method(
        card_of(FRAME, model),
        card_of(RGB, replace(PREDRNN, num_layers=3)),
        model=model,
        consistency=0.1,
    )
    trainee = trainee_of(method)
    terms = method.loss(trainee, batch())
    terms.total().backward()
    parameters = {n: p for n, p in trainee.named_parameters() if not n.startswith("last.")}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
    report = method.liveness(trainee, batch())
    assert isinstance(report, KnowledgeFlowLiveness)
    assert report.own_shares == pytest.approx([1 / 3] * len(skeleton(FRAME, model).memory_shapes))
    alone = method.loss(trainee, replace(batch(), step=STEPS))
    plain = Scratch(task_of(model)).loss(trainee.student, replace(batch(), step=STEPS))
    assert torch.equal(alone.total(), plain.total())


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (SAVP, {"candidates": "all"}, "layer 0 of this student has 4x.* Use candidates=same"),
        (E3D, {"kernel_size": 3}, "kernel_size=3 does not work with .* 2 time slices: use 1"),
    ],
)
def test_flows_that_do_not_fit_are_refused(
    model: ModelConfig, settings: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainee_of(flow_method(card_of(FRAME, model), model=model, **settings))
    trainee_of(flow_method(card_of(FRAME, model), model=model))


def test_a_layer_that_teaches_two_is_one_candidate() -> None:
    single = card_of(FRAME, replace(TINY_MODEL, num_layers=1))
    flows = trainee_of(flow_method(single, SAME, candidates="all")).flows
    assert [len(mixture) for mixture in flows.mixtures] == [1 + 3, 1 + 3]
    assert sorted(flows.transforms.keys()) == [
        f"layer{k}_{name}"
        for k in range(2)
        for name in ("teacher0_layer0", "teacher1_layer0", "teacher1_layer1")
    ]


def test_ranks_share_one_objective() -> None:
    """Gradients of two halves of a batch, averaged as data-parallel training does, are its own."""
    gradients = []
    for rows in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        method = flow_method(SAME, consistency=0.3)
        trainee, whole = double(method, batch(4))
        assert trainee.last is not None
        disturbed(trainee, seed=8)
        last = copy.deepcopy(trainee.last.state_dict())
        for each in rows:
            trainee.last.load_state_dict(last)
            part = replace(
                whole,
                frames_BTCHW=whole.frames_BTCHW[each],
                sampling_mask_BT=whole.sampling_mask_BT[each],
                weights_B=whole.weights_B[each] * len(rows),
                step=3,
            )
            (method.loss(trainee, part).total() / len(rows)).backward()
        gradients.append([p.grad for p in trainee.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


# Liveness


def test_liveness_measures_the_transforms_and_leaves_no_trace() -> None:
    method = flow_method(SAME, WIDER)
    trainee = disturbed(trainee_of(method))
    report = method.liveness(trainee, batch())
    assert isinstance(report, KnowledgeFlowLiveness)
    assert all(p.grad is None for p in trainee.parameters())
    rollout: Rollout = method.unroll(trainee, batch(), teachings=method.teach(batch()))
    (rollout.predictions_BTCHW - batch().frames_BTCHW[:, 1:]).square().mean().backward()
    norms = [
        torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None]).norm().item()
        for part in (trainee.flows.transforms, trainee.student)
    ]
    assert report.teaching_gradient_norm == pytest.approx(norms[0], rel=1e-5)
    assert report.prediction_gradient_norm == pytest.approx(norms[1], rel=1e-5)
    assert report.own_shares == trainee.flows.own_shares()


@pytest.mark.parametrize("weight", [0.0, 1e-10])
def test_silent_teachers_are_an_error(weight: float) -> None:
    method = flow_method(SAME)
    for teacher in method.bank.own:
        for parameter in teacher.parameters():
            parameter.fill_(weight)
    with pytest.raises(DeadDistillationError, match="nothing flows"):
        method.liveness(trainee_of(method), batch())
    blank = replace(batch(), observed_BTCHW=torch.zeros(2, 6, 1, 16, 16, dtype=torch.bool))
    assert method.liveness(trainee_of(method), blank) is None


@pytest.mark.parametrize("weight", [12.0, 15.5, 30.0])
def test_flows_may_dry_up(weight: float) -> None:
    method = flow_method(SAME)
    trainee = trainee_of(method)
    with torch.no_grad():
        for mixture in trainee.flows.mixtures:
            mixture[0] = weight
    report = method.liveness(trainee, batch())
    assert report is not None
    assert 0 < report.teaching_gradient_norm < 1e-4 * report.prediction_gradient_norm


# Whole runs


def flow_config(config: RunConfig, teachers: tuple[str, str], **settings: Any) -> RunConfig:
    flow = KnowledgeFlowConfig(alone_fraction=0.3, **settings)
    transfer = TransferConfig(
        method="knowledge_flow",
        teachers=teachers,
        knowledge_flow=flow,
        start=StartConfig(teacher=1),
    )
    return replace(config, transfer=transfer)


@pytest.mark.parametrize(("consistency", "stops"), [(0.0, [3, 6]), (0.5, [1, 3, 6])])
def test_a_run_continues_bit_for_bit_and_offers_the_student_alone(
    tiny_config: RunConfig, teacher_runs: tuple[str, str], consistency: float, stops: list[int]
) -> None:
    config = flow_config(tiny_config, teacher_runs, consistency=consistency)
    straight = run(replace(config, output=config.output + "-straight"))
    for stop in stops:
        run_until(config, stop)
    result = run(config)
    assert_same(final_state(result.run), final_state(straight.run))
    kept = final_state(result.run)["training_step"]["trainee"]
    assert {name.split(".")[0] for name in kept} == {"flows", *(["last"] if consistency else [])}

    card, weights = load_weights(result.run)
    plain = build_predictor(FRAME, TINY_MODEL)
    assert {n: v.shape for n, v in weights.items()} == {
        n: v.shape for n, v in plain.state_dict().items()
    }
    assert card.auxiliary_parameters == 2 * 3 + 2 * 2 * 4 * 4
    events = read_log(Path(straight.run))
    start = next(event for event in events if event["event"] == "start")
    assert set(start["matched"]) == set(weights) and not start["random"]
    terms = {e["step"]: e["loss/independence"] for e in events if e["event"] == "train"}
    assert terms[1] > 0.6 and all((terms[step] == 0) is (step > 5) for step in terms)
    alive = [event["step"] for event in events if event["event"] == "liveness"]
    assert alive == [0, 3]


def test_frames_that_were_not_observed_leave_no_trace() -> None:
    method = flow_method(SAME, consistency=0.3)
    given = masked_batch()
    assert given.observed_BTCHW is not None
    losses = []
    for value in (0.0, 5.0):
        trainee = disturbed(trainee_of(method))
        last_frame = given.frames_BTCHW.clone()
        last_frame[:, -1] = torch.where(given.observed_BTCHW[:, -1], last_frame[:, -1], value)
        losses.append(method.loss(trainee, replace(given, frames_BTCHW=last_frame)).total())
    assert torch.equal(*losses)
