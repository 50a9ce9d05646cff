"""The contract of a recurrent cell, cut where the Transferable Memory Unit cuts it.

A step is split in two: `propose` computes the candidate memory (C-tilde, Eq. 2) and `emit` turns
the final memory into the hidden state (output gate, Eq. 5). A plain network emits the candidate
itself; a TMU layer puts distillers and transfer gates between the two.

Legend: B batch, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

FrameLoss = Literal["l2", "l1l2", "l1", "likelihood"]
"""What a backbone's own paper minimises: mean squared error, mean squared plus mean absolute
error, mean absolute error, or the negative log-likelihood that the network itself computes."""


class Carry(NamedTuple):
    """What travels up the stack within one time step."""

    zigzag_BPHW: Tensor | None = None
    """ST-LSTM's spatiotemporal memory M. The top layer's enters the lowest layer at the next time
    step; None before the first."""
    difference_BPHW: Tensor | None = None
    """MIM: the output D of the MIM-N below; it ends at the top layer."""
    projected_BQHW: Tensor | None = None
    """Into the lowest layer: what its cell's `project` gives of the input, if that was known."""


class CellState(NamedTuple):
    """What a layer remembers from one time step to the next."""

    hidden_BPHW: Tensor
    memory_BPHW: Tensor
    """The memory C as it was fused (Eq. 5), whatever the cell's output gate has read."""
    extra: Any = ()
    """Further memories of cells that have them: a tuple of tensors, of the cell's own making."""


class Proposal(NamedTuple):
    """A cell's step, halted before the output gate."""

    memory_BPHW: Tensor
    """The candidate memory C-tilde."""
    output_BPHW: Tensor
    """Pre-activation of the output gate, without the memory's own contribution."""
    forget_BPHW: Tensor | None
    """The gate in [0, 1] that keeps the old memory, for diagnostics; None where there is none."""
    zigzag_BPHW: Tensor | None = None
    """The candidate of ST-LSTM's spatiotemporal memory M; None for cells without (`has_zigzag`)."""
    extra: Any = ()
    """Whatever else `emit` needs, of the cell's own making."""


class RecurrentCell(nn.Module, ABC):
    """One layer's recurrent cell.

    Settings are the keyword arguments of the constructor: `map_size`, the (height, width) of the
    maps, and any field of `config.ModelConfig` by its name (`models.build`). A field whose value
    is None keeps the constructor's own default.
    """

    frame_loss: ClassVar[FrameLoss] = "l2"
    output_bias: ClassVar[bool] = False
    """Whether the convolution from the top hidden state to the frame has a bias."""
    has_zigzag: ClassVar[bool] = False
    """Whether the cell has ST-LSTM's memory M, which `propose` then gives a candidate of."""

    def __init__(self, in_channels: int, hidden_channels: int, *, window: int = 1) -> None:
        """Remember the sizes.

        Args:
            in_channels: channels of the layer's input.
            hidden_channels: channels of hidden state and memory (P).
            window: time slices of the cell's maps. With L > 1 slices every map at the border of
                this contract has L * H rows, the oldest slice on top.
        """
        super().__init__()
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.window = window

    @classmethod
    def of_layer(cls, layer: int) -> type[RecurrentCell]:
        """The cell of a layer (from 0, bottom to top), for networks that mix cells."""
        return cls

    def initial_state(self, x_BCHW: Tensor) -> CellState:
        """All-zero state for inputs like `x`; memories are float32 even under autocast."""
        batch, _, height, width = x_BCHW.shape
        zeros = x_BCHW.new_zeros(batch, height, width, self.hidden_channels).permute(0, 3, 1, 2)
        return CellState(zeros, zeros)

    def project(self, x_BCHW: Tensor) -> Tensor | None:
        """The input-to-state terms, so that those of known inputs are computed all at once.

        `propose` finds them in `Carry.projected_BQHW`. None in cells without, such as those in
        which one convolution reads input and state together.
        """
        return None

    @abstractmethod
    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """Compute the candidate memory from the input and the previous state."""

    @abstractmethod
    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """Turn the final memory into the new state and the carry for the layer above.

        Args:
            proposal: as `propose` made it, but for M, which is the final one.
            memory_BPHW: the final memory C.
        """
