"""Teachers of another kind: what is refused, what bridges it, and what is compared in the end.

Legend: B batch, T time, C channels, P memory channels, H, W height, width, Z noise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import TINY_MODEL
from tests.unit.test_masks import masked_batch, other_values_where_missing
from tests.unit.test_training import assert_same
from tests.unit.test_transfer import FRAME, INPUTS, batch, student_of, tmu_method
from tmu_dist.config import (
    AdapterConfig,
    ModelConfig,
    SAVPConfig,
    TMUConfig,
    VPNConfig,
    WindowConfig,
)
from tmu_dist.data.manifest import Units
from tmu_dist.models.build import build_predictor, count_parameters, skeleton
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape, MemoryShape
from tmu_dist.teachers.adapter import (
    StudentFacts,
    TeacherPlan,
    adapt_frames,
    adapt_memory,
    plan_teacher,
    resize,
)
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, Shown
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError
from tmu_dist.transfer.base import Objective, Reduction, Task
from tmu_dist.transfer.imitation import observed_share
from tmu_dist.transfer.tmu import MemoryDistillation, ProjectedStudent

GREY_CODES = Units(
    quantity="intensity", unit="1", scale=1 / 255, offset=0.0, max_code=255, missing_code=None
)
DATA = DataFacts(archive="tiny", manifest_hash="0", units=GREY_CODES, frame_interval_minutes=None)
RAIN = replace(
    DATA,
    units=replace(GREY_CODES, quantity="rain_rate", unit="mm/h"),
    frame_interval_minutes=5.0,
    normalisation="stored uint16 / 60000",
)
ANY = AdapterConfig(
    frames="resize", channels="project", grid="resample", layers="stretch", units="any"
)
PREDRNN = replace(TINY_MODEL, cell="predrnn")
MIM = replace(TINY_MODEL, cell="mim")
E3D = replace(TINY_MODEL, cell="e3d_lstm")
SAVP = ModelConfig(
    cell="savp", savp=SAVPConfig(base_channels=4, latent_size=3, posterior_channels=4)
)
VPN = ModelConfig(
    cell="vpn",
    hidden_channels=3,
    kernel_size=3,
    vpn=VPNConfig(channels=2, num_encoder_blocks=1, num_decoder_blocks=1),
)


def card_of(frame: FrameShape, model: ModelConfig, data: DataFacts = DATA) -> TeacherCard:
    return TeacherCard(
        name="other",
        method="scratch",
        step=1,
        seed=0,
        frame=frame,
        window=WindowConfig(num_input_frames=INPUTS, num_target_frames=3),
        model=model,
        tmu=TMUConfig(),
        num_slots=0,
        data=data,
    )


def plan_of(
    card: TeacherCard,
    adapter: AdapterConfig,
    model: ModelConfig = TINY_MODEL,
    frame: FrameShape = FRAME,
    taught: Literal["all"] | tuple[int, ...] = "all",
) -> TeacherPlan:
    student = StudentFacts(
        frame=frame, memories=skeleton(frame, model).memory_shapes, data=DATA, taught=taught
    )
    return plan_teacher(card, skeleton(card.frame, card.model).memory_shapes, student, adapter)


def network_of(card: TeacherCard, seed: int) -> Predictor:
    torch.manual_seed(seed)
    return build_predictor(card.frame, card.model)


def classroom(
    teachers: Sequence[TeacherCard],
    adapter: AdapterConfig = ANY,
    *,
    model: ModelConfig = TINY_MODEL,
    frame: FrameShape = FRAME,
    seeds: Sequence[int] = range(1, 9),
    layers: Literal["all"] | tuple[int, ...] = "all",
    beta: float = 0.1,
    teacher_input: Literal["own", "student", "truth"] = "own",
    reduction: Reduction = "mean",
) -> MemoryDistillation:
    """A student and its teachers, whose weights come from the seeds."""
    return MemoryDistillation(
        Task(
            frame=frame,
            model=model,
            objective=Objective("likelihood" if model == VPN else "l2", reduction=reduction),
            num_input_frames=INPUTS,
        ),
        tmu=TMUConfig(layers=layers),
        bank=ReplicatedBank(
            [
                FrozenTeacher(network_of(card, seed), plan_of(card, adapter, model, frame, layers))
                for card, seed in zip(teachers, seeds, strict=False)
            ]
        ),
        beta=beta,
        teacher_input=teacher_input,
    )


def trainee_of(method: MemoryDistillation) -> torch.nn.Module:
    return method.trainee(student_of(method))


def gradients_of(method: MemoryDistillation) -> dict[str, Tensor]:
    trainee = trainee_of(method)
    method.loss(trainee, batch()).total().backward()
    missing = [name for name, p in trainee.named_parameters() if p.grad is None]
    assert not missing
    return {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}


# What is refused, and what bridges it

SMALL = FrameShape(channels=1, height=8, width=8)
RGB = FrameShape(channels=3, height=16, width=16)
WIDE = FrameShape(channels=1, height=8, width=24)

DIFFERENCES: dict[str, tuple[TeacherCard, tuple[str, ...]]] = {
    "channels": (card_of(FRAME, replace(TINY_MODEL, hidden_channels=6)), ("channels=project",)),
    "larger maps": (card_of(FRAME, replace(TINY_MODEL, patch_size=2)), ("grid=resample",)),
    "smaller maps": (card_of(FRAME, replace(TINY_MODEL, patch_size=8)), ("grid=resample",)),
    "slices": (card_of(FRAME, E3D), ("grid=resample",)),
    "size": (card_of(SMALL, replace(TINY_MODEL, patch_size=2)), ("frames=resize",)),
    "colours": (card_of(RGB, TINY_MODEL), ("frames=resize",)),
    "shape": (card_of(WIDE, TINY_MODEL), ("frames=resize", "grid=resample")),
    "more layers": (card_of(FRAME, replace(TINY_MODEL, num_layers=4)), ("layers=stretch",)),
    "fewer layers": (card_of(FRAME, replace(TINY_MODEL, num_layers=1)), ("layers=stretch",)),
    "units": (card_of(FRAME, TINY_MODEL, RAIN), ("units=any",)),
    "likelihood": (
        card_of(FRAME, VPN),
        ("layers=stretch", "channels=project", "grid=resample"),
    ),
    "everything": (
        card_of(RGB, replace(E3D, hidden_channels=3, num_layers=3, patch_size=8), RAIN),
        ("layers=stretch", "channels=project", "grid=resample", "frames=resize", "units=any"),
    ),
}


def settings_of(names: Sequence[str]) -> AdapterConfig:
    return AdapterConfig(**dict(name.split("=") for name in names))  # type: ignore[arg-type]


def bridges_named_in(card: TeacherCard, adapter: AdapterConfig) -> set[str]:
    """The settings that a refusal proposes."""
    with pytest.raises(TeacherError, match="does not fit the student") as refusal:
        plan_of(card, adapter)
    return set(re.findall(r"\(transfer\.adapter\.([a-z=]+)\)", str(refusal.value)))


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_every_difference_is_refused_by_the_name_of_its_setting(kind: str) -> None:
    card, bridges = DIFFERENCES[kind]
    assert bridges_named_in(card, AdapterConfig()) == set(bridges)
    for missing in bridges:
        others = settings_of([name for name in bridges if name != missing])
        assert bridges_named_in(card, others) == {missing}
    plan_of(card, settings_of(bridges))


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_a_bridged_teacher_teaches_and_stays_as_it_was(kind: str) -> None:
    card, bridges = DIFFERENCES[kind]
    method = classroom([card, card_of(FRAME, TINY_MODEL)], settings_of(bridges))
    frozen = method.bank.own[0]
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    terms = method.loss(trainee_of(method), batch())
    assert terms.total().isfinite() and terms.terms["distillation"].value > 0
    gradients = gradients_of(method)
    for name, gradient in gradients.items():
        if "distiller" in name or "projections" in name:
            assert gradient.isfinite().all() and gradient.any(), name
    projects = "channels=project" in bridges
    assert any("projections" in name for name in gradients) == projects
    report = method.liveness(trainee_of(method), batch())
    assert report is not None and len(report.memory_correlation[0]) == 2
    assert not frozen.training and all(p.grad is None for p in frozen.parameters())
    assert_same(before, dict(frozen.state_dict()))
    assert method.bank.parameters_per_teacher[0] == count_parameters(network_of(card, 1))


def test_only_dimensions_count_not_cells_or_patches() -> None:
    """The paper's rule; a teacher that needs no adapter is used as it is, declared or not."""
    for model in (TINY_MODEL, PREDRNN, MIM, replace(TINY_MODEL, peephole="none")):
        for adapter in (AdapterConfig(), ANY):
            plan = plan_of(card_of(FRAME, model), adapter)
            assert plan == TeacherPlan.unchanged(skeleton(FRAME, TINY_MODEL).memory_shapes)
    for student, teacher in ((TINY_MODEL, PREDRNN), (PREDRNN, TINY_MODEL), (E3D, E3D)):
        method = classroom([card_of(FRAME, teacher)], AdapterConfig(), model=student)
        student_network = student_of(method)
        assert method.trainee(student_network) is student_network
        assert method.loss(student_network, batch()).terms["distillation"].value > 0


