"""Who holds which teacher, in which precision, and how frames and memories travel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import TINY_MODEL
from tests.transfer_methods import FRAME, batch
from tests.unit.test_training import MODELS
from tmu_dist.backbones import BACKBONES
from tmu_dist.collectives import RankGroup
from tmu_dist.config import ConfigError, ModelConfig
from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import to_unit_interval
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import MemoryShape
from tmu_dist.teachers.adapter import LayerPlan, TeacherPlan
from tmu_dist.teachers.bank import (
    FrozenTeacher,
    ReplicatedBank,
    Shown,
    Wanted,
    rounded_convolutions,
)
from tmu_dist.teachers.placed import FrameCodec, PlacedBank
from tmu_dist.teachers.placement import Placement, TeacherCost, plan_placement

ALONE = RankGroup(range(1), 0)


def costs(*sizes: int, work: tuple[float, ...] = ()) -> list[TeacherCost]:
    return [
        TeacherCost(name=f"teacher-{m}", weight_bytes=size, work=load)
        for m, (size, load) in enumerate(zip(sizes, work or sizes, strict=True))
    ]


# The plan


@pytest.mark.parametrize(
    ("budget", "kind"),
    [
        (None, "replicated"),
        (60, "replicated"),
        (59, "sharded"),
        (34, "sharded"),
        (33, "placed"),
        (20, "placed"),
    ],
)
def test_auto_takes_the_first_that_fits(budget: int | None, kind: str) -> None:
    """Six teachers of 10 bytes on three ranks: 60 bytes a rank, six parts and one whole, or 20."""
    assert plan_placement("auto", costs(*[10] * 6), 3, budget).kind == kind


def test_what_a_rank_holds() -> None:
    three = costs(10, 10, 40)
    expected = {"replicated": (60, 60), "placed": (20, 40), "sharded": (5 + 5 + 20 + 40,) * 2}
    for kind, resident in expected.items():
        plan = plan_placement(kind, three, 2, None)  # type: ignore[arg-type]
        assert plan.kind == kind and tuple(sorted(plan.resident_bytes)) == resident
    placed = plan_placement("placed", three, 2, None)
    assert placed.holders == (1, 1, 0) and placed.resident_bytes == (40, 20)
    assert placed.held_by(1) == (0, 1) and placed.held_by(0) == (2,)


@pytest.mark.parametrize("kind", ["auto", "replicated", "placed", "sharded"])
def test_one_rank_alone_holds_all(kind: str) -> None:
    plan = plan_placement(kind, costs(10, 20), 1, 30)  # type: ignore[arg-type]
    assert plan == Placement(kind="replicated", resident_bytes=(30,))


@pytest.mark.parametrize(("teachers", "ranks"), [(41, 4), (5, 2), (1, 3), (2, 3), (1000, 64)])
def test_equal_teachers_are_dealt_evenly(teachers: int, ranks: int) -> None:
    plan = plan_placement("placed", costs(*[7] * teachers), ranks, None)
    held = [len(plan.held_by(place)) for place in range(ranks)]
    assert sum(held) == teachers
    assert max(held) == -(-teachers // ranks) and max(held) - min(held) <= 1


def test_work_is_balanced_and_memory_comes_first() -> None:
    """Two slow teachers are parted; where their memory does not allow it, they are not."""
    uneven = costs(10, 10, 1, 1, work=(1, 1, 8, 8))
    assert plan_placement("placed", uneven, 2, None).holders == (0, 1, 0, 1)
    by_work = costs(30, 20, 20, 10, work=(1, 9, 1, 7))
    assert plan_placement("placed", by_work, 2, None).resident_bytes == (20, 60)
    within = plan_placement("placed", by_work, 2, 40)
    assert within.resident_bytes == (40, 40)


def test_greedy_balance_is_near_the_best_and_shards_never_need_less() -> None:
    """Against Graham's bound, and S/g + L of the sharded teachers."""
    generator = np.random.default_rng(1)
    for _ in range(200):
        sizes = generator.integers(1, 100, generator.integers(1, 20)).tolist()
        ranks = int(generator.integers(2, 6))
        given = costs(*sizes)
        loads = plan_placement("placed", given, ranks, None).resident_bytes
        assert sum(loads) == sum(sizes)
        assert max(loads) <= sum(sizes) / ranks + (1 - 1 / ranks) * max(sizes)
        sharded = max(plan_placement("sharded", given, ranks, None).resident_bytes)
        unlike = costs(*sizes, work=tuple(generator.random(len(sizes))))
        assert plan_placement("auto", unlike, ranks, sharded).kind in ("replicated", "sharded")
        if max(loads) < sharded < sum(sizes):
            assert plan_placement("auto", unlike, ranks, sharded - 1).kind == "placed"


