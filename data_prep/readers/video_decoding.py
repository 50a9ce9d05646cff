"""Frames out of video files (PyAV) and image files (Pillow), one at a time and as they are.

Every way in which a file can be broken becomes a `BadFileError`. What no decoder can tell is damage
inside a frame of a format without checksums (VP8, GIF) that still decodes to some picture.
Importing this module needs neither library.

Shape letters: H height, W width, C channels (1 grey, 3 red, green and blue).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.containers import missing_bytes
from data_prep.readers.radar import BadFileError, import_extra
from data_prep.readers.video import Colour

CONVERSION_NOTE = (
    "Grey is luma (ITU-R BT.601) over the full range 0..255. A limited range (16..235) of a video "
    "is spread to the full one. Transparent pixels of images lie over black; images of 16 bits are "
    "divided by 257 and rounded."
)
"""What happens to numbers on the way to grey or red, green and blue."""

_EMPTY = "holds a video stream without a single frame"


class VideoFacts(NamedTuple):
    """What a file says of itself."""

    height: int
    width: int
    grey: bool
    num_frames: int | None
    """None where the file does not say."""
    rate: float | None
    """Frames in a second; None of an image."""


def decoder_versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed; other ones may round otherwise."""
    versions = {}
    for package in ("av", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def probe_video(path: Path) -> VideoFacts:
    """Read the header and the first frame of a video.

    Raises:
        BadFileError: no video that can be read.
    """
    av = import_extra("av", "video", "Reading videos")
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(path, container)
            first = next(container.decode(stream), None)
            if first is None:
                raise BadFileError(path, _EMPTY)
            height, width, _ = _pixels(first, "grey", _reformatter()).shape
            return VideoFacts(
                height=height,
                width=width,
                grey=len(first.format.components) == 1 and not first.format.has_palette,
                num_frames=stream.frames or None,
                rate=float(stream.average_rate) if stream.average_rate else None,
            )
    except (av.FFmpegError, OSError) as error:
        raise BadFileError(path, f"cannot be read as a video: {_reason(error)}") from error


def video_frames(
    path: Path,
    colour: Colour,
    *,
    ranges: Sequence[tuple[int, int]] | None = None,
    every: int = 1,
    by_time: bool = False,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode a video, one frame in memory at a time.

    Args:
        path: the file.
        colour: "grey" for one channel, "rgb" for three.
        ranges: numbers of the frames wanted, half-open, rising; decoding ends with the last.
        every: only frames whose number is a multiple of this.
        by_time: a frame's number is its time in units of the usual time between two frames, so a
            frame that was never recorded leaves a gap; else frames are counted. With `ranges`,
            frames must be counted.

    Yields:
        Number of the frame (from 0) and its pixels image_HWC.

    Raises:
        BadFileError: no video, cut short, damaged, or fewer frames than the ranges ask for. Frames
            before the damage have been yielded.
    """
    av = import_extra("av", "video", "Reading videos")
    position = 0
    end = ranges[-1][1] if ranges else None
    try:
        _check_whole(path)
        tick = _usual_tick(av, path) if by_time else None
        with av.open(str(path)) as container:
            stream = _video_stream(path, container)
            # One frame after another: pieces of work run in parallel, each on a core of its own.
            stream.codec_context.thread_type = "NONE"
            if end is not None and 0 < stream.frames < end:
                raise BadFileError(path, _too_short(stream.frames, end))
            numbers, reformatter = _Numbers(tick), _reformatter()
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise BadFileError(path, _damaged(position, "it is incomplete"))
                number = numbers.next(frame.pts)
                position += 1
                if number % every == 0 and _inside(number, ranges):
                    yield number, _pixels(frame, colour, reformatter)
                if position == end:
                    return
    except (av.FFmpegError, OSError) as error:
        if position:
            raise BadFileError(path, _damaged(position, _reason(error))) from error
        raise BadFileError(path, f"cannot be read as a video: {_reason(error)}") from error
    if not position:
        raise BadFileError(path, _EMPTY)
    if end is not None and position < end:
        raise BadFileError(path, _too_short(position, end))


def probe_image(path: Path) -> VideoFacts:
    """Read the header of an image.

    Raises:
        BadFileError: no image that can be read.
    """
    with _opened_image(path) as image:
        grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16")
        return VideoFacts(image.height, image.width, grey, num_frames=1, rate=None)


def read_image(path: Path, colour: Colour) -> NDArray[np.uint8]:
    """Return image_HWC of an image file.

    Raises:
        BadFileError: no image, cut short, damaged, several pictures in one file, or numbers that
            have no place among 0..255.
    """
    from PIL import Image

    with _opened_image(path) as image:
        if image.mode in ("F", "I"):
            raise BadFileError(path, "holds numbers of 32 bits; store it with 8 or 16 bits")
        if image.mode.startswith("I;16"):
            # 65535 = 255 * 257: both ends of the range meet, and halves cannot occur.
            values_HW = (np.asarray(image).astype(np.uint32) + 128) // 257
            grey_HW1 = values_HW.astype(np.uint8)[..., None]
            return grey_HW1 if colour == "grey" else np.repeat(grey_HW1, 3, axis=2)
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        converted = np.asarray(image.convert("L" if colour == "grey" else "RGB"))
        return converted.reshape(*converted.shape[:2], -1)


class _Numbers:
    """Gives frames their numbers, in the order of decoding."""

    def __init__(self, tick: float | None) -> None:
        self._tick = tick
        self._number = -1
        self._time: int | None = None

    def next(self, time: int | None) -> int:
        """Return the number of the next frame; `time` is in the stream's units, or unknown."""
        step = 1
        if self._tick and time is not None and self._time is not None:
            step = max(1, round((time - self._time) / self._tick))
        self._number += step
        self._time = time
        return self._number


def _usual_tick(av: Any, path: Path) -> float | None:
    """Return the median time between two frames, in the stream's units; None where unknown."""
    with av.open(str(path)) as container:
        packets = [
            (packet.pts, packet.dts)
            for packet in container.demux(_video_stream(path, container))
            if packet.size
        ]
    for times in zip(*packets):
        if None not in times:
            ordered = sorted(times)
            steps = [after - before for before, after in pairwise(ordered)]
            return statistics.median_low(steps) or None if steps else None
    return None


def _video_stream(path: Path, container: Any) -> Any:
    """Return the first video stream that is one: neither a picture nor the cover of a song."""
    if container.format.name.endswith("_pipe") or container.format.name.startswith("image2"):
        raise BadFileError(path, f"is no video but a picture ({container.format.name})")
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.__class__.attached_pic:
            return stream
    raise BadFileError(path, "has no video stream")


def _reformatter() -> Any:
    """What converts the pixels of a video's frames; a new one for each frame would work out the
    same tables every time, which took a third of the time of a whole conversion."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _pixels(frame: Any, colour: Colour, reformatter: Any) -> NDArray[np.uint8]:
    """Return image_HWC, turned upright as the file asks for."""
    converted = reformatter.reformat(frame, format="gray" if colour == "grey" else "rgb24")
    pixels = converted.to_ndarray()
    image_HWC = pixels[..., None] if pixels.ndim == 2 else pixels
    quarter_turns = round(frame.rotation / 90) % 4
    return np.rot90(image_HWC, quarter_turns) if quarter_turns else image_HWC


def _check_whole(path: Path) -> None:
    if missing := missing_bytes(path):
        raise BadFileError(path, f"is cut short: {missing:,} bytes are missing at its end")


def _opened_image(path: Path) -> Any:
    """Open and decode an image, upright; every way of failing becomes BadFileError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if (num_pictures := getattr(image, "n_frames", 1)) > 1:
                raise BadFileError(path, f"holds {num_pictures} pictures; one per file is read")
            image.load()
            return ImageOps.exif_transpose(image)
    except BadFileError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow names the file in some messages; with ours, that would be twice.
        reason = str(error).replace(f" {str(path)!r}", "")
        raise BadFileError(path, f"cannot be read as an image: {reason}") from error


def _inside(number: int, ranges: Sequence[tuple[int, int]] | None) -> bool:
    return ranges is None or any(first <= number < end for first, end in ranges)


def _too_short(num_frames: int, needed: int) -> str:
    return f"has {num_frames} frames, but is listed with {needed}: cut short, or another clip"


def _damaged(position: int, reason: str) -> str:
    return (
        f"is damaged: frame {position + 1} cannot be decoded ({reason}); "
        f"the {position} frames before it are whole"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