def test_settings_without_a_difference_change_no_bit() -> None:
    plain, adapted = tmu_method(1, 2), classroom([card_of(FRAME, TINY_MODEL)] * 2, ANY)
    assert_same(*(gradients_of(method) for method in (plain, adapted)))


def test_what_no_setting_bridges() -> None:
    two_channels = card_of(FrameShape(channels=2, height=16, width=16), TINY_MODEL)
    with pytest.raises(TeacherError, match="only grey and RGB can be converted"):
        plan_of(two_channels, ANY)


def test_layers_that_are_not_taught_need_not_fit() -> None:
    shapes = (MemoryShape(6, 4, 4), MemoryShape(4, 4, 4))
    memories = skeleton(FRAME, TINY_MODEL).memory_shapes
    card = card_of(FRAME, TINY_MODEL)
    facts = StudentFacts(frame=FRAME, memories=memories, data=DATA, taught=(1,))
    plan = plan_teacher(card, shapes, facts, AdapterConfig())
    assert list(plan.layers) == [1]
    with pytest.raises(TeacherError, match="channels of layer 0: teacher 6, student 4"):
        plan_teacher(card, shapes, replace(facts, taught="all"), AdapterConfig())
    method = classroom([DIFFERENCES["channels"][0]], layers=(1,))
    assert [n for n in gradients_of(method) if "projections" in n] == [
        "projections.layer1_teacher0.weight"
    ]