def test_what_does_not_fit_is_told_with_what_would() -> None:
    gib = 2**30
    four = costs(*[gib] * 4)
    with pytest.raises(ConfigError) as refusal:
        plan_placement("replicated", four, 2, 3 * gib)
    for part in (
        "placement.kind=replicated",
        "4 teachers do not fit into the 3 GiB",
        "4 GiB replicated, 3 GiB sharded, 2 GiB placed",
        "Set placement.kind=sharded, or choose placement.precision=bf16",
    ):
        assert part in str(refusal.value)
    with pytest.raises(ConfigError, match=r"3 GiB sharded, 2 GiB placed\. Choose placement"):
        plan_placement("auto", four, 2, gib)
    with pytest.raises(ConfigError, match=r"group of 1 a rank needs 4 GiB replicated\. Choose"):
        plan_placement("auto", four, 1, gib)


# Precision


def small(cell: str) -> Predictor:
    model = MODELS.get(cell) or ModelConfig(
        cell=cell,
        **{name: getattr(TINY_MODEL, name) for name in ("num_layers", "hidden_channels")},
        kernel_size=3,
        patch_size=4,
    )
    torch.manual_seed(3)
    return build_predictor(FRAME, model)


def tell(teacher: FrozenTeacher, frames_BTCHW: Tensor, mask_BT: Tensor) -> list[Tensor]:
    taught = teacher(
        frames_BTCHW,
        num_input_frames=3,
        num_frames=6,
        sampling_mask_BT=mask_BT,
        noise_BTZ=None,
    )
    return list(taught.tensors().values())


@pytest.mark.parametrize("cell", sorted(BACKBONES))
def test_convolutions_in_bf16_are_those_of_autocast(cell: str) -> None:
    """Bit for bit, with every backbone, at half the memory; and they are not those of fp32."""
    given = batch(1, size=2)
    wanted: tuple[Wanted, ...] = ("memory", "hidden", "predictions")
    exact = FrozenTeacher(small(cell), wanted=wanted, precision="fp32")
    kept = FrozenTeacher(small(cell), wanted=wanted, precision="bf16")
    plain = FrozenTeacher(small(cell), wanted=wanted)
    found = tell(kept, given.frames_BTCHW, given.sampling_mask_BT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = tell(plain, given.frames_BTCHW, given.sampling_mask_BT)
        in_fp32 = tell(exact, given.frames_BTCHW, given.sampling_mask_BT)
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected) > 2
    assert not any(map(torch.equal, found, in_fp32))
    without = tell(plain, given.frames_BTCHW, given.sampling_mask_BT)
    assert all(map(torch.equal, in_fp32, without))
    in_convolutions = sum(map(count_parameters, rounded_convolutions(plain)))
    saved = size(plain) - size(kept)
    assert saved == 2 * in_convolutions > 0


def size(teacher: FrozenTeacher) -> int:
    return sum(parameter.nbytes for parameter in teacher.parameters())


