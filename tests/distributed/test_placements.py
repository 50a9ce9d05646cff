"""Wherever teachers lie, students get the same gradients, logs and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.conftest import TINY_MODEL
from tests.distributed.test_ranks import spawn
from tests.transfer_methods import CPU, batch, masked
from tests.unit.test_training import MODELS
from tmu_dist.collectives import Collectives, RankGroup
from tmu_dist.config import (
    AdapterConfig,
    DistillationConfig,
    KnowledgeFlowConfig,
    ModelConfig,
    PlacementConfig,
    RunConfig,
    ScaleConfig,
    TMUConfig,
    TransferConfig,
    WindowConfig,
)
from tmu_dist.data.loader import open_archive
from tmu_dist.models.build import build_predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.bank import Shown, TeacherBank
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError
from tmu_dist.teachers.store import load_model, write_model
from tmu_dist.training.loop import train
from tmu_dist.transfer.base import TaughtMethod, TrainingBatch
from tmu_dist.transfer.prepare import PreparedTransfer, prepare_transfer

pytestmark = pytest.mark.distributed
FRAME = FrameShape(channels=1, height=16, width=16)
SMALLER = FrameShape(channels=1, height=8, width=8)
PREDRNN = replace(TINY_MODEL, cell="predrnn")
OTHER = replace(TINY_MODEL, hidden_channels=6, num_layers=3)
ANY = AdapterConfig(frames="resize", channels="project", grid="resample", layers="stretch")
KINDS = ("replicated", "placed", "sharded")


@dataclass(frozen=True)
class Case:
    """A method, its teachers, and its student's network."""

    method: str
    teachers: Sequence[str]
    settings: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = TINY_MODEL

    def config(self, config: RunConfig, **placement: Any) -> RunConfig:
        settings = {"method": self.method, "teachers": tuple(self.teachers), **self.settings}
        return replace(
            config,
            model=self.model,
            transfer=TransferConfig(**settings),
            placement=PlacementConfig(**placement),
        )


