"""The networks that are compared, and what one process measures of one of them.

Legend: B batch, T time, C channels, Z noise, H, W height and width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.backbones.report import Cell
from tmu_dist.backbones import BACKBONES
from tmu_dist.config import ModelConfig, SAVPConfig, TMUConfig, VPNConfig, WindowConfig
from tmu_dist.evaluation.operations import count_operations
from tmu_dist.models.build import build_predictor, count_parameters, skeleton
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import Objective, Task, TrainingBatch, TransferMethod
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.tmu import MemoryDistillation

BATCH_SIZE = 8
NUM_TEACHERS = 2


class Size(NamedTuple):
    """One size of all networks, and the sequences they see."""

    frame: FrameShape
    window: WindowConfig
    models: Mapping[str, ModelConfig]
    """By backbone."""


_SMALL_STACK: dict[str, Any] = {"num_layers": 2, "hidden_channels": 32}
SIZES = {
    "paper": Size(
        FrameShape(channels=1, height=64, width=64),
        WindowConfig(),
        {name: ModelConfig(cell=name) for name in BACKBONES},
    ),
    "small": Size(
        FrameShape(channels=1, height=32, width=32),
        WindowConfig(num_input_frames=5, num_target_frames=5),
        {
            **{
                name: ModelConfig(cell=name, **_SMALL_STACK)
                for name in ("convlstm", "predrnn", "mim", "e3d_lstm", "e3d_openstl")
            },
            "savp": ModelConfig(
                cell="savp", savp=SAVPConfig(base_channels=8, latent_size=8, posterior_channels=16)
            ),
            "vpn": ModelConfig(
                cell="vpn",
                hidden_channels=32,
                vpn=VPNConfig(channels=8, num_encoder_blocks=2, num_decoder_blocks=2),
            ),
        },
    ),
}


class Case(NamedTuple):
    """What one process measures."""

    size: str
    backbone: str
    variant: str
    part: str
    device: str


def serve(connection: Connection, case: Case) -> None:
    """Say that the libraries are loaded; when asked, measure a case: first what is measured only
    once, then times as often as asked."""
    try:
        connection.send("ready")
        connection.recv()
        run, facts = (prepare_training if case.part == "train" else prepare_forecast)(case)
        connection.send(facts)
        while True:
            connection.send({"seconds": timed(run, case.device, connection.recv())})
    except EOFError:
        return
    except (RuntimeError, MemoryError) as error:  # torch is out of memory: a RuntimeError
        connection.send({"stopped": str(error).strip().split("\n")[0][:200] or repr(error)})


def prepare_training(case: Case) -> tuple[Callable[[], object], Cell]:
    """One update of a freshly built student; its peak memory in bytes, and its operations."""
    before = peak_memory(case.device)
    size, device = SIZES[case.size], torch.device(case.device)
    torch.manual_seed(0)
    method = make_method(size, case.backbone, case.variant, device)
    student = method.build_student().to(device)
    step = training_step(method, student, device)
    batch = training_batch(size, student, device)
    step(batch)
    peak = peak_memory(case.device) - before
    return lambda: step(batch), {"peak_bytes": peak, "flops": count_operations(lambda: step(batch))}


def prepare_forecast(case: Case) -> tuple[Callable[[], object], Cell]:
    """A closed-loop forecast of one sequence, and its operations."""
    size, device = SIZES[case.size], torch.device(case.device)
    torch.manual_seed(0)
    network = build(size, case.backbone, NUM_TEACHERS if case.variant == "tmu" else 0)
    network = network.to(device).eval()
    window = size.window
    inputs_BTCHW = _frames(1, window.num_input_frames, size.frame, device)
    noise_BTZ = _noise(network.noise_size, 1, window.num_frames - 1, device)

    def run() -> Tensor:
        return network.predict(inputs_BTCHW, window.num_target_frames, noise_BTZ=noise_BTZ)

    return run, {"flops": count_operations(run)}


def make_method(size: Size, backbone: str, variant: str, device: torch.device) -> TransferMethod:
    """Training from scratch, or memory transfer from teachers with random weights."""
    model = size.models[backbone]
    task = Task(
        frame=size.frame,
        model=model,
        objective=Objective(skeleton(size.frame, model).frame_loss),
        num_input_frames=size.window.num_input_frames,
    )
    if variant == "plain":
        return Scratch(task)
    networks = [build_predictor(size.frame, model).to(device) for _ in range(NUM_TEACHERS)]
    return MemoryDistillation(
        task,
        tmu=TMUConfig(),
        bank=ReplicatedBank([FrozenTeacher(network) for network in networks]),
        beta=0.1,
        teacher_input="own",
    )


def build(size: Size, backbone: str, num_slots: int) -> Predictor:
    """The plain network (0 slots), or the student of as many teachers."""
    return build_predictor(size.frame, size.models[backbone], tmu=TMUConfig(), num_slots=num_slots)


def parameters(size: Size, backbone: str, variant: str) -> dict[str, int]:
    """Weights at test, and with the frozen teachers that stand beside them in training."""
    with torch.device("meta"):
        plain = count_parameters(build(size, backbone, 0))
        if variant == "plain":
            return {"test": plain, "train": plain}
        student = count_parameters(build(size, backbone, NUM_TEACHERS))
    return {"test": student, "train": student + NUM_TEACHERS * plain}


def training_step(method: TransferMethod, student: Predictor, device: torch.device) -> TrainingStep:
    """One update an iteration, forwards in time."""
    trainee = method.trainee(student).to(device)
    return TrainingStep(
        method,
        student,
        trainee,
        trainee,
        device=device,
        learning_rate=lambda step: 1e-3,
        reverse_input="off",
    )


def training_batch(size: Size, student: Predictor, device: torch.device) -> TrainingBatch:
    window = size.window
    mask_BT = torch.rand(BATCH_SIZE, window.num_target_frames - 1, device=device) < 0.5
    return TrainingBatch(
        frames_BTCHW=_frames(BATCH_SIZE, window.num_frames, size.frame, device),
        observed_BTCHW=None,
        sampling_mask_BT=mask_BT | (student.frame_loss == "likelihood"),
        weights_B=torch.full((BATCH_SIZE,), 1 / BATCH_SIZE, device=device),
        noise_BTZ=_noise(student.latent_size, BATCH_SIZE, window.num_frames - 1, device),
        step=1,
    )


def _frames(batch: int, count: int, frame: FrameShape, device: torch.device) -> Tensor:
    return torch.rand(batch, count, frame.channels, frame.height, frame.width, device=device)


def _noise(size: int, batch: int, steps: int, device: torch.device) -> Tensor | None:
    return torch.randn(batch, steps, size, device=device) if size else None


def timed(run: Callable[[], object], device: str, seconds: float) -> float:
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        run()  # takes its memory again
    wait()
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < seconds:
        run()
        wait()
        count += 1
    elapsed = time.perf_counter() - started
    if device == "cuda":
        torch.cuda.empty_cache()  # other processes want the memory
    return elapsed / count


def peak_memory(device: str) -> int:
    """Bytes: of a GPU what tensors held at most, of a CPU the most that this process had."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: a process inherits the peak of the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM: the peak of memory needs Linux.")
