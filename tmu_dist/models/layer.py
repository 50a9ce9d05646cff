"""One layer of a network around its cell, and the three places where teachers reach it.

A `Guide` acts before the cell's step (what it remembers) and after it (what the layer above reads);
a TMU, which is part of the network, acts in between, on the memory.

Legend: B batch, M teachers, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState, RecurrentCell
from tmu_dist.models.tmu import MemoryTransfer


class Guide:
    """What acts on a network's layers from outside during one time step; this one does nothing.

    Transfer methods whose student reads its teachers' states while it runs are guides. `layer` is
    the layer's number, from the input to the output, as in `Predictor.memory_shapes`.
    """

    def enter(self, layer: int, x_BCHW: Tensor, state: CellState) -> CellState:
        """The state that the layer's cell starts its step from."""
        return state

    def leave(self, layer: int, hidden_BPHW: Tensor) -> Tensor:
        """What the layer above reads; the layer itself remembers its own hidden state."""
        return hidden_BPHW


class LayerStep(NamedTuple):
    """One layer's time step, with what losses and diagnostics may read."""

    output_BPHW: Tensor
    """What the layer above reads: the hidden state, unless a guide has changed it."""
    state: CellState
    carry: Carry
    forget_BPHW: Tensor | None
    imitations_BMPHW: Tensor | None = None
    gates_BMPHW: Tensor | None = None


class RecurrentLayer(nn.Module):
    """A cell, with or without memory transfer; without, it is the plain network (M = 0).

    Args:
        cell: its recurrent cell.
        transfer: distillers and transfer gates of a TMU layer.
        hidden_from: whether the cell's output reads the memory after transfer or before.
        number: of the layer in its network, from the input to the output.
    """

    def __init__(
        self,
        cell: RecurrentCell,
        transfer: MemoryTransfer | None = None,
        *,
        hidden_from: Literal["fused", "own"] = "fused",
        number: int = 0,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.transfer = transfer
        self.hidden_from = hidden_from
        self.number = number

    def forward(
        self, x_BCHW: Tensor, state: CellState, carry: Carry, guide: Guide | None = None
    ) -> LayerStep:
        """One time step; the transfer gates read the input and the previous hidden state."""
        if guide is not None:
            state = guide.enter(self.number, x_BCHW, state)
        step = self._step(x_BCHW, state, carry)
        if guide is None:
            return step
        return step._replace(output_BPHW=guide.leave(self.number, step.state.hidden_BPHW))

    def _step(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> LayerStep:
        proposal = self.cell.propose(x_BCHW, state, carry)
        own = proposal.memory_BPHW
        if self.transfer is None:
            new_state, new_carry = self.cell.emit(proposal, own)
            return LayerStep(new_state.hidden_BPHW, new_state, new_carry, proposal.forget_BPHW)

        imitations = self.transfer.imitate(own)
        gates = self.transfer.transfer_gates(x_BCHW, state.hidden_BPHW)
        fused = self.transfer.fuse(own, imitations, gates)
        new_state, new_carry = self.cell.emit(
            proposal, fused if self.hidden_from == "fused" else own
        )
        new_state = new_state._replace(memory_BPHW=fused)
        return LayerStep(
            new_state.hidden_BPHW, new_state, new_carry, proposal.forget_BPHW, imitations, gates
        )
