"""One iteration: forward, backward, update, once or twice (reverse input).

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
        sequences_at_once: most sequences of a forward pass; the gradients of more are accumulated,
            and ranks exchange them once an update. None: all at once.
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
        sequences_at_once: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.method = method
        self.trainee = trainee
        self.forward = forward
        self.device = device
        self.learning_rate = learning_rate
        self.reverse_input = reverse_input
        self.grad_clip_norm = grad_clip_norm
        self.sequences_at_once = sequences_at_once
        self.precision = precision
        self._planned: tuple[TrainingBatch, list[list[TrainingBatch]]] | None = None
        self._adam_betas = (adam_beta1, 0.999)
        self.optimizer = self.adam(groups or rate_groups(student, trainee))
        of_student = {id(value) for value in student.state_dict(keep_vars=True).values()}
        self._beside_student = [
            name
            for name, value in trainee.state_dict(keep_vars=True).items()
            if id(value) not in of_student
        ]

    def __call__(
        self, batch: TrainingBatch, following: TrainingBatch | None = None
    ) -> dict[str, float]:
        """Train on one batch.

        Args:
            batch: this rank's.
            following: the next call's batch, if it is known, for which teachers may begin.

        Returns:
            The loss terms, averaged over both directions of time.
        """
        updates = self._updates(batch)
        upcoming = [part for parts in updates for part in parts][1:]
        if following is not None:
            upcoming.append(self._updates(following)[0][0])
        next_parts = iter(upcoming)
        num_directions = 1 if self.reverse_input == "off" else 2
        scale = 1 / num_directions if self.reverse_input == "average" else 1.0
        sums: dict[str, float] = {}
        for parts in updates:
            self.optimizer.zero_grad(set_to_none=True)
            for number, part in enumerate(parts, start=1):
                if (next_part := next(next_parts, None)) is not None:
                    with self.autocast():
                        self.method.announce(next_part)
                with nullcontext() if number == len(parts) else self._without_exchange():
                    for name, value in self.backward(part, scale).items():
                        sums[name] = sums.get(name, 0.0) + value
            self._update(batch.step)
        return {name: value / num_directions for name, value in sums.items()}

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

    def _updates(self, batch: TrainingBatch) -> list[list[TrainingBatch]]:
        """What each update of a batch accumulates: the very same parts when asked again."""
        if self._planned is None or self._planned[0] is not batch:
            size = len(batch.weights_B)
            at_once = self.sequences_at_once or size
            parts = [batch]
            if at_once < size:
                parts = [batch.rows(slice(k, k + at_once)) for k in range(0, size, at_once)]
            updates = [parts]
            if self.reverse_input != "off":
                updates.append([part.backwards() for part in parts])
            if self.reverse_input == "average":
                updates = [updates[0] + updates[1]]
            self._planned = batch, updates
        return self._planned[1]

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Keep gradients on this rank for now, where there are several."""
        if isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()

    def _update(self, step: int) -> None:
        if self.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trainee.parameters(), self.grad_clip_norm)
        self.update(self.optimizer, step)
