"""The C code's functions, called on tensors, without gradients.

Maps that go in are `dense` and float32; maps that come out lie like them.

Legend: B batch, G groups, M teachers, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files
from math import prod
from typing import Any

import torch
from torch import Tensor

from tmu_dist.models.native import VECTORS, load, pointer

EPSILON = 1e-5
"""Of normalisations."""


def dense(maps: Tensor) -> Tensor:
    """The maps with all channels of a pixel side by side: [..., P, H, W] of [B, H, W, ..., P]."""
    if maps.stride() == _dense_strides(maps.shape):  # nearly always
        return maps
    channels_last = (0, maps.dim() - 2, maps.dim() - 1, *range(1, maps.dim() - 2))
    back = (0, *range(3, maps.dim()), 1, 2)
    return maps.permute(channels_last).contiguous().permute(back)


@lru_cache
def _dense_strides(shape: torch.Size) -> tuple[int, ...]:
    *channels, height, width = shape[1:]
    of_channels = [prod(channels[k + 1 :]) for k in range(len(channels))]
    pixel = prod(channels)
    return (height * width * pixel, *of_channels, width * pixel, pixel)


def fuse(
    own_BPHW: Tensor, imitations_BMPHW: Tensor, gates_BMPHW: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Eq. 5, line 2: the memory after transfer, and the open transfer gates."""
    fused, opened = torch.empty_like(own_BPHW), torch.empty_like(gates_BMPHW)
    given = (own_BPHW, imitations_BMPHW, gates_BMPHW, scale)
    call("fuse", *given, fused, opened, sizes=sizes_of(imitations_BMPHW))
    return fused, opened


def fuse_back(
    own_BPHW: Tensor,
    imitations_BMPHW: Tensor,
    opened_BMPHW: Tensor,
    scale: float,
    d_fused_BPHW: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of own memory, imitations and the gates' pre-activations."""
    given = (own_BPHW, imitations_BMPHW, opened_BMPHW)
    d_own, d_imitations, d_gates = map(torch.empty_like, given)
    made = (d_own, d_imitations, d_gates)
    call("fuse_back", *given, scale, d_fused_BPHW, *made, sizes=sizes_of(imitations_BMPHW))
    return made


def normalise(
    x_BCHW: Tensor, gain_CHW: Tensor, shift_CHW: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The normalised maps, and each group's mean and scale [B, G, 2]."""
    y, statistics = torch.empty_like(x_BCHW), torch.empty(len(x_BCHW), groups, 2)
    sizes = _group_sizes(x_BCHW, groups)
    call("normalise", x_BCHW, gain_CHW, shift_CHW, y, statistics, EPSILON, sizes=sizes)
    return y, statistics


def normalise_back(
    x_BCHW: Tensor, gain_CHW: Tensor, statistics_BG2: Tensor, d_y_BCHW: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of maps, gain and shift."""
    d_x = torch.empty_like(x_BCHW)
    d_gain, d_shift = torch.empty_like(gain_CHW), torch.empty_like(gain_CHW)
    given = (x_BCHW, gain_CHW, statistics_BG2, d_y_BCHW)
    sizes = _group_sizes(x_BCHW, statistics_BG2.shape[1])
    call("normalise_back", *given, d_x, d_gain, d_shift, sizes=sizes)
    return d_x, d_gain, d_shift


def sizes_of(maps: Tensor) -> tuple[int, ...]:
    """Pixels of all maps [B, (M,) P, H, W], and their channels."""
    batch, *channels, height, width = maps.shape
    return batch * height * width, *channels


def _group_sizes(maps_BCHW: Tensor, groups: int) -> tuple[int, ...]:
    batch, channels, height, width = maps_BCHW.shape
    return batch, height * width, groups, channels // groups


def call(name: str, *arguments: Any, sizes: Sequence[int]) -> None:
    """Call a C function."""
    converted: list[Any] = []
    for each in arguments:
        if isinstance(each, Tensor):
            converted.append(pointer(each))
        else:
            converted.append(None if each is None else ctypes.c_float(each))
    getattr(library(), name)(*converted, *map(ctypes.c_long, sizes), torch.get_num_threads())


@cache
def library() -> ctypes.CDLL:
    """The compiled code.

    Raises:
        NativeCodeError: it cannot be had here.
    """
    source = files(__package__).joinpath("fused.c").read_text()
    return load("fused", "\n".join([VECTORS, source]))
