"""One entry for every transfer method, and what the contract of methods needs of each.

The suite is tests/contracts/test_transfer_method.py: a new method is an entry of `CASES`.

Legend: B batch, T time, C channels, H, W height, width, Z noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tmu_dist.collectives import Collectives
from tmu_dist.config import (
    ARTConfig,
    BetaSchedule,
    DistillationConfig,
    ImitationConfig,
    KnowledgeFlowConfig,
    L2SPConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TMUConfig,
    TransferConfig,
    WindowConfig,
)
from tmu_dist.config.transfer import Method
from tmu_dist.models.build import build_predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.bank import FrozenTeacher
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import write_model
from tmu_dist.training.loop import Run
from tmu_dist.transfer.base import LossTerms, TrainingBatch

CPU = torch.device("cpu")
NOTHING: Mapping[str, Any] = MappingProxyType({})
FRAME = FrameShape(channels=1, height=16, width=16)
STEPS = 6
"""Iterations of a case's run; the phases of a method are laid out over them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to run a method, and what its paper says of it."""

    settings: Mapping[str, Any]
    """Of `TransferConfig`, without teachers."""
    teachers: int = 0
    terms: frozenset[str] = frozenset()
    """Terms of the objective beside the prediction error, while teachers teach."""
    beside: int = 0
    """Trained numbers beside the student: mixtures, transforms, regressors of the tiny network."""
    network: Literal["plain", "slots", "sources"] = "plain"
    """What predicts at test time: the plain network; with distillers and gates; with teachers."""
    starts: bool = False
    """Whether the plain part starts from a teacher's weights."""
    off: Mapping[str, Any] = field(default_factory=dict)
    """Settings that switch the transfer off."""
    twin: str = ""
    """The case that it then equals, bit for bit."""


def _taught(
    method: Method, *terms: str, settings: Mapping[str, Any] = NOTHING, **facts: Any
) -> Case:
    """A method with two teachers beside the student."""
    return Case(
        settings={"method": method, **settings}, teachers=2, terms=frozenset(terms), **facts
    )


_FLOW = KnowledgeFlowConfig(alone_fraction=0.5, independence=0.2, consistency=0.1)

CASES: dict[str, Case] = {
    "scratch": Case(settings={"method": "scratch"}),
    "tmu_scratch": Case(settings={"method": "tmu_scratch", "num_slots": 2}, network="slots"),
    "finetune": Case(settings={"method": "finetune"}, teachers=1, starts=True),
    "l2_sp": Case(
        settings={"method": "l2_sp", "l2_sp": L2SPConfig(alpha=0.1)},
        teachers=1,
        starts=True,
        terms=frozenset({"l2_sp_start"}),
        off={"l2_sp": L2SPConfig(alpha=0.0, beta=0.0)},
        twin="finetune",
    ),
    "knowledge_flow": _taught(
        "knowledge_flow",
        *("independence", "consistency"),
        settings={"knowledge_flow": _FLOW},
        beside=2 * 3 + 2 * 2 * 4 * 4,
        off={"knowledge_flow": KnowledgeFlowConfig(alone_fraction=1.0)},
        twin="scratch",
    ),
    "knowledge_flow-all": _taught(
        "knowledge_flow",
        "independence",
        settings={
            "knowledge_flow": replace(_FLOW, candidates="all", kernel_size=3, consistency=0.0),
            "teacher_input": "truth",
        },
        beside=2 * 5 + 2 * 4 * 4 * 4 * 9,
    ),
    "art": _taught("art", network="sources"),
    "art-sequential": _taught(
        "art",
        settings={
            "art": ARTConfig(
                states="hidden", sources="sequential", kernel_size=3, gate=False, window=2
            ),
            "start": StartConfig(teacher=1),
        },
        starts=True,
        network="sources",
    ),
    "distillation": _taught(
        "distillation",
        *("features", "responses"),
        settings={"distillation": DistillationConfig(features=0.5, responses=0.5)},
        beside=2 * 2 * 4 * 4,
        off={"distillation": DistillationConfig(features=0.0, responses=0.0)},
        twin="scratch",
    ),
    "tmu": _taught("tmu", "distillation", network="slots", off={"beta": 0.0}, twin="tmu_scratch"),
    "tmu-shuffled": _taught(
        "tmu",
        "distillation",
        settings={
            "control": "shuffled",
            "teacher_input": "student",
            "imitation": ImitationConfig(layers=(1,), teacher_weights=(1.0, 0.5), masking="memory"),
        },
        network="slots",
        off={"beta": 0.0},
        twin="tmu_scratch",
    ),
    "tmu-annealed": _taught(
        "tmu",
        "distillation",
        settings={
            "beta_schedule": BetaSchedule(shape="linear", start=2, stop=STEPS),
            "imitation": ImitationConfig(scale="variance"),
            "imitation_start": "memories",
        },
        network="slots",
    ),
}


