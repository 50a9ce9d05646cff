"""How speed is measured: in rounds side by side, beside what the machine can do at best.

Whatever is compared stands in one process and is timed in turn, A B C A B C, so that a neighbour's
work or a clock that changes meets all of it. Ratios are those within a round. The floors (matrix
products and copies) are measured in every round, too; the best of them is what the machine can do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import say

Run = Callable[[], object]

WARM_UP = {"cpu": 2, "cuda": 6}
"""Calls before anything is measured; a CUDA graph is recorded in the fourth."""

_FLOOR_SECONDS = 0.2
"""Of one kind of floor in a round, at least."""


def alternate(
    runs: Mapping[str, Run], device: str, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every run, by round.

    Who trains calls the same thing over and over. So a turn begins with a call that does not count:
    it finds caches and memory as another run has left them.

    Args:
        runs: by name; each is called a few times before, to warm up.
        device: "cpu" or "cuda".
        rounds: how often each has its turn.
        seconds: of a turn, at least; a turn is as many calls as that takes.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        say(f"{name}: warming up")
        for _ in range(WARM_UP[device]):
            timed(run, device, 0.0)
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}")
        for name, run in runs.items():
            if seconds:
                timed(run, device, 0.0)
            found[name].append(timed(run, device, seconds))
    return found


def timed(run: Run, device: str, seconds: float) -> float:
    """Seconds of a call, over as many calls as take so long; at least one.

    Of one thread on a CPU these are the processor's, which other work disturbs little.
    """
    wait: Run = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter
    if device == "cpu" and torch.get_num_threads() == 1:
        clock = time.process_time
    wait()
    count, started = 0, clock()
    while count == 0 or clock() - started < seconds:
        run()
        wait()
        count += 1
    return (clock() - started) / count


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times faster the other is, by round."""
    return [mine / its for mine, its in zip(base, other, strict=True)]


def spread(values: Sequence[float], decimals: int) -> str:
    """Minimum and, in brackets, median and maximum: 2.01 (2.10, 2.40)."""
    shown = (min(values), statistics.median(values), max(values))
    least, middle, most = (f"{value:,.{decimals}f}" for value in shown)
    return f"{least} ({middle}, {most})"


class Floors:
    """What the machine can do at best: products of matrices a second, and bytes copied a second.

    Args:
        device: "cpu" or "cuda".
        quick: small matrices only.
    """

    def __init__(self, device: str, *, quick: bool = False) -> None:
        self.device = device
        edges: Sequence[int] = (2048, 4096, 8192) if device == "cuda" else (512, 1024, 2048)
        self._edges = edges[:1] if quick else edges
        self._copied = torch.empty((1 if quick else 32) * 2**20, device=device)
        self.best: dict[str, float] = {}
        """Operations a second by precision; of "copy", bytes read and written a second."""
        self.sizes: dict[str, int] = {}
        """Edge of the square matrices at which that was."""
        self._runs = self._all_runs()

    def measure(self) -> float:
        """Measure each once more, and keep the best; a run of `alternate`."""
        for name, edge, amount, run in self._runs:
            with matrix_precision("tf32" if name == "tf32" else "ieee"):
                rate = amount / timed(run, self.device, _FLOOR_SECONDS)
            if rate > self.best.get(name, 0.0):
                self.best[name], self.sizes[name] = rate, edge
        return self.best["fp32"]

    def record(self) -> dict[str, Any]:
        """For results.json."""
        return {"per_second": self.best, "edges": self.sizes}

    def _all_runs(self) -> list[tuple[str, int, float, Run]]:
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if self.device == "cuda":
            kinds["tf32"] = torch.float32
        found: list[tuple[str, int, float, Run]] = []
        for name, dtype in kinds.items():
            for edge in self._edges:
                pair = torch.randn(2, edge, edge, device=self.device).to(dtype)
                out = torch.empty_like(pair[0])
                product = partial(torch.mm, pair[0], pair[1], out=out)
                found.append((name, edge, 2.0 * edge**3, product))
        target = torch.empty_like(self._copied)
        moved = 2.0 * self._copied.nbytes
        found.append(("copy", self._copied.numel(), moved, partial(target.copy_, self._copied)))
        return found


@contextmanager
def matrix_precision(kind: str) -> Iterator[None]:
    """Run float32 products and convolutions of a GPU as "ieee" float32 or in "tf32"."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = kind
        yield
    finally:
        for backend, own in zip(backends, before, strict=True):
            backend.fp32_precision = own


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference by the norm of what is expected, over all tensors together."""
    pairs = list(zip(found, expected, strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


def peak_bytes(prepare: Callable[..., Run], *arguments: Any, device: str) -> int:
    """Most memory that building a run and calling it takes beyond what the libraries do.

    Of a CPU in a process of its own, in which compiling is over before the peak is looked for.

    Args:
        prepare: a function of a module, which builds the run.
        arguments: of it; all must be picklable.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        run = prepare(*arguments)
        run()  # compiles
        torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP[device]):  # a graph takes its memory when it is recorded
            run()
        return torch.cuda.max_memory_allocated() - before
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_tell_peak, args=(theirs, prepare, arguments, torch.get_num_threads()), daemon=True
    )
    process.start()
    theirs.close()
    try:
        found: int = ours.recv()
    except EOFError:
        raise RuntimeError(
            f"A process that measures memory ended early: {prepare.__name__}{arguments}. Its own "
            "error is above; without one, the machine's memory may have been too small."
        ) from None
    process.join()
    return found


def _tell_peak(
    connection: Connection, prepare: Callable[..., Run], arguments: Any, threads: int
) -> None:
    torch.set_num_threads(threads)
    _load_libraries()
    before = _status_bytes("VmRSS")
    run = prepare(*arguments)
    run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held now
    run()
    connection.send(_status_bytes("VmHWM") - before)


def _load_libraries() -> None:
    """Have torch take what it needs for any training step."""
    convolution = torch.nn.Conv2d(4, 4, 3)
    optimizer = torch.optim.Adam(convolution.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            convolution(torch.ones(1, 4, 8, 8)).float().sum().backward()
        optimizer.step()


def _status_bytes(name: str) -> int:
    """Of this process, as Linux tells it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}: memory is measured on Linux only.")
