"""The Eidetic 3-D LSTM cell (E3D-LSTM), which recalls the memories of earlier time steps.

Legend: B batch, C input channels, P hidden channels, L time slices of a window, H, W map height
and width, N elements of a window (L * H * W), T recalled memories. At the border of a cell the
slices of a window lie below each other: its maps "BPHW" have L * H rows, the oldest slice on top.
Whatever looks at one element at a time, or at all of them, need not take them apart.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState, FrameLoss, Proposal, RecurrentCell

WINDOW = 2
"""Slices of a window (L), and the depth of every 3-D filter."""
LARGEST_FULLY_RECALLED = 16 * 16
"""Elements of a map up to which all past memories are recalled by default."""


class WindowConv(nn.Conv3d):
    """3-D convolution, filters [L, k, k], of windows whose slices lie below each other.

    The size stays the same: zeros surround each slice, and one slice of zeros follows the newest;
    so a slice sees itself and the next newer one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool
    ) -> None:
        filters, reach = (WINDOW, kernel_size, kernel_size), kernel_size // 2
        super().__init__(in_channels, out_channels, filters, padding=(0, reach, reach), bias=bias)

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Maps [B, C, L*H, W] to maps [B, P, L*H, W]."""
        slices_BCLHW = maps_BCHW.unflatten(2, (WINDOW, -1))
        return super().forward(F.pad(slices_BCLHW, (0, 0, 0, 0, 0, 1))).flatten(2, 3)


class Eidetic(NamedTuple):
    """What `emit` needs of a step beside C and M'."""

    incoming_BPHW: Tensor
    """The M that the step read."""
    history_BPHW: tuple[Tensor, ...]
    """The memories C that were recalled, oldest first."""


class E3DLSTMCell(RecurrentCell):
    """LSTM of 3-D convolutions over a short window, with attention to its own past memories.

    Wang et al. 2019 (Eidetic 3D LSTM, ICLR), with the normalisations of the authors' code. A step
    adds what the recall gate finds in the history of C, where an LSTM would forget. The history
    holds the memories C as they were fused; the zero state counts as the first.

    Args:
        map_size: any; no weight is tied to it.
        e3d_memory: "paper", or "code" for what the authors' code computes: M' reads the incoming M
            through a convolution only, the output gate is squashed twice, and the layer above gets
            the incoming M. It therefore stays zero in the whole network, and the filters of
            `conv_m` never learn.
        recall_window: how many past memories a step recalls; None: all on maps of up to 16x16, 4 on
            larger ones.
        bias: of all convolutions. Without, a sequence that begins with empty frames has no finite
            gradient: the normalisation of a map of zeros is infinitely steep.
    """

    frame_loss: ClassVar[FrameLoss] = "l1l2"
    has_zigzag: ClassVar[bool] = True
    output_bias: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        kernel_size: int,
        map_size: tuple[int, int],
        e3d_memory: Literal["paper", "code"] = "paper",
        recall_window: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, hidden_channels, window=WINDOW)
        self.e3d_memory = e3d_memory
        if recall_window is None and map_size[0] * map_size[1] > LARGEST_FULLY_RECALLED:
            recall_window = 4
        self.recall_window = recall_window
        width = hidden_channels
        self.conv_h = WindowConv(width, 4 * width, kernel_size, bias=bias)  # i, g, r, o
        self.conv_x = WindowConv(in_channels, 7 * width, kernel_size, bias=bias)  # .., i', g', f'
        self.conv_m = WindowConv(width, 4 * width, kernel_size, bias=bias)  # i', f', g', m
        self.conv_c = WindowConv(width, width, kernel_size, bias=bias)
        self.conv_n = WindowConv(width, width, kernel_size, bias=bias)  # of the new M, M'
        self.conv_last = nn.Conv2d(2 * width, width, 1, bias=bias)
        self.norm_h = _layer_norm(4 * width)
        self.norm_x = _layer_norm(7 * width)
        self.norm_m = _layer_norm(4 * width)
        self.norm_c = _layer_norm(width)

    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """C-tilde = LN(C + RECALL) + I . G, and the new M."""
        hi, hg, hr, ho = self.norm_h(self.conv_h(state.hidden_BPHW)).chunk(4, dim=1)
        xi, xg, xr, xo, *x_of_zigzag = self.norm_x(self.conv_x(x_BCHW)).chunk(7, dim=1)

        history = (*state.extra, state.memory_BPHW)
        if self.recall_window is not None:
            history = history[-self.recall_window :]
        recalled = recall(torch.sigmoid(xr + hr), history)
        candidate = self.norm_c(state.memory_BPHW + recalled)
        candidate = candidate + torch.sigmoid(xi + hi) * torch.tanh(xg + hg)

        incoming = carry.zigzag_BPHW
        if incoming is None:
            incoming = torch.zeros_like(state.memory_BPHW)
        return Proposal(
            candidate,
            output_BPHW=xo + ho,
            forget_BPHW=None,
            zigzag_BPHW=self._new_zigzag(x_of_zigzag, incoming),
            extra=Eidetic(incoming, history),
        )

    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """O = s(Xo + Ho + Wco * C + Wmo * M') and H = O . tanh(W * [C, M'])."""
        zigzag, eidetic = proposal.zigzag_BPHW, proposal.extra
        assert zigzag is not None
        o = proposal.output_BPHW + self.conv_c(memory_BPHW) + self.conv_n(zigzag)
        if self.e3d_memory == "code":
            o = torch.tanh(o)
        both = torch.cat([memory_BPHW, zigzag], dim=1)
        hidden = torch.sigmoid(o) * torch.tanh(self.conv_last(both))
        state = CellState(hidden, memory_BPHW, eidetic.history_BPHW)
        handed_on = zigzag if self.e3d_memory == "paper" else eidetic.incoming_BPHW
        return state, Carry(zigzag_BPHW=handed_on)

    def _new_zigzag(self, x_terms: list[Tensor], incoming_BPHW: Tensor) -> Tensor:
        """M' = I'.G' + F'.M, or F'.tanh(m) in "code"; in "paper" m only shares the others' LN."""
        xi, xg, xf = x_terms
        mi, mf, mg, m = self.norm_m(self.conv_m(incoming_BPHW)).chunk(4, dim=1)
        kept = incoming_BPHW if self.e3d_memory == "paper" else torch.tanh(m)
        new = torch.sigmoid(xi + mi) * torch.tanh(xg + mg)
        return new + torch.sigmoid(xf + mf + 1.0) * kept


def recall(gate_BPHW: Tensor, history_BPHW: tuple[Tensor, ...]) -> Tensor:
    """RECALL(R, C_hist) = softmax(R C_hist^T) C_hist over all elements of all past memories.

    Args:
        gate_BPHW: the recall gate R; each of its N elements is a query of P numbers.
        history_BPHW: past memories C, T of them; their T * N elements are keys and values.
    """
    query_BNP = gate_BPHW.flatten(2).mT.contiguous()  # fused kernels need it so, and one head
    past_BNP = torch.cat([memory.flatten(2).mT for memory in history_BPHW], dim=1)
    query, past = query_BNP.unsqueeze(1), past_BNP.unsqueeze(1)
    found_BNP = F.scaled_dot_product_attention(query, past, past, scale=1.0).squeeze(1)
    return found_BNP.mT.unflatten(2, gate_BPHW.shape[2:])


def _layer_norm(channels: int) -> nn.GroupNorm:
    """Over channels, slices and pixels jointly; gain and shift per channel; eps as published."""
    return nn.GroupNorm(1, channels, eps=1e-12)
