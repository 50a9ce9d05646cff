"""SAVP's ConvLSTM, whose memory is normalised at every step.

Legend: B batch, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState, Proposal, RecurrentCell
from tmu_dist.models.savp.blocks import InstanceNorm, initialised


class NormalisedConvLSTMCell(RecurrentCell):
    """Convolutional LSTM with instance norms on its gates and on its memory.

    Lee et al. 2018, appendix A. Filters are 5x5, without biases; gates in the order input,
    modulation, forget, output; the forget gate's pre-activation is raised by 1.

    Args:
        map_size: any; weights do not depend on it.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, *, map_size: tuple[int, int]
    ) -> None:
        super().__init__(in_channels, hidden_channels)
        self.gates = initialised(
            nn.Conv2d(in_channels + hidden_channels, 4 * hidden_channels, 5, padding=2, bias=False)
        )
        self.gate_norm = InstanceNorm(4 * hidden_channels)
        self.memory_norm = InstanceNorm(hidden_channels)

    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """C-tilde = IN(f . C + i . j): the normalised memory is the one that is transferred."""
        gates = self.gate_norm(self.gates(torch.cat([x_BCHW, state.hidden_BPHW], dim=1)))
        i, j, f, o = gates.chunk(4, dim=1)
        forget = torch.sigmoid(f + 1.0)
        memory = forget * state.memory_BPHW + torch.sigmoid(i) * torch.tanh(j)
        return Proposal(self.memory_norm(memory), output_BPHW=o, forget_BPHW=forget)

    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """H = tanh(C) . o, with the memory after transfer."""
        hidden = torch.tanh(memory_BPHW) * torch.sigmoid(proposal.output_BPHW)
        return CellState(hidden, memory_BPHW), Carry()
