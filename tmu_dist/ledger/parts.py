"""The parts of a ledger's page: its tables, its charts and the words around them.

Deliberately not here: HTML and Markdown (`page`), numbers (`findings`), how they are
written (`words`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from functools import partial

from matplotlib.figure import Figure

from tmu_dist.evaluation.page import Chart, Part
from tmu_dist.evaluation.plots import Interval, Theme, interval_chart
from tmu_dist.evaluation.result import FLOW, FORECAST_LABELS, PERSISTENCE
from tmu_dist.evaluation.tables import Cell, Row, TableData, format_count
from tmu_dist.ledger.findings import (
    CONTROLS,
    MAIN,
    NO_TEACHERS,
    SCRATCH,
    Findings,
    ScoreFindings,
    SourceFinding,
    distinct_arms,
    first_result,
)
from tmu_dist.ledger.records import Ledger
from tmu_dist.ledger.statistics import MIN_POINTS, Difference
from tmu_dist.ledger.words import (
    BETTER,
    NONE,
    between,
    called,
    difference_cells,
    in_short,
    signed,
    spread,
    with_arrow,
)

_COLOURS = {"baseline": 4, "start": 1, "features": 2, "memory": 0, "subset": 0, "control": 3}
_CHARTED = (MAIN, "ssim", "csi")
_INTERVALS = ("95 % interval", "over seeds alone", "by seed")

_PAPER = {
    ("scratch", ()): (120.5, 0.712, "3.0 M / 3.0 M"),
    ("tmu_scratch", ()): (120.6, 0.715, NONE),
    ("finetune", (0,)): (114.8, 0.720, "3.0 M / 3.0 M"),
    ("finetune", (1,)): (110.0, 0.732, NONE),
    ("l2_sp", (0,)): (118.5, 0.703, "3.0 M / 3.0 M"),
    ("l2_sp", (1,)): (116.4, 0.705, NONE),
    ("knowledge_flow", (0, 1)): (107.2, 0.748, "10.1 M / 4.1 M"),
    ("art", (0, 1)): (105.0, 0.734, "10.1 M / 10.1 M"),
    ("tmu", (0,)): (96.1, 0.762, NONE),
    ("tmu", (1,)): (97.3, 0.756, NONE),
    ("tmu", (0, 1)): (94.7, 0.777, "9.5 M / 3.6 M"),
}
"""MSE, SSIM and parameters of the paper's Table 1, by method and numbers of the sources."""
_PAPER_RECIPES = ("digits-tmu", "paper-digits-tmu")
"""With the data and the backbone of that table."""


def all_parts(ledger: Ledger, findings: Findings) -> list[Part]:
    """Everything between the verdict and the notes; parts without a number are left out."""
    parts = [
        _costs_and_scores(ledger, findings),
        _from_scratch(ledger, findings),
        _controls(ledger, findings),
        _sources(ledger, findings),
    ]
    return [part for part in parts if part.tables]


