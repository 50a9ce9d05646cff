"""Whether a video file is as long as it says: what a decoder does not always notice.

A container states its length in its first bytes (AVI, MP4 and MOV, Matroska and WebM) or ends with
a mark (GIF). A file that was cut short, by a broken copy for instance, decodes without any error up
to where it ends. Other containers state nothing that could be checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

_SLACK_BYTES = 16
"""Some programs count headers or padding that they did not write."""
_MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def missing_bytes(path: Path) -> int:
    """Return how many bytes are missing at the end of a file, at least; 0 if none, or unknown."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
        file.seek(0)
        if start[:4] == b"RIFF":
            end = _riff_end(file, size)
        elif start[4:8] in _MP4_FIRST_BOXES:
            end = _mp4_end(file, size)
        elif start[:4] == _EBML:
            end = _matroska_end(file)
        elif start[:4] == b"GIF8":
            return 0 if _ends_with(file, size, b";") else 1
        else:
            return 0
    return end - size if end > size + _SLACK_BYTES else 0


def _riff_end(file: BinaryIO, size: int) -> int:
    """Walk the RIFF chunks: one, or several in large files."""
    end = 0
    while end + 8 <= size:
        file.seek(end)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or not length:  # 0: never filled in, or something else follows
            break
        end += 8 + length + length % 2
    return end


def _mp4_end(file: BinaryIO, size: int) -> int:
    """Walk the outermost boxes."""
    end = 0
    while end + 8 <= size:
        file.seek(end)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:  # the length follows, in 64 bits
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: up to the end of the file
            return size
        end += length
    return end


def _matroska_end(file: BinaryIO) -> int:
    """Read the length of the segment that follows the header."""
    file.read(4)
    header_length = _ebml_number(file)
    if header_length is None:
        return 0
    file.seek(header_length, 1)
    if file.read(4) != _SEGMENT:
        return 0
    length = _ebml_number(file)
    return 0 if length is None else file.tell() + length


def _ebml_number(file: BinaryIO) -> int | None:
    """Read a number of variable length; None where it means "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    num_bytes = 9 - first[0].bit_length()
    data = bytes([first[0] & (0xFF >> num_bytes)]) + file.read(num_bytes - 1)
    number = int.from_bytes(data, "big")
    return None if number == (1 << 7 * num_bytes) - 1 else number


def _ends_with(file: BinaryIO, size: int, mark: bytes) -> bool:
    """Say whether the file ends with a mark, apart from zeros that fill it up."""
    file.seek(max(0, size - 4096))
    return file.read().rstrip(b"\0").endswith(mark)
