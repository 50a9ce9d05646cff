"""Layers of cells: the only place that knows how side memories zig-zag through a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.tmu import LayerStep, RecurrentLayer


class StackState(NamedTuple):
    """Every layer's state, and the top layer's carry, which enters the lowest layer next."""

    layers: tuple[CellState, ...]
    carry: Carry


class RecurrentStack(nn.Module):
    """K recurrent layers; layer k reads the hidden state of layer k - 1 at the same time step."""

    def __init__(self, layers: Sequence[RecurrentLayer]) -> None:
        super().__init__()
        self.layers: Sequence[RecurrentLayer] = nn.ModuleList(layers)  # type: ignore[assignment]

    def initial_state(self, x_BCHW: Tensor) -> StackState:
        """All-zero states for inputs like `x`, the lowest layer's input."""
        return StackState(tuple(layer.cell.initial_state(x_BCHW) for layer in self.layers), ())

    def forward(self, x_BCHW: Tensor, state: StackState) -> tuple[StackState, list[LayerStep]]:
        """One time step of all layers; the last entry of the list is the top layer."""
        carry = state.carry
        steps: list[LayerStep] = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            step = layer(x_BCHW, layer_state, carry)
            x_BCHW, carry = step.state.hidden_BPHW, step.carry
            steps.append(step)
        return StackState(tuple(step.state for step in steps), carry), steps
