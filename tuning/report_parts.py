"""The parts of a search's report: charts, tables, and what they show in words.

Deliberately not here: the head and the end of the page (`report`), how numbers are written
(`report_words`), the drawing (`charts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tmu_dist.evaluation.page import Chart, Part
from tmu_dist.evaluation.tables import Cell, Row, TableData
from tmu_dist.ledger.words import NONE
from tuning.charts import Priced, TrialCurve, front_chart, spread_chart, trial_chart
from tuning.findings import Findings, PointFinding, Spread
from tuning.plan import Search
from tuning.records import TrialRecord
from tuning.report_fractions import fractions_part
from tuning.report_words import (
    ErrorWords,
    counted,
    format_operations,
    listed,
    state_in_words,
)
from tuning.space import FRACTION, show
from tuning.trial_table import all_records, relative_folder

MAX_ROWS = 200
"""Trials in the table of the page."""
_MAX_RANKED = 10
_LOG_SPAN = 10
"""Costs that differ by more are drawn on a logarithmic axis."""
_COST_LABELS = {
    "operations": "operations of training",
    "teachers": "number of teachers",
}


def all_parts(search: Search, findings: Findings, words: ErrorWords) -> list[Part]:
    """Everything between the verdict and the definitions; parts without a number are left out."""
    parts = [
        _ranking(findings, words),
        _sensitivities(search, findings, words),
        fractions_part(search, findings, words),
        _sources(findings, words),
        _fronts(findings, words),
        _curves(search, findings, words),
        _trials(search, findings, words),
    ]
    return [part for part in parts if part.charts or any(data.rows for data, _ in part.tables)]


def _ranking(findings: Findings, words: ErrorWords) -> Part:
    """The best points, whole ones only."""
    shown = findings.ranked[:_MAX_RANKED]
    rows = [
        Row(
            point.label,
            [
                Cell(str(point.number)),
                _error_cell(point, words, is_best=i == 0),
                Cell(_by_seed(point.error, words)),
                Cell(format_operations(point.operations)),
                Cell(str(len(point.sources))),
            ],
        )
        for i, point in enumerate(shown)
    ]
    headings = ["Settings", "Point", f"{words.label} ↓", "by seed", "Operations", "Teachers"]
    num_left_out = len(findings.points) - len(findings.ranked)
    caption = (
        f"Best first, {len(shown)} of {counted(len(findings.ranked), 'point')} trained whole with "
        "every seed. Validation error, mean ± standard deviation over seeds."
    )
    if num_left_out:
        caption += (
            f" {counted(num_left_out, 'other point')} cannot be compared: a seed is missing, was "
            "stopped early, failed or diverged."
        )
    return Part(heading="The best settings", tables=((TableData(headings, rows), caption),))


def _sensitivities(search: Search, findings: Findings, words: ErrorWords) -> Part:
    """How the error depends on each axis of numbers (the paper's Fig. 4); data apart."""
    texts, charts = [], []
    shown = [each for each in findings.sensitivities if each.axis != FRACTION]
    for found in shown:
        name = search.space.short(found.axis)
        marks = [(error, x, line) for line in found.lines for x, error in zip(line.xs, line.errors)]
        error, x, line = min(marks, key=lambda mark: mark[0].mean)
        xs = sorted({x for _, x, _ in marks})
        where = f" ({line.label})" if line.label else ""
        highest = max(mark[0].mean for mark in marks)
        texts.append(
            f"The error is lowest at {name} = {x:.4g}{where}: {words.spread(error)}. Over what was "
            f"tried, {xs[0]:.4g} to {xs[-1]:.4g}, means go up to {words.error(highest)}."
            + _at_the_edge(name, x, xs)
        )
        draw = partial(
            spread_chart,
            found.lines,
            title=f"Validation {words.label}",
            x_label=name,
            is_log=found.is_log,
            is_scatter=found.is_scatter,
            best=(x, error.mean),
        )
        alt = f"Validation {words.label} against {name}, lowest at {x:.4g}"
        charts.append(Chart(draw=draw, alt=alt))
    if any(not found.is_scatter for found in shown):
        texts.append(
            "Lines are means over seeds, bands one standard deviation, small dots single seeds; "
            "along a line nothing else changes. The ring marks the lowest mean."
        )
    if any(found.is_scatter for found in shown):
        texts.append(
            "Where there are no lines, each mark is a point with its spread over seeds; points "
            "differ in the other axes, too, so the marks do not show one axis alone."
        )
    return Part(heading="What the error depends on", texts=tuple(texts), charts=tuple(charts))


def _at_the_edge(name: str, x: float, xs: Sequence[float]) -> str:
    if len(xs) > 1 and x == xs[0]:
        return f" That is the lowest value tried: a lower {name} may be better still."
    if len(xs) > 1 and x == xs[-1]:
        return f" That is the highest value tried: a higher {name} may be better still."
    return ""


def _sources(findings: Findings, words: ErrorWords) -> Part:
    """Sets of sources, and what each source is worth (the paper's Tables 1, 4, 5 and 6)."""
    heading = "Which sources"
    subsets = sorted(findings.subsets, key=lambda each: _mean(each.point))
    if len(subsets) < 2 and not any(each.gate for each in findings.worth):
        return Part(heading=heading)
    texts, tables = [], []
    if len(subsets) > 1:
        best = subsets[0]
        texts.append(
            f"The best set of sources is {show(best.sources)}: {words.spread(best.point.error)}."
        )
        rows = [
            Row(
                show(each.sources),
                [
                    _error_cell(each.point, words, is_best=each is best),
                    Cell(str(len(each.sources))),
                    Cell(str(each.num_points)),
                    Cell(each.point.label, is_text=True),
                ],
            )
            for each in subsets
        ]
        headings = ["Sources", f"{words.label} ↓", "Teachers", "Points tried", "Best point"]
        tables.append((TableData(headings, rows), "Each set by its best point; lower is better."))
    if any(each.marginal or each.shapley or each.gate for each in findings.worth):
        texts += [text for text in (_worth_in_words(findings),) if text]
        tables.append(_worth_table(findings, words))
    return Part(heading=heading, texts=tuple(texts), tables=tuple(tables))


def _worth_table(findings: Findings, words: ErrorWords) -> tuple[TableData, str]:
    rows = [
        Row(
            each.source,
            [
                Cell(words.gain(each.marginal)),
                Cell(str(each.num_pairs)),
                Cell(words.gain(each.shapley)),
                Cell(NONE if each.shapley is None else "exact" if each.is_exact else "fitted"),
                Cell(NONE if each.gate is None else f"{each.gate:.3f}", bar=each.gate),
            ],
        )
        for each in findings.worth
    ]
    caption = (
        "Positive: the source lowers the error. The gate is the mean transfer gate in the best "
        "point that uses all sources: how much of a teacher's memory the student lets in."
    )
    headings = ["Source", "Marginal gain", "Pairs", "Shapley value", "how", "Mean gate"]
    return TableData(headings, rows), caption


def _worth_in_words(findings: Findings) -> str:
    """Whether gates and worth rank the sources alike."""
    known = [
        (each.source, each.shapley or each.marginal, each.gate)
        for each in findings.worth
        if each.gate is not None and (each.shapley or each.marginal) is not None
    ]
    if len(known) < 2:
        return ""
    by_worth = [name for name, worth, _ in sorted(known, key=lambda k: -k[1].mean if k[1] else 0)]
    by_gate = [name for name, _, gate in sorted(known, key=lambda k: -(k[2] or 0))]
    if by_worth == by_gate:
        return f"Gates and worth rank the sources alike: {listed(by_worth)}, best first."
    return (
        f"Gates and worth rank the sources differently: by worth {', '.join(by_worth)}; by gate "
        f"{', '.join(by_gate)}."
    )


def _fronts(findings: Findings, words: ErrorWords) -> Part:
    """Skill against each cost that differs between points."""
    charts, texts = [], []
    fronts_of: dict[int, list[str]] = {}
    for cost, front in findings.fronts.items():
        points = [point for point in findings.ranked if point.cost(cost) is not None]
        if len({point.cost(cost) for point in points}) < 2:
            continue
        shown = [point for number in front for point in points if point.number == number]
        texts.append(_front_in_words(shown, len(points), cost, words))
        charts.append(_front_chart(points, front, cost, words))
        for number in front:
            fronts_of.setdefault(number, []).append(cost)
    rows = [
        Row(
            str(point.number),
            [
                Cell(point.label, is_text=True),
                _error_cell(point, words),
                Cell(format_operations(point.operations)),
                Cell(str(len(point.sources))),
                Cell(" and ".join(fronts_of[point.number]), is_text=True),
            ],
        )
        for point in findings.ranked
        if point.number in fronts_of
    ]
    headings = [
        "Point",
        "Settings",
        f"{words.label} ↓",
        "Operations",
        "Teachers",
        "On the front of",
    ]
    caption = "The points of the fronts, by error. In the charts grey dots are all other points."
    return Part(
        heading="Skill against cost",
        texts=tuple(texts),
        charts=tuple(charts),
        tables=((TableData(headings, rows), caption),) if rows else (),
    )


def _front_in_words(
    shown: Sequence[PointFinding], num_points: int, cost: str, words: ErrorWords
) -> str:
    """From the cheapest to the best."""
    cheapest, best = shown[0], shown[-1]
    if len(shown) == 1:
        return f"By {cost}, {best.label} has both the lowest error and the lowest cost."
    return (
        f"By {cost}, {len(shown)} of {counted(num_points, 'point')} are beaten by no other in "
        f"both: from {cheapest.label} ({words.spread(cheapest.error)}) to {best.label} "
        f"({words.spread(best.error)}), which takes {_write_cost(best, cost)} in place of "
        f"{_write_cost(cheapest, cost)} {cost}."
    )


def _front_chart(
    points: Sequence[PointFinding], front: Sequence[int], cost: str, words: ErrorWords
) -> Chart:
    priced = [
        Priced(
            label=str(point.number),
            cost=point.cost(cost) or 0.0,
            error=_mean(point),
            is_on_front=point.number in front,
        )
        for point in points
    ]
    costs = [point.cost for point in priced]
    label = _COST_LABELS[cost]
    draw = partial(
        front_chart,
        priced,
        title=f"Validation {words.label}",
        x_label=label,
        is_log=0 < _LOG_SPAN * min(costs) < max(costs),
        write=format_operations,
    )
    return Chart(draw=draw, alt=f"Validation {words.label} against {label}, the front as steps")


def _curves(search: Search, findings: Findings, words: ErrorWords) -> Part:
    """Validation of all trials while they were trained, and where the scheduler cut."""
    best = {record.trial.number for point in findings.ranked[:1] for record in point.trials}
    curves = [
        TrialCurve(
            levels=[report.level for report in record.reports],
            errors=[report.error for report in record.reports],
            state=record.trial.state,
            is_best=record.trial.number in best,
        )
        for record in all_records(findings)
        if record.reports
    ]
    heading = "Every trial while it was trained"
    if not curves:
        return Part(heading=heading)
    by_fraction = search.options.fidelity == "fraction"
    x_label = "fraction of the target data" if by_fraction else "iterations"
    stopped = [r for r in all_records(findings) if r.trial.state == "stopped" and r.reports]
    texts = ["A line is a trial's lowest error so far. Those of the best point are drawn in full."]
    if stopped and not by_fraction:
        done = sum(record.reports[-1].step for record in stopped)
        planned = sum(record.num_steps for record in stopped)
        texts.append(
            f"{counted(len(stopped), 'trial')} stopped by the scheduler ran {done:,} of the "
            f"{planned:,} iterations that they would have had ({done / planned:.0%}); a cross "
            "marks where each ended."
        )
    elif stopped:
        texts.append("A cross marks where the scheduler stopped a trial.")
    chart = Chart(
        draw=partial(trial_chart, curves, title=f"Validation {words.label}", x_label=x_label),
        alt=f"Validation {words.label} of {counted(len(curves), 'trial')} against {x_label}",
    )
    return Part(heading=heading, texts=tuple(texts), charts=(chart,))


def _trials(search: Search, findings: Findings, words: ErrorWords) -> Part:
    """One row a trial: finished ones by error, then failed, open and stopped ones."""
    order = ("finished", "failed", "open", "stopped")
    records = sorted(
        all_records(findings),
        key=lambda r: (order.index(r.trial.state), r.error is None, r.error or 0.0),
    )
    axes = [axis.name for axis in search.space.axes]
    rows = [_trial_row(search, record, axes, words) for record in records[:MAX_ROWS]]
    caption = "Finished trials by error, then failed, unfinished and stopped ones."
    if len(records) > MAX_ROWS:
        caption += (
            f" The first {MAX_ROWS} of {len(records):,}: trials.csv and trials.parquet have all."
        )
    headings = ["Trial", "Point", *(search.space.short(name) for name in axes), "Seed",
                f"{words.label} ↓", "Iterations", "Seconds", "Operations", "Folder",
                "State"]  # fmt: skip
    return Part(heading="Trials", tables=((TableData(headings, rows), caption),))


def _trial_row(search: Search, record: TrialRecord, axes: Sequence[str], words: ErrorWords) -> Row:
    trial, last = record.trial, record.reports[-1] if record.reports else None
    return Row(
        f"{trial.number:04d}",
        [
            Cell(str(trial.point_number)),
            *(Cell(show(trial.point[name]) if name in trial.point else NONE) for name in axes),
            Cell(str(trial.seed)),
            Cell(words.error(record.error)),
            Cell(NONE if last is None else f"{last.step:,}"),
            Cell(NONE if last is None else f"{last.seconds:,.0f}"),
            Cell(format_operations(record.operations)),
            Cell(relative_folder(search, record)),
            Cell(state_in_words(search, record), is_text=True),
        ],
    )


def _error_cell(point: PointFinding, words: ErrorWords, *, is_best: bool = False) -> Cell:
    return Cell(words.spread(point.error), is_best=is_best)


def _by_seed(error: Spread | None, words: ErrorWords) -> str:
    return NONE if error is None else ", ".join(map(words.error, error.by_seed.values()))


def _mean(point: PointFinding) -> float:
    return float("inf") if point.error is None else point.error.mean


def _write_cost(point: PointFinding, cost: str) -> str:
    return str(len(point.sources)) if cost == "teachers" else format_operations(point.operations)
