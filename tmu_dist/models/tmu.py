"""The Transferable Memory Unit: memory distillers and transfer gates (`layer` puts them in place).

Legend: B batch, M teachers, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tmu_dist.models.norm import Affine, MapLayerNorm


class MemoryTransfer(nn.Module):
    """The grey box of the paper's Figure 2: imitate M teachers' memories, gate them in.

    The distillers of all teachers are one convolution and one grouped normalisation, and so are
    the transfer gates.

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
        self.distillers = nn.Conv2d(hidden_channels, width, 1, bias=False)
        self.distiller_norm = MapLayerNorm(width, map_size, affine=norm_affine, groups=num_teachers)
        self.gates = nn.Conv2d(
            in_channels + hidden_channels, width, gate_kernel_size, padding=gate_kernel_size // 2
        )
        self.gate_norm = (
            MapLayerNorm(width, map_size, affine=norm_affine) if gate_norm == "layer" else None
        )

    def imitate(self, memory_BPHW: Tensor) -> Tensor:
        """The student's imitation of every teacher's memory, shape [B, M, P, H, W] (Eq. 3)."""
        return self._per_teacher(self.distiller_norm(self.distillers(memory_BPHW)))

    def transfer_gates(self, x_BCHW: Tensor, hidden_BPHW: Tensor) -> Tensor:
        """How much of each imitation flows in, in [0, 1], shape [B, M, P, H, W] (Eq. 5, line 1)."""
        gates = self.gates(torch.cat([x_BCHW, hidden_BPHW], dim=1))
        if self.gate_norm is not None:
            gates = self.gate_norm(gates)
        return torch.sigmoid(self._per_teacher(gates))

    def fuse(self, memory_BPHW: Tensor, imitations_BMPHW: Tensor, gates_BMPHW: Tensor) -> Tensor:
        """The memory after transfer, C (Eq. 5, line 2)."""
        own_BMPHW = memory_BPHW.unsqueeze(1)
        mixed = torch.lerp(
            own_BMPHW.expand_as(imitations_BMPHW),
            imitations_BMPHW.to(own_BMPHW.dtype),
            gates_BMPHW.to(own_BMPHW.dtype),
        )
        fused = memory_BPHW + mixed.sum(dim=1)
        return fused / (1 + self.num_teachers) if self.combine == "mean" else fused

    def _per_teacher(self, maps_BCHW: Tensor) -> Tensor:
        return maps_BCHW.unflatten(1, (self.num_teachers, -1))
