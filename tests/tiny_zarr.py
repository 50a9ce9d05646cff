"""A Zarr archive small enough to be written anew by every test."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.verify import verify_archive
from data_prep.writers.objects import write_manifest
from data_prep.writers.zarr_store import (
    ZarrLayout,
    create_split,
    finish_store,
    write_frames,
    zarr_shards,
)
from data_prep.writers.zarr_tables import FrameAxis, ZarrSample
from tests import archive_place
from tests.archive_place import Place
from tmu_dist.data.manifest import Grid, Manifest, SourceCard, StoredObject, Units

RADAR = Units(
    quantity="reflectivity", unit="dBZ", scale=0.5, offset=-10.0, max_code=140, missing_code=255
)
FINE_RADAR = dataclasses.replace(RADAR, scale=0.01, max_code=65_534, missing_code=65_535)
VIDEO = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)
GRID = Grid(
    height=10,
    width=14,
    projection="+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 +ellps=WGS84 +units=m",
    unit="m",
    left=1000.0,
    top=-3000.0,
    pixel_width=100.0,
    pixel_height=200.0,
)
SOURCE = SourceCard(name="test", provider="nobody", licence="CC0-1.0")

NUM_FRAMES, PER_SHARD = 11, 4
EMPTY_SHARD = 1
"""Of this one, every pixel is missing."""
ORIGINS = [(0, 0, 0), (1, 4, 6), (2, 0, 6), (4, 4, 0), (5, 1, 1), (8, 4, 6)]
"""Samples of 3 frames, 6x8 pixels; some end in the next shard."""
START_MINUTES = 24_000_000.0
SHARD = "train/reflectivity/c/{}/0/0"


def frames_of(layout: ZarrLayout) -> np.ndarray:
    """Codes that differ everywhere, with missing pixels where the units know them."""
    random = np.random.default_rng(len(layout.split))
    shape = (layout.num_frames, layout.channels, layout.height, layout.width)
    frames = random.integers(0, layout.units.max_code, shape, endpoint=True).astype(layout.dtype)
    if layout.units.missing_code is not None:
        frames[random.random(shape) < 0.2] = layout.units.missing_code
        frames[EMPTY_SHARD * PER_SHARD : (EMPTY_SHARD + 1) * PER_SHARD] = layout.units.missing_code
    return frames


def layout_of(url: str, split: str, units: Units, dtype: str, channels: int) -> ZarrLayout:
    return ZarrLayout(
        url=url,
        split=split,
        units=units,
        num_frames=NUM_FRAMES,
        channels=channels,
        height=GRID.height,
        width=GRID.width,
        dtype=dtype,
        frames_per_shard=PER_SHARD,
        chunk_frames=2,
        tile=6,
    )


def samples_of(split: str) -> list[ZarrSample]:
    return [
        ZarrSample(f"{split}-{i}", *origin, 1.0 + i, {"sample_id": i, "event": "größer"})
        for i, origin in enumerate(ORIGINS)
    ]


def write_archive(
    url: str,
    *,
    units: Units = RADAR,
    dtype: str = "uint8",
    channels: int = 1,
    is_clock: bool = True,
    edit_samples: Callable[[list[ZarrSample]], Any] = lambda samples: samples,
) -> str:
    """Write train and val splits of 11 frames in shards of 4, 6 samples each."""
    splits, created = {}, []
    grid = GRID if is_clock else None
    for split in ("train", "val"):
        layout = layout_of(url, split, units, dtype, channels)
        samples = samples_of(split)
        edit_samples(samples)
        start, step = (START_MINUTES, 5.0) if is_clock else (1.0, 1.0)
        axis = FrameAxis(["a"] * 8 + ["b"] * 3, [start + step * i for i in range(11)], is_clock)
        created += create_split(layout, axis, samples, title="tiny", grid=grid, source=SOURCE)
        splits[split] = zarr_shards(layout, write_shards(layout), samples)
    manifest = Manifest(
        name="tiny",
        num_frames=3,
        channels=channels,
        height=6,
        width=8,
        units=units,
        frame_interval_minutes=5.0 if is_clock else None,
        format="zarr",
        splits=splits,
        objects=finish_store(url, created),
        grid=grid,
        source=SOURCE,
        created_by={"source": "test"},
        dtype=dtype,  # type: ignore[arg-type]
    )
    write_manifest(url, manifest)
    return url


def part_of(layout: ZarrLayout, number: int) -> np.ndarray:
    """The frames of one shard."""
    numbers = layout.shard_frames(number)
    return frames_of(layout)[numbers.start : numbers.stop]


def write_shards(layout: ZarrLayout) -> list[StoredObject]:
    return [write_frames(layout, n, part_of(layout, n)) for n in range(layout.num_shards)]


def block(frames: np.ndarray, origin: tuple[int, int, int]) -> np.ndarray:
    t, y, x = origin
    return frames[t : t + 3, :, y : y + 6, x : x + 8]


ZARRS = "zarrs.ZarrsCodecPipeline"


def place_of(way: str, folder: Path, **options: Any) -> Place:
    """Write an archive to be read in one of the `WAYS`, given an empty folder."""
    return archive_place.place_of(way, folder, write_archive, **options)


def problems_of(archive: Path | str) -> list[str]:
    return [str(problem) for problem in verify_archive(str(archive), show_progress=False)]
