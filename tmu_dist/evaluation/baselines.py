"""Forecasts that need no training; every model is reported beside them.

Deliberately not here: extrapolation along the optical flow.

Shape letters: B batch, T time, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor


def persistence(inputs_BTCHW: Tensor, num_target_frames: int) -> Tensor:
    """Repeat the last input frame.

    Args:
        inputs_BTCHW: observed frames, at least one.
        num_target_frames: frames to predict.

    Returns:
        [B, num_target_frames, C, H, W], a view that shares memory with the input.
    """
    if inputs_BTCHW.shape[1] == 0:
        raise ValueError("Persistence repeats the last input frame, but no frame was given.")
    return inputs_BTCHW[:, -1:].expand(-1, num_target_frames, -1, -1, -1)
