"""How much faster is a forecast than the reference computation, and how near to the machine?

    python -m benchmarks.speed.inference [--sizes small paper] [--batches 1 8] [--device cpu|cuda]
                                         [--settings "fp32, winograd" bf16 ...] [--rounds 5]

A TMU student with room for two teachers, who are gone, sees ten frames and predicts ten,
closed-loop: the reference computation (reference.py) and this project in several settings
(work.py), side by side in one process with the same weights, in turns. Operations are those of the
direct convolutions, whoever computes them otherwise. Differences are relative and from the
reference; those of the reference itself are from the same computation in float64.

--quick measures a tiny network, for tests. Prints the table and writes results.json and table.md to
docs/results/speed-inference, of a GPU to speed-inference-cuda. Runs without Ray, WebDataset and
Zarr.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.speed.compare import compare
from benchmarks.speed.measure import Floors
from benchmarks.speed.options import effort, options, record_of, works, write
from benchmarks.speed.report import about, cases
from benchmarks.speed.work import contenders_of, forecasting


def table(record: Mapping[str, Any]) -> str:
    """Markdown: every case's settings."""
    differences = {"Δ predictions": "predictions"}
    return "\n".join([about(record), *cases(record, "batch", differences)]) + "\n"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    chosen = parser.parse_args()
    done = effort(chosen)
    names = forecasting(contenders_of(chosen.device, chosen.settings))
    floors = Floors(chosen.device, quick=chosen.quick)
    found = []
    for size in works(chosen):
        for batch in chosen.batches:
            work = size._replace(batch=batch)
            found.append(
                {"work": work.facts(), "found": compare(work, names, "forecast", floors, done)}
            )
    record = record_of("inference", chosen, done, floors, {"cases": found})
    write("inference", chosen, record, table(record))


if __name__ == "__main__":
    main()
