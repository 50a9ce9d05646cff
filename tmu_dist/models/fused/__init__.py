"""The arithmetic between convolutions in one pass over memory, with its gradients.

Each function does what the cell or the TMU that calls it says in plain operations; `can_fuse` tells
where it may be called: in float32 on CPUs. Backward passes compute gates again instead of keeping
them.

Deliberately not here: other devices (`compute.arithmetic=compiled` fuses the plain operations).

Legend: B batch, M teachers, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, cast

import torch
from torch import Tensor

from tmu_dist.models.native import VECTORS, is_there, load, pointer

EPSILON = 1e-5
"""Of normalisations."""


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


class _Propose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, memory: Tensor, peepholes: Tensor | None, forget_bias: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gates, memory = _dense(gates), _dense(memory)
        candidate, forget, output = (torch.empty_like(memory) for _ in range(3))
        made = (candidate, forget, output)
        given = (gates, memory, peepholes, forget_bias)
        _call("propose", *given, *made, sizes=_sizes(memory))
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
        given = (gates, memory, peepholes, ctx.forget_bias, _dense(d_candidate), _dense(d_output))
        _call("propose_back", *given, d_gates, d_memory, d_peepholes, sizes=_sizes(memory))
        return d_gates, d_memory, d_peepholes, None


class _Emit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, memory: Tensor, peepholes: Tensor | None) -> Tensor:
        output, memory = _dense(output), _dense(memory)
        hidden = torch.empty_like(memory)
        _call("emit", output, memory, _last(peepholes), hidden, sizes=_sizes(memory))
        ctx.save_for_backward(output, memory, peepholes)
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        output, memory, peepholes = ctx.saved_tensors
        d_output, d_memory = torch.empty_like(output), torch.empty_like(memory)
        d_peepholes = None if peepholes is None else torch.zeros_like(peepholes)
        given = (output, memory, _last(peepholes), _dense(gradients[0]))
        made = (d_output, d_memory, _last(d_peepholes))
        _call("emit_back", *given, *made, sizes=_sizes(memory))
        return d_output, d_memory, d_peepholes


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, imitations: Tensor, gates: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        own, imitations, gates = _dense(own), _dense(imitations), _dense(gates)
        fused, open_gates = torch.empty_like(own), torch.empty_like(gates)
        given = (own, imitations, gates, scale)
        _call("fuse", *given, fused, open_gates, sizes=_sizes(imitations))
        ctx.save_for_backward(own, imitations, open_gates)
        ctx.scale = scale
        ctx.mark_non_differentiable(open_gates)
        return fused, open_gates

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        own, imitations, open_gates = ctx.saved_tensors
        d_own, d_imitations, d_gates = map(torch.empty_like, (own, imitations, open_gates))
        given = (own, imitations, open_gates, ctx.scale, _dense(gradients[0]))
        made = (d_own, d_imitations, d_gates)
        _call("fuse_back", *given, *made, sizes=_sizes(imitations))
        return d_own, d_imitations, d_gates, None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, groups: int) -> Tensor:
        x = _dense(x)
        y, statistics = torch.empty_like(x), torch.empty(len(x), groups, 2)
        ctx.sizes = (len(x), x[0, 0].numel(), groups, x.shape[1] // groups)
        _call("normalise", x, gain, shift, y, statistics, EPSILON, sizes=ctx.sizes)
        ctx.save_for_backward(x, gain, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, gain, statistics = ctx.saved_tensors
        d_x, d_gain, d_shift = torch.empty_like(x), torch.empty_like(gain), torch.empty_like(gain)
        given = (x, gain, statistics, _dense(gradients[0]))
        _call("normalise_back", *given, d_x, d_gain, d_shift, sizes=ctx.sizes)
        return d_x, d_gain, d_shift, None


def _dense(maps: Tensor) -> Tensor:
    """The maps with all channels of a pixel side by side: [..., P, H, W] of [B, H, W, ..., P]."""
    channels_last = (0, maps.dim() - 2, maps.dim() - 1, *range(1, maps.dim() - 2))
    back = (0, *range(3, maps.dim()), 1, 2)
    return maps.permute(channels_last).contiguous().permute(back)


def _last(peepholes: Tensor | None) -> Tensor | None:
    return None if peepholes is None else peepholes[2]


def _sizes(maps: Tensor) -> tuple[int, ...]:
    """Pixels of all maps [B, (M,) P, H, W], and their channels."""
    batch, *channels, height, width = maps.shape
    return batch * height * width, *channels


def _call(name: str, *arguments: Any, sizes: Sequence[int]) -> None:
    """Call a C function."""
    converted: list[Any] = []
    for each in arguments:
        if isinstance(each, Tensor):
            converted.append(pointer(each))
        else:
            converted.append(None if each is None else ctypes.c_float(each))
    getattr(_library(), name)(*converted, *map(ctypes.c_long, sizes), torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL:
    source = files(__package__).joinpath("fused.c").read_text()
    return load("fused", "\n".join([VECTORS, source]))


@cache
def _is_there() -> bool:
    return is_there(_library)
