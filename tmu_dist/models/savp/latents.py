"""SAVP's latents: Gaussians, the posterior that sees the next frame, and a learned prior.

Lee et al. 2018.

Legend: B batch, C channels, F features, Z latent, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.models.savp.blocks import InstanceNorm, initialised


class Gaussian(NamedTuple):
    """Independent normal distributions of the numbers of a latent."""

    mean_BZ: Tensor
    log_variance_BZ: Tensor

    @classmethod
    def standard(cls, like_BZ: Tensor) -> Gaussian:
        """Mean 0, variance 1."""
        zeros = torch.zeros_like(like_BZ)
        return cls(zeros, zeros)

    def draw(self, noise_BZ: Tensor | None) -> Tensor:
        """The latent that belongs to standard normal numbers; the mean if there are none."""
        if noise_BZ is None:
            return self.mean_BZ
        return self.mean_BZ + torch.exp(self.log_variance_BZ / 2) * noise_BZ

    def divergence_from(self, other: Gaussian) -> Tensor:
        """Kullback-Leibler divergence KL(self || other) in nats, [B].

        From the standard normal it is -1/2 sum(1 + log v - mean^2 - v).
        """
        log_ratio = self.log_variance_BZ - other.log_variance_BZ
        distance = (self.mean_BZ - other.mean_BZ).square() / other.log_variance_BZ.exp()
        return 0.5 * (log_ratio.exp() + distance - 1 - log_ratio).sum(1)


class GaussianHead(nn.Module):
    """Two dense layers that say mean and log-variance; the latter is kept within -10 and 10."""

    def __init__(self, in_features: int, latent_size: int) -> None:
        super().__init__()
        self.mean = initialised(nn.Linear(in_features, latent_size))
        self.log_variance = initialised(nn.Linear(in_features, latent_size))

    def forward(self, features_BF: Tensor) -> Gaussian:
        """At least float32: under autocast a dense layer gives bfloat16."""
        mean, log_variance = self.mean(features_BF), self.log_variance(features_BF)
        precise = torch.promote_types(mean.dtype, torch.float32)
        return Gaussian(mean.to(precise), log_variance.to(precise).clamp(-10.0, 10.0))


class PairEncoder(nn.Module):
    """Features of two frames: three halving 4x4 convolutions, averaged over the map.

    Frames of less than 32 pixels are halved less often, to maps of at least 2x2: the norm would
    leave nothing of a smaller map that tells two pairs apart.

    Args:
        image_channels: of one frame.
        channels: of the first convolution; the others have two and four times as many.
    """

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        sizes = (2 * image_channels, channels, 2 * channels, 4 * channels)
        convs = [initialised(nn.Conv2d(into, out, 4)) for into, out in pairwise(sizes)]
        self.convs: Sequence[nn.Conv2d] = nn.ModuleList(convs)  # type: ignore[assignment]
        self.norms = nn.ModuleList([nn.Identity(), *map(InstanceNorm, sizes[2:])])
        self.out_features = sizes[-1]

    def forward(self, first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        """Features [B, F] of two frames."""
        x = torch.cat([first_BCHW, second_BCHW], dim=1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            stride = 2 if min(x.shape[2:]) >= 8 else 1
            x = F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=1)
            x = F.leaky_relu(norm(x), 0.2)
        return x.mean((2, 3))


class Posterior(nn.Module):
    """q(z | frame, next frame)."""

    def __init__(self, image_channels: int, channels: int, latent_size: int) -> None:
        super().__init__()
        self.encoder = PairEncoder(image_channels, channels)
        self.head = GaussianHead(self.encoder.out_features, latent_size)

    def forward(self, frame_BCHW: Tensor, next_BCHW: Tensor) -> Gaussian:
        """Of the latent that leads from one frame to the next."""
        gaussian: Gaussian = self.head(self.encoder(frame_BCHW, next_BCHW))
        return gaussian


class LSTMState(NamedTuple):
    """State of a plain LSTM."""

    hidden_BF: Tensor
    memory_BF: Tensor


class LSTM(nn.Module):
    """A plain LSTM cell: gates in the order input, modulation, forget, output; forget bias 1."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.gates = initialised(nn.Linear(in_features + out_features, 4 * out_features))

    def initial_state(self, like: Tensor) -> LSTMState:
        """All-zero state for a batch like this."""
        zeros = like.new_zeros(like.shape[0], self.out_features)
        return LSTMState(zeros, zeros)

    def forward(self, x_BF: Tensor, state: LSTMState) -> LSTMState:
        """One time step; the memory stays float32 under autocast."""
        i, j, f, o = self.gates(torch.cat([x_BF, state.hidden_BF], dim=1)).chunk(4, dim=1)
        memory = torch.sigmoid(f + 1.0) * state.memory_BF + torch.sigmoid(i) * torch.tanh(j)
        return LSTMState(torch.sigmoid(o) * torch.tanh(memory), memory)


