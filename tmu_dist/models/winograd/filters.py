"""The convolution and its gradients: filters, transformed once and used at every time step.

Legend: P points of a tile (both axes in one), R rows (tiles of all maps of a batch), B batch,
C input channels, K output channels, I, J taps of a filter, H, W map height and width.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor

from tmu_dist.models.winograd.kernels import Kernels, kernels
from tmu_dist.models.winograd.matrices import TILE

_ROWS_AT_ONCE = 256
"""Rows that the filters' gradient is computed from at a time: of several time steps, so that the
sum, which is large, is seldom read and written."""


class Filters:
    """Filters and bias of a convolution, transformed; for as long as their numbers stay the same.

    Results are differentiable in the maps, the filters and the bias. Gradients of the filters are
    summed over all uses as transforms, and brought back once a backward pass.

    Args:
        weight_KCIJ: float32 on the CPU, 3 x 3 or 5 x 5.
        bias_K: of the outputs.
    """

    def __init__(self, weight_KCIJ: Tensor, bias_K: Tensor | None) -> None:
        out_channels, in_channels, taps, _ = weight_KCIJ.shape
        self.channels = in_channels, out_channels
        self.kernels: Kernels = kernels(taps)
        self.widths = self.kernels.padded(in_channels), self.kernels.padded(out_channels)
        self.bias_K = None if bias_K is None else bias_K.detach().contiguous()
        self.packed = self.kernels.transform_filters(weight_KCIJ)
        self._packed_back: Tensor | None = None
        self.weight_KCIJ, self._learned_bias_K = weight_KCIJ, bias_K
        self._token: Tensor | None = None
        self.gradient: FilterGradient | None = None

    def __call__(self, *maps_BCHW: Tensor) -> Tensor:
        """Convolve one or two maps, as if their channels lay one after the other."""
        learns = torch.is_grad_enabled() and any(
            values is not None and values.requires_grad
            for values in (self.weight_KCIJ, self._learned_bias_K)
        )
        if learns and self._token is None:
            self._token = cast(Tensor, _Token.apply(self.weight_KCIJ, self._learned_bias_K, self))
        return cast(Tensor, _Convolve.apply(self._token if learns else None, self, *maps_BCHW))

    @property
    def packed_back(self) -> Tensor:
        """Transposed, for the gradient of the maps; made when it is first asked for."""
        if self._packed_back is None:
            self._packed_back = self.kernels.transform_filters(self.weight_KCIJ, back=True)
        return self._packed_back

    def rows(self, map_BCHW: Tensor) -> int:
        """Tiles of a map."""
        batch, _, height, width = map_BCHW.shape
        return batch * -(-height // TILE) * -(-width // TILE)

    def scratch(self, rows: int, width: int) -> Tensor:
        """Room for transformed maps."""
        return torch.empty(self.kernels.num_points, rows, width)


class FilterGradient:
    """The sum of the gradient of transformed filters over the uses of one backward pass.

    Args:
        filters: whose.
        rows: of the first use; all uses of a recurrence have the same.
        task: number of the backward pass.
    """

    def __init__(self, filters: Filters, rows: int, task: int) -> None:
        self.task = task
        in_width, out_width = filters.widths
        self._correlate = filters.kernels.correlate
        self._has_sum = False
        self._sum_PCK = torch.empty(filters.kernels.shape_PCK(filters.weight_KCIJ))
        self._bias_sum_K = torch.zeros(filters.channels[1])
        self._room = max(rows, _ROWS_AT_ONCE)
        self._inputs_PRC = filters.scratch(self._room, in_width)
        self._gradients_PRK = filters.scratch(self._room, out_width)
        self._used = 0

    def add_bias(self, gradient_BKHW: Tensor) -> None:
        """Add the gradient of an output to that of the bias."""
        self._bias_sum_K += gradient_BKHW.sum((0, 2, 3))

    def place(self, rows: int) -> tuple[Tensor, Tensor]:
        """Where to write the transformed inputs and the transformed gradient of a use."""
        if self._used + rows > self._room:
            self._reduce()
        if rows > self._room:
            raise ValueError(f"A map of {rows} tiles comes after one with room for {self._room}.")
        place = slice(self._used, self._used + rows)
        self._used += rows
        return self._inputs_PRC[:, place], self._gradients_PRK[:, place]

    def total(self) -> tuple[Tensor, Tensor]:
        """Of the filters [P, C, K], padded, and of the bias [K]."""
        self._reduce()
        return self._sum_PCK, self._bias_sum_K

    def _reduce(self) -> None:
        if not self._used:
            return
        used = slice(self._used)
        inputs, gradients = self._inputs_PRC[:, used], self._gradients_PRK[:, used]
        self._correlate(inputs, gradients, self._sum_PCK, add=self._has_sum)
        self._has_sum, self._used = True, 0


class _Token(torch.autograd.Function):
    """Stands for the filters in the graph: its gradient is asked for when all uses are done."""

    @staticmethod
    def forward(ctx: Any, weight_KCIJ: Tensor, bias_K: Tensor | None, filters: Filters) -> Tensor:
        # The filters hold the token: held here as well, both would outlive their use.
        ctx.filters = weakref.ref(filters)
        return weight_KCIJ.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        filters: Filters = ctx.filters()  # alive, as every use of it in the graph holds it
        gradient, filters.gradient = filters.gradient, None
        if gradient is None or gradient.task != _task():
            return None, None, None
        sum_PCK, bias_sum_K = gradient.total()
        weight_KCIJ = None
        if ctx.needs_input_grad[0]:
            weight_KCIJ = filters.kernels.filters_gradient(sum_PCK, filters.weight_KCIJ)
        return weight_KCIJ, bias_sum_K if ctx.needs_input_grad[1] else None, None


class _Convolve(torch.autograd.Function):
    """One use of the filters."""

    @staticmethod
    def forward(ctx: Any, token: Tensor | None, filters: Filters, *maps_BCHW: Tensor) -> Tensor:
        maps = [_channels_last(each) for each in maps_BCHW]
        ctx.filters = filters
        ctx.save_for_backward(*maps)
        inputs_PRC = filters.scratch(filters.rows(maps[0]), filters.widths[0])
        filters.kernels.transform_inputs(maps, inputs_PRC)
        batch, _, height, width = maps[0].shape
        output = torch.empty(
            (batch, filters.channels[1], height, width), memory_format=torch.channels_last
        )
        filters.kernels.convolve(inputs_PRC, filters.packed, filters.bias_K, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        filters: Filters = ctx.filters
        maps: tuple[Tensor, ...] = ctx.saved_tensors
        gradient = _channels_last(gradients[0])
        rows = filters.rows(gradient)
        learns = ctx.needs_input_grad[0]
        if learns:
            if filters.gradient is None or filters.gradient.task != _task():
                filters.gradient = FilterGradient(filters, rows, _task())
            inputs_PRC, gradients_PRK = filters.gradient.place(rows)
            filters.kernels.transform_inputs(maps, inputs_PRC)
            if filters.bias_K is not None:
                filters.gradient.add_bias(gradient)
        else:
            gradients_PRK = filters.scratch(rows, filters.widths[1])
        filters.kernels.transform_gradient(gradient, gradients_PRK)
        of_maps: list[Tensor | None] = [None] * len(maps)
        if any(ctx.needs_input_grad[2:]):
            zeros = [torch.zeros_like(each) for each in maps]
            filters.kernels.convolve_back(gradients_PRK, filters.packed_back, zeros)
            of_maps = list(zeros)
        return gradient.new_zeros(()) if learns else None, None, *of_maps


def _channels_last(map_BCHW: Tensor) -> Tensor:
    return map_BCHW.float().contiguous(memory_format=torch.channels_last)


def _task() -> int:
    """Number of the backward pass that is running."""
    return torch._C._current_graph_task_id()
