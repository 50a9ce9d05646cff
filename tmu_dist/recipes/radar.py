"""Rain: teachers learn Swiss and Finnish composites, the student a Dutch one (after Table 4).

The paper's radar data (Guangzhou and Beijing) are not public; this is the same situation on public
files of three weather services. Where the files lie is said by $TMU_DIST_RADAR, a folder with
`mch`, `fmi` and `knmi` in it (docs/radar.md). All three are brought to one scale, 0 to 70 dBZ every
five minutes, because teachers must mean the same by a number as their student.

Each recipe exists in two sizes that differ in values only: `radar-*` trains on two cores,
`paper-radar-*` has the paper's size (256x256, 3x3 filters, 4 x 64, Sec. 4.3). `study-radar-*` is
`radar-*` trained for longer, for studies. These two also have teachers that know no rain, of two
flying digits and of walking people (Table 4: `*-tmu-mnist2-kth`, `*-tmu-all`): they see the radar
frames in the size of their own, where a patch makes the same maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from tmu_dist.config import ModelConfig, ScheduleConfig, TrainingConfig, WindowConfig
from tmu_dist.recipes import digits
from tmu_dist.recipes.base import (
    Archives,
    ExperimentSize,
    OwnNetwork,
    Recipes,
    transfer_recipes,
)
from tmu_dist.recipes.clips import digits_archive, kth_archive
from tmu_dist.recipes.originals import RADAR, originals
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
OTHER_SOURCES = ("mnist2", "kth")
"""Less relevant ones: two flying digits, and people of the KTH clips."""


@dataclass(frozen=True, kw_only=True)
class Size(ExperimentSize):
    """Everything in which the small and the paper's experiment differ."""

    shrink: int
    """Original pixels on the side of a stored one."""
    tile: int
    """Side of a sequence's frames, in stored pixels."""
    tiles_per_side: int
    """Overlapping tiles that are cut from the square of each region, in each direction."""
    archive_prefix: str
    """First part of the names of radar archives."""
    patch_of: dict[str, int]
    """Patch size of the teachers that know no rain, by source; the side of their frames is that
    many times the side of the student's maps."""

    digit_sequences: tuple[int, int, int]
    """Training, validation and test sequences of two digits as a source."""

    @property
    def map_side(self) -> int:
        """Pixels on the side of the memories."""
        return self.tile // self.model.patch_size


SMALL = Size(
    prefix="radar",
    archive_prefix="radar",
    digit_sequences=digits.STUDY.source_sequences,
    patch_of={"mnist2": 2, "kth": 4},
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

STUDY = replace(
    SMALL,
    prefix="study-radar",
    training=replace(
        SMALL.training, num_steps=digits.STUDY_STEPS, sampling_stop_step=digits.STUDY_STEPS // 2
    ),
    teacher_steps=digits.STUDY_CLIP_TEACHER_STEPS,
    schedule=digits.STUDY_SCHEDULE,
)

PAPER = Size(
    prefix="paper-radar",
    archive_prefix="paper-radar",
    digit_sequences=digits.PAPER.source_sequences,
    patch_of={"mnist2": 2, "kth": 4},
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
    """Every recipe of the two sizes, by prefix, then by name."""
    small = transfer_recipes(SMALL, partial(_archive, SMALL), sources=SOURCES, target=TARGET)
    return {SMALL.prefix: small, PAPER.prefix: _with_other_sources(PAPER)}


def study_experiments() -> dict[str, Recipes]:
    """Those of the studies' small scale."""
    return {STUDY.prefix: _with_other_sources(STUDY)}


def _with_other_sources(size: Size) -> Recipes:
    return transfer_recipes(
        size,
        partial(_archive, size),
        sources=SOURCES,
        target=TARGET,
        unlike={
            source: OwnNetwork(model=replace(size.model, patch_size=patch), window=size.window)
            for source, patch in size.patch_of.items()
        },
        sets={"mnist2-kth": OTHER_SOURCES, "all": (*SOURCES, *OTHER_SOURCES)},
    )


def _archive(size: Size, name: str) -> Archives:
    """The archive of one source by URL, with the arguments of `python -m data_prep`."""
    if name in OTHER_SOURCES:
        url, frames = in_workspace(f"archives/{size.prefix}-{name}"), size.window.num_frames
        side = size.patch_of[name] * size.map_side
        if name == "kth":
            return kth_archive(url, frames=frames, side=side)
        return digits_archive(url, frames=frames, side=side, sequences=size.digit_sequences)
    raw, region = originals(RADAR), REGIONS[name]
    title = f"{size.archive_prefix}-{name}"
    url = in_workspace(f"archives/{title}")
    side = region.pixels // size.shrink
    step = (side - size.tile) // max(size.tiles_per_side - 1, 1) or 1
    arguments = (
        *("radar", "--source", f"{raw}/{name}", "--out", url, "--name", title),
        *("--crop", str(region.top), str(region.left), str(region.pixels), str(region.pixels)),
        *("--size", str(side), str(side)),
        *("--tile", str(size.tile), str(size.tile), "--tile-step", str(step), str(step)),
        *("--frames", str(size.window.num_frames), "--evaluation-stride", "1"),
        *region.splits,
    )
    return {url: arguments}
