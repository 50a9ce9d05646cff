"""Applies a run's settings of how numbers are computed to a network."""

from __future__ import annotations

from torch import nn

from tmu_dist.config import ComputeConfig
from tmu_dist.models.cells.convlstm import ConvLSTMCell
from tmu_dist.models.convolution import Convolution
from tmu_dist.models.layer import RecurrentLayer
from tmu_dist.models.norm import MapLayerNorm
from tmu_dist.models.tmu import MemoryTransfer


def arrange(network: nn.Module, compute: ComputeConfig) -> None:
    """Choose the algorithms of a network; its weights stay as they are.

    A network that was never arranged computes as with the default settings. Settings that are not
    of single networks (batched teachers, CUDA graphs) are left to whoever runs them.
    """
    for module in network.modules():
        if isinstance(module, Convolution):
            module.algorithm = compute.convolution
        elif isinstance(module, ConvLSTMCell | MapLayerNorm | MemoryTransfer):
            module.fuses = compute.arithmetic == "auto"
        elif isinstance(module, RecurrentLayer):
            module.recomputes = compute.recompute
            if compute.arithmetic == "compiled":
                module.compile_step()
