"""A small radar archive for tests: rain that moves, a border that was not observed.

Shape letters: T time, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tmu_dist.data.manifest import SPLITS, Grid, Manifest, Units

DBZ = Units(
    quantity="reflectivity", unit="dBZ", scale=70 / 254, offset=0.0, max_code=254, missing_code=255
)


def moving_rain(seed: int, *, num_frames: int = 6, size: int = 48) -> NDArray[np.uint8]:
    """Codes [T, 1, H, W] of a few cells up to 55 dBZ that move to the south-east; two columns at
    the left edge are missing."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    dbz_THW = np.zeros((num_frames, size, size))
    for _ in range(5):
        (y, x), width = rng.uniform(-0.5 * size, size, 2), rng.uniform(4, 9)
        for t in range(num_frames):
            distance_HW = (rows - y - 1.5 * t) ** 2 + (columns - x - 2.0 * t) ** 2
            cell_HW = rng.uniform(0.95, 1.0) * 55 * np.exp(-distance_HW / (2 * width**2))
            dbz_THW[t] = np.maximum(dbz_THW[t], cell_HW)
    codes_TCHW = np.round(dbz_THW / DBZ.scale).astype(np.uint8)[:, None]
    codes_TCHW[..., :2] = DBZ.missing_code
    return codes_TCHW


def write_radar_archive(folder: Path, *, num_samples: int = 5, num_frames: int = 6) -> str:
    """Write an archive with equally many samples in every split; returns its address."""
    splits = {}
    for number, split in enumerate(SPLITS):
        samples = [
            Sample(
                key=f"{split}-{i}",
                frames_TCHW=moving_rain(100 * number + i, num_frames=num_frames),
                meta={"sample_id": i},
            )
            for i in range(num_samples)
        ]
        splits[split] = (write_shard(str(folder), shard_path(split, 0), samples),)
    manifest = Manifest(
        name="synthetic-rain",
        num_frames=num_frames,
        channels=1,
        height=48,
        width=48,
        units=DBZ,
        frame_interval_minutes=5.0,
        splits=splits,
        grid=Grid(
            height=48, width=48, projection="EPSG:28992", unit="m", left=0.0, top=96_000.0,
            pixel_width=2000.0, pixel_height=2000.0,
        ),
        created_by={"source": "synthetic"},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return str(folder)
