"""Where is Winograd's minimal filtering faster than the library's convolution, and how exact is it?

    python -m benchmarks.convolutions [--rounds 5] [--install]

Convolutions of a recurrence in float32: several time steps with the same filters, forward and
backward (with gradients of maps, filters and bias), by the library (PyTorch with oneDNN, channels
innermost, which it prefers) and by Winograd's filtering, in turns; the filters are transformed once
per pass, as in a training step. bfloat16 by the library stands beside. Times are the processor's,
of one thread: other work on the machine disturbs them little. Errors are of the output and of the
worst gradient, norm by norm, relative to float64.

Prints the table and writes results.json and table.md to docs/results/convolutions. --install also
writes the ratios to tmu_dist/models/winograd/measured.json, from which compute.convolution=auto
chooses. CPUs only; runs without Ray, WebDataset and Zarr.
"""

from __future__ import annotations

import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import command_line, provenance, publish, record_folder, say
from benchmarks.speed.measure import Run, alternate, ratios, relative_difference, spread
from tmu_dist.models.winograd.filters import Filters

STEPS = 19
"""Of the recurrence."""
BATCH = 4
INSTALLED = Path("tmu_dist/models/winograd/measured.json")


class Shape(NamedTuple):
    """Of one convolution."""

    taps: int
    side: int
    in_channels: int
    out_channels: int


SHAPES = [
    Shape(taps, side, in_channels, out_channels)
    for taps, side, (in_channels, out_channels) in product(
        (5, 3), (4, 8, 16, 32), ((16, 32), (32, 64), (64, 128), (128, 256))
    )
]
"""Maps and layers of the backbones' sizes: 16 x 16 and 32 x 32 are the paper's."""
QUICK = [Shape(5, 8, 16, 32), Shape(3, 8, 16, 32)]


class Case:
    """Maps, filters and what is done with them."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.taps = shape.taps
        size = (shape.taps**2 * shape.in_channels) ** 0.5
        weight = torch.randn(shape.out_channels, shape.in_channels, shape.taps, shape.taps) / size
        bias = torch.randn(shape.out_channels)
        maps = torch.randn(STEPS, BATCH, shape.in_channels, shape.side, shape.side)
        self.numbers = [
            weight.to(memory_format=torch.channels_last),
            bias,
            *(each.contiguous(memory_format=torch.channels_last) for each in maps),
        ]
        self.along = torch.randn(BATCH, shape.out_channels, shape.side, shape.side).to(
            memory_format=torch.channels_last
        )

    def winograd(self) -> list[Tensor]:
        weight, bias, *maps = leaves = self._leaves(torch.float32)
        filters = Filters(weight, bias)
        return self._results([filters(x) for x in maps], leaves)

    def direct(self, dtype: torch.dtype) -> list[Tensor]:
        weight, bias, *maps = leaves = self._leaves(dtype)
        padding = self.taps // 2
        return self._results([F.conv2d(x, weight, bias, padding=padding) for x in maps], leaves)

    def errors(self) -> dict[str, tuple[float, float]]:
        """Of output and worst gradient, of each way."""
        exact = self.direct(torch.float64)
        found = {}
        for name, results in {
            "winograd": self.winograd(),
            "direct": self.direct(torch.float32),
            "bf16": self.direct(torch.bfloat16),
        }.items():
            each = [
                relative_difference([a.double()], [b]) for a, b in zip(results, exact, strict=True)
            ]
            found[name] = max(each[:STEPS]), max(each[STEPS:])
        return found

    def _leaves(self, dtype: torch.dtype) -> list[Tensor]:
        return [each.to(dtype).requires_grad_() for each in self.numbers]

    def _results(self, outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        along = [self.along.to(outputs[0].dtype)] * len(outputs)
        return [*(each.detach() for each in outputs), *torch.autograd.grad(outputs, leaves, along)]


def measure(shape: Shape, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds of a time step by round, ratios and errors."""
    say(f"{shape}")
    case = Case(shape)
    runs: dict[str, Run] = {
        "direct": lambda: case.direct(torch.float32),
        "bf16": lambda: case.direct(torch.bfloat16),
        "winograd": case.winograd,
    }
    times = alternate(runs, "cpu", rounds=rounds, seconds=seconds)
    return {
        **shape._asdict(),
        "seconds": {name: [each / STEPS for each in found] for name, found in times.items()},
        "ratio": ratios(times["direct"], times["winograd"]),
        "ratio_of_bf16": ratios(times["direct"], times["bf16"]),
        "errors": case.errors(),
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: a row for every shape."""
    lines = [
        f"Ratios of processor times, forward and backward, batch {BATCH}, one thread, of "
        f"{record['rounds']} rounds: least (median, most). Errors of output and worst gradient.",
        "",
        "| filter | map | channels | direct [ms] | direct / Winograd | direct / bf16 "
        "| error: Winograd | direct | bf16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["shapes"]:
        errors = [
            " ".join(f"{e:.1e}" for e in row["errors"][n]) for n in ("winograd", "direct", "bf16")
        ]
        lines.append(
            f"| {row['taps']}x{row['taps']} | {row['side']}x{row['side']} "
            f"| {row['in_channels']} -> {row['out_channels']} "
            f"| {1e3 * statistics.median(row['seconds']['direct']):.2f} "
            f"| {spread(row['ratio'], 2)} | {spread(row['ratio_of_bf16'], 2)} "
            f"| {errors[0]} | {errors[1]} | {errors[2]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.15, help="of a turn, at least")
    parser.add_argument("--quick", action="store_true", help="two small shapes, one round")
    parser.add_argument("--install", action="store_true", help="choose by these ratios from now on")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rounds, seconds = (1, 0.0) if chosen.quick else (chosen.rounds, chosen.seconds)
    found = [measure(shape, rounds, seconds) for shape in (QUICK if chosen.quick else SHAPES)]
    record = {
        **provenance("benchmarks.convolutions", "cpu", chosen.revision),
        "rounds": rounds,
        "shapes": found,
    }
    publish(record, table(record), record_folder(chosen, "convolutions"))
    if chosen.install:
        install(found)


def install(found: list[dict[str, Any]]) -> None:
    """Write the table that the default chooses by."""
    rows = [
        {name: row[name] for name in Shape._fields} | {"ratio": round(min(row["ratio"]), 2)}
        for row in found
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    INSTALLED.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
