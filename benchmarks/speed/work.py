"""What is computed, and who computes it: the reference, or this project in one of its settings.

Both start from the same weights, see the same frames and mask, and compute the same loss. Weights
and frames are random, because speed does not depend on what a network has learned. Nothing is read
from files: cached memories stand in memory, so their row is the ceiling of what caching gives.

Legend: B batch, T time, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.speed import reference
from benchmarks.speed.measure import Run, matrix_precision, relative_difference
from tmu_dist.collectives import Collectives
from tmu_dist.config import ModelConfig, RunConfig, TMUConfig, WindowConfig, with_overrides
from tmu_dist.models.arrange import arrange
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.adapter import TeacherPlan
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, Shown, TeacherBank, Teaching
from tmu_dist.training.build import build_step
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import Objective, Task, TrainingBatch, TransferMethod
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.tmu import MemoryDistillation

BETA = 0.1
LEARNING_RATE = 1e-3
_STUDENT_SEED, _TEACHER_SEED, _BATCH_SEED = 1, 100, 2


class Work(NamedTuple):
    """A step or a forecast of a TMU student with ConvLSTM layers."""

    frame: FrameShape
    model: ModelConfig
    batch: int
    num_teachers: int = 2
    window: WindowConfig = WindowConfig()

    @property
    def num_steps(self) -> int:
        """Time steps of training, and of a forecast."""
        return self.window.num_frames - 1

    @property
    def dimensions(self) -> reference.Dimensions:
        """Of the reference's networks."""
        k = self.model.patch_size
        return reference.Dimensions(
            channels=self.frame.channels * k * k,
            height=self.frame.height // k,
            width=self.frame.width // k,
            num_layers=self.model.num_layers,
            hidden_channels=self.model.hidden_channels,
            kernel_size=self.model.kernel_size,
            peepholes=self.model.peephole == "channel",
        )

    @property
    def training_operations(self) -> int:
        """Of one training step on the whole batch, its teachers included."""
        of_one = reference.training_operations(
            self.dimensions, self.num_teachers, num_steps=self.num_steps
        )
        return self.batch * of_one

    @property
    def teacher_operations(self) -> int:
        """Of one teacher's forward pass over the whole batch."""
        return self.batch * self.num_steps * reference.forward_operations(self.dimensions)

    @property
    def forecast_operations(self) -> int:
        """Of the student's forecasts of the whole batch."""
        step = reference.forward_operations(self.dimensions, self.num_teachers)
        return self.batch * self.num_steps * step

    def facts(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "frame": str(self.frame),
            "patch_size": self.model.patch_size,
            "num_layers": self.model.num_layers,
            "hidden_channels": self.model.hidden_channels,
            "kernel_size": self.model.kernel_size,
            "peephole": self.model.peephole,
            "batch": self.batch,
            "num_teachers": self.num_teachers,
            "num_input_frames": self.window.num_input_frames,
            "num_target_frames": self.window.num_target_frames,
        }


SIZES: dict[str, Work] = {
    "paper": Work(FrameShape(channels=1, height=64, width=64), ModelConfig(), batch=4),
    "small": Work(
        FrameShape(channels=1, height=32, width=32), ModelConfig(hidden_channels=32), batch=8
    ),
    "tiny": Work(
        FrameShape(channels=1, height=16, width=16),
        ModelConfig(num_layers=2, hidden_channels=8),
        batch=2,
        window=WindowConfig(num_input_frames=3, num_target_frames=3),
    ),
}
"""The paper's size and a small one; "tiny" is for tests."""


class Setting(NamedTuple):
    """How this project computes a work."""

    overrides: Mapping[str, str]
    """Of RunConfig."""
    is_cached: bool = False
    """Whether memories of the teachers are there already."""


_PLAIN = {
    "compute.convolution": "direct",
    "compute.compile": "off",
    "compute.batch_teachers": "off",
    "compute.cuda_graph": "off",
}


def _setting(*, cached: bool = False, **changes: str) -> Setting:
    """Everything off but what is said; `precision` is of training, all else of compute."""
    named = {
        f"{'training' if name == 'precision' else 'compute'}.{name}": value
        for name, value in changes.items()
    }
    return Setting(_PLAIN | named, cached)


