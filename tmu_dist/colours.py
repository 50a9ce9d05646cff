"""Colours of physical fields, the same in every picture: reflectivity, rain, VIL and grey.

Steps get darker with the value, so their order survives greyscale printing and every kind of colour
vision; hue (blue, violet, red) only helps to tell neighbours apart. Where nothing was observed
there is grey hatching, which no step looks like.

NumPy only; PIL and the letters of matplotlib are imported where a colour bar is drawn.

Shape letters: H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.manifest import Units

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

PAPER = "#ffffff"
"""Below the first bound: no echo, no rain."""
INK, FAINT_INK, OUTLINE = "#1d2327", "#5d676f", "#9aa3aa"
MISSING, MISSING_LINE = "#e9ebed", "#a9b1b7"
"""Hatching where nothing was observed: ground and lines."""

_STEPS = (
    "#cdefee",
    "#a1e0e8",
    "#75cee7",
    "#4ebceb",
    "#40a5ef",
    "#4e8cf1",
    "#756beb",
    "#9447ca",
    "#a22891",
    "#9b0a5a",
    "#85002b",
    "#6b0102",
    "#421301",
)
"""Even steps of lightness, on average over normal, red-blind and green-blind eyes."""
_BOUNDS_DBZ = tuple(float(bound) for bound in range(5, 70, 5))
_BOUNDS_MM_PER_HOUR = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_BOUNDS_KG_PER_M2 = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0)
_NUM_ACCUMULATION_STEPS = 10
_NAMES = {"rain_rate": "rain rate", "vil": "VIL"}
_UNIT_TEXTS = {"kg/m2": "kg/m²"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ColourScale:
    """Which colour stands for which value."""

    label: str
    """Quantity and unit, e.g. "reflectivity [dBZ]"."""
    bounds: tuple[float, ...]
    """Ascending, in the unit: step i goes from bounds[i] up to but not including bounds[i + 1]; the
    last step has no upper end."""
    colours: tuple[str, ...]
    """One "#rrggbb" a step."""
    below_colour: str = PAPER
    """Of every value under the first bound."""
    ticks: tuple[float, ...] = ()
    """Bounds that a colour bar names where there is no room for all; empty: every bound."""
    is_continuous: bool = False
    """The steps are too fine to be told apart: a colour bar draws no borders between them."""

    def __post_init__(self) -> None:
        if not self.bounds or len(self.bounds) != len(self.colours):
            raise ValueError(
                "A colour scale has as many colours as bounds, at least one, got "
                f"{len(self.colours)} and {len(self.bounds)}."
            )
        if not all(a < b for a, b in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"Bounds of a colour scale ascend, got {self.bounds}.")


def colour_scale(units: Units) -> ColourScale:
    """Return the colours of a quantity.

    Reflectivity (dBZ), rain rate (mm/h), accumulation (mm) and VIL (kg/m2) have fixed steps, so
    that pictures of different archives compare; the steps of an accumulation end where its stored
    range ends. Everything else is grey over its stored range, low values dark.
    """
    if (units.quantity, units.unit) == ("reflectivity", "dBZ"):
        every_second = tuple(float(tick) for tick in range(10, 70, 10))
        return _stepped(units, _BOUNDS_DBZ, ticks=every_second)
    if (units.quantity, units.unit) == ("rain_rate", "mm/h"):
        return _stepped(units, _BOUNDS_MM_PER_HOUR, ticks=_BOUNDS_MM_PER_HOUR[::3])
    if (units.quantity, units.unit) == ("vil", "kg/m2"):
        return _stepped(units, _BOUNDS_KG_PER_M2, ticks=(0.1, 1.0, 10.0, 50.0))
    if (units.quantity, units.unit) == ("accumulation", "mm"):
        bounds = _one_two_five(_range_of(units)[1], _NUM_ACCUMULATION_STEPS)
        return _stepped(units, bounds, ticks=bounds[::-3][::-1])
    return _grey(units)


def physical(codes: NDArray[Any], units: Units) -> NDArray[np.float32]:
    """Return stored codes of any shape in their physical unit; NaN where nothing was observed."""
    values = (codes.astype(np.float32) * units.scale + units.offset).astype(np.float32)
    if units.missing_code is not None:
        values[codes == units.missing_code] = np.nan
    return values


def paint(
    values_HW: NDArray[Any], scale: ColourScale, *, hatch_px: int | None = None
) -> NDArray[np.uint8]:
    """Colour a field, pixel by pixel.

    Args:
        values_HW: in the scale's unit; NaN where nothing was observed: that becomes hatching.
        scale: the colours.
        hatch_px: distance of the hatching's lines. None: a part of the field's size, so that the
            lines are still there when the picture is shown smaller.

    Returns:
        RGB [H, W, 3].

    Raises:
        ValueError: the field is not two-dimensional.
    """
    if values_HW.ndim != 2:
        raise ValueError(f"paint takes one field [H, W], got shape {values_HW.shape}.")
    palette = np.array([_rgb(text) for text in (scale.below_colour, *scale.colours)], np.uint8)
    values_HW = values_HW.astype(np.float32, copy=False)
    missing_HW = np.isnan(values_HW)
    bounds = np.asarray(scale.bounds, np.float32)  # as rounded as the values: 0.1 reaches 0.1
    steps_HW = np.searchsorted(bounds, np.where(missing_HW, -np.inf, values_HW), side="right")
    rgb_HW3 = palette[steps_HW]
    if missing_HW.any():
        rgb_HW3[missing_HW] = _hatching(values_HW.shape[0], values_HW.shape[1], hatch_px)[
            missing_HW
        ]
    return rgb_HW3


def draw_colour_bar(
    scale: ColourScale,
    width: int,
    height: int,
    *,
    paper: str = PAPER,
    ink: str = INK,
    shows_missing: bool = True,
) -> Image:
    """Draw a colour bar with its name and unit, its numbers, and what missing areas look like.

    It lies when it is wider than high, else it stands, low values at the bottom.

    Args:
        scale: the colours.
        width: of the picture in pixels; lying bars read well from 240.
        height: of the picture in pixels; lying bars need 48, standing ones 160.
        paper: colour of the background.
        ink: colour of the text.
        shows_missing: add the swatch "no data".

    Raises:
        ValueError: less room than 40 x 40 pixels.
    """
    from PIL import Image, ImageDraw

    if width < 40 or height < 40:
        raise ValueError(f"A colour bar needs at least 40 x 40 pixels, got {width} x {height}.")
    picture = Image.new("RGB", (width, height), paper)
    draw = _draw_lying if width >= height else _draw_standing
    draw(ImageDraw.Draw(picture), scale, width, height, ink, shows_missing)
    if shows_missing:
        _paste_swatch(picture, *_swatch_box(width, height))
    return picture


def picture_font(size_px: int, *, bold: bool = False) -> FreeTypeFont:
    """Return the letters of pictures: those of the charts, with every sign that units need."""
    from pathlib import Path

    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", name)), size_px)


def tick_label(value: float) -> str:
    """Write a bound as short as possible: 0.1, 5, 100."""
    return f"{value:g}"


def _stepped(units: Units, bounds: tuple[float, ...], ticks: tuple[float, ...]) -> ColourScale:
    chosen = np.linspace(0, len(_STEPS) - 1, len(bounds)).round().astype(int)
    return ColourScale(
        label=_label(units), bounds=bounds, colours=tuple(_STEPS[i] for i in chosen), ticks=ticks
    )


def _grey(units: Units) -> ColourScale:
    low, high = _range_of(units)
    # The first step holds all values below the second bound: the scale's low end is black.
    bounds = tuple(low + (high - low) * (step - 0.5) / 255 for step in range(1, 256))
    return ColourScale(
        label=_label(units),
        bounds=bounds,
        colours=tuple(f"#{step:02x}{step:02x}{step:02x}" for step in range(1, 256)),
        below_colour="#000000",
        ticks=(low, (low + high) / 2, high),
        is_continuous=True,
    )


def _label(units: Units) -> str:
    name = _NAMES.get(units.quantity, units.quantity.replace("_", " "))
    return name if units.unit == "1" else f"{name} [{_UNIT_TEXTS.get(units.unit, units.unit)}]"


def _range_of(units: Units) -> tuple[float, float]:
    """Return the lowest and the highest value that the codes can express."""
    ends = (units.offset, units.offset + units.scale * units.max_code)
    return min(ends), max(ends)


def _one_two_five(high: float, count: int) -> tuple[float, ...]:
    """Return `count` bounds in steps of 1, 2 and 5 times powers of ten, the last at most `high`."""
    exponent = math.floor(math.log10(high)) if high > 0 else 0
    candidates = [
        float(f"{digit}e{power}")
        for power in range(exponent - count, exponent + 1)
        for digit in (1, 2, 5)
    ]
    return tuple(bound for bound in candidates if bound <= max(high, candidates[0]) * 1.001)[
        -count:
    ]


def _rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _hatching(height: int, width: int, distance_px: int | None) -> NDArray[np.uint8]:
    """Return diagonal lines from lower left to upper right, RGB [H, W, 3]."""
    distance = distance_px or max(4, round(max(height, width) / 24))
    thickness = max(1, round(distance / 5))
    diagonal_HW = np.add.outer(np.arange(height), np.arange(width)) % distance
    colours = np.array([_rgb(MISSING), _rgb(MISSING_LINE)], np.uint8)
    return colours[(diagonal_HW < thickness).astype(int)]


_TEXT_PX, _SWATCH_PX = 11, 20
_NO_DATA_PX = 52
"""Width kept for the swatch and its name, right of a lying bar."""
_STANDING_BAR_PX = 14


def _swatch_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom (outside) of the hatched swatch."""
    if width >= height:
        left = width - _NO_DATA_PX + (_NO_DATA_PX - 2 * _SWATCH_PX) // 2
        return left, _TEXT_PX + 7, left + 2 * _SWATCH_PX, height - _TEXT_PX - 6
    return 0, height - _SWATCH_PX + 4, _STANDING_BAR_PX, height - 1


