"""The contract of a transfer method, and the losses and masks that all of them share.

Legend: B batch, T time, C channels, P hidden channels, H, W height, width, h, w those of a map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tmu_dist.models.patches import patchify
from tmu_dist.models.rollout import Predictor, Rollout

Reduction = Literal["mean", "sum"]
Forward = Callable[..., Rollout]
"""The student's forward pass as the training loop calls it: a `Predictor`, or one wrapped for
data-parallel training."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Every scalar that the optimiser sees, by name.

    A method returns this and nothing else, so that a term cannot be computed and then forgotten:
    `total` is the only way to `.backward()`. A term of weight 0 is left out altogether, so that
    it cannot change a single bit.
    """

    prediction: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.extra.keys() != self.weights.keys():
            raise ValueError(
                f"Loss terms {sorted(self.extra)} and weights {sorted(self.weights)} must have "
                "the same names; use weight 0.0 to switch a term off."
            )

    def total(self) -> Tensor:
        """The objective (Eq. 6)."""
        total = self.prediction
        for name, term in self.extra.items():
            if self.weights[name]:
                total = total + self.weights[name] * term
        return total

    def to_log(self) -> dict[str, float]:
        """Detached values for the log."""
        terms = {"prediction": self.prediction, **self.extra, "total": self.total()}
        return {f"loss/{name}": float(value.detach()) for name, value in terms.items()}


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


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """Whether knowledge is flowing: what the distillation term does to the student right now."""

    distillation_gradient_norm: float
    """Norm of the gradient that the weighted distillation term alone gives the student."""
    prediction_gradient_norm: float
    gate_means: list[list[float]]
    """Mean transfer gate by TMU layer, then by teacher."""
    memory_correlation: list[list[float]]
    """Pearson correlation of imitation and teacher memory, by TMU layer, then by teacher."""
    forget_gate_means: list[float]
    """By layer."""
    memory_rms: list[float]
    """By layer; Eq. 5 lets it grow with the number of teachers and time."""


class DeadDistillationError(RuntimeError):
    """The teachers have no influence on the student although they should."""


class TransferMethod(ABC):
    """How a student is built and what it minimises. The training loop never asks which one."""

    def __init__(self, *, num_input_frames: int, reduction: Reduction) -> None:
        self.num_input_frames = num_input_frames
        self.reduction = reduction

    @abstractmethod
    def build_student(self) -> Predictor:
        """The network to train, freshly initialised under torch's global seed."""

    @abstractmethod
    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        """Run the student once and return its loss terms."""

    def liveness(self, student: Predictor, batch: TrainingBatch) -> Liveness | None:
        """Measure whether teachers influence the student; None where a method has no such path.

        Raises:
            DeadDistillationError: they should, and do not.
        """
        return None

    def unroll(
        self, forward: Forward, batch: TrainingBatch, *, diagnostics: bool = False
    ) -> Rollout:
        """Run the student over a training batch with its sampling mask."""
        return forward(
            batch.frames_BTCHW,
            num_input_frames=self.num_input_frames,
            num_frames=batch.frames_BTCHW.shape[1],
            sampling_mask_BT=batch.sampling_mask_BT,
            diagnostics=diagnostics,
        )

    def prediction_loss(self, rollout: Rollout, batch: TrainingBatch) -> Tensor:
        """Squared error of the observed pixels of frames 2..T, the first term of Eq. 6."""
        error = rollout.predictions_BTCHW - batch.frames_BTCHW[:, 1:]
        if batch.observed_BTCHW is None:
            return weighted(reduce_squares(error, self.reduction), batch)
        observed = batch.observed_BTCHW[:, 1:]
        # Not times 0: whatever stands at a missing pixel, even NaN, must leave no trace.
        error = error.masked_fill(~observed, 0.0)
        return weighted(reduce_squares(error, self.reduction, observed), batch)


def reduce_squares(error: Tensor, reduction: Reduction, weights: Tensor | None = None) -> Tensor:
    """Squared error of each sequence, [B]: the mean or the sum over all other axes.

    Args:
        error: [B, ...].
        reduction: "mean" or "sum".
        weights: what each element counts, 0 to 1 or bool, of a shape that broadcasts to the
            error's; None: all count 1. The mean divides by the sum of the weights, and is 0 for a
            sequence in which nothing counts.
    """
    squares = error.float().square() if error.dtype.itemsize < 4 else error.square()
    if weights is None:
        flat = squares.flatten(1)
        return flat.mean(1) if reduction == "mean" else flat.sum(1)
    sums = (squares * weights).flatten(1).sum(1)
    if reduction == "sum":
        return sums
    counted = weights.flatten(1).sum(1) * (error[0].numel() // weights[0].numel())
    return sums / torch.where(counted > 0, counted, 1)


def observed_share(observed_BTCHW: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """Share of observed pixels in the patch under each element of a memory, [B, T, 1, h, w].

    Step t of an unrolled network reads frame t, so the shares of frames 1..T-1 belong to its
    memories. Where a step reads a prediction instead (scheduled sampling), the share is that of
    the true frame at its place: there is nothing else to compare a memory with.
    """
    return patchify(observed_BTCHW.to(dtype), patch_size).mean(2, keepdim=True)


def weighted(per_sequence_B: Tensor, batch: TrainingBatch) -> Tensor:
    """This rank's share of the mean over the global batch."""
    return (per_sequence_B * batch.weights_B).sum()
