"""One evaluation as text for a terminal (rich).

Deliberately not here: pages and figures (`report`).
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmu_dist.evaluation.result import MODEL, PERSISTENCE, EvaluationResult, TransferGates
from tmu_dist.evaluation.wording import format_score


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
        parts.append(_gates(result.gates))
    spaced = [line for part in (*parts, costs) for line in (part, Text())]
    return Group(*spaced, _definitions(result))


def _overall(result: EvaluationResult) -> Table:
    forecasts = (result.overall[PERSISTENCE], result.overall[MODEL])
    rows = [
        [name, *(format_score(name, scores[name]) for scores in forecasts)]
        for name in result.overall[MODEL]
    ]
    return _table("Overall", ["", "persistence", "model"], rows)


def _lead_times(result: EvaluationResult) -> Table:
    """MSE per frame and SSIM of both forecasts at every lead time."""
    columns = [
        (f"{name}\n{label}", name, result.per_lead_time[forecast][name])
        for name in ("mse_per_frame", "ssim")
        for label, forecast in (("persistence", PERSISTENCE), ("model", MODEL))
    ]
    rows = [
        [str(t + 1), *(format_score(name, values[t]) for _, name, values in columns)]
        for t in range(result.model.num_target_frames)
    ]
    return _table("By lead time", ["frame", *(heading for heading, *_ in columns)], rows)


def _gates(gates: TransferGates) -> Table:
    rows = [
        [teacher, *(f"{means_M[m]:.3f}" for means_M in gates.means_LM), f"{average:.3f}"]
        for m, (teacher, average) in enumerate(zip(gates.teachers, gates.per_teacher()))
    ]
    layers = [f"layer {layer}" for layer in gates.layers]
    return _table("Mean transfer gates", ["", *layers, "all layers"], rows)


def _definitions(result: EvaluationResult) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, text in result.definitions.items():
        grid.add_row(Text(name), Text(text, style="dim"))
    return grid


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", header_style="dim")
    for row in rows:
        table.add_row(*row)
    return table
