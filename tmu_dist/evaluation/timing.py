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
from tmu_dist.data.transforms import Window, window_frames
from tmu_dist.evaluation.baselines import OpticalFlow
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


class FlowTime:
    """Extrapolates the sequences of this rank, and measures how long that takes."""

    def __init__(self) -> None:
        self.seconds, self.num_sequences = 0.0, 0

    def extrapolate(
        self, flow: OpticalFlow, inputs: Window, truth: Window, weights_B: Tensor
    ) -> Tensor:
        """Forecast of a batch; padding is not worth the time and stays 0."""
        started = time.perf_counter()
        kept = weights_B > 0
        forecast_BTCHW = torch.zeros_like(truth.frames_BTCHW)
        if kept.any():
            observed = inputs.observed_BTCHW
            forecast_BTCHW[kept] = flow.forecast(
                inputs.frames_BTCHW[kept],
                None if observed is None else observed[kept],
                forecast_BTCHW.shape[1],
            )
        self.seconds += time.perf_counter() - started
        self.num_sequences += int(kept.sum())
        return forecast_BTCHW

    @property
    def ms_per_sequence(self) -> float | None:
        """None where nothing was extrapolated."""
        return 1e3 * self.seconds / self.num_sequences if self.num_sequences else None


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or the threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"
