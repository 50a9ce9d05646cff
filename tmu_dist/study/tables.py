"""The parts of a study's page: its tables and charts, and the words in them.

Deliberately not here: what follows from the runs (`verdicts`), HTML and Markdown (`page`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress

from matplotlib.figure import Figure

from tmu_dist.evaluation.page import Chart, Part
from tmu_dist.evaluation.plots import (
    Curve,
    Interval,
    Theme,
    setting_curves,
)
from tmu_dist.evaluation.tables import Cell, Row, TableData, format_count
from tmu_dist.ledger.parts import draw_intervals
from tmu_dist.ledger.words import NONE, between, in_three_digits, signed
from tmu_dist.study.design import Study
from tmu_dist.study.learning import learning
from tmu_dist.study.record import (
    ClaimFacts,
    PairFacts,
    RowFacts,
    ScoreFacts,
    StudyRecord,
)

VERDICTS = {
    "holds": "holds",
    "opposite": "DOES NOT HOLD: the opposite does",
    "undecided": "undecided",
    "not run": "not run",
}
_PAIR_VERDICTS = VERDICTS | {"opposite": "the opposite"}


def all_parts(study: Study, record: StudyRecord) -> list[Part]:
    """Everything between the lead and the notes; parts without a table are left out."""
    parts = [
        _results(study, record),
        _claims(record),
        _orders(record),
        _figure(study, record),
        learning(record),
        _costs(study, record),
        _data(record),
    ]
    return [part for part in parts if part.tables]


def lead(record: StudyRecord) -> str:
    """How many of the claims hold, in a sentence."""
    counts = dict.fromkeys(VERDICTS, 0)
    for claim in record.claims:
        counts[claim.verdict] += 1
    words = {"holds": "holding", "opposite": "turned round", "undecided": "undecided",
             "not run": "without runs"}  # fmt: skip
    found = [f"{counts[verdict]} {text}" for verdict, text in words.items() if counts[verdict]]
    total = len(record.claims)
    text = f"Of {total} claim{'' if total == 1 else 's'}: {', '.join(found)}."
    if record.has_stand_ins:
        text += " Other clips stand in for Human3.6M or Weizmann, as the data on this page say."
    return text


def _results(study: Study, record: StudyRecord) -> Part:
    """The paper's table, where it has one, with ours beside it."""
    has_reference = any(study.reference_of(group) is not None for group in study.groups)
    has_published = any(row.published for row in record.rows)
    blank = [Cell(NONE)] * (1 + 2 * has_reference)
    rows = [
        Row(
            name,
            [
                Cell("none", is_text=True),
                *(cell for score in record.scores for cell in _baseline_cells(own, score)),
                *blank,
            ],
        )
        for name, own in record.baselines.items()
    ]
    best = {
        (score.name, group): _best(record, score, group)
        for score in record.scores
        for group in study.groups
    }
    for row in record.rows:
        cells = [Cell(row.sources, is_text=True)]
        for score in record.scores:
            cells += _score_cells(row, score, is_best=best[score.name, row.group] == row.key)
        cells += _parts_of_reference(study, record, row) if has_reference else []
        rows.append(Row(row.label, [*cells, Cell(str(len(row.seeds)))], series=row.series))
    headings = ["Row", "Sources"]
    for score in record.scores:
        headings += [f"{_with_arrow(score)}, paper", f"{_with_arrow(score)}, ours", "ours − paper"]
    if has_reference:
        headings += ["of the reference, paper", "of the reference, ours"]
    caption = (
        "Ours: mean ± standard deviation over seeds; a single seed has none. The best mean is "
        "marked."
    )
    if has_reference:
        caption += (
            " “Of the reference” is the first score in parts of that of the row without transfer: "
            "at another size than the paper's only these can be set side by side."
        )
    return Part(
        heading="The paper's values and ours" if has_published else "Values",
        tables=((_without_empty(TableData([*headings, "Seeds"], rows)), caption),),
    )


def _without_empty(table: TableData) -> TableData:
    """Without columns that say nothing: the paper's, where it gives no numbers (Figs. 4 and 7)."""
    columns = zip(*(row.cells for row in table.rows), strict=True)
    kept = [any(cell.text != NONE for cell in column) for column in columns]
    headings = [table.headings[0], *compress(table.headings[1:], kept)]
    rows = [replace(row, cells=list(compress(row.cells, kept))) for row in table.rows]
    return TableData(headings, rows)


