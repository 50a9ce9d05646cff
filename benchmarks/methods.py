"""What does every transfer method of the paper's Table 1 cost?

    python -m benchmarks.methods [--size small|paper] [--device cpu|cuda] [--repeats 5]

Each method trains the same ConvLSTM (without peepholes, as Table 1's counts have it), with two
frozen teachers or one to start from, with random weights and random frames: costs do not depend on
what a network has learned. All stand in one process and are timed one after the other, in a new
order in each repeat; ratios to the plain ConvLSTM are those within a repeat.

Parameters are those that are trained, those of the network that forecasts (test), and all that are
held in training, frozen teachers included. Table 1's 4.1M of Knowledge Flow at test count
transforms that a student which stands alone does not need. A training step is one update on a
batch of 8, teachers included; Knowledge Flow's while its teachers teach, which they do not in the
last part of a training. A forecast is that of one sequence, closed-loop. Operations are those of
convolutions and matrix products, forward and backward, a product with its sum counted as two.

Prints the table and writes results.json and table.md to docs/results/methods, or methods-paper.
Runs without Ray, WebDataset and Zarr.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.backbones.costs import (
    NUM_TEACHERS,
    SIZES,
    Size,
    timed,
    training_batch,
    training_step,
)
from benchmarks.backbones.report import PAPER, Stated
from benchmarks.provenance import (
    command_line,
    median_and_range,
    provenance,
    publish,
    say,
)
from tmu_dist.config import (
    AdapterConfig,
    ARTConfig,
    DistillationConfig,
    ImitationConfig,
    KnowledgeFlowConfig,
    L2SPConfig,
    ModelConfig,
    TMUConfig,
)
from tmu_dist.data.manifest import Units
from tmu_dist.evaluation.operations import count_operations
from tmu_dist.models.build import build_predictor, count_parameters, count_trained
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, Wanted
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.transfer.art import AttentiveTransfer
from tmu_dist.transfer.base import Objective, Task, TaughtMethod, TransferMethod
from tmu_dist.transfer.distillation import Distillation
from tmu_dist.transfer.knowledge_flow import KnowledgeFlow
from tmu_dist.transfer.l2_sp import L2SP
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.start import Start
from tmu_dist.transfer.tmu import MemoryDistillation

YARDSTICK = "scratch"


class Teachers:
    """Plain networks with random weights, which all methods share."""

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        self.task = Task(
            frame=size.frame,
            model=model_of(size),
            objective=Objective(),
            num_input_frames=size.window.num_input_frames,
        )
        self.networks = [
            build_predictor(size.frame, self.task.model).to(device) for _ in range(NUM_TEACHERS)
        ]
        self.card = TeacherCard(
            name="random",
            method="scratch",
            step=0,
            seed=0,
            frame=size.frame,
            window=size.window,
            model=self.task.model,
            tmu=TMUConfig(),
            num_slots=0,
            data=DataFacts(
                archive="random",
                manifest_hash="",
                units=Units(
                    quantity="grey level", unit="1", scale=1.0, offset=0.0, missing_code=None
                ),
                frame_interval_minutes=None,
            ),
        )

    def frozen(self, *wanted: Wanted) -> list[FrozenTeacher]:
        """The teachers, who tell what is wanted."""
        return [FrozenTeacher(network, wanted=wanted) for network in self.networks]

    def bank(self, *wanted: Wanted) -> dict[str, Any]:
        """Arguments of a method whose teachers run beside the student."""
        return {"bank": ReplicatedBank(self.frozen(*wanted)), "teacher_input": "own"}

    def start(self) -> Start:
        """From the first one's weights."""
        weights = self.networks[0].state_dict()
        return Start(name=self.card.name, weights=weights, unmatched="refuse")


class Method(NamedTuple):
    """A line of the table."""

    make: Callable[[Task, Teachers], TransferMethod]
    stated: Stated | None = None
    """The paper's Table 1, where it has the method."""
    starts: bool = False
    """Whether the student starts from a teacher's weights."""


def _knowledge_flow(task: Task, teachers: Teachers, **settings: Any) -> TransferMethod:
    return KnowledgeFlow(
        task,
        settings=KnowledgeFlowConfig(**settings),
        num_steps=80_000,
        **teachers.bank("hidden"),
    )


def _art(task: Task, teachers: Teachers, **settings: Any) -> TransferMethod:
    return AttentiveTransfer(
        task,
        settings=ARTConfig(**settings),
        adapter=AdapterConfig(),
        teachers=[(teachers.card, each) for each in teachers.frozen("hidden", "memory")],
    )


def _distillation(task: Task, teachers: Teachers) -> TransferMethod:
    return Distillation(
        task,
        settings=DistillationConfig(),
        imitation=ImitationConfig(),
        **teachers.bank("hidden"),
    )


def _tmu(task: Task, teachers: Teachers) -> TransferMethod:
    return MemoryDistillation(task, tmu=TMUConfig(), beta=0.1, **teachers.bank("memory"))


METHODS: dict[str, Method] = {
    "scratch": Method(lambda task, teachers: Scratch(task), PAPER["plain"]),
    "tmu_scratch": Method(
        lambda task, teachers: Scratch(task, tmu=TMUConfig(), num_slots=NUM_TEACHERS)
    ),
    "finetune": Method(lambda task, teachers: Scratch(task), PAPER["plain"], starts=True),
    "l2_sp": Method(
        lambda task, teachers: L2SP(task, settings=L2SPConfig(), start=teachers.start()),
        Stated("3.0M / 3.0M", 0.39, 0.0163),
        starts=True,
    ),
    "knowledge_flow": Method(_knowledge_flow),
    "knowledge_flow-table1": Method(
        partial(_knowledge_flow, candidates="all", kernel_size=3),
        Stated("4.1M / 10.1M", 0.54, 0.0217),
    ),
    "art": Method(_art),
    "art-table1": Method(
        partial(_art, states="hidden", kernel_size=3, gate=False),
        Stated("10.1M / 10.1M", 0.73, 0.0253),
    ),
    "distillation": Method(_distillation),
    "tmu": Method(_tmu, PAPER["tmu"]),
}
"""The methods of `transfer.method`, and the forms of two of them that are nearest to Table 1."""


