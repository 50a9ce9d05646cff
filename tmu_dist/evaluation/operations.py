"""How many operations a network needs: convolutions and matrix products, counted as they run.

Legend: B batch, T time, C channels, Z noise, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tmu_dist.config import WindowConfig
from tmu_dist.models.convolution import counted
from tmu_dist.models.rollout import Predictor
from tmu_dist.models.shapes import FrameShape


def count_operations(run: Callable[[], object]) -> int:
    """Operations of convolutions and matrix products; a product with its sum is two."""
    # The counter does not know the fused attention of every device, but knows its products.
    with counted(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def forward_operations(network: Predictor, frame: FrameShape, window: WindowConfig) -> int:
    """Operations of unrolling a network over one training sequence, without gradients."""
    size = frame.channels, frame.height, frame.width
    frames_BTCHW = torch.zeros(1, window.num_frames, *size)
    noise_BTZ = (
        torch.zeros(1, window.num_frames - 1, network.latent_size) if network.latent_size else None
    )
    mask_BT = torch.ones(1, window.num_target_frames - 1, dtype=torch.bool)

    @torch.no_grad()
    def unroll() -> object:
        return network(
            frames_BTCHW,
            num_input_frames=window.num_input_frames,
            num_frames=window.num_frames,
            sampling_mask_BT=mask_BT,
            noise_BTZ=noise_BTZ,
        )

    return count_operations(unroll)
