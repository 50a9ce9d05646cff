"""Decoding a frame pixel by pixel: each pixel is computed once, and a whole diagonal at a time.

A causal 3x3 filter sees the pixels (row, column - 1) and (row - 1, column - 1 .. column + 1), so
whatever depends on a pixel lies on a later *wave*, 2 row + column. All pixels of a wave can be
decided together, in W + 2 (H - 1) waves instead of H W pixels, and the result is that of raster
order. The neighbours lie on the last three waves: left and upper right on the last one, above on
the one before, upper left on the third; no other features are kept.

Legend: B batch, C colours, D channels of the context, H, W height and width, L logits of a colour,
N channels of a layer, R rows that the wave crosses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tmu_dist.models.vpn.blocks import multiply
from tmu_dist.models.vpn.likelihood import LIKELIHOODS

Choose = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From logits [R, B, L], rows [R], columns [R] and colour: values [R, B], as predicted and as seen
by later pixels."""


@torch.library.custom_op("tmu_dist::decode_frame", mutates_args=())
def decode_frame(
    context_BDHW: Tensor, noise_BCHW: Tensor | None, weights: list[Tensor], likelihood: str
) -> Tensor:
    """Decide all pixels of a frame.

    One operation to a compiler, which would otherwise unroll the loop over pixels; always in the
    precision of its arguments, also under autocast.

    Args:
        context_BDHW: what the frame is decoded from.
        noise_BCHW: standard normal numbers that choose the values; None predicts each pixel's mean
            given the medians of those before it.
        weights: `FrameDecoder.weights` of the decoder.
        likelihood: a name among `LIKELIHOODS`.

    Returns:
        The frame [B, C, H, W].
    """
    pixel = LIKELIHOODS[likelihood]

    def choose(logits: Tensor, rows: Tensor, columns: Tensor, colour: int) -> tuple[Tensor, Tensor]:
        if noise_BCHW is None:
            # Later pixels must not see means: greys that no frame has lead to more of them.
            return pixel.mean(logits), pixel.quantile(logits, torch.zeros_like(logits[..., 0]))
        value = pixel.quantile(logits, noise_BCHW[:, colour, rows, columns].T)
        return value, value

    with torch.autocast(context_BDHW.device.type, enabled=False):
        return sweep(context_BDHW, weights, choose)


@decode_frame.register_fake
def _(
    context_BDHW: Tensor, noise_BCHW: Tensor | None, weights: list[Tensor], likelihood: str
) -> Tensor:
    batch, _, height, width = context_BDHW.shape
    num_colours = weights[-1].numel() // LIKELIHOODS[likelihood].num_logits
    return context_BDHW.new_empty(batch, num_colours, height, width)


def sweep(context_BDHW: Tensor, weights: Sequence[Tensor], choose: Choose) -> Tensor:
    """Pass over a frame in waves.

    Args:
        context_BDHW: what the frame is decoded from.
        weights: `FrameDecoder.weights` of the decoder.
        choose: decides pixels by their logits.

    Returns:
        The predicted values [B, C, H, W].
    """
    batch, _, height, width = context_BDHW.shape
    num_colours = weights[0].shape[1] // 5
    context_HWBD = context_BDHW.permute(2, 3, 0, 1).contiguous()
    frame_HWBC = context_BDHW.new_empty(height, width, batch, num_colours)
    decoder = _WaveDecoder(weights, context_BDHW.new_zeros(height + 1, batch, 1))
    for wave in range(width + 2 * (height - 1)):
        first, end = max(0, (wave - width + 2) // 2), min(height, wave // 2 + 1)
        rows = torch.arange(first, end, device=context_BDHW.device)
        columns = wave - 2 * rows
        context_RBD = context_HWBD[rows, columns]
        seen_RBC = context_RBD.new_zeros(end - first, batch, num_colours)
        values_RBC = torch.empty_like(seen_RBC)
        for colour in range(num_colours):
            logits_RBCL = decoder.logits(seen_RBC, context_RBD, first, end)
            values_RBC[..., colour], seen_RBC[..., colour] = choose(
                logits_RBCL[:, :, colour], rows, columns, colour
            )
        decoder.advance(first, end)
        frame_HWBC[rows, columns] = values_RBC
    return frame_HWBC.permute(2, 3, 0, 1).contiguous()


class _WaveDecoder:
    """The decoder on the pixels of one wave, with the features of the three waves before it.

    A wave is stored as [H + 1, B, N], zero above the frame and wherever it lies outside of it,
    which is the zero padding of the convolutions.
    """

    def __init__(self, weights: Sequence[Tensor], zeros_HB1: Tensor) -> None:
        layers = list(zip(weights[::2], weights[1::2], strict=True))
        self._first, self._output = layers[0], layers[-1]
        self._blocks = [layers[k : k + 4] for k in range(1, len(layers) - 1, 4)]
        seeing = [self._first, *(layer for block in self._blocks for layer in block[1:3])]
        self._earlier = [
            [zeros_HB1.expand(-1, -1, matrix.shape[1] // 5)] * 3 for matrix, _ in seeing
        ]
        self._now: list[Tensor] = []

    def logits(self, seen_RBC: Tensor, context_RBD: Tensor, first: int, end: int) -> Tensor:
        """Logits [R, B, C, L] of rows `first` to `end`; a colour's depend on those before it."""
        self._now = []
        h = context_RBD + self._convolve(seen_RBC, self._first, first, end)
        for reduce, unit, next_unit, expand in self._blocks:
            inner = F.linear(h, *reduce)
            inner = multiply(inner, self._convolve(inner, unit, first, end), dim=-1)
            inner = multiply(inner, self._convolve(inner, next_unit, first, end), dim=-1)
            h = h + F.linear(inner, *expand)
        return F.linear(h, *self._output).unflatten(-1, (seen_RBC.shape[-1], -1))

    def advance(self, first: int, end: int) -> None:
        """Make the wave of the last `logits` the last one, all its pixels decided by now.

        Its pixels are the very tensor that `logits` was given, with all colours filled in since.
        """
        for earlier, now in zip(self._earlier, self._now, strict=True):
            num_rows = earlier[0].shape[0]
            wave_HBN = F.pad(now, (0, 0, 0, 0, first + 1, num_rows - 1 - end))
            earlier[:] = [wave_HBN, *earlier[:2]]

    def _convolve(
        self, x_RBN: Tensor, layer: tuple[Tensor, Tensor], first: int, end: int
    ) -> Tensor:
        last, second_last, third_last = self._earlier[len(self._now)]  # layers come in one order
        self._now.append(x_RBN)
        above, own = slice(first, end), slice(first + 1, end + 1)
        neighbours = [third_last[above], second_last[above], last[above], last[own], x_RBN]
        return F.linear(torch.cat(neighbours, -1), *layer)
