"""Forecasts that need no training; every model is reported beside them.

Persistence repeats the last frame. Optical flow, for radar, finds how the rain moved and moves it
on: Lucas-Kanade and semi-Lagrangian extrapolation of pysteps (Pulkkinen et al. 2019), an extra.

Shape letters: B batch, T time, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import from_physical, to_physical

FLOW_FRAMES = 4
"""Input frames that the motion is taken from, at most. On the KNMI test event 2 to 10 frames differ
by less than 0.01 in CSI at 20 dBZ; more cost time, fewer find too little on small frames."""
FLOW_DEFINITION = (
    "optical-flow extrapolation by pysteps: dense Lucas-Kanade motion of the last input frames (up "
    f"to {FLOW_FRAMES}; reflectivity in dBZ, other quantities as logarithm), semi-Lagrangian "
    "advection of the last frame with linear interpolation. What flows in from beyond the frame or "
    "from missing pixels takes the value of the nearest observed pixel, so that every forecast is "
    "scored on the same pixels"
)
_LOG_FLOORS: Mapping[str, float] = MappingProxyType(
    {"rain_rate": 0.1, "accumulation": 0.01, "vil": 0.1}
)
"""Below this (mm/h, mm, kg/m2) all is alike when motion is looked for."""


class FlowUnavailableError(ValueError):
    """Optical flow cannot be computed here; says why, and what to do."""


def persistence(inputs_BTCHW: Tensor, num_target_frames: int) -> Tensor:
    """Repeat the last input frame; where it was not observed, the low end of the range.

    Args:
        inputs_BTCHW: observed frames, at least one.
        num_target_frames: frames to predict.

    Returns:
        [B, num_target_frames, C, H, W], a view that shares memory with the input.
    """
    if inputs_BTCHW.shape[1] == 0:
        raise ValueError("Persistence repeats the last input frame, but no frame was given.")
    return inputs_BTCHW[:, -1:].expand(-1, num_target_frames, -1, -1, -1)


class _Library(NamedTuple):
    """The two functions of pysteps."""

    motion: Callable[..., NDArray[np.float64]]
    extrapolate: Callable[..., NDArray[np.float64]]


class OpticalFlow:
    """Extrapolation of radar fields along their motion, sequence by sequence.

    Args:
        units: of the archive.

    Raises:
        FlowUnavailableError: pysteps or OpenCV is not installed.
    """

    def __init__(self, units: Units) -> None:
        self._units = units
        self._library = _load_pysteps()

    def forecast(
        self, inputs_BTCHW: Tensor, observed_BTCHW: Tensor | None, num_target_frames: int
    ) -> Tensor:
        """Continue sequences.

        Args:
            inputs_BTCHW: frames in [0, 1], at least two.
            observed_BTCHW: False where nothing was observed; None: observed everywhere.
            num_target_frames: frames to predict.

        Returns:
            float32 [B, num_target_frames, C, H, W] in [0, 1], finite.
        """
        if inputs_BTCHW.shape[1] < 2:
            raise ValueError("Motion is seen in two frames at least, but one was given.")
        physical = to_physical(inputs_BTCHW.double(), self._units).cpu()
        if observed_BTCHW is not None:
            physical = physical.masked_fill(~observed_BTCHW.cpu(), torch.nan)
        forecasts = [
            [
                self._continue(frames_THW, num_target_frames)
                for frames_THW in frames_TCHW.transpose(0, 1).numpy()
            ]
            for frames_TCHW in physical
        ]
        values_BTCHW = torch.from_numpy(np.array(forecasts)).transpose(1, 2)
        return from_physical(values_BTCHW, self._units).clamp(0, 1).float()

    def _continue(self, frames_THW: NDArray[np.float64], num_frames: int) -> NDArray[np.float64]:
        """One sequence in physical units, NaN where not observed; the forecast has no NaN."""
        from scipy.ndimage import distance_transform_edt  # type: ignore[import-untyped]

        observed_HW = np.isfinite(frames_THW[-1])
        if not observed_HW.any():
            return np.full((num_frames, *observed_HW.shape), self._units.offset)
        # On crops of real events this beats "no echo" by up to 0.04 in CSI at 20 dBZ: a baseline
        # should not lose by its choice of padding.
        nearest = distance_transform_edt(~observed_HW, return_distances=False, return_indices=True)
        filled_HW = frames_THW[-1][tuple(nearest)]
        motion = self._motion(frames_THW[-FLOW_FRAMES:])
        return self._library.extrapolate(
            filled_HW, motion, num_frames, map_coordinates_mode="nearest"
        )

    def _motion(self, frames_THW: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pixels per frame towards east and south, [2, H, W]; zero where none is to be seen."""
        empty_T = ~np.isfinite(frames_THW).any(axis=(1, 2))
        if empty_T.any():  # motion cannot be followed through a frame without any pixel
            frames_THW = frames_THW[np.flatnonzero(empty_T)[-1] + 1 :]
        if len(frames_THW) < 2:
            return np.zeros((2, *frames_THW.shape[1:]))
        floor = _LOG_FLOORS.get(self._units.quantity)
        if floor is not None:
            frames_THW = 10 * np.log10(np.maximum(frames_THW, floor))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few vectors: outliers cannot be told, which is fine
            return self._library.motion(np.ma.masked_invalid(frames_THW))


def _load_pysteps() -> _Library:
    """Import pysteps without the lines that it prints; it takes a second or two.

    Raises:
        FlowUnavailableError: it is not installed, or without OpenCV.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cv2  # noqa: F401  pysteps asks for it only when it is too late
            from pysteps import (  # type: ignore[import-untyped]
                extrapolation,
                motion,
            )
    except ImportError as error:
        raise FlowUnavailableError(
            f"pip install 'tmu-dist[flow]' (pysteps and OpenCV; {error})"
        ) from error
    lucas_kanade: Any = motion.get_method("LK")
    return _Library(lucas_kanade, extrapolation.get_method("semilagrangian"))