def _baseline_cells(own: Mapping[str, float], score: ScoreFacts) -> list[Cell]:
    value = own.get(score.name)
    text = NONE if value is None else in_three_digits([value], score.decimals)
    return [Cell(NONE), Cell(text), Cell(NONE)]


def _score_cells(row: RowFacts, score: ScoreFacts, *, is_best: bool) -> list[Cell]:
    theirs, values = row.published.get(score.name), row.values(score.name)
    minus = (
        NONE
        if theirs is None or not values
        else signed(statistics.fmean(values) - theirs, score.decimals)
    )
    paper = NONE if theirs is None else f"{theirs:.{score.decimals}f}"
    return [Cell(paper), Cell(over_seeds(row, score), is_best=is_best), Cell(minus)]


def over_seeds(row: RowFacts, score: ScoreFacts) -> str:
    """Mean and standard deviation, with three digits or more; a dash without runs."""
    values = row.values(score.name)
    return in_three_digits(values, score.decimals) if values else NONE


def _best(record: StudyRecord, score: ScoreFacts, group: str) -> str | None:
    """The row of a group with the best mean."""
    means = {
        row.key: statistics.fmean(row.values(score.name))
        for row in record.rows
        if row.group == group and row.values(score.name)
    }
    pick = max if score.higher_is_better else min
    return pick(means, key=lambda key: means[key]) if means else None


def _parts_of_reference(study: Study, record: StudyRecord, row: RowFacts) -> list[Cell]:
    reference = study.reference_of(row.group)
    if reference is None:
        return [Cell(NONE)] * 2
    name, base = record.scores[0].name, record.row(reference.key)

    def part(values: Sequence[float], of: Sequence[float]) -> Cell:
        return Cell(
            f"{statistics.fmean(values) / statistics.fmean(of):.3f}" if values and of else NONE
        )

    theirs = ([facts.published[name]] if name in facts.published else [] for facts in (row, base))
    return [part(*theirs), part(row.values(name), base.values(name))]


def _claims(record: StudyRecord) -> Part:
    """Each claim with its verdict, then the comparisons behind it that have runs."""
    verdicts = [
        Row(
            claim.text,
            [
                Cell(claim.where, is_text=True),
                Cell(VERDICTS[claim.verdict], is_text=True),
                Cell(_tally(claim), is_text=True),
            ],
        )
        for claim in record.claims
    ]
    pairs = [
        Row(_pair(record, pair), _pair_cells(record, claim, pair))
        for claim in record.claims
        for pair in claim.pairs
        if pair.verdict != "not run"
    ]
    headings = ["Comparison", "claim", "score", "gain", "95 % interval", "over seeds alone",
                "by seed", "verdict"]  # fmt: skip
    gain = (
        "Gain: by how much the first row is better than the second; positive is better, whatever "
        "the score."
    )
    tables = [(TableData(["Claim", "Where", "Verdict", "Comparisons"], verdicts), "")]
    if pairs:
        tables.append((TableData(headings, pairs), gain))
    return Part(heading="Claims and verdicts", charts=_gain_charts(record), tables=tuple(tables))


def _tally(claim: ClaimFacts) -> str:
    """How its comparisons ended: "5 of 6 hold, 1 undecided"."""
    counts = {verdict: sum(pair.verdict == verdict for pair in claim.pairs) for verdict in VERDICTS}
    words = _PAIR_VERDICTS | {"holds": "hold"}
    rest = [f"{counts[name]} {text}" for name, text in words.items() if counts[name]]
    return f"of {len(claim.pairs)}: {', '.join(rest)}"


def _pair(record: StudyRecord, pair: PairFacts) -> str:
    return f"{record.row(pair.better).name} / {record.row(pair.worse).name}"


