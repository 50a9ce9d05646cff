"""NetCDF files of any service: the Bureau of Meteorology's Rainfields, and whatever follows CF.

Classic files, NetCDF-4, packed or not, one time or many. What the variables mean is worked out by
`data_prep.readers.cf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.cf import read_cf, scan_cf
from data_prep.readers.cf_fields import candidates
from data_prep.readers.cf_model import CFDataset, CFOptions, CFVariable
from data_prep.readers.hdf5 import SIGNATURE, has_signature, plain
from data_prep.readers.netcdf_classic import CLASSIC_SIGNATURES, expected_bytes
from data_prep.readers.radar import BadFileError, RadarFile, import_extra
from data_prep.readers.raw import reading
from tmu_dist.data.manifest import SourceCard

_FILL_TYPES = ("i2", "u2", "i4", "u4", "f4", "f8")
"""Types of which the library's fill value means missing; bytes have no number to spare."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetCDFReader(CFOptions):
    """Reads rain rate, accumulation or reflectivity on a grid from NetCDF files.

    `recognises` is True for a file that holds a variable known to be such a field (those of KNMI,
    ODIM and SEVIR, which are HDF5 too, have no names or units for it); False for a truncated one
    that cannot be opened.
    """

    name: ClassVar[str] = "netcdf"
    extra: ClassVar[str | None] = "radar"
    patterns: ClassVar[tuple[str, ...]] = (
        *("*.nc", "*.nc4", "*.cdf", "*.netcdf", "*.nc3"),
        *("*.h5", "*.hdf5", "*.he5", "*.rt-h5"),  # NetCDF-4 is HDF5; IMERG says so in its names
    )
    source: ClassVar[SourceCard] = SourceCard(
        name="Radar fields in NetCDF",
        provider="named by the files (institution)",
    )

    def recognises(self, path: Path) -> bool:
        if not has_signature(path, SIGNATURE, *CLASSIC_SIGNATURES):
            return False
        try:
            with _open(path) as dataset:
                return bool(candidates(dataset)) or self.variable in dataset.variables
        except BadFileError:
            return False

    def scan(self, path: Path) -> RadarFile:
        with _open(path) as dataset:
            return scan_cf(dataset, self)

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        if keys:
            with _open(path) as dataset:
                yield from read_cf(dataset, self, keys)


@contextmanager
def _open(path: Path) -> Iterator[CFDataset]:
    """Open a file; whatever goes wrong inside names it."""
    netcdf4 = import_extra("netCDF4", "radar", "Reading NetCDF files")
    with reading(path):
        _check_length(path)
        try:
            with netcdf4.Dataset(path, "r") as file:
                file.set_auto_maskandscale(False)
                fills = {kind: netcdf4.default_fillvals[kind] for kind in _FILL_TYPES}
                variables = {v.name: v for v in _variables(file, "", fills)}
                yield CFDataset(path=path, variables=variables, attrs=_attributes(file))
        except RuntimeError as error:  # netCDF4's word for damage inside
            raise BadFileError(path, f"cannot be read ({error})") from error


def _check_length(path: Path) -> None:
    """Refuse a classic file that is shorter than its header says."""
    with path.open("rb") as file:
        start = file.read(4)
        if start not in CLASSIC_SIGNATURES:
            return
        file.seek(0)
        try:
            expected = expected_bytes(file)
        except (ValueError, KeyError, IndexError) as error:
            raise BadFileError(path, f"has no whole NetCDF header ({error})") from error
    if (size := path.stat().st_size) < expected:
        raise BadFileError(path, f"is truncated: it has {size} of at least {expected} bytes")


def _variables(group: Any, prefix: str, fills: dict[str, float]) -> Iterator[CFVariable]:
    """Variables of a group and below, named with their groups."""
    for name, variable in group.variables.items():
        # Text has no numpy type of its own in this library.
        dtype = variable.dtype if isinstance(variable.dtype, np.dtype) else np.dtype(object)
        yield CFVariable(
            name=f"{prefix}{name}",
            dims=variable.dimensions,
            shape=variable.shape,
            dtype=dtype,
            attrs=_attributes(variable),
            read=variable.__getitem__,
            default_fill=fills.get(dtype.str[1:]),
        )
    for name, child in group.groups.items():
        yield from _variables(child, f"{prefix}{name}/", fills)


def _attributes(node: Any) -> dict[str, Any]:
    return {name: plain(node.getncattr(name)) for name in node.ncattrs()}
