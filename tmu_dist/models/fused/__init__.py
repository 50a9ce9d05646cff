"""The arithmetic between convolutions in one pass over memory, with its gradients.

Each function does what the cell or the TMU that calls it says in plain operations; `can_fuse` tells
where it may be called: in float32 on CPUs. Backward passes compute gates again instead of keeping
them.

Deliberately not here: other devices (`compute.arithmetic=compiled` fuses the plain operations).

Legend: B batch, C channels, M teachers, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tmu_dist.models.fused import calls
from tmu_dist.models.fused.calls import EPSILON, call, dense, sizes_of
from tmu_dist.models.native import is_there

__all__ = [
    "EPSILON",
    "TransferWeights",
    "can_fuse",
    "emit",
    "fuse",
    "normalise",
    "propose",
    "transfer",
]


class TransferWeights(NamedTuple):
    """Parameters of a TMU; gains and shifts of its two normalisations lie as maps do."""

    distillers: Tensor
    """[M P, P, 1, 1]"""
    gates: Tensor
    """[M P, C + P, 1, 1]"""
    gates_bias: Tensor
    imitation_gain: Tensor
    imitation_shift: Tensor
    gate_gain: Tensor
    gate_shift: Tensor


def can_fuse(map_BCHW: Tensor, channels: int, peepholes: Tensor | None = None) -> bool:
    """Whether this arithmetic can be computed here, without turning maps around.

    Args:
        map_BCHW: what the last convolution gave; all maps lie like it.
        channels: of the hidden state, or of a group that is normalised (P).
        peepholes: of the cell, if it has any: they must be one number a channel.
    """
    return (
        map_BCHW.device.type == "cpu"
        and map_BCHW.dtype == torch.float32
        and channels % 16 == 0
        and map_BCHW.is_contiguous(memory_format=torch.channels_last)
        and (peepholes is None or peepholes.shape[2:] == (1, 1))
        and not torch.compiler.is_compiling()
        and _is_there()
    )


def propose(
    gates_BQHW: Tensor, memory_BPHW: Tensor, peepholes: Tensor | None, forget_bias: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2 of a ConvLSTM.

    Args:
        gates_BQHW: pre-activations of i, f, o, g side by side (Q = 4 P).
        memory_BPHW: the memory before.
        peepholes: of i, f, o, [3, P, 1, 1]; None: there are none.
        forget_bias: added to the forget gate's.

    Returns:
        C-tilde, the forget gate (without gradient), and the output gate's pre-activation.
    """
    return cast(
        "tuple[Tensor, Tensor, Tensor]",
        _Propose.apply(gates_BQHW, memory_BPHW, peepholes, forget_bias),
    )


def emit(output_BPHW: Tensor, memory_BPHW: Tensor, peepholes: Tensor | None) -> Tensor:
    """Eq. 5, lines 3 and 4: the hidden state; arguments as in `propose`."""
    return cast(Tensor, _Emit.apply(output_BPHW, memory_BPHW, peepholes))


