"""Which frames a run reads: the window and the archive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tmu_dist.config.checks import require


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How many frames a model watches and how many it must predict."""

    num_input_frames: int = 10
    num_target_frames: int = 10

    def __post_init__(self) -> None:
        require(
            self.num_input_frames >= 1 and self.num_target_frames >= 1,
            "A window needs at least one input and one target frame, got "
            f"window.num_input_frames={self.num_input_frames}, "
            f"window.num_target_frames={self.num_target_frames}.",
        )

    @property
    def num_frames(self) -> int:
        """Input and target frames together (T in the paper)."""
        return self.num_input_frames + self.num_target_frames


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which archive is streamed, and how."""

    url: str = "archives/moving-mnist-3"
    """Folder or URL (s3://, gs://, az://, https://) that holds a manifest.json."""
    fraction: float = 1.0
    """Training samples of it to use; 1 is what the archive calls its full training data (all of it,
    unless the manifest says less: then up to 2 or more). Smaller sets lie in larger ones."""
    mix_with: tuple[str, ...] = ()
    """More archives of the same kind of frames to learn from; validation stays with `url`."""
    mix_weights: tuple[float, ...] = ()
    """Each archive's share of an epoch, `url` first; empty: every sample exactly once."""
    shuffle_window: int = 4096
    """Samples among which each lane is shuffled; fewer need fewer shards at a time."""
    shuffle_lanes: int = 16
    """Neighbourhoods of shards that are read in turn; ranks share them."""
    num_workers: int = 0
    """Loader processes of each rank; they never change the order."""
    reading: Literal["auto", "cache", "range"] = "auto"
    """cache: copy shards to this node's disk before they are read; range: fetch samples by byte
    ranges, again in each epoch; auto: local archives in place, others through the cache."""
    cache_folder: str | None = None
    """The node's cache, on a disk of its own; None: $TMU_DIST_CACHE or ~/.cache/tmu_dist."""
    cache_gib: float | None = None
    """Most that all jobs of a node keep in that folder; None: four fifths of the room there."""
    max_validation_samples: int | None = None
    """Validate on the first so many samples of the validation split; None: on all of them."""

    def __post_init__(self) -> None:
        require(
            0.0 < self.fraction < math.inf,
            f"data.fraction must be > 0 and finite (1 is 100 %), got {self.fraction}.",
        )
        require(self.num_workers >= 0, f"data.num_workers must be >= 0, got {self.num_workers}.")
        num_archives = 1 + len(self.mix_with)
        require(
            not self.mix_weights
            or (
                (self.mix_with != () and len(self.mix_weights) == num_archives)
                and all(0.0 < weight < math.inf for weight in self.mix_weights)
            ),
            "data.mix_weights needs one positive number for data.url and each of data.mix_with "
            f"({num_archives} archives), got {list(self.mix_weights)}.",
        )
        for name in ("shuffle_window", "shuffle_lanes"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name} must be >= 1, got {value}.")
        require(
            self.cache_gib is None or self.cache_gib > 0,
            f"data.cache_gib must be > 0 or left out, got {self.cache_gib}.",
        )
        if self.reading == "range":
            for name in ("cache_folder", "cache_gib"):
                require(
                    getattr(self, name) is None,
                    f"data.{name} has no effect with data.reading=range, which keeps no copies.",
                )
        require(
            self.max_validation_samples is None or self.max_validation_samples >= 1,
            f"data.max_validation_samples must be >= 1, got {self.max_validation_samples}.",
        )
