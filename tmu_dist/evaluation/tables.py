"""Tables as plain data, and how numbers are written; page, terminal and Markdown show the same.

Deliberately not here: layout (`terminal`, `page`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial

from tmu_dist.evaluation.comparison import Contender, RunEntry, contenders
from tmu_dist.evaluation.metrics import Metric, select_metrics, squared_unit
from tmu_dist.evaluation.rain import RADAR_SCORE_NAMES, RadarScores
from tmu_dist.evaluation.result import (
    ENSEMBLE,
    ENSEMBLE_MEAN,
    FLOW,
    MEAN_OVER_SAMPLES,
    MODEL,
    EvaluationResult,
    TransferGates,
)

METRICS = select_metrics()
_SCORE_COLUMNS = ("mse_per_frame", "mae_per_frame", "ssim", "psnr_db")
_RADAR_COLUMNS = (*_SCORE_COLUMNS, "mse_physical", "mae_physical")
_NARROW_RADAR_COLUMNS = ("mse_per_frame", "mae_physical", "ssim")
_TOGETHER_COLUMNS = {"crps_per_frame": "CRPS / frame", "diversity_per_frame": "Diversity / frame"}
_DECIMALS = {
    "mse_per_frame": 1,
    "mse_mean": 5,
    "mae_per_frame": 1,
    "mae_mean": 5,
    "mse_physical": 2,
    "mae_physical": 3,
    "psnr_db": 2,
    "ssim": 4,
    "crps_per_frame": 1,
    "diversity_per_frame": 1,
    "observed_fraction": 4,
    "identical_frames": 0,
    "unobserved_frames": 0,
    "frames_without_ssim": 0,
}
RADAR_LABELS = {
    "csi": "CSI",
    "pod": "POD",
    "far": "FAR",
    "hss": "HSS",
    "bias": "Bias",
    "fss": "FSS",
}
_UNDEFINED = "–"


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


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One score of every contender."""

    label: str
    values: Sequence[float]
    write: Callable[[float], str]
    badness: Callable[[float], float]
    """The lowest is the best."""
    arrow: str

    @property
    def heading(self) -> str:
        return f"{self.label}\u00a0{self.arrow}"

    def cells(self) -> list[Cell]:
        """Best values marked, also where several are best."""
        ranks = [self.badness(value) for value in self.values if not math.isnan(value)]
        best = min(ranks, default=math.nan)
        return [Cell(self.write(v), is_best=self.badness(v) == best) for v in self.values]


def metric_facts(result: EvaluationResult) -> dict[str, Metric]:
    """Labels and directions of the metrics of a result, with its unit."""
    if result.radar is None:
        return METRICS
    unit = result.radar.settings.unit
    return {
        **METRICS,
        "mse_physical": replace(METRICS["mse_mean"], label=f"MSE [{squared_unit(unit)}]"),
        "mae_physical": replace(METRICS["mae_mean"], label=f"MAE [{unit}]"),
    }


def score_table(entries: Sequence[RunEntry], *, with_costs: bool = True) -> TableData:
    """The paper's Table 1: baselines first, then every run; best values marked.

    Args:
        entries: comparable runs.
        with_costs: also weights, times and teachers; without, the table fits 80 characters.
    """
    rivals, first = contenders(entries), entries[0].result
    names: Sequence[str] = _SCORE_COLUMNS
    if first.radar is not None:
        names = _RADAR_COLUMNS if with_costs else _NARROW_RADAR_COLUMNS
    facts = metric_facts(first)
    scored = [name for name in names if name in first.overall[MODEL]]
    columns = [_metric_column(name, facts[name], rivals) for name in scored]
    if first.radar is not None:
        label = f"CSI, {first.radar.settings.threshold_label(0)}"
        columns.append(_radar_column("csi", label, [_radar(r).mean("csi")[0] for r in rivals]))
    costs: Sequence[Sequence[Cell]] = [()] * len(rivals)
    if with_costs:
        costs = [
            _baseline_cost_cells(r) if r.series is None else _cost_cells(entries[r.series])
            for r in rivals
        ]
    return _table(columns, rivals, _COST_COLUMNS if with_costs else (), costs)


def ensemble_table(entries: Sequence[RunEntry]) -> TableData | None:
    """Beside the best sample of each stochastic network, what its samples are worth otherwise.

    None where every network is deterministic.
    """
    rows = []
    for i, entry in enumerate(entries):
        result = entry.result
        if result.ensemble is None:
            continue
        for forecast in (MODEL, MEAN_OVER_SAMPLES, ENSEMBLE_MEAN):
            cells = _cells(result.overall[forecast], _SCORE_COLUMNS)
            cells += [Cell(_UNDEFINED)] * len(_TOGETHER_COLUMNS)
            rows.append(Row(f"{entry.label}, {result.labels[forecast]}", cells, series=i))
        cells = [Cell(_UNDEFINED)] * len(_SCORE_COLUMNS)
        cells += _cells(result.overall[ENSEMBLE], _TOGETHER_COLUMNS)
        rows.append(Row(f"{entry.label}, all samples together", cells, series=i))
    headings = [METRICS[name].label for name in _SCORE_COLUMNS]
    return TableData(["Method", *headings, *_TOGETHER_COLUMNS.values()], rows) if rows else None


def _cells(scores: Mapping[str, float], names: Iterable[str]) -> list[Cell]:
    return [Cell(format_score(name, scores[name])) for name in names]


