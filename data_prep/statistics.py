"""Statistics of stored codes: counts of whole numbers, so every order of merging gives the same.

Moments are computed from the counts in exact arithmetic and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.source import Codes
from tmu_dist.data.manifest import Units

_NUM_CODES = {"uint8": 256, "uint16": 65_536}
_MOST_BINS = 256
_CHUNK = 2**20  # numpy counts integers of 64 bits: more at a time would take 8 times the codes


@dataclass(slots=True, eq=False)
class CodeHistogram:
    """How often each stored code occurs."""

    counts: NDArray[np.int64]
    """One number for each code that the dtype can hold: 256 or 65,536."""

    @classmethod
    def empty(cls, dtype: str) -> CodeHistogram:
        """Return a histogram of nothing, of "uint8" or "uint16" codes.

        Raises:
            ValueError: another dtype.
        """
        if dtype not in _NUM_CODES:
            raise ValueError(f"Codes are one of {list(_NUM_CODES)}, got {dtype!r}.")
        return cls(np.zeros(_NUM_CODES[dtype], np.int64))

    @property
    def dtype(self) -> str:
        return next(name for name, size in _NUM_CODES.items() if size == len(self.counts))

    def update(self, codes: Codes) -> None:
        """Count codes of any shape.

        Raises:
            ValueError: codes of another dtype than the histogram's.
        """
        if codes.dtype != self.dtype:
            raise ValueError(f"This histogram counts {self.dtype} codes, got {codes.dtype}.")
        flat = np.ascontiguousarray(codes).reshape(-1)
        if codes.dtype == np.uint8 and flat.size > 2**17:
            # Two neighbours as one number of 16 bits: half as many to count, the same counts.
            pairs, flat = flat[: flat.size // 2 * 2].view(np.uint16), flat[flat.size // 2 * 2 :]
            counts = np.zeros(2**16, np.int64)
            for start in range(0, pairs.size, _CHUNK):
                counts += np.bincount(pairs[start : start + _CHUNK], minlength=2**16)
            table = counts.reshape(256, 256)
            self.counts += table.sum(axis=0) + table.sum(axis=1)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            self.counts += np.bincount(chunk, minlength=len(self.counts))

    def merge(self, other: CodeHistogram) -> None:
        """Add another histogram's counts to this one.

        Raises:
            ValueError: the other counts codes of another dtype.
        """
        if len(other.counts) != len(self.counts):
            raise ValueError(f"A histogram of {other.dtype} codes is no part of {self.dtype}.")
        self.counts += other.counts

    def to_record(self) -> dict[str, Any]:
        """Return JSON values from which `from_record` makes the same histogram."""
        codes = np.flatnonzero(self.counts)
        return {
            "dtype": self.dtype,
            "codes": codes.tolist(),
            "counts": self.counts[codes].tolist(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CodeHistogram:
        """Inverse of `to_record`.

        Raises:
            ValueError: the record is not one of those.
        """
        try:
            histogram = cls.empty(record["dtype"])
            codes = np.asarray(record["codes"], np.int64)
            counts = np.asarray(record["counts"], np.int64)
            if codes.shape != counts.shape or min(codes.min(initial=0), counts.min(initial=0)) < 0:
                raise ValueError("codes and counts are lists of equally many numbers from 0 on")
            histogram.counts[codes] = counts
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"This is no record of a histogram of codes: {error}.") from error
        return histogram


def statistics_record(
    histogram: CodeHistogram, units: Units, wet_threshold: float | None = None
) -> dict[str, Any]:
    """Return what the codes say of the physical quantity, as JSON values.

    Args:
        histogram: of the codes, missing ones included.
        units: what the codes mean.
        wet_threshold: physical value from which a pixel counts as wet; None: not asked.

    Returns:
        Numbers of pixels (`count` observed, `missing`); `mean`, `variance`, `std` (of the
        population: divided by count), `min` and `max` in `unit`; `wet_fraction` of the observed
        pixels with `wet_threshold`; `histogram` with `counts` in bins of `codes_per_bin`
        neighbouring codes from code 0 on, at most 256 bins. Means are null of nothing.

    Raises:
        ValueError: there are codes that the units give no meaning.
    """
    meaning = units.max_code + 1
    missing = 0 if units.missing_code is None else int(histogram.counts[units.missing_code])
    counts = histogram.counts[:meaning]
    if strays := int(histogram.counts[meaning:].sum()) - missing:
        raise ValueError(
            f"{strays} stored codes lie above max_code={units.max_code} and are not the missing "
            f"code ({units.missing_code}): the units do not belong to these codes."
        )
    record: dict[str, Any] = {
        "quantity": units.quantity,
        "unit": units.unit,
        "count": int(counts.sum()),
        "missing": missing,
        **_moments(counts, units),
        "wet_threshold": wet_threshold,
        "wet_fraction": None,
        "histogram": _bins(counts),
    }
    if wet_threshold is not None and record["count"]:
        wet = int(counts[wet_codes(units, wet_threshold)].sum())
        record["wet_fraction"] = wet / record["count"]
    return record


def wet_codes(units: Units, wet_threshold: float) -> NDArray[np.bool_]:
    """Say of each code 0..max_code whether its value is at or above a physical threshold."""
    values = units.offset + units.scale * np.arange(units.max_code + 1, dtype=np.float64)
    # A threshold that is the value of a code includes it, whatever its last bit.
    return values >= wet_threshold - 1e-6 * abs(units.scale)


def _moments(counts: NDArray[np.int64], units: Units) -> dict[str, float | None]:
    """Return mean, variance, std, min and max in the physical unit."""
    codes = np.flatnonzero(counts).tolist()
    if not codes:
        return dict.fromkeys(("mean", "variance", "std", "min", "max"))
    weights = counts[codes].tolist()
    # Python's whole numbers: exact, however many pixels.
    total = sum(weights)
    first = sum(code * weight for code, weight in zip(codes, weights, strict=True))
    second = sum(code * code * weight for code, weight in zip(codes, weights, strict=True))
    scale, offset = Fraction(units.scale), Fraction(units.offset)
    variance = scale**2 * Fraction(total * second - first * first, total * total)
    ends = sorted(float(offset + scale * code) for code in (codes[0], codes[-1]))
    return {
        "mean": float(offset + scale * Fraction(first, total)),
        "variance": float(variance),
        "std": float(variance) ** 0.5,
        "min": ends[0],
        "max": ends[1],
    }


def _bins(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Return at most 256 bins of neighbouring codes.

    All bins are equally wide where the number of codes has a fitting divisor, as those of
    `data_prep.physics.PixelScale` have (16 bits with a missing code: 255 bins of 257).
    """
    least = -(-len(counts) // _MOST_BINS)
    fitting = (size for size in range(least, 2 * least) if len(counts) % size == 0)
    codes_per_bin = next(fitting, least)
    starts = np.arange(0, len(counts), codes_per_bin)
    return {
        "codes_per_bin": codes_per_bin,
        "counts": np.add.reduceat(counts, starts).tolist(),
    }
