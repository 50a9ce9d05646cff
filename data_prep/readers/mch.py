"""MeteoSwiss composites in 8-bit palette GIFs: products AQC (Acquire) and CPC (CombiPrecip).

The palette index, not its colour, is the measurement: a logarithmic scale of accumulated
precipitation, as MeteoSwiss describes it for these two products. Products that are coded by colour
(RZC, AZC) are refused, because their scale depends on a table that the files do not hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.readers.radar import BadFileError, Coded, RadarFile, RadarFrame
from data_prep.readers.raw import StoredFields, head_of, reading
from tmu_dist.data.manifest import Grid, SourceCard

_GRID = Grid(
    height=640,
    width=710,
    projection="EPSG:21781",
    unit="m",
    left=255_000.0,
    top=480_000.0,
    pixel_width=1000.0,
    pixel_height=1000.0,
)
_MISSING = 255
_FIRST_WET, _LAST_WET = 2, 250
_INDEX_PRODUCTS = ("AQC", "CPC")
_COLOUR_PRODUCTS = ("AZC", "RZC")
_SCALE = "mmh2LASSEN8bit"
_NAME = re.compile(
    r"(?P<product>[A-Z]{3})(?P<time>\d{9})(?P<quality>[^_.]*)_*(?P<minutes>\d{5})?\."
)
_COMMENT = re.compile(
    r"PRDT=(?P<product>[A-Z]{3})(?P<time>\d{9})\s+SCALE=(?P<scale>\S+)"
    r".*?ACCUm=(?P<minutes>\d+)\s+DeltaT=(?P<interval>\d+)",
    re.DOTALL,
)


class _Facts(NamedTuple):
    product: str
    time: datetime
    accumulation_minutes: float
    interval_minutes: float | None
    quality: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MCHReader(StoredFields):
    """Reads AQCyydddhhmmX_00005.801.gif: millimetres in the minutes before the time."""

    name: ClassVar[str] = "mch"
    extra: ClassVar[str | None] = None
    patterns: ClassVar[tuple[str, ...]] = ("*.gif",)
    source: ClassVar[SourceCard] = SourceCard(
        name="MeteoSwiss radar composite",
        provider="Federal Office of Meteorology and Climatology MeteoSwiss",
        citation="MeteoSwiss",
    )

    def recognises(self, path: Path) -> bool:
        head = head_of(path, 4096)
        if not head.startswith(b"GIF8"):
            return False
        by_name = _NAME.match(path.name)
        known = (*_INDEX_PRODUCTS, *_COLOUR_PRODUCTS)
        return b"PRDT=" in head or (by_name is not None and by_name["product"] in known)

    def scan(self, path: Path) -> RadarFile:
        with reading(path), Image.open(path, formats=["GIF"]) as image:
            facts = _facts(path, image)
        notes = [f"Product {facts.product}; accumulated rain, from a logarithmic 8-bit scale."]
        if facts.quality:
            notes.append(
                f"Quality letter {facts.quality} in the file name; the file does not explain it."
            )
        return RadarFile(
            quantity="accumulation",
            interval_minutes=facts.interval_minutes,
            accumulation_minutes=facts.accumulation_minutes,
            grid=_GRID,
            missing_rule=(
                "Palette index 255 is outside the radars' coverage. Indices below 2 and 251 to "
                "254 are no rain."
            ),
            notes=tuple(notes),
            frames=(RadarFrame(time=facts.time, series=facts.product),),
        )

    def stored_fields(self, path: Path, keys: Sequence[str]) -> Iterator[Coded]:
        for key in keys:
            if key:
                raise BadFileError(path, f"holds no field {key!r}")
            with reading(path), Image.open(path, formats=["GIF"]) as image:
                _facts(path, image)
                indices_HW = np.asarray(image)
            yield Coded(_table(), indices_HW)


def _facts(path: Path, image: Image.Image) -> _Facts:
    """Check that the palette indices mean rain, and return what comment and file name say."""
    if image.size != (_GRID.width, _GRID.height) or image.mode not in ("P", "L"):
        raise BadFileError(
            path,
            f"is an image of {image.size[1]}x{image.size[0]} pixels, mode {image.mode}; "
            f"MeteoSwiss composites have {_GRID.height}x{_GRID.width} and a palette",
        )
    raw_comment = image.info.get("comment", b"")
    comment = _COMMENT.search(raw_comment.decode("latin-1")) if raw_comment else None
    name = _NAME.match(path.name)
    told = comment or name
    if told is None:
        raise BadFileError(
            path,
            "says neither in a comment (PRDT=...) nor in its name (AQCyydddhhmm...) which product "
            "and time it is",
        )
    product, stamp = told["product"], told["time"]
    if product not in _INDEX_PRODUCTS:
        raise BadFileError(
            path,
            f"is product {product}, coded by colour; only {' and '.join(_INDEX_PRODUCTS)} have "
            "palette indices that are measurements",
        )
    if comment and not comment["scale"].startswith(_SCALE):
        raise BadFileError(path, f"has the scale {comment['scale']}; only {_SCALE} is known")
    if comment and name and name["time"] != stamp:
        raise BadFileError(path, f"is of {stamp} (yydddhhmm) by its comment; was it renamed?")
    minutes = float(told["minutes"] or 0)
    if minutes <= 0:
        raise BadFileError(path, "does not say over how many minutes it accumulates")
    interval = float(comment["interval"]) if comment else 5.0 if product == "AQC" else 0.0
    return _Facts(
        product=product,
        time=datetime.strptime(stamp, "%y%j%H%M").replace(tzinfo=UTC),
        accumulation_minutes=minutes,
        interval_minutes=interval or None,
        quality=name["quality"] if name else "",
    )


@cache
def _table() -> NDArray[np.float32]:
    """Millimetres for each palette index."""
    index = np.arange(256)
    # A rate's reflectivity by Z = 316 R^1.5, in half decibels, per whole scale of 20 indices.
    values = (10 ** ((index - 71.5) / 20) / 316) ** (1 / 1.5)
    values[(index < _FIRST_WET) | (index > _LAST_WET)] = 0.0
    values[_MISSING] = np.nan
    return values.astype(np.float32)
