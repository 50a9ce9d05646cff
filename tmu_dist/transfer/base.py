"""The contract of a transfer method, and the losses that all of them share.

Legend: B batch, T time, C channels, H, W height, width, Z noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.config import ModelConfig
from tmu_dist.models.cells.base import FrameLoss
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.ahead import TeachingAhead
from tmu_dist.teachers.bank import SampleKey, Shown, TeacherBank, Teaching
from tmu_dist.teachers.card import TeacherCard

Reduction = Literal["mean", "sum"]
Forward = Callable[..., Rollout]
"""The trainee's forward pass as the training loop calls it: arguments and result of
`Predictor.forward`, whether or not it is wrapped for data-parallel training."""


class Term(NamedTuple):
    """One term of an objective."""

    value: Tensor
    """Scalar: this rank's share of the mean over the global batch."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Every scalar that the optimiser sees, by name, and the rollout that they judge.

    A method returns this and nothing else, so that a term cannot be computed and then forgotten:
    `total` is the only way to `.backward()`. A term that a method has switched off is not here at
    all. One whose weight is 0 for now (an annealed one) adds zeros to the gradient, so that every
    parameter has one, as data-parallel training needs it.
    """

    terms: Mapping[str, Term]
    rollout: Rollout

    def total(self) -> Tensor:
        """The objective (Eq. 6)."""
        weighted_terms = [
            term.value if term.weight == 1.0 else term.weight * term.value
            for term in self.terms.values()
            if term.weight or term.value.requires_grad
        ]
        return sum(weighted_terms[1:], start=weighted_terms[0])

    def with_terms(self, more: Mapping[str, Term]) -> LossTerms:
        """The same with further terms."""
        return replace(self, terms={**self.terms, **more})

    def to_log(self) -> dict[str, Tensor]:
        """Detached values for the log, without their weights, and their weighted sum.

        They stay on the device: turning one into a number waits until the device has it.
        """
        values = {name: term.value for name, term in self.terms.items()} | {"total": self.total()}
        return {f"loss/{name}": value.detach() for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """What one update sees."""

    frames_BTCHW: Tensor
    """True frames in [0, 1], inputs and targets; 0 where nothing was observed."""
    observed_BTCHW: Tensor | None
    """bool: False where nothing was observed; None where every pixel was."""
    sampling_mask_BT: Tensor
    """Which predicted steps read the true frame (scheduled sampling)."""
    weights_B: Tensor
    """Weight of each sequence in the mean over the *global* batch; 0 for padding."""
    noise_BTZ: Tensor | None = None
    """Standard normal numbers of a stochastic student and its teachers."""
    step: int = 0
    """The iteration, from 1, for weights and schedules that depend on it."""
    sample_ids_B: Tensor | None = None
    """Which sequences these are, on the CPU (`data.loader.Batch`); None: nobody asks."""
    is_backwards: bool = False
    """Whether time is reversed."""
    share: float = 1.0
    """Part of this rank's batch that this is, where gradients are accumulated over several: what
    terms count that are not of sequences, such as penalties on weights."""

    def rows(self, rows: slice) -> TrainingBatch:
        """Some of the sequences."""

        def part(values: Tensor | None) -> Any:
            return None if values is None else values[rows]

        weights_B = self.weights_B[rows]
        return replace(
            self,
            frames_BTCHW=self.frames_BTCHW[rows],
            observed_BTCHW=part(self.observed_BTCHW),
            sampling_mask_BT=self.sampling_mask_BT[rows],
            weights_B=weights_B,
            noise_BTZ=part(self.noise_BTZ),
            sample_ids_B=part(self.sample_ids_B),
            share=self.share * len(weights_B) / len(self.weights_B),
        )

    def on(self, device: torch.device | str) -> TrainingBatch:
        """The same on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in values.items()
            if isinstance(value, Tensor) and name != "sample_ids_B"
        }
        return replace(self, **moved)

    def backwards(self) -> TrainingBatch:
        """The same sequences in reversed time; which steps read the truth stays as it is."""
        observed = self.observed_BTCHW
        return replace(
            self,
            frames_BTCHW=self.frames_BTCHW.flip(1),
            observed_BTCHW=None if observed is None else observed.flip(1),
            is_backwards=not self.is_backwards,
        )

    @property
    def observed_targets_BTCHW(self) -> Tensor | None:
        """`observed_BTCHW` of frames 2..T, which are predicted."""
        return None if self.observed_BTCHW is None else self.observed_BTCHW[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a student is to learn, whatever method helps it."""

    frame: FrameShape
    model: ModelConfig
    """Of the plain network."""
    objective: Objective
    num_input_frames: int


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """Whether knowledge is flowing right now; a method adds what it can tell to the first two."""

    teaching_gradient_norm: float
    """Norm of the gradient that what comes from the teachers alone gives the student."""
    prediction_gradient_norm: float


class DeadDistillationError(RuntimeError):
    """The teachers have no influence on the student although they should."""


class TransferMethod(ABC):
    """How a student is built and what it minimises. The training loop never asks which one."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def build_student(self) -> Predictor:
        """The network to train, freshly initialised under torch's global seed.

        Whatever a method adds to the plain network is initialised after it, so that the plain part
        starts the same under every method.
        """

    def plain_part(self, student: Predictor) -> nn.Module:
        """The part of a student whose tensors have the plain network's names."""
        return student

    def trainee(self, student: Predictor) -> nn.Module:
        """The module that is trained: the student, with what training alone needs around it.

        It is called like the student, and its parameters are the optimiser's. Whatever it has
        beside the student is kept in checkpoints and left out of the model that a run offers.
        Called when the student has its first weights, before a checkpoint is restored.
        """
        return student

    def describe(self, card: TeacherCard) -> TeacherCard:
        """The student's card, completed by what it takes to rebuild a network of this method."""
        return card

    def rates(self) -> Mapping[str, float]:
        """Learning rates of parameters of the trainee, by name pattern, in rates of the run."""
        return {}

    @abstractmethod
    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        """Run the trainee once and return its loss terms."""

    @property
    def unsteady(self) -> str | None:
        """What changes `loss` from one iteration to another beside tensors; None: nothing does.

        A steady loss is the same operations, on tensors in the same places and with the same
        numbers of the host, in every iteration, so that they can be recorded once
        (`training.graphed`). It does not depend on `TrainingBatch.step` or `is_backwards`, reads no
        values back from the device, no `sample_ids_B` and no files. A new method is not steady
        until it says so.
        """
        return f"{type(self).__name__} does not say that its loss is the same in every iteration"

    def announce(self, batch: TrainingBatch) -> None:
        """Tell what the next `loss` is of, so that what does not need the student may begin."""
        return

    def begin(self, trainee: nn.Module, batch: TrainingBatch) -> None:
        """Whatever a student needs of data before its first update; the same batch on all ranks."""
        return

    def liveness(self, trainee: nn.Module, batch: TrainingBatch) -> Liveness | None:
        """Measure whether teachers influence the student; None where a method has no such path.

        Raises:
            DeadDistillationError: they should, and do not.
        """
        return None

    def own_terms(self, rollout: Rollout, batch: TrainingBatch) -> LossTerms:
        """The terms of the objective apart from any transfer."""
        return LossTerms(terms=self.task.objective.terms(rollout, batch), rollout=rollout)

    def unroll(
        self,
        forward: Forward,
        batch: TrainingBatch,
        *,
        diagnostics: bool = False,
        **more: Any,
    ) -> Rollout:
        """Run the trainee over a training batch with its sampling mask.

        Args:
            forward: the trainee.
            batch: what it sees.
            diagnostics: as in `Predictor.forward`.
            more: what a method's own trainee takes beside.
        """
        return forward(
            batch.frames_BTCHW,
            num_input_frames=self.task.num_input_frames,
            num_frames=batch.frames_BTCHW.shape[1],
            sampling_mask_BT=batch.sampling_mask_BT,
            noise_BTZ=batch.noise_BTZ,
            diagnostics=diagnostics,
            **more,
        )


class TaughtMethod(TransferMethod):
    """A method whose teachers run beside the student during training, and are gone afterwards.

    Args:
        task: what the student learns.
        bank: the frozen teachers.
        teacher_input: what a teacher reads where the sampling mask hides the true frame: its
            "own" prediction, the "student"'s input, or the "truth" all the same.
    """

    def __init__(
        self,
        task: Task,
        *,
        bank: TeacherBank,
        teacher_input: Literal["own", "student", "truth"],
    ) -> None:
        super().__init__(task)
        self.bank = bank
        self.teacher_input = teacher_input
        self.ahead: TeachingAhead | None = None
        """Where teachers begin with announced batches; None: they wait until they are asked."""

    @abstractmethod
    def teaches_at(self, batch: TrainingBatch) -> bool:
        """Whether `loss` asks the teachers about this batch."""

    def announce(self, batch: TrainingBatch) -> None:
        """Let teachers begin, unless they need the student's rollout."""
        needs_rollout = self.teacher_input == "student"
        if self.ahead is not None and not needs_rollout and self.teaches_at(batch):
            self.ahead.begin(batch, partial(self._ask, batch, batch.frames_BTCHW))

    def teach(self, batch: TrainingBatch, rollout: Rollout | None = None) -> tuple[Teaching, ...]:
        """What the teachers make of a batch, if they have not begun with it, from now on.

        Args:
            batch: what the student sees.
            rollout: the student's, which teachers that read its inputs need.
        """
        frames_BTCHW = batch.frames_BTCHW
        if self.teacher_input == "student":
            assert rollout is not None
            read = rollout.inputs_BTCHW.detach()
            return self._ask(batch, torch.cat([read, frames_BTCHW[:, -1:]], dim=1))
        ask = partial(self._ask, batch, frames_BTCHW)
        return ask() if self.ahead is None else self.ahead.take(batch, ask)

    def _ask(self, batch: TrainingBatch, frames_BTCHW: Tensor) -> tuple[Teaching, ...]:
        mask, ids_B = batch.sampling_mask_BT, batch.sample_ids_B
        if self.teacher_input != "own":
            mask = torch.ones_like(mask)
        return self.bank.teach(
            Shown(
                frames_BTCHW,
                num_input_frames=self.task.num_input_frames,
                num_frames=batch.frames_BTCHW.shape[1],
                sampling_mask_BT=mask,
                noise_BTZ=batch.noise_BTZ,
                key=None if ids_B is None else SampleKey(ids_B, batch.is_backwards),
            )
        )


class Objective:
    """What a network minimises apart from any transfer: the first term of Eq. 6.

    Args:
        frame_loss: what the frames 2..T are compared by; "likelihood" is computed by the network.
        frame_weight: of that loss.
        kl: weight, at an iteration, of the divergence of stochastic networks.
        reduction: over time, channels and pixels of a sequence: their mean, or their sum.
    """

    def __init__(
        self,
        frame_loss: FrameLoss = "l2",
        *,
        frame_weight: float = 1.0,
        kl_weight: Callable[[int], float] = lambda step: 1.0,
        anneals: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        self.frame_loss = frame_loss
        self.frame_weight = frame_weight
        self.kl_weight = kl_weight
        self.anneals = anneals
        self.reduction = reduction

    @property
    def unsteady(self) -> str | None:
        """As `TransferMethod.unsteady`."""
        return "training.kl anneals the weight of the divergence" if self.anneals else None

    def terms(self, rollout: Rollout, batch: TrainingBatch) -> dict[str, Term]:
        """The objective of one rollout, masked to the observed pixels."""
        found = {"prediction": Term(self._frame_loss(rollout, batch), self.frame_weight)}
        if (kl_BT := rollout.objectives.get("kl_BT")) is not None:
            found["kl"] = Term(weighted(kl_BT.mean(1), batch), self.kl_weight(batch.step))
        return found

    def _frame_loss(self, rollout: Rollout, batch: TrainingBatch) -> Tensor:
        observed = batch.observed_targets_BTCHW
        if self.frame_loss == "likelihood":
            error = rollout.objectives["nll_BTCHW"]
        else:
            error = rollout.predictions_BTCHW - batch.frames_BTCHW[:, 1:]
        if observed is not None:
            # Not times 0: whatever stands at a missing pixel, even NaN, must leave no trace.
            error = error.masked_fill(~observed, 0.0)
        if self.frame_loss == "likelihood":
            per_sequence_B = reduce_values(error, self.reduction, observed)
        else:
            per_sequence_B = torch.zeros_like(batch.weights_B)
            if self.frame_loss in ("l1", "l1l2"):
                per_sequence_B = reduce_values(error.abs(), self.reduction, observed)
            if self.frame_loss in ("l2", "l1l2"):
                per_sequence_B = per_sequence_B + reduce_squares(error, self.reduction, observed)
        return weighted(per_sequence_B, batch)


def reduce_squares(error: Tensor, reduction: Reduction, weights: Tensor | None = None) -> Tensor:
    """Squared error of each sequence, [B]: the mean or the sum over all other axes.

    Args:
        error: [B, ...].
        reduction: "mean" or "sum".
        weights: what each element counts, 0 to 1 or bool, of a shape that broadcasts to the
            error's; None: all count 1. The mean divides by the sum of the weights, and is 0 for a
            sequence in which nothing counts.
    """
    return reduce_values(
        error.float().square() if error.dtype.itemsize < 4 else error.square(), reduction, weights
    )


def reduce_values(values: Tensor, reduction: Reduction, weights: Tensor | None = None) -> Tensor:
    """Like `reduce_squares`, of the values themselves."""
    if weights is None:
        flat = values.flatten(1)
        return flat.mean(1) if reduction == "mean" else flat.sum(1)
    sums = (values * weights).flatten(1).sum(1)
    if reduction == "sum":
        return sums
    counted = weights.flatten(1).sum(1) * (values[0].numel() // weights[0].numel())
    return sums / torch.where(counted > 0, counted, 1)


def weighted(per_sequence_B: Tensor, batch: TrainingBatch) -> Tensor:
    """This rank's share of the mean over the global batch."""
    return (per_sequence_B * batch.weights_B).sum()


def gradient_norm(loss: Tensor, parameters: Iterable[Tensor]) -> float:
    """Norm of the gradient that a loss gives those parameters that are trained; 0 if none are."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return 0.0
    with torch.autocast(loss.device.type, enabled=False):  # it has its precision already
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def is_negligible(gradient_norm: float, beside: float) -> bool:
    """Whether a gradient is so far below another that it cannot move a float32 weight any more."""
    return not gradient_norm > 1e-7 * beside


def annealed(weight: float, step: int, *, start: int, stop: int) -> float:
    """A weight that is 0 up to one iteration and rises linearly until another."""
    if step >= stop:
        return weight
    return weight * max(0.0, (step - start) / (stop - start))