def _paste_swatch(picture: Image, left: int, top: int, right: int, bottom: int) -> None:
    from PIL import Image, ImageDraw

    hatching = Image.fromarray(_hatching(bottom - top, right - left, 6))
    picture.paste(hatching, (left, top))
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE)


def _draw_lying(
    pen: ImageDraw, scale: ColourScale, width: int, height: int, ink: str, shows_missing: bool
) -> None:
    font = picture_font(_TEXT_PX)
    _, top, _, bottom = _swatch_box(width, height)
    right = width - (_NO_DATA_PX + 14 if shows_missing else 8)
    if shows_missing:
        pen.text((width - _NO_DATA_PX / 2, height - 1), "no data", ink, font, anchor="md")
    pen.text((0, 0), scale.label, ink, font, anchor="la")
    edges = _edges(scale, 0, right)
    for left_edge, right_edge, colour in zip(edges, edges[1:], _block_colours(scale), strict=False):
        if right_edge > left_edge:  # fine steps may be narrower than a pixel
            pen.rectangle((left_edge, top, right_edge - 1, bottom - 1), fill=colour)
    pen.rectangle((0, top, right - 1, bottom - 1), outline=OUTLINE)
    for tick, x in _placed_ticks(scale, edges, room_px=0, font=font):
        if not scale.is_continuous:
            pen.line((x, bottom, x, bottom + 2), fill=OUTLINE)
        anchor = "ld" if x <= 2 else "rd" if x >= right - 2 else "md"
        pen.text((x, height - 1), tick_label(tick), ink, font, anchor=anchor)


