"""Zarr stores that follow the MLCast radar convention: time, y, x, CF units.

The convention (MLCast Radar Data Archive Specification 1.0) asks for one chunk a time step, NaN
where nothing was observed, and CF names, units and projection; Zarr versions 2 and 3. A store is a
folder; one that is packed or remote has to be brought to a folder first.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.files import is_store
from data_prep.readers.cf import read_cf, scan_cf
from data_prep.readers.cf_fields import candidates, find_field
from data_prep.readers.cf_model import CFDataset, CFOptions, CFVariable
from data_prep.readers.cf_time import parse_time, time_dim_of
from data_prep.readers.hdf5 import number, plain
from data_prep.readers.radar import BadFileError, RadarFile, import_extra
from data_prep.readers.raw import reading
from tmu_dist.data.manifest import SourceCard


@dataclass(frozen=True, kw_only=True, slots=True)
class MLCastReader(CFOptions):
    """Reads a folder that is a Zarr group; one time step in memory at a time.

    Times after the attribute last_valid_timestep are left out: a store may run into the future.
    """

    name: ClassVar[str] = "mlcast"
    extra: ClassVar[str | None] = None
    patterns: ClassVar[tuple[str, ...]] = ("*.zarr",)
    source: ClassVar[SourceCard] = SourceCard(
        name="Radar archive in the MLCast convention",
        provider="named by the store",
        licence="named by the store (attribute license)",
    )

    def recognises(self, path: Path) -> bool:
        if not is_store(path):
            return False
        try:
            with _open(path) as dataset:
                found = candidates(dataset)
                if self.variable in dataset.variables:
                    found = [dataset.variables[str(self.variable)]]
                return any(time_dim_of(dataset, field) is not None for field in found)
        except BadFileError:
            return False

    def scan(self, path: Path) -> RadarFile:
        with _open(path) as dataset:
            field, _ = find_field(dataset, self)
            if time_dim_of(dataset, field) is None:
                raise BadFileError(path, f"has no dimension time of {field.name}: {field.dims}")
            last = parse_time(dataset.text("last_valid_timestep"))
            return scan_cf(dataset, self, last_time=last)

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        if keys:
            with _open(path) as dataset:
                yield from read_cf(dataset, self, keys)


@contextmanager
def _open(path: Path) -> Iterator[CFDataset]:
    """Open a store; whatever goes wrong inside names it."""
    zarr = import_extra("zarr", "radar", "Reading Zarr stores")
    if not is_store(path):
        raise BadFileError(path, "is no folder of a Zarr group (no zarr.json, .zgroup)")
    with reading(path):
        try:
            group = zarr.open_group(str(path), mode="r")
            variables = {v.name: v for v in _variables(path, group)}
            attrs = {name: plain(value) for name, value in group.attrs.items()}
            yield CFDataset(path=path, variables=variables, attrs=attrs)
        except BadFileError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:  # words of codecs and metadata
            raise BadFileError(path, f"cannot be read ({error})") from error


def _variables(path: Path, group: Any) -> Iterator[CFVariable]:
    """Arrays of a group that name their dimensions."""
    for name, array in group.arrays():
        attrs = {key: _attribute(value) for key, value in array.attrs.items()}
        dims = attrs.pop("_ARRAY_DIMENSIONS", None)
        absent = number(array.fill_value) if array.dtype.kind in "iuf" else None
        if absent is not None and math.isnan(absent):
            absent = None
        if array.metadata.zarr_format == 3:
            dims = array.metadata.dimension_names
        elif absent:
            # Version 2 has no other place for CF's _FillValue; a 0 is only the library's default.
            attrs.setdefault("_FillValue", absent)
        dims = [dims] if isinstance(dims, str) else list(dims or ())
        if len(dims) == len(array.shape) and all(isinstance(dim, str) for dim in dims):
            yield CFVariable(
                name=name,
                dims=tuple(dims),
                shape=array.shape,
                dtype=array.dtype,
                attrs=attrs,
                read=_reader(path, array),
                absent_value=absent,
            )


def _reader(path: Path, array: Any) -> Callable[[Any], Any]:
    """Read an array at an index, after a check that its chunks there are whole."""
    if not _is_blosc(array):
        return array.__getitem__

    def read(index: Any) -> Any:
        for key in _chunk_keys(array, index):
            _check_blosc(path, path / array.path / key)
        return array[index]

    return read


def _is_blosc(array: Any) -> bool:
    """Say whether a chunk is a Blosc buffer: that codec reads beyond the end of a cut one."""
    if array.metadata.zarr_format == 2:
        return getattr(array.metadata.compressor, "codec_id", "") == "blosc"
    return type(array.metadata.codecs[-1]).__name__ == "BloscCodec"


def _chunk_keys(array: Any, index: Any) -> list[str]:
    """Names of the chunks that an index of numbers and whole slices touches."""
    parts = index if isinstance(index, tuple) else (slice(None),) * array.ndim
    places = [
        range(-(-size // chunk)) if isinstance(part, slice) else (part % size // chunk,)
        for part, size, chunk in zip(parts, array.shape, array.chunks, strict=True)
    ]
    return [array.metadata.encode_chunk_key(place) for place in itertools.product(*places)]


def _check_blosc(path: Path, chunk: Path) -> None:
    """Compare a chunk's length with the one in its header (bytes 12 to 15)."""
    if not chunk.is_file():
        return  # reads as the fill value
    with chunk.open("rb") as file:
        header = file.read(16)
    if len(header) < 16 or chunk.stat().st_size != struct.unpack("<I", header[12:])[0]:
        raise BadFileError(path, f"chunk {chunk.relative_to(path)} is cut short or altered")


def _attribute(value: Any) -> Any:
    """A JSON value as the attribute that it stands for: lists of numbers become arrays."""
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return plain(np.array(value))
    return plain(value)
