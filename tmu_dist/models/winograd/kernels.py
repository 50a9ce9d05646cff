"""Writes the C code of this package for a size of filters, and calls it on tensors."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tmu_dist.models.native import VECTORS, load, pointer
from tmu_dist.models.winograd.matrices import TILE, Matrix, transforms, transposed

_long = ctypes.c_long


class Kernels:
    """The functions of `winograd.c` for one size of filters, on tensors.

    Args:
        taps: of a filter along each axis (R).

    Raises:
        KernelError: there is no C compiler, or what it makes cannot be loaded.
    """

    def __init__(self, taps: int) -> None:
        self.num_points = transforms(taps).num_points ** 2
        self._library = load("winograd", _source(taps))
        self._library.scratch_size.restype = _long
        self.lanes = _long.in_dll(self._library, "lanes").value

    def padded(self, channels: int) -> int:
        """Channels of a row: a multiple of what a register holds."""
        return -(-channels // self.lanes) * self.lanes

    def transform_inputs(self, maps: Sequence[Tensor], rows_PRC: Tensor) -> None:
        """Transform one or two maps [B, C, H, W] as if they were one."""
        batch, _, height, width = maps[0].shape
        self._library.transform_inputs(
            *_one_or_two(maps),
            *_rows(rows_PRC),
            *map(_long, (batch, height, width)),
            torch.get_num_threads(),
        )

    def transform_gradient(self, map_BCHW: Tensor, rows_PRC: Tensor) -> None:
        """Transform the gradient of an output."""
        batch, channels, height, width = map_BCHW.shape
        self._library.transform_gradient(
            pointer(map_BCHW),
            *_rows(rows_PRC),
            *map(_long, (batch, height, width, channels)),
            torch.get_num_threads(),
        )

    def transform_filters(self, weight_KCIJ: Tensor, *, back: bool = False) -> Tensor:
        """Filters at all points, packed as `convolve` reads them; `back`: `convolve_back`."""
        out_channels, in_channels, taps, _ = weight_KCIJ.shape
        inputs = _long(in_channels), _long(taps**2)
        outputs = _long(out_channels), _long(in_channels * taps**2)
        packed = torch.empty(math.prod(self.shape_PCK(weight_KCIJ)))
        self._library.transform_filters(
            pointer(weight_KCIJ.contiguous()),
            *(outputs + inputs if back else inputs + outputs),
            pointer(packed),
            torch.get_num_threads(),
        )
        return packed

    def shape_PCK(self, weight_KCIJ: Tensor) -> tuple[int, int, int]:
        """Of transformed filters, with the channels that they are padded to."""
        out_channels, in_channels = weight_KCIJ.shape[:2]
        return self.num_points, self.padded(in_channels), self.padded(out_channels)

    def filters_gradient(self, sum_PCK: Tensor, weight_KCIJ: Tensor) -> Tensor:
        """The gradient of filters, from that of the transformed ones."""
        gradient_KCIJ = torch.empty(weight_KCIJ.shape)
        out_channels, in_channels = weight_KCIJ.shape[:2]
        self._library.transform_filters_back(
            pointer(sum_PCK),
            pointer(gradient_KCIJ),
            _long(in_channels),
            _long(out_channels),
            torch.get_num_threads(),
        )
        return gradient_KCIJ

    def convolve(
        self, rows_PRC: Tensor, packed: Tensor, bias_K: Tensor | None, map_BKHW: Tensor
    ) -> None:
        """Multiply transformed maps by packed filters, transform back, and add the bias."""
        self._convolve(rows_PRC, packed, bias_K, [map_BKHW], back=False)

    def convolve_back(self, rows_PRK: Tensor, packed: Tensor, maps: Sequence[Tensor]) -> None:
        """Add the gradient of one or two inputs to zeros, from the outputs' transformed one."""
        self._convolve(rows_PRK, packed, None, maps, back=True)

    def correlate(
        self, inputs_PRC: Tensor, gradients_PRK: Tensor, sum_PCK: Tensor, *, add: bool
    ) -> None:
        """The gradient of transformed filters; `add`: to what is in the sum."""
        self._library.correlate(
            *_rows(inputs_PRC),
            *_rows(gradients_PRK),
            pointer(sum_PCK),
            _long(inputs_PRC.shape[1]),
            int(add),
            torch.get_num_threads(),
        )

    def _convolve(
        self,
        rows: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        maps: Sequence[Tensor],
        *,
        back: bool,
    ) -> None:
        batch, _, height, width = maps[0].shape
        sizes = [_long(size) for size in (batch, height, width)]
        channels = _long(sum(each.shape[1] for each in maps))
        threads = torch.get_num_threads()
        scratch = torch.empty(self._library.scratch_size(*sizes, channels, threads))
        self._library.convolve(
            *_rows(rows),
            pointer(packed),
            None if bias is None else pointer(bias),
            pointer(scratch),
            *_one_or_two(maps),
            *sizes,
            int(back),
            threads,
        )


