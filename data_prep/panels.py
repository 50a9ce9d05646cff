"""How frames of an archive become pictures: map-like panels for radar, plain pictures for video.

Shape letters: T time, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tmu_dist.colours import (
    INK,
    PAPER,
    colour_scale,
    draw_colour_bar,
    paint,
    physical,
    picture_font,
)
from tmu_dist.data.manifest import Grid, Manifest

_KM_PER_DEGREE = 111.2
_HATCH_PX = 6
_BAR_HEIGHT_PX = 50


def view_of(manifest: Manifest, *, hatch_px: int = _HATCH_PX) -> VideoView:
    """Return how the frames of an archive are drawn.

    Args:
        manifest: of the archive.
        hatch_px: distance of the lines that mark missing areas, in pixels of the picture; more
            where the picture will be shown smaller than it is.

    Raises:
        ValueError: they have neither one channel nor three.
    """
    if manifest.channels not in (1, 3):
        raise ValueError(
            f"Only 1 (gray) or 3 (RGB) channels can be drawn, {manifest.name} has "
            f"{manifest.channels}."
        )
    units = manifest.units
    is_plain = units.quantity == "intensity" and manifest.grid is None
    if is_plain or manifest.channels == 3:
        return VideoView(manifest)
    return MapView(manifest, hatch_px=hatch_px)


class VideoView:
    """Grey or RGB pictures, numbered through the sequence."""

    has_own_times = False
    """Every sequence has times of its own, to be written above its own frames."""
    has_border = False
    """A frame needs a line around it, because its background is the paper's."""
    animation_tile_px = 192

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        small = manifest.width <= 64
        self.most_columns = 20 if small else 12
        self._sheet_tile_px = 64 if small else 128

    def sheet_tile_px(self, columns: int) -> int:
        """Width and height of the box for one frame in a sheet of so many columns."""
        del columns
        return self._sheet_tile_px

    def tile_size(self, box_px: int) -> tuple[int, int]:
        """Width and height of a frame about as wide as the box; pixels are enlarged uniformly."""
        height, width = self.manifest.height, self.manifest.width
        if width <= box_px:
            return width * (box_px // width), height * (box_px // width)
        return box_px, max(1, round(height * box_px / width))

    def tile(self, frame_CHW: NDArray[Any], size: tuple[int, int]) -> Image.Image:
        """Return a frame as a picture of the given width and height."""
        codes_CHW = frame_CHW
        if self.manifest.dtype != "uint8" or self.manifest.units.max_code != 255:
            largest = self.manifest.units.max_code
            codes_CHW = np.minimum(codes_CHW, largest) * (255 / largest)
        image_CHW = codes_CHW.astype(np.uint8)
        gray = len(image_CHW) == 1
        image = Image.fromarray(image_CHW[0] if gray else np.moveaxis(image_CHW, 0, -1))
        enlarged = image.width <= size[0]
        return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)

    def time_labels(self, meta: Mapping[str, Any]) -> list[str]:
        """Name the frames: minutes since the first, or numbers from 1 where there is no clock."""
        del meta
        minutes = self.manifest.frame_interval_minutes
        if minutes is None:
            return [str(t + 1) for t in range(self.manifest.num_frames)]
        return [f"+{t * minutes:g} min" for t in range(self.manifest.num_frames)]

    def describe(self, meta: Mapping[str, Any]) -> str:
        """Say in a few letters which sequence it is; "" where its number says it all."""
        del meta
        return ""

    def legend(self, tile_width: int, width: int) -> Image.Image | None:
        """Colour bar and scale bar for tiles of this width, in a picture at most `width` wide."""
        del tile_width, width
        return None

    def palette(self) -> Image.Image | None:
        """The colours of every picture of an animation; None: each finds its own."""
        return None


