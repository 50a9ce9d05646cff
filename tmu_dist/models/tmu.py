"""The Transferable Memory Unit: memory distillers and transfer gates (`layer` puts them in place).

Legend: B batch, M teachers, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tmu_dist.models.convolution import Convolution
from tmu_dist.models.fused import can_fuse, fuse
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
        device = "cpu" if memory_BPHW.is_meta else memory_BPHW.device.type  # it knows no "meta"
        with torch.autocast(device, enabled=False):
            # Frozen teachers may keep their filters in bfloat16.
            read_BPHW = memory_BPHW.to(self.distillers.weight.dtype)
            imitations = self.distiller_norm(self.distillers(read_BPHW))
        gates = self.gates(x_BCHW, hidden_BPHW)
        if self.gate_norm is not None:
            gates = self.gate_norm(gates)
        scale = 1 / (1 + self.num_teachers) if self.combine == "mean" else 1.0
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
