"""The contract of a recurrent cell, cut where the Transferable Memory Unit cuts it.

A step is split in two: `propose` computes the candidate memory (C-tilde, Eq. 2) and `emit` turns
the final memory into the hidden state (output gate, Eq. 5). A plain network emits the candidate
itself; a TMU layer puts distillers and transfer gates between the two.

Legend: B batch, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

Carry = tuple[Tensor, ...]
"""What travels up the stack within one time step: nothing for ConvLSTM, the zig-zag memory for
ST-LSTM. The top layer's carry enters the lowest layer at the next time step."""


class CellState(NamedTuple):
    """What a layer remembers from one time step to the next."""

    hidden_BPHW: Tensor
    memory_BPHW: Tensor
    extra: tuple[Tensor, ...] = ()
    """Further memories of cells that have them."""


class Proposal(NamedTuple):
    """A cell's step, halted before the output gate."""

    memory_BPHW: Tensor
    """The candidate memory C-tilde."""
    output_BPHW: Tensor
    """Pre-activation of the output gate, without the memory's own contribution."""
    forget_BPHW: Tensor
    """The forget gate in [0, 1], for diagnostics."""
    extra: tuple[Tensor, ...] = ()


class RecurrentCell(nn.Module, ABC):
    """One layer's recurrent cell."""

    def __init__(self, in_channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels

    def initial_state(self, x_BCHW: Tensor) -> CellState:
        """All-zero state for inputs like `x`; memories are float32 even under autocast."""
        batch, _, height, width = x_BCHW.shape
        zeros = x_BCHW.new_zeros(batch, self.hidden_channels, height, width)
        return CellState(zeros, zeros)

    @abstractmethod
    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """Compute the candidate memory from the input and the previous state."""

    @abstractmethod
    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """Turn the final memory into the new state and the carry for the layer above."""
