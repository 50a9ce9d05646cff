"""What every radar reader gives, whatever the file: fields in a physical unit, with their facts.

A reader is a frozen dataclass whose fields are its options. It opens one file at a time and yields
one field at a time, so no event is ever in memory whole. It says what the file says: cropping,
resampling, conversion to another unit and splitting happen in the pipeline.

Importing this package needs none of the libraries that the formats need; a reader imports its own
when it reads (`import_extra`).

Shape letters: H height (row 0 is north), W width (column 0 is west).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.manifest import Grid, SourceCard

Quantity: TypeAlias = Literal["reflectivity", "rain_rate", "accumulation", "vil", "intensity"]
"""What is measured. Each has one unit here, `UNITS`; readers convert prefixes (m/s to mm/h), and
nothing else: from one quantity to another is physics (`data_prep.physics`)."""

UNITS: dict[Quantity, str] = {
    "reflectivity": "dBZ",
    "rain_rate": "mm/h",
    "accumulation": "mm",
    "vil": "kg/m2",
    "intensity": "1",
}


class BadFileError(ValueError):
    """A file that cannot be read, or is not what it should be; names the file and the reason."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadFileError], tuple[str, str]]:
        return BadFileError, (self.path, self.reason)  # it travels between processes


FOLDER = "{folder}"


class MissingExtraError(ValueError):
    """A library that this format needs is not installed; names the extra."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RadarFrame:
    """One field of a file, before its values are read."""

    time: datetime
    """UTC (aware): when the measurement ended; of a forecast, the time it is for."""
    key: str = ""
    """Where the file has it (data set, index, member); "" where there is only one."""
    series: str = ""
    """Fields of one series show one place; others never follow each other in a sequence. In it,
    FOLDER stands for the file's folder below the source, which a reader does not know."""
    lead_minutes: float = 0.0
    """Above 0 the field is a forecast, not an observation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RadarFile:
    """What one file holds: the facts that all of its fields share, and the fields."""

    quantity: Quantity
    interval_minutes: float | None
    """Time from one field of the product to the next, where the format or product says it."""
    accumulation_minutes: float | None
    """Of an accumulation: over how long; None for every other quantity."""
    grid: Grid
    missing_rule: str
    """In words: which stored values mean "not observed", and which "no echo" or "no rain"."""
    notes: tuple[str, ...] = ()
    """Whatever a user of the values should know (clutter, clipping, quality flags...)."""
    frames: tuple[RadarFrame, ...]


class Coded(NamedTuple):
    """A field as its file stores it: numbers of 8 or 16 bits that are looked up in a table."""

    table: NDArray[np.float32]
    """Value of each stored number, in the quantity's unit; NaN for "not observed". The same object
    for fields of the same coding."""
    codes_HW: NDArray[np.uint8] | NDArray[np.uint16]
    """Row 0 north, column 0 west."""


class RadarReader(Protocol):
    """How one format is read.

    A reader may also have `stored_fields`, like `fields` but with a `Coded` in place of values
    where the file stores such: whoever wants other codes looks them up in one step, and need not
    compute a million logarithms of 256 different numbers.
    """

    name: ClassVar[str]
    """As in `--reader NAME`."""
    extra: ClassVar[str | None]
    """Extra of this project that brings the libraries ("radar"), or None."""
    patterns: ClassVar[tuple[str, ...]]
    """Shell patterns of file names that may be this format, lower case, e.g. ("*.h5", "*.hdf")."""
    source: ClassVar[SourceCard]
    """Who made the data, under which terms, as far as that is known for the format."""

    def recognises(self, path: Path) -> bool:
        """Say whether this is a file of this format, by its content; False for anything else.

        Cheap (opens the file, reads a header) and exact enough that no two readers claim one
        file. Never raises, except MissingExtraError where the signature fits but the library that
        would tell is not installed.
        """
        ...

    def scan(self, path: Path) -> RadarFile:
        """Read the headers only.

        Raises:
            BadFileError: names the file and what is wrong with it.
            MissingExtraError: names the extra to install.
        """
        ...

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Yield the fields of the given keys, in their order, one at a time.

        Returns:
            values_HW: float32 in the quantity's unit, row 0 north, column 0 west; NaN where
            nothing was observed. "Observed, no echo" is a number: 0 for rain, and for
            reflectivity the lowest value that the format can store (or `NO_ECHO_DBZ`).

        Raises:
            BadFileError: truncated, altered, wrong shape, no such key.
        """
        ...


NO_ECHO_DBZ = -32.0
"""Reflectivity given to "observed, no echo" where the format has no number for it."""


def import_extra(module: str, extra: str, what: str) -> ModuleType:
    """Import a library that only some formats need.

    Raises:
        MissingExtraError: it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs the library {module.partition('.')[0]}, which cannot be imported "
            f"({error}). Install it with: pip install 'tmu-dist[{extra}]'"
        ) from error
