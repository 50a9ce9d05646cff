"""The Transferable Memory Unit: memory distillers and transfer gates (`layer` puts them in place).

Legend: B batch, M teachers, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tmu_dist.models.convolution import Convolution
from tmu_dist.models.fused import TransferWeights, can_fuse, fuse, transfer
from tmu_dist.models.norm import Affine, MapLayerNorm


class MemoryTransfer(nn.Module):
    """The grey box of the paper's Figure 2: imitate M teachers' memories, gate them in.

    The distillers of all teachers are one convolution and one grouped normalisation, and so are
    the transfer gates. The distillers never read a memory in half precision: with Eq. 5 it can
    grow beyond 65,504, where float16 ends, and with bfloat16 up to a third of the predictions'
    error came from there.

    Args:
        gate_kernel_size: filter size of the transfer gates. The paper says 5x5 for all filters,
            but only 1x1 with normalisation reproduces its parameter counts (docs/methods.md).
        gate_norm: "layer" normalises the M*P gate pre-activations together; "none" is Eq. 5.
        combine: "paper" is Eq. 5 as printed, where the weights of C-tilde add up to
            1 + sum(1 - a) and the memory can grow with M and time; "mean" divides by 1 + M.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_teachers: int,
        *,
        map_size: tuple[int, int],
        gate_kernel_size: int = 1,
        gate_norm: Literal["layer", "none"] = "layer",
        combine: Literal["paper", "mean"] = "paper",
        norm_affine: Affine = "full",
    ) -> None:
        super().__init__()
        width = num_teachers * hidden_channels
        self.num_teachers = num_teachers
        self.combine = combine
        self.fuses = True
        """Whether memories are fused in one pass where they can be (compute.arithmetic)."""
        self.distillers = Convolution(hidden_channels, width, 1, bias=False)
        self.distiller_norm = MapLayerNorm(width, map_size, affine=norm_affine, groups=num_teachers)
        self.gates = Convolution(in_channels + hidden_channels, width, gate_kernel_size)
        self.gate_norm = (
            MapLayerNorm(width, map_size, affine=norm_affine) if gate_norm == "layer" else None
        )

    def forward(
        self, memory_BPHW: Tensor, x_BCHW: Tensor, hidden_BPHW: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Imitate, gate and fuse.

        Args:
            memory_BPHW: the candidate memory C-tilde.
            x_BCHW: the layer's input.
            hidden_BPHW: its hidden state one step before.

        Returns:
            The memory after transfer, C (Eq. 5, line 2); the imitation of every teacher's memory
            (Eq. 3) and how much of each flows in, in [0, 1] (Eq. 5, line 1), both
            [B, M, P, H, W].
        """
        scale = 1 / (1 + self.num_teachers) if self.combine == "mean" else 1.0
        if self._is_one_operation(memory_BPHW, x_BCHW, hidden_BPHW):
            return transfer(memory_BPHW, x_BCHW, hidden_BPHW, self._weights(memory_BPHW), scale)
        device = "cpu" if memory_BPHW.is_meta else memory_BPHW.device.type  # it knows no "meta"
        with torch.autocast(device, enabled=False):
            read_BPHW = memory_BPHW.to(self.distillers.weight.dtype)
            imitations = self.distiller_norm(self.distillers(read_BPHW))
        gates = self.gates(x_BCHW, hidden_BPHW)
        if self.gate_norm is not None:
            gates = self.gate_norm(gates)
        imitations_BMPHW = imitations.unflatten(1, (self.num_teachers, -1))
        gates_BMPHW = gates.unflatten(1, (self.num_teachers, -1))
        if self.fuses and can_fuse(gates, memory_BPHW.shape[1]):
            fused, open_BMPHW = fuse(memory_BPHW, imitations_BMPHW, gates_BMPHW, scale)
            return fused, imitations_BMPHW, open_BMPHW
        open_BMPHW = torch.sigmoid(gates_BMPHW)
        own_BMPHW = memory_BPHW.unsqueeze(1)
        mixed = torch.lerp(
            own_BMPHW.expand_as(imitations_BMPHW),
            imitations_BMPHW.to(own_BMPHW.dtype),
            open_BMPHW.to(own_BMPHW.dtype),
        )
        return scale * (memory_BPHW + mixed.sum(dim=1)), imitations_BMPHW, open_BMPHW

    def start_from(self, memories: Sequence[Tensor]) -> None:
        """Let imitations begin with the means and the spread of what they are to imitate.

        Args:
            memories: each teacher's, of several steps and sequences, [N, P, H, W].
        """
        for m, memory_NPHW in enumerate(memories):
            self.distiller_norm.start_from(memory_NPHW.float(), m)

    def _is_one_operation(self, *maps_BCHW: Tensor) -> bool:
        """Whether distillers, gates and normalisations are of the kinds that `transfer` has."""
        is_usual = (
            self.fuses
            and isinstance(self.gates, Convolution)  # not those of several networks as one
            and self.gates.is_pointwise
            and self.gate_norm is not None
            and self.distiller_norm.affine == "full"
            and self.distillers.weight.dtype == torch.float32
        )
        return (
            is_usual
            and all(each.dtype == torch.float32 for each in maps_BCHW)
            and can_fuse(maps_BCHW[0], maps_BCHW[0].shape[1])
        )

    def _weights(self, memory_BPHW: Tensor) -> TransferWeights:
        assert self.gates.bias is not None and self.gate_norm is not None
        imitation_gain, imitation_shift = self.distiller_norm.lying_like(memory_BPHW)
        gate_gain, gate_shift = self.gate_norm.lying_like(memory_BPHW)
        return TransferWeights(
            distillers=self.distillers.weight,
            gates=self.gates.weight,
            gates_bias=self.gates.bias,
            imitation_gain=imitation_gain,
            imitation_shift=imitation_shift,
            gate_gain=gate_gain,
            gate_shift=gate_shift,
        )
