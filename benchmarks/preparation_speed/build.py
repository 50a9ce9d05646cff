"""What one process of the benchmark does: prepare an archive, and say how long that took.

Imports what `python -m data_prep` does and no more, since its worker processes import it again.

Shape letters: T time, H height, W width.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from data_prep.pipeline import OutputSettings, WorkSettings, build_archive
from data_prep.radar_plan import RadarPlanSettings
from data_prep.radar_source import RadarSettings, radar_source
from data_prep.source import Source
from data_prep.video_source import VideoSource
from tmu_dist.data.manifest import Manifest

_SHOWN = 8
"""Functions of a profile, by the time spent in them alone."""


def write_clips(folder: Path, *, clips: int, frames: int) -> None:
    """Write videos of squares that move over a grain, 120 x 160 pixels, as KTH's are: MPEG-4."""
    import av

    for clip in range(clips):
        rng = np.random.default_rng(clip)
        grain_HW = rng.integers(90, 110, (120, 160), dtype=np.uint8)
        with av.open(str(folder / f"clip{clip:02d}.avi"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.height, stream.width, stream.pix_fmt = 120, 160, "yuv420p"
            for t in range(frames):
                picture_HW = grain_HW.copy()
                left = (2 * t + 11 * clip) % 130
                picture_HW[40:90, left : left + 30] = 200
                colour_HWC = np.repeat(picture_HW[..., None], 3, axis=2)
                frame = av.VideoFrame.from_ndarray(colour_HWC, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def write_radar(folder: Path, *, frames: int, size: int) -> None:
    """Write pictures of rain that moves, five minutes apart; beyond a circle nothing is seen."""
    from PIL import Image

    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    seen_HW = np.hypot(rows - size / 2, columns - size / 2) < size / 2
    cells = [(*rng.uniform(-0.3, 1, 2) * size, rng.uniform(5, 25)) for _ in range(20)]
    for t in range(frames):
        field_HW = np.zeros((size, size), np.float32)
        for y, x, width in cells:
            distance_HW = (rows - y - 1.5 * t) ** 2 + (columns - x - 2.0 * t) ** 2
            np.maximum(field_HW, 200 * np.exp(-distance_HW / (2 * width**2)), out=field_HW)
        codes_HW = np.where(seen_HW, field_HW, 255).astype(np.uint8)
        minutes = 5 * t
        name = f"20200101{minutes // 60:02d}{minutes % 60:02d}.png"
        Image.fromarray(codes_HW).save(folder / name)


def digits(options: argparse.Namespace, out: str) -> Manifest:
    """As many generated sequences as said, of 20 frames of 64x64."""
    config = MovingMNISTConfig(digits=2, train=options.sequences, val=16, test=16)
    return write_moving_mnist(config, out, workers=options.workers, show_progress=False)


def video(options: argparse.Namespace, out: str) -> Manifest:
    """KTH's files by its protocol, or any clips; frames of 128x128."""
    if options.real:
        source = VideoSource(dataset="kth", source=options.source)
    else:
        source = VideoSource(
            dataset="video-folder", source=options.source, size=(128, 128), colour="grey", frames=20
        )
    return _build(source, options, out, OutputSettings())


def radar(options: argparse.Namespace, out: str, form: Any) -> Manifest:
    """Tiles of 128x128 pixels, 20 frames, a new sequence every fourth."""
    plan = RadarPlanSettings(
        frames=20, stride=4, tile=(128, 128), tile_step=(128, 128), proportions={"train": 1.0}
    )
    settings = RadarSettings(source=options.source, include=("*.h5",))
    if not options.real:
        facts = ("quantity=reflectivity", "scale=0.25", "offset=0", "missing=255")
        settings = RadarSettings(source=options.source, reader="images", option=facts)
    return _build(radar_source(settings, plan), options, out, OutputSettings(format=form))


def _build(
    source: Source, options: argparse.Namespace, out: str, output: OutputSettings
) -> Manifest:
    work = WorkSettings(workers=options.workers, show_progress=False)
    return build_archive(source, out, output, work)


WAYS: dict[str, Callable[[argparse.Namespace, str], Manifest]] = {
    "digits, tar": digits,
    "video, tar": video,
    "radar, tar": partial(radar, form="webdataset"),
    "radar, zarr": partial(radar, form="zarr"),
}


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(options: argparse.Namespace, out: str) -> dict[str, Any]:
    """Make the archive; what it took, and what it is."""
    before, started = cpu_seconds(), time.perf_counter()
    manifest = WAYS[options.way](options, out)
    seconds = time.perf_counter() - started
    frame_bytes = manifest.channels * manifest.height * manifest.width
    frame_bytes *= np.dtype(manifest.dtype).itemsize
    sequences = sum(map(manifest.num_samples, manifest.splits))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - before,
        "sequences": sequences,
        "bytes": sequences * manifest.num_frames * frame_bytes,
        "hash": manifest.content_hash,
    }


def profiled(options: argparse.Namespace, out: str) -> list[tuple[str, float]]:
    """Where processor time goes, in this process alone: functions and their own parts of all."""
    profile = cProfile.Profile(time.process_time)
    profile.runcall(WAYS[options.way], options, out)
    stats = pstats.Stats(profile)
    own = {key: values[2] for key, values in stats.stats.items()}  # type: ignore[attr-defined]
    total = sum(own.values())
    shown = sorted(own, key=lambda key: -own[key])[:_SHOWN]
    return [(_name(*key), own[key] / total) for key in shown]


def _name(file: str, line: int, function: str) -> str:
    """Without folders of a machine."""
    return function if file == "~" else f"{function} of {Path(file).stem}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=tuple(WAYS), required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--source", default="")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--sequences", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    warm_up = argparse.Namespace(**{**vars(options), "workers": 1})
    with tempfile.TemporaryDirectory() as folder:
        WAYS[options.way](warm_up, folder)
    with tempfile.TemporaryDirectory() as folder:
        found = profiled(options, folder) if options.profile else measure(options, folder)
    json.dump(found, sys.stdout)
