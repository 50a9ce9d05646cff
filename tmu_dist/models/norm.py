"""Layer normalisation of feature maps, for one network or for a group of teachers at once.

Legend: B batch, G groups, P channels per group, H, W map height and width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.models.fused import EPSILON, can_fuse, normalise
from tmu_dist.models.per_rollout import PerRollout

Affine = Literal["full", "channel", "none"]


class MapLayerNorm(nn.Module):
    """Normalise each sample over channel, height and width jointly (eps 1e-5), then gain and shift.

    With `groups` > 1 the channels are that many independent normalisations side by side: the
    distillers of all teachers become one operation.

    `affine`: "full" learns one gain and shift per element, shape [G*P, H, W] (the form that
    reproduces the paper's parameter counts, tied to one map size); "channel" one per channel,
    shape [G*P] (any map size); "none" has neither.
    """

    def __init__(
        self, channels: int, map_size: tuple[int, int], *, affine: Affine, groups: int = 1
    ) -> None:
        super().__init__()
        self.groups = groups
        self.affine = affine
        self.fuses = True
        """Whether it is one pass over memory where it can be (compute.arithmetic)."""
        self._per_rollout = PerRollout[tuple[Tensor, Tensor]]()
        if affine == "none":
            return
        shape = (channels, *map_size) if affine == "full" else (channels,)
        self.gain = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise maps of shape [B, G*P, H, W].

        Raises:
            ValueError: a "full" normalisation meets another map size than it was built for.
        """
        if self.affine == "none":
            return F.group_norm(x_BCHW, self.groups, eps=EPSILON)
        if self.affine == "channel":
            return F.group_norm(x_BCHW, self.groups, self.gain, self.shift, EPSILON)
        gain, shift = self.lying_like(x_BCHW)
        if self.fuses and can_fuse(x_BCHW, x_BCHW.shape[1] // self.groups):
            return normalise(x_BCHW, gain, shift, self.groups)
        return torch.addcmul(shift, F.group_norm(x_BCHW, self.groups, eps=EPSILON), gain)

    @torch.no_grad()
    def start_from(self, maps_NPHW: Tensor, group: int) -> None:
        """Set gain and shift of a group to standard deviation and mean of maps that it is to make.

        Args:
            maps_NPHW: at least two.
            group: of the channels, from 0.
        """
        axes = (0,) if self.affine == "full" else (0, 2, 3)
        spread, mean = torch.std_mean(maps_NPHW, dim=axes, correction=0)
        channels = slice(group * len(mean), (group + 1) * len(mean))
        self.gain[channels] = spread
        self.shift[channels] = mean

    def lying_like(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and shift of a "full" normalisation, in the order in which maps like these lie.

        Arithmetic across orders takes several times as long; these are turned around once for all
        time steps of a rollout.

        Args:
            x_BCHW: maps of the same size and order; their channels may be others.

        Raises:
            ValueError: the maps have another size than it was built for.
        """
        if x_BCHW.shape[2:] != self.gain.shape[1:]:
            raise ValueError(
                f"This layer normalisation was built for maps of {tuple(self.gain.shape[1:])}, "
                f"got {tuple(x_BCHW.shape[2:])}. Use frames of the trained size, or train with "
                "model.norm_affine=channel, which works at any size."
            )
        gain, shift = self.gain, self.shift
        if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
            return gain, shift
        if torch.compiler.is_compiling():
            return _channels_last(gain), _channels_last(shift)
        return self._per_rollout.get(
            (gain, shift), lambda: (_channels_last(gain), _channels_last(shift))
        )


def _channels_last(weight_CHW: Tensor) -> Tensor:
    return weight_CHW.permute(1, 2, 0).contiguous().permute(2, 0, 1)