@cache
def kernels(taps: int) -> Kernels:
    """Those for a size of filters, compiled and loaded once."""
    return Kernels(taps)


def _rows(rows_PRC: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_long, ctypes.c_long]:
    return pointer(rows_PRC), _long(rows_PRC.stride(0)), _long(rows_PRC.stride(1))


def _one_or_two(maps: Sequence[Tensor]) -> list[ctypes.c_void_p | ctypes.c_long | None]:
    arguments: list[ctypes.c_void_p | ctypes.c_long | None] = []
    for each in maps:
        arguments += [pointer(each), _long(each.shape[1])]
    return arguments if len(maps) == 2 else [*arguments, None, _long(0)]


def _source(taps: int) -> str:
    """The whole C code: sizes and transforms of one axis, then `winograd.c`."""
    each = transforms(taps)
    axes = {
        "input_axis": each.inputs,
        "input_axis_back": transposed(each.inputs),
        "output_axis": each.output,
        "output_axis_back": transposed(each.output),
    }
    return "\n".join(
        [
            f"enum {{ TILE = {TILE}, POINTS = {each.num_points}, PAD = {taps // 2} }};",
            VECTORS,
            _BLOCKS,
            *(_axis(name, matrix) for name, matrix in axes.items()),
            _table("FILTER_AXIS", each.filters),
            Path(__file__).with_name("winograd.c").read_text(),
        ]
    )


# A block of ROWS x COLUMNS vectors leaves a few of the 32 or 16 registers for its operands.
_BLOCKS = """
enum { COLUMNS = LANES == 16 ? 4 : 2, ROWS = 6 };
const long lanes = LANES;
"""


def _axis(name: str, matrix: Matrix) -> str:
    """A C function y = matrix x of vectors; rows of opposite points share their sums."""
    lines = [f"static inline void {name}(const vec *x, long sx, vec *y, long sy) {{"]
    done: set[int] = set()
    for i, row in enumerate(matrix):
        if i in done:
            continue
        mate = next((k for k in range(i + 1, len(matrix)) if _opposite(row, matrix[k])), None)
        if mate is None:
            lines.append(f"  y[{i} * sy] = {_sum(row)};")
            continue
        done.add(mate)
        pairs = list(zip(row, matrix[mate], strict=True))
        even = _sum([a if a == b else Fraction(0) for a, b in pairs])
        odd = _sum([a if a != b else Fraction(0) for a, b in pairs])
        lines.append(f"  {{ vec even = {even}, odd = {odd};")
        lines.append(f"    y[{i} * sy] = even + odd; y[{mate} * sy] = even - odd; }}")
    return "\n".join([*lines, "}"])


def _table(name: str, matrix: Matrix) -> str:
    rows = ", ".join(f"{{{', '.join(repr(float(value)) for value in row)}}}" for row in matrix)
    return f"static const double {name}[{len(matrix)}][{len(matrix[0])}] = {{{rows}}};"


def _opposite(row: Sequence[Fraction], other: Sequence[Fraction]) -> bool:
    """Whether two rows are equal but for the sign of some, not all, of their numbers."""
    return (
        all(abs(a) == abs(b) for a, b in zip(row, other, strict=True))
        and any(a == b != 0 for a, b in zip(row, other, strict=True))
        and any(a == -b != 0 for a, b in zip(row, other, strict=True))
    )


def _sum(row: Sequence[Fraction]) -> str:
    text = ""
    for j, factor in enumerate(row):
        if factor:
            size = "" if abs(factor) == 1 else f"{float(abs(factor))!r}f * "
            sign = "-" if factor < 0 else "+" if text else ""
            text += f" {sign} {size}x[{j} * sx]"
    return text.strip()
