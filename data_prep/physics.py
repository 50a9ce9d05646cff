"""From one measured quantity to another, and from numbers to stored codes: named and invertible.

Every conversion is a chain of named steps, each with its formula and an inverse, and says in JSON
what was done (`Conversion.record`). Where physics has no path (vertically integrated liquid water
to rain, a picture's grey to anything) there is no step. Missing values are NaN and stay NaN.

Logarithms and powers are computed in float64 and rounded to float32: different processors'
float32 functions differ in the last bits, which would change about one stored code in a million.

Shape letters: H height, W width. Functions of one value take arrays of any shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prep.readers.radar import NO_ECHO_DBZ, UNITS, Quantity
from data_prep.source import Codes
from tmu_dist.data.manifest import Units

Values: TypeAlias = NDArray[np.float32]

_LOG_10 = math.log(10.0)
_MAX_CODES = {"uint8": 255, "uint16": 65_535}


class Step(Protocol):
    """One named transform of values, with its inverse."""

    def forward(self, values: Values) -> Values:
        """Return new values; NaN stays NaN."""
        ...

    def inverse(self, values: Values) -> Values:
        """Undo `forward`."""
        ...

    def record(self) -> dict[str, Any]:
        """JSON values: name, quantities, formula and parameters."""
        ...


@dataclass(frozen=True, slots=True)
class MarshallPalmer:
    """Rain rate R in mm/h to reflectivity Z in mm^6/m^3 by Z = a R^b, given in dBZ = 10 log10 Z.

    The form is Marshall and Palmer's (1948, J. Meteorol. 5, 165-166), the default a = 200 and
    b = 1.6 Marshall, Hitschfeld and Gunn's (1955, Adv. Geophys. 2, 1-56).

    No rain has no logarithm: rates of 0, or whose reflectivity is below `NO_ECHO_DBZ` (0.0004 mm/h
    with the defaults), become exactly `NO_ECHO_DBZ`, and that becomes exactly 0 mm/h again.
    """

    a: float = 200.0
    b: float = 1.6

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Z = a R^b needs a positive {name}, got {value}.")

    def reflectivity_dbz(self, rate_mm_per_h: ArrayLike) -> Values:
        """Return dBZ, `NO_ECHO_DBZ` at least; a negative rate counts as no rain."""
        rates = np.asarray(rate_mm_per_h, np.float32)
        # Half the rate of NO_ECHO_DBZ keeps the logarithm finite and safely below the floor.
        dbz = np.maximum(rates, np.float32(0.5 * self._dry_rate))
        np.log(dbz, out=dbz, dtype=np.float64, casting="same_kind")
        dbz *= np.float32(10 * self.b / _LOG_10)
        dbz += np.float32(10 * math.log10(self.a))
        return np.maximum(dbz, np.float32(NO_ECHO_DBZ), out=dbz)

    def rain_rate(self, dbz: ArrayLike) -> Values:
        """Return mm/h; 0 where there is `NO_ECHO_DBZ` or less."""
        values = np.asarray(dbz, np.float32)
        rates = values - np.float32(10 * math.log10(self.a))
        rates *= np.float32(_LOG_10 / (10 * self.b))
        np.exp(rates, out=rates, dtype=np.float64, casting="same_kind")
        np.copyto(rates, 0.0, where=values <= np.float32(NO_ECHO_DBZ))
        return rates

    @property
    def _dry_rate(self) -> float:
        return float((10 ** (NO_ECHO_DBZ / 10) / self.a) ** (1 / self.b))

    def forward(self, values: Values) -> Values:
        return self.reflectivity_dbz(values)

    def inverse(self, values: Values) -> Values:
        return self.rain_rate(values)

    def record(self) -> dict[str, Any]:
        return {
            **_between("rain_rate", "reflectivity"),
            "step": "z_r",
            "formula": "Z = a R^b; dBZ = 10 log10 Z",
            "a": self.a,
            "b": self.b,
            "no_echo_dbz": NO_ECHO_DBZ,
        }


@dataclass(frozen=True, slots=True)
class AccumulationToRate:
    """Rain in mm fallen in some minutes to the mean rate over them in mm/h."""

    minutes: float

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise ValueError(f"An accumulation is over some minutes, got {self.minutes}.")

    def forward(self, values: Values) -> Values:
        return values * np.float32(60 / self.minutes)

    def inverse(self, values: Values) -> Values:
        return values * np.float32(self.minutes / 60)

    def record(self) -> dict[str, Any]:
        return {
            **_between("accumulation", "rain_rate"),
            "step": "accumulation_to_rate",
            "formula": "R = 60 / minutes * mm",
            "minutes": self.minutes,
        }


@dataclass(frozen=True, slots=True)
class DecibelToLinear:
    """Reflectivity in dBZ to the linear Z in mm^6/m^3, for sums and means over space.

    The inverse gives `NO_ECHO_DBZ` at least: Z = 0 has no logarithm.
    """

    def forward(self, values: Values) -> Values:
        linear = values * np.float32(_LOG_10 / 10)
        return np.exp(linear, out=linear, dtype=np.float64, casting="same_kind")

    def inverse(self, values: Values) -> Values:
        dbz = np.maximum(values, np.float32(10 ** (NO_ECHO_DBZ / 10 - 0.5)))
        np.log(dbz, out=dbz, dtype=np.float64, casting="same_kind")
        dbz *= np.float32(10 / _LOG_10)
        return np.maximum(dbz, np.float32(NO_ECHO_DBZ), out=dbz)

    def record(self) -> dict[str, Any]:
        return {
            "step": "decibel_to_linear",
            "from": "reflectivity",
            "unit_from": "dBZ",
            "to": "linear reflectivity",
            "unit_to": "mm6/m3",
            "formula": "Z = 10^(dBZ / 10)",
            "no_echo_dbz": NO_ECHO_DBZ,
        }


@dataclass(frozen=True, slots=True)
class Inverse:
    """Another step, turned round."""

    step: Step

    def forward(self, values: Values) -> Values:
        return self.step.inverse(values)

    def inverse(self, values: Values) -> Values:
        return self.step.forward(values)

    def record(self) -> dict[str, Any]:
        record = self.step.record()
        record["step"] = f"inverse of {record['step']}"
        for one, other in (("from", "to"), ("unit_from", "unit_to")):
            record[one], record[other] = record[other], record[one]
        return record


@dataclass(frozen=True, slots=True)
class Conversion:
    """A chain of steps from one quantity to another; without steps, the identity."""

    steps: tuple[Step, ...]

    def __call__(self, values: ArrayLike) -> Values:
        """Return the converted values, float32; the values as they are when there is no step."""
        converted = np.asarray(values, np.float32)
        for step in self.steps:
            converted = step.forward(converted)
        return converted

    def inverse(self, values: ArrayLike) -> Values:
        """Undo the conversion: the steps' inverses in opposite order."""
        converted = np.asarray(values, np.float32)
        for step in reversed(self.steps):
            converted = step.inverse(converted)
        return converted

    def record(self) -> list[dict[str, Any]]:
        """Return the steps in order as JSON values, for the manifest."""
        return [step.record() for step in self.steps]


