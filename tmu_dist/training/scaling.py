"""Loss scaling: what keeps the gradients of float16 arithmetic within its range.

The loss is multiplied by a large number before the backward pass and the gradients are divided by
it after. Where that was too large, gradients overflow: the update is skipped, and the number
halved. The first updates of a run find it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24
"""The smallest number of float16. Gradients that overflow below it are not finite at all."""


class LossScaling:
    """Of one optimiser; where it is off, backward passes and updates are as they would be.

    Args:
        device: of the gradients.
        is_on: whether to scale.
    """

    def __init__(self, device: torch.device, *, is_on: bool) -> None:
        self.is_on = is_on
        self._scaler = torch.amp.GradScaler(device.type, enabled=is_on)
        self._attempted = 0

    def backward(self, loss: Tensor) -> None:
        """Add the scaled gradient of a loss to the parameters'."""
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimiser's gradients by the scale, once before an update."""
        self._scaler.unscale_(optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights unless a gradient has overflowed, and choose the next scale.

        On a card neither waits for the device where the optimiser is a fused one.
        """
        self._scaler.step(optimizer)
        self._scaler.update()
        self._attempted += 1

    def facts(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """For the log: the scale, and how many updates were skipped so far; waits for the device.

        Adam counts the updates that it has made in its state.
        """
        if not self.is_on:
            return {}
        made = max((int(state["step"]) for state in optimizer.state.values()), default=0)
        return {
            "loss_scale": self._scaler.get_scale(),
            "skipped_updates": self._attempted - made,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs; nothing where scaling is off."""
        if not self.is_on:
            return {}
        return {"scaler": self._scaler.state_dict(), "attempted": self._attempted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if self.is_on:
            self._scaler.load_state_dict(state["scaler"])
            self._attempted = state["attempted"]
