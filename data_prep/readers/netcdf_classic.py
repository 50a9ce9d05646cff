"""How long a classic NetCDF file must be: the C library reads zeros beyond a file's end.

The header says where each variable begins and how large it is (formats CDF-1, CDF-2 and CDF-5).
Files of NetCDF-4 are HDF5, which checks its own length.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

CLASSIC_SIGNATURES = (b"CDF\x01", b"CDF\x02", b"CDF\x05")

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}
_MOST_ITEMS = 2**24
"""More dimensions, attributes or variables than this are a damaged header."""


def expected_bytes(file: BinaryIO) -> int:
    """Return how many bytes the data that a header promises reach to; padding is not counted.

    Args:
        file: at the start of a classic NetCDF file.

    Raises:
        ValueError: the header is cut short or damaged.
    """
    return _Header(file).expected_bytes()


class _Header:
    """Reads the header from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        signature = file.read(4)
        if signature not in CLASSIC_SIGNATURES:
            raise ValueError(f"not a classic NetCDF file: it starts with {signature!r}")
        self.wide_counts = signature[3] == 5
        self.wide_offsets = signature[3] != 1

    def expected_bytes(self) -> int:
        num_records = self.count()
        if num_records == (2**64 - 1 if self.wide_counts else 2**32 - 1):
            num_records = 0  # still being written when it was copied: the length is not known
        lengths = []
        for _ in self.items():
            self.skip(self.count())
            lengths.append(self.count())
        self.skip_attributes()
        end = self.file.tell()
        records: list[tuple[int, int]] = []
        for _ in self.items():
            self.skip(self.count())
            dims = [self.count() for _ in range(self.limited())]
            self.skip_attributes()
            type_bytes = _TYPE_BYTES[self.number("I")]
            self.count()  # vsize: redundant, and wrong for large variables
            begin = self.number("Q" if self.wide_offsets else "I")
            is_record = bool(dims) and lengths[dims[0]] == 0
            size = type_bytes
            for dim in dims[1:] if is_record else dims:
                size *= lengths[dim]
            if is_record:
                records.append((begin, size))
            else:
                end = max(end, begin + size)
        # Records of one variable alone are not padded to 4 bytes.
        step = sum(size if len(records) == 1 else -(-size // 4) * 4 for _, size in records)
        for begin, size in records if num_records else ():
            end = max(end, begin + (num_records - 1) * step + size)
        return end

    def items(self) -> range:
        """A list's tag and length."""
        self.number("I")
        return range(self.limited())

    def limited(self) -> int:
        count = self.count()
        if count > _MOST_ITEMS:
            raise ValueError(f"damaged header: a list of {count} items")
        return count

    def skip_attributes(self) -> None:
        for _ in self.items():
            self.skip(self.count())
            type_bytes = _TYPE_BYTES[self.number("I")]
            self.skip(self.count() * type_bytes)

    def count(self) -> int:
        return self.number("Q" if self.wide_counts else "I")

    def number(self, kind: str) -> int:
        data = self.file.read(struct.calcsize(f">{kind}"))
        try:
            return struct.unpack(f">{kind}", data)[0]
        except struct.error as error:
            raise ValueError("the header is cut short") from error

    def skip(self, num_bytes: int) -> None:
        """Skip bytes that are padded to a multiple of 4."""
        self.file.seek(-(-num_bytes // 4) * 4, 1)
