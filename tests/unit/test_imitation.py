"""How states are compared: layers, teachers and missing pixels, at any time of the training.

Legend: B batch, T time, P, Q channels of student and teacher, h, w height, width of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.conftest import TINY_MODEL
from tests.unit.test_adapters import (
    ANY,
    DIFFERENCES,
    E3D,
    MIM,
    PREDRNN,
    card_of,
    network_of,
    plan_of,
)
from tests.unit.test_masks import masked_batch
from tests.unit.test_training import assert_same, run, run_until
from tests.unit.test_transfer import (
    FRAME,
    INPUTS,
    batch,
    gradients,
    student_of,
    task,
    tmu_method,
)
from tmu_dist.config import (
    BetaSchedule,
    ConfigError,
    ImitationConfig,
    ModelConfig,
    RunConfig,
    TMUConfig,
    with_overrides,
)
from tmu_dist.models.build import count_parameters
from tmu_dist.models.shapes import MemoryShape
from tmu_dist.teachers.adapter import LayerPlan, TeacherPlan
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, Shown, Teaching
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.transfer.base import DeadDistillationError, Reduction, TrainingBatch
from tmu_dist.transfer.imitation import Comparison, Projections, any_observed, remembered_share
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.tmu import MemoryDistillation, ProjectedStudent

Masking = Literal["patch", "memory", "off"]
PATCH = TINY_MODEL.patch_size
SHAPES = (MemoryShape(3, 4, 4), MemoryShape(2, 4, 4))
PLANS = (TeacherPlan.unchanged(SHAPES),) * 2


def memories(seed: int) -> dict[int, tuple[Tensor, ...]]:
    """Random float64 maps of two layers and two teachers, [B, T, P, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: tuple(
            torch.randn(3, 5, shape.channels, 4, 4, generator=generator, dtype=torch.float64)
            for _ in PLANS
        )
        for k, shape in enumerate(SHAPES)
    }


def teachings_of(maps: dict[int, tuple[Tensor, ...]]) -> list[Teaching]:
    return [Teaching({"memory": {k: maps[k][m] for k in maps}}) for m in range(len(PLANS))]


def in_double(given: TrainingBatch) -> TrainingBatch:
    return replace(
        given, frames_BTCHW=given.frames_BTCHW.double(), weights_B=given.weights_B.double()
    )


