"""The part of a search's report on the amount of target data (the paper's Fig. 7).

Deliberately not here: the other parts (`report_parts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from tmu_dist.evaluation.page import Chart, Part
from tmu_dist.evaluation.tables import Cell, Row, TableData
from tuning.charts import spread_chart
from tuning.findings import Findings, Line, PointFinding, Spread
from tuning.plan import Search, SearchConfig
from tuning.report_words import METHODS, ErrorWords, listed, paired_gain


def fractions_part(search: Search, findings: Findings, words: ErrorWords) -> Part:
    """Learning curves against the amount of target data (the paper's Fig. 7), by method."""
    heading = "How much target data it takes"
    lines = fraction_lines(search, findings)
    if len({x for line in lines for x in line.xs}) < 2:
        return Part(heading=heading)
    scratch = next((line for line in lines if line.label == METHODS["scratch"]), None)
    tables = [_fraction_table(lines, words)]
    texts = []
    if scratch is None:
        texts.append("Nothing was trained from scratch, so gains over that are not known.")
    elif len(lines) > 1:
        gains = _gains(scratch, lines)
        tables.append(_gain_table(gains, scratch, words))
        texts.append(_gains_in_words(gains, words))
    texts.append(
        "A method's line is at each fraction the best of its points there. Bands are one standard "
        "deviation over seeds, small dots single seeds."
    )
    return Part(
        heading=heading,
        texts=tuple(texts),
        charts=(_fraction_chart(lines, words),),
        tables=tuple(tables),
    )


def fraction_lines(search: Search, findings: Findings) -> tuple[Line, ...]:
    """Of each method, the error of its best point at each fraction of the target data.

    Where fractions are the fidelity, a point has an error at each one that all its seeds finished.
    """
    found: dict[str, dict[float, Spread]] = {}
    for point in findings.points:
        best = found.setdefault(METHODS.get(point.method, point.method), {})
        for fraction, error in _errors_by_fraction(point, search.options):
            if fraction not in best or error.mean < best[fraction].mean:
                best[fraction] = error
    return tuple(
        Line(label=method, xs=tuple(sorted(best)), errors=tuple(best[x] for x in sorted(best)))
        for method, best in found.items()
        if best
    )


def _errors_by_fraction(
    point: PointFinding, options: SearchConfig
) -> Iterable[tuple[float, Spread]]:
    if not options.fractions:
        if point.error is not None:
            yield point.fraction, point.error
        return
    for fraction in options.fractions:
        by_seed = {
            record.trial.seed: report.error
            for record in point.trials
            for report in record.reports
            if report.level == fraction
        }
        if by_seed.keys() >= set(options.seeds):
            yield fraction, Spread(by_seed=by_seed)


def _fraction_chart(lines: Sequence[Line], words: ErrorWords) -> Chart:
    return Chart(
        draw=partial(
            spread_chart,
            [_in_percent(line) for line in lines],
            title=f"Validation {words.label}",
            x_label="training sequences of the target [%]",
        ),
        alt=f"Validation {words.label} against the amount of target data, a line a method",
    )


def _in_percent(line: Line) -> Line:
    return Line(label=line.label, xs=tuple(100 * x for x in line.xs), errors=line.errors)


def _fraction_table(lines: Sequence[Line], words: ErrorWords) -> tuple[TableData, str]:
    fractions = sorted({x for line in lines for x in line.xs})
    rows = []
    for i, line in enumerate(lines):
        errors = dict(zip(line.xs, line.errors))
        rows.append(
            Row(line.label, [Cell(words.spread(errors.get(x))) for x in fractions], series=i)
        )
    headings = ["Method", *(f"{100 * x:.4g} %" for x in fractions)]
    caption = f"Validation {words.label} by share of the target's training sequences."
    return TableData(headings, rows), caption


def _gains(scratch: Line, lines: Sequence[Line]) -> dict[str, dict[float, Spread]]:
    """Of every other method, how much lower its error is at each fraction that both have."""
    base = dict(zip(scratch.xs, scratch.errors))
    found: dict[str, dict[float, Spread]] = {}
    for line in lines:
        if line is not scratch:
            pairs = {
                x: paired_gain(base[x], error)
                for x, error in zip(line.xs, line.errors)
                if x in base
            }
            found[line.label] = {x: gain for x, gain in pairs.items() if gain is not None}
    return found


def _gain_table(
    gains: dict[str, dict[float, Spread]], scratch: Line, words: ErrorWords
) -> tuple[TableData, str]:
    rows = [
        Row(method, [Cell(words.gain(by_fraction.get(x))) for x in scratch.xs])
        for method, by_fraction in gains.items()
    ]
    caption = (
        "Positive: a lower error than from scratch. Paired by seed, mean ± standard deviation."
    )
    headings = ["Gain over scratch", *(f"{100 * x:.4g} %" for x in scratch.xs)]
    return TableData(headings, rows), caption


def _gains_in_words(gains: dict[str, dict[float, Spread]], words: ErrorWords) -> str:
    """Each method's gain at the least and at the most data that it shares with scratch."""
    told = []
    for method, by_fraction in gains.items():
        ends = sorted({min(by_fraction), max(by_fraction)}) if by_fraction else []
        at = [f"{words.gain(by_fraction[x])} at {100 * x:.4g}\u00a0%" for x in ends]
        told += [f"{method} gains {' and '.join(at)}"] if at else []
    if not told:
        return "No fraction has both training from scratch and another method."
    return f"Over training from scratch, {listed(told)} of the target's training sequences."
