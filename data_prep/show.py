"""Pictures of an archive: a contact sheet (PNG) and an animation (GIF).

Radar is drawn in the colours of its physical quantity with its times (UTC) and a scale bar; digits
and video as they are stored, 0 black and 255 white.

Shape letters: N samples, T time, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_prep.panels import (
    VideoView,
    attribution,
    join_facts,
    shorten,
    spread,
    strided,
    view_of,
    wrapped,
)
from tmu_dist.colours import FAINT_INK, INK, OUTLINE, PAPER, picture_font
from tmu_dist.data.archive import Archive, open_archive

_MARGIN, _GAP = 20, 4
_LEFT = 104
"""Where the frames of a sheet begin; row labels stand left of it."""
_LEAST_WIDTH = 640
_LABEL_ROW, _LABEL_RISE = 22, 6
"""Room for times between two rows, and how far above the frames they stand."""
_TERMS_ROW = 15
_FRAME_MS, _LAST_FRAME_MS = 120, 900


class Example(NamedTuple):
    """One sample, read."""

    sample_id: int
    frames_TCHW: NDArray[Any]
    meta: Mapping[str, Any]


class Drawn(NamedTuple):
    """One sample as pictures, which are small where its frames may be large."""

    sample_id: int
    meta: Mapping[str, Any]
    sheet: list[Image.Image]
    """The frames that a sheet shows."""
    animation: list[Image.Image]
    """All frames."""


def draw_archive(url: str, out_dir: Path, *, split: str, num: int) -> tuple[Path, Path]:
    """Draw samples of an archive, spread evenly over a split.

    Args:
        url: the archive, of either format.
        out_dir: folder for the pictures; made when it is not there.
        split: "train", "val" or "test".
        num: how many samples; fewer when the split is smaller.

    Returns:
        Paths of the contact sheet and of the animation.

    Raises:
        ValueError: no such archive or split, a damaged sample, or frames of neither one channel
            nor three.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}.")
    archive = open_archive(url)
    manifest = archive.manifest
    view = view_of(manifest)
    sequences = [draw_example(view, example) for example in read_examples(archive, split, num)]
    out_dir.mkdir(parents=True, exist_ok=True)
    sheet = out_dir / f"{manifest.name}-{split}.png"
    animation = out_dir / f"{manifest.name}-{split}.gif"
    contact_sheet(view, split, sequences).save(sheet)
    pages = _animation(view, sequences)
    if (palette := view.palette()) is not None:
        pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    first, *rest = pages
    durations_ms = [_FRAME_MS] * len(rest) + [_LAST_FRAME_MS]
    first.save(animation, save_all=True, append_images=rest, duration=durations_ms, loop=0)
    return sheet, animation


def read_examples(archive: Archive, split: str, num: int) -> Iterator[Example]:
    """Read at most `num` samples, spread evenly over a split, one at a time.

    Raises:
        ValueError: no such split, or a damaged sample.
    """
    for sample_id in spread(archive.manifest.num_samples(split), num):
        frames_TCHW = archive.read(split, [sample_id])[0]
        yield Example(sample_id, frames_TCHW, archive.read_meta(split, sample_id))


def draw_example(view: VideoView, example: Example) -> Drawn:
    """Draw the frames of a sample in both sizes."""
    times, size = _sheet_frames(view)
    animation_size = view.tile_size(view.animation_tile_px)
    return Drawn(
        example.sample_id,
        example.meta,
        [view.tile(example.frames_TCHW[t], size) for t in times],
        [view.tile(frame_CHW, animation_size) for frame_CHW in example.frames_TCHW],
    )


def contact_sheet(view: VideoView, split: str, sequences: list[Drawn]) -> Image.Image:
    """Draw one row per sample and one column per time, labelled; long sequences leave times out."""
    manifest = view.manifest
    times, size = _sheet_frames(view)
    column = max(size[0], 44) + _GAP  # room for a time above a narrow frame
    row = size[1] + (_LABEL_ROW if view.has_own_times else _GAP)
    top = 98
    width = max(_LEFT + len(times) * column - _GAP, _LEAST_WIDTH) + _MARGIN
    legend = view.legend(size[0], width - _LEFT - _MARGIN)
    terms = wrapped(attribution(manifest), width - 2 * _MARGIN, 11)
    rows_end = top + len(sequences) * row - (row - size[1])
    terms_y = rows_end + (30 + legend.height if legend else 8)
    sheet = Image.new("RGB", (width, terms_y + _TERMS_ROW * len(terms) + 18), PAPER)
    pen = ImageDraw.Draw(sheet)
    _draw_heading(pen, view, split, sequences, width)
    if not view.has_own_times:
        for place, t in enumerate(times):
            x = _LEFT + place * column + size[0] / 2
            label = view.time_labels({})[t]
            pen.text((x, top - _LABEL_RISE), label, FAINT_INK, picture_font(11), anchor="ms")
    pen.text((_LEFT - 12, top - _LABEL_RISE), "sample", FAINT_INK, picture_font(11), anchor="rs")
    for number, sequence in enumerate(sequences):
        _draw_row(sheet, view, sequence, times, column, top + number * row)
    if legend:
        sheet.paste(legend, (_LEFT, rows_end + 20))
    for line, text in enumerate(terms):
        y = terms_y + 8 + line * _TERMS_ROW
        pen.text((_MARGIN, y), text, FAINT_INK, picture_font(11), anchor="la")
    return sheet