# Which layer teaches which


@pytest.mark.parametrize(
    ("teachers", "students", "layers", "expected"),
    [
        (2, 4, "stretch", [0, 0, 1, 1]),
        (4, 2, "stretch", [0, 3]),
        (4, 3, "stretch", [0, 2, 3]),
        (3, 3, "stretch", [0, 1, 2]),
        (3, 1, "stretch", [2]),
        (1, 3, "stretch", [0, 0, 0]),
        (4, 2, (2, 0), [2, 0]),
        (2, 2, (1, 1), [1, 1]),
    ],
)
def test_layer_maps(teachers: int, students: int, layers: Any, expected: list[int]) -> None:
    card = card_of(FRAME, replace(TINY_MODEL, num_layers=teachers))
    model = replace(TINY_MODEL, num_layers=students)
    adapter = AdapterConfig(layers=layers)
    plan = plan_of(card, adapter, model)
    assert [plan.layers[k].teacher_layer for k in range(students)] == expected
    method = classroom([card], adapter, model=model)
    (taught,) = method.teach(batch())
    found = taught.states["memory"]
    memories = run_alone(network_of(card, 1), batch().frames_BTCHW)
    for k, layer in enumerate(expected):
        assert torch.equal(found[k], memories[layer])


@pytest.mark.parametrize("layers", [(0,), (0, 1, 1), (0, 2), (-1, 0)])
def test_impossible_layer_maps(layers: tuple[int, ...]) -> None:
    with pytest.raises(TeacherError, match=r"one of the teacher's layers 0 to 1 for each of the"):
        plan_of(card_of(FRAME, TINY_MODEL), AdapterConfig(layers=layers))


def run_alone(network: Predictor, frames_BTCHW: Tensor, **others: Any) -> tuple[Tensor, ...]:
    arguments = {"num_input_frames": INPUTS, "num_frames": frames_BTCHW.shape[1], **others}
    arguments.setdefault("sampling_mask_BT", batch(len(frames_BTCHW)).sampling_mask_BT)
    return network(frames_BTCHW, **arguments).memories


