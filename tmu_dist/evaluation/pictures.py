"""Pictures of frames: strips of one sequence over time, and animations.

Frames are drawn pixel by pixel, without smoothing: video as it is, radar in the colours of its
quantity, hatched where nothing was observed. Errors are signed, prediction minus truth, on one
fixed scale, so that pictures of different models can be compared.

Deliberately not here: charts (`plots`), how frames become colours (`looks`), choosing what to show
(`report`, the commands).

Shape letters: T time, C channels, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from tmu_dist.evaluation.examples import Example, Frames, evenly_spaced
from tmu_dist.evaluation.looks import ERROR_COLOURS, FieldLook, Look, look_of
from tmu_dist.evaluation.plots import (
    FONT_POINTS,
    LETTER_INCHES,
    LIGHT,
    Theme,
    axes_in_inches,
    text_in_inches,
)
from tmu_dist.evaluation.result import FLOW, FORECAST_LABELS
from tmu_dist.files import atomic_file

__all__ = ["ERROR_COLOURS", "prediction_strip", "write_gif"]

_CELL_INCHES = 0.66
_GAP = 0.05
"""Between neighbouring frames, in widths of a frame."""


class _Row(NamedTuple):
    label: str
    colour: str
    images: list[NDArray[Any] | None]
    times: list[int] | None
    """Times to write above the row."""
    space_above: float
    """In widths of a frame."""


def prediction_strip(example: Example, *, theme: Theme = LIGHT, max_columns: int = 20) -> Figure:
    """Inputs, truth, and under it each model's prediction and signed error; columns are times.

    Inputs stand above the targets, so a strip is as wide as its longer half. Every column is
    labelled with its time t, where t = 1 is the first input.

    Args:
        example: what to draw.
        theme: colours of the text.
        max_columns: longer rows show this many evenly spaced times.
    """
    look = look_of(example)
    num_inputs = len(example.inputs_TCHW)
    inputs = evenly_spaced(num_inputs, max_columns)
    targets = evenly_spaced(example.num_target_frames, max_columns)
    target_times = [num_inputs + 1 + t for t in targets]

    def pick(frames_TCHW: Frames, times: Sequence[int]) -> list[NDArray[Any] | None]:
        return [look.image(frames_TCHW[t]) if t < len(frames_TCHW) else None for t in times]

    rows = [
        _Row("input", theme.ink, pick(example.inputs_TCHW, inputs), [t + 1 for t in inputs], 0.35),
        _Row("truth", theme.ink, pick(example.truth_TCHW, targets), target_times, 0.45),
    ]
    for index, (label, forecast_TCHW) in enumerate(example.forecasts_TCHW.items()):
        colour = theme.muted if label == FORECAST_LABELS[FLOW] else theme.colour(index)
        errors = look.errors(forecast_TCHW, example.truth_TCHW)
        shown = [errors[t] if t < len(errors) else None for t in targets]
        rows.append(_Row(label, colour, pick(forecast_TCHW, targets), None, 0.16))
        rows.append(_Row("error", theme.muted, shown, None, _GAP))
    return _draw_rows(rows, look, theme)


def write_gif(path: Path, example: Example, label: str, *, ms_per_frame: int = 180) -> None:
    """Animate truth, prediction and error of one model side by side, with their scales.

    While the model watches the inputs, its panel is empty. The last frame is held for a second.

    Args:
        path: file to write.
        example: one sequence.
        label: which of the example's forecasts.
        ms_per_frame: duration of a frame in milliseconds.
    """
    look = look_of(example)
    figure, panels, heading = _gif_stage(example.inputs_TCHW[0], label, look)
    pages = []
    for caption, images in _gif_script(example, label, look):
        heading.set_text(caption)
        for panel, image in zip(panels, images, strict=True):
            panel.set_visible(image is not None)
            if image is not None:
                panel.set_data(image)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        pages.append(Image.open(buffer).convert("RGB"))
    palette = _common_palette(pages[-1], look)
    first, *rest = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    durations = [ms_per_frame] * len(rest) + [1000]
    with atomic_file(path) as staging:
        first.save(staging, save_all=True, append_images=rest, duration=durations, loop=0)


def _gif_script(
    example: Example, label: str, look: Look
) -> Iterator[tuple[str, list[NDArray[Any] | None]]]:
    """Caption, and images of truth, prediction and error, at each time."""
    truth_TCHW, forecast_TCHW = example.truth_TCHW, example.forecasts_TCHW[label]
    errors = look.errors(forecast_TCHW, truth_TCHW)
    num_inputs = len(example.inputs_TCHW)
    for t, frame_CHW in enumerate(example.inputs_TCHW):
        yield f"t = {t + 1}   input", [look.image(frame_CHW), None, None]
    for t, frame_CHW in enumerate(forecast_TCHW):
        known = t < len(truth_TCHW)
        truth, error = (look.image(truth_TCHW[t]), errors[t]) if known else (None, None)
        caption = f"t = {num_inputs + t + 1}   forecast, lead time {t + 1}"
        yield caption, [truth, look.image(frame_CHW), error]


def _common_palette(page: Image.Image, look: Look) -> Image.Image:
    """One palette for all pages, so that colours don't flicker from page to page.

    It is taken from a page and from both colour scales drawn large: at their true size they would
    be too small to get their share of the 256 colours.
    """
    ramp = np.linspace(0, 1, page.width)
    scales = np.stack([look.error_colours(ramp)[:, :3], look.ramp(page.width)])
    large_scales = np.repeat((scales * 255).astype(np.uint8), 100, axis=0)
    return Image.fromarray(np.concatenate([np.asarray(page), large_scales])).quantize(256)


def _gif_stage(frame_CHW: Frames, label: str, look: Look) -> tuple[Figure, list[AxesImage], Text]:
    """An empty stage: three panels with titles and scales, and the heading that tells the time."""
    channels, height, width = frame_CHW.shape
    panel_width, gap, left = 2.2, 0.22, 0.25
    panel_height = panel_width * height / width
    total = (2 * left + 3 * panel_width + 2 * gap, panel_height + 1.35)
    figure = Figure(figsize=total, facecolor=LIGHT.background)
    panels = []
    for index, title in enumerate(("truth", label, f"error of {label}")):
        x = left + index * (panel_width + gap)
        axes = axes_in_inches(figure, x, 0.62, panel_width, panel_height)
        axes.set_title(title, loc="left", fontsize=FONT_POINTS + 1, color=LIGHT.ink, pad=5)
        axes.set(xticks=[], yticks=[], facecolor="#eef0f2")
        _frame(axes, look)
        is_error = index == 2
        blank = np.zeros((height, width, 3) if is_error or channels == 3 else (height, width))
        panels.append(axes.imshow(blank, cmap="gray", vmin=0, vmax=1, interpolation="nearest"))
        if is_error or (index == 0 and channels == 1):
            scale = axes_in_inches(figure, x, 0.36, panel_width, 0.09)
            draw = look.draw_errors if is_error else look.draw_values
            _style_scale(scale, draw, look, LIGHT)
    if look.label and channels == 1:
        text_in_inches(
            figure,
            left + panel_width + gap,
            0.4,
            look.label,
            color=LIGHT.muted,
            fontsize=FONT_POINTS - 1,
        )
    heading = text_in_inches(
        figure, left, total[1] - 0.22, "", color=LIGHT.ink, fontsize=FONT_POINTS + 2
    )
    return figure, panels, heading


def _style_scale(axes: Axes, draw: Callable[[Axes], None], look: Look, theme: Theme) -> None:
    """A horizontal colour scale with its ends named."""
    draw(axes)
    axes.set_yticks([])
    axes.tick_params(length=0, pad=3, labelsize=FONT_POINTS - 1, colors=theme.muted)
    _frame(axes, look)


def _frame(axes: Axes, look: Look) -> None:
    """The look's outline around axes, or nothing."""
    axes.spines[:].set_visible(look.outline is not None)
    if look.outline is not None:
        axes.spines[:].set(color=look.outline, linewidth=0.5)