class MapView(VideoView):
    """Fields in the colours of their quantity, hatched where missing, with times in UTC."""

    has_own_times = True
    has_border = True
    animation_tile_px = 264
    _ROW_PX, _MOST_PX = 1400, 280

    def __init__(self, manifest: Manifest, *, hatch_px: int = _HATCH_PX) -> None:
        super().__init__(manifest)
        self.most_columns = 12
        self._hatch_px = hatch_px
        self.scale = colour_scale(manifest.units)
        self._pixel_km = _pixel_km(manifest.grid)

    def sheet_tile_px(self, columns: int) -> int:
        return min(self._MOST_PX, self._ROW_PX // columns)

    def tile_size(self, box_px: int) -> tuple[int, int]:
        """Width and height of a field in a box half as high again, true to its shape on the map."""
        width, height = float(self.manifest.width), float(self.manifest.height)
        if self._pixel_km is not None:
            height *= self._pixel_km[1] / self._pixel_km[0]
        factor = box_px / max(width, height / 1.5)
        if factor > 1 and math.isclose(height, self.manifest.height, rel_tol=1e-3):
            factor = math.floor(factor)  # all pixels of one size
        return max(1, round(width * factor)), max(1, round(height * factor))

    def tile(self, frame_CHW: NDArray[Any], size: tuple[int, int]) -> Image.Image:
        values_HW = resampled(physical(frame_CHW[0], self.manifest.units), size)
        return Image.fromarray(paint(values_HW, self.scale, hatch_px=self._hatch_px))

    def time_labels(self, meta: Mapping[str, Any]) -> list[str]:
        """Times of the frames (UTC), or minutes since the first where that has none."""
        start = start_of(meta)
        if start is None or self.manifest.frame_interval_minutes is None:
            return super().time_labels(meta)
        step = timedelta(minutes=self.manifest.frame_interval_minutes)
        times = [start + t * step for t in range(self.manifest.num_frames)]
        clock = "%H:%M" if all(time.second == 0 for time in times) else "%H:%M:%S"
        labels = []
        for time in times:
            days = (time.date() - start.date()).days
            labels.append(f"{time:{clock}}" + (f" +{days} d" if days else ""))
        return labels

    def describe(self, meta: Mapping[str, Any]) -> str:
        start = start_of(meta)
        return "" if start is None else f"{start:%Y-%m-%d}"

    def legend(self, tile_width: int, width: int) -> Image.Image | None:
        has_missing = self.manifest.units.missing_code is not None
        bar_width = min(440, width)
        bar = draw_colour_bar(self.scale, bar_width, _BAR_HEIGHT_PX, shows_missing=has_missing)
        km = self._km_per_px(tile_width)
        if km is None:
            return bar
        scale_bar = _scale_bar(km, tile_width, self._latitude_note())
        gap = 40
        beside = bar_width + gap + scale_bar.width <= width
        size = (
            (bar_width + gap + scale_bar.width, _BAR_HEIGHT_PX)
            if beside
            else (max(bar_width, scale_bar.width), 2 * _BAR_HEIGHT_PX)
        )
        legend = Image.new("RGB", size, PAPER)
        legend.paste(bar, (0, 0))
        legend.paste(scale_bar, (bar_width + gap, 0) if beside else (0, _BAR_HEIGHT_PX + 6))
        return legend

    def extent_text(self) -> str:
        """Say how large a frame is on the map; "" where the archive does not say."""
        if self._pixel_km is None:
            return ""
        width = self._pixel_km[0] * self.manifest.width
        height = self._pixel_km[1] * self.manifest.height
        place = self._latitude_note()
        return f"A frame is {width:,.4g} km wide{place} and {height:,.4g} km high."

    def palette(self) -> Image.Image | None:
        """Every step and the greys of text and hatching, so that no colour flickers."""
        shades = np.linspace(0, 255, 40).round().astype(np.uint8)
        if self.scale.is_continuous:
            colours = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        else:
            steps = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in self.scale.colours]
            colours = np.concatenate(
                [np.array(steps, np.uint8), np.repeat(shades[:, None], 3, axis=1)]
            )
        palette = Image.new("P", (1, 1))
        palette.putpalette(colours.tobytes())
        return palette

    def _km_per_px(self, tile_width: int) -> float | None:
        if self._pixel_km is None:
            return None
        return self._pixel_km[0] * self.manifest.width / tile_width

    def _latitude_note(self) -> str:
        grid = self.manifest.grid
        if grid is None or grid.unit != "degree":
            return ""
        latitude = _middle_latitude(grid)
        return f" at {abs(latitude):.0f}° {'N' if latitude >= 0 else 'S'}"


