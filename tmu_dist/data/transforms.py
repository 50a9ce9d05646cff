"""Stored frames to the numbers a network sees, and back.

A network sees codes divided by the largest one, so [0, 1] spans the range that the archive stores;
what these numbers mean physically is in the manifest (`Units`). Where nothing was observed it sees
0, the low end of the range, and a mask says so: no loss and no score counts such pixels.
"""

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tmu_dist.config import WindowConfig
from tmu_dist.data.manifest import Units

Numbers = TypeVar("Numbers", Tensor, NDArray[Any])
"""Tensors or NumPy arrays of floating-point numbers, of any shape."""


class Window(NamedTuple):
    """Sequences of one window, ready for a network."""

    frames_BTCHW: Tensor
    """float32 in [0, 1]; 0 where nothing was observed."""
    observed_BTCHW: Tensor | None
    """bool: False where nothing was observed; None when the archive has no missing pixels."""


def to_unit_interval(frames: Tensor, units: Units) -> tuple[Tensor, Tensor | None]:
    """Map stored codes of any shape to float32 in [0, 1], and say which pixels were observed.

    Returns:
        The numbers (codes / max_code; 0 where missing), and the mask of observed pixels, or None
        where the units know no missing code.

    Raises:
        ValueError: the frames are no integers of 8 or 16 bits; scaling twice would go unnoticed.
    """
    if frames.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"to_unit_interval takes uint8 or uint16 codes, got {frames.dtype}.")
    numbers = frames.to(torch.float32)
    if units.missing_code is None:
        return numbers / units.max_code, None
    observed = numbers != units.missing_code
    return (numbers / units.max_code).masked_fill_(~observed, 0.0), observed


def to_uint8(frames: NDArray[Any]) -> NDArray[np.uint8]:
    """Clip to [0, 1], scale to 255 and truncate: the form in which SSIM and PSNR compare images.

    Exact inverse of division by 255 on every one of the 256 values. NaN is an error, because its
    conversion to an integer is undefined.
    """
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"to_uint8 takes floating-point frames, got {frames.dtype}.")
    if np.isnan(frames).any():
        raise ValueError("to_uint8 got NaN: mask missing pixels first.")
    scaled = frames.astype(np.float32, copy=False).clip(0, 1)
    scaled *= 255
    return scaled.astype(np.uint8)


def to_physical(numbers: Numbers, units: Units) -> Numbers:
    """Numbers of the unit interval (true or predicted) in the archive's physical unit."""
    return units.offset + numbers * (units.max_code * units.scale)


def from_physical(values: Numbers, units: Units) -> Numbers:
    """Physical values as numbers of the unit interval, not clipped: inverse of `to_physical`."""
    return (values - units.offset) / (units.max_code * units.scale)


def window_frames(codes_BTCHW: Tensor, window: WindowConfig, units: Units) -> Window:
    """Stored sequences, cut to the window, as a network sees them.

    Raises:
        ValueError: the sequences are shorter than the window.
    """
    check_long_enough(codes_BTCHW.shape[1], window)
    return Window(*to_unit_interval(codes_BTCHW[:, : window.num_frames], units))


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
