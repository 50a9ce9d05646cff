"""How SAVP paints the next frame: moved copies of the last one, and masks that choose from them.

Lee et al. 2018, appendix A; kernels after Finn et al. 2016 (arXiv:1605.07157).

Legend: B batch, N moved copies, K candidates, C channels, H, W height, width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.models.savp.blocks import NormalisedConv, initialised
from tmu_dist.models.shapes import MemoryShape

KERNEL_SIZE = 5
"""Of the kernels that move pixels: at most two pixels a step in each direction."""


class ImageKernels(nn.Module):
    """cdna: N kernels for the whole image, from the encoder's last maps.

    Args:
        encoded: shape of those maps; the dense layer ties the network to this frame size.
        num_transformed: moved copies (N).
    """

    def __init__(self, encoded: MemoryShape, num_transformed: int) -> None:
        super().__init__()
        self.encoded = encoded
        self.num_transformed = num_transformed
        features = encoded.channels * encoded.height * encoded.width
        self.dense = initialised(nn.Linear(features, KERNEL_SIZE**2 * num_transformed))

    def forward(self, frame_BCHW: Tensor, encoded_BCHW: Tensor, decoded_BCHW: Tensor) -> Tensor:
        """Moved copies [B, N, C, H, W].

        Raises:
            ValueError: frames of another size than the network was built for.
        """
        if tuple(encoded_BCHW.shape[2:]) != (self.encoded.height, self.encoded.width):
            times = frame_BCHW.shape[2] // encoded_BCHW.shape[2]
            raise ValueError(
                f"This network was built for frames of {self.encoded.height * times}x"
                f"{self.encoded.width * times} pixels, got {frame_BCHW.shape[2]}x"
                f"{frame_BCHW.shape[3]}. Use frames of the trained size, or train with "
                "model.savp.transformation=flow or dna, which work at any size."
            )
        weights = self.dense(encoded_BCHW.flatten(1)).unflatten(1, (-1, self.num_transformed))
        kernels_BSN = as_kernels(weights.to(frame_BCHW.dtype))
        return convolve_each(frame_BCHW, kernels_BSN)


class PixelKernels(nn.Module):
    """dna: N kernels for every pixel, from the decoder's output."""

    def __init__(self, in_channels: int, channels: int, num_transformed: int) -> None:
        super().__init__()
        self.num_transformed = num_transformed
        self.features = NormalisedConv(in_channels, channels)
        self.kernels = initialised(
            nn.Conv2d(channels, KERNEL_SIZE**2 * num_transformed, 3, padding=1)
        )

    def forward(self, frame_BCHW: Tensor, encoded_BCHW: Tensor, decoded_BCHW: Tensor) -> Tensor:
        """Moved copies [B, N, C, H, W]."""
        weights = self.kernels(self.features(decoded_BCHW)).to(frame_BCHW.dtype)
        kernels_BSNHW = as_kernels(weights.unflatten(1, (-1, self.num_transformed)))
        windows_BCSP = F.unfold(_mirror_padded(frame_BCHW), KERNEL_SIZE).unflatten(
            1, (frame_BCHW.shape[1], -1)
        )
        windows_BCSHW = windows_BCSP.unflatten(3, frame_BCHW.shape[2:])
        return torch.stack(
            [
                (windows_BCSHW * kernels_BSHW.unsqueeze(1)).sum(2)
                for kernels_BSHW in kernels_BSNHW.unbind(2)
            ],
            dim=1,
        )


class Flow(nn.Module):
    """flow: N displacements of every pixel, from the decoder's output."""

    def __init__(self, in_channels: int, channels: int, num_transformed: int) -> None:
        super().__init__()
        self.num_transformed = num_transformed
        self.features = NormalisedConv(in_channels, channels)
        self.displacements = initialised(nn.Conv2d(channels, 2 * num_transformed, 3, padding=1))

    def forward(self, frame_BCHW: Tensor, encoded_BCHW: Tensor, decoded_BCHW: Tensor) -> Tensor:
        """Moved copies [B, N, C, H, W]."""
        flow = self.displacements(self.features(decoded_BCHW)).to(frame_BCHW.dtype)
        flow_BDNHW = flow.unflatten(1, (2, self.num_transformed))
        return torch.stack([warped(frame_BCHW, each) for each in flow_BDNHW.unbind(2)], dim=1)


