"""From runs of radar frames to samples: windows in time, tiles in space, filters, names.

Pure functions of the facts about the frames. A run (`data_prep.quality.Run`) has exact spacing and
lies in one series and one split; so has every window, and it does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_prep.quality import TOLERANCE_MINUTES, Run
from data_prep.source import FrameRecord, SequencePlan
from data_prep.splits import iso_time, keyed_uniform, time_text

_LONGEST_SERIES_NAME = 40  # a tar member's name ends at 100 characters


class Window(NamedTuple):
    """Frames that follow each other, before tiles are cut."""

    frames: tuple[int, ...]
    """Indices of the records."""
    series: str
    start: float
    """Time of the first frame, in minutes since 1970."""
    end: float
    """Time of the last one."""


def windows_along(
    records: Sequence[FrameRecord], runs: Iterable[Run], num_frames: int, stride: int
) -> list[Window]:
    """Return a window at every `stride`-th frame of each run, by time and series."""
    windows = [
        Window(
            frames := run.frames[first : first + num_frames],
            run.series,
            records[frames[0]].order,
            records[frames[-1]].order,
        )
        for run in runs
        for first in range(0, len(run.frames) - num_frames + 1, stride)
    ]
    return sorted(windows, key=lambda window: (window.start, window.series))


def windows_apart(windows: Iterable[Window], start_distance: float | None) -> list[Window]:
    """Choose windows of each series that lie apart in time, the earliest first.

    Args:
        windows: all there are, by time.
        start_distance: minutes from one start to the next, at least; None: each window starts
            after the end of the one before.
    """
    latest: dict[str, Window] = {}
    chosen = []
    for window in windows:
        if last := latest.get(window.series):
            if start_distance is None and window.start <= last.end + TOLERANCE_MINUTES:
                continue
            if start_distance and window.start < last.start + start_distance - TOLERANCE_MINUTES:
                continue
        latest[window.series] = window
        chosen.append(window)
    return chosen


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where samples are cut from frames of height x width."""

    height: int
    width: int
    size: tuple[int, int]
    places: tuple[tuple[int, int], ...]
    """Top row and left column of each."""

    @classmethod
    def lay(
        cls,
        height: int,
        width: int,
        size: tuple[int, int] | None,
        step: tuple[int, int] | None,
    ) -> Tiles:
        """Lay tiles from the upper left corner, side by side or at a step; None: one, the frame.

        Raises:
            ValueError: a tile is larger than the frame.
        """
        tile_height, tile_width = size or (height, width)
        if tile_height > height or tile_width > width:
            raise ValueError(
                f"Tiles of {tile_height} x {tile_width} pixels do not fit the frames of "
                f"{height} x {width}: choose smaller tiles, or resample less."
            )
        row_step, column_step = step or (tile_height, tile_width)
        places = tuple(
            (top, left)
            for top in range(0, height - tile_height + 1, row_step)
            for left in range(0, width - tile_width + 1, column_step)
        )
        return cls(height, width, (tile_height, tile_width), places)

    def record(self) -> dict[str, Any]:
        """Return JSON values: number of tiles, and the part of the frame that no tile shows."""
        covered = np.zeros((self.height, self.width), np.bool_)
        for top, left in self.places:
            covered[top : top + self.size[0], left : left + self.size[1]] = True
        return {
            "number": len(self.places),
            "height": self.size[0],
            "width": self.size[1],
            "uncovered_fraction": round(1 - float(covered.mean()), 6),
        }


@dataclass(frozen=True, slots=True)
class WindowFilter:
    """Which windows become samples, by the facts about their (whole) frames."""

    min_observed: float = 0.0
    """Part of the pixels that must be observed, in each frame."""
    min_wet_fraction: float = 0.0
    """A window is dry when the mean of its frames' wet fractions is below this."""
    keep_dry: float = 0.0
    """Probability with which a sample of a dry window is kept."""
    seed: int = 0

    def observed_enough(self, window: Window, records: Sequence[FrameRecord]) -> bool:
        return min(records[i].observed_fraction for i in window.frames) >= self.min_observed

    def is_dry(self, window: Window, records: Sequence[FrameRecord]) -> bool:
        """Say whether a window is dry.

        Raises:
            ValueError: there is a filter by rain, and the source does not know the rain.
        """
        if not self.min_wet_fraction:
            return False
        wet = wet_fraction(window, records)
        if wet is None:
            raise ValueError(
                "min_wet_fraction needs to know which pixels are wet, but the source has no wet "
                "threshold for what it stores: give it one, or set min_wet_fraction=0."
            )
        return wet < self.min_wet_fraction

    def keeps_dry_sample(self, key: str) -> bool:
        """Draw by the sample's key: the same for any order and number of other samples."""
        return keyed_uniform(self.seed, "keep_dry", key) < self.keep_dry


