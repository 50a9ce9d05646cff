"""What a network of this project weighs, computes and keeps: the numbers that the cost model needs.

Nothing is typed in: the project's own modules are built and unrolled on tensors that have shapes
and no numbers, while operations and tensors saved for the backward pass are counted.

Legend: B batch, T time, C channels, H, W height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.scaling.model import Network
from tmu_dist.config import ComputeConfig, ModelConfig, TMUConfig, WindowConfig
from tmu_dist.evaluation.operations import count_operations, forward_operations
from tmu_dist.models.arrange import arrange
from tmu_dist.models.build import build_predictor, count_parameters, skeleton
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.adapter import LayerPlan, TeacherPlan
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, TeacherBank
from tmu_dist.training.memory_trace import Tracing
from tmu_dist.transfer.base import Objective, Task, TrainingBatch, TransferMethod
from tmu_dist.transfer.tmu import MemoryDistillation


class Size(NamedTuple):
    """A student, its teachers, and the sequences that they see."""

    label: str
    frame: FrameShape
    window: WindowConfig
    student: ModelConfig
    teacher: ModelConfig
    """With more channels than the student, imitations are projected to them."""


_DIGITS = FrameShape(channels=1, height=64, width=64)
_RAIN = FrameShape(channels=1, height=256, width=256)
_PAPER = ModelConfig(peephole="none")
_RADAR = ModelConfig(peephole="none", kernel_size=3, patch_size=8)
_FINE = ModelConfig(peephole="none", kernel_size=3, norm_affine="channel")
_WIDE = ModelConfig(peephole="none", hidden_channels=256)
_SMALL = ModelConfig(peephole="none", num_layers=2, hidden_channels=8, kernel_size=3)
SIZES = {
    "paper": Size(
        "the paper's: 64x64, k = 4, 4 x 64, 5x5", _DIGITS, WindowConfig(), _PAPER, _PAPER
    ),
    "radar": Size("radar: 256x256, k = 8, 4 x 64, 3x3", _RAIN, WindowConfig(), _RADAR, _RADAR),
    "fine radar": Size(
        "radar, finer: 256x256, k = 4, 4 x 64, 3x3, `norm_affine=channel`",
        _RAIN, WindowConfig(), _FINE, _FINE,
    ),
    "wide": Size(
        "wide teachers: the paper's student, teachers of 4 x 256", _DIGITS, WindowConfig(),
        _PAPER, _WIDE,
    ),
    "tiny": Size(
        "16x16, k = 4, 2 x 8, 3x3: a smoke test", FrameShape(channels=1, height=16, width=16),
        WindowConfig(num_input_frames=3, num_target_frames=3), _SMALL, _SMALL,
    ),
}  # fmt: skip
"""Networks of the study by name."""


def measure(size: Size) -> Network:
    """The facts of a size; those of the student are linear in its teachers, so two suffice."""
    frame, window = size.frame, size.window
    one, two = (_Student(size, teachers) for teachers in (1, 2))
    shapes = skeleton(frame, size.teacher).memory_shapes
    numbers = sum(s.channels * s.slices * s.height * s.width for s in shapes)
    steps = window.num_frames - 1
    with torch.device("meta"):
        teacher = build_predictor(frame, size.teacher)
        operations = forward_operations(teacher, frame, window)
    return Network(
        label=size.label,
        weights=count_parameters(teacher),
        memory_numbers=steps * numbers,
        teacher_operations=operations,
        frame_bytes=window.num_frames * frame.channels * frame.height * frame.width,
        mask_bytes=window.num_target_frames - 1,
        student_weights=2 * one.weights - two.weights,
        weights_per_slot=two.weights - one.weights,
        student_operations=2 * one.operations - two.operations,
        operations_per_slot=two.operations - one.operations,
        saved_bytes=2 * one.saved_bytes - two.saved_bytes,
        saved_bytes_per_slot=two.saved_bytes - one.saved_bytes,
    )


def make_method(size: Size, bank: TeacherBank) -> MemoryDistillation:
    """Memory transfer from a bank's teachers, at the paper's weight."""
    objective = Objective(skeleton(size.frame, size.student).frame_loss)
    task = Task(
        frame=size.frame,
        model=size.student,
        objective=objective,
        num_input_frames=size.window.num_input_frames,
    )
    return MemoryDistillation(task, tmu=TMUConfig(), bank=bank, teacher_input="own", beta=0.1)


def make_teacher(size: Size) -> FrozenTeacher:
    """A teacher with random weights, on torch's default device."""
    return FrozenTeacher(build_predictor(size.frame, size.teacher), make_plan(size))


def make_plan(size: Size) -> TeacherPlan:
    """Layer k teaches layer k, whatever its channels."""
    of_teacher, of_student = (
        skeleton(size.frame, model).memory_shapes for model in (size.teacher, size.student)
    )
    pairs = enumerate(zip(of_teacher, of_student, strict=True))
    return TeacherPlan(
        frame=None, layers={k: LayerPlan(k, teacher, student) for k, (teacher, student) in pairs}
    )


def make_batch(size: Size, sequences: int, ranks: int = 1) -> TrainingBatch:
    """Random frames in whole steps of 1/255 and a sampling mask that hides every second one."""
    window, frame = size.window, size.frame
    shape = (sequences, window.num_frames, frame.channels, frame.height, frame.width)
    mask_T = torch.arange(window.num_target_frames - 1) % 2 == 0
    return TrainingBatch(
        frames_BTCHW=torch.randint(0, 256, shape).float() / 255,
        observed_BTCHW=None,
        sampling_mask_BT=mask_T.expand(sequences, -1),
        weights_B=torch.full((sequences,), 1 / (sequences * ranks)),
        step=1,
    )


class _Student:
    """One student of tensors without numbers, counted as GPUs compute it: by plain operations."""

    def __init__(self, size: Size, teachers: int) -> None:
        with Tracing(torch.device("cpu")):
            method = make_method(size, ReplicatedBank([make_teacher(size)] * teachers))
            trainee = method.trainee(method.build_student())
            arrange(trainee, ComputeConfig(convolution="direct", arithmetic="plain"))
            single, double = (make_batch(size, sequences) for sequences in (1, 2))
            self.weights = count_parameters(trainee)
            self.operations = count_operations(lambda: method.unroll(trainee, single))
            # Of one more sequence: some weights are saved, too, however many there are.
            self.saved_bytes = saved_bytes(method, trainee, double) - saved_bytes(
                method, trainee, single
            )


def saved_bytes(method: TransferMethod, trainee: nn.Module, batch: TrainingBatch) -> int:
    """Bytes of all tensors that wait for the backward pass of a loss, weights not counted."""
    state = [*trainee.parameters(), *trainee.buffers()]
    own = {value.untyped_storage()._cdata for value in state}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # kept alive, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        method.loss(trainee, batch).total()
    return sum(storage.nbytes() for storage in kept.values())