def shares_of(observed: NDArray[np.bool_], masking: Masking) -> NDArray[np.float64]:
    """What each element counts, patch by patch and step by step, [B, T, h, w]."""
    found = np.ones((len(observed), 5, 4, 4))
    for b, t, row, column in np.ndindex(found.shape):
        rows, columns = (
            slice(row * PATCH, (row + 1) * PATCH),
            slice(column * PATCH, (column + 1) * PATCH),
        )
        now = observed[b, t, :, rows, columns].mean()
        before = found[b, t - 1, row, column] if t else 0.0
        found[b, t, row, column] = {
            "patch": now,
            "memory": now + (1 - now) * before / 2,
            "off": 1.0,
        }[masking]
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masking", ["patch", "memory", "off"])
@pytest.mark.parametrize("layers", ["all", (1,)])
def test_eq_4_with_weights_layers_and_masks(
    reduction: Reduction, masking: Masking, layers: Literal["all"] | tuple[int, ...]
) -> None:
    weights = (0.25, 3.0)
    settings = ImitationConfig(layers=layers, teacher_weights=weights, masking=masking)
    given = in_double(masked_batch())
    assert given.observed_BTCHW is not None
    imitations, taught = memories(1), memories(2)
    found = Comparison(settings, PLANS, reduction).distance(
        imitations, teachings_of(taught), "memory", given
    )
    shares = shares_of(given.observed_BTCHW.numpy(), masking)
    assert len(np.unique(shares)) > 2 or masking == "off"
    expected = 0.0
    for k in (0, 1) if layers == "all" else layers:
        for m, weight in enumerate(weights):
            squares = ((imitations[k][m] - taught[k][m]) ** 2).numpy() * shares[:, :, None]
            for b, each in enumerate(squares):
                counted = SHAPES[k].channels * shares[b].sum() if reduction == "mean" else 1.0
                part = each.sum() / counted if each.any() else 0.0
                expected += weight * part * float(given.weights_B[b])
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("masking", ["patch", "off"])
def test_distances_in_units_of_the_teachers_variance(masking: Masking) -> None:
    """Other units of a teacher's memories change nothing; unlike Eq. 4."""
    given = in_double(masked_batch())
    assert given.observed_BTCHW is not None
    imitations, taught = memories(1), memories(2)
    settings = ImitationConfig(scale="variance", masking=masking)
    compared = Comparison(settings, PLANS, "mean")
    shares = shares_of(given.observed_BTCHW.numpy(), masking)[:, :, None]
    expected = 0.0
    for k, m in np.ndindex(2, 2):
        truth, own = taught[k][m].numpy(), imitations[k][m].numpy()
        for b, weight in enumerate(given.weights_B.tolist()):
            if not (counts := np.broadcast_to(shares[b], truth[b].shape)).any():
                continue
            spread = np.average(
                (truth[b] - np.average(truth[b], weights=counts)) ** 2, weights=counts
            )
            distance = np.average((own[b] - truth[b]) ** 2, weights=counts)
            expected += weight * distance / spread
    found = compared.distance(imitations, teachings_of(taught), "memory", given)
    assert found.item() == pytest.approx(expected, rel=1e-6)

    larger = [
        {k: tuple(7 * each for each in maps[k]) for k in maps} for maps in (imitations, taught)
    ]
    scaled = compared.distance(larger[0], teachings_of(larger[1]), "memory", given)
    assert scaled.item() == pytest.approx(found.item(), rel=1e-6)
    plain = Comparison(ImitationConfig(masking=masking), PLANS, "mean")
    assert plain.distance(larger[0], teachings_of(larger[1]), "memory", given).item() == (
        pytest.approx(49 * plain.distance(imitations, teachings_of(taught), "memory", given).item())
    )


def test_memories_that_stand_still_do_not_count_for_all() -> None:
    given = in_double(batch(3))
    still = {
        k: tuple(torch.full_like(each, 0.5) for each in maps) for k, maps in memories(1).items()
    }
    compared = Comparison(ImitationConfig(scale="variance"), PLANS, "mean")
    assert torch.isfinite(compared.distance(memories(2), teachings_of(still), "memory", given))
    assert compared.distance(still, teachings_of(still), "memory", given).item() == 0


def test_what_was_observed_fades_by_half() -> None:
    share_BT1HW = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0]).reshape(1, 5, 1, 1, 1)
    assert remembered_share(share_BT1HW).flatten().tolist() == [1, 0.5, 0.25, 0.5625, 1]
    never = torch.zeros(1, 3, 1, 2, 2)
    assert torch.equal(remembered_share(never), never)


def test_masking_is_no_matter_where_no_pixel_is_missing() -> None:
    given = in_double(batch(3))
    seen = torch.ones_like(given.frames_BTCHW, dtype=torch.bool)
    imitations, teachings = memories(1), teachings_of(memories(2))
    plain = 0.0
    for k in imitations:
        for m in range(2):
            error = imitations[k][m] - teachings[m].states["memory"][k]
            plain = plain + (error.square().flatten(1).mean(1) * given.weights_B).sum()
    for masking in ("patch", "memory", "off"):
        compared = Comparison(ImitationConfig(masking=masking), PLANS, "mean")
        distance = compared.distance(imitations, teachings, "memory", given)
        assert distance.item() == pytest.approx(float(plain), rel=1e-14)
        assert distance == Comparison(ImitationConfig(), PLANS, "mean").distance(
            imitations, teachings, "memory", given
        )
        masked = replace(given, observed_BTCHW=seen)
        torch.testing.assert_close(
            compared.distance(imitations, teachings, "memory", masked), distance
        )


