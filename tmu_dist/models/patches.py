"""Frame sub-scaling: frames to maps of k x k patches and back (paper, Sec. 4, Implementation).

Legend: B batch, T time, C image channels, H, W frame height and width, k patch size.
"""

from __future__ import annotations

from torch import Tensor


def check_divisible(height: int, width: int, patch_size: int) -> None:
    """Refuse frames that k x k patches do not tile.

    Raises:
        ValueError: with the sizes that would work.
    """
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"Frames of {height}x{width} pixels are not tiled by {patch_size}x{patch_size} "
            "patches: choose model.patch_size so that it divides height and width, or crop or "
            "pad the frames in data_prep."
        )


def patchify(frames_BTCHW: Tensor, patch_size: int) -> Tensor:
    """Frames [B, T, C, H, W] to maps [B, T, k*k*C, H/k, W/k].

    Channel order (row in patch, column in patch, image channel), the last one fastest: the order
    of the PredRNN family, so that reference vectors are comparable.
    """
    b, t, c, h, w = frames_BTCHW.shape
    k = patch_size
    check_divisible(h, w, k)
    split = frames_BTCHW.reshape(b, t, c, h // k, k, w // k, k)
    return split.permute(0, 1, 4, 6, 2, 3, 5).reshape(b, t, k * k * c, h // k, w // k)


def unpatchify(maps_BTCHW: Tensor, patch_size: int) -> Tensor:
    """The exact inverse of `patchify`."""
    b, t, c, h, w = maps_BTCHW.shape
    k = patch_size
    split = maps_BTCHW.reshape(b, t, k, k, c // (k * k), h, w)
    return split.permute(0, 1, 4, 5, 2, 6, 3).reshape(b, t, c // (k * k), h * k, w * k)
