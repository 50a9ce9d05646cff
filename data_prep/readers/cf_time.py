"""When the fields of a CF dataset were measured, and over how long sums were taken."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.cf_fields import Meaning
from data_prep.readers.cf_model import CFDataset, CFOptions, CFVariable, minutes_in
from data_prep.readers.radar import BadFileError, import_extra
from data_prep.readers.raw import time_in

_SINCE = re.compile(
    r"(?P<unit>[a-z]+)\s+since\s+(?P<date>[-+]?\d{1,4}-\d{1,2}-\d{1,2})"
    r"(?:[T\s]+(?P<clock>\d{1,2}(?::\d{1,2}(?::\d{1,2}(?:\.\d*)?)?)?))?\s*(?P<zone>.*)",
    re.I,
)
_SECONDS = {
    "nanosecond": 1e-9,
    "microsecond": 1e-6,
    "millisecond": 1e-3,
    "msec": 1e-3,
    "second": 1.0,
    "sec": 1.0,
    "s": 1.0,
    "minute": 60.0,
    "min": 60.0,
    "hour": 3600.0,
    "hr": 3600.0,
    "h": 3600.0,
    "day": 86400.0,
    "d": 86400.0,
}
_REAL_CALENDARS = ("", "standard", "gregorian", "proleptic_gregorian")
_END_NAMES = ("valid_time", "end_time", "stop_time", "time_end", "time_valid", "time")
_START_NAMES = ("start_time", "time_start")
_GLOBAL_ENDS = ("valid_time", "nominal_product_time", "time_coverage_end")
_LONGEST_STEP_MINUTES = 15.0
"""Longer sums may be issued more often than they last, so they do not tell the interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Times of all fields of a variable."""

    dim: str | None
    """Dimension of the variable that counts them; None where there is one field."""
    times: tuple[datetime, ...]
    leads: tuple[float, ...]
    """Minutes after the time at which a forecast was made; 0 for observations."""
    interval_minutes: float | None
    accumulation_minutes: float | None
    notes: tuple[str, ...]


def find_times(
    dataset: CFDataset, field: CFVariable, meaning: Meaning, options: CFOptions
) -> Times:
    """Work out the times of a field: of a coordinate, of the whole dataset, or of the file name.

    Where the coordinate has bounds, a field has the time at which its interval ends.

    Raises:
        BadFileError: no time, an unreadable one, or a sum over an unknown or changing duration.
    """
    dim = time_dim_of(dataset, field)
    variable = _time_variable(dataset, field, dim)
    notes: list[str] = []
    spans: list[float] = []
    if variable is None:
        times = [_time_of_whole(dataset, field, dim, notes)]
    else:
        times = _decode(dataset, variable, variable.values().ravel())
        bounds = _bounds(dataset, field, variable)
        if bounds is not None:
            starts = [min(pair) for pair in zip(*bounds, strict=True)]
            times = [max(pair) for pair in zip(*bounds, strict=True)]
            spans = [_minutes(b - a) for a, b in zip(starts, times, strict=True)]
        elif starts := _starts(dataset, field, variable, len(times)):
            spans = [_minutes(b - a) for a, b in zip(starts, times, strict=True)]
    accumulation = None
    if meaning.quantity == "accumulation":
        accumulation, said_by = _accumulation(dataset, field, meaning, options, spans, times)
        notes.append(f"Sums over {accumulation:g} minutes ({said_by}).")
    steps = sorted(_minutes(b - a) for a, b in itertools.pairwise(times) if b > a)
    interval = steps[len(steps) // 2] if steps else None
    if interval is None and accumulation is not None and accumulation <= _LONGEST_STEP_MINUTES:
        interval = accumulation
    return Times(
        dim=dim,
        times=tuple(times),
        leads=tuple(_leads(dataset, field, times)),
        interval_minutes=interval,
        accumulation_minutes=accumulation,
        notes=tuple(notes),
    )


def time_dim_of(dataset: CFDataset, field: CFVariable) -> str | None:
    """The dimension of a field that counts times, also if it has one entry; None without one."""
    for dim in field.dims:
        coordinate = dataset.near(field, dim)
        if coordinate is not None and len(coordinate.shape) == 1 and _is_time(coordinate):
            return dim
    names = [dim for dim in field.dims if dim.rpartition("/")[2].lower() in ("time", "t")]
    return names[0] if names else None


def parse_time(text: str) -> datetime | None:
    """An ISO 8601 time, such as 2018-06-01T07:00:00Z, in UTC; None for anything else."""
    try:
        time = datetime.fromisoformat(text.strip().replace(" UTC", "Z"))
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _is_time(variable: CFVariable) -> bool:
    """A coordinate of times; a forecast's time of issue is none of them."""
    reference = variable.text("standard_name") == "forecast_reference_time"
    return _SINCE.match(variable.text("units")) is not None and not reference


