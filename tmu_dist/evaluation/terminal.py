"""One evaluation, or several side by side, as text for a terminal (rich).

Deliberately not here: pages and figures (`report`).
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from tmu_dist.evaluation.comparison import RunEntry
from tmu_dist.evaluation.result import MODEL, PERSISTENCE, EvaluationResult
from tmu_dist.evaluation.tables import (
    Cell,
    Row,
    TableData,
    format_score,
    gate_table,
    score_table,
)


def terminal_summary(result: EvaluationResult) -> Group:
    """Scores beside persistence, lead times, gates, cost, and what each number means."""
    model, data, cost, runtime = result.model, result.data, result.parameters, result.runtime
    title = Text.assemble(
        (model.name, "bold"),
        f" ({model.method}, step {model.step:,}) on {data.split} of {data.url}: "
        f"{data.num_sequences:,} sequences, {model.num_input_frames} frames in, "
        f"{model.num_target_frames} out",
    )
    costs = Text(
        f"{cost.train:,} parameters at train time, {cost.test:,} at test time\n"
        f"{runtime.ms_per_sequence_batch_1:.1f} ms per sequence alone, "
        f"{runtime.ms_per_sequence_batch_8:.1f} ms in batches of 8; evaluation took "
        f"{runtime.seconds_per_evaluation_batch:.2f} s per batch of "
        f"{runtime.evaluation_batch_size} ({runtime.device})"
    )
    parts: list[RenderableType] = [title, _overall(result), _lead_times(result)]
    if result.gates is not None:
        parts.append(_rich_table("Mean transfer gates", gate_table(result.gates)))
    spaced = [line for part in (*parts, costs) for line in (part, Text())]
    return Group(*spaced, _definitions(result))


def comparison_table(entries: Sequence[RunEntry]) -> Table:
    """Scores of persistence and of every run, best values in bold; costs stand on the page."""
    return _rich_table("Comparison", score_table(entries, with_costs=False))


def _overall(result: EvaluationResult) -> Table:
    forecasts = (result.overall[PERSISTENCE], result.overall[MODEL])
    rows = [
        Row(name, [Cell(format_score(name, scores[name])) for scores in forecasts])
        for name in result.overall[MODEL]
    ]
    return _rich_table("Overall", TableData(["", "persistence", "model"], rows))


def _lead_times(result: EvaluationResult) -> Table:
    """MSE per frame and SSIM of both forecasts at every lead time."""
    columns = [
        (f"{name}\n{label}", name, result.per_lead_time[forecast][name])
        for name in ("mse_per_frame", "ssim")
        for label, forecast in (("persistence", PERSISTENCE), ("model", MODEL))
    ]
    rows = [
        Row(str(t + 1), [Cell(format_score(name, values[t])) for _, name, values in columns])
        for t in range(result.model.num_target_frames)
    ]
    headings = ["frame", *(heading for heading, *_ in columns)]
    return _rich_table("By lead time", TableData(headings, rows))


def _definitions(result: EvaluationResult) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, text in result.definitions.items():
        grid.add_row(Text(name), Text(text, style="dim"))
    return grid


def _rich_table(title: str, data: TableData) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    is_text = [True, *(cell.is_text for cell in data.rows[0].cells)]
    for heading, words in zip(data.headings, is_text, strict=True):
        justify: JustifyMethod = "left" if words else "right"
        table.add_column(Text(heading), justify=justify, header_style="dim", no_wrap=not words)
    for row in data.rows:
        cells = [Text(cell.text, style="bold" if cell.is_best else "") for cell in row.cells]
        table.add_row(Text(row.name), *cells)
    return table
