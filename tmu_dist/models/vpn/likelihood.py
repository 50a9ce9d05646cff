"""What a pixel's logits say: 256 levels, or the probability of a white pixel.

Legend: B batch, C channels, H, W height and width, L logits of one pixel and channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


class Likelihood(ABC):
    """The distribution of one pixel's channel, given its logits (last axis)."""

    num_logits: ClassVar[int]

    @abstractmethod
    def as_seen(self, pixels: Tensor) -> Tensor:
        """Pixel values in the form in which later pixels get to see them."""

    @abstractmethod
    def nll(self, logits_BCHWL: Tensor, target_BCHW: Tensor) -> Tensor:
        """Negative log-likelihood [B, C, H, W] of a true frame in [0, 1], in nats."""

    @abstractmethod
    def mean(self, logits_L: Tensor) -> Tensor:
        """Expected value in [0, 1]; the last axis falls away."""

    @abstractmethod
    def quantile(self, logits_L: Tensor, noise: Tensor) -> Tensor:
        """The value where the cumulative distribution passes Phi(noise), the normal one."""


class Softmax(Likelihood):
    """256 levels; the one of a value v is round(255 v), and values beyond [0, 1] are cut off."""

    num_logits = 256

    def as_seen(self, pixels: Tensor) -> Tensor:
        """Values on the grid of levels."""
        return _level(pixels) / 255

    def nll(self, logits_BCHWL: Tensor, target_BCHW: Tensor) -> Tensor:
        """Cross-entropy with the level of the target."""
        logits_BLCHW = logits_BCHWL.movedim(-1, 1)
        return F.cross_entropy(logits_BLCHW, _level(target_BCHW).long(), reduction="none")

    def mean(self, logits_L: Tensor) -> Tensor:
        """Mean of the levels' values (a sum of products, which autocast leaves in float32)."""
        values = torch.linspace(0, 1, 256, dtype=logits_L.dtype, device=logits_L.device)
        return (logits_L.softmax(-1) * values).sum(-1)

    def quantile(self, logits_L: Tensor, noise: Tensor) -> Tensor:
        """Value of the lowest level whose cumulative probability reaches Phi(noise)."""
        reached = logits_L.softmax(-1).cumsum(-1)[..., :-1]  # the last level takes what is left
        below = reached < torch.special.ndtr(noise).unsqueeze(-1)
        return below.sum(-1).to(logits_L.dtype) / 255


class Bernoulli(Likelihood):
    """One logit, of the probability of 1; a true value in between is itself a probability."""

    num_logits = 1

    def as_seen(self, pixels: Tensor) -> Tensor:
        """Values as they are."""
        return pixels

    def nll(self, logits_BCHWL: Tensor, target_BCHW: Tensor) -> Tensor:
        """Binary cross-entropy; for a grey target it is at least the target's own entropy."""
        return F.binary_cross_entropy_with_logits(
            logits_BCHWL.squeeze(-1), target_BCHW, reduction="none"
        )

    def mean(self, logits_L: Tensor) -> Tensor:
        """The probability."""
        return logits_L.squeeze(-1).sigmoid()

    def quantile(self, logits_L: Tensor, noise: Tensor) -> Tensor:
        """1 where Phi(noise) > 1 - p; written so that the upper tail keeps its digits."""
        return (torch.special.ndtr(-noise) < self.mean(logits_L)).to(logits_L.dtype)


LIKELIHOODS: dict[str, Likelihood] = {"softmax": Softmax(), "bernoulli": Bernoulli()}


def _level(pixels: Tensor) -> Tensor:
    return (255 * pixels).round().clamp(0, 255)
