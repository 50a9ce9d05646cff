"""The ConvLSTM cell (Eq. 2 and the output gate of Eq. 5).

Legend: B batch, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState, Proposal, RecurrentCell
from tmu_dist.models.norm import Affine, MapLayerNorm


class ConvLSTMCell(RecurrentCell):
    """Convolutional LSTM with peephole connections.

    Shi et al. 2015, eq. 3; Yao et al. 2020, Eqs. 2 and 5. All four gates come from one
    convolution of [X, H], in the order input, forget, output, modulation.

    Args:
        peephole: "channel" (one weight per channel), "full" (one per map element, tied to
            `map_size`) or "none". Zero-initialised, so all three start equal.
        forget_bias: constant added to the forget gate's pre-activation.
        gate_norm: "layer" normalises the 4P pre-activations together before the peepholes.
        norm_affine: gain and shift of that normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        kernel_size: int,
        map_size: tuple[int, int],
        peephole: Literal["channel", "none", "full"] = "channel",
        forget_bias: float = 0.0,
        gate_norm: Literal["none", "layer"] = "none",
        norm_affine: Affine = "full",
    ) -> None:
        super().__init__(in_channels, hidden_channels)
        self.forget_bias = forget_bias
        self.gates = nn.Conv2d(
            in_channels + hidden_channels,
            4 * hidden_channels,
            kernel_size,
            padding=kernel_size // 2,
        )
        self.gate_norm = (
            MapLayerNorm(4 * hidden_channels, map_size, affine=norm_affine)
            if gate_norm == "layer"
            else None
        )
        self.peepholes: nn.Parameter | None = None
        if peephole != "none":
            size = map_size if peephole == "full" else (1, 1)
            self.peepholes = nn.Parameter(torch.zeros(3, hidden_channels, *size))

    def initial_state(self, x_BCHW: Tensor) -> CellState:
        """All-zero state.

        Raises:
            ValueError: "full" peepholes meet another map size than they were built for.
        """
        if self.peepholes is not None and self.peepholes.shape[2:] not in (
            (1, 1),
            x_BCHW.shape[2:],
        ):
            raise ValueError(
                f"These peepholes were built for maps of {tuple(self.peepholes.shape[2:])}, got "
                f"{tuple(x_BCHW.shape[2:])}. Use frames of the trained size, or train with "
                "model.peephole=channel, which works at any size."
            )
        return super().initial_state(x_BCHW)

    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """Input, forget and modulation gates, and C-tilde = f . C + i . g (Eq. 2)."""
        gates = self.gates(torch.cat([x_BCHW, state.hidden_BPHW], dim=1))
        if self.gate_norm is not None:
            gates = self.gate_norm(gates)
        i, f, o, g = gates.chunk(4, dim=1)
        memory = state.memory_BPHW
        if self.peepholes is not None:
            i = i + self.peepholes[0] * memory
            f = f + self.peepholes[1] * memory
        forget = torch.sigmoid(f + self.forget_bias)
        candidate = forget * memory + torch.sigmoid(i) * torch.tanh(g)
        return Proposal(candidate, output_BPHW=o, forget_BPHW=forget)

    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """Output gate and hidden state, H = o . tanh(C) (Eq. 5)."""
        o = proposal.output_BPHW
        if self.peepholes is not None:
            o = o + self.peepholes[2] * memory_BPHW
        hidden = torch.sigmoid(o) * torch.tanh(memory_BPHW)
        return CellState(hidden, memory_BPHW), Carry()