@pytest.mark.parametrize(("memories", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_what_is_told_is_rounded_and_comes_back_in_the_frames_numbers(
    memories: str, dtype: torch.dtype
) -> None:
    given = batch(1)
    teacher = FrozenTeacher(small("convlstm"), memories=memories)  # type: ignore[arg-type]
    exact = tell(FrozenTeacher(small("convlstm")), given.frames_BTCHW, given.sampling_mask_BT)
    rounded = tell(teacher, given.frames_BTCHW, given.sampling_mask_BT)
    assert {value.dtype for value in rounded} == {dtype}
    assert all(map(torch.equal, rounded, [value.to(dtype) for value in exact]))
    taught = ReplicatedBank([teacher]).teach(
        Shown(
            given.frames_BTCHW,
            num_input_frames=3,
            num_frames=6,
            sampling_mask_BT=given.sampling_mask_BT,
        )
    )
    told = taught[0].tensors().values()
    assert all(map(torch.equal, told, [value.float() for value in rounded]))


# What travels


@pytest.mark.parametrize(
    ("max_code", "missing"), [(1, None), (254, 255), (255, None), (4095, 65535), (65535, None)]
)
def test_frames_travel_as_codes_without_loss(max_code: int, missing: int | None) -> None:
    """Every code there is, as the loader scales it; a missing pixel stays 0."""
    units = Units(
        quantity="rain", unit="mm", scale=1.0, offset=0.0, max_code=max_code, missing_code=missing
    )
    dtype = torch.uint8 if max_code <= 255 else torch.uint16
    codes = torch.tensor([*range(max_code + 1), *([] if missing is None else [missing])])
    frames, _ = to_unit_interval(codes.to(dtype), units)
    codec = FrameCodec(max_code)
    sent = codec.encode(frames)
    assert sent.dtype == dtype
    assert torch.equal(codec.decode(sent, torch.float32), frames)
    assert torch.equal(codec.decode(codec.encode(frames.double()), torch.float64), frames.double())


def placed(*teachers: FrozenTeacher, codec: FrameCodec | None = None) -> PlacedBank:
    return PlacedBank(
        dict(enumerate(teachers)),
        holders=[0] * len(teachers),
        plans=[teacher.plan for teacher in teachers],
        parameters_per_teacher=[count_parameters(teacher) for teacher in teachers],
        group=ALONE,
        wanted=teachers[0].wanted,
        codec=codec,
    )


def test_a_group_of_one_is_taught_as_by_teachers_of_its_own() -> None:
    given = batch(1)
    teachers = [
        FrozenTeacher(small(cell), wanted=("hidden", "memory", "predictions"))
        for cell in ("convlstm", "e3d_lstm")
    ]
    shown = Shown(given.frames_BTCHW, 3, 6, given.sampling_mask_BT)
    bank, other = placed(*teachers), ReplicatedBank(teachers)
    assert bank.plans == other.plans
    assert bank.parameters_per_teacher == other.parameters_per_teacher
    found, expected = bank.teach(shown), other.teach(shown)
    for one, another in zip(found, expected, strict=True):
        assert len(one.tensors()) == 5  # two states of two layers, and predictions
        assert one.tensors().keys() == another.tensors().keys()
        assert all(map(torch.equal, one.tensors().values(), another.tensors().values()))


def test_frames_that_are_no_codes_are_refused() -> None:
    given = batch(1)
    bank = placed(FrozenTeacher(small("convlstm")), codec=FrameCodec(255))
    with pytest.raises(ValueError, match="are not codes of 0 to 255"):
        bank.teach(
            Shown(
                given.frames_BTCHW,
                num_input_frames=3,
                num_frames=6,
                sampling_mask_BT=given.sampling_mask_BT,
            )
        )


def test_a_plan_of_other_maps_is_refused() -> None:
    given = batch(1)
    network = small("convlstm")
    wrong = MemoryShape(channels=5, height=4, width=4)
    bank = placed(FrozenTeacher(network))
    bank.plans = (TeacherPlan(frame=None, layers={0: LayerPlan(0, wrong, wrong)}),)
    with pytest.raises(ValueError, match=r"memory \(layer 0\) is \(4, 5, 4, 4, 4\), and its plan"):
        bank.teach(
            Shown(
                given.frames_BTCHW,
                num_input_frames=3,
                num_frames=6,
                sampling_mask_BT=given.sampling_mask_BT,
            )
        )
