"""Finnish Meteorological Institute: radar composites as binary PGM with facts in comments.

The header's comment lines name the observation time, the pixel size and the corners of a polar
stereographic grid. A generic PGM without them is an image (`data_prep.readers.images`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.radar import BadFileError, Coded, RadarFile, RadarFrame
from data_prep.readers.raw import StoredFields, bytes_of, head_of, reading
from tmu_dist.data.manifest import Grid, SourceCard

_HEAD_BYTES = 8192
_EARTH_RADIUS_M = 6_371_288.0
"""Of the sphere on which the corners of FMI's grids lie metersperpixel apart."""
_COMMENT_OR_SPACE = re.compile(rb"(?:\s*#[^\n]*(?:\n|$)|\s)+")
_NUMBER = re.compile(rb"\d+")


class _Header(NamedTuple):
    facts: dict[str, str]
    height: int
    width: int
    max_value: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FMIReader(StoredFields):
    """Reads *.pgm and *.pgm.gz: reflectivity, by default (value - 64) / 2 dBZ."""

    name: ClassVar[str] = "fmi"
    extra: ClassVar[str | None] = None
    patterns: ClassVar[tuple[str, ...]] = ("*.pgm", "*.pgm.gz", "*.pgm.bz2")
    source: ClassVar[SourceCard] = SourceCard(
        name="FMI radar composite",
        provider="Finnish Meteorological Institute",
        licence="CC BY 4.0 (FMI's open data policy; not stated in the files)",
        citation="Finnish Meteorological Institute",
    )

    def recognises(self, path: Path) -> bool:
        head = head_of(path, _HEAD_BYTES)
        return head.startswith(b"P5") and re.search(rb"^# *obstime\s", head, re.M) is not None

    def scan(self, path: Path) -> RadarFile:
        header = _parse_header(path, head_of(path, _HEAD_BYTES))
        scale, offset, missing = _mapping(path, header)
        with reading(path):
            stamp = header.facts["obstime"]
            time = datetime.strptime(stamp.ljust(14, "0"), "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        grid, note = _grid(header)
        product = [header.facts.get(name, "") for name in ("producttype", "productname", "param")]
        return RadarFile(
            quantity="reflectivity",
            interval_minutes=5.0,
            accumulation_minutes=None,
            grid=grid,
            missing_rule=f"{missing} is outside the radars' coverage; 0 is no echo ({offset} dBZ).",
            notes=(
                f"Product {' '.join(filter(None, product)) or 'not named'}, stored in steps of "
                f"{scale} dB.",
                *note,
            ),
            frames=(RadarFrame(time=time, series=header.facts.get("projection_name", "")),),
        )

    def stored_fields(self, path: Path, keys: Sequence[str]) -> Iterator[Coded]:
        for key in keys:
            if key:
                raise BadFileError(path, f"holds no field {key!r}")
            data = bytes_of(path)
            header = _parse_header(path, data[:_HEAD_BYTES])
            scale, offset, missing = _mapping(path, header)
            size = header.height * header.width
            if len(data) - header.num_bytes < size:
                raise BadFileError(
                    path, f"is truncated: {len(data) - header.num_bytes} of {size} pixels are there"
                )
            codes = np.frombuffer(data, np.uint8, size, header.num_bytes)
            table = _table(scale, offset, missing)
            yield Coded(table, codes.reshape(header.height, header.width))


def _parse_header(path: Path, head: bytes) -> _Header:
    """Parse "P5", comments, width, height and largest value; comments may stand anywhere."""
    if not head:
        # The error of the file itself (absent, damaged gzip) says more than an empty head.
        bytes_of(path)
    if not head.startswith(b"P5"):
        raise BadFileError(path, f"is no binary PGM: it starts with {head[:8]!r}, not b'P5'")
    facts: dict[str, str] = {}
    numbers: list[int] = []
    place = 2
    while len(numbers) < 3:
        between = _COMMENT_OR_SPACE.match(head, place)
        number = _NUMBER.match(head, between.end()) if between else None
        if between is None or number is None:
            raise BadFileError(path, "has no complete PGM header (width, height, largest value)")
        for line in between[0].decode("latin-1").splitlines():
            name, _, value = line.lstrip("# ").partition(" ")
            facts.setdefault(name, value.strip())
        numbers.append(int(number[0]))
        place = number.end()
    width, height, max_value = numbers
    if "obstime" not in facts:
        raise BadFileError(path, "names no obstime in its comments, as FMI's composites do")
    if width < 1 or height < 1 or not 1 <= max_value <= 255:
        raise BadFileError(
            path, f"is {height}x{width} with values up to {max_value}; only 8 bits are known"
        )
    return _Header(facts, height, width, max_value, place + 1)


@lru_cache(maxsize=8)
def _table(scale: float, offset: float, missing: int) -> NDArray[np.float32]:
    """Reflectivity in dBZ of each pixel value."""
    values = np.arange(256) * scale + offset
    values[missing] = np.nan
    table = values.astype(np.float32)
    table.setflags(write=False)
    return table


def _mapping(path: Path, header: _Header) -> tuple[float, float, int]:
    """Return scale, offset (dBZ) and the missing value: the header's own, or FMI's usual ones."""
    param = header.facts.get("param", "reflectivity").lower()
    if "reflectivity" not in param and "dbz" not in param:
        raise BadFileError(path, f"holds {header.facts['param']}; only reflectivity is known")
    with reading(path):
        scale = float(header.facts.get("gain", 0.5))
        offset = float(header.facts.get("offset", -32.0))
        missing = int(header.facts.get("missingval", header.max_value))
    if not 0 <= missing <= 255 or not 0 < scale < math.inf or not math.isfinite(offset):
        raise BadFileError(path, f"maps values by gain {scale}, offset {offset}, missing {missing}")
    return scale, offset, missing


def _grid(header: _Header) -> tuple[Grid, tuple[str, ...]]:
    """Return the grid, and a note where the header does not say where it lies."""
    facts = header.facts
    unplaced = Grid(height=header.height, width=header.width)
    try:
        lon_0, lat_ts = float(facts["centrallongitude"]), float(facts["truelatitude"])
        corners = [
            _project(*map(float, facts[corner].split()), lon_0=lon_0, lat_ts=lat_ts)
            for corner in ("bottomleft", "topright")
        ]
        pixel_width = float(facts["metersperpixel_x"])
        pixel_height = float(facts["metersperpixel_y"])
        polar = facts.get("type") == "stereographic" and float(facts["centrallatitude"]) == 90
    except (KeyError, ValueError, TypeError):
        return unplaced, ("The header does not place the grid on the earth.",)
    (left, bottom), (right, top) = corners
    spans = (right - left) / header.width, (top - bottom) / header.height
    if not polar or not np.allclose(spans, (pixel_width, pixel_height), rtol=1e-3):
        return unplaced, (
            "The header's corners, pixel size and projection do not agree; the grid is not placed.",
        )
    return Grid(
        height=header.height,
        width=header.width,
        projection=(
            f"+proj=stere +lat_0=90 +lon_0={lon_0:g} +lat_ts={lat_ts:g} "
            f"+R={_EARTH_RADIUS_M:.0f} +units=m +no_defs"
        ),
        unit="m",
        left=left,
        top=top,
        pixel_width=spans[0],
        pixel_height=spans[1],
    ), ()


def _project(lon: float, lat: float, *, lon_0: float, lat_ts: float) -> tuple[float, float]:
    """North polar stereographic projection of a sphere, in metres; degrees in."""
    scale = _EARTH_RADIUS_M * (1 + math.sin(math.radians(lat_ts)))
    radius = scale * math.tan(math.pi / 4 - math.radians(lat) / 2)
    angle = math.radians(lon - lon_0)
    return radius * math.sin(angle), -radius * math.cos(angle)
