"""How long predicting takes.

Shape letters: B batch, T time, C channels, H height, W width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tmu_dist.config import WindowConfig
from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import window_frames
from tmu_dist.models.rollout import Predictor


def latency_ms(
    model: Predictor,
    frames_BTCHW: Tensor,
    window: WindowConfig,
    units: Units,
    device: torch.device,
    *,
    batch_size: int = 1,
    repeats: int = 5,
) -> float:
    """Milliseconds per sequence to predict a batch: median of repeats after one warm-up.

    Args:
        model: the predictor, on `device`.
        frames_BTCHW: stored frames; repeated or cut to the batch size.
        window: input and target frames.
        units: of the stored frames.
        device: where the model is.
        batch_size: sequences at once; the time of the batch is divided by it.
        repeats: timed runs.
    """
    whole_BTCHW = window_frames(frames_BTCHW, window, units).frames_BTCHW
    copies = -(-batch_size // len(whole_BTCHW))
    batch_BTCHW = whole_BTCHW.repeat(copies, 1, 1, 1, 1)[:batch_size]
    inputs_BTCHW = batch_BTCHW[:, : window.num_input_frames].to(device)

    def run_once() -> float:
        started = time.perf_counter()
        model(inputs_BTCHW, num_input_frames=window.num_input_frames, num_frames=window.num_frames)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with predicting(model):
        run_once()  # warm-up: first-call allocations and kernel choices
        seconds = statistics.median(run_once() for _ in range(repeats))
    return 1e3 * seconds / batch_size


@contextmanager
def predicting(model: Predictor) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode in which it came."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or the threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"