SETTINGS: dict[str, Setting] = {
    "fp32": _setting(),
    "fp32, winograd": _setting(convolution="winograd"),
    "fp32, winograd, compiled": _setting(convolution="winograd", compile="on"),
    "fp32, compiled": _setting(compile="on"),
    "bf16": _setting(precision="bf16"),
    "bf16, compiled": _setting(precision="bf16", compile="on"),
    "bf16, winograd": _setting(precision="bf16", convolution="winograd"),
    "bf16, winograd, compiled": _setting(precision="bf16", convolution="winograd", compile="on"),
    "fp32, winograd, compiled, cached": _setting(convolution="winograd", compile="on", cached=True),
    "bf16, compiled, cached": _setting(precision="bf16", compile="on", cached=True),
    "tf32": _setting(precision="tf32"),
    "tf32, compiled": _setting(precision="tf32", compile="on"),
    "tf32, compiled, graph": _setting(precision="tf32", compile="on", cuda_graph="on"),
    "bf16, compiled, batched": _setting(precision="bf16", compile="on", batch_teachers="on"),
    "bf16, compiled, graph": _setting(precision="bf16", compile="on", cuda_graph="on"),
    "bf16, compiled, batched, graph": _setting(
        precision="bf16", compile="on", batch_teachers="on", cuda_graph="on"
    ),
    "defaults": Setting({}),
    "defaults, bf16": Setting({"training.precision": "bf16"}),
}
"""By the names of the tables; what is not named is off. Defaults choose by themselves."""

REFERENCE, REFERENCE_TF32 = "reference", "reference, tf32"
"""The latter is what torch does with float32 convolutions on a GPU unless it is told otherwise."""


def settings_of(device: str) -> list[str]:
    """Names of the settings that a kind of device has, without the references."""
    if device == "cuda":
        return [name for name in SETTINGS if "winograd" not in name]
    on_gpu = ("tf32", "graph", "batched")
    return [name for name in SETTINGS if not any(word in name for word in on_gpu)]


class Outcome(NamedTuple):
    """What is compared between two ways of computing the same step."""

    loss: Tensor
    predictions_BTCHW: Tensor
    """As patch maps."""
    gradients: list[Tensor]
    """In the order of the reference's parameters."""


class Contender:
    """One way of computing a work."""

    def train(self) -> object:
        """One training step."""
        raise NotImplementedError

    def forecast(self) -> Tensor:
        """Forecasts of the whole batch, as patch maps."""
        raise NotImplementedError

    def outcome(self) -> Outcome:
        """Loss, predictions and gradients at the present weights, which stay."""
        raise NotImplementedError


class Reference(Contender):
    """The reference computation, as it stands in `reference`.

    Args:
        work: what it computes.
        device: "cpu" or "cuda".
        tf32: whether float32 convolutions and products of a GPU use TF32.
        dtype: of everything; float64 to compare by.
    """

    def __init__(
        self, work: Work, device: str, *, tf32: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        self.work = work
        self.precision = "tf32" if tf32 else "ieee"
        size, num_teachers = work.dimensions, work.num_teachers
        is_mean = TMUConfig().combination(num_teachers) == "mean"
        self.student = reference.Network(size, num_teachers, mean=is_mean)
        self.student.load_state_dict(reference.weights_of(student_weights(work), num_teachers))
        self.teachers = [reference.Network(size) for _ in range(num_teachers)]
        for m, teacher in enumerate(self.teachers):
            teacher.load_state_dict(reference.weights_of(teacher_weights(work, m)))
        for network in (self.student, *self.teachers):
            network.to(device, dtype)
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=LEARNING_RATE)
        batch = make_batch(work, device)
        self.maps_BTCHW = reference.patches(batch.frames_BTCHW.to(dtype), work.model.patch_size)
        self.mask_BT = batch.sampling_mask_BT

    def train(self) -> float:
        with matrix_precision(self.precision):
            loss, _ = self._objective()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return loss.item()

    def forecast(self) -> Tensor:
        window = self.work.window
        given_BTCHW = self.maps_BTCHW[:, : window.num_input_frames]
        with matrix_precision(self.precision):
            return reference.forecast(self.student, given_BTCHW, window.num_target_frames)

    def outcome(self) -> Outcome:
        with matrix_precision(self.precision):
            loss, found = self._objective()
            gradients = torch.autograd.grad(loss, list(self.student.parameters()))
        predictions_BTCHW = torch.stack(found.predictions, dim=1).detach()
        return Outcome(loss.detach(), predictions_BTCHW, list(gradients))

    def _objective(self) -> tuple[Tensor, reference.Unrolled]:
        return reference.objective(
            self.student,
            self.teachers,
            self.maps_BTCHW,
            self.mask_BT,
            num_input_frames=self.work.window.num_input_frames,
            beta=BETA,
        )