class LearnedPrior(nn.Module):
    """p(z | pairs of input frames): the posterior's encoder, then a dense layer and an LSTM.

    Pairs of input frames are read as long as there are any; afterwards the features are zeros.
    """

    def __init__(self, image_channels: int, channels: int, latent_size: int) -> None:
        super().__init__()
        self.encoder = PairEncoder(image_channels, channels)
        features = self.encoder.out_features
        self.dense = initialised(nn.Linear(features, features))
        self.lstm = LSTM(features, features)
        self.head = GaussianHead(features, latent_size)

    def forward(
        self, pair_BCHW: tuple[Tensor, Tensor] | None, state: LSTMState
    ) -> tuple[Gaussian, LSTMState]:
        """One time step; the pair is a frame and its successor, None where no input frame is."""
        zeros = torch.zeros_like(state.hidden_BF)
        features = zeros if pair_BCHW is None else self.encoder(*pair_BCHW)
        state = self.lstm(self.dense(features), state)
        return self.head(state.hidden_BF), state


class LatentState(NamedTuple):
    """What the path of the latents remembers."""

    smoothed: LSTMState
    """Of the LSTM that drawn latents pass through."""
    prior: LSTMState | None
    """Of the learned prior."""
    input_pairs_left: int
    """Steps to come whose next frame is an input frame."""
    true_frame_BCHW: Tensor | None
    """The true frame of this step, if it was shown as the target of the one before: the posterior
    reads true frames, also where the network reads its own predictions."""


class LatentPath(nn.Module):
    """Draws each step's latent and passes it through an LSTM.

    Where the next frame is known it is drawn from the posterior, otherwise from the prior.
    """

    def __init__(
        self,
        image_channels: int,
        *,
        latent_size: int,
        posterior_channels: int,
        prior: Literal["normal", "learned"],
    ) -> None:
        super().__init__()
        self.posterior = Posterior(image_channels, posterior_channels, latent_size)
        self.prior = (
            LearnedPrior(image_channels, posterior_channels, latent_size)
            if prior == "learned"
            else None
        )
        self.lstm = LSTM(latent_size, latent_size)

    def initial_state(self, frame_BCHW: Tensor, num_input_frames: int) -> LatentState:
        """All-zero states before the first frame."""
        return LatentState(
            smoothed=self.lstm.initial_state(frame_BCHW),
            prior=None if self.prior is None else self.prior.lstm.initial_state(frame_BCHW),
            input_pairs_left=num_input_frames - 1,
            true_frame_BCHW=None,
        )

    def forward(
        self,
        frame_BCHW: Tensor,
        state: LatentState,
        *,
        target_BCHW: Tensor | None,
        noise_BZ: Tensor | None,
    ) -> tuple[LatentState, Tensor | None]:
        """One time step; arguments as of `Predictor.step`.

        Returns:
            The new state, whose `smoothed.hidden_BF` is the latent that the generator reads, and
            the divergence of the posterior from the prior [B], where there is a posterior.
        """
        true_BCHW = frame_BCHW if state.true_frame_BCHW is None else state.true_frame_BCHW
        pair = None if target_BCHW is None else (true_BCHW, target_BCHW)
        prior, prior_state = self._prior(pair, state)
        drawn_from, divergence_B = prior, None
        if pair is not None:
            drawn_from = self.posterior(*pair)
            divergence_B = drawn_from.divergence_from(prior)
        return LatentState(
            smoothed=self.lstm(drawn_from.draw(noise_BZ), state.smoothed),
            prior=prior_state,
            input_pairs_left=max(state.input_pairs_left - 1, 0),
            true_frame_BCHW=target_BCHW,
        ), divergence_B

    def _prior(
        self, pair: tuple[Tensor, Tensor] | None, state: LatentState
    ) -> tuple[Gaussian, LSTMState | None]:
        """A learned prior sees pairs of input frames only, also where targets are known."""
        if self.prior is None or state.prior is None:
            return Gaussian.standard(state.smoothed.hidden_BF), None
        prior: tuple[Gaussian, LSTMState] = self.prior(
            pair if state.input_pairs_left else None, state.prior
        )
        return prior
