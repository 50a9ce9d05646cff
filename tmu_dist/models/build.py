"""From settings to a network: the one place that turns names into cells and layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.models.cells.base import RecurrentCell
from tmu_dist.models.cells.convlstm import ConvLSTMCell
from tmu_dist.models.patches import check_divisible
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.stack import RecurrentStack
from tmu_dist.models.tmu import MemoryTransfer, RecurrentLayer


@dataclass(frozen=True, kw_only=True)
class FrameShape:
    """Channels and size of the frames that a network reads and predicts."""

    channels: int
    height: int
    width: int


def build_predictor(
    frame: FrameShape, model: ModelConfig, *, tmu: TMUConfig | None = None, num_slots: int = 0
) -> Predictor:
    """A network with freshly initialised weights (framework defaults, under torch's global seed).

    Args:
        frame: shape of the frames.
        model: architecture.
        tmu: the TMU's settings; needed when `num_slots` > 0.
        num_slots: teachers that each TMU layer has room for (M); 0 builds the plain network.

    Raises:
        ValueError: the patch size does not tile the frames, or slots without TMU settings.
    """
    check_divisible(frame.height, frame.width, model.patch_size)
    if num_slots and tmu is None:
        raise ValueError(f"A network with {num_slots} teacher slots needs TMU settings.")
    map_size = (frame.height // model.patch_size, frame.width // model.patch_size)
    patch_channels = frame.channels * model.patch_size**2
    layers = []
    for k in range(model.num_layers):
        in_channels = patch_channels if k == 0 else model.hidden_channels
        cell = _build_cell(model, in_channels, map_size)
        if tmu is None or not num_slots or (tmu.layers != "all" and k not in tmu.layers):
            layers.append(RecurrentLayer(cell))
            continue
        transfer = MemoryTransfer(
            in_channels,
            model.hidden_channels,
            num_slots,
            map_size=map_size,
            gate_kernel_size=tmu.gate_kernel_size,
            gate_norm=tmu.gate_norm,
            combine=tmu.combine,
            norm_affine=model.norm_affine,
        )
        layers.append(RecurrentLayer(cell, transfer, hidden_from=tmu.hidden_from))
    return Predictor(
        RecurrentStack(layers),
        patch_size=model.patch_size,
        image_channels=frame.channels,
        hidden_channels=model.hidden_channels,
    )


def _build_cell(model: ModelConfig, in_channels: int, map_size: tuple[int, int]) -> RecurrentCell:
    return ConvLSTMCell(
        in_channels,
        model.hidden_channels,
        kernel_size=model.kernel_size,
        map_size=map_size,
        peephole=model.peephole,
        forget_bias=model.forget_bias,
        gate_norm=model.gate_norm,
        norm_affine=model.norm_affine,
    )


def count_parameters(module: nn.Module) -> int:
    """Number of weights, frozen ones included."""
    return sum(p.numel() for p in module.parameters())