def resampled(values_HW: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Bring a field to a picture's width and height, for the eye only.

    Larger pictures repeat pixels; smaller ones show averages of what was observed, and NaN where
    most was not.
    """

    def resize(field_HW: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(Image.fromarray(field_HW).resize(size, Image.Resampling.BOX))

    observed_HW = np.isfinite(values_HW)
    parts_HW = resize(observed_HW.astype(np.float32))
    sums_HW = resize(np.where(observed_HW, values_HW, np.float32(0)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(parts_HW >= 0.5, sums_HW / parts_HW, np.float32(np.nan))


def start_of(meta: Mapping[str, Any]) -> datetime | None:
    """Return the time (UTC) of a sequence's first frame, where its record has one."""
    start = meta.get("start")
    try:
        return datetime.fromisoformat(start) if isinstance(start, str) else None
    except ValueError:
        return None


def spread(count: int, most: int) -> list[int]:
    """All of 0..count-1, or `most` of them spread evenly with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def strided(count: int, most: int) -> list[int]:
    """All of 0..count-1, or every second, third ... of them, at most `most`: equal steps."""
    return list(range(0, count, -(-count // most)))


def attribution(manifest: Manifest) -> str:
    """Return where the data come from and under which terms; "" where the archive does not say."""
    card = manifest.source
    return "" if card is None else f"Data: {card.name}, {card.provider}. Terms: {card.licence}"


def shorten(text: str, width_px: int, size_px: int) -> str:
    """Cut a text to a width, with an ellipsis where something is missing."""
    font = picture_font(size_px)
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text.rstrip() + "…"


def wrapped(text: str, width_px: int, size_px: int) -> list[str]:
    """Break a text into lines of at most a width, between words; no word is left out."""
    font = picture_font(size_px)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def join_facts(facts: Sequence[str]) -> str:
    """Put facts in one line, empty ones left out."""
    return "  ·  ".join(fact for fact in facts if fact)


def _pixel_km(grid: Grid | None) -> tuple[float, float] | None:
    """Width and height of a pixel in km; in degrees, of one in the middle of the grid."""
    if grid is None or grid.pixel_width is None or grid.pixel_height is None:
        return None
    if grid.unit == "m":
        return grid.pixel_width / 1000, grid.pixel_height / 1000
    narrowing = max(0.05, math.cos(math.radians(_middle_latitude(grid))))
    return grid.pixel_width * _KM_PER_DEGREE * narrowing, grid.pixel_height * _KM_PER_DEGREE


def _middle_latitude(grid: Grid) -> float:
    assert grid.top is not None and grid.pixel_height is not None
    return grid.top - grid.height * grid.pixel_height / 2


def _scale_bar(km_per_px: float, tile_width: int, note: str) -> Image.Image:
    """Draw a bar of a round length, at most half a tile long."""
    most_km = km_per_px * tile_width / 2
    power = 10.0 ** math.floor(math.log10(most_km))
    km = max(digit * power for digit in (1, 2, 5) if digit * power <= most_km)
    length = round(km / km_per_px)
    text = f"{km:g} km{note}"
    font = picture_font(11)
    width = max(length, math.ceil(font.getlength(text))) + 2
    picture = Image.new("RGB", (width, _BAR_HEIGHT_PX), PAPER)
    pen = ImageDraw.Draw(picture)
    y = 25
    pen.line((0, y, length, y), fill=INK, width=2)
    for x in (0, length):
        pen.line((x, y - 5, x, y + 5), fill=INK)
    pen.text((0, _BAR_HEIGHT_PX - 1), text, INK, font, anchor="ld")
    return picture
