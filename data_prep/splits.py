"""Who goes to training, validation and test: whole groups, or ranges of time, never single frames.

Pure functions of names, times and a seed; the order in which anything is given plays no part.

Times are minutes since 1970 (UTC), as in `data_prep.source.FrameRecord.order`.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.manifest import SPLITS

_ATTEMPTS = 16
_CLOSE_ENOUGH = 0.02

_TIME = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d))?Z?)?)?)?")


def keyed_uniform(*key: object) -> float:
    """Return a number in [0, 1) that depends on the key alone, on every machine and version."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64


def assign_groups(
    groups: Mapping[str, float],
    proportions: Mapping[str, float],
    seed: int,
    *,
    what: str = "groups",
) -> dict[str, str]:
    """Give whole groups to splits so that the splits' sizes come near the wanted proportions.

    Groups are taken in the order of a keyed hash of their names, and each goes to the split that
    lacks most. Of 16 such orders the one that meets the proportions best is used, the first of
    them if it is within 2 %. Every split gets at least one group.

    Args:
        groups: size of each group by name, such as its number of frames.
        proportions: wanted share of each split; they need not add up to 1. A split of share 0 is
            not wanted.
        seed: another seed draws other groups.
        what: how messages call the groups ("events").

    Returns:
        The split of each group.

    Raises:
        ValueError: fewer groups than splits, or shares or sizes that are no positive numbers.
    """
    wanted = check_proportions(proportions)
    if bad := sorted(name for name, size in groups.items() if not 0 < size < math.inf):
        raise ValueError(f"Sizes of {what} must be positive: {bad[0]!r} has {groups[bad[0]]}.")
    if len(groups) < len(wanted):
        names = f" ({', '.join(sorted(groups))})" if groups else ""
        raise ValueError(
            f"There are {len(groups)} {what}{names} for {len(wanted)} splits "
            f"({', '.join(wanted)}), and {what} are never divided. Ask for fewer splits, bring "
            f"more {what}, or split by something finer."
        )
    total = sum(groups.values())
    best: dict[str, str] = {}
    best_error = math.inf
    for attempt in range(_ATTEMPTS):
        order = sorted(groups, key=lambda name: (keyed_uniform(seed, attempt, name), name))
        assigned = _fill(order, groups, {split: wanted[split] * total for split in wanted})
        got = dict.fromkeys(wanted, 0.0)
        for name, split in assigned.items():
            got[split] += groups[name] / total
        error = sum(abs(got[split] - share) for split, share in wanted.items())
        if error < best_error - 1e-12:
            best, best_error = assigned, error
        if best_error <= _CLOSE_ENOUGH:
            break
    return {name: best[name] for name in sorted(best)}


