"""From stored numbers to values: gain and offset, codes for "missing" and "no echo", ranges.

Formats differ in where they write these facts, not in what they mean. Numbers of 8 and 16 bits
are looked up in a table that is computed once in double precision; that is four times as fast as
masks over the field, and the value of each code is the nearest float32.

Shape letters: H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.radar import NO_ECHO_DBZ, Coded, Quantity
from data_prep.readers.raw import values_of

_FLAG_BELOW = -1.0
"""Rain at or below this is an undeclared flag (-9, -99, -9999); above it, noise around 0."""
NEGATIVE_RULE = "values below 0 are 0, those at or below -1 missing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Coding:
    """What stored numbers mean: value = gain * stored + offset, with exceptions."""

    quantity: Quantity
    gain: float = 1.0
    offset: float = 0.0
    missing: tuple[float, ...] = ()
    """Stored numbers for "not observed"; NaN and infinities always are."""
    no_echo: tuple[float, ...] = ()
    """Stored numbers for "observed, no echo". One that is also in `missing` is missing."""
    lowest: float = -math.inf
    """Stored numbers below are missing."""
    highest: float = math.inf
    """Stored numbers above are missing."""

    def decode(self, stored_HW: NDArray[Any]) -> NDArray[np.float32]:
        """Return values_HW in the unit of the quantity: a new C-ordered array, NaN missing.

        Of everything but reflectivity, values below 0 become 0, and those at or below -1 missing.
        """
        return values_of(self.coded(stored_HW))

    def coded(self, stored_HW: NDArray[Any]) -> Coded | NDArray[np.float32]:
        """Return numbers of 8 and 16 bits with the table of their values; of others the values."""
        kind, size = stored_HW.dtype.kind, stored_HW.dtype.itemsize
        if kind not in "iu" or size > 2:
            return self._values(stored_HW)
        native_HW = stored_HW.astype(stored_HW.dtype.newbyteorder("="), copy=False)
        codes_HW = np.ascontiguousarray(native_HW).view(f"u{size}")
        return Coded(_table(self, f"{kind}{size}"), codes_HW)

    def no_echo_value(self, dtype: np.dtype[Any]) -> float:
        """Value of "no echo": 0, or for reflectivity one that no measured echo lies below."""
        if self.quantity != "reflectivity":
            return 0.0
        if dtype.kind not in "iu":
            return NO_ECHO_DBZ
        limits = np.iinfo(dtype)
        ends = [self.gain * float(end) + self.offset for end in (limits.min, limits.max)]
        # Codes of 16 bits can reach far below any echo; those numbers would mean nothing.
        return min(NO_ECHO_DBZ, max(min(ends), 2 * NO_ECHO_DBZ))

    def _values(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        if self.gain == 1.0 and self.offset == 0.0:
            values = stored.astype(np.float32, order="C")
        else:
            exact = np.multiply(stored, self.gain, dtype=np.float64)
            exact += self.offset
            values = exact.astype(np.float32, order="C")
        # Exceptions first: the numbers that stand for them are often negative themselves.
        for number in _representable(self.no_echo, stored.dtype):
            np.copyto(values, self.no_echo_value(stored.dtype), where=stored == number)
        for number in _representable(self.missing, stored.dtype):
            np.copyto(values, np.nan, where=stored == number)
        if self.lowest > -math.inf or self.highest < math.inf:
            outside = (stored < self.lowest) | (stored > self.highest)
            np.copyto(values, np.nan, where=outside)
        if self.quantity != "reflectivity" and (negative := values < 0).any():
            np.copyto(values, np.nan, where=values <= _FLAG_BELOW)
            np.copyto(values, 0, where=negative & (values > _FLAG_BELOW))
        if (infinite := np.isinf(values)).any():
            np.copyto(values, np.nan, where=infinite)
        return values


@lru_cache(maxsize=32)
def _table(coding: Coding, dtype: str) -> NDArray[np.float32]:
    """Value of every number of 8 or 16 bits, at the place of its bits read as unsigned."""
    numbers = np.arange(2 ** (8 * int(dtype[1]))).astype(f"u{dtype[1]}").view(dtype)
    with np.errstate(over="ignore"):
        table = coding._values(numbers)
    table.setflags(write=False)
    return table


def _representable(numbers: Iterable[float], dtype: np.dtype[Any]) -> list[Any]:
    """The numbers as the array stores them; those that it cannot store stand for nothing."""
    found = []
    for number in numbers:
        if dtype.kind == "f":
            if not math.isnan(number):
                with np.errstate(over="ignore"):
                    found.append(dtype.type(number))
        elif float(number).is_integer():
            limits = np.iinfo(dtype)
            if limits.min <= int(number) <= limits.max:
                found.append(dtype.type(int(number)))
    return found