def _draw_rows(rows: Sequence[_Row], look: Look, theme: Theme) -> Figure:
    """Frames on a grid measured in widths of a frame, row labels left, scales below."""
    num_columns = max(len(row.images) for row in rows)
    height, width = next(im.shape[:2] for row in rows for im in row.images if im is not None)
    aspect = height / width
    grid_width = num_columns * (1 + _GAP) - _GAP
    grid_height = sum(aspect + row.space_above for row in rows)
    left = LETTER_INCHES * max(len(row.label) for row in rows) + 0.25
    below = 1.1 if look.label else 0.62
    inches = (grid_width * _CELL_INCHES, grid_height * _CELL_INCHES)
    size = (left + inches[0] + 0.08, below + inches[1])
    figure = Figure(figsize=size, facecolor=theme.background)
    axes = axes_in_inches(figure, left, below, *inches)
    top = 0.0
    for row in rows:
        top += row.space_above
        _draw_row(axes, row, top, aspect, look, theme)
        top += aspect
    axes.axis("off")
    axes.set(xlim=(0, grid_width), ylim=(grid_height, 0), aspect="auto")
    small: dict[str, Any] = {"color": theme.muted, "fontsize": FONT_POINTS}
    scale_width = min(2.4, inches[0])
    scale = axes_in_inches(figure, left, 0.32, scale_width, 0.08)
    _style_scale(scale, look.draw_errors, look, theme)
    text_in_inches(figure, left - 0.1, 0.36, "error", ha="right", **small)
    if look.label:
        scale = axes_in_inches(figure, left, 0.8, scale_width, 0.08)
        _style_scale(scale, look.draw_values, look, theme)
        text_in_inches(figure, left - 0.1, 0.84, look.label, ha="right", **small)
    if isinstance(look, FieldLook) and look.has_missing:
        swatch = axes_in_inches(figure, left + scale_width + 0.25, 0.8, 0.2, 0.08)
        swatch.imshow(look.missing(8, 20), aspect="auto", interpolation="nearest")
        swatch.set(xticks=[], yticks=[])
        _frame(swatch, look)
        text_in_inches(figure, left + scale_width + 0.5, 0.84, "not observed", **small)
    return figure


def _draw_row(axes: Axes, row: _Row, top: float, aspect: float, look: Look, theme: Theme) -> None:
    grey: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
    label: dict[str, Any] = {"ha": "right", "va": "center", "color": row.colour}
    time: dict[str, Any] = {"ha": "center", "va": "bottom", "color": theme.muted}
    axes.text(-0.15, top + aspect / 2, row.label, fontsize=FONT_POINTS, **label)
    for column, image in enumerate(row.images):
        x = column * (1 + _GAP)
        if image is not None:
            place = (x, x + 1, top + aspect, top)
            axes.imshow(image, extent=place, interpolation="nearest", **grey)
            if look.outline is not None:
                frame = Rectangle(
                    (x, top), 1, aspect, fill=False, color=look.outline, linewidth=0.5
                )
                axes.add_patch(frame)
        if row.times is not None:
            text = f"t = {row.times[column]}" if column == 0 else str(row.times[column])
            axes.text(x + 0.5, top - 0.08, text, fontsize=FONT_POINTS - 1, **time)
