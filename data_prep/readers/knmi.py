"""Royal Netherlands Meteorological Institute: composites in KNMI's own HDF5 layout (not ODIM).

The layout is KNMI HDF5 data format specification 3.5: `overview` has the times, `geographic` the
grid, and each `imageN` a field with the formula that turns its pixel values (PV) into physical
ones. KNMI also publishes ODIM files, which `data_prep.readers.odim` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.coding import NEGATIVE_RULE, Coding
from data_prep.readers.hdf5 import attribute, attributes, hdf5_fits, number, open_hdf5
from data_prep.readers.projection import metric, placed_grid
from data_prep.readers.radar import BadFileError, Coded, Quantity, RadarFile, RadarFrame
from data_prep.readers.raw import StoredFields
from tmu_dist.data.manifest import Grid, SourceCard

_NUMBER = r"[-+]?\s*(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_FORMULA = re.compile(rf"GEO\s*=\s*({_NUMBER})\s*\*\s*PV\s*(?:\+?\s*({_NUMBER}))?\s*", re.I)
_TIME = re.compile(r"(\d{1,2})-([A-Za-z]{3})-(\d{4});(\d\d):(\d\d):(\d\d)")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_METRES = {"KM": 1000.0, "M": 1.0}
_LONGEST_STEP_MINUTES = 15.0
"""Longer sums may be issued more often than they last, so they do not tell the interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KNMIReader(StoredFields):
    """Reads KNMI's composites: precipitation sums, intensities and reflectivity.

    `recognises` is False for a truncated file, which cannot be opened; `scan` then says so.
    """

    name: ClassVar[str] = "knmi"
    extra: ClassVar[str | None] = "radar"
    patterns: ClassVar[tuple[str, ...]] = ("*.h5", "*.hdf", "*.hdf5", "*.he5")
    source: ClassVar[SourceCard] = SourceCard(
        name="KNMI radar composite",
        provider="Royal Netherlands Meteorological Institute (KNMI)",
        licence="CC BY 4.0 (KNMI's open data policy; not stated in the files)",
        citation="KNMI Data Platform, https://dataplatform.knmi.nl",
    )

    def recognises(self, path: Path) -> bool:
        return hdf5_fits(
            path, lambda file: "overview" in file and ("image1" in file or "scan1" in file)
        )

    def scan(self, path: Path) -> RadarFile:
        with open_hdf5(path) as file:
            images = _images(path, file)
            coding = _coding(path, file["image1"])
            start, end = (
                _time(attribute(file["overview"], f"product_datetime_{which}"))
                for which in ("start", "end")
            )
            frames = _frames(path, file, images, start, end)
            step, accumulation = _durations(path, coding.quantity, frames, start, end)
            grid, grid_notes = _grid(path, file)
            product = attribute(file["image1"], "image_product_name")
        missing = ", ".join(f"{code:g}" for code in coding.missing) or "no value"
        echo = "; 0 is no echo" if coding.no_echo else f"; 0 is no rain; {NEGATIVE_RULE}"
        return RadarFile(
            quantity=coding.quantity,
            interval_minutes=step,
            accumulation_minutes=accumulation,
            grid=grid,
            missing_rule=f"Stored {missing} is missing or outside the radars' range{echo}.",
            notes=(f"Product {product or 'not named'}, steps of {coding.gain:g}.", *grid_notes),
            frames=frames,
        )

    def stored_fields(
        self, path: Path, keys: Sequence[str]
    ) -> Iterator[NDArray[np.float32] | Coded]:
        if not keys:
            return
        with open_hdf5(path) as file:
            images = _images(path, file)
            south_first = _pixel_size(path, file["geographic"])[1] > 0
            for key in keys:
                if key not in images:
                    raise BadFileError(path, f"holds no field {key!r}")
                coding = _coding(path, file[key])
                stored_HW = file[key]["image_data"][()]
                yield coding.coded(stored_HW[::-1] if south_first else stored_HW)


def _images(path: Path, file: Any) -> list[str]:
    """Names of the images that show the same quantity as the first, in their order."""
    if "overview" not in file or "geographic" not in file:
        raise BadFileError(path, "has no groups overview and geographic, as KNMI's files do")
    if "image1" not in file:
        raise BadFileError(
            path, "holds polar scans, no composite: only gridded images (image1...) are read"
        )
    names = [name for name in file if re.fullmatch(r"image\d+", name)]
    names = [name for name in sorted(names, key=lambda n: int(n[5:])) if "image_data" in file[name]]
    if names[:1] != ["image1"]:
        raise BadFileError(path, "has no image1/image_data")
    if len(names) == 1:
        return names
    shape = file["image1/image_data"].shape
    parameter = attribute(file["image1"], "image_geo_parameter")
    return [
        name
        for name in names
        if file[name]["image_data"].shape == shape
        and attribute(file[name], "image_geo_parameter") == parameter
    ]


