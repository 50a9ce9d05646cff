"""One iteration: forward, backward, update, once or twice (reverse input).

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tmu_dist import arithmetic
from tmu_dist.config import Precision
from tmu_dist.models.rollout import Predictor
from tmu_dist.training.graphed import Learn, RecordedParts, Recorder
from tmu_dist.training.rates import rate_groups
from tmu_dist.training.scaling import LossScaling
from tmu_dist.transfer.base import Forward, Liveness, LossTerms, TrainingBatch, TransferMethod


class StepTerms(Mapping[str, float]):
    """The loss terms of an iteration, which stay on the device until somebody looks at one.

    Args:
        sums: of each term over the directions of time.
        num_directions: how many those are.
    """

    def __init__(self, sums: Mapping[str, Tensor], num_directions: int) -> None:
        self._sums = sums
        self._num_directions = num_directions
        self._values: dict[str, float] | None = None

    def read(self) -> dict[str, float]:
        """All of them, averaged over directions; waits until the device has done the iteration."""
        if self._values is None:
            sums = torch.stack(list(self._sums.values())).tolist()
            self._values = {
                name: value / self._num_directions
                for name, value in zip(self._sums, sums, strict=True)
            }
        return self._values

    def __getitem__(self, name: str) -> float:
        return self.read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __repr__(self) -> str:
        return repr(self.read())


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
        precision: of convolutions and matrix products (`arithmetic`); float16's gradients are
            scaled, and updates in which they overflow are skipped and counted.
        recorder: records how the first parts are learned from and replays it for later ones; None:
            nothing is recorded. The method must be steady (`TransferMethod.unsteady`).

    Raises:
        ConfigError: the device has no such precision.
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
        precision: Precision = "fp32",
        recorder: Recorder | None = None,
    ) -> None:
        arithmetic.check_precision(precision, device)
        self.method = method
        self.trainee = trainee
        self.forward = forward
        self.device = device
        self.learning_rate = learning_rate
        self.reverse_input = reverse_input
        self.grad_clip_norm = grad_clip_norm
        self.sequences_at_once = sequences_at_once
        self.precision = precision
        self.is_recorded = recorder is not None
        self._learn: Learn = self.backward
        if recorder is not None:
            self._learn = RecordedParts(self._learn_with_teachers, recorder)
        self.scaling = LossScaling(device, is_on=precision == "fp16")
        self._planned: tuple[TrainingBatch, list[list[TrainingBatch]]] | None = None
        self._adam_betas = (adam_beta1, 0.999)
        self.optimizer = self.adam(groups or rate_groups(student, trainee))
        of_student = {id(value) for value in student.state_dict(keep_vars=True).values()}
        self._beside_student = [
            name
            for name, value in trainee.state_dict(keep_vars=True).items()
            if id(value) not in of_student
        ]

    def __call__(self, batch: TrainingBatch, following: TrainingBatch | None = None) -> StepTerms:
        """Train on one batch.

        Args:
            batch: this rank's.
            following: the next call's batch, if it is known, for which teachers may begin.

        Returns:
            The loss terms, averaged over both directions of time.
        """
        num_directions = 1 if self.reverse_input == "off" else 2
        with arithmetic.float32_products(self.precision, self.device):
            return StepTerms(self._sums(batch, following, num_directions), num_directions)

    def backward(self, batch: TrainingBatch, scale: float) -> dict[str, Tensor]:
        """Add the gradient of `scale` times the objective to the trainee's; returns its terms.

        Where float16's gradients are scaled, this one is, too.
        """
        with self.autocast():
            terms = self.loss(batch)
        self.scaling.backward(terms.total() * scale)
        return terms.to_log()

    def loss(self, batch: TrainingBatch) -> LossTerms:
        """What the trainee minimises on this batch."""
        return self.method.loss(self.forward, batch)

    def begin(self, batch: TrainingBatch) -> None:
        """What comes before the first update (`TransferMethod.begin`)."""
        with torch.no_grad():
            self.method.begin(self.trainee, batch)

    def look(self, batch: TrainingBatch) -> Liveness | None:
        """Whether knowledge flows (`TransferMethod.liveness`), in the precision of the updates.

        But float16's gradients vanish unless they are scaled, so theirs are looked at in float32.
        """
        with nullcontext() if self.precision == "fp16" else self.autocast():
            return self.method.liveness(self.trainee, batch)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training has beside the student's weights."""
        values = self.trainee.state_dict()
        return {
            "optimizer": self.optimizer.state_dict(),
            "trainee": {name: values[name] for name in self._beside_student},
            "scaling": self.scaling.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the student's weights are loaded already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaling.load_state_dict(state.get("scaling", {}))  # older ones know no float16
        values: dict[str, Tensor] = state["trainee"]
        self.trainee.load_state_dict(self.trainee.state_dict() | values)

    def facts(self) -> dict[str, float]:
        """What else of the updates belongs into the log; waits for the device."""
        return self.scaling.facts(self.optimizer)

    def adam(
        self, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]
    ) -> torch.optim.Adam:
        """An optimiser with the run's settings; its learning rates are set before every update.

        The fused one does an update in one pass over memory, and on cards without waiting: on two
        cores 2 ms instead of 25 for 3.6 million weights.
        """
        return torch.optim.Adam(
            parameters, lr=self.learning_rate(1), betas=self._adam_betas, fused=True
        )

    def autocast(self) -> torch.autocast:
        """The run's half precision, if it has one."""
        # A recording must not hold weights as they were rounded before it.
        return arithmetic.autocast(self.precision, self.device, keeps_weights=not self.is_recorded)

    def update(self, optimizer: torch.optim.Optimizer, scaling: LossScaling, step: int) -> None:
        """One update at the iteration's learning rate, times the factor of a group that has one."""
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step) * group.get("factor", 1.0)
        scaling.update(optimizer)

    def _sums(
        self, batch: TrainingBatch, following: TrainingBatch | None, num_directions: int
    ) -> dict[str, Tensor]:
        """All updates of an iteration; its terms, summed over directions."""
        updates = self._updates(batch)
        upcoming = self._upcoming(updates, following)
        scale = 1 / num_directions if self.reverse_input == "average" else 1.0
        sums: dict[str, Tensor] = {}
        for parts in updates:
            # A recording adds to the gradients that it knows.
            self.optimizer.zero_grad(set_to_none=not self.is_recorded)
            for number, part in enumerate(parts, start=1):
                if (next_part := next(upcoming, None)) is not None:
                    with self.autocast():
                        self.method.announce(next_part)
                with nullcontext() if number == len(parts) else self._without_exchange():
                    terms = self._learn(part, scale)
                for name, value in terms.items():
                    sums[name] = sums[name] + value if name in sums else value
            self._update(batch.step)
        return sums

    def _upcoming(
        self, updates: list[list[TrainingBatch]], following: TrainingBatch | None
    ) -> Iterator[TrainingBatch]:
        """The parts after the first one, for which teachers may begin."""
        if self.is_recorded:
            return iter(())  # they do in the recording
        parts = [part for parts in updates for part in parts][1:]
        if following is not None:
            parts.append(self._updates(following)[0][0])
        return iter(parts)

    def _learn_with_teachers(self, part: TrainingBatch, scale: float) -> dict[str, Tensor]:
        """Like `backward`, with teachers that begin beside the student, in a stream of theirs."""
        with self.autocast():
            self.method.announce(part)
        return self.backward(part, scale)

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
        self.scaling.unscale(self.optimizer)
        if self.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trainee.parameters(), self.grad_clip_norm)
        self.update(self.optimizer, self.scaling, step)