# Frames


def bilinear(image_HW: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Pixels are areas, so the centre of pixel i lies at i + 1/2; borders are continued."""

    def weights(size: int, new: int) -> np.ndarray[Any, Any]:
        matrix = np.zeros((new, size))
        for i in range(new):
            place = np.clip((i + 0.5) * size / new - 0.5, 0, size - 1)
            low = int(place)
            matrix[i, low] += 1 - (place - low)
            matrix[i, min(low + 1, size - 1)] += place - low
        return matrix

    return weights(image_HW.shape[0], height) @ image_HW @ weights(image_HW.shape[1], width).T


def test_maps_shrink_by_area_and_grow_bilinearly() -> None:
    image_HW = np.random.default_rng(0).random((6, 8))
    maps = torch.from_numpy(image_HW)[None, None]

    def resized(height: int, width: int) -> np.ndarray[Any, Any]:
        return np.asarray(resize(maps, height, width)[0, 0])

    blocks = image_HW.reshape(3, 2, 2, 4).mean((1, 3))
    np.testing.assert_allclose(resized(3, 2), blocks, atol=1e-12)
    np.testing.assert_allclose(resized(9, 20), bilinear(image_HW, 9, 20), atol=1e-12)
    narrow = image_HW.reshape(6, 4, 2).mean(2)
    np.testing.assert_allclose(resized(15, 4), bilinear(narrow, 15, 4), atol=1e-12)
    assert resize(maps, 6, 8) is maps


def test_colours_and_greys() -> None:
    rgb_BTCHW = torch.rand(2, 3, 3, 4, 4).double()
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = adapt_frames(rgb_BTCHW, FrameShape(channels=1, height=4, width=4))
    expected = torch.einsum("btchw,c->bthw", rgb_BTCHW, luma).unsqueeze(2)
    torch.testing.assert_close(grey, expected, rtol=1e-12, atol=0)
    back = adapt_frames(grey, FrameShape(channels=3, height=8, width=8))
    assert back.shape == (2, 3, 3, 8, 8)
    assert torch.equal(back[:, :, 0], back[:, :, 2])


@pytest.mark.parametrize("choice", ["own", "student", "truth"])
def test_a_teacher_reads_frames_of_its_own_size(
    choice: Literal["own", "student", "truth"],
) -> None:
    """Another patch size with the same maps: only the frames change."""
    frame, card = (
        FrameShape(channels=1, height=64, width=64),
        card_of(FrameShape(channels=1, height=32, width=32), replace(TINY_MODEL, patch_size=2)),
    )
    adapter = AdapterConfig(frames="resize")
    method = classroom([card], adapter, frame=frame, teacher_input=choice)
    given = replace(batch(), frames_BTCHW=torch.rand(2, 6, 1, 64, 64))
    rollout = method.unroll(student_of(method), given)
    seen = given.frames_BTCHW
    if choice == "student":
        seen = torch.cat([rollout.inputs_BTCHW, seen[:, -1:]], 1)
    mask = given.sampling_mask_BT if choice == "own" else torch.ones(2, 2, dtype=torch.bool)
    small = F.avg_pool2d(seen.flatten(0, 1), 2).unflatten(0, (2, 6))
    expected = run_alone(network_of(card, 1), small, sampling_mask_BT=mask)
    (taught,) = method.teach(given, rollout)
    found = taught.states["memory"]
    for k in range(2):
        torch.testing.assert_close(found[k], expected[k])
        assert not found[k].requires_grad
    assert method.loss(student_of(method), given).total().isfinite()


# Memories


def test_slices_of_time() -> None:
    one, two = MemoryShape(3, 4, 5), MemoryShape(3, 4, 5, slices=2)
    memory_BTPHW = torch.rand(2, 3, 3, 8, 5)
    assert adapt_memory(memory_BTPHW, two, two) is memory_BTPHW
    newest = adapt_memory(memory_BTPHW, two, one)
    assert torch.equal(newest, memory_BTPHW[:, :, :, 4:])
    again = adapt_memory(newest, one, two)
    assert torch.equal(again[:, :, :, :4], newest) and torch.equal(again[:, :, :, 4:], newest)
    # Resizing never mixes slices.
    smaller = adapt_memory(memory_BTPHW, two, MemoryShape(9, 2, 5, slices=2))
    pooled = memory_BTPHW.reshape(2, 3, 3, 4, 2, 5).mean(4)
    torch.testing.assert_close(smaller, pooled)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_imitations_are_compared_in_the_teachers_channels(
    reduction: Reduction, masked: bool
) -> None:
    """Eq. 4 written out again for a teacher with other channels, maps and layers."""
    model = replace(TINY_MODEL, hidden_channels=6, num_layers=3, patch_size=2)
    method = classroom([card_of(FRAME, model)], reduction=reduction)
    trainee = trainee_of(method)
    assert isinstance(trainee, ProjectedStudent)
    given = masked_batch() if masked else batch()
    rollout = method.unroll(trainee.student, given)
    memories = run_alone(network_of(card_of(FRAME, model), 1), given.frames_BTCHW)
    share = torch.ones(len(given.weights_B), 5, 1, 4, 4)
    if given.observed_BTCHW is not None:
        share = observed_share(given.observed_BTCHW[:, :-1], share, MemoryShape(4, 4, 4))
    expected = torch.zeros(())
    for k, layer in enumerate((0, 2)):
        weight_QP = trainee.projections[f"layer{k}_teacher0"].weight[:, :, 0, 0]
        projected = torch.einsum("btphw,qp->btqhw", rollout.imitations[k][0], weight_QP)
        memory = F.avg_pool2d(memories[layer].flatten(0, 1), 2).unflatten(0, projected.shape[:2])
        assert memory.shape == projected.shape == (len(share), 5, 6, 4, 4)
        sums = ((projected - memory).square() * share).flatten(1).sum(1)
        counts = 6 * share.flatten(1).sum(1) if reduction == "mean" else torch.tensor(1.0)
        expected += (torch.where(sums > 0, sums / counts, 0) * given.weights_B).sum()
    found = method.loss(trainee, given).terms["distillation"].value
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_missing_pixels_leave_no_trace_through_adapters() -> None:
    card = card_of(RGB, replace(TINY_MODEL, hidden_channels=6, patch_size=8))
    method = classroom([card, card_of(SMALL, E3D)])
    trainee = trainee_of(method)
    given = masked_batch()
    assert given.observed_BTCHW is not None
    found = []
    for value in (0.0, 0.7):  # of the last frame, which is a target only
        last = other_values_where_missing(given, value).frames_BTCHW[:, -1:]
        one = replace(given, frames_BTCHW=torch.cat([given.frames_BTCHW[:, :-1], last], 1))
        trainee.zero_grad()
        method.loss(trainee, one).total().backward()
        found.append(
            {n: p.grad.clone() for n, p in trainee.named_parameters() if p.grad is not None}
        )
    assert_same(*found)

    rollout = method.unroll(trainee, given)
    leaves = [x.detach().requires_grad_() for x in rollout.imitations[0]]
    rollout = rollout._replace(imitations={0: tuple(leaves)})
    loss = method._distillation(rollout, method.teach(given, rollout), given)
    share = observed_share(given.observed_BTCHW[:, :-1], leaves[0], MemoryShape(4, 4, 4))
    for gradient in torch.autograd.grad(loss, leaves):
        assert torch.equal(gradient != 0, (share > 0).expand_as(gradient))
    report = method.liveness(trainee, given)
    assert report is not None and report.teaching_gradient_norm > 0


@pytest.mark.parametrize("size", [3, 2, 0, None])
def test_noise_goes_to_teachers_that_use_as_much(size: int | None) -> None:
    method = classroom([card_of(FRAME, TINY_MODEL)])
    network = method.bank.own[0].network
    network.noise_size = 3
    seen: list[Any] = []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["noise_BTZ"]), with_kwargs=True
    )
    noise_BTZ = None if size is None else torch.randn(2, 5, size)
    given = batch()
    method.bank.teach(
        Shown(
            given.frames_BTCHW,
            num_input_frames=INPUTS,
            num_frames=6,
            sampling_mask_BT=given.sampling_mask_BT,
            noise_BTZ=noise_BTZ,
        )
    )
    assert seen[0] is (noise_BTZ if size == 3 else None)