def _sheet_frames(view: VideoView) -> tuple[list[int], tuple[int, int]]:
    """Return which frames a sheet shows, and how large."""
    times = strided(view.manifest.num_frames, view.most_columns)
    return times, view.tile_size(view.sheet_tile_px(len(times)))


def _draw_heading(
    pen: ImageDraw.ImageDraw, view: VideoView, split: str, sequences: list[Drawn], width: int
) -> None:
    manifest = view.manifest
    minutes = manifest.frame_interval_minutes
    step = -(-manifest.num_frames // view.most_columns)
    facts = [
        f"{len(sequences)} of {manifest.num_samples(split):,} sequences",
        f"{manifest.num_frames} frames of {manifest.height} × {manifest.width}",
        "" if minutes is None else f"every {minutes:g} min",
        "" if step == 1 else f"one frame in {step} shown",
        "times in UTC" if any(view.describe(sequence.meta) for sequence in sequences) else "",
    ]
    title = shorten(f"{manifest.name} / {split}", round((width - 2 * _MARGIN) * 0.92), 20)
    pen.text((_MARGIN, 14), title, INK, picture_font(20, bold=True))
    text = shorten(join_facts(facts), width - 2 * _MARGIN, 13)
    pen.text((_MARGIN, 44), text, FAINT_INK, picture_font(13))


def _draw_row(
    sheet: Image.Image,
    view: VideoView,
    sequence: Drawn,
    times: list[int],
    column: int,
    y: int,
) -> None:
    pen = ImageDraw.Draw(sheet)
    width, height = sequence.sheet[0].size
    middle = y + height / 2
    what = view.describe(sequence.meta)
    number_y = middle - 9 if what else middle
    pen.text((_LEFT - 12, number_y), str(sequence.sample_id), INK, picture_font(14), anchor="rm")
    if what:
        pen.text((_LEFT - 12, middle + 9), what, FAINT_INK, picture_font(11), anchor="rm")
    labels = view.time_labels(sequence.meta)
    for place, t in enumerate(times):
        x = _LEFT + place * column
        _paste(sheet, view, sequence.sheet[place], (x, y))
        if view.has_own_times:
            center = x + width / 2
            pen.text((center, y - _LABEL_RISE), labels[t], FAINT_INK, picture_font(11), anchor="ms")


def _animation(view: VideoView, sequences: list[Drawn]) -> list[Image.Image]:
    """Draw all samples in a grid, one picture per time."""
    columns = min(4, len(sequences))
    rows = math.ceil(len(sequences) / columns)
    width, height = view.tile_size(view.animation_tile_px)
    margin, gap, top = 12, 8, 34
    label_height = 20 if view.has_own_times else 0
    grid_width = columns * (width + gap) - gap
    total_width = 2 * margin + max(grid_width, 320)
    legend = view.legend(width, total_width - 2 * margin)
    rows_end = top + rows * (height + gap + label_height)
    total_height = rows_end + (legend.height + 12 if legend else 4)
    labels = [view.time_labels(sequence.meta) for sequence in sequences]
    pages = []
    for t in range(view.manifest.num_frames):
        page = Image.new("RGB", (total_width, total_height), PAPER)
        pen = ImageDraw.Draw(page)
        heading = _animation_heading(view, t)
        pen.text((margin, top / 2), heading, INK, picture_font(13), anchor="lm")
        for number, sequence in enumerate(sequences):
            row, column = divmod(number, columns)
            x = margin + column * (width + gap)
            y = top + row * (height + gap + label_height) + label_height
            _paste(page, view, sequence.animation[t], (x, y))
            if label_height:
                text = f"{view.describe(sequence.meta)} {labels[number][t]}".strip()
                pen.text((x, y - _LABEL_RISE), text, INK, picture_font(12), anchor="ls")
        if legend:
            page.paste(legend, (margin, rows_end + 4))
        pages.append(page)
    return pages


def _animation_heading(view: VideoView, t: int) -> str:
    manifest = view.manifest
    if view.has_own_times:
        return join_facts(
            [manifest.name, f"frame {t + 1} of {manifest.num_frames}", "times in UTC"]
        )
    labels = view.time_labels({})
    return f"{labels[t]} of {labels[-1]}"


def _paste(
    picture: Image.Image, view: VideoView, tile: Image.Image, place: tuple[int, int]
) -> None:
    picture.paste(tile, place)
    if view.has_border:
        right, bottom = place[0] + tile.width, place[1] + tile.height
        corners = (place[0] - 1, place[1] - 1, right, bottom)
        ImageDraw.Draw(picture).rectangle(corners, outline=OUTLINE)
