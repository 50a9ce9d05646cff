"""How much faster is a training step than the reference computation, and how near to the machine?

    python -m benchmarks.speed.training [--sizes small paper] [--batches 4 8] [--device cpu|cuda]
                                        [--settings "fp32, winograd" bf16 ...] [--rounds 5]

One update of a TMU student with two teachers, teachers included: the reference computation
(reference.py) and this project in several settings (work.py), side by side in one process from the
same weights, in turns. Operations are those of the direct convolutions, whoever computes them
otherwise, so that the rate of a setting with fewer operations may pass the matrix rate. Cached
memories stand in memory; their operations are without the teachers'.

Differences are relative (norm by norm) and from the reference, before any update: of the loss, of
all predictions, of all gradients; and of the loss after one update. Those of the reference itself
are from the same computation in float64: what float32 rounds anyway.

Peak memory is that of a step beyond the libraries: of a CPU in a process of its own, of a GPU what
tensors held. On a GPU, "reference" computes in float32 alone, "reference, tf32" as torch does by
itself; --fill adds the largest power of two of sequences that the reference can take at once.

--quick measures a tiny network, for tests. Prints the table and writes results.json and table.md to
docs/results/speed-training, of a GPU to speed-training-cuda. Runs without Ray, WebDataset and Zarr.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.speed.compare import compare
from benchmarks.speed.measure import Floors, peak_bytes
from benchmarks.speed.options import effort, options, record_of, works, write
from benchmarks.speed.report import about, cases
from benchmarks.speed.work import REFERENCE, Work, contenders_of, prepare_training

_FILLED = 0.85
"""Part of a card that the largest batch may take, by what smaller ones take."""
_HEADS = ("Δ loss", "Δ predictions", "Δ gradients", "Δ next loss")
_DIFFERENCES = ("loss", "predictions", "gradients", "next_loss")


def filling_batch(work: Work, device: str) -> int:
    """The largest power of two of sequences that the reference can learn from at once."""
    few, many = (
        peak_bytes(prepare_training, REFERENCE, work._replace(batch=size), device, device=device)
        for size in (8, 16)
    )
    each = (many - few) / 8
    _, total = torch.cuda.mem_get_info()
    most = (_FILLED * total - (few - 8 * each)) / each
    return 1 << (int(most).bit_length() - 1)


def table(record: Mapping[str, Any]) -> str:
    """Markdown: every case's settings."""
    differences = dict(zip(_HEADS, _DIFFERENCES, strict=True))
    return "\n".join([about(record), *cases(record, "step", differences)]) + "\n"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help="instead of 8 (small) and 4 (paper)")
    parser.add_argument("--fill", action="store_true", help="GPU: also the batch that fills it")
    chosen = parser.parse_args()
    if chosen.fill and chosen.device != "cuda":
        parser.error("--fill asks how much a GPU can take: add --device cuda")
    done = effort(chosen)
    names = contenders_of(chosen.device, chosen.settings)
    floors = Floors(chosen.device, quick=chosen.quick)
    found = []
    for size in works(chosen):
        batches = chosen.batches or [size.batch]
        filling = [filling_batch(size, chosen.device)] if chosen.fill else []
        for batch in [*batches, *filling]:
            work = size._replace(batch=batch)
            # Each graph keeps its memory, so the largest batch has room for no other.
            own = names if batch in batches else [name for name in names if "graph" not in name]
            found.append({"work": work.facts(), "found": compare(work, own, "train", floors, done)})
    record = record_of("training", chosen, done, floors, {"cases": found})
    write("training", chosen, record, table(record))


if __name__ == "__main__":
    main()