def _draw_standing(
    pen: ImageDraw, scale: ColourScale, width: int, height: int, ink: str, shows_missing: bool
) -> None:
    del width
    font = picture_font(_TEXT_PX)
    text_x = _STANDING_BAR_PX + 6
    words = scale.label.replace(" [", "\n[").split("\n")
    for line, word in enumerate(words):
        pen.text((0, line * (_TEXT_PX + 3)), word, ink, font, anchor="la")
    top = len(words) * (_TEXT_PX + 3) + 8
    bottom = height - (_SWATCH_PX + 10 if shows_missing else 8)
    if shows_missing:
        _, swatch_top, _, swatch_bottom = _swatch_box(1, height)
        middle = (swatch_top + swatch_bottom) / 2
        pen.text((text_x, middle), "no data", ink, font, anchor="lm")
    edges = _edges(scale, 0, bottom - top)
    for low, high, colour in zip(edges, edges[1:], _block_colours(scale), strict=False):
        if high > low:
            pen.rectangle((0, bottom - high, _STANDING_BAR_PX - 1, bottom - low - 1), fill=colour)
    pen.rectangle((0, top, _STANDING_BAR_PX - 1, bottom - 1), outline=OUTLINE)
    for tick, y in _placed_ticks(scale, edges, room_px=_TEXT_PX + 2, font=font):
        pen.line((_STANDING_BAR_PX, bottom - y, _STANDING_BAR_PX + 2, bottom - y), fill=OUTLINE)
        pen.text((text_x, bottom - y), tick_label(tick), ink, font, anchor="lm")


def _block_colours(scale: ColourScale) -> tuple[str, ...]:
    return scale.below_colour, *scale.colours


def _edges(scale: ColourScale, start: int, end: int) -> list[int]:
    """Return where the blocks of a bar begin and end, the one below the first bound included."""
    return np.linspace(start, end, len(scale.colours) + 2).round().astype(int).tolist()


def _placed_ticks(
    scale: ColourScale, edges: list[int], *, room_px: int, font: FreeTypeFont
) -> list[tuple[float, int]]:
    """Return the numbers of a bar and where they stand: all bounds if they fit, else the few.

    Args:
        scale: the colours.
        edges: of the blocks.
        room_px: what one number takes along the bar; 0: its width.
        font: of the numbers.
    """
    if scale.is_continuous:
        low, high = scale.ticks[0], scale.ticks[-1]
        span = edges[-1] - edges[0]
        return [(t, edges[0] + round((t - low) / (high - low) * span)) for t in scale.ticks]
    places = dict(zip(scale.bounds, edges[1:], strict=False))
    every = list(places.items())
    rooms = [room_px or font.getlength(tick_label(tick)) + 5 for tick, _ in every]
    fits = all(
        after[1] - before[1] >= (room_before + room_after) / 2
        for before, after, room_before, room_after in zip(
            every, every[1:], rooms, rooms[1:], strict=False
        )
    )
    return every if fits else [(tick, places[tick]) for tick in scale.ticks]
