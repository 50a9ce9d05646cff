"""What readers share: plain and compressed files, tables from stored numbers to values, times.

Nothing here knows a format. Names of one wrapper (.gz, .bz2) are not trusted; the first bytes say
what a file is.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.readers.radar import BadFileError, Coded, MissingExtraError

_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,  # Pillow's and numpy's word for some damaged headers
    SyntaxError,  # Pillow's word for a broken PNG
    Image.DecompressionBombError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    RuntimeError,  # zipfile's word for an encrypted member or an unknown compression
)
_BLOCK_VALUES = 2**20
_READ_BYTES = 2**24
_TAR_MAGIC = slice(257, 262)
_TIME = re.compile(
    r"(?<!\d)(?P<date>(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01]))"
    r"[-_.T ]?(?P<time>(?:[01]\d|2[0-3])[-_.:]?[0-5]\d(?:[-_.:]?[0-5]\d)?)(?!\d)"
)

T = TypeVar("T")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a BadFileError that names it."""
    try:
        yield
    except (BadFileError, MissingExtraError):
        raise
    except FileNotFoundError as error:
        raise BadFileError(path, "there is no such file") from error
    except EOFError as error:
        raise BadFileError(path, f"is truncated ({error})") from error
    except _READ_ERRORS as error:
        # A plain ValueError is a reader's own sentence; the others need a word of what they are.
        reason = f"cannot be read ({type(error).__name__}: {error})"
        raise BadFileError(path, str(error) if type(error) is ValueError else reason) from error


def unwrapped(stream: IO[bytes]) -> io.BufferedReader:
    """Return the stream without its gzip or bzip2 wrapper, if it has one."""
    buffered = io.BufferedReader(cast(Any, stream), 2**16)
    start = buffered.peek(4)
    if start.startswith(b"\x1f\x8b"):
        return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=buffered)), 2**16)
    if start.startswith(b"BZh"):
        return io.BufferedReader(cast(Any, bz2.BZ2File(buffered)), 2**16)
    return buffered


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file, decompressed where it is compressed; errors become BadFileErrors."""
    with reading(path), path.open("rb") as file:
        yield unwrapped(file)


def head_of(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a file, decompressed; what can be read of them, never an error."""
    head = b""
    with suppress(BadFileError), opened(path) as stream:
        while len(head) < num_bytes and (more := stream.read1(num_bytes - len(head))):
            head += more
    return head


def bytes_of(path: Path) -> bytes:
    """Return the whole content of a file, decompressed.

    Raises:
        BadFileError: no such file, truncated, damaged.
    """
    with opened(path) as stream:
        return stream.read()


def read_up_to(stream: IO[bytes], num_bytes: int) -> bytes:
    """Return the next bytes, fewer at the end; a damaged length takes no memory for nothing."""
    parts: list[bytes] = []
    while num_bytes > 0 and (part := stream.read(min(num_bytes, _READ_BYTES))):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def members(path: Path) -> Iterator[tuple[str, str, io.BufferedReader]]:
    """Yield key, file name and content of every file within, front to back.

    The key is the path within tars; "" of a file that is no tar.
    """
    with opened(path) as stream:
        if stream.peek(512)[_TAR_MAGIC] == b"ustar":
            _check_tar_end(path)
        yield from _walk("", path.name, stream)


def _walk(
    key: str, name: str, stream: io.BufferedReader
) -> Iterator[tuple[str, str, io.BufferedReader]]:
    if stream.peek(512)[_TAR_MAGIC] != b"ustar":
        yield key, name, stream
        return
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if (content := archive.extractfile(member)) is not None:
                inner = PurePosixPath(key, member.name)
                yield from _walk(str(inner), inner.name, unwrapped(content))


def _check_tar_end(path: Path) -> None:
    """Refuse a tar without its closing zeros: tarfile takes one cut between members for whole.

    A compressed one needs no such check, its decompressor notices.
    """
    with path.open("rb") as file:
        if file.read(512)[_TAR_MAGIC] == b"ustar":
            file.seek(-1024, io.SEEK_END)
            if any(file.read()):
                raise BadFileError(path, "is truncated: the tar has no end mark")