class Ours(Contender):
    """This project's networks, methods and training step in one setting.

    Args:
        work: what it computes.
        device: "cpu" or "cuda".
        setting: how.
        dtype: of everything; float64 to compare by.
    """

    def __init__(
        self, work: Work, device: str, setting: Setting, *, dtype: torch.dtype = torch.float32
    ) -> None:
        self.work = work
        self.config = with_overrides(
            RunConfig(window=work.window),
            {
                "training.reverse_input": "off",
                "training.learning_rate": LEARNING_RATE,
                **setting.overrides,
            },
        )
        place = torch.device(device)
        self.batch = make_batch(work, device, dtype)
        self.teachers = [
            FrozenTeacher(self._arranged(network, place, dtype))
            for network in teacher_networks(work)
        ]
        bank: TeacherBank = ReplicatedBank(self.teachers)
        if setting.is_cached:
            bank = StoredBank(bank, shown(self.batch, work.window.num_input_frames))
        method = make_method(work, bank)
        self.student: Predictor = method.build_student()
        self.student.load_state_dict(student_weights(work))
        self._arranged(self.student, place, dtype)
        self.step: TrainingStep = build_step(
            self.config, method, self.student, self.student, place, Collectives()
        )
        self._precision: Callable[[], AbstractContextManager[None]] = nullcontext
        if device == "cuda" and self.config.training.precision != "tf32":
            self._precision = partial(matrix_precision, "ieee")

    def train(self) -> dict[str, float]:
        with self._precision():
            return self.step(self.batch)

    def forecast(self) -> Tensor:
        window = self.work.window
        given_BTCHW = self.batch.frames_BTCHW[:, : window.num_input_frames]
        with self._precision(), self.step.autocast():
            predicted = self.student.predict(given_BTCHW, window.num_target_frames)
        return self._maps(predicted)

    def teach(self) -> object:
        """What the teachers tell of the batch, as a training step asks them."""
        with self._precision(), self.step.autocast():
            return ReplicatedBank(self.teachers).teach(
                shown(self.batch, self.work.window.num_input_frames)
            )

    def outcome(self) -> Outcome:
        with self._precision():
            with self.step.autocast():
                terms = self.step.loss(self.batch)
            loss = terms.total()
            names, parameters = zip(*self.student.named_parameters(), strict=True)
            gradients = torch.autograd.grad(loss, parameters)
        by_name = reference.weights_of(
            dict(zip(names, gradients, strict=True)), self.work.num_teachers
        )
        size, num_teachers = self.work.dimensions, self.work.num_teachers
        with torch.device("meta"):
            order = [name for name, _ in reference.Network(size, num_teachers).named_parameters()]
        predictions_BTCHW = self._maps(terms.rollout.predictions_BTCHW.detach())
        return Outcome(loss.detach(), predictions_BTCHW, [by_name[name] for name in order])

    def _arranged(self, network: Predictor, device: torch.device, dtype: torch.dtype) -> Predictor:
        network.to(device, dtype)
        arrange(network, self.config.compute, device)
        return network

    def _maps(self, frames_BTCHW: Tensor) -> Tensor:
        return reference.patches(frames_BTCHW, self.work.model.patch_size)


