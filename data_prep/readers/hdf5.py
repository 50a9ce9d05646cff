"""What the readers of HDF5 files share: opening a file, and its attributes as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.readers.radar import BadFileError, import_extra
from data_prep.readers.raw import reading

SIGNATURE = b"\x89HDF\r\n\x1a\n"


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open a file for reading; whatever goes wrong inside names it.

    Raises:
        BadFileError: no such file, no HDF5, truncated, damaged.
        MissingExtraError: h5py is not installed.
    """
    h5py = import_extra("h5py", "radar", "Reading HDF5 files")
    with reading(path):
        try:
            with h5py.File(path, "r") as file:
                yield file
        except (RuntimeError, TypeError) as error:  # h5py's words for damaged names and types
            raise BadFileError(path, f"cannot be read ({error})") from error


def hdf5_fits(path: Path, test: Callable[[Any], bool]) -> bool:
    """Say whether a path is an HDF5 file that can be opened and passes the test.

    False for a truncated file: its signature says HDF5, but nothing tells which kind.
    """
    if not has_signature(path, SIGNATURE):
        return False
    try:
        with open_hdf5(path) as file:
            return test(file)
    except BadFileError:
        return False


def has_signature(path: Path, *signatures: bytes) -> bool:
    """Say whether a file starts with one of these bytes; False for what cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(max(map(len, signatures))).startswith(signatures)
    except OSError:
        return False


def attributes(node: Any, *, lower: bool = True) -> dict[str, Any]:
    """Attributes of a group or data set as plain values, names in lower case."""
    return {name.lower() if lower else name: plain(value) for name, value in node.attrs.items()}


def attribute(node: Any, name: str) -> Any:
    """One attribute as `attributes` gives it; None where there is none. Each costs 20 us."""
    return plain(node.attrs[name]) if name in node.attrs else None


def plain(value: Any) -> Any:
    """Text, number, list of text, or array of numbers; an array of one element is that element."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "SO":
            texts = [plain(item) for item in value.ravel()]
            return texts[0] if len(texts) == 1 else texts
        return value.item() if value.size == 1 else value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.strip(" \0\n")
    return value.item() if isinstance(value, np.generic) else value


def number(value: Any) -> float | None:
    """A number that may be stored as text; None for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
