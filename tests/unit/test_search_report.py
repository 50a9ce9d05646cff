"""The report of a search: every number on it follows from the trials, whatever trials there are."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from tests.evaluated_runs import PageText
from tmu_dist.config import RunConfig, TransferConfig
from tmu_dist.evaluation.plots import DARK, LIGHT
from tmu_dist.html_page import Html, element
from tuning.best import BestResult
from tuning.charts import Priced, TrialCurve, front_chart, spread_chart, trial_chart
from tuning.findings import Line, Spread, find
from tuning.journal import State, Trial
from tuning.plan import Search, SearchConfig
from tuning.records import Report, TrialRecord
from tuning.report import page, write_report
from tuning.report_fractions import fraction_lines
from tuning.report_parts import MAX_ROWS
from tuning.report_words import format_operations, format_seconds, listed
from tuning.space import FRACTION, SOURCES, Axis, Point, Space
from tuning.trial_table import trial_columns

BETA = "transfer.beta"
SETS = ((), ("1",), ("2",), ("1", "2"))
NONEMPTY = SETS[1:]
GAIN = {"1": 1.5, "2": 3.0}
SEEDS = (0, 1, 2)
STEPS = 120

SPACE = Space(
    name="beta-sources-fractions",
    axes=(
        Axis(name=SOURCES, values=SETS),
        Axis(
            name=BETA,
            values=(0.001, 0.01, 0.1, 1.0),
            low=0.001,
            high=1.0,
            is_log=True,
            when={SOURCES: NONEMPTY},
        ),
        Axis(name=FRACTION, values=(0.5, 1.0)),
    ),
)


def search_of(space: Space = SPACE, **options: Any) -> Search:
    transfer = TransferConfig(method="tmu", teachers=("/t/teacher-1", "/t/teacher-2"))
    return Search(
        folder="/searches/first",
        recipe="digits-tmu",
        command="python tuning/search.py --out SEARCH",
        base=RunConfig(transfer=transfer),
        space=space,
        options=SearchConfig(**{"seeds": SEEDS, **options}),
    )


def error_of(point: Point, seed: int) -> float:
    """Lowest at beta = 0.1 with both sources and all of the data; 30 and a little of the seed."""
    sources = point.get(SOURCES, ("1", "2"))
    assert isinstance(sources, tuple)
    beta, fraction = point.get(BETA), point.get(FRACTION, 1.0)
    assert isinstance(fraction, float)
    error = 34.5 - sum(GAIN[source] for source in sources) + 12 * (1 - fraction)
    if isinstance(beta, float):
        error += 1.2 * abs(math.log10(beta) + 1)
    return error + (-0.4, 0.0, 0.4)[seed % 3]


def record_of(
    trial: Trial, *, steps: int = STEPS, error: Callable[[Point, int], float] = error_of
) -> TrialRecord:
    """A trial that was validated every 20 iterations, whose error falls to its last one."""
    sources = trial.point.get(SOURCES, ("1", "2"))
    assert isinstance(sources, tuple)
    last = error(trial.point, trial.seed)
    reports = tuple(
        Report(
            level=step,
            error=last * (1 + 2.5 * (math.exp(-step / 25) - math.exp(-STEPS / 25))),
            step=step,
            seconds=0.25 * step,
        )
        for step in range(20, steps + 1, 20)
    )
    fraction = trial.point.get(FRACTION, 1.0)
    assert isinstance(fraction, float)
    return TrialRecord(
        trial=trial,
        folder=f"/searches/first/trials/{trial.number:04d}",
        reports=reports,
        sources=tuple(map(str, sources)),
        method="tmu" if sources else "scratch",
        fraction=fraction,
        num_steps=STEPS,
        gates=tuple({"1": 0.41, "2": 0.58}[source] for source in sources),
        operations=1e9 * steps * (1 + len(sources)),
    )


def records_of(
    space: Space = SPACE, states: Mapping[int, State] | None = None
) -> list[TrialRecord]:
    """A trial of every point and seed; all finished but those of `states`, by number."""
    return [*_records(space, states or {})]


def _records(space: Space, states: Mapping[int, State]) -> Iterator[TrialRecord]:
    reasons = {"stopped": "not among the best third", "failed": "RuntimeError: out of memory\nat …"}
    steps = {"stopped": 40, "failed": 20, "open": 0}
    number = 0
    for point_number, point in enumerate(space.grid()):
        for seed in SEEDS:
            state = states.get(number, "finished")
            trial = Trial(
                number=number,
                point_number=point_number,
                point=point,
                seed=seed,
                state=state,
                reason=reasons.get(state),
            )
            yield record_of(trial, steps=steps.get(state, STEPS))
            number += 1


def report_of(
    records: Sequence[TrialRecord], search: Search | None = None, best: BestResult | None = None
) -> PageText:
    """A page whose charts are their descriptions: drawing takes a second, and has its own tests."""
    search = search or search_of()

    def described(draw: object, *, alt: str) -> Html:
        return element("figure", alt)

    with patch("tmu_dist.evaluation.page.picture", described):
        return PageText(page(search, find(search, records), best))


def spread_text(errors: Sequence[float], decimals: int = 2) -> str:
    return f"{fmean(errors):.{decimals}f} ± {stdev(errors):.{decimals}f}"


BEST_POINT: Point = {SOURCES: ("1", "2"), BETA: 0.1, FRACTION: 1.0}
BEST_LABEL = "sources=1+2, beta=0.1, fraction=1"
BEST_TEXT = spread_text([error_of(BEST_POINT, seed) for seed in SEEDS])


def test_the_page_leads_with_the_best_settings_and_accounts_for_every_trial() -> None:
    records = records_of(states={0: "failed", 4: "stopped", 5: "stopped", 9: "open"})
    shown = report_of(records)
    assert f"Best: {BEST_LABEL}, with a validation MSE / frame of {BEST_TEXT}" in shown.text
    assert "3 seeds" in shown.text
    num_finished = len(records) - 4
    assert (
        f"{len(records)} trials of {len(records) // 3} points: {num_finished} finished, "
        "2 stopped early, 1 failed and 1 not ended yet." in shown.text
    )
    assert shown.best.count(BEST_LABEL) == 1
    assert shown.row(BEST_LABEL)[2] == BEST_TEXT
    numbers = [row[0] for row in shown.rows if row[0].isdigit() and len(row[0]) == 4]
    assert sorted(numbers) == [f"{i:04d}" for i in range(len(records))]
    assert shown.row("0004")[-1] == "stopped at 40 of 120"
    assert shown.row("0000")[-1] == "failed: RuntimeError: out of memory"
    assert shown.row("0009")[-1] == "open, at 0 of 120"


def test_the_next_best_point_is_compared_seed_by_seed() -> None:
    def noisy(point: Point, seed: int) -> float:
        shift = 1.0 if point.get(BETA) == 0.1 and seed == 1 else 0.0
        return error_of(point, seed) + shift

    records = [record_of(record.trial, error=noisy) for record in records_of()]
    # At beta = 0.1: 29.6, 31.0, 30.4; at 0.01: 30.8, 31.2, 31.6.
    assert "is 0.87 higher, on every seed." in report_of(records).text

    def noisier(point: Point, seed: int) -> float:
        return noisy(point, seed) + 0.6 * (noisy(point, seed) - error_of(point, seed))

    records = [record_of(record.trial, error=noisier) for record in records_of()]
    assert "is 0.67 higher in the mean, but on 2 of 3 seeds only" in report_of(records).text
    one_seed = search_of(seeds=(0,))
    only = [record for record in records_of() if record.trial.seed == 0]
    assert "one seed cannot tell whether that is chance" in report_of(only, one_seed).text


def test_sensitivity_names_the_lowest_error_and_an_edge() -> None:
    shown = report_of(records_of())
    assert f"The error is lowest at beta = 0.1 (sources=1+2, fraction=1): {BEST_TEXT}" in shown.text
    assert "tried: a" not in shown.text

    def rising(point: Point, seed: int) -> float:
        beta = point.get(BETA, 1.0)
        assert isinstance(beta, float)
        return 30 + math.log10(beta) + 0.1 * seed

    records = [record_of(record.trial, error=rising) for record in records_of()]
    assert "That is the lowest value tried: a lower beta may be better" in report_of(records).text


def test_gains_over_scratch_are_those_of_the_best_points_at_each_fraction() -> None:
    search, records = search_of(), records_of()
    lines = {line.label: line for line in fraction_lines(search, find(search, records))}
    assert lines.keys() == {"scratch", "TMU"}
    np.testing.assert_allclose([e.mean for e in lines["scratch"].errors], [40.5, 34.5])
    np.testing.assert_allclose([e.mean for e in lines["TMU"].errors], [36.0, 30.0])
    rows = [row for row in report_of(records).rows if row[0] == "TMU"]
    assert rows == [
        ["TMU", "36.00 ± 0.40", "30.00 ± 0.40"],
        ["TMU", "+4.50 ± 0.00", "+4.50 ± 0.00"],
    ]


def test_fractions_as_fidelity_give_learning_curves_of_what_every_seed_finished() -> None:
    space = Space(name="sets", axes=(Axis(name=SOURCES, values=((), ("1", "2"))),))
    search = search_of(
        space, fidelity="fraction", scheduler="asha", fractions=(0.25, 0.5, 1.0), reduction=2.0
    )
    records = []
    for record in records_of(space, {0: "stopped"}):
        reached = (0.25, 0.5) if record.trial.state == "stopped" else (0.25, 0.5, 1.0)
        reports = tuple(
            Report(
                level=level,
                error=error_of({**record.trial.point, FRACTION: level}, record.trial.seed),
                step=int(120 * level),
                seconds=30 * level,
            )
            for level in reached
        )
        records.append(replace(record, reports=reports))
    lines = {line.label: line for line in fraction_lines(search, find(search, records))}
    assert lines["scratch"].xs == (0.25, 0.5)  # one seed was stopped before all of the data
    assert lines["TMU"].xs == (0.25, 0.5, 1.0)
    np.testing.assert_allclose([e.mean for e in lines["TMU"].errors], [39, 36, 30])
    shown = report_of(records, search)
    assert shown.row("0000")[-1] == "stopped at 0.5 of the data"
    assert "+4.50 ± 0.00 at 25\u00a0% and +4.50 ± 0.00 at 50\u00a0%" in shown.text


def test_sources_are_told_with_their_worth_beside_their_gates() -> None:
    shown = report_of(records_of())
    assert shown.row("1+2")[1:4] == [BEST_TEXT, "2", "8"]
    assert shown.row("none")[1] == "34.50 ± 0.40"
    # Errors are sums over sources, so both values are the gains themselves.
    assert shown.row("1")[1:] != shown.row("2")[1:]
    worth = [row for row in shown.rows if len(row) == 6 and row[4] == "exact"]
    assert [row[0] for row in worth] == ["1", "2"]
    assert [row[3] for row in worth] == ["+1.50 ± 0.00", "+3.00 ± 0.00"]
    assert [row[1] for row in worth] == ["+1.50 ± 0.00", "+3.00 ± 0.00"]
    assert [row[5] for row in worth] == ["0.410", "0.580"]
    assert "Gates and worth rank the sources alike: 2 and 1, best first." in shown.text
    swapped = [replace(r, gates=tuple(1 - gate for gate in r.gates)) for r in records_of()]
    assert "by worth 2, 1; by gate 1, 2." in report_of(swapped).text


def test_the_front_goes_from_the_cheapest_to_the_best() -> None:
    shown = report_of(records_of())
    scratch = spread_text([error_of({SOURCES: (), FRACTION: 1.0}, seed) for seed in SEEDS])
    assert (
        "By teachers, 3 of 26 points are beaten by no other in both: from sources=none, "
        f"fraction=1 ({scratch}) to {BEST_LABEL} ({BEST_TEXT}), which takes 2 in place of 0 "
        "teachers." in shown.text
    )


def test_long_tables_are_cut_and_say_so() -> None:
    values = tuple(float(i) for i in range(1, MAX_ROWS // 3 + 12))
    space = Space(name="long", axes=(Axis(name=BETA, values=values),))
    records = records_of(space, {5: "failed", 7: "stopped"})
    shown = report_of(records, search_of(space))
    numbered = [row[0] for row in shown.rows if row[0].isdigit() and len(row[0]) == 4]
    assert len(numbered) == MAX_ROWS
    assert f"The first {MAX_ROWS} of {len(records)}: trials.csv" in shown.text


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("failed", "Every trial failed"),
        ("open", "No point has been trained whole with every seed yet"),
        ("stopped", "No point has been trained whole with every seed yet"),
    ],
)
def test_a_search_without_a_finished_trial_says_so(state: State, told: str) -> None:
    space = Space(name="tiny", axes=(Axis(name=BETA, values=(0.1,)),))
    records = [replace(r, reports=()) for r in records_of(space, dict.fromkeys(range(3), state))]
    shown = report_of(records, search_of(space))
    assert told in shown.text
    assert [row[0] for row in shown.rows[1:]] == ["0000", "0001", "0002"]
    assert "figure" not in shown.source.partition("</style>")[2]  # no chart of nothing


def test_one_trial_and_none_make_a_page() -> None:
    space = Space(name="point", axes=())
    search = search_of(space, seeds=(0,))
    (record, *_) = records_of(space)
    shown = report_of([record], search)
    assert "Best: the recipe as it is, with a validation MSE / frame of" in shown.text
    assert "over 1 seed." in shown.text
    assert "There are no trials yet." in report_of([], search).text


def best_result(**changes: Any) -> BestResult:
    result = BestResult(
        point_number=23,
        label=BEST_LABEL,
        metric="mse_per_frame",
        validation={0: 29.6, 1: 30.0},
        is_retrained=False,
        runs={0: "trials/0009", 1: "trials/0010"},
        test={"mse_per_frame": {0: 31.0, 1: 32.0}, "ssim": {0: 0.81, 1: 0.83}, "frames": {0: 5.0}},
        persistence={"mse_per_frame": 55.5, "ssim": 0.6},
        definitions={"mse_per_frame": "squared error"},
        command="python -m tmu_dist.train --config best.yaml",
        earlier=(),
    )
    return replace(result, **changes)


def test_the_test_split_stands_beside_persistence_and_every_use_is_told() -> None:
    shown = report_of(records_of(), best=best_result())
    assert shown.row("MSE / frame ↓")[1:] == ["31.50 ± 0.71", "31.00, 32.00", "55.50"]
    assert shown.row("SSIM ↑")[1] == "0.8200 ± 0.0141"
    assert "were chosen for doing well" in shown.text
    assert "trials/0009 (seed 0) and trials/0010 (seed 1)" in shown.text
    again = best_result(is_retrained=True, earlier=("beta=0.03",))
    told = report_of(records_of(), best=again).text
    assert "on seeds that the search did not choose by" in told
    assert "when other points were the best: beta=0.03." in told
    assert "has not been scored" not in told
    stale = report_of(records_of(), best=best_result(point_number=0)).text
    assert f"Since then {BEST_LABEL} has become the best" in stale


def test_restarts_and_long_reasons_are_told_in_a_line() -> None:
    first, second, *rest = records_of(states={1: "failed"})
    records = [
        replace(first, trial=replace(first.trial, failures=2)),
        replace(second, trial=replace(second.trial, failures=1, reason="x" * 300)),
        *rest,
    ]
    shown = report_of(records)
    assert shown.row("0000")[-1] == "finished (2 restarts)"
    assert shown.row("0001")[-1] == f"failed: {'x' * 139}… (1 restart)"


def test_what_people_and_trials_wrote_is_escaped() -> None:
    records = records_of(states={1: "failed"})
    trial = replace(records[1].trial, reason="<script>alert(1)</script>")
    records[1] = replace(records[1], trial=trial)
    assert "<script>" not in report_of(records).source


def test_files_have_a_row_a_trial_with_types(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    search = replace(search_of(), folder=str(tmp_path))
    records = [
        replace(record, folder=search.trial_folder(record.trial.number))
        for record in records_of(states={4: "stopped", 9: "open"})
    ]
    findings = find(search, records)
    write_report(search, findings, best_result())
    drawn = PageText((tmp_path / "report.html").read_text())
    assert len(drawn.addresses) == 2 * 5  # beta, fractions, two fronts, trials
    assert all(address.startswith("data:image/svg+xml") for address in drawn.addresses)
    columns = trial_columns(search, findings)
    assert pq.read_table(tmp_path / "trials.parquet").to_pydict() == columns
    rows = [*csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text()))]
    assert len(rows) == len(records)
    for row, record in zip(rows, records):
        assert row["error"] == ("" if record.error is None else repr(record.error))
        beta = record.trial.point.get(BETA)
        assert row[BETA] == ("" if beta is None else repr(beta))
        assert row["folder"] == f"trials/{record.trial.number:04d}"
    assert (rows[4]["state"], rows[4]["steps"]) == ("stopped", "40")
    last = rows[-1]
    assert (last["sources"], last["gate/2"], last["method"]) == ("1+2", "0.58", "tmu")
    assert rows[0]["gate/2"] == ""
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["best"]["test"]["mse_per_frame"] == {"0": 31.0, "1": 32.0}


def test_axes_of_several_types_become_text_in_files(tmp_path: Path) -> None:
    values = (1, 2.5, None)
    search = search_of(Space(name="mixed", axes=(Axis(name="training.clip", values=values),)))
    columns = trial_columns(search, find(search, records_of(search.space)))
    assert columns["training.clip"] == [1.0] * 3 + [2.5] * 3 + [None] * 3
    search = search_of(Space(name="mixed", axes=(Axis(name="model.cell", values=("a", 2)),)))
    columns = trial_columns(search, find(search, records_of(search.space)))
    assert columns["model.cell"] == ["a"] * 3 + ["2"] * 3


def test_the_report_goes_to_a_store() -> None:
    from tmu_dist.data.storage import read_text

    search = search_of(Space(name="point", axes=()), seeds=(0,))
    search = replace(search, folder="memory://reports")
    records = records_of(search.space)[:1]
    write_report(search, find(search, records), None)
    assert "trials/0000" in read_text("memory://reports", "report.html")
    assert read_text("memory://reports", "trials.csv").startswith("number,point,")


LINES = (
    Line(
        label="sources=1",
        xs=(0.001, 0.1, 10.0),
        errors=tuple(Spread(by_seed={0: e - 1, 1: e + 1}) for e in (33.0, 31.0, 36.0)),
    ),
    Line(label="sources=2", xs=(0.001, 0.1), errors=(Spread(by_seed={0: 34.0}),) * 2),
)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_sensitivity_charts_show_means_bands_and_every_seed(theme: Any) -> None:
    figure = spread_chart(
        LINES, theme, title="Error", x_label="beta", is_log=True, best=(0.1, 31.0)
    )
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    drawn = [tuple(line.get_ydata()) for line in axes.lines]
    assert (33.0, 31.0, 36.0) in drawn
    assert (32.0, 34.0, 30.0, 32.0, 35.0, 37.0) in drawn
    assert drawn[-1] == (31.0,)  # the ring
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(31 - math.sqrt(2))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.001", "0.1", "10"]
    assert {text.get_text() for text in axes.texts} == {"sources=1", "sources=2"}


def test_random_points_are_marks_without_lines() -> None:
    figure = spread_chart(LINES, LIGHT, title="Error", x_label="beta", is_scatter=True)
    assert {line.get_linestyle() for line in figure.axes[0].lines} == {"None"}
    assert figure.axes[0].get_xscale() == "linear"


def test_colours_that_come_again_are_dashed() -> None:
    lines = [
        Line(label=str(i), xs=(1.0, 2.0), errors=(Spread(by_seed={0: 30.0 + i}),) * 2)
        for i in range(len(LIGHT.series) + 1)
    ]
    drawn = spread_chart(lines, LIGHT, title="Error", x_label="x").axes[0].lines
    assert drawn[0].get_color() == drawn[-1].get_color()
    assert [line.get_linestyle() for line in drawn] == ["-"] * len(LIGHT.series) + ["--"]


def test_fronts_are_steps_with_their_points_named() -> None:
    points = [
        Priced(label="7", cost=3.0, error=30.0, is_on_front=True),
        Priced(label="2", cost=1.0, error=35.0, is_on_front=True),
        Priced(label="4", cost=2.0, error=36.0, is_on_front=False),
    ]
    axes = front_chart(points, LIGHT, title="Error", x_label="cost", write="{:.1f}".format).axes[0]
    others, front = axes.lines
    assert front.get_drawstyle() == "steps-post"
    assert [*front.get_xdata()] == [1.0, 3.0]
    assert [*others.get_ydata()] == [36.0]
    assert [text.get_text() for text in axes.texts] == ["2", "7"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1.0", "2.0", "3.0"]


def test_trial_charts_tell_what_became_of_each() -> None:
    curves = [
        TrialCurve(levels=(20, 40), errors=(50.0, 40.0), state="stopped", is_best=False),
        TrialCurve(levels=(20, 40, 60), errors=(49.0, 35.0, 30.0), state="finished", is_best=True),
        TrialCurve(levels=(20,), errors=(60.0,), state="failed", is_best=False),
    ]
    axes = trial_chart(curves, LIGHT, title="Error", x_label="iterations").axes[0]
    assert {text.get_text() for text in axes.texts} == {"1 finished", "1 stopped ×", "1 failed"}
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in crosses] == [(40, 40.0)]
    assert axes.lines[-1].get_color() == LIGHT.ink  # the best, above the others
    assert [*axes.lines[-1].get_ydata()] == [49.0, 35.0, 30.0]


def test_numbers_are_written_in_few_letters() -> None:
    assert [format_operations(n) for n in (None, 0, 850, 84_123, 3.59e12)] == [
        "–", "0", "850", "84.12 k", "3.59 T",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (90, 150, 9000, 200_000)] == [
        "90 s", "2.5 min", "2.5 h", "2.3 days",
    ]  # fmt: skip
    assert [listed(list(text)) for text in ("", "a", "ab", "abc")] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip
