"""How does a training step's cost grow with frames, layers and batch?

    python -m benchmarks.speed.shapes [--sizes paper] [--settings "fp32, winograd" bf16]
                                      [--device cpu|cuda] [--rounds 3]

One shape at a time is changed from the size's own: height and width of the frames, number of
layers, sequences of a batch. Each is measured like `benchmarks.speed.training`: the reference and
settings of this project side by side, in turns.

--quick measures a tiny network, for tests. Prints the table and writes results.json and table.md to
docs/results/speed-shapes, of a GPU to speed-shapes-cuda. Runs without Ray, WebDataset and Zarr.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.speed.compare import compare
from benchmarks.speed.measure import Floors
from benchmarks.speed.options import effort, options, record_of, works, write
from benchmarks.speed.report import (
    about,
    describe,
    markdown,
    megabytes,
    rate_columns,
    time_columns,
)
from benchmarks.speed.work import REFERENCE, Work, contenders_of

EDGES = (32, 64, 96, 128)
LAYERS = (1, 2, 4, 6)
BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (1, 4, 8, 32, 128)}
QUICK_EDGES, QUICK_LAYERS, QUICK_BATCHES = (16, 20), (1,), (1,)
DEFAULTS = {
    "cpu": ("fp32, winograd, fused", "bf16, fused"),
    "cuda": ("bf16, compiled", "bf16, compiled, batched, graph"),
}


def shapes(work: Work, device: str, *, quick: bool) -> Iterator[tuple[str, Work]]:
    """What is varied, and the works; the size's own is among each."""
    for edge in QUICK_EDGES if quick else EDGES:
        yield "frames", work._replace(frame=replace(work.frame, height=edge, width=edge))
    for layers in QUICK_LAYERS if quick else LAYERS:
        yield "layers", work._replace(model=replace(work.model, num_layers=layers))
    for batch in QUICK_BATCHES if quick else BATCHES[device]:
        yield "batch", work._replace(batch=batch)


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a table for each size and what is varied."""
    lines = [about(record)]
    heads = (
        *("shape", "setting", "GFLOP", "s/step: least (median, most)", "sequences/s"),
        *("× reference", "GFLOP/s", "of fp32", "of bf16", "peak MB", "Δ loss", "Δ gradients"),
    )
    for size, own in record["own"].items():
        lines += ["", f"{describe(own)}; varied:", ""]
        rows = []
        for case in (each for each in record["cases"] if each["size"] == size):
            work, found = case["work"], case["found"]
            shape = {
                "frames": work["frame"],
                "layers": f"{work['num_layers']} layers",
                "batch": f"batch {work['batch']}",
            }[case["varied"]]
            for name, row in found.items():
                rows.append(
                    [
                        shape,
                        name,
                        f"{row['operations'] / 1e9:,.1f}",
                        *time_columns(row, found[REFERENCE], work["batch"]),
                        *rate_columns(row, record["floors"]["per_second"]),
                        megabytes(row["peak_bytes"]),
                        *(f"{row['agreement'][part]:.1e}" for part in ("loss", "gradients")),
                    ]
                )
        lines += markdown(heads, rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__, sizes=("paper",), rounds=3)
    chosen = parser.parse_args()
    done = effort(chosen)
    names = contenders_of(chosen.device, chosen.settings or DEFAULTS[chosen.device])
    floors = Floors(chosen.device, quick=chosen.quick)
    sizes = ["tiny"] if chosen.quick else chosen.sizes
    own = dict(zip(sizes, works(chosen), strict=True))
    measured: dict[Work, Any] = {}
    found = []
    for size, base in own.items():
        for varied, work in shapes(base, chosen.device, quick=chosen.quick):
            if work not in measured:
                measured[work] = compare(work, names, "train", floors, done)
            case = {"size": size, "varied": varied, "work": work.facts()}
            found.append(case | {"found": measured[work]})
    facts = {size: work.facts() for size, work in own.items()}
    record = record_of("shapes", chosen, done, floors, {"own": facts, "cases": found})
    write("shapes", chosen, record, table(record))


if __name__ == "__main__":
    main()
