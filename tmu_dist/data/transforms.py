"""Stored frames to the numbers a network sees, and back.

Only the plain intensity scale is here. Units with a physical meaning are in the manifest.
"""

import torch
from torch import Tensor

from tmu_dist.config import WindowConfig


def to_unit_interval(frames: Tensor) -> Tensor:
    """Map uint8 frames of any shape to float32 in [0, 1] (divide by 255).

    Raises:
        ValueError: the frames are not uint8; scaling twice would go unnoticed otherwise.
    """
    if frames.dtype != torch.uint8:
        raise ValueError(f"to_unit_interval takes uint8 frames, got {frames.dtype}.")
    return frames.to(torch.float32) / 255


def to_uint8(frames: Tensor) -> Tensor:
    """Clip to [0, 1], scale to 255 and truncate: the form in which SSIM and PSNR compare images.

    Exact inverse of `to_unit_interval` on every one of the 256 values. NaN is an error, because
    its conversion to an integer is undefined.
    """
    if not frames.is_floating_point():
        raise ValueError(f"to_uint8 takes floating-point frames, got {frames.dtype}.")
    if frames.isnan().any():
        raise ValueError("to_uint8 got NaN: mask missing pixels first.")
    return (frames.to(torch.float32).clamp(0, 1) * 255).to(torch.uint8)


def window_frames(frames_BTCHW: Tensor, window: WindowConfig) -> Tensor:
    """Stored frames as numbers in [0, 1], cut to the window.

    Raises:
        ValueError: the sequences are shorter than the window.
    """
    check_long_enough(frames_BTCHW.shape[1], window)
    return to_unit_interval(frames_BTCHW[:, : window.num_frames])


def check_long_enough(num_frames: int, window: WindowConfig) -> None:
    """Refuse sequences of fewer frames than the window.

    Raises:
        ValueError: names both lengths.
    """
    if num_frames < window.num_frames:
        raise ValueError(
            f"The model needs sequences of {window.num_frames} frames ({window.num_input_frames} "
            f"in, {window.num_target_frames} out), but the archive's have {num_frames}: use an "
            "archive with longer sequences, or a shorter window."
        )
