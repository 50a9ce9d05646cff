"""A folder of grey images: one image a field, with a mapping from pixel to value.

HKO-7, Shanghai, CIKM and other sets of nowcasting studies are distributed so. Presets give their
usual mappings from an 8-bit pixel:

- hko7: dBZ = pixel * 70 / 255 - 10, as the data set's authors convert it in their benchmark code.
- shanghai: dBZ = pixel * 70 / 255, as published code for this set converts it.
- cikm: dBZ = pixel * 95 / 255 - 10. General knowledge; the organisers describe the pixels only as
  transformed reflectivity, and published code differs in the offset.
- paper: dBZ = pixel * 70 / 255, this project's scale for the Guangzhou and Beijing sets, of which
  the paper gives no mapping.

Only grey images have a mapping: a coloured one shows a palette, and is refused. Without any mapping
pixels are intensities from 0 to 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.readers.geotiff import GEO_TAGS, check_minutes, tiff_tags
from data_prep.readers.radar import FOLDER, UNITS, BadFileError, Quantity, RadarFile, RadarFrame
from data_prep.readers.raw import head_of, physical, reading, time_by, time_in
from tmu_dist.data.manifest import Grid, SourceCard

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "PPM")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"P2", b"P5")
_LAST_NUMBER = re.compile(r"(\d+)\D*$")
_MAX_NUMBER = 10_000_000
_HKO7_TIME = (
    r"RAD(?P<year>\d\d)(?P<month>\d\d)(?P<day>\d\d)(?P<hour>\d\d)(?P<minute>\d\d)(?P<second>\d\d)"
)


class _Mapping(NamedTuple):
    quantity: Quantity
    scale: float
    offset: float
    interval_minutes: float | None = None
    time_pattern: str = ""


_PRESETS: dict[str, _Mapping] = {
    "hko7": _Mapping("reflectivity", 70 / 255, -10.0, 6.0, _HKO7_TIME),
    "shanghai": _Mapping("reflectivity", 70 / 255, 0.0),
    "cikm": _Mapping("reflectivity", 95 / 255, -10.0, 6.0),
    "paper": _Mapping("reflectivity", 70 / 255, 0.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReader:
    """Reads grey PNG, JPEG, BMP, TIFF and PGM: value = scale * pixel + offset."""

    preset: Literal["", "hko7", "shanghai", "cikm", "paper"] = ""
    """A known mapping, instead of quantity, scale and offset."""
    quantity: str = ""
    """reflectivity, rain_rate, accumulation, vil or intensity; scale must then be given."""
    scale: float | None = None
    offset: float | None = None
    missing: tuple[int, ...] = ()
    """Pixels that mean "not observed", commas between."""
    mask: str = ""
    """Path of an image of the same size: nothing is observed where it is 0."""
    time_pattern: str = ""
    """Regular expression that finds the time in the path, by the groups (?P<year>...), month, day,
    hour, minute and perhaps second; or one group (?P<time>...) of YYYYMMDDhhmm[ss]. Without it, 12
    or 14 digits in the name, also with - _ . or T between, are a time."""
    interval_minutes: float | None = None
    accumulation_minutes: float | None = None

    name: ClassVar[str] = "images"
    extra: ClassVar[str | None] = None
    patterns: ClassVar[tuple[str, ...]] = tuple(
        f"*.{ending}" for ending in ("png", "jpg", "jpeg", "bmp", "tif", "tiff", "pgm")
    )
    source: ClassVar[SourceCard] = SourceCard(name="radar images")

    def __post_init__(self) -> None:
        if self.preset and (self.quantity, self.scale, self.offset) != ("", None, None):
            raise ValueError(
                f"preset {self.preset} sets quantity, scale and offset: give it or them, not both."
            )
        if self.quantity and self.quantity not in UNITS:
            raise ValueError(f"quantity must be one of {', '.join(UNITS)}, got {self.quantity!r}.")
        if (self.scale is None) != (not self.quantity) or (self.offset and self.scale is None):
            raise ValueError(
                "quantity and scale (and offset, unless it is 0) belong together: "
                f"got quantity={self.quantity!r}, scale={self.scale}, offset={self.offset}."
            )
        if self.scale is not None and not 0 < abs(self.scale) < math.inf:
            raise ValueError(f"scale must be finite and not 0, got {self.scale}.")
        if self.quantity == "accumulation" and self.accumulation_minutes is None:
            raise ValueError("An accumulation needs accumulation_minutes: over how long.")
        check_minutes(self.interval_minutes, self.accumulation_minutes)
        re.compile(self.time_pattern)

    def recognises(self, path: Path) -> bool:
        head = head_of(path, 4096)
        if head.startswith((b"II", b"MM")):
            tags = tiff_tags(path)
            return tags is not None and not tags & GEO_TAGS
        if head.startswith(b"P") and re.search(rb"^# *obstime\s", head, re.M):
            return False  # a composite of FMI, which has a reader of its own
        return head.startswith(_MAGIC) and _is_image(path)

    def scan(self, path: Path) -> RadarFile:
        with _opened(path) as image:
            width, height = image.size
            depth = image.mode
        mapping = self._mapping(path, depth)
        frame, notes = self._frame(path, self.interval_minutes or mapping.interval_minutes or 1.0)
        if not self.preset and not self.quantity:
            notes = (*notes, "No mapping was given: pixels are intensities from 0 to 1.")
        if path.suffix.lower() in (".jpg", ".jpeg"):
            notes = (*notes, "JPEG is lossy: values near edges are not what was measured.")
        lowest = f"Pixel 0 is {mapping.offset:g} {UNITS[mapping.quantity]}"
        missing = [str(pixel) for pixel in self.missing]
        missing += ["outside the mask"] if self.mask else []
        return RadarFile(
            quantity=mapping.quantity,
            interval_minutes=self.interval_minutes or mapping.interval_minutes,
            accumulation_minutes=(
                self.accumulation_minutes if mapping.quantity == "accumulation" else None
            ),
            grid=Grid(height=height, width=width),
            missing_rule=(
                f"{lowest}, no echo or no rain; missing: {', '.join(missing) or 'none'}, and "
                "transparent pixels."
            ),
            notes=(
                f"{UNITS[mapping.quantity]} = {mapping.scale:g} * pixel + {mapping.offset:g}"
                + (f" (preset {self.preset})." if self.preset else "."),
                *notes,
            ),
            frames=(frame,),
        )

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        for key in keys:
            if key:
                raise BadFileError(path, f"holds no field {key!r}")
            pixels_HW, transparent_HW, depth = _grey(path)
            mapping = self._mapping(path, depth)
            special = {float(pixel): math.nan for pixel in self.missing}
            values_HW = physical(pixels_HW, mapping.scale, mapping.offset, special)
            if transparent_HW is not None:
                values_HW[transparent_HW] = np.nan
            if self.mask:
                observed_HW = _mask(self.mask)
                if observed_HW.shape != values_HW.shape:
                    raise BadFileError(
                        path, f"has {values_HW.shape} pixels, the mask has {observed_HW.shape}"
                    )
                values_HW[~observed_HW] = np.nan
            if mapping.quantity != "reflectivity" and np.nanmin(values_HW, initial=0) < 0:
                raise BadFileError(
                    path,
                    f"holds {mapping.quantity} below 0 with scale {mapping.scale:g} and offset "
                    f"{mapping.offset:g}: check them, or give the option missing",
                )
            yield values_HW

    def _mapping(self, path: Path, depth: str) -> _Mapping:
        """Return how pixels of an image mode become values."""
        if self.preset:
            if depth.startswith(("I", "F")):
                raise BadFileError(
                    path, f"has more than 8 bits (mode {depth}), preset {self.preset} is for 8 bits"
                )
            return _PRESETS[self.preset]
        if self.quantity:
            quantity = cast(Quantity, self.quantity)
            return _Mapping(quantity, float(self.scale or 0), self.offset or 0.0)
        if depth == "F" or depth == "I":
            raise BadFileError(
                path, f"has pixels without a largest value (mode {depth}): give quantity and scale"
            )
        largest = 65_535 if depth.startswith("I;16") else 255
        return _Mapping("intensity", 1 / largest, 0.0)

    def _frame(self, path: Path, step: float) -> tuple[RadarFrame, tuple[str, ...]]:
        """Return when the image was taken, or where in its folder's sequence it stands.

        Args:
            path: of the image; only its name is looked at.
            step: minutes from one number to the next where there is no time.
        """
        pattern = self.time_pattern or (_PRESETS[self.preset].time_pattern if self.preset else "")
        if pattern:
            with reading(path):
                time = time_by(pattern, path.as_posix())
            if time is None:
                raise BadFileError(path, f"the time pattern {pattern!r} finds nothing in the path")
            return RadarFrame(time=time), ("The time in the name is taken as UTC.",)
        if (time := time_in(path.name)) is not None:
            return RadarFrame(time=time), ("The time in the name is taken as UTC.",)
        number = _LAST_NUMBER.search(path.stem)
        if number is None or int(number[1]) > _MAX_NUMBER:
            raise BadFileError(
                path,
                "has neither a time nor a frame number in its name: give a time_pattern, or number "
                "the images of a sequence",
            )
        start = datetime(1970, 1, 1, tzinfo=UTC)
        # A number before the frame's is a sequence's own, as in sample_12_03.png.
        before = path.stem[: number.start()].rstrip("-_. ")
        frame = RadarFrame(
            time=start + timedelta(minutes=int(number[1]) * step),
            series=f"{FOLDER}/{before}" if re.search(r"\d", before) else FOLDER,
        )
        return frame, (
            "No time in the names: images of one folder are a sequence in the order of their last "
            f"numbers, with invented times from 1970 in steps of {step:g} min. Give a time_pattern "
            "if the path tells the time.",
        )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image, which reads its header."""
    with reading(path), Image.open(path, formats=_FORMATS) as image:
        if (count := getattr(image, "n_frames", 1)) != 1:
            raise ValueError(f"holds {count} images; only one a file is read")
        yield image


