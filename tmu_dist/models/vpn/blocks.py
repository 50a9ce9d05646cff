"""Residual multiplicative blocks, and convolutions that look at earlier pixels only.

Legend: B batch, C input channels, D output channels, H, W height and width, N neighbours x C.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvolutionMaker(Protocol):
    """Makes a "same" convolution; its outputs are `parts` equal lists of channels in a row."""

    def __call__(
        self, in_channels: int, out_channels: int, size: int, *, parts: int = 1
    ) -> nn.Module: ...


def convolution(
    in_channels: int, out_channels: int, size: int, *, parts: int = 1, dilation: int = 1
) -> nn.Module:
    """An ordinary convolution that begins with normal weights of variance 1 / (inputs it sees).

    The source gives no initial weights. Two multiplicative units in a row nearly extinguish signals
    that the framework's default, a third of this variance, has shrunk already. On wandering squares
    of 9x9 pixels a network of three blocks with it had not begun to use the frames before after 600
    iterations (14 nats a frame); with this it had after 400 (3 nats).
    """
    padding = dilation * (size // 2)
    layer = nn.Conv2d(in_channels, out_channels, size, padding=padding, dilation=dilation)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def multiply(h: Tensor, gates: Tensor, *, dim: int) -> Tensor:
    """The multiplicative unit, MU(h) = g1 . tanh(g2 . h + g3 . u).

    Kalchbrenner et al. 2017.

    Args:
        h: what enters the unit.
        gates: pre-activations of g1, g2, g3 and u, one after the other along `dim`.
        dim: the axis of channels.
    """
    g1, g2, g3, u = gates.chunk(4, dim)
    mixed = torch.sigmoid(g2) * h + torch.sigmoid(g3) * torch.tanh(u)
    return torch.sigmoid(g1) * torch.tanh(mixed)


class MultiplicativeUnit(nn.Module):
    """MU with its four 3x3 convolutions as one."""

    def __init__(self, channels: int, convolution: ConvolutionMaker) -> None:
        super().__init__()
        self.gates = convolution(channels, 4 * channels, 3, parts=4)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """Maps of the same shape."""
        return multiply(h_BCHW, self.gates(h_BCHW), dim=1)


class ResidualMultiplicativeBlock(nn.Module):
    """RMB(h) = h + conv1x1(MU(MU(conv1x1(h)))) on 2c channels, with c inside.

    Args:
        channels: channels inside the block (c).
        convolution: makes all its convolutions.
    """

    def __init__(self, channels: int, convolution: ConvolutionMaker) -> None:
        super().__init__()
        self.reduce = convolution(2 * channels, channels, 1)
        self.units = nn.Sequential(*(MultiplicativeUnit(channels, convolution) for _ in range(2)))
        self.expand = convolution(channels, 2 * channels, 1)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """Maps of the same shape."""
        residual: Tensor = self.expand(self.units(self.reduce(h_BCHW)))
        return h_BCHW + residual


class CausalConv2d(nn.Module):
    """A convolution that sees the row above and, in its own row, nothing to the right.

    A masked 3x3 filter has no use for its lower row, so the weights are 2x3; the one tap to the
    right stays masked. The pixel itself is seen through colours: with C colours every list of n
    channels is cut into C groups, channel i belongs to colour i * C // n, and features of colour k
    read features of colours <= k (mask B) or, in the first layer, pixels of colours < k (mask A).

    Args:
        in_channels, out_channels: each list of channels needs at least one for every colour.
        size: 3 or 1, the size of the filter.
        num_colours: channels of the frames.
        parts: lists of channels among the outputs, each cut into colours by itself.
        sees_own_colour: mask B (True) or A.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        num_colours: int,
        parts: int = 1,
        sees_own_colour: bool = True,
    ) -> None:
        super().__init__()
        self.size = size
        in_colour = _colours(in_channels, num_colours)
        out_colour = _colours(out_channels // parts, num_colours).repeat(parts)[:, None]
        mask = torch.ones(out_channels, in_channels, (size + 1) // 2, size)
        mask[:, :, -1, size // 2] = (
            in_colour <= out_colour if sees_own_colour else in_colour < out_colour
        ).to(mask)
        mask[:, :, -1, size // 2 + 1 :] = 0
        self.register_buffer("mask", mask, persistent=False)
        num_seen = mask.sum((1, 2, 3), keepdim=True).clamp(min=1)
        self.weight = nn.Parameter(torch.randn(mask.shape) / num_seen.sqrt())  # as `convolution`
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps of the same height and width."""
        side, above = self.size // 2, (self.size - 1) // 2
        padded = F.pad(x_BCHW, (side, side, above, 0))
        return F.conv2d(padded, self.weight * self.mask, self.bias)

    def matrix_DN(self) -> Tensor:
        """The weights of the pixels that are seen, in raster order, all channels of each."""
        seen = self.weight.shape[2:].numel() - self.size // 2
        return (self.weight * self.mask).flatten(2)[:, :, :seen].transpose(1, 2).flatten(1)


def _colours(num_channels: int, num_colours: int) -> Tensor:
    return torch.arange(num_channels) * num_colours // num_channels
