"""Pictures of an archive: a contact sheet (PNG) and an animation (GIF).

Stored numbers are drawn as they are, 0 black and 255 white; units and missing codes play no part.

Shape letters: N samples, T time, C channels, H height, W width.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data_prep.writers.webdataset import decode_frames, read_manifest
from tmu_dist.data import storage
from tmu_dist.data.manifest import Manifest

_PAPER, _INK, _FAINT = "white", "#1c2330", "#6b7485"
_SHEET_TILE_PX = 64
_ANIMATION_TILE_PX = 192
_FRAME_MS, _LAST_FRAME_MS = 120, 900


def draw_archive(url: str, out_dir: Path, *, split: str, num: int) -> tuple[Path, Path]:
    """Draw samples of an archive, spread evenly over a split.

    Args:
        url: the archive.
        out_dir: folder for the pictures; made when it is not there.
        split: "train", "val" or "test".
        num: how many samples; fewer when the split is smaller.

    Returns:
        Paths of the contact sheet and of the animation.

    Raises:
        ValueError: no such archive or split, or frames that are neither gray nor RGB.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}.")
    manifest = read_manifest(url)
    if manifest.channels not in (1, 3):
        raise ValueError(
            f"Only 1 (gray) or 3 (RGB) channels can be drawn, {url} has {manifest.channels}."
        )
    total = manifest.num_samples(split)
    sample_ids = np.unique(np.linspace(0, total - 1, min(num, total)).astype(int)).tolist()
    frames_NTCHW = np.stack([_read_sample(url, manifest, split, i) for i in sample_ids])
    out_dir.mkdir(parents=True, exist_ok=True)
    sheet = out_dir / f"{manifest.name}-{split}.png"
    animation = out_dir / f"{manifest.name}-{split}.gif"
    _contact_sheet(manifest, split, sample_ids, frames_NTCHW).save(sheet)
    first, *rest = _animation(manifest, sample_ids, frames_NTCHW)
    durations_ms = [_FRAME_MS] * len(rest) + [_LAST_FRAME_MS]
    first.save(animation, save_all=True, append_images=rest, duration=durations_ms, loop=0)
    return sheet, animation


def _read_sample(url: str, manifest: Manifest, split: str, sample_id: int) -> NDArray[np.uint8]:
    """Return frames_TCHW of one sample; `verify` is the place for thorough checks."""
    index = sample_id
    for shard in manifest.shards(split):
        if index < shard.num_samples:
            break
        index -= shard.num_samples
    payload = storage.read_ranges(url, shard.path, [shard.offsets[index]], [shard.sizes[index]])[0]
    try:
        frames_TCHW = decode_frames(payload)
    except ValueError as error:
        where = f"{storage.join_url(url, shard.path)}, sample {index}"
        raise ValueError(
            f"{where} {error}. Run `python -m data_prep verify {url}` for the whole damage."
        ) from error
    return frames_TCHW.astype(np.uint8)


def _contact_sheet(
    manifest: Manifest, split: str, sample_ids: list[int], frames_NTCHW: NDArray[np.uint8]
) -> Image.Image:
    """Draw one row per sample and one column per time, labelled."""
    tiles = [[_tile(frame, _SHEET_TILE_PX) for frame in frames] for frames in frames_NTCHW]
    width, height = tiles[0][0].size
    gap, margin, left, top = 3, 20, 84, 96
    sheet = Image.new(
        "RGB",
        (
            max(left + manifest.num_frames * (width + gap), 560) + margin,
            top + len(tiles) * (height + gap) + margin,
        ),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, 14), f"{manifest.name} / {split}", _INK, _font(22))
    pen.text(
        (margin, 44),
        f"{len(sample_ids)} of {manifest.num_samples(split):,} sequences, {manifest.num_frames} "
        f"frames of {manifest.height}x{manifest.width}",
        _FAINT,
        _font(14),
    )
    for t in range(manifest.num_frames):
        center = left + t * (width + gap) + width / 2
        pen.text((center, top - 8), _time_label(manifest, t), _FAINT, _font(12), anchor="ms")
    for row, (sample_id, row_tiles) in enumerate(zip(sample_ids, tiles, strict=True)):
        y = top + row * (height + gap)
        pen.text((left - 10, y + height / 2), str(sample_id), _INK, _font(14), anchor="rm")
        for t, tile in enumerate(row_tiles):
            sheet.paste(tile, (left + t * (width + gap), y))
    pen.text((left - 10, top - 8), "sample", _FAINT, _font(12), anchor="rs")
    return sheet


def _animation(
    manifest: Manifest, sample_ids: list[int], frames_NTCHW: NDArray[np.uint8]
) -> list[Image.Image]:
    """Draw all samples in a grid, one picture per time."""
    columns = min(4, len(sample_ids))
    rows = math.ceil(len(sample_ids) / columns)
    width, height = _tile(frames_NTCHW[0, 0], _ANIMATION_TILE_PX).size
    gap, top = 6, 30
    size = (gap + columns * (width + gap), top + rows * (height + gap))
    pictures = []
    for t in range(manifest.num_frames):
        picture = Image.new("RGB", size, _PAPER)
        pen = ImageDraw.Draw(picture)
        label = f"{_time_label(manifest, t)} of {_time_label(manifest, manifest.num_frames - 1)}"
        pen.text((gap, top / 2), label, _INK, _font(14), anchor="lm")
        for number, frame_CHW in enumerate(frames_NTCHW[:, t]):
            row, column = divmod(number, columns)
            place = gap + column * (width + gap), top + row * (height + gap)
            picture.paste(_tile(frame_CHW, _ANIMATION_TILE_PX), place)
        pictures.append(picture)
    return pictures


def _tile(frame_CHW: NDArray[np.uint8], width: int) -> Image.Image:
    """Return a frame as an image about `width` pixels wide, its pixels enlarged uniformly."""
    gray = frame_CHW.shape[0] == 1
    image = Image.fromarray(frame_CHW[0] if gray else np.moveaxis(frame_CHW, 0, -1))
    if image.width <= width:
        return image.resize(
            [side * (width // image.width) for side in image.size], Image.Resampling.NEAREST
        )
    return image.resize(
        (width, max(1, round(image.height * width / image.width))), Image.Resampling.BOX
    )


def _time_label(manifest: Manifest, t: int) -> str:
    """Name a frame by its time in minutes, or by its number from 1 where there is no clock."""
    if manifest.frame_interval_minutes is None:
        return str(t + 1)
    return f"+{t * manifest.frame_interval_minutes:g} min"


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)