def fuse(
    own_BPHW: Tensor, imitations_BMPHW: Tensor, gates_BMPHW: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Eq. 5, line 2.

    Args:
        own_BPHW: C-tilde.
        imitations_BMPHW: of every teacher's memory.
        gates_BMPHW: pre-activations of the transfer gates.
        scale: of the sum.

    Returns:
        The memory after transfer, and the transfer gates (without gradient).
    """
    return cast(
        "tuple[Tensor, Tensor]", _Fuse.apply(own_BPHW, imitations_BMPHW, gates_BMPHW, scale)
    )


def normalise(x_BCHW: Tensor, gain_CHW: Tensor, shift_CHW: Tensor, groups: int) -> Tensor:
    """Each sample's groups of channels to mean 0 and variance 1, then gain and shift (`norm`).

    Args:
        x_BCHW: maps; a group's channels are a multiple of 16.
        gain_CHW: for each element, lying as the maps do.
        shift_CHW: likewise.
        groups: of channels that are normalised together.
    """
    return cast(Tensor, _Normalise.apply(x_BCHW, gain_CHW, shift_CHW, groups))


def transfer(
    own_BPHW: Tensor, x_BCHW: Tensor, hidden_BPHW: Tensor, weights: TransferWeights, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole of a TMU as one operation (Eqs. 3 and 5), as `MemoryTransfer.forward`.

    What autograd does between its parts takes a small network longer than the parts.

    Args:
        own_BPHW, x_BCHW, hidden_BPHW: maps with their channels innermost.
        weights: of the TMU.
        scale: of the sum in Eq. 5.
    """
    # Half precision costs CPUs more in conversions than it saves in products as small as these.
    with torch.autocast("cpu", enabled=False):
        made = _Transfer.apply(own_BPHW, x_BCHW, hidden_BPHW, scale, *weights)
    return cast("tuple[Tensor, Tensor, Tensor]", made)


class _Propose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, memory: Tensor, peepholes: Tensor | None, forget_bias: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gates, memory = dense(gates), dense(memory)
        candidate, forget, output = (torch.empty_like(memory) for _ in range(3))
        made = (candidate, forget, output)
        given = (gates, memory, peepholes, forget_bias)
        call("propose", *given, *made, sizes=sizes_of(memory))
        ctx.save_for_backward(gates, memory, peepholes)
        ctx.forget_bias = forget_bias
        ctx.mark_non_differentiable(forget)
        return candidate, forget, output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gates, memory, peepholes = ctx.saved_tensors
        d_candidate, _, d_output = gradients
        d_gates, d_memory = torch.empty_like(gates), torch.empty_like(memory)
        d_peepholes = None if peepholes is None else torch.zeros_like(peepholes)
        given = (gates, memory, peepholes, ctx.forget_bias, dense(d_candidate), dense(d_output))
        call("propose_back", *given, d_gates, d_memory, d_peepholes, sizes=sizes_of(memory))
        return d_gates, d_memory, d_peepholes, None


class _Emit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, memory: Tensor, peepholes: Tensor | None) -> Tensor:
        output, memory = dense(output), dense(memory)
        hidden = torch.empty_like(memory)
        call("emit", output, memory, _last(peepholes), hidden, sizes=sizes_of(memory))
        ctx.save_for_backward(output, memory, peepholes)
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        output, memory, peepholes = ctx.saved_tensors
        d_output, d_memory = torch.empty_like(output), torch.empty_like(memory)
        d_peepholes = None if peepholes is None else torch.zeros_like(peepholes)
        given = (output, memory, _last(peepholes), dense(gradients[0]))
        made = (d_output, d_memory, _last(d_peepholes))
        call("emit_back", *given, *made, sizes=sizes_of(memory))
        return d_output, d_memory, d_peepholes


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, imitations: Tensor, gates: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        own, imitations, gates = dense(own), dense(imitations), dense(gates)
        fused, opened = calls.fuse(own, imitations, gates, scale)
        ctx.save_for_backward(own, imitations, opened)
        ctx.scale = scale
        ctx.mark_non_differentiable(opened)
        return fused, opened

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        own, imitations, opened = ctx.saved_tensors
        return *calls.fuse_back(own, imitations, opened, ctx.scale, dense(gradients[0])), None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, groups: int) -> Tensor:
        x = dense(x)
        y, statistics = calls.normalise(x, gain, shift, groups)
        ctx.save_for_backward(x, gain, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, gain, statistics = ctx.saved_tensors
        return *calls.normalise_back(x, gain, statistics, dense(gradients[0])), None


class _Transfer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, x: Tensor, hidden: Tensor, scale: float, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = TransferWeights(*parameters)
        own, x, hidden = dense(own), dense(x), dense(hidden)
        num_teachers = len(weights.distillers) // own.shape[1]
        of_x, of_hidden = weights.gates.flatten(1).split([x.shape[1], own.shape[1]], dim=1)

        distilled = _maps(F.linear(_rows(own), weights.distillers.flatten(1)), own)
        imitations, distilled_statistics = calls.normalise(
            distilled, weights.imitation_gain, weights.imitation_shift, num_teachers
        )
        rows = F.linear(_rows(x), of_x, weights.gates_bias)
        gates = _maps(rows.addmm_(_rows(hidden), of_hidden.t()), own)
        normed, gate_statistics = calls.normalise(gates, weights.gate_gain, weights.gate_shift, 1)
        imitations = imitations.unflatten(1, (num_teachers, -1))
        fused, opened = calls.fuse(own, imitations, normed.unflatten(1, (num_teachers, -1)), scale)
        kept = (own, x, hidden, distilled, distilled_statistics, gates, gate_statistics)
        ctx.save_for_backward(*kept, imitations, opened, *weights)
        ctx.scale = scale
        ctx.mark_non_differentiable(opened)
        ctx.set_materialize_grads(False)
        return fused, imitations, opened

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # asked once: recomputation gives each a single time
        own, x, hidden, distilled, distilled_statistics, gates, gate_statistics = kept[:7]
        imitations, opened = kept[7:9]
        weights = TransferWeights(*kept[9:])
        d_fused, d_told, _ = gradients
        d_fused = torch.zeros_like(own) if d_fused is None else dense(d_fused)

        d_own, d_imitations, d_normed = calls.fuse_back(own, imitations, opened, ctx.scale, d_fused)
        if d_told is not None:
            d_imitations += d_told
        d_distilled, d_imitation_gain, d_imitation_shift = calls.normalise_back(
            distilled, weights.imitation_gain, distilled_statistics, d_imitations.flatten(1, 2)
        )
        d_gates, d_gate_gain, d_gate_shift = calls.normalise_back(
            gates, weights.gate_gain, gate_statistics, d_normed.flatten(1, 2)
        )
        d_distilled_rows, d_gates_rows = _rows(d_distilled), _rows(d_gates)
        _rows(d_own).addmm_(d_distilled_rows, weights.distillers.flatten(1))
        of_x, of_hidden = weights.gates.flatten(1).split([x.shape[1], own.shape[1]], dim=1)
        d_x = _maps(d_gates_rows @ of_x, x) if ctx.needs_input_grad[1] else None
        d_hidden = _maps(d_gates_rows @ of_hidden, hidden)
        turned = d_gates_rows.t()
        d_weights = TransferWeights(
            distillers=(d_distilled_rows.t() @ _rows(own)).view_as(weights.distillers),
            gates=torch.cat([turned @ _rows(x), turned @ _rows(hidden)], 1).view_as(weights.gates),
            gates_bias=d_gates_rows.sum(0),
            imitation_gain=d_imitation_gain,
            imitation_shift=d_imitation_shift,
            gate_gain=d_gate_gain,
            gate_shift=d_gate_shift,
        )
        return d_own, d_x, d_hidden, None, *d_weights


def _rows(maps_BCHW: Tensor) -> Tensor:
    """Dense maps as a matrix: a row of channels for each pixel [B H W, C]."""
    return maps_BCHW.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(rows: Tensor, like_BDHW: Tensor) -> Tensor:
    """Inverse of `_rows`."""
    batch, _, height, width = like_BDHW.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _last(peepholes: Tensor | None) -> Tensor | None:
    return None if peepholes is None else peepholes[2]


@cache
def _is_there() -> bool:
    return is_there(calls.library)