def _time_variable(dataset: CFDataset, field: CFVariable, dim: str | None) -> CFVariable | None:
    """The variable that holds the times: along the dimension, or one number beside the field."""
    beside = [variable for variable in dataset.beside(field) if _is_time(variable)]
    if dim is not None:
        of_dim = [variable for variable in beside if variable.dims == (dim,)]
        if of_dim:
            return min(of_dim, key=lambda variable: (_rank(variable), variable.name))
        if field.shape[field.dims.index(dim)] > 1:
            raise BadFileError(
                dataset.path,
                f"has several fields of {field.name}, but no times with a unit such as 'minutes "
                f"since 2000-01-01' along {dim}",
            )
    single = [v for v in beside if int(np.prod(v.shape)) == 1 and _rank(v) < len(_END_NAMES)]
    return min(single, key=lambda variable: (_rank(variable), variable.name), default=None)


def _rank(variable: CFVariable) -> int:
    """How surely a variable is the time at which a measurement ended; low is sure."""
    if variable.short_name in _END_NAMES:
        return _END_NAMES.index(variable.short_name)
    is_coordinate = variable.text("standard_name") == "time" or variable.dims == (variable.name,)
    return len(_END_NAMES) - 1 if is_coordinate else len(_END_NAMES)


def _time_of_whole(
    dataset: CFDataset, field: CFVariable, dim: str | None, notes: list[str]
) -> datetime:
    """The time of a dataset with one field and no coordinate of time."""
    for name in _GLOBAL_ENDS:
        if (time := parse_time(dataset.text(name))) is not None:
            notes.append(f"The time is the global attribute {name}.")
            return time
    if (time := time_in(dataset.path.name)) is not None:
        notes.append("The file has no time; it was taken from the file's name, as UTC.")
        return time
    raise BadFileError(
        dataset.path,
        f"has no time for {field.name}: no variable with a unit such as 'minutes since "
        "2000-01-01', no global attribute time_coverage_end, and none in the file's name "
        "(YYYYMMDDhhmm)",
    )


def _decode(
    dataset: CFDataset, variable: CFVariable, numbers: NDArray[np.float64]
) -> list[datetime]:
    """Times of numbers "since" a date."""
    units = variable.text("units")
    calendar = variable.text("calendar").lower()
    match = _SINCE.match(units)
    seconds = _SECONDS.get(match["unit"].lower()) if match else None
    if match and seconds is None:
        seconds = _SECONDS.get(match["unit"].lower().removesuffix("s"))
    if match is None or seconds is None or not np.isfinite(numbers).all():
        raise BadFileError(
            dataset.path, f"{variable.name} holds no readable times (unit {units!r})"
        )
    try:
        if calendar not in _REAL_CALENDARS:
            cftime = import_extra("cftime", "radar", f"The calendar {calendar}")
            return [
                datetime.fromisoformat(time.isoformat()).replace(tzinfo=UTC)
                for time in cftime.num2date(numbers, units, calendar)
            ]
        since = _since(match)
        # Whole seconds: fractions of days in double precision are microseconds off.
        whole = np.rint(numbers * seconds).astype(np.int64).tolist()
        return [since + timedelta(seconds=second) for second in whole]
    except (ValueError, OverflowError) as error:
        raise BadFileError(
            dataset.path, f"{variable.name} ({units}, calendar {calendar or 'standard'}): {error}"
        ) from error


def _since(match: re.Match[str]) -> datetime:
    """The date after "since", in UTC."""
    year, month, day = map(int, match["date"].split("-"))
    clock = [float(part) for part in (match["clock"] or "0").split(":")]
    hours, minutes, seconds = (*clock, 0.0, 0.0)[:3]
    zone = match["zone"].strip()
    offset = re.fullmatch(r"([-+]?)(\d{1,2}):?(\d\d)?", zone)
    shift = timedelta()
    if offset:
        shift = timedelta(hours=int(offset[2]), minutes=int(offset[3] or 0))
        shift = -shift if offset[1] == "-" else shift
    elif zone.upper() not in ("", "Z", "UTC", "GMT"):
        raise ValueError(f"unknown time zone {zone!r}")
    start = datetime(year, month, day, tzinfo=timezone(shift))
    return (start + timedelta(hours=hours, minutes=minutes, seconds=seconds)).astimezone(UTC)