def _costs_and_scores(ledger: Ledger, findings: Findings) -> Part:
    """The paper's Table 1, and beside it the paper's."""
    arms, scores = distinct_arms(ledger), findings.scores
    best = {
        found.score.name: (max if found.score.higher_is_better else min)(
            found.arms[arm.name].mean for arm in arms
        )
        for found in scores
    }
    rows = [_baseline_row(ledger, name, scores) for name in (PERSISTENCE, FLOW)]
    for arm in arms:
        records = list(arm.seeds.values())
        cost = records[0].evaluation.parameters
        test_ms = [record.evaluation.runtime.ms_per_sequence_batch_1 for record in records]
        cells = [
            Cell(", ".join(arm.sources) or "none", is_text=True),
            Cell(format_count(cost.train)),
            Cell(format_count(cost.test)),
            Cell(f"{statistics.median(record.seconds_per_batch for record in records):.3f}"),
            Cell(f"{statistics.median(test_ms):.1f}"),
        ]
        for found in scores:
            own = found.arms[arm.name]
            is_best = own.mean == best[found.score.name]
            cells.append(Cell(spread(own, found.score.decimals), is_best=is_best))
        rows.append(Row(arm.label, [*cells, Cell(str(len(records)))], series=_COLOURS[arm.group]))
    headings = [
        *(
            "Method",
            "Sources",
            "Weights, train",
            "Weights, test",
            "s/batch, train",
            "ms/seq., test",
        ),
        *(with_arrow(found.score) for found in scores),
        "Seeds",
    ]
    caption = (
        "Scores: mean ± standard deviation over seeds; a single seed has none. ↓ lower is better, "
        "↑ higher is better, the best mean of a column is marked. Times are medians over runs "
        "that may have shared their cores with others: they are no benchmark."
    )
    tables = [(TableData(headings, [row for row in rows if row is not None]), caption)]
    if ledger.recipe in _PAPER_RECIPES and SCRATCH in findings.main.arms:
        tables += _beside_the_paper(ledger, findings)
    return Part(heading="Scores and cost", tables=tuple(tables))


def _baseline_row(ledger: Ledger, forecast: str, scores: Sequence[ScoreFindings]) -> Row | None:
    result = first_result(ledger)
    if forecast not in result.overall:
        return None
    cells = [Cell("none", is_text=True), *[Cell(NONE)] * 4]
    for found in scores:
        score = found.score
        if score.name in result.overall[forecast]:
            value = result.overall[forecast][score.name]
        else:
            assert result.radar is not None
            value = float(result.radar.forecasts[forecast].mean(score.name)[0])
        cells.append(Cell(f"{value:.{score.decimals}f}"))
    return Row(FORECAST_LABELS[forecast], [*cells, Cell(NONE)])


def _beside_the_paper(ledger: Ledger, findings: Findings) -> list[tuple[TableData, str]]:
    """Arms that Table 1 has, too."""
    mse, ssim = (
        next(found.arms for found in findings.scores if found.score.name == name)
        for name in ("mse_per_frame", "ssim")
    )
    rows = []
    for arm in distinct_arms(ledger):
        numbers = tuple(ledger.sources.index(source) for source in arm.sources)
        paper = _PAPER.get((arm.method, numbers))
        if paper is None or arm.group == "control" or arm.name == "scratch-longer":
            continue
        their_mse, their_ssim, their_weights = paper
        cost = next(iter(arm.seeds.values())).evaluation.parameters
        texts = (
            spread(mse[arm.name], 1),
            f"{their_mse:.1f}",
            f"{mse[arm.name].mean / mse[SCRATCH].mean:.3f}",
            f"{their_mse / _PAPER['scratch', ()][0]:.3f}",
            spread(ssim[arm.name], 3),
            f"{their_ssim:.3f}",
            f"{format_count(cost.train)} / {format_count(cost.test)}",
            their_weights,
        )
        sources = Cell(", ".join(arm.sources) or "none", is_text=True)
        rows.append(Row(arm.label, [sources, *map(Cell, texts)], series=_COLOURS[arm.group]))
    headings = [
        *("Method", "Sources", "MSE / frame", "paper", "in parts of scratch", "paper"),
        *("SSIM", "paper", "Weights, train / test", "paper"),
    ]
    caption = (
        "Beside Table 1 of the paper, which is of frames of 64x64 pixels, four layers of 64 "
        "channels and 80,000 iterations: at another size only the parts of scratch can be set side "
        "by side. The paper gives no spread over seeds, and its runtimes are of another machine."
    )
    return [(TableData(headings, rows), caption)] if rows else []