class StoredBank:
    """Memories that a bank has told of one batch, told again; no teacher is needed any more."""

    own: tuple[FrozenTeacher, ...] = ()

    def __init__(self, bank: TeacherBank, of: Shown) -> None:
        self._told = bank.teach(of)
        self._plans = bank.plans

    @property
    def plans(self) -> tuple[TeacherPlan, ...]:
        return self._plans

    @property
    def parameters_per_teacher(self) -> tuple[int, ...]:
        return (0,) * len(self._plans)

    def teach(self, shown: Shown) -> tuple[Teaching, ...]:
        return self._told


def contender(name: str, work: Work, device: str) -> Contender:
    """One by its name in the tables.

    Args:
        name: of `SETTINGS`, or of one of the references.
        work: what it computes.
        device: "cpu" or "cuda".
    """
    if name in (REFERENCE, REFERENCE_TF32):
        return Reference(work, device, tf32=name == REFERENCE_TF32)
    return Ours(work, device, SETTINGS[name])


def prepare_training(name: str, work: Work, device: str) -> Run:
    """A training step, for `measure.peak_bytes`."""
    return contender(name, work, device).train


def prepare_forecast(name: str, work: Work, device: str) -> Run:
    """Forecasts of a batch, for `measure.peak_bytes`."""
    return contender(name, work, device).forecast


def make_method(work: Work, bank: TeacherBank) -> TransferMethod:
    """Memory transfer from the bank's teachers; without teachers, training from scratch."""
    task = Task(
        frame=work.frame,
        model=work.model,
        objective=Objective(),
        num_input_frames=work.window.num_input_frames,
    )
    if not work.num_teachers:
        return Scratch(task)
    return MemoryDistillation(task, tmu=TMUConfig(), bank=bank, beta=BETA, teacher_input="own")


def student_weights(work: Work) -> dict[str, Tensor]:
    """Of the student, the same whenever asked; its peepholes are not 0."""
    network = _seeded(_STUDENT_SEED, work, work.num_teachers)
    return dict(network.state_dict())


def teacher_weights(work: Work, number: int) -> dict[str, Tensor]:
    """Of a teacher, the same whenever asked."""
    return dict(_seeded(_TEACHER_SEED + number, work, 0).state_dict())


def teacher_networks(work: Work) -> Iterable[Predictor]:
    """All teachers of a work."""
    return (_seeded(_TEACHER_SEED + m, work, 0) for m in range(work.num_teachers))


def _seeded(seed: int, work: Work, num_slots: int) -> Predictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_predictor(work.frame, work.model, tmu=TMUConfig(), num_slots=num_slots)
        for name, weight in network.named_parameters():
            if name.endswith("peepholes"):
                nn.init.normal_(weight, std=0.1)
    return network


def make_batch(work: Work, device: str, dtype: torch.dtype = torch.float32) -> TrainingBatch:
    """Random frames and a mask, the same whenever asked."""
    window, frame = work.window, work.frame
    random = torch.Generator().manual_seed(_BATCH_SEED)
    size = (work.batch, window.num_frames, frame.channels, frame.height, frame.width)
    mask_BT = torch.rand(work.batch, window.num_target_frames - 1, generator=random) < 0.5
    return TrainingBatch(
        frames_BTCHW=torch.rand(size, generator=random).to(device, dtype),
        observed_BTCHW=None,
        sampling_mask_BT=mask_BT.to(device),
        weights_B=torch.full((work.batch,), 1 / work.batch, device=device, dtype=dtype),
        step=1,
    )


def shown(batch: TrainingBatch, num_input_frames: int) -> Shown:
    """A batch as a step shows it to teachers."""
    return Shown(
        batch.frames_BTCHW,
        num_input_frames=num_input_frames,
        num_frames=batch.frames_BTCHW.shape[1],
        sampling_mask_BT=batch.sampling_mask_BT,
    )


def with_peephole(work: Work, peephole: Literal["channel", "none"]) -> Work:
    """The same with other peepholes: "channel", or "none" as in the released code."""
    return work._replace(model=replace(work.model, peephole=peephole))


def agreement(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative differences of loss, predictions and gradients."""
    pairs: dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]] = {
        "loss": ([found.loss], [expected.loss]),
        "predictions": ([found.predictions_BTCHW], [expected.predictions_BTCHW]),
        "gradients": (found.gradients, expected.gradients),
    }
    return {name: relative_difference(*pair) for name, pair in pairs.items()}