def _bounds(
    dataset: CFDataset, field: CFVariable, variable: CFVariable
) -> tuple[list[datetime], list[datetime]] | None:
    """Starts and ends of the intervals of a time coordinate; None without, or all of length 0."""
    bounds = dataset.near(field, variable.text("bounds") or "time_bnds")
    if bounds is None or not bounds.shape or bounds.shape[-1] != 2:
        return None
    pairs = bounds.values().reshape(-1, 2)
    if len(pairs) != int(np.prod(variable.shape)) or not np.isfinite(pairs).all():
        return None
    if (pairs[:, 0] == pairs[:, 1]).any():
        return None
    # Bounds need no unit of their own: they have the coordinate's.
    unit_of = bounds if _SINCE.match(bounds.text("units")) else variable
    return _decode(dataset, unit_of, pairs[:, 0]), _decode(dataset, unit_of, pairs[:, 1])


def _starts(
    dataset: CFDataset, field: CFVariable, variable: CFVariable, count: int
) -> list[datetime]:
    """Times in a variable such as start_time, where it fits; [] otherwise."""
    for name in _START_NAMES:
        start = dataset.near(field, name)
        if start is not None and start is not variable and _is_time(start):
            starts = _decode(dataset, start, start.values().ravel())
            if len(starts) == count:
                return starts
    return []


def _accumulation(
    dataset: CFDataset,
    field: CFVariable,
    meaning: Meaning,
    options: CFOptions,
    spans: Sequence[float],
    times: Sequence[datetime],
) -> tuple[float, str]:
    """Minutes over which a field was summed, and what says so."""
    if options.accumulation_minutes is not None:
        return options.accumulation_minutes, "reader option"
    if meaning.minutes is not None:
        return meaning.minutes, f"unit {field.text('units')}"
    if spans and min(spans) > 0:
        if max(spans) - min(spans) > 0.02 * max(spans):
            raise BadFileError(
                dataset.path, f"sums over {min(spans):g} to {max(spans):g} minutes; one is needed"
            )
        return round(max(spans), 3), "start and end in the file"
    said: list[tuple[str, Any]] = [
        (name, field.attrs.get(name))
        for name in field.attrs
        if re.search("accum|integration|interval|period|cell_methods|long_name", name, re.I)
    ]
    said += [("name of the variable", field.short_name.replace("_", " "))]
    said += [(name, dataset.attrs.get(name)) for name in ("time_coverage_duration",)]
    for name, text in said:
        if isinstance(text, str) and (minutes := minutes_in(text)) is not None:
            return minutes, name
    ends = (
        parse_time(dataset.text("time_coverage_start")),
        parse_time(dataset.text("time_coverage_end")),
    )
    if len(times) == 1 and ends[0] is not None and ends[1] is not None and ends[1] > ends[0]:
        return _minutes(ends[1] - ends[0]), "time_coverage_start and time_coverage_end"
    steps = {_minutes(b - a) for a, b in itertools.pairwise(times)}
    if len(steps) == 1 and min(steps) > 0:
        return steps.pop(), "distance of the times"
    raise BadFileError(
        dataset.path,
        f"{field.name} is a sum, but nothing says over how long (time bounds, start_time, "
        "cell_methods). Give the reader option accumulation_minutes=MINUTES",
    )


def _leads(dataset: CFDataset, field: CFVariable, times: Sequence[datetime]) -> list[float]:
    """Minutes since a forecast was made, where the dataset names its forecast_reference_time."""
    for variable in dataset.beside(field):
        if (
            variable.text("standard_name") == "forecast_reference_time"
            and _SINCE.match(variable.text("units"))
            and int(np.prod(variable.shape)) == 1
        ):
            made = _decode(dataset, variable, variable.values().ravel())[0]
            return [max(0.0, _minutes(time - made)) for time in times]
    return [0.0] * len(times)


def _minutes(duration: timedelta) -> float:
    return duration / timedelta(minutes=1)
