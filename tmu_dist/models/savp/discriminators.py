"""SAVP's discriminators of single frames and of clips, with spectral normalisation.

Lee et al. 2018; spectral normalisation: Miyato et al. 2018 (arXiv:1802.05957), algorithm 1.

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from tmu_dist.models.savp.blocks import Module, initialised
from tmu_dist.models.shapes import FrameShape

_LAYERS = (
    (3, 1, 1, 1),
    (4, 2, 1, 2),
    (3, 2, 1, 1),
    (4, 4, 1, 2),
    (3, 4, 1, 1),
    (4, 8, 2, 2),
    (3, 8, 1, 1),
)
"""Filter size, channels as a multiple of the base channels, stride in time, stride in space."""

_SHORTEST_CLIP = 4
"""Frames below which the three filters of 4 in time would find nothing."""


class SpectralNorm(nn.Module):
    """A weight divided by an estimate of its largest singular value.

    Each forward pass in training improves the estimate by one power iteration; in evaluation it
    stays. Gradients do not pass through the singular vectors. Several passes may come before one
    backward pass.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.output_direction: Tensor
        self.register_buffer("output_direction", F.normalize(torch.randn(weight.shape[0]), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight; the first axis is the output's, the others are the input's."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            with torch.no_grad():
                # The backward pass keeps this vector, while later passes change the buffer.
                u = self.output_direction.clone()
                v = F.normalize(matrix.T @ u, dim=0)
                if self.training:
                    u = F.normalize(matrix @ v, dim=0)
                    self.output_direction.copy_(u)
            return weight / (u @ (matrix @ v))


def _spectral(module: Module) -> Module:
    register_parametrization(module, "weight", SpectralNorm(module.weight))
    return module


class _Discriminator(nn.Module):
    """Seven convolutions with leaky ReLU 0.1, then a dense layer; zero padding of 1 everywhere.

    Args:
        in_channels: of the images.
        size: of the images: height and width, or time, height and width.
        base_channels: of the first convolution.
    """

    def __init__(self, in_channels: int, size: tuple[int, ...], base_channels: int) -> None:
        super().__init__()
        self.shape = (in_channels, *size)
        conv: Callable[..., nn.Conv2d | nn.Conv3d] = nn.Conv2d if len(size) == 2 else nn.Conv3d
        self.convs = nn.ModuleList()
        for kernel_size, multiple, stride_in_time, stride_in_space in _LAYERS:
            stride = (stride_in_time, stride_in_space, stride_in_space)[-len(size) :]
            channels = multiple * base_channels
            self.convs.append(
                _spectral(initialised(conv(in_channels, channels, kernel_size, stride, padding=1)))
            )
            in_channels = channels
            size = tuple(
                (length + 2 - kernel_size) // step + 1 for length, step in zip(size, stride)
            )
        if min(size) < 1:
            raise ValueError(
                f"A discriminator halves its images three times, so they need at least 8 pixels "
                f"on each side; got {self.shape[-2]}x{self.shape[-1]}. Set the weights of "
                "training.adversarial to 0, or enlarge the frames in data_prep."
            )
        self.score = _spectral(initialised(nn.Linear(in_channels * math.prod(size), 1)))

    def judge(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores [B] and the features of every convolution."""
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"This discriminator was built for images of shape {self.shape} (channels, "
                f"[time,] height, width), got {tuple(images.shape[1:])}."
            )
        features: list[Tensor] = []
        for conv in self.convs:
            images = F.leaky_relu(conv(images), 0.1)
            features.append(images)
        return self.score(images.flatten(1)).squeeze(1), features


class ImageDiscriminator(_Discriminator):
    """Tells true frames from predicted ones.

    Raises:
        ValueError: frames below 8 pixels.
    """

    def __init__(self, frame: FrameShape, *, base_channels: int) -> None:
        super().__init__(frame.channels, (frame.height, frame.width), base_channels)

    def forward(self, frames_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores [B] and the features of the seven convolutions, [B, C, H, W] each."""
        return self.judge(frames_BCHW)


class VideoDiscriminator(_Discriminator):
    """Tells true clips from predicted ones.

    Args:
        frame: shape of the frames.
        clip_length: frames of a clip; after fewer than four follow frames of zeros.
        base_channels: of the first convolution.

    Raises:
        ValueError: frames below 8 pixels.
    """

    def __init__(self, frame: FrameShape, *, clip_length: int, base_channels: int) -> None:
        length = max(clip_length, _SHORTEST_CLIP)
        super().__init__(frame.channels, (length, frame.height, frame.width), base_channels)
        self.num_zero_frames = length - clip_length

    def forward(self, clips_BTCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores [B] and the features of the seven convolutions, [B, C, T, H, W] each."""
        clips_BCTHW = clips_BTCHW.transpose(1, 2)
        return self.judge(F.pad(clips_BCTHW, (0, 0, 0, 0, 0, self.num_zero_frames)))
