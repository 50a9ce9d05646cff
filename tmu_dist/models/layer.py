"""One layer of a network around its cell, and the three places where teachers reach it.

A `Guide` acts before the cell's step (what it remembers) and after it (what the layer above reads);
a TMU, which is part of the network, acts in between, on the memory.

Legend: B batch, M teachers, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    zigzag_BPHW: Tensor | None = None
    """The memory M that the hidden state has read; None where the cell has none."""
    zigzag_imitations_BMPHW: Tensor | None = None


class RecurrentLayer(nn.Module):
    """A cell, with or without memory transfer; without, it is the plain network (M = 0).

    Args:
        cell: its recurrent cell.
        transfer: distillers and transfer gates of a TMU layer.
        transfer_zigzag: those of ST-LSTM's memory M, in a TMU layer that transfers it, too.
        hidden_from: whether the cell's output reads the memory C after transfer or before. Of M
            there is one value a step, the one after transfer: the output reads it, and it travels.
        number: of the layer in its network, from the input to the output.
    """

    def __init__(
        self,
        cell: RecurrentCell,
        transfer: MemoryTransfer | None = None,
        *,
        transfer_zigzag: MemoryTransfer | None = None,
        hidden_from: Literal["fused", "own"] = "fused",
        number: int = 0,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.transfer = transfer
        self.transfer_zigzag = transfer_zigzag
        self.hidden_from = hidden_from
        self.number = number
        self.recomputes = False
        """Whether a backward pass computes again what happens inside a step (compute.recompute)."""
        self._step_as_chosen: Callable[[Tensor, CellState, Carry], LayerStep] = self._step

    @property
    def is_compiled(self) -> bool:
        """Whether steps run as torch.compile fuses them."""
        return self._step_as_chosen != self._step

    def compile_step(self) -> None:
        """Run steps as torch.compile fuses them; the first of each shape takes a while."""
        self._step_as_chosen = torch.compile(self._step)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and other processes have plain steps, until they compile them themselves."""
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_step_as_chosen"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_as_chosen = self._step

    def forward(
        self, x_BCHW: Tensor, state: CellState, carry: Carry, guide: Guide | None = None
    ) -> LayerStep:
        """One time step; the transfer gates read the input and the previous hidden state."""
        if guide is not None:
            state = guide.enter(self.number, x_BCHW, state)
        if self.recomputes and torch.is_grad_enabled():
            # Nothing in a step is drawn at random.
            step: LayerStep = checkpoint(
                self._step_as_chosen,
                x_BCHW,
                state,
                carry,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            step = self._step_as_chosen(x_BCHW, state, carry)
        if guide is None:
            return step
        return step._replace(output_BPHW=guide.leave(self.number, step.state.hidden_BPHW))

    def _step(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> LayerStep:
        proposal = self.cell.propose(x_BCHW, state, carry)
        own, zigzag, zigzag_imitations = proposal.memory_BPHW, proposal.zigzag_BPHW, None
        fused, imitations, gates = _transferred(self.transfer, own, x_BCHW, state.hidden_BPHW)
        if zigzag is not None:
            zigzag, zigzag_imitations, _ = _transferred(
                self.transfer_zigzag, zigzag, x_BCHW, state.hidden_BPHW
            )
        new_state, new_carry = self.cell.emit(
            proposal._replace(zigzag_BPHW=zigzag), fused if self.hidden_from == "fused" else own
        )
        return LayerStep(
            new_state.hidden_BPHW,
            new_state._replace(memory_BPHW=fused),
            new_carry,
            proposal.forget_BPHW,
            imitations,
            gates,
            zigzag,
            zigzag_imitations,
        )


def _transferred(
    transfer: MemoryTransfer | None, own_BPHW: Tensor, x_BCHW: Tensor, hidden_BPHW: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A memory after transfer (Eqs. 3 and 5), the imitations and the gates that let them in."""
    if transfer is None:
        return own_BPHW, None, None
    fused: tuple[Tensor, Tensor, Tensor] = transfer(own_BPHW, x_BCHW, hidden_BPHW)
    return fused
