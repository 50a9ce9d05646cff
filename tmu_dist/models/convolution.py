"""The convolution of a cell's gates: one set of filters, used at every time step.

Legend: B batch, C channels, H, W map height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.config import ConfigError
from tmu_dist.models.native import is_there
from tmu_dist.models.per_rollout import PerRollout
from tmu_dist.models.winograd.choice import is_faster
from tmu_dist.models.winograd.filters import Filters
from tmu_dist.models.winograd.kernels import kernels

Algorithm = Literal["auto", "direct", "winograd"]
"""config.ComputeConfig.convolution."""


_IS_COUNTED: ContextVar[bool] = ContextVar("_IS_COUNTED", default=False)


@contextmanager
def counted() -> Iterator[None]:
    """Let all convolutions be the library's, whose operations can be counted."""
    token = _IS_COUNTED.set(True)
    try:
        yield
    finally:
        _IS_COUNTED.reset(token)


class Convolution(nn.Conv2d):
    """A convolution that keeps the map's size, by whichever algorithm is faster.

    Its weights have the names and shapes of `nn.Conv2d`. Filters are transformed once for all time
    steps of a rollout, and if they are frozen for all rollouts.

    Args:
        in_channels: of all maps that it reads together.
        out_channels: of its output.
        kernel_size: taps along each axis, odd.
        bias: whether it has one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )
        self.algorithm: Algorithm = "auto"
        self._per_rollout = PerRollout[Filters]()

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a matrix product of maps as they lie; on CPUs that is always float32."""
        return self.kernel_size == (1, 1)

    def forward(self, *maps_BCHW: Tensor) -> Tensor:
        """Convolve one or two maps, as if their channels lay one after the other."""
        if self.is_pointwise:
            return self._pointwise(maps_BCHW)
        if self.uses_winograd(maps_BCHW[0]):
            return self._filters()(*maps_BCHW)
        return super().forward(_as_one(maps_BCHW))

    def _pointwise(self, maps_BCHW: tuple[Tensor, ...]) -> Tensor:
        """A matrix product for each map, where channels lie innermost; nothing is put together."""
        if not all(each.is_contiguous(memory_format=torch.channels_last) for each in maps_BCHW):
            return super().forward(_as_one(maps_BCHW))
        weights = self.weight.flatten(1).split([each.shape[1] for each in maps_BCHW], dim=1)
        total_BHWC: Tensor | None = None
        # On CPUs half precision costs more in conversions than it saves in so small a product.
        with torch.autocast("cpu", enabled=False):
            for each, weight in zip(maps_BCHW, weights, strict=True):
                bias = self.bias if total_BHWC is None else None
                if each.device.type == "cpu":
                    each = each.to(weight.dtype)
                product_BHWC = F.linear(each.permute(0, 2, 3, 1), weight, bias)
                total_BHWC = product_BHWC if total_BHWC is None else total_BHWC + product_BHWC
        assert total_BHWC is not None
        return total_BHWC.permute(0, 3, 1, 2)

    def uses_winograd(self, map_BCHW: Tensor) -> bool:
        """Whether maps like this one are convolved by Winograd's filtering.

        Raises:
            ConfigError: that was asked for where it cannot be.
        """
        if self.algorithm == "direct" or torch.compiler.is_compiling() or _IS_COUNTED.get():
            return False
        can = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        if self.algorithm == "winograd":
            if not can or self.kernel_size[0] not in (3, 5):
                raise ConfigError(
                    "compute.convolution=winograd works with 3x3 and 5x5 filters in float32 on "
                    f"CPUs; these are {self.kernel_size[0]}x{self.kernel_size[1]} in "
                    f"{self.weight.dtype} on {self.weight.device}. Use auto or direct."
                )
            return True
        height, width = map_BCHW.shape[2:]
        return (
            can
            and is_faster(self.kernel_size[0], height, width, self.in_channels, self.out_channels)
            and _has_kernels(self.kernel_size[0])
        )

    def _filters(self) -> Filters:
        numbers = [self.weight] if self.bias is None else [self.weight, self.bias]
        return self._per_rollout.get(numbers, lambda: Filters(self.weight, self.bias))


def _as_one(maps_BCHW: tuple[Tensor, ...]) -> Tensor:
    return maps_BCHW[0] if len(maps_BCHW) == 1 else torch.cat(maps_BCHW, dim=1)


@cache
def _has_kernels(taps: int) -> bool:
    return is_there(lambda: kernels(taps))