def _pair_cells(record: StudyRecord, claim: ClaimFacts, pair: PairFacts) -> list[Cell]:
    score = record.score(pair.score) if _has_score(record, pair.score) else None
    found, verdict = pair.gain, Cell(_PAIR_VERDICTS[pair.verdict], is_text=True)
    label = Cell(score.label if score else pair.score, is_text=True)
    if found is None or score is None:
        return [Cell(claim.key, is_text=True), label, *[Cell(NONE)] * 4, verdict]
    decimals = score.decimals + 1
    return [
        Cell(claim.key, is_text=True),
        label,
        Cell(signed(found.mean, decimals)),
        Cell(between((found.low, found.high), decimals)),
        Cell(between(found.student, decimals)),
        Cell(", ".join(signed(value, decimals) for value in found.by_seed)),
        verdict,
    ]


def _has_score(record: StudyRecord, name: str) -> bool:
    return any(score.name == name for score in record.scores)


def _orders(record: StudyRecord) -> Part:
    """Whether rows are ordered as in the paper."""

    def named(pairs: Sequence[tuple[str, str]]) -> str:
        return "; ".join(f"{better} over {worse}" for better, worse in pairs) or NONE

    rows = [
        Row(
            found.group or "all rows",
            [
                Cell(record.score(found.score).label, is_text=True),
                Cell(signed(found.tau, 2)),
                Cell(str(len(found.same))),
                Cell(named(found.opposite), is_text=True),
                Cell(str(len(found.undecided))),
                Cell(VERDICTS[found.verdict], is_text=True),
            ],
        )
        for found in record.orderings
    ]
    if not rows:
        return Part(heading="The whole order")
    headings = ["Rows", "score", "Kendall's tau", "pairs as in the paper",
                "pairs the other way (the paper's order is named)", "undecided pairs",
                "the order"]  # fmt: skip
    caption = (
        "Every two rows compared as the claims' pairs are. Tau is of the means alone: 1 is the "
        "paper's order, −1 its reverse. Of many pairs, some are decided by chance."
    )
    return Part(heading="The whole order", tables=((TableData(headings, rows), caption),))


def _figure(study: Study, record: StudyRecord) -> Part:
    """The paper's figure: a score against what changes, a line for each method."""
    if study.axis is None:
        return Part(heading="")
    charts, tables = [], []
    for score in record.scores:
        curves, spreads = _curves(record, score)
        if not curves:
            continue
        title = f"{score.label}, {'higher' if score.higher_is_better else 'lower'} is better"
        charts.append(
            Chart(
                draw=partial(_draw_curves, curves, spreads, title, study.axis.label,
                             study.axis.is_log),
                alt=f"{title}, against {study.axis.label}; the table has the same numbers",
            )
        )  # fmt: skip
        xs = sorted({row.x for row in record.rows if row.x is not None})
        rows = [
            Row(curve.label, [Cell(_at(record, score, curve.label, x)) for x in xs],
                series=curve.series)
            for curve in curves
        ]  # fmt: skip
        tables.append((TableData([score.label, *(f"{x:g}" for x in xs)], rows), ""))
    return Part(
        heading=f"Against {study.axis.label}",
        texts=("Lines are means over seeds, bars their standard deviation.",),
        charts=tuple(charts),
        tables=tuple(tables),
    )


def _line_of(row: RowFacts) -> str:
    """Rows of one line differ in x alone."""
    name = row.label.partition(",")[0]
    return name if row.sources == "none" else f"{name} ({row.sources})"


def _at(record: StudyRecord, score: ScoreFacts, line: str, x: float) -> str:
    rows = [row for row in record.rows if _line_of(row) == line and row.x in (x, None)]
    return over_seeds(rows[0], score) if rows else NONE


def _curves(record: StudyRecord, score: ScoreFacts) -> tuple[list[Curve], dict[str, list[float]]]:
    """A curve of means for each line, and deviations over seeds; references go all along."""
    ends = [row.x for row in record.rows if row.x is not None and row.values(score.name)]
    lines: dict[str, list[RowFacts]] = {}
    for row in record.rows:
        if row.values(score.name):
            lines.setdefault(_line_of(row), []).append(row)
    curves, spreads = [], {}
    for number, (label, rows) in enumerate(lines.items()):
        means = [statistics.fmean(row.values(score.name)) for row in rows]
        if rows[0].x is None:
            if ends:
                curves.append(Curve(label=label, x=(min(ends), max(ends)), y=(means[0],) * 2))
            continue
        xs = [row.x for row in rows if row.x is not None]
        curves.append(Curve(label=label, x=xs, y=means, series=number))
        spreads[label] = [
            statistics.stdev(values) if len(values := row.values(score.name)) > 1 else 0.0
            for row in rows
        ]
    return curves, spreads