def case_of(config: RunConfig, name: str, teachers: tuple[str, ...], **changes: Any) -> RunConfig:
    """A run of one case.

    Args:
        config: of a run without transfer.
        name: of the case.
        teachers: folders; as many as the case needs are taken, from the first.
        changes: further settings of the transfer.
    """
    case = CASES[name]
    settings = {**case.settings, "teachers": teachers[: case.teachers], **changes}
    return replace(
        config,
        output=f"{config.output}-{name}",
        training=replace(config.training, num_steps=STEPS, learning_rate=1e-2),
        transfer=TransferConfig(**settings),
    )


def numbers_of_merges(config: RunConfig) -> int:
    """Weights of the merges of attentive transfer, counted from the paper's equations."""
    art, model, teachers = config.transfer.art, config.model, len(config.transfer.teachers)
    square, filter_size = model.hidden_channels**2, art.kernel_size**2
    layers = [model.patch_size**2, *[model.hidden_channels] * (model.num_layers - 1)]
    merges = 0
    for in_channels in layers:
        merges += 2 * square + model.hidden_channels  # Wa, Ua, v
        merges += 2 * square * filter_size if art.gate else 0  # Uo, Co
        merges += 3 * (in_channels * model.hidden_channels + 2 * square) * filter_size  # r, z, n
        merges += teachers if art.gate and art.sources == "joint" else 0  # q
    return merges * (2 if art.states == "both" else 1) * (1 if art.sources == "joint" else teachers)


def built(config: RunConfig) -> Run:
    """The parts of a run as its first start makes them; nothing is written."""
    return Run(config, Collectives(), CPU)


def untrained_teachers(folder: Path, model: ModelConfig, data: DataFacts) -> tuple[str, ...]:
    """Folders of two teachers as they are before any training."""
    written = []
    for seed in range(2):
        card = TeacherCard(
            name=f"{model.cell}-{seed}",
            method="scratch",
            step=1,
            seed=seed,
            frame=FRAME,
            window=WindowConfig(num_input_frames=3, num_target_frames=3),
            model=model,
            tmu=TMUConfig(),
            num_slots=0,
            data=data,
        )
        torch.manual_seed(seed)
        write_model(folder / card.name, build_predictor(FRAME, model), card)
        written.append(str(folder / card.name))
    return tuple(written)


def batch(step: int = 1, *, size: int = 4, frames: int = 6, noise_size: int = 0) -> TrainingBatch:
    """Random frames of 16x16 of which three are inputs; every step has others.

    `size` is even, as shuffled teachers need it.
    """
    generator = torch.Generator().manual_seed(step)
    return TrainingBatch(
        frames_BTCHW=torch.rand(size, frames, 1, 16, 16, generator=generator),
        observed_BTCHW=None,
        sampling_mask_BT=torch.rand(size, frames - 4, generator=generator) < 0.5,
        weights_B=torch.full((size,), 1 / size),
        noise_BTZ=torch.randn(size, frames - 1, noise_size, generator=generator)
        if noise_size
        else None,
        step=step,
    )


def masked(given: TrainingBatch) -> TrainingBatch:
    """The same batch with pixels and areas missing; of the last sequence everything is."""
    generator = torch.Generator().manual_seed(9)
    observed = torch.rand(given.frames_BTCHW.shape, generator=generator) < 0.7
    observed[:, :, :, :8, 4:12] = False
    observed[-1] = False
    return replace(given, frames_BTCHW=given.frames_BTCHW * observed, observed_BTCHW=observed)


def trained(run: Run, steps: int) -> Run:
    """The same run after so many iterations on `batch`."""
    for step in range(1, steps + 1):
        run.training_step(batch(step))
    return run


# Looking into a run


def teachers_of(run: Run) -> list[FrozenTeacher]:
    """Every frozen teacher that a run's method holds, however deep."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [run.transfer.method]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, str | type):
            continue
        seen[id(each)] = each
        if isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, Sequence):
            waiting += each
        else:
            waiting += vars(each).values() if hasattr(each, "__dict__") else ()
    return [each for each in seen.values() if isinstance(each, FrozenTeacher)]


def optimised(run: Run) -> list[nn.Parameter]:
    """What the run's optimiser may change."""
    return [p for group in run.training_step.optimizer.param_groups for p in group["params"]]


def learning(module: nn.Module) -> dict[str, nn.Parameter]:
    """Its parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def terms_of(run: Run, given: TrainingBatch) -> LossTerms:
    """What the run's method minimises on a batch."""
    return run.transfer.method.loss(run.trainee, given)


def gradients(run: Run, terms: LossTerms, of: nn.Module) -> dict[str, Tensor | None]:
    """Of the objective, by name of the parameter; None where there is no path."""
    parameters = learning(of)
    found = torch.autograd.grad(
        terms.total(), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return dict(zip(parameters, found, strict=True))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, whatever their names."""
    return one.shape == other.shape and torch.equal(one, other)


def differ(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    """Whether any of two sets of gradients of the same parameters is another."""
    assert one.keys() == other.keys()
    pairs = ((value, other[name]) for name, value in one.items())
    return any(a is not b and (a is None or b is None or not torch.equal(a, b)) for a, b in pairs)