def test_what_counts_at_all() -> None:
    given = masked_batch()
    last_only = torch.zeros_like(given.frames_BTCHW, dtype=torch.bool)
    last_only[:, -1] = True
    padding = torch.zeros_like(last_only)
    padding[1] = True
    of_padding = replace(given, observed_BTCHW=padding, weights_B=torch.tensor([0.5, 0.0, 0.5]))
    target = replace(given, observed_BTCHW=last_only)
    found = {
        masking: [
            Comparison(ImitationConfig(masking=masking), PLANS, "mean").counts(each)
            for each in (given, target, of_padding, replace(given, observed_BTCHW=None))
        ]
        for masking in ("patch", "memory", "off")
    }
    assert found["patch"] == found["memory"] == [True, False, False, True]
    assert found["off"] == [True] * 4
    assert any_observed(target, slice(1, None)) and not any_observed(of_padding, slice(1, None))


def test_layers_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"imitation.layers=\[0, 2\]: \[2\] are no layers"):
        Comparison(ImitationConfig(layers=(0, 2)), PLANS, "mean")


def test_projections_are_matrices_at_every_place() -> None:
    plan = LayerPlan(0, MemoryShape(5, 4, 4), MemoryShape(3, 4, 4))
    projections = Projections({(1, 0): plan}).double()
    maps = (torch.randn(2, 3, 3, 4, 4).double(), torch.randn(2, 3, 3, 4, 4).double())
    (projected, as_it_is) = projections({1: maps})[1]
    weight_QP = projections["layer1_teacher0"].weight[:, :, 0, 0]
    expected = torch.einsum("btphw,qp->btqhw", maps[0], weight_QP)
    torch.testing.assert_close(projected, expected)
    assert as_it_is is maps[1]


# Memory transfer


class CountingBank(ReplicatedBank):
    """Says how often its teachers were run."""

    times = 0

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        self.times += 1
        return super().teach(shown)


def method_of(
    cards: Sequence[TeacherCard] = (card_of(FRAME, TINY_MODEL),) * 2,
    *,
    model: ModelConfig = TINY_MODEL,
    zigzag: bool = False,
    seeds: Sequence[int] = (1, 2),
    **settings: Any,
) -> MemoryDistillation:
    wanted: Any = ("memory", "zigzag") if zigzag else ("memory",)
    teachers = [
        FrozenTeacher(network_of(card, seed), plan_of(card, ANY, model), wanted)
        for card, seed in zip(cards, seeds, strict=False)
    ]
    return MemoryDistillation(
        replace(task(), model=model),
        tmu=TMUConfig(zigzag=zigzag),
        bank=CountingBank(teachers),
        teacher_input="own",
        **{"beta": 0.1} | settings,
    )


def test_only_the_compared_layers_are_distilled() -> None:
    given = batch()
    values = {}
    for layers in ((0,), (1,), "all"):
        method = method_of(imitation=ImitationConfig(layers=layers))  # type: ignore[arg-type]
        student = student_of(method)
        values[layers] = method.loss(student, given).terms["distillation"].value.item()
        report = method.liveness(student, given)
        assert report is not None and len(report.gate_means) == 2
        assert len(report.memory_correlation) == (2 if layers == "all" else 1)
    assert values[(0,)] > 0 and values[(1,)] > 0
    assert values["all"] == pytest.approx(values[(0,)] + values[(1,)], rel=1e-6)


def test_a_teacher_of_weight_0_keeps_its_slot_and_says_nothing() -> None:
    found = []
    for last in (2, 3):
        method = method_of(seeds=(1, last), imitation=ImitationConfig(teacher_weights=(2.0, 0.0)))
        found.append(gradients(method))
    assert_same(*found)
    alone = Scratch(task(), tmu=TMUConfig(), num_slots=2)
    assert found[0].keys() == gradients(alone).keys()
    silent = method_of(imitation=ImitationConfig(teacher_weights=(0.0, 0.0)))
    with pytest.raises(DeadDistillationError, match=r"transfer.beta=0.1"):
        silent.liveness(student_of(silent), batch())


