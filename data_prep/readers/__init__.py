"""One file per source of raw data, and the register of radar readers.

Importing this package imports none of the readers, and a reader's module none of the libraries of
its format.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.readers.radar import RadarReader

RADAR_READERS: dict[str, str] = {
    "fmi": "data_prep.readers.fmi:FMIReader",
    "geotiff": "data_prep.readers.geotiff:GeoTIFFReader",
    "grib2": "data_prep.readers.grib2:GRIB2Reader",
    "images": "data_prep.readers.images:ImageReader",
    "knmi": "data_prep.readers.knmi:KNMIReader",
    "mch": "data_prep.readers.mch:MCHReader",
    "meteonet": "data_prep.readers.meteonet:MeteoNetReader",
    "mlcast": "data_prep.readers.mlcast:MLCastReader",
    "netcdf": "data_prep.readers.netcdf:NetCDFReader",
    "odim": "data_prep.readers.odim:ODIMReader",
    "radolan": "data_prep.readers.radolan:RADOLANReader",
    "sevir": "data_prep.readers.sevir:SEVIRReader",
}
"""Class of every radar reader by its name, "module:Class"."""

_LAST_RESORT = "images"
"""Asked only about files that nobody else knows: a picture can be anything."""
_SAMPLES = 5
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def radar_reader(name: str, options: Mapping[str, str]) -> RadarReader:
    """Return a reader with its options set.

    Args:
        name: one of RADAR_READERS.
        options: values as text by name of the reader's field; "none" for no value where that is
            allowed.

    Raises:
        ValueError: no such reader or option (says which there are), or a value that does not fit.
    """
    if name not in RADAR_READERS:
        raise ValueError(f"There is no reader {name!r}{_nearest(name, RADAR_READERS)}")
    module, _, class_name = RADAR_READERS[name].partition(":")
    reader_class = getattr(importlib.import_module(module), class_name)
    known = [field.name for field in dataclasses.fields(reader_class) if field.init]
    hints = typing.get_type_hints(reader_class)
    values: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known:
            raise ValueError(f"Reader {name} has no option {option!r}{_nearest(option, known)}")
        try:
            values[option] = _parsed(text, hints[option])
        except ValueError as error:
            raise ValueError(f"Option {option} of reader {name}: {error}") from error
    reader: RadarReader = reader_class(**values)
    return reader


def detect_reader(paths: Sequence[Path]) -> RadarReader:
    """Return the one reader, without options, that recognises some of the files.

    Args:
        paths: files of one source; a few of them, spread over the list, are looked at.

    Raises:
        ValueError: no reader knows any of them, or several readers do; says what was seen.
        MissingExtraError: nobody knows them, but a library is missing that might.
    """
    from data_prep.readers.radar import MissingExtraError

    if not paths:
        raise ValueError("There is no file from which a radar reader could be chosen.")
    last = len(paths) - 1
    samples = [paths[i] for i in sorted({last * n // (_SAMPLES - 1) for n in range(_SAMPLES)})]
    claims: dict[str, Path] = {}
    missing: MissingExtraError | None = None
    readers = {name: radar_reader(name, {}) for name in RADAR_READERS}
    for name, reader in readers.items():
        for path in samples if name != _LAST_RESORT else ():
            try:
                if reader.recognises(path):
                    claims.setdefault(name, path)
            except MissingExtraError as error:
                missing = error
    if not claims and missing is not None:
        raise missing
    if not claims and any(map(readers[_LAST_RESORT].recognises, samples)):
        return readers[_LAST_RESORT]
    if not claims:
        seen = "; ".join(map(_sight, samples[:3]))
        raise ValueError(
            f"No radar reader knows these files: {seen}. Choose one of {', '.join(RADAR_READERS)} "
            "with --reader, and see its options."
        )
    if len(claims) > 1:
        who = "; ".join(f"{name} claims {path}" for name, path in claims.items())
        raise ValueError(
            f"Several radar readers claim these files: {who}. Choose one with --reader, or "
            "convert the kinds of files one after another."
        )
    return readers[next(iter(claims))]


def _parsed(text: str, wanted: Any) -> Any:
    """Convert an option's text to the type of its field."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if type(None) in inner and text.lower() == "none":
            return None
        return _parsed(text, next(each for each in inner if each is not type(None)))
    if origin is typing.Literal:
        if text not in inner:
            raise ValueError(f"must be one of {', '.join(map(str, inner))}, got {text!r}.")
        return text
    if origin is tuple:
        words = [word.strip() for word in text.split(",")]
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_parsed(word, inner[0]) for word in words)
        if len(words) != len(inner):
            raise ValueError(f"needs {len(inner)} values with commas between, got {text!r}.")
        return tuple(map(_parsed, words, inner))
    if wanted is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(f"must be true or false, got {text!r}.")
        return _BOOLEANS[text.lower()]
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            kind = "a whole number" if wanted is int else "a number"
            raise ValueError(f"must be {kind}, got {text!r}.") from None
    if wanted is Path:
        return Path(text)
    return text


def _nearest(word: str, known: Sequence[str] | Mapping[str, str]) -> str:
    """The end of a message about an unknown word."""
    if not known:
        return "; it has no options."
    near = difflib.get_close_matches(word, list(known), n=1)
    guess = f". Did you mean {near[0]!r}? " if near else ". "
    return f"{guess}There are: {', '.join(sorted(known))}."


def _sight(path: Path) -> str:
    """Name, size and first bytes of a file."""
    try:
        with path.open("rb") as file:
            return f"{path} (starts with {file.read(8)!r}, {path.stat().st_size} bytes)"
    except OSError as error:
        return f"{path} ({error.strerror or error})"