def check_proportions(proportions: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of the wanted splits, adding up to 1, in the order of `SPLITS`.

    Raises:
        ValueError: an unknown split, a share that is negative or no number, or nothing wanted.
    """
    if unknown := sorted(set(proportions) - set(SPLITS)):
        raise ValueError(f"No split {unknown[0]!r}: proportions are of {', '.join(SPLITS)}.")
    if not all(0 <= share < math.inf for share in proportions.values()) or not (
        total := sum(proportions.values())
    ):
        raise ValueError(
            f"Proportions must be at least 0, and not all of them 0, got {dict(proportions)}."
        )
    return {split: proportions[split] / total for split in SPLITS if proportions.get(split)}


def _fill(
    order: Sequence[str], sizes: Mapping[str, float], lacking: dict[str, float]
) -> dict[str, str]:
    """Give each group in turn to the split that lacks most; the last ones fill empty splits."""
    assigned: dict[str, str] = {}
    empty = list(lacking)
    for position, name in enumerate(order):
        candidates = empty if len(order) - position <= len(empty) else list(lacking)
        split = max(candidates, key=lambda candidate: lacking[candidate])
        lacking[split] -= sizes[name]
        assigned[name] = split
        if split in empty:
            empty.remove(split)
    return assigned


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Times from `start` to before `end`; infinite where the range is open."""

    start: float
    end: float
    text: str
    """As it was written."""

    @classmethod
    def parse(cls, text: str) -> TimeRange:
        """Read "2017-01-31", "2010-08-26T05:30/2010-08-26T08:00", "../2016" or "2017/..".

        UTC. Whatever is written is meant as a whole, at both ends: "2017" is that year, a day all
        of that day, and a range to 08:00 includes the minute 08:00.

        Raises:
            ValueError: not of this form, or the end is before the start.
        """
        first, slash, last = text.strip().partition("/")
        start = -math.inf if first == ".." and slash else _parse_time(first, text)[0]
        last = last if slash else first
        end = math.inf if last == ".." and slash else _parse_time(last, text)[1]
        if not start < end:
            raise ValueError(f"The time range {text!r} ends before it starts.")
        return cls(start, end, text)

    def __contains__(self, minutes: float) -> bool:
        return self.start <= minutes < self.end

    def overlaps(self, other: TimeRange) -> bool:
        return self.start < other.end and other.start < self.end


def split_of_ranges(ranges: Mapping[str, Iterable[TimeRange]], times: Iterable[float]) -> list[str]:
    """Return the split of each time: that of the range it lies in, "train" outside of all.

    Raises:
        ValueError: ranges of different splits overlap, or a range holds none of the times.
    """
    placed = [(split, item) for split, items in ranges.items() for item in items]
    for number, (split, one) in enumerate(placed):
        for other_split, other in placed[:number]:
            if split != other_split and one.overlaps(other):
                raise ValueError(
                    f"The ranges {other.text!r} of {other_split} and {one.text!r} of {split} "
                    "overlap: a time belongs to one split only."
                )
    used: set[TimeRange] = set()
    splits = []
    for minutes in times:
        holders = [(split, item) for split, item in placed if minutes in item]
        splits.append(holders[0][0] if holders else "train")
        used.update(item for _, item in holders)
    if unused := [item.text for _, item in placed if item not in used]:
        raise ValueError(
            f"No frame lies in the time range {unused[0]!r}. Times are UTC; correct the range or "
            "leave it out."
        )
    return splits


def cut_in_time(times: Sequence[float], proportions: Mapping[str, float]) -> list[str]:
    """Return the split of each time: the earliest are for training, then validation, then test.

    The cuts fall between different times, so that each split has its share of the times.

    Raises:
        ValueError: fewer different times than splits, or bad proportions.
    """
    wanted = check_proportions(proportions)
    distinct = sorted(set(times))
    if len(distinct) < len(wanted):
        raise ValueError(
            f"There are frames of {len(distinct)} times for {len(wanted)} splits "
            f"({', '.join(wanted)}). Ask for fewer splits, or bring more frames."
        )
    names = list(wanted)
    ends = np.rint(np.cumsum(list(wanted.values())) * len(distinct)).astype(int).tolist()
    for number in range(len(names)):  # at least one time each, from both sides
        ends[number] = max(ends[number], (ends[number - 1] if number else 0) + 1)
        ends[number] = min(ends[number], len(distinct) - (len(names) - 1 - number))
    lasts = [distinct[end - 1] for end in ends]
    return [names[bisect.bisect_left(lasts, minutes)] for minutes in times]


def events_of(times: Sequence[float], gap_hours: float) -> list[str]:
    """Return the event of each time: stretches without a pause of `gap_hours` or longer.

    An event is named by its first time, such as "20100826T0005".
    """
    starts: list[float] = []
    previous = -math.inf
    for minutes in sorted(set(times)):
        if minutes - previous >= gap_hours * 60:
            starts.append(minutes)
        previous = minutes
    names = [time_text(start) for start in starts]
    return [names[bisect.bisect_right(starts, minutes) - 1] for minutes in times]


def days_of(times: Iterable[float]) -> list[str]:
    """Return the UTC day of each time, such as "2010-08-26"."""
    return [as_datetime(minutes).strftime("%Y-%m-%d") for minutes in times]


def too_close(
    times: NDArray[np.float64], others: NDArray[np.float64], gap_minutes: float
) -> NDArray[np.bool_]:
    """Say of each time whether any of the others is less than `gap_minutes` away."""
    if not len(others):
        return np.zeros(len(times), np.bool_)
    ordered = np.sort(others)
    right = np.searchsorted(ordered, times)
    after = ordered[np.minimum(right, len(ordered) - 1)]
    before = ordered[np.maximum(right - 1, 0)]
    return np.minimum(np.abs(after - times), np.abs(times - before)) < gap_minutes


def as_datetime(minutes: float) -> datetime:
    """Return minutes since 1970 as a UTC time, rounded to whole seconds."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=round(minutes * 60))


def time_text(minutes: float) -> str:
    """Return a time as "20100826T0005", with seconds where there are some: letters for keys."""
    time = as_datetime(minutes)
    return time.strftime("%Y%m%dT%H%M%S" if time.second else "%Y%m%dT%H%M")


def iso_time(minutes: float) -> str:
    """Return a time as "2010-08-26T00:05:00Z"."""
    return as_datetime(minutes).strftime("%Y-%m-%dT%H:%M:%SZ")


def _parse_time(text: str, whole: str) -> tuple[float, float]:
    """Return the first and the first following minute of a written year, month, day or time."""
    found = _TIME.fullmatch(text.strip())
    try:
        if not found:
            raise ValueError("it is written otherwise")
        parts = [int(part) for part in found.groups() if part is not None]
        start = datetime(*[*parts, 1, 1][: max(3, len(parts))], tzinfo=UTC)  # type: ignore[misc, arg-type]
        match len(parts):
            case 1:
                end = start.replace(year=start.year + 1)
            case 2:
                end = (start + timedelta(days=31)).replace(day=1)
            case 3:
                end = start + timedelta(days=1)
            case 5:
                end = start + timedelta(minutes=1)
            case _:
                end = start + timedelta(seconds=1)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text!r} in the time range {whole!r} is no time ({error}). Write UTC as 2017, "
            "2017-01, 2017-01-31, 2017-01-31T09:45 or 2017-01-31T09:45:30; START/END for a range, "
            "with '..' for an open end."
        ) from error
    return start.timestamp() / 60, end.timestamp() / 60
