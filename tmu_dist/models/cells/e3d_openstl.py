"""E3D-LSTM as OpenSTL computes it, which is another network than that of the paper.

Legend: B batch, C input channels, P hidden channels, L time slices of a window, H, W map height
and width, N elements of a window (L * H * W). At the border of a cell the slices of a window lie
below each other: its maps "BPHW" have L * H rows, the oldest slice on top.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState, FrameLoss, Proposal, RecurrentCell
from tmu_dist.models.cells.e3d_lstm import WINDOW, recall
from tmu_dist.models.cells.gates import GateLayers
from tmu_dist.models.cells.st_lstm import ZIGZAG_FORGET_BIAS
from tmu_dist.models.norm import Affine, MapLayerNorm


class OpenSTLE3DCell(RecurrentCell):
    """E3D-LSTM of OpenSTL, for networks that were trained there.

    Tan et al. 2023 (OpenSTL, NeurIPS). It differs from `E3DLSTMCell`, both forms of it, in this: a
    convolution gives one slice, which is repeated; the recall compares rows that mix channels with
    places; normalisations have a gain for each element and eps 1e-5; there are no biases. As in
    the authors' code the layer above gets the incoming M, and the output gate is squashed twice.

    The M that travels is therefore zero in the whole network. What OpenSTL convolves it with never
    matters and is left out here; with a normalisation, its shift remains. M' is read by its own
    step's hidden state alone.

    Args:
        gate_norm: "layer" normalises what each convolution gives, but for the 1x1 one. The
            normalisation of C + RECALL is always there.
        norm_affine: gain and shift of all these; OpenSTL's are "full", tied to one map size.
    """

    frame_loss: ClassVar[FrameLoss] = "l1l2"
    has_zigzag: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        kernel_size: int,
        map_size: tuple[int, int],
        gate_norm: Literal["none", "layer"] = "none",
        norm_affine: Affine = "full",
    ) -> None:
        super().__init__(in_channels, hidden_channels, window=WINDOW)
        width, stacked_size = hidden_channels, (WINDOW * map_size[0], map_size[1])
        make = GateLayers(
            kernel_size=kernel_size,
            map_size=stacked_size,
            gate_norm=gate_norm,
            norm_affine=norm_affine,
            bias=False,
        )
        x_width = 7 * width if gate_norm == "layer" else 6 * width  # i, g, r, o, i', g' and f'
        self.conv_x, self.norm_x = make.conv(WINDOW * in_channels, x_width), make.norm(x_width)
        self.conv_h, self.norm_h = make.conv(WINDOW * width, 4 * width), make.norm(4 * width)
        self.conv_c, self.norm_c = make.conv(WINDOW * width, width), make.norm(width)
        self.conv_n, self.norm_n = make.conv(WINDOW * width, width), make.norm(width)  # of M'
        self.conv_last = nn.Conv2d(2 * width, width, 1, bias=False)
        self.norm_recalled = MapLayerNorm(width, stacked_size, affine=norm_affine)
        self.shift_m = None  # i', f', g', m: all that the normalisation of zeros gives
        if gate_norm == "layer" and norm_affine != "none":
            size = stacked_size if norm_affine == "full" else (1, 1)
            self.shift_m = nn.Parameter(torch.zeros(4 * width, *size))

    def propose(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> Proposal:
        """C-tilde = LN(C + RECALL) + I . G, and M'; there is no M to read."""
        x_gates = self.norm_x(_one_slice(self.conv_x, x_BCHW))
        h_gates = self.norm_h(_one_slice(self.conv_h, state.hidden_BPHW))
        xi, xg, xr, xo, *x_of_zigzag = x_gates.split(self.hidden_channels, dim=1)
        hi, hg, hr, ho = h_gates.chunk(4, dim=1)
        history = (*state.extra, state.memory_BPHW)
        recalled = recall_mixed_rows(torch.sigmoid(xr + hr), history)
        candidate = self.norm_recalled(state.memory_BPHW + recalled)
        return Proposal(
            candidate + torch.sigmoid(xi + hi) * torch.tanh(xg + hg),
            output_BPHW=xo + ho,
            forget_BPHW=None,
            zigzag_BPHW=self._zigzag(x_of_zigzag).to(state.memory_BPHW.dtype),
            extra=history,
        )

    def emit(self, proposal: Proposal, memory_BPHW: Tensor) -> tuple[CellState, Carry]:
        """O = s(tanh(Xo + Ho + Wco * C + Wmo * M')) and H = O . tanh(W * [C, M'])."""
        zigzag, history = proposal.zigzag_BPHW, proposal.extra
        assert zigzag is not None
        o = proposal.output_BPHW + self.norm_c(_one_slice(self.conv_c, memory_BPHW))
        o = o + self.norm_n(_one_slice(self.conv_n, zigzag))
        both = torch.cat([memory_BPHW, zigzag], dim=1)
        hidden = torch.sigmoid(torch.tanh(o)) * torch.tanh(self.conv_last(both))
        return CellState(hidden, memory_BPHW, history), Carry()

    def _zigzag(self, x_terms: list[Tensor]) -> Tensor:
        """M' = I'.G' + F'.tanh(m), where all that M = 0 gives is the shift of its normalisation."""
        xi, xg, *xf = x_terms
        if self.shift_m is None:
            return torch.sigmoid(xi) * torch.tanh(xg)
        mi, mf, mg, m = self.shift_m.chunk(4)
        new = torch.sigmoid(xi + mi) * torch.tanh(xg + mg)
        return new + torch.sigmoid(xf[0] + mf + ZIGZAG_FORGET_BIAS) * torch.tanh(m)


def recall_mixed_rows(gate_BPHW: Tensor, history_BPHW: tuple[Tensor, ...]) -> Tensor:
    """`recall`, but of maps that are cut into rows of P numbers as they lie in memory.

    Channels are the outermost axis there, so a row holds neighbours of one channel.
    """

    def elements_BPN(maps_BPHW: Tensor) -> Tensor:
        return maps_BPHW.reshape(len(maps_BPHW), -1, maps_BPHW.shape[1]).mT

    found_BPN = recall(elements_BPN(gate_BPHW), tuple(map(elements_BPN, history_BPHW)))
    return found_BPN.mT.reshape(gate_BPHW.shape)


def _one_slice(conv: nn.Conv2d, maps_BCHW: Tensor) -> Tensor:
    """A filter over the whole window gives one slice, which stands for each.

    The slices are channels of a 2-D convolution: those of one channel lie side by side.
    """
    slices_BCHW = maps_BCHW.unflatten(2, (WINDOW, -1)).flatten(1, 2)
    one_BPHW: Tensor = conv(slices_BCHW)
    return one_BPHW.repeat(1, 1, WINDOW, 1)