@pytest.fixture(scope="module")
def folders(archive_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Untrained teachers by kind."""
    data = DataFacts.of(open_archive(archive_url).manifest)
    place = tmp_path_factory.mktemp("teachers")

    def written(name: str, *networks: tuple[ModelConfig, FrameShape]) -> list[str]:
        found = []
        for seed, (model, frame) in enumerate(networks):
            card = TeacherCard(
                name=f"{name}-{seed}", method="scratch", step=1, seed=seed, frame=frame,
                window=WindowConfig(num_input_frames=3, num_target_frames=3), model=model,
                tmu=TMUConfig(), num_slots=0, data=data,
            )  # fmt: skip
            torch.manual_seed(seed)
            write_model(place / card.name, build_predictor(frame, model), card)
            found.append(str(place / card.name))
        return found

    return {
        "plain": written("plain", *[(TINY_MODEL, FRAME)] * 5),
        "predrnn": written("predrnn", *[(PREDRNN, FRAME)] * 3),
        "mixed": written("mixed", (OTHER, FRAME), (TINY_MODEL, SMALLER), (PREDRNN, FRAME)),
        "savp": written("savp", *[(MODELS["savp"], FRAME)] * 2),
        "many": written("many", *[(TINY_MODEL, FRAME)] * 41),
    }


def cases(folders: dict[str, list[str]]) -> dict[str, Case]:
    """Every method, uneven numbers of teachers, and all that can travel."""
    plain = folders["plain"]
    both = DistillationConfig(features=0.5, responses=0.5)
    flow = KnowledgeFlowConfig(candidates="all", independence=0.2)
    student = {"control": "shuffled", "teacher_input": "student"}
    return {
        **{f"tmu-{count}": Case("tmu", plain[:count]) for count in (1, 2, 3, 5)},
        "tmu-shuffled": Case("tmu", plain[:3], student),
        "tmu-random": Case("tmu", plain[:3], {"control": "random_weights"}),
        "tmu-mixed": Case("tmu", folders["mixed"], {"adapter": ANY}),
        "tmu-zigzag": Case("tmu", folders["predrnn"], {"tmu": TMUConfig(zigzag=True)}, PREDRNN),
        "tmu-savp": Case("tmu", folders["savp"], {"teacher_input": "truth"}, MODELS["savp"]),
        "distillation": Case("distillation", plain[:3], {"distillation": both}),
        "knowledge_flow": Case("knowledge_flow", plain[:3], {"knowledge_flow": flow}),
    }


def prepared(config: RunConfig, group: RankGroup) -> PreparedTransfer:
    data = DataFacts.of(open_archive(config.data.url).manifest)
    return prepare_transfer(config, FRAME, data, CPU, group)


def bank_of(transfer: PreparedTransfer) -> TeacherBank:
    assert isinstance(transfer.method, TaughtMethod)
    return transfer.method.bank


def share(rank: int, *, noise_size: int = 0) -> TrainingBatch:
    """A rank's two sequences, with missing pixels, of codes as archives store them."""
    given = masked(batch(1 + rank, size=2, noise_size=noise_size))
    frames = (given.frames_BTCHW * 255).round().float() / 255
    dtype = torch.get_default_dtype()
    noise = given.noise_BTZ
    return replace(
        given,
        frames_BTCHW=frames.to(dtype),
        noise_BTZ=None if noise is None else noise.to(dtype),
    )


def gradients(transfer: PreparedTransfer, rank: int) -> dict[str, Tensor]:
    """Of this rank's objective, for everything that is trained."""
    torch.manual_seed(0)
    student, _ = transfer.build_student()
    trainee = transfer.method.trainee(student)
    given = share(rank, noise_size=student.latent_size)
    transfer.method.loss(trainee, given).total().backward()
    found = {k: p.grad for k, p in trainee.named_parameters() if p.requires_grad}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def told(bank: TeacherBank, rank: int) -> list[Tensor]:
    """What all teachers tell of a rank's batch."""
    given = share(rank)
    teachings = bank.teach(
        Shown(
            given.frames_BTCHW,
            num_input_frames=3,
            num_frames=6,
            sampling_mask_BT=given.sampling_mask_BT,
        )
    )
    return [value for taught in teachings for value in taught.tensors().values()]


def same_tensors(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def own_bytes(bank: Any) -> int:
    """Of the weights that this rank holds of frozen teachers."""
    teachers = bank.own
    weights = [value for teacher in teachers for value in teacher.parameters()]
    return sum(
        (value.to_local() if isinstance(value, DTensor) else value).nbytes for value in weights
    )


# The same gradients


def _gradients(
    collectives: Collectives, config: RunConfig, by_name: dict[str, Case], group_size: int
) -> None:
    torch.set_default_dtype(torch.float64)
    rank, group = collectives.ranks.rank, collectives.group(group_size)
    for name, case in by_name.items():
        by_kind = {}
        for kind in KINDS:
            transfer = prepared(case.config(config, kind=kind), group)
            assert transfer.placement is not None
            assert transfer.placement.kind == (kind if group.size > 1 else "replicated")
            hashes = [card.weights_sha256 for card in transfer.teachers]
            facts = hashes, transfer.resident_parameters, bank_of(transfer).plans
            by_kind[kind] = gradients(transfer, rank), facts
        (replicated, facts), (placed, of_placed), (sharded, of_sharded) = by_kind.values()
        assert facts == of_placed == of_sharded, name
        assert replicated.keys() == placed.keys() == sharded.keys()
        assert any(gradient.any() for gradient in replicated.values())
        for key, gradient in replicated.items():
            assert torch.equal(placed[key], gradient), (name, key)
            torch.testing.assert_close(sharded[key], gradient, rtol=0, atol=1e-12)


def test_placements_give_the_same_gradients(
    tiny_config: RunConfig, folders: dict[str, list[str]]
) -> None:
    spawn(2, _gradients, tiny_config, cases(folders), 2)


def _groups(collectives: Collectives, config: RunConfig, few: dict[str, Case], many: Case) -> None:
    """Four ranks: two groups of two; three and one alone; and the memory of one group."""
    _gradients(collectives, config, {"in pairs": few["tmu-5"]}, 2)
    _gradients(collectives, config, few, 3)
    torch.set_default_dtype(torch.float32)
    group = collectives.group("all")
    for kind, case in (("placed", many), ("sharded", few["tmu-5"])):
        transfer = prepared(case.config(config, kind=kind), group)
        assert transfer.placement is not None
        resident = transfer.placement.resident_bytes[group.place]
        by_rank = collectives.all_gather_objects(own_bytes(bank_of(transfer)))
        one = 4 * transfer.resident_parameters[0]
        assert sum(by_rank) == len(case.teachers) * one
        if kind == "placed":
            assert sorted(by_rank) == [10 * one] * 3 + [11 * one]
            assert by_rank[group.place] == resident
        else:  # parts of each, some a little larger than others, and one teacher whole as it runs
            assert max(by_rank) < 1.4 * one
            assert resident == pytest.approx(5 / 4 * one + one, abs=5)


def test_groups_share_their_own_teachers_and_a_rank_holds_few(
    tiny_config: RunConfig, folders: dict[str, list[str]]
) -> None:
    few = {name: case for name, case in cases(folders).items() if name in ("tmu-1", "tmu-5")}
    spawn(4, _groups, tiny_config, few, Case("tmu", folders["many"]))


# Precision, and what goes wrong


def _rounded_and_refused(
    collectives: Collectives, config: RunConfig, case: Case, damaged: Case
) -> None:
    rank, group = collectives.ranks.rank, collectives.group("all")
    alone = RankGroup(range(1), 0)
    exact = told(bank_of(prepared(case.config(config), alone)), rank)
    for memories, precision in (("bf16", 2**-8), ("fp16", 2**-11)):
        for kind in KINDS:
            found = told(
                bank_of(prepared(case.config(config, kind=kind, memories=memories), group)), rank
            )
            dtype = torch.bfloat16 if memories == "bf16" else torch.float16
            assert same_tensors(found, [value.to(dtype).to(value.dtype) for value in exact])
            for value, true in zip(found, exact, strict=True):
                torch.testing.assert_close(value, true, rtol=precision, atol=1e-7)
    in_bf16 = [
        told(bank_of(prepared(case.config(config, kind=kind, precision="bf16"), group)), rank)
        for kind in KINDS
    ]
    assert same_tensors(in_bf16[0], in_bf16[1]) and same_tensors(in_bf16[0], in_bf16[2])
    assert not same_tensors(in_bf16[0], exact)

    def prepare() -> None:
        prepared(damaged.config(config, kind="placed"), group)

    for _ in range(2):  # and again: the ranks have not lost each other
        with pytest.raises(TeacherError, match=f"{Path(damaged.teachers[1]).name}.* is damaged"):
            collectives.on_all(prepare)


def test_precision_does_not_depend_on_the_holder_and_damage_ends_all(
    tiny_config: RunConfig, folders: dict[str, list[str]], tmp_path: Path
) -> None:
    copy = tmp_path / "rotten"
    loaded = load_model(folders["plain"][1])
    write_model(copy, loaded.model, loaded.card)
    content = bytearray((copy / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(content)
    plain = folders["plain"]
    both = DistillationConfig(features=0.5, responses=0.5)
    case = Case("distillation", plain[:3], {"distillation": both})
    damaged = Case("tmu", [plain[0], str(copy)])
    spawn(2, _rounded_and_refused, tiny_config, case, damaged)


# Whole runs


def _train(collectives: Collectives, configs: list[RunConfig]) -> None:
    for config in configs:
        train(config, collectives, CPU)


def _log(run: str) -> list[dict[str, Any]]:
    """What a run found, without what depends on time and place."""
    kept = ("train", "validation", "liveness")
    events = [event for event in read_log(run) if event["event"] in kept]
    timed = ("time", "seconds", "samples_per_second", "data_wait_fraction")
    return [{k: v for k, v in event.items() if k not in timed} for event in events]


def test_runs_are_the_same(tiny_config: RunConfig, folders: dict[str, list[str]]) -> None:
    case = Case("tmu", folders["plain"][:3])
    configs = [
        replace(
            case.config(tiny_config, kind=kind),
            output=f"{tiny_config.output}-{kind}-{at_once}",
            training=replace(tiny_config.training, num_steps=2),
            scale=ScaleConfig(sequences_at_once=at_once),
        )
        for at_once in (None, 1)
        for kind in KINDS
    ]
    spawn(2, _train, configs)
    for replicated, *others in (configs[:3], configs[3:]):
        log, weights = _log(replicated.output), load_model(replicated.output).model.state_dict()
        assert {event["event"] for event in log} == {"train", "validation", "liveness"}
        for config in others:
            assert _log(config.output) == log
            found = load_model(config.output).model.state_dict()
            assert same_tensors(list(found.values()), list(weights.values()))
