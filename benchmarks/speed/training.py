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

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import command_line, provenance, publish, say
from benchmarks.speed.measure import Floors, alternate, peak_bytes
from benchmarks.speed.report import (
    about,
    describe,
    markdown,
    megabytes,
    rate_columns,
    time_columns,
)
from benchmarks.speed.work import (
    REFERENCE,
    REFERENCE_TF32,
    SETTINGS,
    SIZES,
    Contender,
    Reference,
    Work,
    agreement,
    contender,
    prepare_training,
    settings_of,
    with_peephole,
)

_FILLED = 0.85
"""Part of a card that the largest batch may take, by what smaller ones take."""


def measure(
    work: Work, names: Sequence[str], device: str, floors: Floors, *, rounds: int, seconds: float
) -> dict[str, Any]:
    """Time, memory and agreement of each, by name.

    Args:
        work: what is computed.
        names: of contenders; the first is the reference.
        device: "cpu" or "cuda".
        floors: measured in every round.
        rounds, seconds: as in `alternate`.
    """
    say(f"{work.facts()}")
    exact = Reference(work, device, dtype=torch.float64).outcome()
    expected = contender(REFERENCE, work, device).outcome()
    found: dict[str, Any] = {}
    contenders: dict[str, Contender] = {}
    for name in names:
        say(f"{name}: building")
        contenders[name] = own = contender(name, work, device)
        differences = agreement(own.outcome(), exact if name == REFERENCE else expected)
        own.train()
        is_cached = name in SETTINGS and SETTINGS[name].is_cached
        teachers = work.num_teachers * work.teacher_operations if is_cached else 0
        found[name] = {
            "setting": dict(SETTINGS[name].overrides) if name in SETTINGS else None,
            "operations": work.training_operations - teachers,
            "agreement": differences,
        }
    compare_updated(contenders, found)
    runs = {name: each.train for name, each in contenders.items()}
    times = alternate({"floors": floors.measure, **runs}, device, rounds=rounds, seconds=seconds)
    del contenders, runs
    for name in names:
        say(f"{name}: memory")
        found[name]["seconds"] = times[name]
        found[name]["peak_bytes"] = peak_bytes(prepare_training, name, work, device, device=device)
    return found


def compare_updated(contenders: Mapping[str, Contender], found: Mapping[str, Any]) -> None:
    """Add the difference of the losses after an update."""
    losses = {name: float(each.outcome().loss) for name, each in contenders.items()}
    for name, loss in losses.items():
        found[name]["agreement"]["next_loss"] = abs(loss / losses[REFERENCE] - 1)


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
    lines = [about(record)]
    heads = (
        *("setting", "s/step: least (median, most)", "sequences/s", "× reference"),
        *("GFLOP/s", "of fp32", "of bf16", "peak MB"),
        *("Δ loss", "Δ predictions", "Δ gradients", "Δ next loss"),
    )
    for case in record["cases"]:
        batch, found = case["work"]["batch"], case["found"]
        rows = []
        for name, row in found.items():
            differences = row["agreement"]
            rows.append(
                [
                    name,
                    *time_columns(row, found[REFERENCE], batch),
                    *rate_columns(row, record["floors"]["per_second"]),
                    megabytes(row["peak_bytes"]),
                    *(
                        f"{differences[part]:.1e}"
                        for part in ("loss", "predictions", "gradients", "next_loss")
                    ),
                ]
            )
        gflop = found[REFERENCE]["operations"] / 1e9
        lines += ["", f"{describe(case['work'])}: {gflop:,.1f} GFLOP a step.", ""]
        lines += markdown(heads, rows)
    return "\n".join(lines) + "\n"


def works(chosen: argparse.Namespace) -> list[Work]:
    """What is to be computed, by the options."""
    found = []
    for size in ["tiny"] if chosen.quick else chosen.sizes:
        work = with_peephole(SIZES[size], chosen.peephole)
        found += [work._replace(batch=batch) for batch in chosen.batches or [work.batch]]
        if chosen.fill:
            found.append(work._replace(batch=filling_batch(work, chosen.device)))
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that several questions of speed share."""
    parser.add_argument(
        "--sizes", choices=("small", "paper"), nargs="+", default=["small", "paper"]
    )
    parser.add_argument("--batches", type=int, nargs="+", help="instead of 8 (small) and 4 (paper)")
    parser.add_argument(
        "--peephole", choices=("channel", "none"), default="channel", help="none: the released code"
    )
    parser.add_argument("--settings", choices=tuple(SETTINGS), nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn in a round, at least")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny network, one round")


def prepare(chosen: argparse.Namespace) -> None:
    """Do what the shared options say."""
    if chosen.quick:
        chosen.rounds, chosen.seconds = 1, 0.0
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)


def out_folder(chosen: argparse.Namespace, name: str) -> Path:
    """Where a question's record goes."""
    default = f"speed-{name}" if chosen.device == "cpu" else f"speed-{name}-{chosen.device}"
    return chosen.out or Path("docs/results") / default


def main() -> None:
    parser = command_line(__doc__, takes_device=True)
    add_options(parser)
    parser.add_argument("--fill", action="store_true", help="GPU: also the batch that fills it")
    chosen = parser.parse_args()
    if chosen.fill and chosen.device != "cuda":
        parser.error("--fill asks how much a GPU can take: add --device cuda")
    prepare(chosen)
    names = [REFERENCE] + ([REFERENCE_TF32] if chosen.device == "cuda" else [])
    names += chosen.settings or settings_of(chosen.device)
    floors = Floors(chosen.device, quick=chosen.quick)
    cases = []
    for work in works(chosen):
        # A graph keeps its memory, so that at the largest batch one would leave none to the others.
        is_full = chosen.fill and work.batch not in (chosen.batches or [SIZES["small"].batch])
        own = [name for name in names if not (is_full and "graph" in name)]
        found = measure(
            work, own, chosen.device, floors, rounds=chosen.rounds, seconds=chosen.seconds
        )
        cases.append({"work": work.facts(), "found": found})
    record = {
        **provenance("benchmarks.speed.training", chosen.device, chosen.revision),
        "rounds": chosen.rounds,
        "floors": floors.record(),
        "cases": cases,
    }
    publish(record, table(record), out_folder(chosen, "training"))


if __name__ == "__main__":
    main()
