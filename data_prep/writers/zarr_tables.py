"""What stands beside the frames in a Zarr archive: coordinates, projection, tables of samples.

Each is a plain array of one dimension (the projection: a number whose attributes matter), named and
explained by CF attributes as far as CF has words for it.

Not here: frames, groups and objects (zarr_store.py), the attributes themselves (cf.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.writers import cf
from tmu_dist.data.manifest import Grid

if TYPE_CHECKING:
    import zarr

ZSTD_LEVEL = 1  # as in the tars: higher levels gain a few percent only
_ROWS_PER_CHUNK = 16_384


class FrameAxis(NamedTuple):
    """What the frames of a split are, in the order of the array."""

    series: Sequence[str]
    """Product or event of each radar frame; clip of each video frame."""
    order: Sequence[float]
    """Minutes since 1970 (UTC) of each radar frame; number in its clip of each video frame."""
    is_clock: bool
    """Whether `order` is minutes."""


class ZarrSample(NamedTuple):
    """One sequence: a block of the array."""

    key: str
    """Unique in the archive; letters, digits, "-" and "_" only."""
    frame: int
    """Its first frame in the split's array."""
    row: int
    column: int
    """Upper left pixel of its tile."""
    weight: float
    meta: Mapping[str, Any]
    """A few JSON values about the sample; `sample_id` (its position in the split) among them."""


def write_frame_axis(group: zarr.Group, frames: FrameAxis) -> tuple[str, ...]:
    """Write what each frame is, and return the names that are no dimension's."""
    write = functools.partial(_write_table, group, dimension="time")
    if not frames.is_clock:
        numbers = np.rint(np.asarray(frames.order, np.float64)).astype(np.int64)
        write("frame_number", numbers, {"long_name": "number of the frame in its clip"})
        write("clip", frames.series, {"long_name": "clip that the frame belongs to"})
        return "frame_number", "clip"
    seconds = np.rint(np.asarray(frames.order, np.float64) * 60).astype(np.int64)
    clock = {
        "axis": "T",
        "standard_name": "time",
        "long_name": "time of the measurement (UTC)",
        "units": "seconds since 1970-01-01 00:00:00",
        "calendar": "standard",
    }
    write("time", seconds, clock)
    write("series", frames.series, {"long_name": "product or event that the frame belongs to"})
    return ("series",)


def write_grid(group: zarr.Group, grid: Grid) -> None:
    """Write the cell centres and the projection, as far as the grid knows them."""
    if grid.unit is not None:
        edges = (grid.left, grid.top, grid.pixel_width, grid.pixel_height)
        left, top, pixel_width, pixel_height = (float(value or 0) for value in edges)
        y_attributes, x_attributes = cf.axis_attributes(grid)
        y = top - (np.arange(grid.height) + 0.5) * pixel_height
        x = left + (np.arange(grid.width) + 0.5) * pixel_width
        _write_table(group, "y", y, y_attributes, dimension="y")
        _write_table(group, "x", x, x_attributes, dimension="x")
    if grid.projection:
        crs = group.create_array(
            "crs",
            shape=(),
            dtype="int32",
            fill_value=0,
            attributes=cf.crs_attributes(grid.projection),
            config={"write_empty_chunks": True},
        )
        crs[...] = 0


def write_samples(group: zarr.Group, samples: Sequence[ZarrSample]) -> None:
    """Write the sample tables; row i is sample i of the split."""
    write = functools.partial(_write_table, group, dimension="sample")
    integers = (
        ("sample_frame", "first frame of the sample in the array", [s.frame for s in samples]),
        ("sample_row", "top row of the sample's tile", [s.row for s in samples]),
        ("sample_col", "left column of the sample's tile", [s.column for s in samples]),
    )
    for name, long_name, values in integers:
        write(name, np.asarray(values, np.int64), {"long_name": long_name})
    weights = np.asarray([sample.weight for sample in samples], np.float64)
    write("sample_weight", weights, {"long_name": "1 / probability that the sample was kept"})
    write("sample_key", [sample.key for sample in samples], {"long_name": "name of the sample"})
    texts = [
        json.dumps(sample.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
        for sample in samples
    ]
    write("sample_meta", texts, {"long_name": "facts about the sample, a JSON object"})


def _write_table(
    group: zarr.Group,
    name: str,
    values: NDArray[Any] | Sequence[str],
    attributes: dict[str, Any],
    *,
    dimension: str,
) -> None:
    """Write a column of numbers or texts."""
    from zarr.codecs import ZstdCodec

    is_text = not isinstance(values, np.ndarray)
    array = group.create_array(
        name,
        shape=(len(values),),
        dtype="string" if is_text else str(values.dtype),  # type: ignore[union-attr]
        chunks=(min(len(values), _ROWS_PER_CHUNK),),
        compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
        fill_value="" if is_text else 0,
        dimension_names=(dimension,),
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
    array[...] = np.asarray(values, object) if is_text else values