def wet_fraction(window: Window, records: Sequence[FrameRecord]) -> float | None:
    """Return the mean of the frames' wet fractions; None where one of them is unknown."""
    fractions = [records[index].wet_fraction for index in window.frames]
    known = [fraction for fraction in fractions if fraction is not None]
    return sum(known) / len(known) if len(known) == len(fractions) else None


class FilteredSamples(NamedTuple):
    """The samples of one split, and the numbers of those that are left out."""

    samples: list[SequencePlan]
    too_little_observed: int
    dry: int
    """Samples of dry windows, kept or not."""
    dry_kept: int


def cut_samples(
    records: Sequence[FrameRecord],
    windows: Iterable[Window],
    split: str,
    *,
    tiles: Tiles,
    keep: WindowFilter,
    names: Mapping[str, str],
    events: Mapping[int, str],
    interval_minutes: float,
) -> FilteredSamples:
    """Cut windows into tiles, filter and name them; in order of time, series and place.

    Args:
        records: facts about the frames.
        windows: of one split, in the order of the samples.
        split: "train", "val" or "test".
        tiles: where to cut.
        keep: what to leave out.
        names: of the series, for keys: `series_names`.
        events: name of each frame's event.
        interval_minutes: between the frames of a window.
    """
    samples: list[SequencePlan] = []
    too_little_observed = dry = dry_kept = 0
    for window in windows:
        if not keep.observed_enough(window, records):
            too_little_observed += len(tiles.places)
            continue
        is_dry = keep.is_dry(window, records)
        meta = _facts(window, records, events, interval_minutes)
        start = names[window.series] + time_text(window.start)
        for top, left in tiles.places:
            key = f"{start}-t{top}-l{left}"
            weight = 1.0
            if is_dry:
                dry += 1
                if not keep.keeps_dry_sample(key):
                    continue
                dry_kept += 1
                weight = 1 / keep.keep_dry
            samples.append(
                SequencePlan(
                    split=split,
                    key=key,
                    frames=window.frames,
                    top=top,
                    left=left,
                    weight=weight,
                    meta=meta,
                )
            )
    return FilteredSamples(samples, too_little_observed, dry, dry_kept)


def series_names(series: Iterable[str]) -> dict[str, str]:
    """Return what keys call each series: nothing when there is one, else its name and "-".

    Names keep letters, digits, "-" and "_"; a name that had to be changed gets a piece of its hash,
    so that no two are alike.
    """
    distinct = sorted(set(series))
    if len(distinct) == 1:
        return {distinct[0]: ""}
    names = {}
    for name in distinct:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:_LONGEST_SERIES_NAME]
        if plain != name or not plain:
            plain = f"{plain or 'series'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        names[name] = f"{plain}-"
    return names


def _facts(
    window: Window,
    records: Sequence[FrameRecord],
    events: Mapping[int, str],
    interval_minutes: float,
) -> dict[str, Any]:
    """Return what a sample's record says of its window; fractions are of whole frames."""
    wet = wet_fraction(window, records)
    observed = sum(records[index].observed_fraction for index in window.frames)
    return {
        "start": iso_time(window.start),
        "end": iso_time(window.end),
        "interval_minutes": interval_minutes,
        "series": window.series,
        "event": events[window.frames[0]],
        "observed_fraction": round(float(observed) / len(window.frames), 6),
        # Of a numpy number, round is another function: it may differ from that of the same number
        # that came back from a record.
        "wet_fraction": None if wet is None else round(float(wet), 6),
    }