def _from_scratch(ledger: Ledger, findings: Findings) -> Part:
    main = findings.main
    arms = [arm for arm in distinct_arms(ledger) if arm.name in main.from_scratch]
    if not arms:
        return Part(heading="Difference from scratch")
    rows = [
        Row(
            called(arm, ledger),
            difference_cells(main.from_scratch[arm.name], main.score),
            series=_COLOURS[arm.group],
        )
        for arm in arms
    ]
    others = [
        Row(
            called(arm, ledger),
            [Cell(in_short(f.from_scratch[arm.name], f.score)) for f in findings.scores[1:]],
            series=_COLOURS[arm.group],
        )
        for arm in arms
    ]
    return Part(
        heading="Difference from scratch",
        texts=(
            "Each method minus training from scratch, paired by seed and by test sequence. Dots "
            "are means over seeds, lines are 95 % intervals of the two-way bootstrap.",
        ),
        charts=tuple(
            _chart(
                f"{found.score.label}: method minus scratch, "
                f"{'higher' if found.score.higher_is_better else 'lower'} is better",
                [
                    (called(arm, ledger), found.from_scratch[arm.name], _COLOURS[arm.group])
                    for arm in arms
                ],
            )
            for found in findings.scores
            if found.score.name in _CHARTED
        ),
        tables=(
            (TableData([main.score.label, "minus scratch", *_INTERVALS], rows), ""),
            (
                TableData(
                    ["The same of", *(with_arrow(f.score) for f in findings.scores[1:])], others
                ),
                "",
            ),
        ),
    )


def _controls(ledger: Ledger, findings: Findings) -> Part:
    """What memory transfer gains over arms that have all of it but the knowledge."""
    main = findings.main
    known = {name: found for name, found in main.controls.items() if found is not None}
    names = {name: called(arm, ledger) for arm in ledger.arms if (name := arm.name) in known}
    rows = [
        Row(
            names[name],
            [
                Cell(CONTROLS.get(name, "the plain network"), is_text=True),
                *difference_cells(found, main.score),
                Cell(BETTER[found.flag], is_text=True),
            ],
        )
        for name, found in known.items()
    ]
    others = [
        Row(names[name], [Cell(in_short(f.controls[name], f.score)) for f in findings.scores[1:]])
        for name in known
    ]
    if not rows:
        return Part(heading="Knowledge or parameters?")
    check = {
        None: "not possible, as one of the two has no run",
        True: "yes",
        False: "NO: something in this ledger is broken, and none of its numbers should be trusted",
    }[findings.same_bits]
    explanation = (
        "By how much memory transfer from all sources is better: positive is better, by "
        f"{main.score.label}. Each control lacks what the teachers know and keeps something else "
        "that could explain a gain over scratch."
    )
    headings = ["Gain over", "which has", "gain", *_INTERVALS, "memory transfer is"]
    more = ["Gain over", *(f.score.label for f in findings.scores[1:])]
    return Part(
        heading="Knowledge or parameters?",
        texts=(
            explanation,
            *_shares(main),
            "Self-check: without imitation (beta = 0) the teachers must change nothing, so that "
            "these runs score as the network built without teachers does, to the last bit: "
            f"{check}.",
        ),
        charts=tuple(
            _chart(
                f"{found.score.label}: gain of memory transfer over …",
                [(names[name], found.controls[name], 0) for name in known],
            )
            for found in findings.scores
            if found.score.name in _CHARTED
        ),
        tables=((TableData(headings, rows), ""), (TableData(more, others), "")),
    )


def _shares(main: ScoreFindings) -> list[str]:
    """What the parameters and what the teachers add, where the network ran without teachers."""
    parameters, teachers = main.from_scratch.get(NO_TEACHERS), main.controls[NO_TEACHERS]
    if parameters is None or teachers is None:
        return []
    return [
        f"The parameters alone change {main.score.label} by {in_short(parameters, main.score)} "
        f"against scratch; the teachers then gain {in_short(teachers, main.score)}."
    ]


