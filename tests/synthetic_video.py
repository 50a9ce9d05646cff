"""Small videos and images, written by the tests themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

CODECS = {
    "avi": "mpeg4",
    "mov": "mpeg4",
    "mp4": "libx264",
    "mkv": "libx264",
    "webm": "libvpx",
    "gif": "gif",
}


def noise(
    num_frames: int, height: int = 48, width: int = 64, *, channels: int = 3, seed: int = 0
) -> NDArray[np.uint8]:
    """Coarse random pictures, frames_THWC: different from frame to frame, and not all high
    frequencies, so that a codec keeps them apart."""
    coarse = np.random.default_rng(seed).integers(
        0, 256, (num_frames, -(-height // 8), -(-width // 8), channels), dtype=np.uint8
    )
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def write_video(
    path: Path, frames_THWC: NDArray[np.uint8], *, times: Sequence[int] | None = None
) -> Path:
    """Write a colour video of 25 frames a second, by the codec that the suffix usually has.

    Args:
        path: file to write.
        frames_THWC: uint8, three channels.
        times: of each frame, in frames; without a gap when left out.
    """
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = CODECS[path.suffix.lower().removeprefix(".")]
    with av.open(str(path), "w") as container:
        options = {"threads": "1"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.bit_rate = 2_000_000
        for number, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame.pts = number if times is None else times[number]
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_images(folder: Path, names: Iterable[str], frames_THWC: NDArray[np.uint8]) -> None:
    """Write one image for each name; grey where there is one channel."""
    for name, frame_HWC in zip(names, frames_THWC, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame_HWC[..., 0] if frame_HWC.shape[2] == 1 else frame_HWC).save(path)


def cut_short(path: Path, part: float = 0.6) -> Path:
    """Keep the first part of a file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path
