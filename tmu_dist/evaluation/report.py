"""Figures of one evaluation, and one page that compares several.

Every number stands beside persistence and beside its definition. Results are shown as they came:
nothing here chooses, hides or leaves out a run.

Deliberately not here: HTML and style (`page`), drawing (`plots`, `pictures`), statistics
(`comparison`), text for the terminal (`terminal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from tmu_dist.evaluation.comparison import (
    Contender,
    RunEntry,
    check_comparable,
    contenders,
    difference_from,
    read_learning_curve,
)
from tmu_dist.evaluation.examples import Example
from tmu_dist.evaluation.page import STYLE, picture, table
from tmu_dist.evaluation.pictures import prediction_strip
from tmu_dist.evaluation.plots import (
    LIGHT,
    Curve,
    Interval,
    Theme,
    interval_chart,
    lead_time_curves,
    learning_curves,
    write_figure,
)
from tmu_dist.evaluation.radar_report import (
    Chart,
    flow_facts,
    flow_warning,
    radar_charts,
    radar_markdown,
    radar_notes,
    radar_section,
)
from tmu_dist.evaluation.rain import is_radar
from tmu_dist.evaluation.result import EvaluationResult
from tmu_dist.evaluation.tables import (
    METRICS,
    Cell,
    Row,
    TableData,
    ensemble_table,
    format_difference,
    gate_table,
    score_table,
)
from tmu_dist.files import atomic_write_text
from tmu_dist.html_page import Html, bullet_list, definition_list, document, element

_CHART_METRICS = ("mse_per_frame", "ssim", "mae_per_frame")


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """What a comparison page says beside the numbers."""

    title: str
    summary: str
    """What was done, in one or two sentences."""
    command: str
    """The command that made the page."""
    created: str
    """Date and time, as it is to be printed."""
    git_revision: str
    reference_label: str | None = "scratch"
    """The run that others are compared with, sequence by sequence; None leaves that out."""
    notes: tuple[str, ...] = ()
    """Further honest notes, a sentence or two each."""
    repeat_commands: tuple[str, ...] = ()
    """Commands that repeat the comparison by hand."""


def write_figures(result: EvaluationResult, folder: Path) -> list[Path]:
    """Draw model and baselines against lead time, one PNG per charted metric."""
    entries = [RunEntry(label=result.model.name, result=result)]
    charts = [*_metric_charts(entries), *radar_charts(entries)]
    paths = [folder / f"{chart.name}.png" for chart in charts]
    for chart, path in zip(charts, paths, strict=True):
        write_figure(chart.draw(LIGHT), path)
    return paths


def write_markdown_tables(path: Path, entries: Sequence[RunEntry]) -> None:
    """Write the tables of runs evaluated on the same radar sequences as Markdown."""
    check_comparable(entries)
    atomic_write_text(path, radar_markdown(entries))


def write_comparison_page(
    path: Path,
    entries: Sequence[RunEntry],
    settings: PageSettings,
    *,
    examples: Sequence[Example] = (),
) -> None:
    """Write one self-contained HTML page that compares evaluated runs.

    Args:
        path: the file; it appears whole or not at all.
        entries: runs evaluated on the same sequences, in the order of the table.
        settings: what the page says beside the numbers.
        examples: sequences with forecasts of these runs, under the same labels in the same order.

    Raises:
        ValueError: runs that cannot be compared, an unknown reference, or a broken log.
    """
    check_comparable(entries)
    parts = [*_header(entries, settings), *_scores(entries), *_ensembles(entries)]
    parts += radar_section(entries)
    if settings.reference_label is not None and len(entries) > 1:
        parts += _paired_differences(entries, settings.reference_label)
    parts += [*_curves(entries), *_gates(entries), *_examples(examples)]
    parts += [*_notes(entries, settings), *_definitions(entries), *_repeat(settings)]
    atomic_write_text(path, document(settings.title, parts, style=STYLE))


def _header(entries: Sequence[RunEntry], settings: PageSettings) -> list[Html]:
    result = entries[0].result
    data, model = result.data, result.model
    facts = [
        ("Made", f"{settings.created}, git revision {settings.git_revision}"),
        ("Command", settings.command),
        ("Task", f"{model.num_input_frames} frames in, {model.num_target_frames} predicted"),
        ("Evaluated on", f"{data.split} split of {data.url}: {data.num_sequences:,} sequences "
                         f"(manifest {data.manifest_hash[:12]})"),
        ("Seed", _seeds(entries)),
        ("Machine", result.runtime.device),
        *flow_facts(result),
    ]  # fmt: skip
    return [
        element("h1", settings.title),
        element("p", settings.summary, css="lead"),
        definition_list(facts, css="facts"),
    ]


def _seeds(entries: Sequence[RunEntry]) -> str:
    seeds = {entry.label: entry.result.model.seed for entry in entries}
    if len(set(seeds.values())) == 1:
        return f"{next(iter(seeds.values()))} in every run"
    return ", ".join(f"{label}: {seed}" for label, seed in seeds.items())


def _scores(entries: Sequence[RunEntry]) -> list[Html]:
    caption = (
        "↓ lower is better, ↑ higher is better; the best value of a column is marked. How each "
        "number is defined stands below."
    )
    warning = flow_warning(entries)
    return [
        element("h2", "Scores and cost"),
        table(score_table(entries), caption=caption),
        *warning,
    ]


def _ensembles(entries: Sequence[RunEntry]) -> list[Html]:
    """What the samples of stochastic networks are worth; nothing where there are none."""
    rows = ensemble_table(entries)
    if rows is None:
        return []
    explanation = (
        "A stochastic network forecasts every sequence several times. Above stand the scores of "
        "its best sample by SSIM, which is chosen with the truth at hand: not the score of a "
        "single forecast. CRPS (lower is better; of a single forecast it is MAE / frame) and "
        "diversity are of all samples together."
    )
    return [element("h2", "Samples of stochastic networks"), element("p", explanation), table(rows)]


def _paired_differences(entries: Sequence[RunEntry], reference_label: str) -> list[Html]:
    """Each run minus the reference on the same sequences, as intervals and in words."""
    by_label = {entry.label: entry for entry in entries}
    if reference_label not in by_label:
        raise ValueError(
            f"reference_label={reference_label!r} is none of the runs {list(by_label)}: name one "
            "of them, or None to leave out the paired comparison."
        )
    reference = by_label[reference_label]
    rows, intervals = [], []
    for i, entry in enumerate(entries):
        if entry is reference:
            continue
        found = difference_from(reference, entry, "mse_per_frame")
        rows.append(
            Row(
                entry.scored,
                [
                    Cell(format_difference(found.mean)),
                    Cell(f"{format_difference(found.low)} to {format_difference(found.high)}"),
                    Cell(f"{found.fraction_lower:.0%}"),
                ],
                series=i,
            )
        )
        intervals.append(
            Interval(label=entry.scored, mean=found.mean, low=found.low, high=found.high, series=i)
        )

    def draw(theme: Theme) -> Figure:
        title = f"MSE per frame: method minus {reference_label}, lower is better"
        return interval_chart(intervals, title=title, theme=theme)

    headings = ["Method", "Mean difference", "95 % interval", "Sequences improved"]
    return [
        element("h2", f"Difference from {reference_label}, sequence by sequence"),
        element(
            "p",
            f"The same {reference.result.data.num_sequences:,} sequences predicted by both: MSE "
            f"per frame of the method minus that of {reference_label}. The interval is a "
            "bootstrap over sequences (10,000 resamples). It covers the choice of sequences, not "
            "the choice of a training seed.",
        ),
        element(
            "div",
            picture(draw, alt=f"Differences from {reference_label} with 95 % intervals"),
            table(TableData(headings, rows)),
            css="charts",
        ),
    ]


def _curves(entries: Sequence[RunEntry]) -> list[Html]:
    """Learning curves of the runs that have a log, and every run against lead time."""
    pictures = []
    if any(entry.run_directory for entry in entries):
        pictures.append(
            picture(
                partial(_learning_chart, entries),
                alt="Validation MSE per frame against training step",
            )
        )
    pictures += [picture(chart.draw, alt=chart.alt) for chart in _metric_charts(entries)]
    heading = element("h2", "Learning curves and lead times")
    return [heading, element("div", *pictures, css="charts")]


def _learning_chart(entries: Sequence[RunEntry], theme: Theme) -> Figure:
    curves, persistence, last_step = [], 0.0, 0
    for i, entry in enumerate(entries):
        if entry.run_directory is not None:
            run = read_learning_curve(entry.run_directory)
            curves.append(Curve(label=entry.label, x=run.steps, y=run.mse_per_frame, series=i))
            persistence = run.persistence_mse_per_frame
            last_step = max(last_step, run.steps[-1])
    reference = Curve(label="persistence", x=(0, last_step), y=(persistence, persistence))
    return learning_curves([reference, *curves], theme=theme)


def _metric_charts(entries: Sequence[RunEntry]) -> list[Chart]:
    return [
        Chart(
            f"lead_time_{name}",
            f"{METRICS[name].label} against lead time",
            partial(_lead_time_chart, name, entries),
        )
        for name in _CHART_METRICS
    ]


def _lead_time_chart(name: str, entries: Sequence[RunEntry], theme: Theme) -> Figure:
    def curve(rival: Contender) -> Curve:
        values = rival.result.per_lead_time[rival.forecast][name]
        lead_times = range(1, len(values) + 1)
        return Curve(label=rival.label, x=lead_times, y=values, series=rival.series)

    metric = METRICS[name]
    return lead_time_curves(
        [curve(rival) for rival in contenders(entries)],
        metric_label=metric.label,
        higher_is_better=metric.higher_is_better,
        theme=theme,
    )


def _gates(entries: Sequence[RunEntry]) -> list[Html]:
    parts = []
    for entry in entries:
        if entry.result.gates is not None:
            parts += [element("h3", entry.label), table(gate_table(entry.result.gates))]
    if not parts:
        return []
    explanation = (
        "How much of each teacher's imitated memory flows into the student's own: 0 is none, 1 is "
        "all. Averages over test sequences, time, channels and pixels; layer 0 is the lowest."
    )
    return [element("h2", "Mean transfer gates"), element("p", explanation), *parts]


def _examples(examples: Sequence[Example]) -> list[Html]:
    if not examples:
        return []
    explanation = (
        "Inputs, truth, and under it what each model predicted from the inputs alone. Errors are "
        "prediction minus truth: blue is too dark, orange too bright."
    )
    units = examples[0].units
    if units is not None and is_radar(units):
        explanation = (
            "Inputs, truth, and under it what each forecast made of the inputs alone. Errors are "
            "prediction minus truth: blue is too weak, orange too strong. Grey was not observed."
        )
    sections = []
    for example in examples:
        what = f"Sequence {example.sample_id}"
        strip = picture(
            partial(_strip, example),
            alt=f"{what}: input, truth, predictions of {', '.join(example.forecasts_TCHW)}",
            is_photo=True,
        )
        sections.append(element("section", element("h3", what), strip))
    return [
        element("h2", "Example predictions"),
        element("p", explanation),
        element("div", *sections, css="examples"),
    ]


def _strip(example: Example, theme: Theme) -> Figure:
    return prediction_strip(example, theme=theme)


def _notes(entries: Sequence[RunEntry], settings: PageSettings) -> list[Html]:
    methods = {(entry.result.model.method, entry.result.model.teachers) for entry in entries}
    notes = [
        f"Scores are averages over all {entries[0].result.data.num_sequences:,} sequences.",
        "Persistence repeats the last input frame and needs no training: a model is worth its "
        "cost only where it beats it.",
        *radar_notes(entries),
        *settings.notes,
    ]
    if len(methods) == len(entries):
        notes.insert(
            0,
            "Every method was trained once. A single seed ranks nothing: repeat with several "
            "seeds before concluding that one method is better than another.",
        )
    return [element("h2", "What this does and does not show"), bullet_list(notes)]


def _definitions(entries: Sequence[RunEntry]) -> list[Html]:
    texts = {name: text for entry in entries for name, text in entry.result.definitions.items()}
    if any(entry.seconds_per_batch is not None for entry in entries):
        texts["s/batch, train"] = (
            "wall time of one training iteration on all ranks of the run, waiting for data "
            "included, validation and checkpoints left out"
        )
    return [
        element("h2", "How the numbers are defined"),
        definition_list(list(texts.items()), css="terms"),
    ]


def _repeat(settings: PageSettings) -> list[Html]:
    commands = settings.repeat_commands or (settings.command,)
    return [element("h2", "How to repeat this"), element("pre", "\n".join(commands))]
