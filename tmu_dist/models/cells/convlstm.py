"""The ConvLSTM cell (Eq. 2 and the output gate of Eq. 5).

Legend: B batch, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tmu_dist.models import fused
from tmu_dist.models.cells.base import Carry, CellState, Proposal, RecurrentCell
from tmu_dist.models.cells.gates import GateLayers
from tmu_dist.models.convolution import Convolution
from tmu_dist.models.fused import can_fuse
from tmu_dist.models.norm import Affine


class ConvLSTMCell(RecurrentCell):
    """Convolutional LSTM with peephole connections.

    Shi et al. 2015, eq. 3; Yao et al. 2020, Eqs. 2 and 5. Gates are stacked in the order input,
    forget, output, modulation.

    Args:
        peephole: "channel" (one weight per channel), "full" (one per map element, tied to
            `map_size`) or "none". Zero-initialised, so all three start equal.
        forget_bias: constant added to the forget gate's pre-activation.
        gate_form: "joint" has one convolution of [X, H] for all gates; "apart" has one of X and one
            of H without biases, the same function but for what follows.
        gate_norm: "layer" normalises the 4P pre-activations together before the peepholes; those
            of X and of H each by itself where they are apart.
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
        gate_form: Literal["joint", "apart"] = "joint",
        gate_norm: Literal["none", "layer"] = "none",
        norm_affine: Affine = "full",
    ) -> None:
        super().__init__(in_channels, hidden_channels)
        self.forget_bias = forget_bias
        self.fuses = True
        """Whether gates are computed in one pass where they can be (compute.arithmetic)."""
        is_joint = gate_form == "joint"
        make = GateLayers(
            kernel_size=kernel_size,
            map_size=map_size,
            gate_norm=gate_norm,
            norm_affine=norm_affine,
            bias=is_joint,
        )
        width = 4 * hidden_channels
        self.gates: Convolution | None = None
        if is_joint:
            self.gates = make.conv(in_channels + hidden_channels, width)
            self.gate_norm = make.norm(width)
        else:
            self.conv_x, self.norm_x = make.conv(in_channels, width), make.norm(width)
            self.conv_h, self.norm_h = make.conv(hidden_channels, width), make.norm(width)
        self.peepholes: nn.Parameter | None = None
        if peephole != "none":
            size = map_size if peephole == "full" else (1, 1)
            self.peepholes = nn.Parameter(torch.zeros(3, hidden_channels, *size))

    def initial_state(self, x_BCHW: Tensor) -> CellState:
        """All-zero state.

        Raises:
            ValueError: "full" peepholes meet another map size than they were built for.
        """
        if self.peepholes is not None and self.peepholes.shape[-2:] not in (
            (1, 1),
            x_BCHW.shape[2:],
        ):
            raise ValueError(
                f"These peepholes were built for maps of {tuple(self.peepholes.shape[-2:])}, got "
                f"{tuple(x_BCHW.shape[2:])}. Use frames of the trained size, or train with "
                "model.peephole=channel, which works at any size."
            )
        return super().initial_state(x_BCHW)

    def project(self, x_BCHW: Tensor) -> Tensor | None:
        """The input's part of all gates, where it has a convolution of its own."""
        if self.gates is not None:
            return None
        projected: Tensor = self.norm_x(self.conv_x(x_BCHW))
        return projected

    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """Input, forget and modulation gates, and C-tilde = f . C + i . g (Eq. 2)."""
        if self.gates is not None:
            gates = self.gate_norm(self.gates(x_BCHW, state.hidden_BPHW))
        else:
            of_input = carry.projected_BQHW
            if of_input is None:
                of_input = self.norm_x(self.conv_x(x_BCHW))
            gates = of_input + self.norm_h(self.conv_h(state.hidden_BPHW))
        memory = state.memory_BPHW
        if self.fuses and can_fuse(gates, self.hidden_channels, self.peepholes):
            candidate, forget, o = fused.propose(gates, memory, self.peepholes, self.forget_bias)
            return Proposal(candidate, output_BPHW=o, forget_BPHW=forget)
        i, f, o, g = gates.chunk(4, dim=1)
        if self.peepholes is not None:
            i = i + self.peepholes[0] * memory
            f = f + self.peepholes[1] * memory
        forget = torch.sigmoid(f + self.forget_bias)
        candidate = forget * memory + torch.sigmoid(i) * torch.tanh(g)
        return Proposal(candidate, output_BPHW=o, forget_BPHW=forget)

    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """Output gate and hidden state, H = o . tanh(C) (Eq. 5)."""
        o = proposal.output_BPHW
        if self.fuses and can_fuse(o, self.hidden_channels, self.peepholes):
            hidden = fused.emit(o, memory_BPHW, self.peepholes)
            return CellState(hidden, memory_BPHW), Carry()
        if self.peepholes is not None:
            o = o + self.peepholes[2] * memory_BPHW
        hidden = torch.sigmoid(o) * torch.tanh(memory_BPHW)
        return CellState(hidden, memory_BPHW), Carry()
