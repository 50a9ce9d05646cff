"""One iteration: forward, backward, update, once or twice (reverse input).

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from tmu_dist.transfer.base import Forward, TrainingBatch, TransferMethod


class TrainingStep:
    """Minimises a transfer method's objective.

    With `reverse_input` every sequence is also learned backwards in time: "update" makes a second
    update with the same sampling mask (so one iteration is two updates), "average" one update on
    the mean of both losses, "off" neither.

    Args:
        forward: the student, wrapped for data-parallel training where there are several ranks.
        precision: "bf16" runs the convolutions in bfloat16 under autocast; weights, memories and
            losses stay float32.
    """

    def __init__(
        self,
        method: TransferMethod,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        reverse_input: Literal["update", "average", "off"],
        grad_clip_norm: float | None,
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self.method = method
        self.forward = forward
        self.optimizer = optimizer
        self.device = device
        self.reverse_input = reverse_input
        self.grad_clip_norm = grad_clip_norm
        self.precision = precision
        self._parameters: list[nn.Parameter] = [
            p for group in optimizer.param_groups for p in group["params"]
        ]

    def __call__(self, batch: TrainingBatch) -> dict[str, float]:
        """Train on one batch; returns the loss terms, averaged over both directions of time."""
        passes = [batch]
        if self.reverse_input != "off":
            passes.append(_backwards(batch))
        scale = 1 / len(passes) if self.reverse_input == "average" else 1.0
        logs = []
        for index, one_pass in enumerate(passes):
            if index == 0 or self.reverse_input == "update":
                self.optimizer.zero_grad(set_to_none=True)
            logs.append(self._backward(one_pass, scale))
            if index == len(passes) - 1 or self.reverse_input == "update":
                self._update()
        return {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}

    def _backward(self, batch: TrainingBatch, scale: float) -> dict[str, float]:
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        ):
            terms = self.method.loss(self.forward, batch)
        (terms.total() * scale).backward()
        return terms.to_log()

    def _update(self) -> None:
        if self.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.grad_clip_norm)
        self.optimizer.step()


def _backwards(batch: TrainingBatch) -> TrainingBatch:
    """The same sequences in reversed time; which steps read the truth stays as it is."""
    observed = batch.observed_BTCHW
    return replace(
        batch,
        frames_BTCHW=batch.frames_BTCHW.flip(1),
        observed_BTCHW=None if observed is None else observed.flip(1),
    )
