"""A small synthetic radar archive for tests: rain that drifts over a grid with a blind corner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.writers.objects import write_manifest, write_object
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tmu_dist.data.manifest import Grid, Manifest, SourceCard, Units

UNITS = Units(
    quantity="reflectivity", unit="dBZ", scale=70 / 254, offset=0.0, max_code=254, missing_code=255
)
GRID = Grid(
    height=40,
    width=50,
    projection="EPSG:28992",
    unit="m",
    left=0.0,
    top=80_000.0,
    pixel_width=2000.0,
    pixel_height=2000.0,
)
CARD = SourceCard(
    name="Synthetic composite",
    provider="Nobody's weather service",
    licence="CC0 & <no strings attached>",
    citation="Nobody (2024)",
)
STARTS = {
    "train": ["2024-06-01T23:50:00Z", "2024-06-02T01:00:00Z"],
    "val": ["2024-06-05T12:00:00Z"],
}
CORNER = (10, 12)
"""Height and width of the upper left part in which nothing is observed."""


def rain(first: int, num_frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """Codes of blobs of up to 60 and 35 dBZ that move to the right, frames_TCHW."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for t in range(first, first + num_frames):
        blobs = [(60, 25, 12 + 2 * t, 5), (35, 12, 30 + t, 8)]
        dbz_HW = sum(
            peak * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * size**2))
            for peak, row, column, size in blobs
        )
        codes_HW = np.clip(np.round((dbz_HW - UNITS.offset) / UNITS.scale), 0, 254)
        frames.append(codes_HW.astype(np.uint8))
    frames_TCHW = np.stack(frames)[:, None]
    frames_TCHW[..., : CORNER[0], : CORNER[1]] = UNITS.missing_code
    return frames_TCHW


def write_radar_archive(
    folder: Path,
    *,
    num_frames: int = 5,
    objects: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Manifest:
    """Write the archive; `objects` are JSON records by path, `changes` other manifest fields."""
    url = str(folder)
    splits = {}
    for split, starts in STARTS.items():
        samples = [
            Sample(
                f"{split}-{i}",
                rain(i, num_frames, GRID.height, GRID.width),
                {"sample_id": i, "start": start, "interval_minutes": 5.0, "wet_fraction": 0.25},
            )
            for i, start in enumerate(starts)
        ]
        splits[split] = (write_shard(url, shard_path(split, 0), samples),)
    stored = tuple(
        write_object(url, path, json.dumps(record).encode())
        for path, record in (objects or {}).items()
    )
    fields: dict[str, Any] = {
        "name": "rain",
        "num_frames": num_frames,
        "channels": 1,
        "height": GRID.height,
        "width": GRID.width,
        "units": UNITS,
        "frame_interval_minutes": 5.0,
        "splits": splits,
        "objects": stored,
        "grid": GRID,
        "source": CARD,
        "created_by": {"source": {"kind": "synthetic", "seed": 7}},
    }
    manifest = Manifest(**(fields | changes))
    write_manifest(url, manifest)
    return manifest
