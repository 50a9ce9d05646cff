"""One evaluation, or several side by side, as text for a terminal (rich).

Deliberately not here: pages and figures (`report`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from tmu_dist.evaluation.comparison import RunEntry
from tmu_dist.evaluation.ensemble import ENSEMBLE_DEFINITIONS
from tmu_dist.evaluation.result import ENSEMBLE, FLOW, MODEL, PERSISTENCE, EvaluationResult
from tmu_dist.evaluation.tables import (
    Cell,
    Row,
    TableData,
    categorical_table,
    format_radar_score,
    format_score,
    fss_table,
    gate_table,
    score_table,
    undefined_scores,
)


def terminal_summary(result: EvaluationResult) -> Group:
    """Scores beside the baselines, lead times, gates, cost, and what each number means."""
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
    parts: list[RenderableType] = [title, _overall(result), *_radar(result), _lead_times(result)]
    parts += _ensemble(result)
    if result.gates is not None:
        parts.append(_rich_table("Mean transfer gates", gate_table(result.gates)))
    spaced = [line for part in (*parts, costs) for line in (part, Text())]
    return Group(*spaced, _definitions(result))


def comparison_table(entries: Sequence[RunEntry]) -> Table:
    """Scores of the baselines and of every run, best values in bold; costs stand on the page."""
    return _rich_table("Comparison", score_table(entries, with_costs=False))


def _overall(result: EvaluationResult) -> Table:
    rows = [
        Row(name, [Cell(format_score(name, result.overall[f][name])) for f in result.labels])
        for name in result.overall[MODEL]
    ]
    return _rich_table("Overall", TableData(["", *_narrow(result.labels.values())], rows))


def _ensemble(result: EvaluationResult) -> list[RenderableType]:
    """Scores of all samples of a stochastic network together, overall and at every lead time."""
    if result.ensemble is None:
        return []
    overall, by_lead_time = result.overall[ENSEMBLE], result.per_lead_time[ENSEMBLE]
    names = list(ENSEMBLE_DEFINITIONS)
    rows = [
        Row(str(t + 1), [Cell(format_score(name, by_lead_time[name][t])) for name in names])
        for t in range(result.model.num_target_frames)
    ]
    rows.append(Row("all", [Cell(format_score(name, overall[name])) for name in names]))
    count = result.ensemble.num_samples
    title = f"{count} sample{'' if count == 1 else 's'} together (seed {result.ensemble.seed})"
    return [_rich_table(title, TableData(["frame", *names], rows))]


def _radar(result: EvaluationResult) -> list[RenderableType]:
    """Scores at every threshold, beside the baselines; and why one of these is missing."""
    if result.radar is None:
        return []
    settings, entries = result.radar.settings, [RunEntry(label="model", result=result)]
    parts: list[RenderableType] = []
    for k in range(len(settings.thresholds)):
        rate = result.radar.forecasts[MODEL].base_rate_K[k]
        title = f"At {settings.threshold_label(k)} and more ({rate:.2%} of the observed pixels)"
        parts.append(_rich_table(title, categorical_table(entries, k)))
        title = f"FSS at {settings.threshold_label(k)} and more, by neighbourhood"
        parts.append(_rich_table(title, fss_table(entries, k)))
        if note := undefined_scores(entries, k):
            parts.append(Text(note, style="dim"))
    if result.radar.flow_note is not None:
        parts.append(Text(_sentence(result.radar.flow_note), style="bold yellow"))
    if result.radar.flow_ms_per_sequence is not None:
        took = f"{result.radar.flow_ms_per_sequence:.0f} ms per sequence"
        parts.append(Text(f"Optical flow took {took}.", style="dim"))
    return parts


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}"


def _lead_times(result: EvaluationResult) -> Table:
    """MSE per frame and SSIM of every forecast at every lead time; of radar, CSI."""
    columns = []
    shown = [f for f in result.labels if f in (PERSISTENCE, FLOW, MODEL)]
    forecasts = list(zip(_narrow([result.labels[f] for f in shown]), shown))
    if result.radar is None:
        for name in ("mse_per_frame", "ssim"):
            for label, forecast in forecasts:
                values = result.per_lead_time[forecast][name]
                columns.append((f"{name}\n{label}", [format_score(name, v) for v in values]))
    else:
        threshold = result.radar.settings.threshold_label(0)
        for label, forecast in forecasts:
            values_T = result.radar.forecasts[forecast].per_lead_time("csi")[:, 0]
            texts = [format_radar_score(v) for v in values_T.tolist()]
            columns.append((f"CSI {threshold}\n{label}", texts))
    rows = [
        Row(str(t + 1), [Cell(texts[t]) for _, texts in columns])
        for t in range(result.model.num_target_frames)
    ]
    headings = ["frame", *(heading for heading, _ in columns)]
    return _rich_table("By lead time", TableData(headings, rows))


def _narrow(labels: Iterable[str]) -> list[str]:
    """Labels as headings, on two lines where they are long: four columns fit a terminal."""
    return [fill(label, 12) for label in labels]


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