def as_kernels(weights: Tensor) -> Tensor:
    """Kernels that are positive and sum to 1 over axis 1: row by row, 25 entries.

    The identity is added, so that weights of 0 leave the image as it is.
    """
    identity = torch.zeros_like(weights)
    identity[:, KERNEL_SIZE**2 // 2] = 1.0
    smallest = 1e-12
    positive = F.relu(weights + identity - smallest) + smallest
    return positive / positive.sum(1, keepdim=True)


def convolve_each(frame_BCHW: Tensor, kernels_BSN: Tensor) -> Tensor:
    """Cross-correlate every channel of a sample with each of the sample's kernels, [B, N, C, H, W].

    Channels take the place of the batch and samples that of groups. Never in half precision: the
    next frame's pixels are copied here.
    """
    samples, _, copies = kernels_BSN.shape
    filters = kernels_BSN.transpose(1, 2).reshape(-1, 1, KERNEL_SIZE, KERNEL_SIZE)
    device = "cpu" if frame_BCHW.is_meta else frame_BCHW.device.type  # autocast knows no "meta"
    with torch.autocast(device, enabled=False):
        moved = F.conv2d(_mirror_padded(frame_BCHW).transpose(0, 1), filters, groups=samples)
    return moved.unflatten(1, (samples, copies)).permute(1, 2, 0, 3, 4)


def warped(frame_BCHW: Tensor, flow_BDHW: Tensor) -> Tensor:
    """Each pixel taken from where a flow (x, then y; in pixels) points to, bilinearly.

    Places outside the image are moved to its edge.
    """
    height, width = frame_BCHW.shape[2:]
    columns = torch.arange(width, dtype=flow_BDHW.dtype, device=flow_BDHW.device)
    rows = torch.arange(height, dtype=flow_BDHW.dtype, device=flow_BDHW.device)
    x = (flow_BDHW[:, 0] + columns) * (2 / (width - 1)) - 1
    y = (flow_BDHW[:, 1] + rows[:, None]) * (2 / (height - 1)) - 1
    return F.grid_sample(
        frame_BCHW, torch.stack([x, y], -1), padding_mode="border", align_corners=True
    )


def _mirror_padded(frame_BCHW: Tensor) -> Tensor:
    """Two more pixels on each side, mirrored with the edge pixel repeated."""
    for dim in (2, 3):
        size = frame_BCHW.shape[dim]
        before, after = frame_BCHW.narrow(dim, 0, 2), frame_BCHW.narrow(dim, size - 2, 2)
        frame_BCHW = torch.cat([before.flip(dim), frame_BCHW, after.flip(dim)], dim)
    return frame_BCHW


class Composition(nn.Module):
    """A scratch image, and masks that mix it with the candidates to the next frame.

    Args:
        in_channels: of the decoder's output.
        channels: of the inner maps.
        image_channels: of a frame.
        num_candidates: images to choose from, without the scratch image.
    """

    def __init__(
        self, in_channels: int, channels: int, image_channels: int, num_candidates: int
    ) -> None:
        super().__init__()
        total = num_candidates + 1
        self.scratch = nn.Sequential(
            NormalisedConv(in_channels, channels),
            initialised(nn.Conv2d(channels, image_channels, 3, padding=1)),
            nn.Sigmoid(),
        )
        self.features = NormalisedConv(in_channels, channels)
        self.masks = initialised(nn.Conv2d(channels + total * image_channels, total, 3, padding=1))

    def forward(self, decoded_BCHW: Tensor, candidates_BKCHW: Tensor) -> Tensor:
        """The next frame [B, C, H, W]: at each pixel a weighted mean of all images."""
        scratch = self.scratch(decoded_BCHW).to(candidates_BKCHW.dtype)
        images_BKCHW = torch.cat([candidates_BKCHW, scratch.unsqueeze(1)], dim=1)
        seen = torch.cat([self.features(decoded_BCHW), images_BKCHW.flatten(1, 2)], dim=1)
        masks_BKHW = self.masks(seen).to(images_BKCHW.dtype).softmax(1)
        return (masks_BKHW.unsqueeze(2) * images_BKCHW).sum(1)
