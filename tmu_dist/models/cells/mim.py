"""The MIM block (memory in memory): the forget gate becomes two recurrent memories of its own.

MIM-N follows the differences between successive inputs, MIM-S what they leave of the memory C.

Legend: B batch, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState, Proposal, RecurrentCell
from tmu_dist.models.cells.gates import GateLayers
from tmu_dist.models.cells.st_lstm import ZIGZAG_FORGET_BIAS, STLSTMCell, ZigzagCell
from tmu_dist.models.norm import Affine

CORE_FORGET_BIAS = 1.0


class CoreStep(NamedTuple):
    """One step of a `MemoryCore`."""

    output_BPHW: Tensor
    memory_BPHW: Tensor
    forget_BPHW: Tensor


class MemoryCore(nn.Module):
    """The LSTM inside MIM-N and MIM-S, with a peephole weight for every map element.

    Convolutions stack their gates as i, g, f, o, the peepholes theirs as i, f, o; peepholes start
    at zero.

    Args:
        u_channels: channels of the input u; v and the memory have `hidden_channels`.
        make: of this core's layers.
    """

    def __init__(self, u_channels: int, hidden_channels: int, make: GateLayers) -> None:
        super().__init__()
        width = 4 * hidden_channels
        self.conv_u, self.norm_u = make.conv(u_channels, width), make.norm(width)
        self.conv_v, self.norm_v = make.conv(hidden_channels, width), make.norm(width)
        self.peepholes = nn.Parameter(torch.zeros(3, hidden_channels, *make.map_size))

    def forward(self, u_BCHW: Tensor, v_BPHW: Tensor, memory_BPHW: Tensor) -> CoreStep:
        """Read u and v, update the memory Q."""
        gates = self.norm_u(self.conv_u(u_BCHW)) + self.norm_v(self.conv_v(v_BPHW))
        i, g, f, o = gates.chunk(4, dim=1)
        of_input, of_forget, of_output = self.peepholes
        forget = torch.sigmoid(f + of_forget * memory_BPHW + CORE_FORGET_BIAS)
        new = torch.sigmoid(i + of_input * memory_BPHW) * torch.tanh(g)
        memory_BPHW = forget * memory_BPHW + new
        output = torch.sigmoid(o + of_output * memory_BPHW) * torch.tanh(memory_BPHW)
        return CoreStep(output, memory_BPHW, forget)


class InnerMemories(NamedTuple):
    """What a MIM block remembers besides H and C."""

    stationary_BPHW: Tensor
    """Memory S of MIM-S."""
    nonstationary_BPHW: Tensor
    """Memory N of MIM-N."""
    difference_BPHW: Tensor
    """Output D of MIM-N."""
    input_BCHW: Tensor | None
    """The input before this one; None before the first."""


class MIMCell(ZigzagCell):
    """Memory-in-memory block; the lowest layer of a MIM network is an ST-LSTM.

    Wang et al. 2019 (MIM). C = T + i . g, where T, the output of MIM-S,
    stands for f . C of an LSTM. A TMU transfers into this C, and MIM-S reads it in the next step.
    The block's one forget gate, in `Proposal.forget_BPHW`, is that of MIM-S.

    Args:
        mim_difference: what MIM-N reads. "cascade": the output of the MIM-N below, and where there
            is none, in the lowest block, the difference of successive inputs; "hidden": always
            that difference.
        mim_output_gate: "code": the output gate reads the incoming M; "paper": the new C and M,
            through `conv_o`.
        gate_norm: "layer" normalises what each convolution gives, but for the 1x1 one.
        norm_affine: gain and shift of these normalisations.
        bias: of every convolution.

    `conv_x` stacks i, g, f, o, `conv_h` i, g, o, `conv_m` i, g, f and, in "code", o.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        kernel_size: int,
        map_size: tuple[int, int],
        mim_difference: Literal["cascade", "hidden"] = "cascade",
        mim_output_gate: Literal["code", "paper"] = "code",
        gate_norm: Literal["none", "layer"] = "none",
        norm_affine: Affine = "full",
        bias: bool = False,
    ) -> None:
        make = GateLayers(
            kernel_size=kernel_size,
            map_size=map_size,
            gate_norm=gate_norm,
            norm_affine=norm_affine,
            bias=bias,
        )
        reads_new = mim_output_gate == "paper"
        super().__init__(in_channels, hidden_channels, make, gate_reads_memories=reads_new)
        self.mim_difference = mim_difference
        self.map_size = map_size
        x_width, h_width = 4 * hidden_channels, 3 * hidden_channels
        m_width = (3 if reads_new else 4) * hidden_channels
        self.conv_x, self.norm_x = make.conv(in_channels, x_width), make.norm(x_width)
        self.conv_h, self.norm_h = make.conv(hidden_channels, h_width), make.norm(h_width)
        self.conv_m, self.norm_m = make.conv(hidden_channels, m_width), make.norm(m_width)
        self.nonstationary = MemoryCore(in_channels, hidden_channels, make)
        self.stationary = MemoryCore(hidden_channels, hidden_channels, make)

    @classmethod
    def of_layer(cls, layer: int) -> type[RecurrentCell]:
        """ST-LSTM at the bottom, MIM blocks above."""
        return STLSTMCell if layer == 0 else cls

    def initial_state(self, x_BCHW: Tensor) -> CellState:
        """All-zero state; there is no input before the first.

        Raises:
            ValueError: maps of another size than the peepholes were built for.
        """
        if tuple(x_BCHW.shape[2:]) != tuple(self.map_size):
            raise ValueError(
                f"The peepholes of this MIM block were built for maps of {tuple(self.map_size)}, "
                f"got {tuple(x_BCHW.shape[2:])}. Use frames of the trained size; a network for "
                "any size is model.cell=predrnn."
            )
        state = super().initial_state(x_BCHW)
        zeros = state.memory_BPHW
        return state._replace(extra=InnerMemories(zeros, zeros, zeros, None))

    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """C-tilde = T + i . g from X, H and the inner memories, and M = f' . M + i' . g'."""
        zigzag = self.incoming_zigzag(state, carry)
        stationary, memories = self._remember(x_BCHW, state, carry.difference_BPHW)
        x_i, x_g, x_f, x_o = self.norm_x(self.conv_x(x_BCHW)).chunk(4, dim=1)
        h_i, h_g, h_o = self.norm_h(self.conv_h(state.hidden_BPHW)).chunk(3, dim=1)
        m_i, m_g, m_f, *m_o = self.norm_m(self.conv_m(zigzag)).split(self.hidden_channels, dim=1)
        candidate = stationary.output_BPHW + torch.sigmoid(x_i + h_i) * torch.tanh(x_g + h_g)
        keep = torch.sigmoid(x_f + m_f + ZIGZAG_FORGET_BIAS)
        zigzag = keep * zigzag + torch.sigmoid(x_i + m_i) * torch.tanh(x_g + m_g)
        return Proposal(
            candidate,
            output_BPHW=x_o + h_o + m_o[0] if m_o else x_o + h_o,
            forget_BPHW=stationary.forget_BPHW,
            zigzag_BPHW=zigzag,
            extra=memories,
        )

    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """Output gate and hidden state from the final C and M; M and D travel upwards."""
        zigzag, memories = proposal.zigzag_BPHW, proposal.extra
        assert zigzag is not None
        hidden = self.hidden_state(proposal.output_BPHW, memory_BPHW, zigzag)
        carry = Carry(zigzag_BPHW=zigzag, difference_BPHW=memories.difference_BPHW)
        return CellState(hidden, memory_BPHW, memories), carry

    def _remember(
        self, x_BCHW: Tensor, state: CellState, difference_below: Tensor | None
    ) -> tuple[CoreStep, InnerMemories]:
        """MIM-N, then MIM-S, whose output is T.

        The first input has no difference: MIM-N is not run, D and N stay zero.
        """
        before: InnerMemories = state.extra
        difference, nonstationary = before.difference_BPHW, before.nonstationary_BPHW
        if before.input_BCHW is not None:
            change = difference_below
            if change is None or self.mim_difference == "hidden":
                change = x_BCHW - before.input_BCHW
            difference, nonstationary, _ = self.nonstationary(change, difference, nonstationary)
        stationary: CoreStep = self.stationary(
            difference, state.memory_BPHW, before.stationary_BPHW
        )
        return stationary, InnerMemories(stationary.memory_BPHW, nonstationary, difference, x_BCHW)
