"""How the frames of a sequence become colours: grey, RGB, or the colours of a physical quantity.

Deliberately not here: laying pictures out (`pictures`).

Shape letters: T time, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from numpy.typing import NDArray

from tmu_dist.colours import OUTLINE, ColourScale, colour_scale, paint
from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import to_physical
from tmu_dist.evaluation.examples import Example, Frames
from tmu_dist.evaluation.rain import is_radar

ERROR_COLOURS = LinearSegmentedColormap.from_list(
    "error", ["#a8dcff", "#2f86d6", "#000000", "#dd6a1f", "#ffd5a6"]
)
"""Blue where the prediction is too dark, black where it is right, orange where too bright."""
RADAR_ERROR_COLOURS = LinearSegmentedColormap.from_list(
    "radar error", ["#0d3f73", "#5a9bd4", "#f7f8f8", "#e58d4a", "#8a3405"]
)
"""The same on the light ground of radar pictures: blue too weak, orange too strong."""
_RADAR_ERROR_PART = 0.5
"""Part of the stored range at which the error scale of radar ends: larger errors are rare."""


class Look:
    """Video: numbers in [0, 1] as grey or RGB; errors from -1 to 1."""

    label = ""
    """Unit of the numbers; "" where they need no scale of their own."""
    outline: str | None = None
    """Colour of a thin line around frames and scales that would fade into the page."""
    error_colours = ERROR_COLOURS

    def image(self, frame_CHW: Frames) -> NDArray[Any]:
        """Grey [H, W] or RGB [H, W, 3]."""
        if len(frame_CHW) not in (1, 3):
            raise ValueError(
                f"Only grey (1) and RGB (3 channels) frames can be drawn, not {len(frame_CHW)}."
            )
        clipped = np.clip(frame_CHW, 0, 1)
        return clipped[0] if len(clipped) == 1 else clipped.transpose(1, 2, 0)

    def errors(self, forecast_TCHW: Frames, truth_TCHW: Frames) -> list[NDArray[Any]]:
        """Clipped prediction minus truth as RGB [H, W, 3] per known frame, mean over channels."""
        known = min(len(forecast_TCHW), len(truth_TCHW))
        error_TCHW = np.clip(forecast_TCHW[:known], 0, 1) - truth_TCHW[:known]
        return [self.error_image(error_HW) for error_HW in error_TCHW.mean(axis=1)]

    def error_image(self, error_HW: NDArray[Any]) -> NDArray[Any]:
        """RGB [H, W, 3] of one frame."""
        return self.error_colours((error_HW + 1) / 2)[..., :3]

    def ramp(self, count: int) -> NDArray[np.float64]:
        """All colours of the frames from low to high, RGB [count, 3] in [0, 1]."""
        return np.repeat(np.linspace(0, 1, count)[:, None], 3, axis=1)

    def draw_values(self, axes: Axes) -> None:
        """The colour scale of the frames."""
        axes.imshow(self.ramp(256)[None], aspect="auto", extent=(0, 1, 0, 1))
        _name_ends(axes, [0, 1], ["0 dark", "bright 1"])

    def draw_errors(self, axes: Axes) -> None:
        """The colour scale of the errors."""
        self._draw_error_ramp(axes)
        _name_ends(axes, [-1, 0, 1], ["−1 too dark", "0", "too bright +1"])

    def _draw_error_ramp(self, axes: Axes) -> None:
        ramp = self.error_colours(np.linspace(0, 1, 256)[None])
        axes.imshow(ramp, aspect="auto", extent=(-1, 1, 0, 1))


class FieldLook(Look):
    """Radar, and any other field with missing pixels: the colours of its quantity, or grey, and
    hatching where nothing was observed."""

    outline = OUTLINE
    error_colours = RADAR_ERROR_COLOURS

    def __init__(self, units: Units, *, has_missing: bool) -> None:
        self.has_missing = has_missing
        self._units = units
        self._span = units.max_code * units.scale
        self._scale = colour_scale(units)
        self.label = "value" if units.unit == "1" else units.unit

    def image(self, frame_CHW: Frames) -> NDArray[Any]:
        """RGB [H, W, 3], 8 bits."""
        if len(frame_CHW) != 1:
            raise ValueError(
                f"A frame of {self._units.quantity} has one channel, not {len(frame_CHW)}."
            )
        values_HW = to_physical(np.clip(frame_CHW[0], 0, 1), self._units)
        return paint(values_HW, self._scale)

    def error_image(self, error_HW: NDArray[Any]) -> NDArray[Any]:
        missing_HW = np.isnan(error_HW)
        scaled_HW = np.where(missing_HW, 0.0, error_HW) / _RADAR_ERROR_PART
        colours = super().error_image(scaled_HW.clip(-1, 1))
        return np.where(missing_HW[..., None], self.missing(*error_HW.shape) / 255, colours)

    def missing(self, height: int, width: int) -> NDArray[np.uint8]:
        """What "not observed" looks like, RGB [H, W, 3]."""
        return paint(np.full((height, width), np.nan), self._scale)

    def ramp(self, count: int) -> NDArray[np.float64]:
        colours = _step_colours(self._scale)
        return np.repeat(colours, -(-count // len(colours)), axis=0)[:count]

    def draw_values(self, axes: Axes) -> None:
        colours = _step_colours(self._scale)
        axes.imshow(
            colours[None], aspect="auto", extent=(0, len(colours), 0, 1), interpolation="nearest"
        )
        ticks = self._scale.ticks or self._scale.bounds
        places = np.interp(ticks, self._scale.bounds, range(1, len(colours)))
        axes.set_xticks(places, [f"{tick:g}" for tick in ticks])

    def draw_errors(self, axes: Axes) -> None:
        end = f"{_RADAR_ERROR_PART * self._span:g}"
        self._draw_error_ramp(axes)
        _name_ends(axes, [-1, 0, 1], [f"−{end} too weak", "0", f"too strong +{end}"])


def look_of(example: Example) -> Look:
    """How an example is drawn."""
    frames = (example.inputs_TCHW, example.truth_TCHW)
    has_missing = any(bool(np.isnan(frames_TCHW).any()) for frames_TCHW in frames)
    units = example.units
    if units is not None and (is_radar(units) or (has_missing and frames[0].shape[1] == 1)):
        return FieldLook(units, has_missing=has_missing)
    return Look()


def _step_colours(scale: ColourScale) -> NDArray[np.float64]:
    """RGB of every step, that below the first bound included."""
    return np.array([to_rgb(text) for text in (scale.below_colour, *scale.colours)])


def _name_ends(axes: Axes, places: Sequence[float], texts: Sequence[str]) -> None:
    """Ticks whose first and last labels end where the scale ends."""
    axes.set_xticks(places, texts)
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")
