"""Radar fields in files and stores that follow the CF conventions, whatever library opens them.

NetCDF files and Zarr stores both become a `CFDataset` and are then read alike: the field is found
by standard name, unit and usual names (`cf_fields`), its times and the duration of sums come from
coordinates, bounds and attributes (`cf_time`), rows and columns are turned so that row 0 is north
and placed on the earth (`cf_grid`).

Shape letters: H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.cf_fields import Meaning, find_field
from data_prep.readers.cf_grid import Orientation, cf_grid, orientation
from data_prep.readers.cf_model import CFDataset, CFOptions, CFVariable
from data_prep.readers.cf_time import find_times, time_dim_of
from data_prep.readers.coding import NEGATIVE_RULE, Coding
from data_prep.readers.radar import BadFileError, RadarFile, RadarFrame

_NOTED_ATTRIBUTES = ("institution", "source", "license", "licence")
_LONGEST_NOTE = 300


def scan_cf(
    dataset: CFDataset, options: CFOptions, *, last_time: datetime | None = None
) -> RadarFile:
    """Describe the field of a dataset and its times, without its values.

    Args:
        dataset: what was opened.
        options: what the user says; it wins over the file.
        last_time: later fields are left out (a store may be made longer than its data).

    Raises:
        BadFileError: no field, several, one of an unknown unit, no times, further dimensions.
    """
    field, meaning = find_field(dataset, options)
    times = find_times(dataset, field, meaning, options)
    grid, grid_notes = cf_grid(dataset, field, orientation(dataset, field, times.dim))
    frames = tuple(
        RadarFrame(time=time, key="" if times.dim is None else str(index), lead_minutes=lead)
        for index, (time, lead) in enumerate(zip(times.times, times.leads, strict=True))
        if last_time is None or time <= last_time
    )
    if not frames:
        raise BadFileError(dataset.path, f"holds no time of {field.name}")
    absent = field.absent_value
    if absent is not None and absent not in field.fills():
        grid_notes += (f"Chunks that are not in the store read as {absent:g}, its fill value.",)
    said = [f"{name} {text}" for name in _NOTED_ATTRIBUTES if (text := dataset.text(name))]
    label = field.text("long_name") or field.text("standard_name") or "no description"
    unit = options.unit or field.text("units") or "none"
    return RadarFile(
        quantity=meaning.quantity,
        interval_minutes=times.interval_minutes,
        accumulation_minutes=times.accumulation_minutes,
        grid=grid,
        missing_rule=_missing_rule(field, meaning),
        notes=(
            f"Variable {field.name}: {label}, unit {unit}.",
            *meaning.notes,
            *times.notes,
            *grid_notes,
            *(f"The file says: {text[:_LONGEST_NOTE]}." for text in said),
        ),
        frames=frames,
    )


def read_cf(
    dataset: CFDataset, options: CFOptions, keys: Sequence[str]
) -> Iterator[NDArray[np.float32]]:
    """Yield the fields of the given keys, one at a time.

    Raises:
        BadFileError: no such key, or what `scan_cf` raises.
    """
    field, meaning = find_field(dataset, options)
    time_dim = time_dim_of(dataset, field)
    turned = orientation(dataset, field, time_dim)
    coding = _coding(field, meaning)
    num_times = 0 if time_dim is None else field.shape[field.dims.index(time_dim)]
    for key in keys:
        is_index = key.isdecimal() and int(key) < num_times
        if not is_index and not (key == "" and time_dim is None):
            raise BadFileError(dataset.path, f"holds no field {key!r} of {field.name}")
        stored_HW = _stored(field, turned, time_dim, int(key or 0))
        yield coding.decode(stored_HW)


def _stored(
    field: CFVariable, turned: Orientation, time_dim: str | None, time_index: int
) -> NDArray[Any]:
    """Stored numbers of one field, row 0 north and column 0 west."""
    space = (turned.y_dim, turned.x_dim)
    index = tuple(
        slice(None) if dim in space else time_index if dim == time_dim else 0 for dim in field.dims
    )
    stored = field.unsigned(np.asarray(field.read(index)))
    if field.dims.index(turned.y_dim) > field.dims.index(turned.x_dim):
        stored = stored.T
    return stored[:: -1 if turned.flip_y else 1, :: -1 if turned.flip_x else 1]


def _coding(field: CFVariable, meaning: Meaning) -> Coding:
    """Scale, offset and missing numbers of a field, in the unit of its quantity."""
    scale, offset = field.scaling()
    lowest, highest = _valid_range(field, scale, offset)
    return Coding(
        quantity=meaning.quantity,
        gain=scale * meaning.factor,
        offset=offset * meaning.factor,
        missing=tuple(field.fills()),
        lowest=lowest,
        highest=highest,
    )


def _valid_range(field: CFVariable, scale: float, offset: float) -> tuple[float, float]:
    """Stored numbers outside of which values are missing.

    CF gives the range in stored numbers; a range of floats for packed integers is one of values.
    """
    low, high = -math.inf, math.inf
    if len(both := field.numbers("valid_range")) == 2:
        low, high = both
    for value in field.numbers("valid_min"):
        low = value
    for value in field.numbers("valid_max"):
        high = value
    said = [field.attrs.get(name) for name in ("valid_range", "valid_min", "valid_max")]
    are_floats = any(np.asarray(value).dtype.kind == "f" for value in said if value is not None)
    if are_floats and field.dtype.kind in "iu" and (scale, offset) != (1.0, 0.0) and scale > 0:
        low, high = (low - offset) / scale, (high - offset) / scale
    return (low, high) if low < high else (-math.inf, math.inf)


def _missing_rule(field: CFVariable, meaning: Meaning) -> str:
    coding = _coding(field, meaning)
    rule = " and ".join([*(f"{fill:g}" for fill in coding.missing), "NaN"])
    rule = f"Stored {rule} {'are' if coding.missing else 'is'} missing"
    if coding.lowest > -math.inf or coding.highest < math.inf:
        rule += f", and so is what lies outside {coding.lowest:g} to {coding.highest:g}"
    return f"{rule}." if meaning.quantity == "reflectivity" else f"{rule}; {NEGATIVE_RULE}."
