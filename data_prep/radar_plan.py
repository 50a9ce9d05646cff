"""Which radar frames become which sequences: quality, splits, windows and filters.

`plan_radar` is a pure function of the facts about the frames and of the settings. It works in this
order, and reports what each step leaves out:

    1. one frame for each time of a series (duplicates), with something observed in it
    2. the interval between frames, and what is missing (`data_prep.quality`)
    3. splits by event, day, series, or range of time; near another split, frames are left out
    4. runs of frames at exactly the interval, inside one split and one series
    5. windows of the wanted length along the runs, filters by rain amount and observed part, tiles
       of the frame (`data_prep.windows`)

The split is a function of time alone, also of several series: two products, or two neighbouring
regions, show the same weather at the same time. Only `split_by="series"` says that they do not.

The default gap of one hour between splits is the horizon of the common nowcasting tasks: no model
has trained on what it is to foresee from the first frames of a test. Weather remembers longer than
that: 16 x 16 block means of three Swiss events and a Dutch one correlate with those an hour later
by 0.2 to 0.75 (median of an event), two hours later by up to 0.65. So whole events are the better
split where there are enough of them, and the default.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from data_prep.plan_report import PlannedSplit, split_report
from data_prep.quality import (
    TOLERANCE_MINUTES,
    SeriesInterval,
    intervals_by_series,
    most_common_step,
    quality_report,
    runs_of,
    without_duplicates,
)
from data_prep.source import FrameRecord, Plan
from data_prep.splits import (
    TimeRange,
    assign_groups,
    check_proportions,
    cut_in_time,
    days_of,
    events_of,
    split_of_ranges,
    too_close,
)
from data_prep.windows import (
    Tiles,
    WindowFilter,
    cut_samples,
    series_names,
    windows_along,
    windows_apart,
)
from tmu_dist.data.manifest import SPLITS

SplitBy: TypeAlias = Literal["event", "day", "time", "series", "range"]

DEFAULT_PROPORTIONS: Mapping[str, float] = {"train": 0.8, "val": 0.1, "test": 0.1}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RadarPlanSettings:
    """How sequences are cut from radar frames."""

    frames: int = 20
    """Frames in a sequence."""
    stride: int = 1
    """Frames from one training window to the next of the same run."""
    evaluation_stride: int | None = None
    """The same for validation and test; windows that share no time when left out."""
    interval_minutes: float | None = None
    """Time between the frames of a sequence, a multiple of the product's; the product's when left
    out. At twice the product's, even and odd frames make two interleaved runs, and training uses
    both; validation and test take from either what does not overlap in time."""
    split_by: SplitBy | None = None
    """What is given to splits as a whole. event: stretches without a pause of event_gap_hours; day:
    UTC days; series: each series, for collections of unrelated sequences; time: the first part of
    the times, the middle, the last; range: as val and test say. When left out: range where val or
    test are given, else event; fewer events than splits are cut in time instead, and too few
    frames for three splits all train (the archive's report says which it was)."""
    val: tuple[str, ...] = ()
    """Times of validation (UTC), such as 2017-01-31, 2010-08-26T05:30/2010-08-26T08:00, 2016/.. or
    ../2015-06; both ends included. All times of neither val nor test train."""
    test: tuple[str, ...] = ()
    """Times of the test, written as those of val."""
    proportions: Mapping[str, float] | None = None
    """Shares of the splits, unless val or test are given; 80, 10 and 10 % when left out."""
    seed: int = 0
    """Of the draw of events, days or series, and of dry windows."""
    event_gap_hours: float = 6.0
    """A pause of at least this length separates events, if it is two of the product's intervals."""
    split_gap_minutes: float = 60.0
    """Training frames less than this from a validation or test frame are left out, and validation
    frames less than this from a test frame."""
    min_wet_fraction: float = 0.0
    """A window is dry when the mean over its frames of the wet part of the observed pixels is
    below this; 0 for no filter."""
    keep_dry: float = 0.0
    """Probability with which a dry window is kept, then with the weight 1 / keep_dry."""
    min_observed: float = 0.0
    """Leave out windows with a frame of which less than this part was observed."""
    tile: tuple[int, int] | None = None
    """HEIGHT WIDTH of tiles to cut from the stored frames; whole frames when left out. Filters go
    by the whole frame."""
    tile_step: tuple[int, int] | None = None
    """Rows and columns from one tile to the next; side by side when left out."""
    on_duplicate: Literal["stop", "first"] = "stop"
    """Different frames of one time and series: an error, or only the first by file name counts."""

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "evaluation_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("interval_minutes", "event_gap_hours"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if not self.split_gap_minutes >= 0:
            raise ValueError(f"split_gap_minutes must be at least 0, got {self.split_gap_minutes}.")
        for name in ("min_wet_fraction", "keep_dry", "min_observed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.keep_dry and not self.min_wet_fraction:
            raise ValueError("keep_dry says what happens to dry windows: set min_wet_fraction.")
        self._check_tiles()
        self._check_splits()

    def _check_tiles(self) -> None:
        if self.tile_step is not None and self.tile is None:
            raise ValueError("tile_step says how tiles follow each other: set tile.")
        for name in ("tile", "tile_step"):
            sizes = getattr(self, name)
            if sizes is not None and (len(sizes) != 2 or min(sizes) < 1):
                raise ValueError(f"{name} needs two numbers of at least 1, got {sizes}.")

    def _check_splits(self) -> None:
        given = bool(self.val or self.test)
        if given != (self.policy == "range"):
            raise ValueError(
                f"split_by={self.split_by!r} with val={self.val}, test={self.test}: time ranges go "
                "with split_by='range', and that needs at least one of them."
            )
        if given and self.proportions is not None:
            raise ValueError("proportions have no effect where val and test are time ranges.")
        _ = self.wanted, self.ranges  # parsed, so that mistakes are named at once

    @property
    def policy(self) -> SplitBy:
        """The way of splitting, after None was resolved."""
        return self.split_by or ("range" if self.val or self.test else "event")

    @property
    def ranges(self) -> dict[str, list[TimeRange]]:
        """Time ranges by split."""
        texts = {"val": self.val, "test": self.test}
        return {split: [TimeRange.parse(t) for t in texts[split]] for split in texts}

    @property
    def wanted(self) -> list[str]:
        """Splits that must not be empty; of ranges, not even training has to be there."""
        if self.policy == "range":
            return [split for split, ranges in self.ranges.items() if ranges]
        return list(check_proportions(self.proportions or DEFAULT_PROPORTIONS))


def plan_radar(
    records: Sequence[FrameRecord],
    settings: RadarPlanSettings,
    *,
    height: int,
    width: int,
    declared_interval_minutes: float | None,
) -> Plan:
    """Return which sequences an archive gets, and a report of what it does not get.

    Args:
        records: facts about all converted frames; their order plays no part.
        settings: how to cut.
        height: of the converted frames.
        width: of the converted frames.
        declared_interval_minutes: time between frames as the product says; None: estimate it.

    Returns:
        The plan. Its report has `interval_minutes` (of the sequences), `product_interval_minutes`
        (of the frames), what `data_prep.plan_report.split_report` tells of splits, events and what
        was left out, `quality` (`data_prep.quality.quality_report`) and `tiles`.

    Raises:
        ValueError: frames that contradict each other, an interval that the product cannot give,
            splits that cannot be made, or a split without any sequence; with what was left out.
    """
    if not records:
        raise ValueError("There is no frame to plan from: no file was converted.")
    tiles = Tiles.lay(height, width, settings.tile, settings.tile_step)
    unique = without_duplicates(records, keep_first_of_different=settings.on_duplicate == "first")
    usable = [index for index in unique.kept if records[index].observed_fraction > 0]
    if not usable:
        raise ValueError(f"Nothing was observed in any of the {len(unique.kept)} frames.")
    intervals = intervals_by_series(records, unique.kept, declared_interval_minutes)
    common_minutes = _common_step(intervals)
    product_minutes = declared_interval_minutes or common_minutes
    _warn_of_other_steps(intervals, product_minutes)
    interval_minutes = _sequence_interval(
        product_minutes, common_minutes, settings.interval_minutes
    )
    times = [records[index].order for index in usable]
    # The step of a slow product is no pause: a frame has to be missing.
    pause_minutes = max(settings.event_gap_hours * 60, 2 * product_minutes, 2 * common_minutes)
    events = dict(zip(usable, events_of(times, pause_minutes / 60), strict=True))
    settings = _with_split_that_fits(settings, events, times, interval_minutes)
    split_of = _assign_splits(records, events, settings)
    splits = _cut_splits(records, split_of, events, settings, tiles, interval_minutes)
    _check_wanted(splits, settings, interval_minutes, common_minutes)
    report = {
        "interval_minutes": interval_minutes,
        "product_interval_minutes": product_minutes,
        "split_by": settings.policy,
        **split_report(records, splits, events, num_unique=len(unique.kept)),
        "quality": quality_report(records, unique, intervals, pause_minutes),
        "tiles": tiles.record(),
    }
    return Plan(
        sequences=tuple(sample for split in splits.values() for sample in split.result.samples),
        num_frames=settings.frames,
        height=tiles.size[0],
        width=tiles.size[1],
        report=report,
    )


def _common_step(intervals: Mapping[str, SeriesInterval]) -> float:
    """Return the most common step over all series; without any step, what was declared."""
    steps: Counter[float] = Counter()
    for interval in intervals.values():
        steps.update(interval.steps)
    return most_common_step(steps) or next(iter(intervals.values())).interval_minutes


def _warn_of_other_steps(intervals: Mapping[str, SeriesInterval], product_minutes: float) -> None:
    others = [
        f"{series or 'the frames'}: every {interval.common_minutes:g}"
        for series, interval in sorted(intervals.items())
        if interval.common_minutes is not None
        and abs(interval.common_minutes - product_minutes) > TOLERANCE_MINUTES
    ]
    if others:
        logger.warning(
            "The interval is %g minutes, but most frames follow each other otherwise in %s%s.",
            product_minutes,
            ", ".join(others[:5]),
            f" and {len(others) - 5} more series" if len(others) > 5 else "",
        )


def _sequence_interval(
    product_minutes: float, common_minutes: float, wanted_minutes: float | None
) -> float:
    """Return the time between the frames of a sequence.

    Raises:
        ValueError: it is a multiple neither of the product's interval nor of the common step.
    """
    if wanted_minutes is None:
        return product_minutes
    for base in (product_minutes, common_minutes):
        factor = round(wanted_minutes / base)
        if factor >= 1 and abs(factor * base - wanted_minutes) <= TOLERANCE_MINUTES:
            return wanted_minutes
    raise ValueError(
        f"interval_minutes={wanted_minutes:g} cannot be had from frames every "
        f"{product_minutes:g} minutes: frames are chosen, never interpolated. Take a multiple of "
        f"{product_minutes:g}."
    )


def _with_split_that_fits(
    settings: RadarPlanSettings,
    events: Mapping[int, str],
    times: Sequence[float],
    interval_minutes: float,
) -> RadarPlanSettings:
    """Where nobody said how to split and there are too few events: cut in time, or only train.

    Validation and test get the tenth of the times that is usual, or as many as a sequence and the
    gap beside it need.
    """
    left_open = settings.split_by is None and settings.proportions is None
    num_events, num_splits = len(set(events.values())), len(DEFAULT_PROPORTIONS)
    if not left_open or settings.policy != "event" or num_events >= num_splits:
        return settings
    count = len(set(times))
    gap = math.ceil(settings.split_gap_minutes / interval_minutes)
    val, test = (max(math.ceil(count / 10), settings.frames + n) for n in (gap, 0))
    train = count - val - test
    if train >= settings.frames + gap:
        proportions = {"train": train / count, "val": val / count, "test": test / count}
        logger.warning(
            "%d event(s) cannot be dealt to %d splits: the earliest %.0f %% of the times train, "
            "the latest %.0f %% test. Give --val and --test, or --split-by, to choose.",
            num_events,
            num_splits,
            100 * proportions["train"],
            100 * proportions["test"],
        )
    else:
        proportions = {"train": 1.0}
        logger.warning(
            "%d frames are too few for sequences of %d frames in %d splits: all of them train. "
            "Give --frames, --split-gap-minutes, --val and --test to choose.",
            count,
            settings.frames,
            num_splits,
        )
    return dataclasses.replace(settings, split_by="time", proportions=proportions)


def _assign_splits(
    records: Sequence[FrameRecord], events: Mapping[int, str], settings: RadarPlanSettings
) -> dict[int, str]:
    """Return the split of each usable frame, in order."""
    usable = list(events)
    times = [records[index].order for index in usable]
    proportions = settings.proportions or DEFAULT_PROPORTIONS
    policy = settings.policy
    if policy == "range":
        return dict(zip(usable, split_of_ranges(settings.ranges, times), strict=True))
    if policy == "time":
        return dict(zip(usable, cut_in_time(times, proportions), strict=True))
    if policy == "event":
        groups = [events[index] for index in usable]
    elif policy == "day":
        groups = days_of(times)
    else:
        groups = [records[index].group or records[index].series for index in usable]
    what = {"event": "events", "day": "days", "series": "series"}[policy]
    try:
        chosen = assign_groups(Counter(groups), proportions, settings.seed, what=what)
    except ValueError as error:
        raise ValueError(
            f"{error} (Now split_by={policy!r}; 'time' cuts any stretch, losing "
            f"{settings.split_gap_minutes:g} minutes at each cut.)"
        ) from error
    return {index: chosen[group] for index, group in zip(usable, groups, strict=True)}


def _cut_splits(
    records: Sequence[FrameRecord],
    split_of: Mapping[int, str],
    events: Mapping[int, str],
    settings: RadarPlanSettings,
    tiles: Tiles,
    interval_minutes: float,
) -> dict[str, PlannedSplit]:
    """Return what each split gets, by split in the order of `SPLITS`."""
    keep = WindowFilter(
        settings.min_observed, settings.min_wet_fraction, settings.keep_dry, settings.seed
    )
    names = series_names(records[index].series for index in split_of)
    far = _far_from_others(records, split_of, settings)
    splits = {}
    for split in SPLITS:
        frames = [index for index in far if split_of[index] == split]
        runs = runs_of(records, frames, interval_minutes)
        if split == "train":
            windows = windows_along(records, runs, settings.frames, settings.stride)
        else:
            stride = settings.evaluation_stride
            windows = windows_apart(
                windows_along(records, runs, settings.frames, 1),
                None if stride is None else stride * interval_minutes,
            )
        result = cut_samples(
            records,
            windows,
            split,
            tiles=tiles,
            keep=keep,
            names=names,
            events=events,
            interval_minutes=interval_minutes,
        )
        all_frames = sum(where == split for where in split_of.values())
        splits[split] = PlannedSplit(all_frames - len(frames), frames, runs, len(windows), result)
    return splits


def _far_from_others(
    records: Sequence[FrameRecord], split_of: Mapping[int, str], settings: RadarPlanSettings
) -> list[int]:
    """Return the frames that stay, in order: the test keeps all, training gives way to both.

    Other series count, too, unless the series are declared to have nothing to do with each other.
    """
    by_series = settings.policy == "series"
    blocks: dict[str, dict[str, list[int]]] = {}
    for index, split in split_of.items():
        series = records[index].series if by_series else ""
        blocks.setdefault(series, {name: [] for name in SPLITS})[split].append(index)
    far: set[int] = set()
    for block in blocks.values():
        stay: list[int] = []
        for split in reversed(SPLITS):  # test, val, train
            times = np.array([records[index].order for index in block[split]], np.float64)
            others = np.array([records[index].order for index in stay], np.float64)
            close = too_close(times, others, settings.split_gap_minutes)
            stay += [index for index, is_close in zip(block[split], close) if not is_close]
        far.update(stay)
    return [index for index in split_of if index in far]


def _check_wanted(
    splits: Mapping[str, PlannedSplit],
    settings: RadarPlanSettings,
    interval_minutes: float,
    common_minutes: float,
) -> None:
    """Refuse a plan in which a wanted split, or everything, is empty; say why it is."""
    empty = [split for split in settings.wanted if not splits[split].result.samples]
    if not empty and any(split.result.samples for split in splits.values()):
        return
    reasons = []
    for name in empty or list(SPLITS):
        split = splits[name]
        longest = max((len(run.frames) for run in split.runs), default=0)
        reasons.append(
            f"{name} has {len(split.frames)} frames (and {split.near_another} that are too close "
            f"to another split), {longest} in its longest run; of {split.windows} windows, "
            f"{split.result.too_little_observed} samples show too little, "
            f"{split.result.dry - split.result.dry_kept} are too dry"
        )
    hint = ""
    if common_minutes > interval_minutes + TOLERANCE_MINUTES:
        hint = f"Most frames are {common_minutes:g} minutes apart: set interval_minutes. "
    raise ValueError(
        f"No sequence of {settings.frames} frames every {interval_minutes:g} minutes for "
        f"{' and '.join(empty) or 'any split'}: {'; '.join(reasons)}. {hint}Take fewer frames, a "
        f"smaller split_gap_minutes (now {settings.split_gap_minutes:g}), another split_by (now "
        f"{settings.policy!r}), weaker filters, or ask for no such split."
    )