def convert(
    quantity_from: Quantity,
    quantity_to: Quantity,
    *,
    z_r: MarshallPalmer | None = None,
    accumulation_minutes: float | None = None,
) -> Conversion:
    """Return the conversion between two quantities, each in its unit of `UNITS`.

    Args:
        quantity_from: what is measured.
        quantity_to: what is wanted.
        z_r: relation of rain and reflectivity; None is `MarshallPalmer()`.
        accumulation_minutes: of the accumulation on either side; needed when there is one.

    Raises:
        ValueError: no such quantity, no physical path between them, or an accumulation whose
            minutes are not known.
    """
    for quantity in (quantity_from, quantity_to):
        if quantity not in UNITS:
            raise ValueError(f"No quantity {quantity!r}: choose from {list(UNITS)}.")
    if quantity_from == quantity_to:
        return Conversion(())
    # The one line of quantities that physics connects, and the steps between neighbours.
    line: list[Quantity] = ["accumulation", "rain_rate", "reflectivity"]
    if quantity_from not in line or quantity_to not in line:
        raise ValueError(
            f"There is no physical path from {quantity_from} ({UNITS[quantity_from]}) to "
            f"{quantity_to} ({UNITS[quantity_to]}); only {', '.join(line)} turn into each other. "
            f"Store {quantity_from} as it is, or, if these are pictures of another quantity, give "
            "the reader the mapping of their values."
        )
    start, end = line.index(quantity_from), line.index(quantity_to)
    if "accumulation" in (quantity_from, quantity_to) and accumulation_minutes is None:
        raise ValueError(
            f"From {quantity_from} to {quantity_to} the minutes of the accumulation must be known: "
            "the files do not say them, so give accumulation_minutes."
        )
    rising: list[Step] = []
    if min(start, end) == 0:
        rising.append(AccumulationToRate(accumulation_minutes or 0.0))
    if max(start, end) == 2:
        rising.append(z_r or MarshallPalmer())
    if start < end:
        return Conversion(tuple(rising))
    return Conversion(tuple(Inverse(step) for step in reversed(rising)))


class LinearForAverage(NamedTuple):
    """How values become something that may be averaged over space, and back."""

    to_linear: Callable[[Values], Values]
    from_linear: Callable[[Values], Values]
    name: str
    """What is averaged, for reports."""