def _draw_curves(
    curves: Sequence[Curve],
    spreads: dict[str, list[float]],
    title: str,
    x_label: str,
    is_log: bool,
    theme: Theme,
) -> Figure:
    return setting_curves(curves, spreads, title=title, x_label=x_label, is_log=is_log, theme=theme)


def _gain_charts(record: StudyRecord) -> tuple[Chart, ...]:
    """By how much rows are better than those that they are claimed to beat, by score."""
    charts = []
    for score in record.scores:
        marks: dict[str, Interval] = {}
        for claim in record.claims:
            for pair in claim.pairs:
                found, label = pair.gain, _pair(record, pair)
                if pair.score != score.name or found is None or found.low == found.high:
                    continue
                marks[label] = Interval(
                    label=label, mean=found.mean, low=found.low, high=found.high,
                    series=record.row(pair.better).series,
                )  # fmt: skip
        if marks:
            title = f"{score.label}: gain of the first over the second"
            charts.append(
                Chart(
                    draw=partial(draw_intervals, list(marks.values()), title),
                    alt=f"{title}, with 95 % intervals; the table has the same numbers",
                )
            )
    return tuple(charts)


def _costs(study: Study, record: StudyRecord) -> Part:
    """Weights and times, beside the paper's where it has them."""
    rows = []
    for row in record.rows:
        if not row.seeds:
            continue
        first, paper = next(iter(row.seeds.values())), study.costs.get(row.key, {})
        runs = list(row.seeds.values())
        seconds = statistics.median(run.seconds_per_batch for run in runs)
        alone = statistics.median(run.ms_per_sequence for run in runs)
        cells = [
            Cell(format_count(first.parameters_train)),
            Cell(_count(paper.get("parameters_train"))),
            Cell(format_count(first.parameters_test)),
            Cell(_count(paper.get("parameters_test"))),
            Cell(f"{seconds:.3f}"),
            Cell(_number(paper.get("seconds_per_batch"), 2)),
            Cell(f"{alone:.1f}"),
            Cell(_number(paper.get("ms_per_sequence"), 1)),
        ]
        rows.append(Row(row.label, [Cell(row.sources, is_text=True), *cells]))
    headings = ["Row", "Sources", "Weights, train", "paper", "Weights, test", "paper",
                "s/batch, train", "paper", "ms/sequence, test", "paper"]  # fmt: skip
    hours = sum(
        run.seconds_per_batch * row.num_steps / 3600
        for row in record.distinct_rows
        for run in row.seeds.values()
    )
    caption = (
        f"Times are medians over runs that may have shared their machine ({record.machine}) with "
        f"others: they are no benchmark. Training of these runs took {hours:.1f} hours of it."
    )
    tables = ((_without_empty(TableData(headings, rows)), caption),) if rows else ()
    return Part(heading="Cost", tables=tables)


def _count(value: float | None) -> str:
    return NONE if value is None else f"{value / 1e6:.1f} M"


def _number(value: float | None, decimals: int) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def _data(record: StudyRecord) -> Part:
    """Which archives and teachers."""
    archives = [
        Row(
            found.name,
            [
                Cell(found.role, is_text=True),
                Cell(found.original, is_text=True),
                Cell("x".join(map(str, found.frame))),
                Cell(", ".join(f"{name} {count:,}" for name, count in found.sequences.items())),
                Cell(found.manifest_hash[:12]),
            ],
        )
        for found in record.archives
    ]
    teachers = [
        Row(
            found.name,
            [
                Cell(found.archive, is_text=True),
                Cell(f"{found.steps:,}"),
                Cell(found.weights_sha256[:12]),
            ],
        )
        for found in record.teachers
    ]
    tables = [
        (TableData(["Archive", "role", "of", "frames", "sequences", "manifest"], archives), "")
    ] if archives else []  # fmt: skip
    if teachers:
        headings = ["Teacher", "learned from", "iteration of its weights", "sha256"]
        tables.append((TableData(headings, teachers), ""))
    return Part(heading="Data and teachers", tables=tuple(tables))


def _with_arrow(score: ScoreFacts) -> str:
    return f"{score.label}\u00a0{'↑' if score.higher_is_better else '↓'}"