LATE = BetaSchedule(shape="linear", start=10, stop=20, final=0.4)
ENDING = BetaSchedule(shape="cosine", start=10, stop=20)


@pytest.mark.parametrize(
    ("beta", "schedule", "weights"),
    [
        (0.0, LATE, {5: None, 10: None, 15: 0.2, 20: 0.4, 30: 0.4}),
        (0.2, LATE, {5: 0.2, 15: 0.3, 25: 0.4}),
        (0.2, ENDING, {10: 0.2, 15: 0.1, 20: None, 21: None}),
        (0.0, None, {1: None, 100: None}),
    ],
)
def test_beta_follows_its_schedule(
    beta: float, schedule: BetaSchedule | None, weights: dict[int, float | None]
) -> None:
    method = method_of(beta=beta, beta_schedule=schedule)
    bank = method.bank
    assert isinstance(bank, CountingBank)
    student = student_of(method)
    for step, weight in weights.items():
        bank.times = 0
        given = replace(batch(), step=step)
        terms = method.loss(student, given)
        assert (method.liveness(student, given) is None) == (weight is None)
        assert bank.times == (0 if weight is None else 2)
        if weight is None:
            assert set(terms.terms) == {"prediction"}
            continue
        value, found = terms.terms["distillation"]
        assert found == pytest.approx(weight)
        total = terms.terms["prediction"].value + weight * value
        torch.testing.assert_close(terms.total(), total)


def test_projections_have_a_gradient_of_zeros_while_beta_is_0() -> None:
    card = DIFFERENCES["channels"][0]
    schedule = BetaSchedule(shape="linear", start=10, stop=20, final=0.4)
    method = method_of((card,), beta=0.0, beta_schedule=schedule)
    trainee = method.trainee(student_of(method))
    assert isinstance(trainee, ProjectedStudent)
    method.loss(trainee, replace(batch(), step=3)).total().backward()
    assert all(p.grad is not None for p in trainee.parameters())
    assert all(not p.grad.any() for p in trainee.projections.parameters())
    alone = gradients(Scratch(task(), tmu=TMUConfig(), num_slots=1))
    of_student = {name: p.grad for name, p in trainee.student.named_parameters()}
    assert_same(of_student, alone)
    never = method_of((card,), beta=0.0)
    assert never.trainee(student_of(never)) is not None
    assert not isinstance(never.trainee(student_of(never)), ProjectedStudent)


def test_projections_are_only_for_layers_that_are_compared() -> None:
    card = DIFFERENCES["channels"][0]
    method = method_of((card,), imitation=ImitationConfig(layers=(1,)))
    trainee = method.trainee(student_of(method))
    assert isinstance(trainee, ProjectedStudent)
    assert list(trainee.projections) == ["layer1_teacher0"]
    method.loss(trainee, batch()).total().backward()
    assert all(p.grad is not None for p in trainee.parameters())


# ST-LSTM's second memory


def test_the_zigzag_memory_is_compared_like_the_first() -> None:
    cards = (card_of(FRAME, PREDRNN),) * 2
    method = method_of(cards, model=PREDRNN, zigzag=True)
    student, given = student_of(method), batch()
    rollout = method.unroll(student, given)
    expected = 0.0
    for m, seed in enumerate((1, 2)):
        network = network_of(cards[m], seed)
        theirs = network(
            given.frames_BTCHW,
            num_input_frames=INPUTS,
            num_frames=6,
            sampling_mask_BT=given.sampling_mask_BT,
        )
        for k in range(2):
            expected += (rollout.imitations[k][m] - theirs.memories[k]).square().mean().item()
            zigzag = theirs.states("zigzag")[k]
            expected += (rollout.zigzag_imitations[k][m] - zigzag).square().mean().item()
    found = method.loss(student, given).terms["distillation"].value
    assert found.item() == pytest.approx(expected, rel=1e-5)
    report = method.liveness(student, given)
    assert report is not None
    assert [len(layer) for layer in report.zigzag_correlation] == [2, 2]
    assert report.zigzag_correlation != report.memory_correlation


