"""One iteration: forward, backward, update, once or twice (reverse input).

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tmu_dist.models.rollout import Predictor
from tmu_dist.training.rates import rate_groups
from tmu_dist.transfer.base import Forward, LossTerms, TrainingBatch, TransferMethod


class TrainingStep:
    """Minimises a transfer method's objective with Adam.

    With `reverse_input` every sequence is also learned backwards in time: "update" makes a second
    update with the same sampling mask (so one iteration is two updates), "average" one update on
    the mean of both losses, "off" neither.

    Args:
        student: the network that the run is about.
        trainee: the module that is trained, which contains the student (`TransferMethod.trainee`).
        forward: the trainee, wrapped for data-parallel training where there are several ranks.
        learning_rate: of an iteration.
        groups: the trainee's parameters by learning rate (`rate_groups`); None: all at the one.
        precision: "bf16" runs the convolutions in bfloat16 under autocast; weights, memories and
            losses stay float32.
    """

    def __init__(
        self,
        method: TransferMethod,
        student: Predictor,
        trainee: nn.Module,
        forward: Forward,
        *,
        device: torch.device,
        learning_rate: Callable[[int], float],
        groups: Sequence[dict[str, Any]] | None = None,
        adam_beta1: float = 0.9,
        reverse_input: Literal["update", "average", "off"],
        grad_clip_norm: float | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.method = method
        self.trainee = trainee
        self.forward = forward
        self.device = device
        self.learning_rate = learning_rate
        self.reverse_input = reverse_input
        self.grad_clip_norm = grad_clip_norm
        self.precision = precision
        self._adam_betas = (adam_beta1, 0.999)
        self.optimizer = self.adam(groups or rate_groups(student, trainee))
        of_student = {id(value) for value in student.state_dict(keep_vars=True).values()}
        self._beside_student = [
            name
            for name, value in trainee.state_dict(keep_vars=True).items()
            if id(value) not in of_student
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
            logs.append(self.backward(one_pass, scale))
            if index == len(passes) - 1 or self.reverse_input == "update":
                self._update(batch.step)
        return {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}

    def backward(self, batch: TrainingBatch, scale: float) -> dict[str, float]:
        """Add the gradient of `scale` times the objective to the trainee's; returns its terms."""
        with self.autocast():
            terms = self.loss(batch)
        (terms.total() * scale).backward()
        return terms.to_log()

    def loss(self, batch: TrainingBatch) -> LossTerms:
        """What the trainee minimises on this batch."""
        return self.method.loss(self.forward, batch)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training has beside the student's weights."""
        values = self.trainee.state_dict()
        return {
            "optimizer": self.optimizer.state_dict(),
            "trainee": {name: values[name] for name in self._beside_student},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the student's weights are loaded already."""
        self.optimizer.load_state_dict(state["optimizer"])
        values: dict[str, Tensor] = state["trainee"]
        self.trainee.load_state_dict(self.trainee.state_dict() | values)

    def adam(
        self, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]
    ) -> torch.optim.Adam:
        """An optimiser with the run's settings; its learning rates are set before every update."""
        return torch.optim.Adam(parameters, lr=self.learning_rate(1), betas=self._adam_betas)

    def autocast(self) -> torch.autocast:
        """The run's precision."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )

    def update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """One update at the iteration's learning rate, times the factor of a group that has one."""
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step) * group.get("factor", 1.0)
        optimizer.step()

    def _update(self, step: int) -> None:
        if self.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trainee.parameters(), self.grad_clip_norm)
        self.update(self.optimizer, step)


def _backwards(batch: TrainingBatch) -> TrainingBatch:
    """The same sequences in reversed time; which steps read the truth stays as it is."""
    observed = batch.observed_BTCHW
    return replace(
        batch,
        frames_BTCHW=batch.frames_BTCHW.flip(1),
        observed_BTCHW=None if observed is None else observed.flip(1),
    )
