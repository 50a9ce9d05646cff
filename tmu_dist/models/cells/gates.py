"""The layers that a cell's gates are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from tmu_dist.models.convolution import Convolution
from tmu_dist.models.norm import Affine, MapLayerNorm


@dataclass(frozen=True, kw_only=True)
class GateLayers:
    """Makes the convolutions of a cell's gates, and the normalisations after them, all alike."""

    kernel_size: int
    map_size: tuple[int, int]
    gate_norm: Literal["none", "layer"]
    norm_affine: Affine
    bias: bool

    def conv(self, in_channels: int, out_channels: int) -> Convolution:
        """A convolution that keeps the map's size."""
        return Convolution(in_channels, out_channels, self.kernel_size, bias=self.bias)

    def norm(self, channels: int) -> nn.Module:
        """The layer normalisation of one convolution's pre-activations, if there is one."""
        if self.gate_norm == "none":
            return nn.Identity()
        return MapLayerNorm(channels, self.map_size, affine=self.norm_affine)
