"""What is computed, and who computes it: the reference, or this project in one of its settings.

Both start from the same weights, see the same frames and mask, and compute the same loss. Weights
and frames are random, because speed does not depend on what a network has learned. Nothing is read
from files: cached memories stand in memory, so their row is the ceiling of what caching gives.

Legend: B batch, T time, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks.speed import reference
from benchmarks.speed.measure import Run, matrix_precision, relative_difference
from tmu_dist.arithmetic import arithmetic
from tmu_dist.collectives import Collectives
from tmu_dist.config import ModelConfig, RunConfig, TMUConfig, WindowConfig, with_overrides
from tmu_dist.models.arrange import arrange
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.adapter import TeacherPlan
from tmu_dist.teachers.ahead import TeachingAhead
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, Shown, TeacherBank, Teaching
from tmu_dist.teachers.batched import BatchedBank, Likeness, run_together
from tmu_dist.teachers.placement import Placement
from tmu_dist.training.build import build_step
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import Objective, Task, TaughtMethod, TrainingBatch, TransferMethod
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.tmu import MemoryDistillation

Weights: TypeAlias = Mapping[str, Tensor]
"""Of a network of this project, by name."""

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
    def training_bytes(self) -> int:
        """Of one training step on the whole batch: maps that must be read and written."""
        of_one = reference.training_bytes(
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
    "compute.arithmetic": "plain",
    "compute.batch_teachers": "off",
    "compute.cuda_graph": "off",
}


def _setting(*, cached: bool = False, **changes: str) -> Setting:
    """Everything plain but what is said; `precision` is of training, all else of compute."""
    named = {
        f"{'training' if name == 'precision' else 'compute'}.{name}": value
        for name, value in changes.items()
    }
    return Setting(_PLAIN | named, cached)


SETTINGS: dict[str, Setting] = {
    "fp32": _setting(),
    "fp32, compiled": _setting(arithmetic="compiled"),
    "fp32, fused": _setting(arithmetic="auto"),
    "fp32, winograd": _setting(convolution="winograd"),
    "fp32, winograd, fused": _setting(convolution="winograd", arithmetic="auto"),
    "bf16": _setting(precision="bf16"),
    "bf16, compiled": _setting(precision="bf16", arithmetic="compiled"),
    "bf16, fused": _setting(precision="bf16", arithmetic="auto"),
    "bf16, winograd, fused": _setting(precision="bf16", convolution="winograd", arithmetic="auto"),
    "fp32, winograd, fused, cached": _setting(
        convolution="winograd", arithmetic="auto", cached=True
    ),
    "bf16, fused, cached": _setting(precision="bf16", arithmetic="auto", cached=True),
    "bf16, winograd, fused, cached": _setting(
        precision="bf16", convolution="winograd", arithmetic="auto", cached=True
    ),
    "tf32": _setting(precision="tf32"),
    "tf32, compiled": _setting(precision="tf32", arithmetic="compiled"),
    "tf32, compiled, graph": _setting(precision="tf32", arithmetic="compiled", cuda_graph="on"),
    "fp16, compiled, graph": _setting(precision="fp16", arithmetic="compiled", cuda_graph="on"),
    "bf16, compiled, batched": _setting(
        precision="bf16", arithmetic="compiled", batch_teachers="on"
    ),
    "bf16, compiled, graph": _setting(precision="bf16", arithmetic="compiled", cuda_graph="on"),
    "bf16, compiled, batched, graph": _setting(
        precision="bf16", arithmetic="compiled", batch_teachers="on", cuda_graph="on"
    ),
    "bf16, compiled, batched, graph, cached": _setting(
        precision="bf16",
        arithmetic="compiled",
        batch_teachers="on",
        cuda_graph="on",
        cached=True,
    ),
    "defaults": Setting({}),
    "defaults, bf16": Setting({"training.precision": "bf16"}),
}
"""By the names of the tables; what is not named is plain. Fused: in one pass, by C code on CPUs;
compiled: by torch.compile. Defaults choose by themselves."""

_LEFT_OUT = {
    # Compiling takes a CPU minutes; what it gains there is asked by `compile`.
    "cpu": ("tf32", "fp16", "graph", "batched", "compiled"),
    "cuda": ("winograd", "fused"),
}
"""Words in names of settings that a kind of device has not, or that must be asked for."""

REFERENCE, REFERENCE_TF32 = "reference", "reference, tf32"
"""The latter is what torch does with float32 convolutions on a GPU unless it is told otherwise."""


def contenders_of(device: str, chosen: Sequence[str] | None = None) -> list[str]:
    """The references of a kind of device, and settings: those chosen, or what makes sense there."""
    own = [name for name in SETTINGS if not any(word in name for word in _LEFT_OUT[device])]
    references = [REFERENCE, REFERENCE_TF32] if device == "cuda" else [REFERENCE]
    return [*references, *(chosen or own)]


def forecasting(names: Iterable[str]) -> list[str]:
    """Those that differ where there are no teachers and nothing is learned."""
    return [name for name in names if not any(w in name for w in ("cached", "graph", "batched"))]


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
        for teacher, weights in zip(self.teachers, all_teacher_weights(work), strict=True):
            teacher.load_state_dict(reference.weights_of(weights))
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
        student: its weights; None: `student_weights`.
        teachers: weights of each; None: `teacher_weights`.
    """

    def __init__(
        self,
        work: Work,
        device: str,
        setting: Setting,
        *,
        dtype: torch.dtype = torch.float32,
        student: Weights | None = None,
        teachers: Sequence[Weights] | None = None,
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
        if self.config.compute.arithmetic == "compiled":
            # A run compiles one network for one shape; here are many in a process, none of which
            # is to fall back or to be compiled for any shape because of another.
            torch._dynamo.config.recompile_limit = 256
            torch._dynamo.config.automatic_dynamic_shapes = False
        self._device = place = torch.device(device)
        self.batch = make_batch(work, device, dtype)
        self._shown = shown(self.batch, work.window.num_input_frames)
        self.bank = self._make_bank(teachers or all_teacher_weights(work), dtype)
        if setting.is_cached:
            self.bank = StoredBank(self.bank.plans, self.teach())
        method = make_method(work, self.bank)
        if isinstance(method, TaughtMethod) and device == "cuda":
            method.ahead = TeachingAhead(place)
        self.student: Predictor = method.build_student()
        self.student.load_state_dict(student or student_weights(work))
        self._arranged(self.student, place, dtype)
        self.step: TrainingStep = build_step(
            self.config, method, self.student, self.student, place, Collectives()
        )

    def train(self) -> object:
        return self.step(self.batch)

    def forecast(self) -> Tensor:
        self.student.requires_grad_(False)  # as those of a model that is loaded from its run
        return self._maps(self.predict(self.batch.frames_BTCHW))

    def predict(self, frames_BTCHW: Tensor) -> Tensor:
        """Continue the input frames of any sequences, in pixel space."""
        window = self.work.window
        with self._arithmetic():
            given_BTCHW = frames_BTCHW[:, : window.num_input_frames]
            return self.student.predict(given_BTCHW, window.num_target_frames)

    def teach(self) -> tuple[Teaching, ...]:
        """What the teachers tell of the batch, as a training step asks them."""
        with self._arithmetic():
            return self.bank.teach(self._shown)

    def outcome(self) -> Outcome:
        with self._arithmetic():
            terms = self.step.loss(self.batch)
        loss = terms.total()
        names, parameters = zip(*self.student.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        by_name = reference.weights_of(gradients, self.work.num_teachers)
        size, num_teachers = self.work.dimensions, self.work.num_teachers
        with torch.device("meta"):
            order = [name for name, _ in reference.Network(size, num_teachers).named_parameters()]
        predictions_BTCHW = self._maps(terms.rollout.predictions_BTCHW.detach())
        return Outcome(loss.detach(), predictions_BTCHW, [by_name[name] for name in order])

    def _arithmetic(self) -> AbstractContextManager[None]:
        return arithmetic(self.config.training.precision, self._device)

    def _make_bank(self, weights: Iterable[Weights], dtype: torch.dtype) -> TeacherBank:
        """As a run makes it where every rank holds all teachers."""
        teachers = []
        for each in weights:
            network = seeded(0, self.work, 0)
            network.load_state_dict(each)
            teachers.append(FrozenTeacher(self._arranged(network, self._device, dtype)))
        alike = [Likeness.of(teacher) for teacher in teachers]
        here = Placement(kind="replicated", resident_bytes=(0,))
        if run_together(self.config.compute.batch_teachers, alike, here, self._device):
            return BatchedBank(teachers)
        return ReplicatedBank(teachers)

    def _arranged(self, network: Predictor, device: torch.device, dtype: torch.dtype) -> Predictor:
        network.to(device, dtype)
        arrange(network, self.config.compute)
        return network

    def _maps(self, frames_BTCHW: Tensor) -> Tensor:
        return reference.patches(frames_BTCHW, self.work.model.patch_size)


class StoredBank:
    """What teachers have told of a batch, told again; none of them is needed any more."""

    own: tuple[FrozenTeacher, ...] = ()

    def __init__(self, plans: tuple[TeacherPlan, ...], told: tuple[Teaching, ...]) -> None:
        self._plans = plans
        self._told = told

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
    return ours(name, work, device)


def ours(name: str, work: Work, device: str) -> Ours:
    """This project in a setting by its name; a lone teacher has no other to run together with."""
    setting = SETTINGS[name]
    if work.num_teachers < 2:
        setting = setting._replace(overrides={**setting.overrides, "compute.batch_teachers": "off"})
    return Ours(work, device, setting)


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


def student_weights(work: Work) -> Weights:
    """Of the student, the same whenever asked."""
    return seeded(_STUDENT_SEED, work, work.num_teachers).state_dict()


def all_teacher_weights(work: Work) -> list[Weights]:
    """Of every teacher, the same whenever asked."""
    return [seeded(_TEACHER_SEED + m, work, 0).state_dict() for m in range(work.num_teachers)]


def seeded(seed: int, work: Work, num_slots: int) -> Predictor:
    """A fresh network with room for so many teachers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_predictor(work.frame, work.model, tmu=TMUConfig(), num_slots=num_slots)


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
