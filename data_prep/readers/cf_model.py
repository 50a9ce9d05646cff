"""NetCDF files and Zarr stores as one thing: variables with dimensions and attributes.

What the variables mean is worked out in `cf_fields`, `cf_time` and `cf_grid`.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.hdf5 import number


@dataclass(frozen=True, kw_only=True, slots=True)
class CFVariable:
    """A variable of a file or store; its values are read when they are asked for."""

    name: str
    """With its group, such as "precipitation" or "Grid/precipitation"."""
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attrs: Mapping[str, Any]
    """Plain values: text, numbers, arrays."""
    read: Callable[[Any], Any]
    """Stored numbers at an index, neither scaled nor masked."""
    default_fill: float | None = None
    """What the format leaves where nothing was written, if that means missing."""
    absent_value: float | None = None
    """What a chunk that is not in the store reads as, if that does not mean missing."""

    @property
    def group(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def short_name(self) -> str:
        """Lower case, without its group."""
        return self.name.rpartition("/")[2].lower()

    def text(self, name: str) -> str:
        """An attribute as text; "" where there is none."""
        value = self.attrs.get(name)
        return value.strip() if isinstance(value, str) else ""

    def numbers(self, *names: str) -> list[float]:
        """All numbers in some attributes, in the numbers that are stored."""
        found: list[float] = []
        for name in names:
            value = self.attrs.get(name)
            if isinstance(value, str) and self.dtype.kind == "f":
                value = _packed_float(value)
            for item in np.ravel(value) if isinstance(value, np.ndarray) else [value]:
                if (as_number := number(item)) is not None:
                    found.append(self._as_stored(as_number))
        return found

    def values(self, index: Any = ...) -> NDArray[np.float64]:
        """Values of a coordinate, scaled; missing ones are NaN."""
        stored = self.unsigned(np.asarray(self.read(index)))
        values = stored.astype(np.float64)
        for fill in self.fills():
            values[stored == fill] = np.nan
        scale, offset = self.scaling()
        return values * scale + offset

    def scaling(self) -> tuple[float, float]:
        """scale_factor and add_offset."""
        scale, offset = number(self.attrs.get("scale_factor")), number(self.attrs.get("add_offset"))
        return (1.0 if scale is None else scale), (offset or 0.0)

    def fills(self) -> list[float]:
        """Stored numbers that mean missing; NaN is left to NaN."""
        fills = self.numbers("_FillValue", "missing_value")
        if self.default_fill is not None and "_FillValue" not in self.attrs:
            fills.append(self.default_fill)
        return sorted({fill for fill in fills if not math.isnan(fill)})

    def unsigned(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Read signed numbers as unsigned where the attribute _Unsigned says so."""
        if not self._is_unsigned:
            return stored
        native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        return np.ascontiguousarray(native).view(f"u{stored.dtype.itemsize}")

    @property
    def _is_unsigned(self) -> bool:
        return self.dtype.kind == "i" and str(self.attrs.get("_Unsigned")).lower() == "true"

    def _as_stored(self, value: float) -> float:
        return value % 2 ** (8 * self.dtype.itemsize) if self._is_unsigned else value


@dataclass(frozen=True, kw_only=True, slots=True)
class CFDataset:
    """Variables by name, and the attributes of the whole."""

    path: Path
    variables: Mapping[str, CFVariable]
    attrs: Mapping[str, Any]

    def text(self, name: str) -> str:
        """An attribute of the whole as text; "" where there is none."""
        value = self.attrs.get(name)
        return value.strip() if isinstance(value, str) else ""

    def near(self, field: CFVariable, name: str) -> CFVariable | None:
        """A variable by the name that a field calls it: in its own group, or above."""
        group = field.group
        while group:
            if (found := self.variables.get(f"{group}/{name}")) is not None:
                return found
            group = group.rpartition("/")[0]
        return self.variables.get(name.removeprefix("/"))

    def beside(self, field: CFVariable) -> list[CFVariable]:
        """All variables of a field's group and of those above."""
        return [v for v in self.variables.values() if f"{field.group}/".startswith(f"{v.group}/")]


@dataclass(frozen=True, kw_only=True, slots=True)
class CFOptions:
    """What a user says beyond the file; a CF reader is its options."""

    variable: str | None = None
    """Name of the field, where the file holds several or one of an unusual name."""
    unit: str | None = None
    """Unit of the values, where the file does not say or is wrong, such as "mm h-1"."""
    accumulation_minutes: float | None = None
    """Of a sum: over how long, where the file does not say so."""


def minutes_in(text: str) -> float | None:
    """A duration that a text names: "5 minutes", "6min", "PT5M", "hourly"; None where it has none.

    The first one counts where there are several.
    """
    if iso := re.search(r"\bP(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?\b", text):
        days, hours, minutes, seconds = (float(part or 0) for part in iso.groups())
        if total := days * 1440 + hours * 60 + minutes + seconds / 60:
            return total
    match = re.search(
        r"(?<![\w.])(\d+(?:\.\d+)?)[ _-]?"
        r"(s|sec|secs|seconds?|min|mins|minutes?|h|hr|hrs|hours?|d|days?)(?![a-z0-9])",
        text,
        re.I,
    )
    if match:
        per_unit = {"s": 1 / 60, "m": 1.0, "h": 60.0, "d": 1440.0}[match[2][0].lower()]
        return float(match[1]) * per_unit or None
    for word, minutes in (("hourly", 60.0), ("daily", 1440.0)):
        if re.search(rf"\b{word}\b", text, re.I):
            return minutes
    return None


def _packed_float(text: str) -> Any:
    """A float that xarray wrote into Zarr attributes as the base64 of its 8 bytes, or the text."""
    try:
        return struct.unpack("<d", base64.b64decode(text, validate=True))[0]
    except (binascii.Error, struct.error, ValueError):
        return text
