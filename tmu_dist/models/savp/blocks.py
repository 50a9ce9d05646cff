"""SAVP's building blocks: instance norm, and the convolutions that halve and double maps.

Lee et al. 2018 (arXiv:1804.01523).

Legend: B batch, C channels, Z latent, H, W height, width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.shapes import FrameShape

Module = TypeVar("Module", bound=nn.Conv2d | nn.Conv3d | nn.Linear)
Upsampling = Literal["exact", "plain"]


class BlockSize(NamedTuple):
    """One row of the block table."""

    multiple: int
    """Channels, as a multiple of the network's base channels."""
    is_recurrent: bool
    """Whether a ConvLSTM follows the convolution."""


class BlockTable(NamedTuple):
    """The encoder's and the decoder's blocks; there are as many of one as of the other."""

    encoder: tuple[BlockSize, ...]
    decoder: tuple[BlockSize, ...]


def _table(encoder: str, decoder: str) -> BlockTable:
    """Rows written as "4y": four times the base channels, with a ConvLSTM."""

    def blocks(rows: str) -> tuple[BlockSize, ...]:
        return tuple(BlockSize(int(row[0]), row[1] == "y") for row in rows.split())

    return BlockTable(blocks(encoder), blocks(decoder))


_TABLES = {  # by the smaller side of a frame, from this size on
    256: _table("1n 2n 4y 8y 8y", "8y 4y 2n 1n 1n"),
    128: _table("1n 2y 4y 8y", "8y 4y 2n 1n"),
    64: _table("1y 2y 4y", "2y 1y 1n"),
    8: _table("1y 2y", "1y 1n"),
}


def block_table(frame: FrameShape) -> BlockTable:
    """The blocks for frames of this size.

    Raises:
        ValueError: frames that cannot be halved as often as there are blocks.
    """
    smaller = min(frame.height, frame.width)
    if smaller < min(_TABLES):
        raise ValueError(
            f"SAVP needs frames of at least {min(_TABLES)} pixels on each side, got "
            f"{frame.height}x{frame.width}: enlarge them in data_prep."
        )
    table = next(table for size, table in _TABLES.items() if smaller >= size)
    check_halvable(frame.height, frame.width, len(table.encoder))
    return table


def check_halvable(height: int, width: int, times: int) -> None:
    """Refuse frames that cannot be halved so often.

    Raises:
        ValueError: with the sizes that would work.
    """
    if height % 2**times or width % 2**times:
        raise ValueError(
            f"SAVP halves these frames {times} times, so height and width must be multiples of "
            f"{2**times}; got {height}x{width} pixels. Crop or pad the frames in data_prep."
        )


def initialised(module: Module) -> Module:
    """Draw the weights as SAVP does: normal of deviation 0.02, cut at two deviations; biases 0."""
    nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class InstanceNorm(nn.Module):
    """Normalise each sample and channel over its map (eps 1e-6), then gain and shift by channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise maps; one group per channel. A map of a single pixel becomes the shift."""
        return torch.group_norm(x_BCHW, self.gain.shape[0], self.gain, self.shift, eps=1e-6)


class NormalisedConv(nn.Sequential):
    """3x3 convolution, instance norm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            initialised(nn.Conv2d(in_channels, channels, 3, padding=1)),
            InstanceNorm(channels),
            nn.ReLU(),
        )


class HalvingConv(nn.Module):
    """Convolution, 2x2 average pool, instance norm, ReLU: the encoder's step."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = initialised(
            nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
        )
        self.norm = InstanceNorm(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, channels, H/2, W/2]."""
        return F.relu(self.norm(F.avg_pool2d(self.conv(x_BCHW), 2)))


class DoublingConv(nn.Module):
    """2x bilinear upsampling, 3x3 convolution, instance norm, ReLU: the decoder's step.

    Args:
        upsample: what lies beyond the border (`upsampled`).
    """

    def __init__(self, in_channels: int, channels: int, upsample: Upsampling) -> None:
        super().__init__()
        self.upsample = upsample
        self.conv = initialised(nn.Conv2d(in_channels, channels, 3))
        self.norm = InstanceNorm(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, channels, 2H, 2W]."""
        return F.relu(self.norm(self.conv(upsampled(x_BCHW, self.upsample))))


def upsampled(x_BCHW: Tensor, rule: Upsampling) -> Tensor:
    """Bilinear 2x upsampling with a border of one pixel for a 3x3 filter: [B, C, 2H+2, 2W+2].

    Half-pixel interpolation, weights 1/4 and 3/4. "exact": zeros lie beyond the small map, and the
    border is interpolated too. That is the original's transposed convolution with the filter
    (1/4, 3/4, 3/4, 1/4). "plain": the edge is repeated, then zeros lie beyond the large map. They
    differ in the outermost two pixels of what the filter gives.
    """
    if rule == "plain":
        large = F.interpolate(x_BCHW, scale_factor=2, mode="bilinear", align_corners=False)
        return F.pad(large, (1, 1, 1, 1))
    padded = F.pad(x_BCHW, (1, 1, 1, 1))
    return _between_pixels(_between_pixels(padded, dim=2), dim=3)


def _between_pixels(x: Tensor, dim: int) -> Tensor:
    """The two points a quarter of the way from each of n pixels to the next: 2 (n - 1) values."""
    size = x.shape[dim] - 1
    left, right = x.narrow(dim, 0, size), x.narrow(dim, 1, size)
    pair = (0.75 * left + 0.25 * right, 0.25 * left + 0.75 * right)
    return torch.stack(pair, dim + 1).flatten(dim, dim + 1)


class Block(nn.Module):
    """A halving or doubling convolution, and the ConvLSTM that may follow it.

    Args:
        resample: the convolution.
        layer: the ConvLSTM.
        stride: pixels of the frame per pixel of the block's output.
    """

    def __init__(self, resample: nn.Module, layer: RecurrentLayer | None, stride: int) -> None:
        super().__init__()
        self.resample = resample
        self.layer = layer
        self.stride = stride


def with_latent(x_BCHW: Tensor, latent_BZ: Tensor | None) -> Tensor:
    """Append the latent to the channels, the same at every pixel."""
    if latent_BZ is None:
        return x_BCHW
    tiled = latent_BZ[:, :, None, None].expand(-1, -1, *x_BCHW.shape[2:])
    return torch.cat([x_BCHW, tiled], dim=1)