class Prepared(NamedTuple):
    """One method, ready to be measured."""

    parameters: dict[str, int]
    """Trained, at test and in training."""
    runs: dict[str, Callable[[], object]]
    """One training step and one forecast."""


def model_of(size: Size) -> ModelConfig:
    """The ConvLSTM of a size, without peepholes."""
    return replace(size.models["convlstm"], peephole="none")


def prepare(name: str, size: Size, teachers: Teachers, device: torch.device) -> Prepared:
    """Build a method with a fresh student, and the step that trains it."""
    torch.manual_seed(1)
    chosen = METHODS[name]
    method = chosen.make(teachers.task, teachers)
    student = method.build_student().to(device)
    if chosen.starts:
        start = teachers.start()
        start.apply(student, frozenset(start.weights))
    step = training_step(method, student, device)
    batch = training_batch(size, student, device)
    inputs_BTCHW = batch.frames_BTCHW[:1, : size.window.num_input_frames]
    beside = method.bank.parameters_per_teacher if isinstance(method, TaughtMethod) else ()
    return Prepared(
        {
            "trained": count_trained(step.trainee),
            "test": count_parameters(student),
            "train": count_parameters(step.trainee) + sum(beside),
        },
        {
            "train": lambda: step(batch),
            "test": lambda: student.predict(inputs_BTCHW, size.window.num_target_frames),
        },
    )


def measure(
    size: Size, device: str, methods: Sequence[str], *, repeats: int, seconds: float
) -> dict[str, Any]:
    """Measure methods side by side; by name their `parameters`, and `flops` and `seconds` by part.

    Args:
        size: of network and sequences.
        device: "cpu" or "cuda".
        methods: names of `METHODS`.
        repeats: how often every part is timed.
        seconds: of a part in a repeat, at least.
    """
    teachers = Teachers(size, torch.device(device))
    found: dict[str, Any] = {}
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name in methods:
        say(f"{name}: warming up")
        prepared = prepare(name, size, teachers, torch.device(device))
        found[name] = {"parameters": prepared.parameters}
        for part, run in prepared.runs.items():
            found[name][part] = {"flops": count_operations(run), "seconds": []}
            runs[name, part] = run
    for number in range(1, repeats + 1):
        say(f"repeat {number} of {repeats}")
        for name, part in random.Random(number).sample(list(runs), len(runs)):
            found[name][part]["seconds"].append(timed(runs[name, part], device, seconds))
    return found


def table(record: Mapping[str, Any]) -> str:
    """Markdown: costs of every method, at the paper's size beside its Table 1."""
    machine, is_paper = record["machine"], record["size"] == "paper"
    lines = [
        f"Size: {record['size']}. {machine['processor']}, {machine['threads']} thread(s) of the "
        f"CPU, torch {record['versions']['torch']}, {record['repeats']} repeat(s): median (least "
        "- most). × is the ratio to training from scratch"
        + ("; in brackets, the paper's Table 1 (TITAN RTX)." if is_paper else "."),
        "",
        "| method | trained | parameters test / train | GFLOP/step | × | s/batch | × "
        "| GFLOP/sequence | × | ms/sequence | × |",
        "|---" * 11 + "|",
    ]
    lines += [
        _line(record["methods"], name, METHODS[name].stated if is_paper else None)
        for name in record["methods"]
    ]
    return "\n".join(lines) + "\n"


def _line(methods: Mapping[str, Any], name: str, stated: Stated | None) -> str:
    counts = methods[name]["parameters"]
    columns = [name, f"{counts['trained']:,}", f"{counts['test']:,} / {counts['train']:,}"]
    if stated is not None:
        columns[-1] += f" [{stated.parameters}]"
    for part, unit in (("train", 1.0), ("test", 1e3)):
        own, plain = methods[name][part], methods[YARDSTICK][part]
        ratios = [mine / base for mine, base in zip(own["seconds"], plain["seconds"], strict=True)]
        paper = ""
        if stated is not None:
            paper = f" [{getattr(stated, part) / getattr(PAPER['plain'], part):.2f}]"
        columns += [
            f"{own['flops'] / 1e9:,.2f}",
            f"{own['flops'] / plain['flops']:.2f}",
            median_and_range(
                [unit * seconds for seconds in own["seconds"]], 3 if part == "train" else 1
            ),
            median_and_range(ratios, 2) + paper,
        ]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = command_line(__doc__, sizes=SIZES, size="small", takes_device=True)
    parser.add_argument("--methods", choices=tuple(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a part in a repeat at least")
    chosen = parser.parse_args()
    names = list(dict.fromkeys([YARDSTICK, *chosen.methods]))
    record = {
        **provenance("benchmarks.methods", chosen.device, chosen.revision),
        "size": chosen.size,
        "repeats": chosen.repeats,
        "methods": measure(
            SIZES[chosen.size],
            chosen.device,
            names,
            repeats=chosen.repeats,
            seconds=chosen.seconds,
        ),
    }
    default = "methods" if chosen.size == "small" else f"methods-{chosen.size}"
    out: Path = chosen.out or Path("docs/results") / default
    publish(record, table(record), out)


if __name__ == "__main__":
    main()
