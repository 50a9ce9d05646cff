"""Rain: teachers learn Swiss and Finnish composites, the student a Dutch one (after Table 4).

The paper's radar data (Guangzhou and Beijing) are not public; this is the same situation on public
files of three weather services. Where the files lie is said by $TMU_DIST_RADAR, a folder with
`mch`, `fmi` and `knmi` in it (docs/radar.md). All three are brought to one scale, 0 to 70 dBZ every
five minutes, because teachers must mean the same by a number as their student.

Each recipe exists in two sizes that differ in values only: `radar-*` trains on two cores,
`paper-radar-*` has the paper's size (256x256, 3x3 filters, 4 x 64, Sec. 4.3).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from tmu_dist.config import ModelConfig, ScheduleConfig, TrainingConfig, WindowConfig
from tmu_dist.recipes.base import Archives, ExperimentSize, Recipes, transfer_recipes
from tmu_dist.workspace import in_workspace


@dataclass(frozen=True, kw_only=True)
class Region:
    """One service's files: which part of the field, which times."""

    pixels: int
    """Side of the square, in original pixels of 1 km, that is observed in every frame."""
    top: int
    left: int
    splits: tuple[str, ...]
    """Arguments that say which times validate and test."""


REGIONS = {
    "mch": Region(pixels=384, top=101, left=179, splits=("--val", "2017-01-31")),
    "fmi": Region(pixels=544, top=526, left=134, splits=("--val", "2017-05-09")),
    "knmi": Region(
        pixels=288,
        top=284,
        left=225,
        splits=(
            *("--val", "2010-08-26T03:40/2010-08-26T05:20"),
            *("--test", "2010-08-26T05:30/2010-08-26T07:35"),
            *("--split-gap-minutes", "10"),
        ),
    ),
}
SOURCES = ("mch", "fmi")
TARGET = "knmi"


@dataclass(frozen=True, kw_only=True)
class Size(ExperimentSize):
    """Everything in which the small and the paper's experiment differ."""

    shrink: int
    """Original pixels on the side of a stored one."""
    tile: int
    """Side of a sequence's frames, in stored pixels."""
    tiles_per_side: int
    """Overlapping tiles that are cut from the square of each region, in each direction."""


SMALL = Size(
    prefix="radar",
    shrink=2,
    tile=64,
    tiles_per_side=3,
    window=WindowConfig(num_input_frames=6, num_target_frames=6),
    model=ModelConfig(num_layers=2, hidden_channels=32, kernel_size=3),
    # Rain played backwards is no rain: one update an iteration, forwards.
    training=TrainingConfig(
        num_steps=1000, batch_size=8, sampling_stop_step=500, reverse_input="off"
    ),
    teacher_steps=1000,
    schedule=ScheduleConfig(log_every=10, validate_every=100, checkpoint_every=100),
    max_validation_samples=64,
)

PAPER = Size(
    prefix="paper-radar",
    shrink=1,
    tile=256,
    tiles_per_side=2,
    window=WindowConfig(),
    model=ModelConfig(kernel_size=3, patch_size=8),
    training=TrainingConfig(),
    teacher_steps=80_000,
    schedule=ScheduleConfig(),
)


def experiments() -> dict[str, Recipes]:
    """Every recipe of this file, by prefix, then by name."""
    return {
        size.prefix: transfer_recipes(size, partial(_archive, size), sources=SOURCES, target=TARGET)
        for size in (SMALL, PAPER)
    }


def _archive(size: Size, name: str) -> Archives:
    """The archive of one region by URL, with the arguments of `python -m data_prep`."""
    url = in_workspace(f"archives/{size.prefix}-{name}")
    raw = os.environ.get("TMU_DIST_RADAR", in_workspace("radar"))
    region = REGIONS[name]
    side = region.pixels // size.shrink
    step = (side - size.tile) // max(size.tiles_per_side - 1, 1) or 1
    arguments = (
        *("radar", "--source", f"{raw}/{name}", "--out", url, "--name", f"{size.prefix}-{name}"),
        *("--crop", str(region.top), str(region.left), str(region.pixels), str(region.pixels)),
        *("--size", str(side), str(side)),
        *("--tile", str(size.tile), str(size.tile), "--tile-step", str(step), str(step)),
        *("--frames", str(size.window.num_frames), "--evaluation-stride", "1"),
        *region.splits,
    )
    return {url: arguments}