def _sources(ledger: Ledger, findings: Findings) -> Part:
    """What each source is worth, and how far its gate is open."""
    score = findings.main.score
    known = {
        source: found
        for source, found in findings.main.sources.items()
        if found.contribution is not None or found.alone is not None
    }
    if not known:
        return Part(heading="What each source is worth")
    rows = [Row(name, _source_cells(found, findings, name)) for name, found in known.items()]
    others = [
        Row(
            name,
            [
                Cell(in_short(each, found.score))
                for found in findings.scores[1:]
                for each in (found.sources[name].contribution, found.sources[name].alone)
            ],
        )
        for name in known
    ]
    headings = [
        *("Source", "contribution", "95 % interval", "over seeds alone", "alone", "95 % interval"),
        *("mean gate", "this source"),
    ]
    more = [f"{found.score.label}: {what}" for found in findings.scores[1:]
            for what in ("contribution", "alone")]  # fmt: skip
    return Part(
        heading="What each source is worth",
        texts=(
            "Contribution: error without the source minus error with all sources. Alone: error of "
            "the network without teachers minus error with this source only. Positive is better "
            f"for both, by {score.label}. A source “helps” where both whole intervals of its "
            "contribution are above zero, is “negative transfer” where both are below, and is "
            "“undecided” otherwise. Mean gates are those of the student with all sources.",
            _gates_in_words(findings),
        ),
        charts=tuple(
            _chart(
                f"{found.score.label}: gain by source, positive is better",
                [
                    mark
                    for name in known
                    for mark in (
                        (f"{name}: contribution", found.sources[name].contribution, 0),
                        (f"{name}: alone", found.sources[name].alone, 1),
                    )
                ],
            )
            for found in findings.scores
            if found.score.name in _CHARTED
        ),
        tables=((TableData(headings, rows), ""), (TableData(["The same of", *more], others), "")),
    )


def _source_cells(found: SourceFinding, findings: Findings, source: str) -> list[Cell]:
    """Contribution with both intervals, worth alone, mean gate, and what follows."""
    decimals = findings.main.score.decimals + 1
    first, second = (
        (NONE, NONE)
        if each is None
        else (signed(each.mean, decimals), between((each.low, each.high), decimals))
        for each in (found.contribution, found.alone)
    )
    student = None if found.contribution is None else found.contribution.student
    gates = findings.gates.get(source)
    texts = (*first, between(student, decimals), *second)
    flag = NONE if found.contribution is None else found.contribution.flag
    gate = NONE if gates is None else spread(gates, 3)
    return [*map(Cell, texts), Cell(gate), Cell(flag, is_text=True)]


def _gates_in_words(findings: Findings) -> str:
    """How contribution and gate (Table 5) go together."""
    count = sum(
        found.contribution is not None and source in findings.gates
        for source, found in findings.main.sources.items()
    )
    if findings.gate_relation is None:
        sources = f"{count} source{' is' if count == 1 else 's are'}"
        return (
            f"Whether sources with open gates contribute more cannot be said: {sources} too few "
            f"for a correlation, which takes {MIN_POINTS}."
        )
    pearson, spearman = findings.gate_relation
    return (
        f"Contribution and mean transfer gate over these {count} sources: Pearson "
        f"{signed(pearson, 2)}, Spearman {signed(spearman, 2)}. So few points describe these "
        "sources and say nothing about others."
    )


def _chart(title: str, marks: Iterable[tuple[str, Difference | None, int]]) -> Chart:
    intervals = [
        Interval(label=label, mean=found.mean, low=found.low, high=found.high, series=series)
        for label, found, series in marks
        if found is not None and math.isfinite(found.high - found.low)
    ]
    return Chart(
        draw=partial(draw_intervals, intervals, title), alt=f"{title}, with 95 % intervals"
    )


def draw_intervals(intervals: Sequence[Interval], title: str, theme: Theme) -> Figure:
    """`interval_chart` as a page's charts draw it."""
    return interval_chart(intervals, title=title, theme=theme)