def _coding(path: Path, image: Any) -> Coding:
    calibration = attributes(image["calibration"]) if "calibration" in image else {}
    formula = calibration.get("calibration_formulas")
    match = _FORMULA.fullmatch(formula) if isinstance(formula, str) else None
    if match is None:
        raise BadFileError(
            path, f"has the calibration formula {formula!r}, expected GEO = gain * PV + offset"
        )
    gain, offset = (float(re.sub(r"\s", "", text)) for text in (match[1], match[2] or "0"))
    codes = [
        number(calibration.get(f"calibration_{name}")) for name in ("missing_data", "out_of_image")
    ]
    quantity = _quantity(
        path,
        *(str(attribute(image, f"image_{n}") or "") for n in ("geo_parameter", "product_name")),
    )
    missing = sorted({code for code in codes if code is not None})
    if quantity != "reflectivity":
        return Coding(quantity=quantity, gain=gain, offset=offset, missing=tuple(missing))
    # Of reflectivity, KNMI reserves 0 for "no echo", whatever the attribute calls it.
    return Coding(
        quantity=quantity,
        gain=gain,
        offset=offset,
        missing=tuple(code for code in missing if code != 0),
        no_echo=(0.0,),
    )


def _quantity(path: Path, parameter: str, product: str) -> Quantity:
    parameter, product = parameter.upper(), product.upper()
    if "DBZ" in parameter or "REFLECTIVITY" in parameter:
        return "reflectivity"
    if re.search(r"MM/H|INTENSITY|RATE", parameter):
        return "rain_rate"
    if re.search(r"PRECIP|ACCUM|RAIN|\[MM\]", parameter):
        return "accumulation"
    if not parameter and "_PCP" in product:
        return "reflectivity"
    if not parameter and "_RA" in product:
        return "accumulation"
    raise BadFileError(
        path,
        f"holds {parameter or 'an unnamed parameter'} (product {product or 'unnamed'}); "
        "precipitation sums, intensities and reflectivity are read",
    )


def _frames(
    path: Path, file: Any, images: list[str], start: datetime | None, end: datetime | None
) -> tuple[RadarFrame, ...]:
    """One frame an image: of several, those that say what time they are valid for."""
    if len(images) > 1:
        valid = [(name, _time(attribute(file[name], "image_datetime_valid"))) for name in images]
        timed = [(name, time) for name, time in valid if time is not None]
        if timed:
            issued = start or timed[0][1]
            return tuple(
                RadarFrame(
                    time=time,
                    key=name,
                    lead_minutes=max(0.0, (time - issued) / timedelta(minutes=1)),
                )
                for name, time in timed
            )
    if end is None:
        raise BadFileError(path, "has no overview/product_datetime_end, the time of the field")
    return (RadarFrame(time=end, key="image1"),)


def _durations(
    path: Path,
    quantity: Quantity,
    frames: tuple[RadarFrame, ...],
    start: datetime | None,
    end: datetime | None,
) -> tuple[float | None, float | None]:
    """Return minutes between fields and minutes of accumulation, each None where unknown."""
    minutes = None
    if len(frames) > 1:
        minutes = (frames[1].time - frames[0].time) / timedelta(minutes=1)
    elif start is not None and end is not None and end > start:
        minutes = (end - start) / timedelta(minutes=1)
    if quantity != "accumulation":
        return (minutes if len(frames) > 1 else None), None
    if minutes is None:
        raise BadFileError(path, f"sums over {start} to {end}: a sum needs a start and a later end")
    return (minutes if minutes <= _LONGEST_STEP_MINUTES else None), minutes


def _grid(path: Path, file: Any) -> tuple[Grid, tuple[str, ...]]:
    """Return the grid, in metres, and notes on it."""
    height, width = file["image1/image_data"].shape
    geographic = file["geographic"]
    said = [number(attribute(geographic, f"geo_number_{name}")) for name in ("rows", "columns")]
    if said != [height, width]:
        raise BadFileError(path, f"holds {height}x{width} pixels, its header says {said}")
    projection = None
    if "map_projection" in geographic:
        text = attribute(geographic["map_projection"], "projection_proj4_params")
        projection = metric(text) if isinstance(text, str) and text else None
    size_x, size_y = _pixel_size(path, geographic)
    column, row = (
        number(attribute(geographic, f"geo_{name}_offset")) for name in ("column", "row")
    )
    unit = str(attribute(geographic, "geo_dim_pixel") or "KM").upper().partition(",")[0]
    if column is None or row is None or projection is None or unit not in _METRES:
        return Grid(height=height, width=width, projection=projection), (
            "The file does not place its grid on the earth.",
        )
    metres = _METRES[unit]
    return placed_grid(
        height,
        width,
        projection,
        unit="m",
        left=column * size_x * metres,
        top=(row * size_y + max(size_y, 0) * height) * metres,
        pixel_width=abs(size_x) * metres,
        pixel_height=abs(size_y) * metres,
    ), ()


def _pixel_size(path: Path, geographic: Any) -> tuple[float, float]:
    """Size of a pixel in x and in y; a negative y means that row 0 is the northern one."""
    size_x, size_y = (number(attribute(geographic, f"geo_pixel_size_{n}")) for n in ("x", "y"))
    if not size_x or not size_y:
        raise BadFileError(path, "does not say how large its pixels are (geo_pixel_size_x, _y)")
    return size_x, size_y


def _time(text: Any) -> datetime | None:
    """Parse a time like 26-AUG-2010;00:05:00.000 (UTC), in any language setting."""
    match = _TIME.match(str(text))
    if match is None or match[2].upper() not in _MONTHS:
        return None
    day, year, hour, minute, second = map(int, match.group(1, 3, 4, 5, 6))
    month = _MONTHS.index(match[2].upper()) + 1
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
