"""Compiles the C code of this package once for each machine, and calls it.

A C compiler (the variable CC, or `cc`) is needed when it is used first; that takes about a second. What
was compiled is kept in the user's cache folder (XDG_CACHE_HOME, or ~/.cache).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tmu_dist.models.winograd.matrices import TILE, Matrix, transforms, transposed

_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-std=gnu11")
# OpenMP itself is the one that torch has loaded for all: a second one would bring a second team of
# threads. So it is compiled for OpenMP, but not linked with it.
_LINK_FLAGS = ("-shared",)

_long = ctypes.c_long


class KernelError(RuntimeError):
    """The C code cannot be compiled or loaded on this machine."""


class Kernels:
    """The functions of `winograd.c` for one size of filters, on tensors.

    Args:
        taps: of a filter along each axis (R).

    Raises:
        KernelError: there is no C compiler, or what it makes cannot be loaded.
    """

    def __init__(self, taps: int) -> None:
        self.num_points = transforms(taps).num_points ** 2
        self._library = _load(_source(taps))
        self._library.scratch_size.restype = _long
        self.lanes = _long.in_dll(self._library, "lanes").value
        self._panel = _long.in_dll(self._library, "panel").value

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
            _pointer(map_BCHW),
            *_rows(rows_PRC),
            *map(_long, (batch, height, width, channels)),
            torch.get_num_threads(),
        )

    def pack(self, filters_PCK: Tensor) -> Tensor:
        """Filters at all points, as `convolve` reads them; in and out are multiples of `lanes`."""
        panels = filters_PCK.split(self._panel, dim=2)
        return torch.cat([panel.reshape(-1) for panel in panels])

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
            _pointer(sum_PCK),
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
            _pointer(packed),
            None if bias is None else _pointer(bias),
            _pointer(scratch),
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
    return _pointer(rows_PRC), _long(rows_PRC.stride(0)), _long(rows_PRC.stride(1))


def _one_or_two(maps: Sequence[Tensor]) -> list[ctypes.c_void_p | ctypes.c_long | None]:
    arguments: list[ctypes.c_void_p | ctypes.c_long | None] = []
    for each in maps:
        arguments += [_pointer(each), _long(each.shape[1])]
    return arguments if len(maps) == 2 else [*arguments, None, _long(0)]


def _pointer(values: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.data_ptr())


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
            _VECTORS,
            *(_axis(name, matrix) for name, matrix in axes.items()),
            Path(__file__).with_name("winograd.c").read_text(),
        ]
    )


# A block of ROWS x COLUMNS vectors leaves a few of the 32 or 16 registers for its operands.
_VECTORS = """
#ifdef __AVX512F__
#define LANES 16
#define COLUMNS 4
#else
#define LANES 8
#define COLUMNS 2
#endif
#define ROWS 6
const long lanes = LANES, panel = COLUMNS * LANES;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
static const vec ZERO = {0};
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


def _load(source: str) -> ctypes.CDLL:
    """The compiled code, from the cache if it is there."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    # -march=native makes other code on another kind of processor; homes may be shared.
    key = "\n".join([source, *compiler, *_FLAGS, *_LINK_FLAGS, _processor()])
    path = _cache_folder() / f"winograd-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if not path.is_file():
            _compile(compiler, source, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"Winograd's kernels cannot be made or loaded ({path}): {error}") from None


def _compile(compiler: Sequence[str], source: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder)
        (made / "winograd.c").write_text(source)
        for command in (
            [*compiler, *_FLAGS, "-c", "winograd.c", "-o", "winograd.o"],
            [*compiler, *_LINK_FLAGS, "winograd.o", "-o", "winograd.so"],
        ):
            try:
                subprocess.run(command, cwd=made, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise KernelError(
                    f"Winograd's kernels need a C compiler, and there is no {compiler[0]!r}: install "
                    "gcc, or name another one in the variable CC."
                ) from None
            except subprocess.CalledProcessError as error:
                raise KernelError(
                    f"{' '.join(command)} failed on this machine: {error.stderr.strip()[-500:]}"
                ) from None
        # Another process may have been first; both made the same.
        os.replace(made / "winograd.so", path)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tmu_dist"


def _processor() -> str:
    """What the compiler may make use of on this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
