"""Tables as plain data, and how numbers are written; terminal and page show the same ones.

Deliberately not here: layout (`terminal`, `page`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from tmu_dist.evaluation.comparison import RunEntry
from tmu_dist.evaluation.metrics import select_metrics
from tmu_dist.evaluation.result import MODEL, PERSISTENCE, TransferGates

METRICS = select_metrics()
_SCORE_COLUMNS = ("mse_per_frame", "mae_per_frame", "ssim", "psnr_db")
_DECIMALS = {
    "mse_per_frame": 1,
    "mse_mean": 5,
    "mae_per_frame": 1,
    "mae_mean": 5,
    "psnr_db": 2,
    "ssim": 4,
    "identical_frames": 0,
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    _: KW_ONLY
    is_text: bool = False
    """Words rather than a number: left-aligned and allowed to wrap."""
    is_best: bool = False
    bar: float | None = None
    """Length of a bar behind the number, 0..1."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    name: str
    cells: Sequence[Cell]
    _: KW_ONLY
    series: int | None = None
    """Index of the colour that the row's run has in charts."""


@dataclass(frozen=True)
class TableData:
    """Headings (the first is that of the names) and rows."""

    headings: Sequence[str]
    rows: Sequence[Row]


def score_table(entries: Sequence[RunEntry], *, with_costs: bool = True) -> TableData:
    """The paper's Table 1: persistence first, then every run; best values marked.

    Args:
        entries: comparable runs.
        with_costs: also weights, times and teachers.
    """
    persistence = entries[0].result.overall[PERSISTENCE]
    scores = [persistence, *(entry.result.overall[MODEL] for entry in entries)]
    names = [name for name in _SCORE_COLUMNS if name in persistence]
    best = {
        name: (max if METRICS[name].higher_is_better else min)(score[name] for score in scores)
        for name in names
    }
    cells = [
        [Cell(format_score(n, score[n]), is_best=score[n] == best[n]) for n in names]
        for score in scores
    ]
    arrows = {name: "↑" if METRICS[name].higher_is_better else "↓" for name in names}
    headings = ["Method", *(f"{METRICS[name].label}\u00a0{arrows[name]}" for name in names)]
    if with_costs:
        headings += _COST_COLUMNS
        cells[0] += [Cell("–")] * (len(_COST_COLUMNS) - 1) + [Cell("none", is_text=True)]
        for row, entry in zip(cells[1:], entries, strict=True):
            row += _cost_cells(entry)
    rows = [Row("persistence", cells[0])]
    rows += [Row(entry.label, cells[i + 1], series=i) for i, entry in enumerate(entries)]
    return TableData(headings, rows)


_COST_COLUMNS = (
    "Weights, train",
    "Weights, test",
    "ms/seq., alone",
    "ms/seq., by 8",
    "s/batch, train",
    "Teachers",
)


def _cost_cells(entry: RunEntry) -> list[Cell]:
    cost, runtime = entry.result.parameters, entry.result.runtime
    return [
        Cell(format_count(cost.train)),
        Cell(format_count(cost.test)),
        Cell(f"{runtime.ms_per_sequence_batch_1:.1f}"),
        Cell(f"{runtime.ms_per_sequence_batch_8:.1f}"),
        Cell("–" if entry.seconds_per_batch is None else f"{entry.seconds_per_batch:.3f}"),
        Cell(", ".join(entry.result.model.teachers) or "none", is_text=True),
    ]


def gate_table(gates: TransferGates) -> TableData:
    """The paper's Table 5, per layer too: mean transfer gates, a row per teacher."""
    rows = [
        Row(
            teacher,
            [
                Cell(f"{mean:.3f}", bar=mean)
                for mean in (*(means_M[m] for means_M in gates.means_LM), average)
            ],
        )
        for m, (teacher, average) in enumerate(zip(gates.teachers, gates.per_teacher()))
    ]
    return TableData(["Teacher", *(f"Layer {k}" for k in gates.layers), "All layers"], rows)


def format_score(name: str, value: float) -> str:
    """A metric's value with as many decimals as it deserves."""
    return "∞" if math.isinf(value) else f"{value:.{_DECIMALS[name]}f}"


def format_difference(value: float) -> str:
    """A signed difference of errors per frame, with a real minus sign."""
    return f"{value:+.1f}".replace("-", "−")


def format_count(count: int) -> str:
    """A number of weights: 850, 84.1 k, 3.59 M."""
    if count < 1_000:
        return str(count)
    return f"{count / 1e3:.1f} k" if count < 1_000_000 else f"{count / 1e6:.2f} M"