class StoredFields(ABC):
    """`fields` of a reader that has `stored_fields`."""

    @abstractmethod
    def stored_fields(
        self, path: Path, keys: Sequence[str]
    ) -> Iterator[NDArray[np.float32] | Coded]:
        """Yield the fields of the given keys, looked up or ready to be."""

    def fields(self, path: Path, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Yield the fields of the given keys as values."""
        return map(values_of, self.stored_fields(path, keys))


def values_of(field: NDArray[np.float32] | Coded) -> NDArray[np.float32]:
    """Return a field's values, looked up where that is still to be done."""
    return look_up(*field) if isinstance(field, Coded) else field


def look_up(table: NDArray[Any], codes_HW: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Return table[codes_HW] for codes of 8 or 16 bits; a negative one counts from the end.

    Rows are taken in blocks: `take` first makes 8-byte indices of the codes, which for a large
    mosaic would be twice the size of the result. Bytes for bytes need no indices at all.
    """
    native = codes_HW.dtype.newbyteorder("=")
    codes_HW = codes_HW.astype(native, copy=False).view(f"u{native.itemsize}")
    if codes_HW.itemsize == table.itemsize == 1:
        looked_up = codes_HW.tobytes().translate(table.tobytes())
        return np.frombuffer(looked_up, table.dtype).reshape(codes_HW.shape)
    values_HW = np.empty(codes_HW.shape, table.dtype)
    rows = max(1, _BLOCK_VALUES // codes_HW.shape[1])
    for top in range(0, len(codes_HW), rows):
        part = slice(top, top + rows)
        np.take(table, codes_HW[part], out=values_HW[part], mode="clip")
    return values_HW


def physical(
    stored_HW: NDArray[Any], scale: float, offset: float, special: Mapping[float, float]
) -> NDArray[np.float32]:
    """Return scale * stored + offset; stored numbers in `special` become what it says instead."""
    if stored_HW.dtype.kind in "iu" and stored_HW.dtype.itemsize <= 2:
        kind = stored_HW.dtype.newbyteorder("=")
        codes = np.arange(256**kind.itemsize).astype(f"u{kind.itemsize}").view(kind)
        table = (codes * np.float64(scale) + offset).astype(np.float32)
        for code, value in special.items():
            table[codes == code] = value
        return look_up(table, stored_HW)
    values_HW = stored_HW.astype(np.float32)
    values_HW *= np.float32(scale)
    values_HW += np.float32(offset)
    for code, value in special.items():
        # A float32 file stores a number such as -9999.9 or 1e20 as the nearest it has.
        values_HW[stored_HW == np.asarray(code).astype(stored_HW.dtype)] = value
    values_HW[~np.isfinite(values_HW)] = np.nan
    return values_HW


def pick(
    path: Path, keys: Sequence[str], items: Callable[[], Iterator[tuple[str, T]]]
) -> Iterator[T]:
    """Yield the items of the given keys from a file that can only be read from front to back.

    Keys in the file's own order take one pass. An item must be used before the next is asked for.

    Raises:
        BadFileError: no such key.
    """
    remaining = iter(())  # type: Iterator[tuple[str, T]]
    for key in keys:
        for source in (remaining, None):
            remaining = items() if source is None else source
            found = next(((item,) for name, item in remaining if name == key), None)
            if found is not None:
                yield found[0]
                break
        else:
            raise BadFileError(path, f"holds no field {key!r}")


def time_in(name: str) -> datetime | None:
    """Return the UTC time that a name tells, such as 201607112045 or 2016-07-11_20:45:30.

    The last one counts where there are several; None where there is none.
    """
    found = None
    for match in _TIME.finditer(name):
        digits = re.sub(r"\D", "", match["date"] + match["time"])
        try:
            found = datetime.strptime(digits.ljust(14, "0"), "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        except ValueError:  # 31 February
            continue
    return found


def time_by(pattern: str, name: str) -> datetime | None:
    """Return the UTC time that a regular expression finds in a name; None where it finds nothing.

    Args:
        pattern: with named groups: `time` (YYYYMMDDhhmm[ss], other characters in it do not count),
            or year, month, day, hour, minute and perhaps second. A year of two digits is in 20xx.

    Raises:
        ValueError: the groups are others, or what they hold is no time.
    """
    match = re.search(pattern, name)
    if match is None:
        return None
    parts = match.groupdict()
    try:
        if parts.get("time"):
            digits = re.sub(r"\D", "", parts["time"]).ljust(14, "0")
            return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        year = int(parts["year"])
        month, day, hour, minute = (int(parts[p]) for p in ("month", "day", "hour", "minute"))
        second = int(parts.get("second") or 0)
        century = 2000 if year < 100 else 0
        return datetime(century + year, month, day, hour, minute, second, tzinfo=UTC)
    except KeyError as error:
        raise ValueError(
            f"The pattern {pattern!r} has the groups {sorted(parts)}: it needs one named time, or "
            "year, month, day, hour and minute, written (?P<year>...)."
        ) from error
    except ValueError as error:
        raise ValueError(f"{match[0]!r} in {name} is no time: {error}.") from error
