"""The Transferable Memory Unit: memory distillers and transfer gates around any recurrent cell.

Legend: B batch, M teachers, C input channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.models.cells.base import Carry, CellState, RecurrentCell
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


class LayerStep(NamedTuple):
    """One layer's time step, with what losses and diagnostics may read."""

    state: CellState
    carry: Carry
    forget_BPHW: Tensor | None
    imitations_BMPHW: Tensor | None = None
    gates_BMPHW: Tensor | None = None


class RecurrentLayer(nn.Module):
    """A cell, with or without memory transfer; without, it is the plain network (M = 0)."""

    def __init__(
        self,
        cell: RecurrentCell,
        transfer: MemoryTransfer | None = None,
        *,
        hidden_from: Literal["fused", "own"] = "fused",
    ) -> None:
        super().__init__()
        self.cell = cell
        self.transfer = transfer
        self.hidden_from = hidden_from

    def forward(self, x_BCHW: Tensor, state: CellState, carry: Carry) -> LayerStep:
        """One time step; the transfer gates read the input and the previous hidden state."""
        proposal = self.cell.propose(x_BCHW, state, carry)
        own = proposal.memory_BPHW
        if self.transfer is None:
            new_state, new_carry = self.cell.emit(proposal, own)
            return LayerStep(new_state, new_carry, proposal.forget_BPHW)

        imitations = self.transfer.imitate(own)
        gates = self.transfer.transfer_gates(x_BCHW, state.hidden_BPHW)
        fused = self.transfer.fuse(own, imitations, gates)
        new_state, new_carry = self.cell.emit(
            proposal, fused if self.hidden_from == "fused" else own
        )
        new_state = new_state._replace(memory_BPHW=fused)
        return LayerStep(new_state, new_carry, proposal.forget_BPHW, imitations, gates)
