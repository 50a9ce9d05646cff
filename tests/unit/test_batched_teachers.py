"""Teachers that are alike run as one network, and tell what each would tell by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import TINY_MODEL
from tests.transfer_methods import FRAME, batch
from tests.unit.test_adapters import SMALL, card_of, network_of, plan_of
from tests.unit.test_placement import ALONE
from tests.unit.test_training import MODELS, run
from tmu_dist.backbones import BACKBONES
from tmu_dist.collectives import RankGroup
from tmu_dist.config import (
    AdapterConfig,
    ARTConfig,
    ComputeConfig,
    ConfigError,
    ModelConfig,
    PlacementConfig,
    RunConfig,
    SAVPConfig,
    TMUConfig,
    with_overrides,
)
from tmu_dist.data.loader import open_archive
from tmu_dist.models.arrange import arrange
from tmu_dist.models.build import build_predictor, count_parameters, skeleton
from tmu_dist.models.convolution import Convolution
from tmu_dist.models.rollout import Predictor
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.adapter import TeacherPlan
from tmu_dist.teachers.bank import (
    FrozenTeacher,
    ReplicatedBank,
    Shown,
    Teaching,
    Wanted,
    held_bytes,
)
from tmu_dist.teachers.batched import BatchedBank, BatchedTeachers, Likeness, run_together, together
from tmu_dist.teachers.card import DataFacts
from tmu_dist.teachers.joined import unjoinable
from tmu_dist.teachers.placed import PlacedBank
from tmu_dist.teachers.placement import Placement
from tmu_dist.teachers.sourced import SourcedPredictor
from tmu_dist.teachers.store import model_files
from tmu_dist.transfer.base import TaughtMethod
from tmu_dist.transfer.prepare import PreparedTransfer, prepare_transfer

INPUTS, FRAMES = 3, 6
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
ALL: tuple[Wanted, ...] = ("memory", "hidden", "predictions")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def savp(**settings: Any) -> ModelConfig:
    return ModelConfig(cell="savp", savp=SAVPConfig(base_channels=2, **settings))


VARIANTS = {
    "full-peepholes": replace(TINY_MODEL, peephole="full"),
    "normalised": replace(TINY_MODEL, gate_norm="layer", norm_affine="channel"),
    "apart": replace(TINY_MODEL, gate_form="apart", gate_norm="layer"),
    "shared-st": replace(TINY_MODEL, cell="predrnn", st_form="shared"),
    "mim-paper": replace(TINY_MODEL, cell="mim", mim_output_gate="paper", gate_norm="layer"),
    "e3d-code": replace(TINY_MODEL, cell="e3d_lstm", e3d_memory="code", recall_window=2),
    "savp-dna": savp(latent_size=2, posterior_channels=2, transformation="dna", prior="learned"),
    "savp-flow": savp(latent_size=0, transformation="flow"),
}


def model_of(cell: str) -> ModelConfig:
    return MODELS.get(cell) or replace(TINY_MODEL, cell=cell)


def network(model: ModelConfig, seed: int) -> Predictor:
    """Every weight drawn, those too that begin as zeros or ones."""
    torch.manual_seed(seed)
    built = build_predictor(FRAME, model)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return built


def teachers_of(
    model: ModelConfig, count: int = 3, *, seed: int = 0, **settings: Any
) -> list[FrozenTeacher]:
    settings = {"wanted": ALL} | settings
    return [FrozenTeacher(network(model, seed + m), **settings) for m in range(count)]


def shown(teacher: FrozenTeacher, dtype: torch.dtype = torch.float32, **changes: Any) -> Shown:
    given = batch(1, frames=FRAMES, noise_size=teacher.network.noise_size)
    noise = given.noise_BTZ
    return Shown(
        given.frames_BTCHW.to(dtype),
        INPUTS,
        FRAMES,
        given.sampling_mask_BT,
        None if noise is None else noise.to(dtype),
    )._replace(**changes)


def assert_alike(found: Sequence[Teaching], expected: Sequence[Teaching], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        for told, values in one.tensors().items():
            wanted = other.tensors()[told]
            assert (values.shape, values.dtype) == (wanted.shape, wanted.dtype)
            assert values.is_contiguous() and wanted.is_contiguous()
            assert not values.requires_grad
            difference = (values - wanted).norm() / wanted.norm()
            assert difference <= tolerance, (told, float(difference))


def check(teachers: Sequence[FrozenTeacher], given: Shown, tolerance: float) -> None:
    """Together as apart, with grouped convolutions too; none tells what another does."""
    expected = ReplicatedBank(teachers).teach(given)
    dtype = given.frames_BTCHW.dtype
    for grouped in (False, True):
        told = ask(BatchedTeachers(teachers, grouped=grouped), given)
        assert_alike([each.to(dtype) for each in told], expected, tolerance)
    for which, values in expected[0].tensors().items():
        assert not torch.equal(expected[1].tensors()[which], values)


def ask(teach: Any, given: Shown) -> Any:
    arguments = given._asdict()
    del arguments["key"]
    return teach(arguments.pop("frames_BTCHW"), **arguments)


# What they tell


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*(name for name in BACKBONES if name != "vpn"), *VARIANTS])
def test_together_they_tell_what_each_tells_by_itself(name: str, dtype: torch.dtype) -> None:
    teachers = teachers_of(VARIANTS.get(name) or model_of(name))
    for teacher in teachers:
        teacher.to(dtype)
    # Normalisations of a few pixels amplify what is rounded.
    tolerance = TOLERANCE[dtype] * (5 if name.startswith(("savp", "mim-paper")) else 1)
    check(teachers, shown(teachers[0], dtype), tolerance)


def test_who_runs_alone() -> None:
    """Networks with weights that no module for many networks stands for; a new kind is one."""
    found = {name: unjoinable(skeleton(FRAME, model_of(name))) for name in BACKBONES}
    assert found == dict.fromkeys(BACKBONES, ()) | {"vpn": ("CausalConv2d",)}
    shifted = replace(TINY_MODEL, cell="e3d_openstl", gate_norm="layer")
    assert unjoinable(skeleton(FRAME, shifted)) == ("OpenSTLE3DCell",)
    teachers = teachers_of(model_of("vpn"))
    with pytest.raises(ValueError, match="CausalConv2d has no form for many networks"):
        BatchedTeachers(teachers)
    groups = together(dict(enumerate(teachers)))
    assert [group.numbers for group in groups] == [(0,), (1,), (2,)]
    given = shown(teachers[0])
    assert_alike(BatchedBank(teachers).teach(given), ReplicatedBank(teachers).teach(given), 0.0)


@pytest.mark.parametrize("mask", ["own", "truth", "none"])
def test_each_reads_its_own_predictions(mask: str) -> None:
    """Where the mask hides a frame, and closed-loop; or none does (teacher_input=truth)."""
    teachers = teachers_of(TINY_MODEL)
    given = shown(teachers[0])
    masks = {
        "own": torch.zeros_like(given.sampling_mask_BT),
        "truth": torch.ones_like(given.sampling_mask_BT),
        "none": None,
    }
    check(teachers, given._replace(sampling_mask_BT=masks[mask]), 1e-6)


def test_networks_with_teachers_inside_and_around() -> None:
    """Students may teach: with memory transfer, and with sources that they read."""
    slots = []
    for seed in range(2):
        torch.manual_seed(seed)
        student = build_predictor(FRAME, TINY_MODEL, tmu=TMUConfig(), num_slots=2)
        slots.append(FrozenTeacher(student, wanted=ALL))
    check(slots, shown(slots[0]), 1e-6)
    sourced = [
        FrozenTeacher(
            SourcedPredictor(
                network(TINY_MODEL, seed),
                [FrozenTeacher(network(TINY_MODEL, 10 + seed + m)) for m in range(2)],
                ARTConfig(sources="sequential"),
            ),
            wanted=ALL,
        )
        for seed in range(2)
    ]
    check(sourced, shown(sourced[0]), 1e-6)


def test_other_frames_layers_and_maps() -> None:
    """What is adapted for one is adapted for all."""
    card = card_of(SMALL, replace(TINY_MODEL, num_layers=3))
    adapter = AdapterConfig(frames="resize", grid="resample", layers="stretch")
    plan = plan_of(card, adapter)
    assert plan.frame is not None and [layer.teacher_layer for layer in plan.layers.values()]
    teachers = [FrozenTeacher(network_of(card, seed), plan, ALL) for seed in range(3)]
    check(teachers, shown(teachers[0]), 1e-6)


@pytest.mark.parametrize("memories", ["full", "fp16"])
def test_in_the_precision_of_teachers_and_of_what_they_tell(memories: str) -> None:
    """Of bfloat16 the sums may be rounded elsewhere."""
    teachers = teachers_of(TINY_MODEL, precision="bf16", memories=memories)
    check(teachers, shown(teachers[0]), 2e-2)
    told = ask(BatchedTeachers(teachers), shown(teachers[0]))
    dtype = torch.float32 if memories == "full" else torch.float16
    assert {value.dtype for each in told for value in each.tensors().values()} == {dtype}


def test_each_uses_the_convolutions_that_its_network_was_arranged_for() -> None:
    """Also those that keep something of their weights, and cells whose gates are one pass."""
    wide = replace(TINY_MODEL, hidden_channels=16, kernel_size=5)
    teachers = teachers_of(wide)
    for teacher in teachers:
        arrange(teacher.network, ComputeConfig(convolution="winograd"))
    given = shown(teachers[0])
    # Winograd's filtering is ten times as far from exact as the library's convolutions.
    assert_alike(BatchedBank(teachers).teach(given), ReplicatedBank(teachers).teach(given), 1e-5)
    convolutions = [
        each
        for each in teachers[2].modules()
        if isinstance(each, Convolution) and each.kernel_size == (5, 5)
    ]
    before = [each._filters() for each in convolutions]
    BatchedBank(teachers).teach(given)
    assert before and all(a is b._filters() for a, b in zip(before, convolutions, strict=True))


def test_compiled_layers_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of all teachers as one, not those of each (compute.arithmetic=compiled)."""
    calls = []

    def compiled(step: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            calls.append(step.__self__)
            return step(*arguments)

        return counted

    monkeypatch.setattr(torch, "compile", compiled)
    teachers = teachers_of(TINY_MODEL)
    for teacher in teachers:
        arrange(teacher.network, ComputeConfig(arithmetic="compiled"))
    given = shown(teachers[0])
    expected = ReplicatedBank(teachers).teach(given)
    assert len(set(calls)) == 3 * TINY_MODEL.num_layers
    calls.clear()
    assert_alike(BatchedBank(teachers).teach(given), expected, 1e-6)
    assert len(set(calls)) == TINY_MODEL.num_layers
    assert len(calls) == TINY_MODEL.num_layers * (FRAMES - 1)


def test_under_autocast_convolutions_are_in_half_precision() -> None:
    """As the step's own precision has it (training.precision), not only that of teachers."""
    teachers = teachers_of(TINY_MODEL)
    given = shown(teachers[0])
    exact = ReplicatedBank(teachers).teach(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(teachers, given, 2e-2)
        found = ask(BatchedTeachers(teachers, grouped=True), given)
    with pytest.raises(AssertionError):
        assert_alike(found, exact, 1e-4)


# Who is alike


def test_groups_are_those_of_one_architecture_and_use() -> None:
    """Also where weights have the same shapes and only a setting is another."""
    one = TINY_MODEL
    plan = TeacherPlan.unchanged(skeleton(FRAME, one).memory_shapes)
    fewer = replace(plan, layers={1: plan.layers[1]})
    makers: list[tuple[ModelConfig, dict[str, Any]]] = [
        (one, {}),
        (model_of("vpn"), {}),
        (replace(one, cell="predrnn"), {}),
        (one, {}),
        (replace(one, forget_bias=1.0), {}),
        (model_of("vpn"), {}),
        (replace(one, hidden_channels=6), {}),
        (one, {"wanted": ("memory",)}),
        (one, {"plan": fewer}),
        (one, {"precision": "fp32"}),
        (one, {"memories": "fp16"}),
        (replace(one, cell="predrnn"), {}),
        (one, {}),
        (one, {"precision": "fp32"}),
    ]
    teachers = [
        FrozenTeacher(network(model, seed), **{"wanted": ALL, **settings})
        for seed, (model, settings) in enumerate(makers)
    ]
    found = [group.numbers for group in together(dict(enumerate(teachers)))]
    assert found == [(0, 3, 12), (1,), (2, 11), (4,), (5,), (6,), (7,), (8,), (9, 13), (10,)]
    given = shown(teachers[0])
    expected = ReplicatedBank(teachers).teach(given)
    assert_alike(BatchedBank(teachers).teach(given), expected, 1e-6)


def test_a_setting_of_an_unknown_kind_keeps_teachers_apart() -> None:
    teachers = teachers_of(TINY_MODEL, 2)
    assert Likeness.of(teachers[0]) == Likeness.of(teachers[1])
    for teacher in teachers:
        teacher.network.stack.scale = torch.ones(1)  # type: ignore[union-attr]
    assert Likeness.of(teachers[0]) != Likeness.of(teachers[1])


@pytest.mark.parametrize("cell", sorted(BACKBONES))
def test_likeness_needs_no_weights(cell: str) -> None:
    """Every rank knows from cards alone what runs together on the others."""
    model = model_of(cell)
    real = FrozenTeacher(network(model, 1), wanted=ALL, precision="bf16")
    outline = FrozenTeacher(skeleton(FRAME, model), wanted=ALL, precision="bf16")
    assert Likeness.of(real) == Likeness.of(outline)
    assert Likeness.of(real) != Likeness.of(FrozenTeacher(skeleton(FRAME, model), wanted=ALL))


def test_what_cannot_be_stacked_is_refused() -> None:
    teachers = teachers_of(TINY_MODEL, 2)
    for members, reason in (
        (teachers[:1], "there is only 1"),
        ([teachers[0], *teachers_of(replace(TINY_MODEL, hidden_channels=6), 1)], "architecture"),
        ([teachers[0], *teachers_of(TINY_MODEL, 1, wanted=("memory",))], "differ in their wanted"),
        ([teachers[0], teachers[0]], "joined with itself"),
    ):
        with pytest.raises(ValueError, match=reason):
            BatchedTeachers(members)


# Where their weights lie


def storages(teachers: Sequence[FrozenTeacher]) -> int:
    """Bytes of memory that their weights take, whoever shares them."""
    values = [each for teacher in teachers for each in (*teacher.parameters(), *teacher.buffers())]
    by_address = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in values}
    return sum(storage.nbytes() for storage in by_address.values())


def test_nothing_is_held_twice_and_every_teacher_stays_what_it_was() -> None:
    teachers = teachers_of(TINY_MODEL)
    card = card_of(FRAME, TINY_MODEL)
    files = [model_files(teacher.network.state_dict(), card) for teacher in teachers]
    size, parameters = held_bytes(ReplicatedBank(teachers)), [*map(count_parameters, teachers)]
    bank = BatchedBank(teachers)
    bank.teach(shown(teachers[0]))
    assert storages(teachers) == held_bytes(bank) == size
    assert bank.own == tuple(teachers) and list(bank.parameters_per_teacher) == parameters
    assert [model_files(teacher.network.state_dict(), card) for teacher in teachers] == files
    for teacher in teachers:
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_moved_teachers_are_stacked_anew() -> None:
    teachers = teachers_of(TINY_MODEL)
    bank = BatchedBank(teachers)
    for teacher in teachers:
        teacher.to(torch.float64)
    given = shown(teachers[0], torch.float64)
    assert_alike(bank.teach(given), ReplicatedBank(teachers).teach(given), 1e-12)
    assert storages(teachers) == held_bytes(bank)
    teachers[1].to(memory_format=torch.channels_last)
    assert_alike(bank.teach(given), ReplicatedBank(teachers).teach(given), 1e-12)


def test_memory_format_is_kept() -> None:
    teachers = teachers_of(TINY_MODEL)
    for teacher in teachers:
        teacher.to(memory_format=torch.channels_last)
    strides = [p.stride() for p in teachers[2].parameters()]
    bank = BatchedBank(teachers)
    assert [p.stride() for p in teachers[2].parameters()] == strides
    assert any(not p.is_contiguous() for p in teachers[2].parameters())
    given = shown(teachers[0])
    assert_alike(bank.teach(given), ReplicatedBank(teachers).teach(given), 1e-6)


def test_other_weights_of_one_teacher_are_its_own() -> None:
    teachers, (other,) = teachers_of(TINY_MODEL), teachers_of(TINY_MODEL, 1, seed=9)
    given = shown(teachers[0])
    bank = BatchedBank(teachers)
    before = bank.teach(given)
    teachers[1].load_state_dict(other.state_dict())
    after = bank.teach(given)
    assert_alike([after[1]], ReplicatedBank([other]).teach(given), 1e-6)
    assert_alike([after[0], after[2]], [before[0], before[2]], 0.0)
    with pytest.raises(AssertionError):
        assert_alike([after[1]], [before[1]], 1e-3)


# Placed


def placed(teachers: Sequence[FrozenTeacher], *, batch: bool) -> PlacedBank:
    return PlacedBank(
        dict(enumerate(teachers)),
        holders=[0] * len(teachers),
        plans=[teacher.plan for teacher in teachers],
        parameters_per_teacher=[count_parameters(teacher) for teacher in teachers],
        group=ALONE,
        wanted=ALL,
        batch=batch,
    )


def test_a_holder_runs_its_teachers_that_are_alike_at_once() -> None:
    alike, unlike = teachers_of(TINY_MODEL), teachers_of(replace(TINY_MODEL, cell="mim"), 1)
    teachers = [alike[0], *unlike, *alike[1:]]
    given = shown(teachers[0])
    expected = placed(teachers, batch=False).teach(given)
    bank = placed(teachers, batch=True)
    calls = []
    for numbers in ((0, 2, 3), (1,)):
        group = bank._groups[numbers[0]]
        assert group.numbers == numbers
        counted = _counted(group.teach, numbers, calls)
        bank._groups |= dict.fromkeys(numbers, group._replace(teach=counted))
    assert_alike(bank.teach(given), expected, 1e-6)
    assert calls == [(0, 2, 3), (1,)]


def _counted(teach: Any, numbers: tuple[int, ...], calls: list[tuple[int, ...]]) -> Any:
    def counted(*arguments: Any, **shown: Any) -> Any:
        calls.append(numbers)
        return teach(*arguments, **shown)

    return counted


# The setting


def placement(kind: str, *holders: int) -> Placement:
    return Placement(kind=kind, holders=holders, resident_bytes=(0, 0))  # type: ignore[arg-type]


def likenesses(*models: ModelConfig) -> list[Likeness]:
    return [Likeness.of(FrozenTeacher(skeleton(FRAME, model), wanted=ALL)) for model in models]


def test_auto_is_for_gpus_that_hold_all_teachers() -> None:
    three = likenesses(*[TINY_MODEL] * 3)
    assert run_together("auto", three, placement("replicated"), CUDA)
    assert not run_together("auto", three, placement("replicated"), CPU)
    for kind in ("placed", "sharded", "cached"):
        assert not run_together("auto", three, placement(kind, 0, 1, 0), CUDA)
    for kind in ("replicated", "placed", "sharded", "cached"):
        assert not run_together("off", three, placement(kind, 0, 1, 0), CUDA)
    assert run_together("on", three, placement("replicated"), CPU)
    assert run_together("on", three, placement("placed", 0, 1, 0), CPU)


OTHER = replace(TINY_MODEL, hidden_channels=6)


@pytest.mark.parametrize(
    ("models", "where", "message"),
    [
        ([TINY_MODEL] * 2, placement("sharded"), "placement.kind=sharded, which gathers"),
        ([TINY_MODEL] * 2, placement("cached"), "placement.kind=cached, which runs no teachers"),
        ([TINY_MODEL], placement("replicated"), "there is only 1. Leave it out"),
        ([TINY_MODEL, OTHER], placement("replicated"), "they differ in their architecture"),
        (
            [model_of("vpn")] * 2,
            placement("replicated"),
            "CausalConv2d has no form for many networks",
        ),
        (
            [model_of("vpn"), TINY_MODEL, OTHER],
            placement("replicated"),
            "CausalConv2d has no form for many networks; they differ in their architecture",
        ),
        (
            [TINY_MODEL, OTHER, TINY_MODEL, OTHER],
            placement("placed", 0, 0, 1, 1),
            "no two teachers of a rank can run as one network: they differ in their architecture",
        ),
        ([TINY_MODEL] * 2, placement("placed", 0, 1), "those that are alike lie on different"),
    ],
)
def test_on_with_nothing_to_run_together_is_refused(
    models: list[ModelConfig], where: Placement, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"compute.batch_teachers=on.*{message}"):
        run_together("on", likenesses(*models), where, CPU)


def prepare(
    config: RunConfig, group: RankGroup | None = None, device: torch.device = CPU
) -> PreparedTransfer:
    data = DataFacts.of(open_archive(config.data.url).manifest)
    return prepare_transfer(config, FRAME, data, device, group)


def with_choice(config: RunConfig, choice: str, **changes: Any) -> RunConfig:
    compute = ComputeConfig(batch_teachers=choice)  # type: ignore[arg-type]
    return replace(config, compute=compute, **changes)


def bank_of(config: RunConfig, group: RankGroup | None = None) -> Any:
    method = prepare(config, group).method
    assert isinstance(method, TaughtMethod)
    return method.bank


def test_the_setting_makes_the_bank(tmu_config: RunConfig) -> None:
    for choice, kind in (("auto", ReplicatedBank), ("off", ReplicatedBank), ("on", BatchedBank)):
        assert type(bank_of(with_choice(tmu_config, choice))) is kind
    held_by_one = with_choice(tmu_config, "on", placement=PlacementConfig(kind="placed"))
    assert type(bank_of(held_by_one)) is BatchedBank  # one rank alone holds all


def test_the_setting_is_refused_before_anything_is_loaded(tmu_config: RunConfig) -> None:
    two = RankGroup(range(2), 0)
    for changes, group, message in (
        ({"placement": PlacementConfig(kind="sharded")}, two, "placement.kind=sharded"),
        ({"placement": PlacementConfig(kind="placed")}, two, "lie on different ranks"),
        (
            {
                "placement": PlacementConfig(kind="cached", cache="nowhere"),
                "transfer": replace(tmu_config.transfer, teacher_input="truth"),
            },
            None,
            "placement.kind=cached",
        ),
        ({"transfer": replace(tmu_config.transfer, method="art")}, None, "transfer.method=art no"),
    ):
        with pytest.raises(ConfigError, match=f"compute.batch_teachers=on.*{message}"):
            prepare(with_choice(tmu_config, "on", **changes), group)
    with pytest.raises(ConfigError, match="transfer.method=scratch no teacher runs beside"):
        prepare(
            with_overrides(
                tmu_config,
                {
                    "compute.batch_teachers": "on",
                    "transfer.method": "scratch",
                    "transfer.teachers": (),
                },
            )
        )


@pytest.mark.parametrize("teacher_input", ["own", "student", "truth"])
def test_a_run_learns_the_same(tmu_config: RunConfig, teacher_input: str) -> None:
    def losses(choice: str) -> list[float]:
        transfer = replace(tmu_config.transfer, teacher_input=teacher_input)  # type: ignore[arg-type]
        config = with_choice(tmu_config, choice, transfer=transfer)
        folder = run(replace(config, output=f"{config.output}-{choice}")).run
        return [e["loss/distillation"] for e in read_log(folder) if e["event"] == "train"]

    together, apart = losses("on"), losses("off")
    assert len(together) > 1 and together == pytest.approx(apart, rel=1e-5)
