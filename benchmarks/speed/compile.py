"""How long does it take until a step runs at its speed, and what does compiling gain?

    python -m benchmarks.speed.compile [--sizes small paper] [--settings "fp32, winograd" ...]
                                       [--device cpu|cuda] [--whole]

Each setting is started in fresh processes: first with empty cache folders, so that whatever is
compiled (torch.compile, C code) is compiled there and then; and once more with what that one has
left. Told are the first training step, which waits for compilers, and those after it. Imports are
not in it.

--whole adds what this project does not do: the reference with its whole loop over time compiled.

--quick measures a tiny network, for tests. Prints the table and writes results.json and table.md to
docs/results/speed-compile, of a GPU to speed-compile-cuda. Runs without Ray, WebDataset and Zarr.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.provenance import provenance, say
from benchmarks.speed.measure import timed
from benchmarks.speed.options import options, use_threads, works, write
from benchmarks.speed.report import about, describe, markdown
from benchmarks.speed.work import REFERENCE, Reference, Work, contender

WHOLE = "reference, whole loop compiled"
DEFAULTS = {
    "cpu": (
        *("fp32", "fp32, compiled", "fp32, winograd, fused"),
        *("bf16", "bf16, compiled", "bf16, fused"),
    ),
    "cuda": ("tf32", "tf32, compiled", "bf16", "bf16, compiled", "bf16, compiled, graph"),
}
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
LATER_STEPS = 5


def measure(name: str, work: Work, device: str) -> dict[str, Any]:
    """Seconds of the steps of a start without, and one with what was compiled before."""
    with tempfile.TemporaryDirectory(prefix="speed-compile-") as folder:
        before = {variable: os.environ.get(variable) for variable in CACHES}
        os.environ.update({variable: f"{folder}/{variable}" for variable in CACHES})
        try:
            return {kind: _start(name, work, device) for kind in ("cold", "kept")}
        finally:
            for variable, value in before.items():
                if value is None:
                    del os.environ[variable]
                else:
                    os.environ[variable] = value


def _start(name: str, work: Work, device: str) -> dict[str, Any]:
    """In a process of its own."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs, name, work, device, torch.get_num_threads())
    )
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        raise RuntimeError(f"{name} ended before it had done its steps; see above.") from None
    process.join()
    return found


def _serve(connection: Connection, name: str, work: Work, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    started = time.perf_counter()
    own = contender(REFERENCE if name == WHOLE else name, work, device)
    if name == WHOLE:
        assert isinstance(own, Reference)
        own.student.forward = torch.compile(own.student.forward)  # type: ignore[method-assign]
        for teacher in own.teachers:
            teacher.forward = torch.compile(teacher.forward)  # type: ignore[method-assign]
    built = time.perf_counter() - started
    steps = [timed(own.train, device, 0.0) for _ in range(1 + LATER_STEPS)]
    connection.send({"build": built, "first": steps[0], "later": steps[1:]})


def table(record: Mapping[str, Any]) -> str:
    """Markdown: first and later steps."""
    lines = [about(record)]
    heads = (
        *("setting", "first step [s]", "with kept caches [s]", "later step, least [s]"),
        "the first waits for compilers [s]",
    )
    for case in record["cases"]:
        lines += ["", f"{describe(case['work'])}.", ""]
        rows = []
        for name, found in case["found"].items():
            cold, kept = found["cold"], found["kept"]
            later = min([*cold["later"], *kept["later"]])
            rows.append(
                [
                    name,
                    f"{cold['build'] + cold['first']:.2f}",
                    f"{kept['build'] + kept['first']:.2f}",
                    f"{later:.4f}",
                    f"{cold['first'] - later:.2f}",
                ]
            )
        lines += markdown(heads, rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__, rounds=None)
    parser.add_argument("--whole", action="store_true", help="also the whole loop: minutes")
    chosen = parser.parse_args()
    use_threads(chosen)
    names = [*(chosen.settings or DEFAULTS[chosen.device]), *([WHOLE] if chosen.whole else [])]
    found = []
    for work in works(chosen):
        case: dict[str, Any] = {}
        for name in names:
            say(f"{name}: {work.facts()}")
            case[name] = measure(name, work, chosen.device)
        found.append({"work": work.facts(), "found": case})
    record = {
        **provenance("benchmarks.speed.compile", chosen.device, chosen.revision),
        "cases": found,
    }
    write("compile", chosen, record, table(record))


if __name__ == "__main__":
    main()