def _is_image(path: Path) -> bool:
    try:
        with _opened(path):
            return True
    except BadFileError:
        return False


def _grey(path: Path) -> tuple[NDArray[Any], NDArray[np.bool_] | None, str]:
    """Return the pixels, which of them are transparent, and the image's mode.

    Raises:
        BadFileError: damaged, or coloured.
    """
    with _opened(path) as opened:
        image = opened
        image.load()
        if image.mode == "1":
            image = image.convert("L")
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")
        mode = image.mode
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        return pixels, None, mode
    if mode not in ("LA", "RGB", "RGBA"):
        raise BadFileError(path, f"is an image of mode {mode}; only grey ones have a value mapping")
    if mode != "LA":
        red, green, blue = (pixels[..., channel] for channel in range(3))
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            raise BadFileError(
                path,
                "is coloured: its colours are a palette, from which values cannot be told. Convert "
                "it to grey by the palette's legend first",
            )
    transparent_HW = pixels[..., -1] == 0 if mode.endswith("A") else None
    if transparent_HW is not None and not transparent_HW.any():
        transparent_HW = None
    return np.ascontiguousarray(pixels[..., 0]), transparent_HW, "L"


@lru_cache(maxsize=4)
def _mask(path: str) -> NDArray[np.bool_]:
    """Return where something is observed."""
    pixels_HW, _, _ = _grey(Path(path))
    return pixels_HW != 0