def categorical_table(entries: Sequence[RunEntry], k: int) -> TableData:
    """CSI, POD, FAR, HSS and bias at the k-th threshold: means over lead times, and pooled CSI."""
    rivals = contenders(entries)
    columns = [
        _radar_column(name, RADAR_LABELS[name], [_radar(r).mean(name)[k] for r in rivals])
        for name in RADAR_SCORE_NAMES
        if name != "fss"
    ]
    pooled = [_radar(r).pooled("csi")[k] for r in rivals]
    return _table([*columns, _radar_column("csi", "CSI, pooled", pooled)], rivals)


def fss_table(entries: Sequence[RunEntry], k: int) -> TableData:
    """The fractions skill score at the k-th threshold by scale: means over lead times."""
    rivals = contenders(entries)
    assert rivals[0].result.radar is not None
    settings = rivals[0].result.radar.settings
    means = [_radar(rival).mean("fss")[k] for rival in rivals]
    columns = [
        # Two lines, so that five of them fit a terminal.
        _radar_column("fss", settings.scale_label(s).replace(" (", "\n("), [m[s] for m in means])
        for s in range(len(settings.scales))
    ]
    return _table(columns, rivals)


def undefined_scores(entries: Sequence[RunEntry], k: int) -> str:
    """Which scores at the k-th threshold leave out lead times; "" when none does."""
    rivals = contenders(entries)
    names: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for name in RADAR_SCORE_NAMES:
        by_count: dict[int, list[str]] = {}
        for rival in rivals:
            by_count.setdefault(int(_radar(rival).num_undefined(name)[k].max()), []).append(
                rival.label
            )
        for count, labels in by_count.items():
            if count:
                names.setdefault((count, tuple(labels)), []).append(RADAR_LABELS[name])
    if not names:
        return ""
    parts = []
    for (count, holders), scores in names.items():
        whose = "every forecast" if len(holders) == len(rivals) else ", ".join(holders)
        parts.append(f"{', '.join(scores)} at {count} (of {whose})")
    return f"Undefined (0 / 0) and left out, in lead times: {'; '.join(parts)}."


def _table(
    columns: Sequence[_Column],
    rivals: Sequence[Contender],
    more_headings: Sequence[str] = (),
    more_cells: Sequence[Sequence[Cell]] | None = None,
) -> TableData:
    by_column = [column.cells() for column in columns]
    rows = []
    for i, rival in enumerate(rivals):
        cells = [cells[i] for cells in by_column] + list(more_cells[i] if more_cells else ())
        rows.append(Row(rival.label, cells, series=rival.series))
    return TableData(["Method", *(column.heading for column in columns), *more_headings], rows)


def _metric_column(name: str, metric: Metric, rivals: Sequence[Contender]) -> _Column:
    sign = -1.0 if metric.higher_is_better else 1.0
    return _Column(
        label=metric.label,
        values=[rival.result.overall[rival.forecast][name] for rival in rivals],
        write=partial(format_score, name),
        badness=lambda value: sign * value,
        arrow="↑" if metric.higher_is_better else "↓",
    )


def _radar_column(name: str, label: str, values: Sequence[float]) -> _Column:
    badness: dict[str, Callable[[float], float]] = {
        "far": lambda value: value,
        "bias": lambda value: abs(value - 1.0),
    }
    return _Column(
        label=label,
        values=[float(value) for value in values],
        write=format_radar_score,
        badness=badness.get(name, lambda value: -value),
        arrow={"far": "↓", "bias": "→\u00a01"}.get(name, "↑"),
    )


def _radar(rival: Contender) -> RadarScores:
    assert rival.result.radar is not None
    return rival.result.radar.forecasts[rival.forecast]


_ALONE = "ms/seq., alone"
_COST_COLUMNS = (
    "Weights, train",
    "Weights, test",
    _ALONE,
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
        Cell(_UNDEFINED if entry.seconds_per_batch is None else f"{entry.seconds_per_batch:.3f}"),
        Cell(", ".join(entry.result.model.teachers) or "none", is_text=True),
    ]


def _baseline_cost_cells(rival: Contender) -> list[Cell]:
    cells = [Cell(_UNDEFINED)] * (len(_COST_COLUMNS) - 1) + [Cell("none", is_text=True)]
    radar = rival.result.radar
    if rival.forecast == FLOW and radar is not None and radar.flow_ms_per_sequence is not None:
        cells[_COST_COLUMNS.index(_ALONE)] = Cell(f"{radar.flow_ms_per_sequence:.1f}")
    return cells


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


def markdown(data: TableData) -> str:
    """A table as Markdown; best values in bold."""
    lines = [
        "| " + " | ".join(data.headings).replace("\n", " ") + " |",
        "|---|" + "---:|" * (len(data.headings) - 1),
    ]
    for row in data.rows:
        cells = [f"**{cell.text}**" if cell.is_best else cell.text for cell in row.cells]
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def format_score(name: str, value: float) -> str:
    """A metric's value with as many decimals as it deserves."""
    if math.isnan(value):
        return _UNDEFINED
    return "∞" if math.isinf(value) else f"{value:.{_DECIMALS[name]}f}"


def format_radar_score(value: float) -> str:
    """Three decimals; a dash where the score is undefined."""
    return _UNDEFINED if math.isnan(value) else f"{value:.3f}".replace("-", "−")


def format_difference(value: float) -> str:
    """A signed difference of errors per frame, with a real minus sign."""
    return f"{value:+.1f}".replace("-", "−")


def format_count(count: int) -> str:
    """A number of weights: 850, 84.1 k, 3.59 M."""
    if count < 1_000:
        return str(count)
    return f"{count / 1e3:.1f} k" if count < 1_000_000 else f"{count / 1e6:.2f} M"