@pytest.mark.parametrize("model", [PREDRNN, MIM, E3D], ids=lambda model: model.cell)
def test_zigzag_memories_of_other_teachers_have_projections_of_their_own(
    model: ModelConfig,
) -> None:
    cards = [
        card_of(FRAME, replace(PREDRNN, hidden_channels=3)),
        card_of(FRAME, replace(E3D, num_layers=3)),
    ]
    method = method_of(cards, model=model, zigzag=True)
    trainee = method.trainee(student_of(method))
    assert isinstance(trainee, ProjectedStudent) and trainee.zigzag_projections is not None
    assert count_parameters(trainee.zigzag_projections) == 2 * 3 * TINY_MODEL.hidden_channels
    method.loss(trainee, batch()).total().backward()
    missing = [name for name, p in trainee.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.any() for p in trainee.zigzag_projections.parameters())


def test_without_zigzag_nothing_of_it_is_there() -> None:
    method = method_of((card_of(FRAME, replace(PREDRNN, hidden_channels=3)),), model=PREDRNN)
    trainee = method.trainee(student_of(method))
    assert not any("zigzag" in name for name in trainee.state_dict())
    report = method.liveness(trainee, batch())
    assert report is not None and report.zigzag_correlation == []


@pytest.mark.parametrize("affine", ["full", "channel"])
def test_imitations_can_start_with_the_statistics_of_the_memories(
    affine: Literal["full", "channel"],
) -> None:
    method = tmu_method(1, 2)
    method.task = replace(method.task, model=replace(TINY_MODEL, norm_affine=affine))
    method.starts_from_memories = True
    student, given = student_of(method), batch(3)
    given = replace(given, weights_B=torch.tensor([0.5, 0.5, 0.0]))
    method.begin(student, given)
    teachings = method.teach(given)
    for k, shape in enumerate(student.memory_shapes):
        norm = student.get_submodule(f"stack.layers.{k}.transfer.distiller_norm")
        for m, teaching in enumerate(teachings):
            memory = teaching.states["memory"][k][:2].flatten(0, 1).numpy()  # the third is padding
            axes = 0 if affine == "full" else (0, 2, 3)
            rows = slice(m * shape.channels, (m + 1) * shape.channels)
            for found, expected in ((norm.gain, memory.std(axes)), (norm.shift, memory.mean(axes))):
                np.testing.assert_allclose(found[rows].detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_run_begins_once_before_its_first_update(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = MemoryDistillation.begin

    def noted(self: MemoryDistillation, trainee: nn.Module, given: TrainingBatch) -> None:
        before = {name: value.clone() for name, value in trainee.state_dict().items()}
        begin(self, trainee, given)
        begun.append(given.step)
        changed = {n for n, v in trainee.state_dict().items() if not torch.equal(v, before[n])}
        assert changed == {name for name in before if "distiller_norm" in name}

    monkeypatch.setattr(MemoryDistillation, "begin", noted)
    config = with_overrides(tmu_config, {"transfer.imitation_start": "memories"})
    run_until(config, 3)
    assert begun == [1]
    run(config)
    assert begun == [1], "what continues has begun"


def test_no_imitation_starts_from_memories_unless_it_is_asked_for_and_taught() -> None:
    for method in (tmu_method(1, 2), tmu_method(1, 2, beta=0.0)):
        method.starts_from_memories = method.beta == 0
        student = student_of(method)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        method.begin(student, batch())
        assert_same(student.state_dict(), before)