def linear_for_average(quantity: Quantity) -> LinearForAverage:
    """Return the pair of transforms around a mean over pixels.

    Reflectivity is averaged as linear Z: Z is defined as a sum over the drops of a volume divided
    by the volume (Doviak and Zrnic 1993, Doppler Radar and Weather Observations, section 4.4), so Z
    of several pixels together is the mean of theirs. The mean of their decibels is the geometric
    mean of Z, which is never larger, and far too small at the edges of cells. Rain, water content
    and grey values are amounts per area already and are averaged as they are.
    """
    if quantity == "reflectivity":
        step = DecibelToLinear()
        return LinearForAverage(step.forward, step.inverse, "linear reflectivity (mm6/m3)")
    return LinearForAverage(_unchanged, _unchanged, f"{quantity} ({UNITS[quantity]})")


def _unchanged(values: Values) -> Values:
    return values


class Encoded(NamedTuple):
    """Stored codes of a field, and what did not fit."""

    codes: Codes
    num_above_range: int
    """Values above the range, stored as its end."""


@dataclass(frozen=True, slots=True)
class PixelScale:
    """Physical values to stored codes: [low, high] in equal steps to 0..max_code, and back.

    Rounding is to the nearest code, halves up; so a value inside the range comes back to within
    half a step (0.14 dBZ of 0..70 dBZ in 8 bits, 0.0005 dBZ in 16).
    """

    low: float
    high: float
    dtype: Literal["uint8", "uint16"] = "uint8"
    reserve_missing: bool = True
    """Keep the largest code for "not observed"; without it NaN cannot be stored."""

    def __post_init__(self) -> None:
        if self.dtype not in _MAX_CODES:
            raise ValueError(f"dtype must be one of {list(_MAX_CODES)}, got {self.dtype!r}.")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"A stored range needs low < high, got {self.low} and {self.high}.")

    @property
    def max_code(self) -> int:
        return _MAX_CODES[self.dtype] - (1 if self.reserve_missing else 0)

    @property
    def missing_code(self) -> int | None:
        return self.max_code + 1 if self.reserve_missing else None

    @property
    def step(self) -> float:
        """Physical distance of neighbouring codes."""
        return (self.high - self.low) / self.max_code

    def encode(self, values: ArrayLike) -> Encoded:
        """Return codes of the values' shape.

        NaN becomes the missing code. Values below the range become 0, the end that means no echo
        or no rain; values above it become max_code and are counted.

        Raises:
            ValueError: there are missing values and no code is reserved for them.
        """
        physical = np.asarray(values, np.float32)
        missing = np.isnan(physical)
        any_missing = bool(missing.any())
        if any_missing and self.missing_code is None:
            raise ValueError(
                f"{np.count_nonzero(missing)} values are missing (NaN), but no code is reserved "
                "for them: use a scale with reserve_missing=True."
            )
        above = np.count_nonzero(physical > np.float32(self.high))
        # Multiplied first and divided last: halves of a step are exact for round numbers.
        scaled = physical - np.float32(self.low)
        # So large that only its end matters; else infinity or an overflow would go on from here.
        np.clip(scaled, 0, np.float32(2 * (self.high - self.low)), out=scaled)
        scaled *= np.float32(self.max_code)
        scaled /= np.float32(self.high - self.low)
        scaled += np.float32(0.5)
        np.minimum(scaled, np.float32(self.max_code), out=scaled)
        if any_missing:
            np.copyto(scaled, np.float32(self.missing_code), where=missing)
        return Encoded(scaled.astype(self.dtype), int(above))

    def decode(self, codes: Codes) -> Values:
        """Return physical values, NaN where nothing was observed.

        Raises:
            ValueError: codes of another dtype.
        """
        if codes.dtype != self.dtype:
            raise ValueError(f"These codes are {self.dtype}, got {codes.dtype}.")
        return _decoding_table(self).take(codes)

    def units(self, quantity: str, unit: str) -> Units:
        """Return what an archive's manifest says of these codes."""
        return Units(
            quantity=quantity,
            unit=unit,
            scale=self.step,
            offset=float(self.low),
            max_code=self.max_code,
            missing_code=self.missing_code,
        )


@functools.lru_cache(maxsize=8)
def _decoding_table(scale: PixelScale) -> Values:
    """Physical value of every code that the dtype can hold."""
    codes = np.arange(_MAX_CODES[scale.dtype] + 1, dtype=np.float64)
    table = scale.low + codes * scale.step
    if scale.missing_code is not None:
        table[scale.missing_code] = np.nan
    rounded = table.astype(np.float32)
    rounded.setflags(write=False)
    return rounded


def _between(quantity_from: Quantity, quantity_to: Quantity) -> dict[str, Any]:
    return {
        "from": quantity_from,
        "unit_from": UNITS[quantity_from],
        "to": quantity_to,
        "unit_to": UNITS[quantity_to],
    }
