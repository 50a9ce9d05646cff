"""The ST-LSTM cell of PredRNN: one memory runs along time, another zig-zags through the layers.

Legend: B batch, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState, Proposal, RecurrentCell
from tmu_dist.models.cells.gates import GateLayers
from tmu_dist.models.norm import Affine

ZIGZAG_FORGET_BIAS = 1.0
"""Added to the forget gate of M, as published, whatever transfers into M."""


class ZigzagCell(RecurrentCell):
    """What ST-LSTM and MIM share: a hidden state that reads C and the zig-zag memory M.

    Args:
        make: of the layers of this cell.
        gate_reads_memories: whether the output gate reads the new C and M.
    """

    has_zigzag: ClassVar[bool] = True

    def __init__(
        self, in_channels: int, hidden_channels: int, make: GateLayers, *, gate_reads_memories: bool
    ) -> None:
        super().__init__(in_channels, hidden_channels)
        both = 2 * hidden_channels
        self.conv_o = make.conv(both, hidden_channels) if gate_reads_memories else None
        self.norm_o = make.norm(hidden_channels) if gate_reads_memories else None
        self.conv_last = nn.Conv2d(both, hidden_channels, 1, bias=make.bias)

    def incoming_zigzag(self, state: CellState, carry: Carry) -> Tensor:
        """M of the layer below, or of the top layer one step ago; zeros before the first step."""
        if carry.zigzag_BPHW is None:
            return torch.zeros_like(state.memory_BPHW)
        return carry.zigzag_BPHW

    def hidden_state(self, output_BPHW: Tensor, memory_BPHW: Tensor, zigzag_BPHW: Tensor) -> Tensor:
        """H = o . tanh(W * [C, M]), from the output gate's pre-activation and the new memories."""
        memories = torch.cat([memory_BPHW, zigzag_BPHW], dim=1)
        if self.conv_o is not None and self.norm_o is not None:
            output_BPHW = output_BPHW + self.norm_o(self.conv_o(memories))
        return torch.sigmoid(output_BPHW) * torch.tanh(self.conv_last(memories))


class STLSTMCell(ZigzagCell):
    """Spatiotemporal LSTM.

    Wang et al. 2017 (PredRNN). A TMU transfers into C, and with transfer.tmu.zigzag into M, before
    output gate and hidden state read [C, M].

    Args:
        st_form: "seven_gate" has gates of their own for C and M, stacked in `conv_x` as i, f, g of
            C, i, f, g of M, o, in `conv_h` as i, f, g, o and in `conv_m` as i, f, g. "shared" (in
            MIM's public code) has one convolution of the input for both memories and an output
            gate that reads the incoming M, not the new memories; each stacks i, g, f, o.
        gate_norm: "layer" normalises what each convolution gives, but for the 1x1 one.
        norm_affine: gain and shift of these normalisations.
        bias: of every convolution; None: as published, only in the shared form.
        forget_bias: added to the forget gate of C.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        kernel_size: int,
        map_size: tuple[int, int],
        st_form: Literal["seven_gate", "shared"] = "seven_gate",
        gate_norm: Literal["none", "layer"] = "none",
        norm_affine: Affine = "full",
        bias: bool | None = None,
        forget_bias: float = 1.0,
    ) -> None:
        shared = st_form == "shared"
        make = GateLayers(
            kernel_size=kernel_size,
            map_size=map_size,
            gate_norm=gate_norm,
            norm_affine=norm_affine,
            bias=shared if bias is None else bias,
        )
        super().__init__(in_channels, hidden_channels, make, gate_reads_memories=not shared)
        self.shared = shared
        self.forget_bias = forget_bias
        x_width, h_width, m_width = (
            gates * hidden_channels for gates in ((4, 4, 4) if shared else (7, 4, 3))
        )
        self.conv_x, self.norm_x = make.conv(in_channels, x_width), make.norm(x_width)
        self.conv_h, self.norm_h = make.conv(hidden_channels, h_width), make.norm(h_width)
        self.conv_m, self.norm_m = make.conv(hidden_channels, m_width), make.norm(m_width)

    def project(self, x_BCHW: Tensor) -> Tensor:
        """The input's part of all gates."""
        projected: Tensor = self.norm_x(self.conv_x(x_BCHW))
        return projected

    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """C-tilde = f . C + i . g from X and H, and M = f' . M + i' . g' from X and M."""
        memory, zigzag = state.memory_BPHW, self.incoming_zigzag(state, carry)
        projected = carry.projected_BQHW
        if projected is None:
            projected = self.project(x_BCHW)
        x = projected.split(self.hidden_channels, dim=1)
        h = self.norm_h(self.conv_h(state.hidden_BPHW)).split(self.hidden_channels, dim=1)
        m = self.norm_m(self.conv_m(zigzag)).split(self.hidden_channels, dim=1)
        if self.shared:
            (i, g, f), (i_zigzag, g_zigzag, f_zigzag) = _sums(x, h), _sums(x, m)
            output = x[3] + h[3] + m[3]
        else:
            (i, f, g), (i_zigzag, f_zigzag, g_zigzag) = _sums(x, h), _sums(x[3:], m)
            output = x[6] + h[3]
        forget = torch.sigmoid(f + self.forget_bias)
        candidate = forget * memory + torch.sigmoid(i) * torch.tanh(g)
        keep = torch.sigmoid(f_zigzag + ZIGZAG_FORGET_BIAS)
        zigzag = keep * zigzag + torch.sigmoid(i_zigzag) * torch.tanh(g_zigzag)
        return Proposal(candidate, output_BPHW=output, forget_BPHW=forget, zigzag_BPHW=zigzag)

    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """Output gate and hidden state from the final C and M; M travels on upwards."""
        zigzag = proposal.zigzag_BPHW
        assert zigzag is not None
        hidden = self.hidden_state(proposal.output_BPHW, memory_BPHW, zigzag)
        return CellState(hidden, memory_BPHW), Carry(zigzag_BPHW=zigzag)


def _sums(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations of three gates, each from two convolutions."""
    return first[0] + second[0], first[1] + second[1], first[2] + second[2]
