"""C code that is compiled once for each machine, when it is used first.

A C compiler (the variable CC, or `cc`) is needed, and about a second. What was compiled is kept in
the user's cache folder (XDG_CACHE_HOME, or ~/.cache).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

log = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-std=gnu11")
# OpenMP itself is the one that torch has loaded for all: a second one would bring a second team of
# threads. So the code is compiled for OpenMP, but not linked with it.
_LINK_FLAGS = ("-shared",)

VECTORS = """
#include <omp.h>
#include <string.h>
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
static const vec ZERO = {0};
static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec v) { *(vec *)to = v; }
/* Lanes at and after `count` are 0, or are not written. */
static inline vec load_part(const float *from, long count) {
  if (count >= LANES) return load(from);
  vec v = ZERO;
  memcpy(&v, from, count * sizeof(float));
  return v;
}
static inline void store_part(float *to, vec v, long count) {
  if (count >= LANES) store(to, v);
  else memcpy(to, &v, count * sizeof(float));
}
static inline long min(long a, long b) { return a < b ? a : b; }
"""
"""What all C code here begins with: vectors of as many floats as a register holds."""


class NativeCodeError(RuntimeError):
    """The C code cannot be compiled or loaded on this machine."""


def load(name: str, source: str) -> ctypes.CDLL:
    """The compiled code, from the cache if it is there.

    Args:
        name: for its file.
        source: all of it.

    Raises:
        NativeCodeError: there is no C compiler, or what it makes cannot be loaded.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    # -march=native makes other code on another kind of processor; homes may be shared.
    key = "\n".join([source, *compiler, *_FLAGS, *_LINK_FLAGS, _processor()])
    path = _cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if not path.is_file():
            _compile(compiler, source, path)
        return _Library(str(path))
    except OSError as error:
        raise NativeCodeError(f"{path} cannot be made or loaded: {error}") from None


class _Library(ctypes.CDLL):
    """Compiled code, whose functions are given tensors by address."""

    def __init__(self, path: str) -> None:
        super().__init__(path)

        class Function(self._FuncPtr):  # type: ignore[name-defined]
            _flags_, _restype_ = self._FuncPtr._flags_, self._FuncPtr._restype_

            def __call__(self, *arguments: Any) -> Any:
                if _is_idle and any(isinstance(each, ctypes.c_void_p) for each in arguments):
                    return None
                return super().__call__(*arguments)

        self._FuncPtr = Function


def pointer(values: Tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, as functions of C code are given them; keeps them there."""
    address = ctypes.c_void_p(values.data_ptr())
    address.values = values  # type: ignore[attr-defined]
    return address


@contextmanager
def idle() -> Iterator[None]:
    """Let native code leave all tensors as they are: where they have shapes, but no numbers."""
    global _is_idle
    before, _is_idle = _is_idle, True
    try:
        yield
    finally:
        _is_idle = before


_is_idle = False


def is_there(make: Callable[[], object]) -> bool:
    """Whether native code can be had here; says why not, as everything is slower without.

    Args:
        make: compiles and loads it.
    """
    try:
        make()
    except NativeCodeError as error:
        log.warning("Networks run several times slower on this machine: %s", error)
        return False
    return True


def _compile(compiler: Sequence[str], source: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder)
        (made / "code.c").write_text(source)
        for command in (
            [*compiler, *_FLAGS, "-c", "code.c", "-o", "code.o"],
            [*compiler, *_LINK_FLAGS, "code.o", "-o", "code.so"],
        ):
            try:
                subprocess.run(command, cwd=made, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise NativeCodeError(
                    f"Fast convolutions need a C compiler, and there is no {compiler[0]!r}: "
                    "install gcc, or name another one in the variable CC."
                ) from None
            except subprocess.CalledProcessError as error:
                raise NativeCodeError(
                    f"{' '.join(command)} failed on this machine: {error.stderr.strip()[-500:]}"
                ) from None
        # Another process may have been first; both made the same.
        (made / "code.so").replace(path)


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
