"""What a search leaves for people and for other programs, made from the logs of its runs.

SEARCH/report.html       self-contained
SEARCH/trials.csv        a row a trial; trials.parquet is the same with types
SEARCH/results.json      everything that follows from them

Deliberately not here: tables and charts (`report_parts`), numbers (`findings`).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from tmu_dist.evaluation.metrics import PHYSICAL_METRIC_NAMES
from tmu_dist.evaluation.page import STYLE, Part
from tmu_dist.evaluation.result import GATES_DEFINITION
from tmu_dist.evaluation.tables import METRICS, Cell, Row, TableData
from tmu_dist.files import atomic_write_text
from tmu_dist.folders import local_folder
from tmu_dist.html_page import Html, definition_list, document, element
from tmu_dist.ledger.arms import short_names
from tmu_dist.ledger.words import NONE, spread
from tmu_dist.training.run_log import git_revision
from tuning.best import SETTINGS_FILE, BestResult
from tuning.findings import Findings, as_record
from tuning.plan import Search
from tuning.report_parts import all_parts
from tuning.report_words import (
    ErrorWords,
    counted,
    decimals_of,
    error_words,
    format_operations,
    format_seconds,
    listed,
    paired_gain,
    states_in_words,
)
from tuning.space import Axis, show
from tuning.trial_table import all_records, as_csv, trial_columns, write_parquet

PAGE_FILE, CSV_FILE, PARQUET_FILE = "report.html", "trials.csv", "trials.parquet"
RESULTS_FILE = "results.json"
_SCORES = (*METRICS, *PHYSICAL_METRIC_NAMES)
_STYLE = f"""{STYLE}
th:first-child {{ white-space: normal; min-width: 5rem; }}
.charts {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }}
"""


def write_report(search: Search, findings: Findings, best: BestResult | None) -> None:
    """Write the page, the tables and the numbers into the search's folder.

    Args:
        search: what was asked for; its folder gets each file whole or not at all.
        findings: of all trials so far; none need be finished.
        best: the best point's scores on the test split; None while there are none.

    Raises:
        WriteError, StorageError: the folder cannot be written.
    """
    columns = trial_columns(search, findings)
    record = as_record(search, findings) | {"best": None if best is None else _record(best)}
    with local_folder(search.folder) as local:
        atomic_write_text(local / CSV_FILE, as_csv(columns))
        write_parquet(columns, local / PARQUET_FILE)
        text = json.dumps(record, indent=1, allow_nan=False)
        atomic_write_text(local / RESULTS_FILE, text + "\n")
        atomic_write_text(local / PAGE_FILE, page(search, findings, best))


def page(search: Search, findings: Findings, best: BestResult | None) -> str:
    """The report as one HTML document."""
    words = error_words(search, findings)
    title = f"Search: {search.space.name}, {search.recipe}"
    body = [
        element("h1", title),
        *(element("p", text, css=css) for text, css in _verdict(findings, words)),
        definition_list(_facts(search), css="facts"),
    ]
    if best is not None:
        body += _test(findings, best).as_html()
    for part in all_parts(search, findings, words):
        body += part.as_html()
    return document(title, [*body, *_ending(search, best)], style=_STYLE)


def _record(best: BestResult) -> Any:
    """As JSON takes it: undefined and infinite scores are None."""
    return json.loads(json.dumps(asdict(best)), parse_constant=lambda _: None)


def _verdict(findings: Findings, words: ErrorWords) -> list[tuple[str, str]]:
    """What was found, the best settings first, and how many trials it rests on."""
    counts = findings.counts
    total = sum(counts.values())
    trials = (
        f"{counted(total, 'trial')} of {counted(len(findings.points), 'point')}: "
        f"{states_in_words(counts)}."
        if total
        else "There are no trials yet."
    )
    if findings.ranked:
        lead = _best_in_words(findings, words)
    elif total and counts.get("failed") == total:
        lead = "Every trial failed, so there is nothing to choose from: see why in the table below."
    else:
        lead = "No point has been trained whole with every seed yet, so nothing can be compared."
    return [(lead, "lead"), (trials + _effort(findings), "")]


def _best_in_words(findings: Findings, words: ErrorWords) -> str:
    """The best point, and how far it is from the next."""
    best, *rest = findings.ranked
    assert best.error is not None
    seeds = len(best.error.by_seed)
    text = (
        f"Best: {best.label or 'the recipe as it is'}, with a validation {words.label} of "
        f"{words.spread(best.error)} over {counted(seeds, 'seed')}."
    )
    gain = paired_gain(rest[0].error, best.error) if rest and rest[0].error else None
    if gain is None:
        return text
    text += f" The next, {rest[0].label}, is {words.error(gain.mean)} higher"
    ahead = sum(value > 0 for value in gain.by_seed.values())
    if len(gain.by_seed) == 1:
        return f"{text}; one seed cannot tell whether that is chance."
    if ahead == len(gain.by_seed):
        return f"{text}, on every seed."
    return (
        f"{text} in the mean, but on {ahead} of {len(gain.by_seed)} seeds only: these seeds do not "
        "tell the two apart."
    )


def _effort(findings: Findings) -> str:
    """Time and operations of all trials together."""
    records = all_records(findings)
    seconds = sum(record.reports[-1].seconds for record in records if record.reports)
    operations = sum(record.operations or 0.0 for record in records)
    if not seconds:
        return ""
    text = f" Training took {format_seconds(seconds)}, summed over trials"
    return f"{text}, and {format_operations(operations)} operations." if operations else f"{text}."


def _facts(search: Search) -> list[tuple[str, str]]:
    options, training = search.options, search.base.training
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sources = ", ".join(short_names(search.base.transfer.teachers))
    known = [
        ("Made", f"{made}, git revision {git_revision() or 'unknown'}"),
        ("Command", search.command),
        ("Axes", "; ".join(_axis_in_words(axis) for axis in search.space.axes)),
        ("Settings of all", ", ".join(
            f"{name}={value}" for name, value in search.space.settings.items())),
        ("Sampler", options.sampler + (
            f", {counted(options.num_samples, 'point')}" if options.num_samples else "")),
        ("Objective", ", ".join(options.objectives)),
        ("Scheduler", _scheduler_in_words(search)),
        ("Seeds", ", ".join(map(str, options.seeds))),
        ("Sources", sources),
        ("Training", f"{training.num_steps:,} iterations of {training.batch_size} sequences in "
                     "the recipe"),
        ("Data", search.base.data.url),
    ]  # fmt: skip
    return [(term, text) for term, text in known if text]


def _axis_in_words(axis: Axis) -> str:
    values = (
        f"{axis.low:g} to {axis.high:g}{' (log)' if axis.is_log else ''}"
        if axis.low is not None and axis.high is not None
        else ", ".join(map(show, axis.values))
    )
    return f"{axis.name}: {values}"


def _scheduler_in_words(search: Search) -> str:
    options = search.options
    if options.scheduler == "none":
        return "none: every trial is trained to its end"
    by = (
        f"by fractions {', '.join(f'{each:g}' for each in options.fractions)} of the data"
        if options.fidelity == "fraction"
        else "by iterations"
    )
    share = f", 1 of {options.reduction:g} goes on" if options.scheduler == "asha" else ""
    return f"{options.scheduler}, {by}{share}"


def _test(findings: Findings, best: BestResult) -> Part:
    """The best point on data that nothing was chosen by."""
    runs = listed([f"{run} (seed {seed})" for seed, run in best.runs.items()])
    texts = [
        f"{best.label or 'The recipe as it is'}, chosen by validation alone, was then scored once "
        f"on the test split: {runs}. "
        + (
            "These runs are new, on seeds that the search did not choose by."
            if best.is_retrained
            else "These runs are the search's own and were chosen for doing well: new ones of the "
            "same settings may be a little worse."
        )
    ]
    if findings.ranked and findings.ranked[0].number != best.point_number:
        texts.append(
            f"Since then {findings.ranked[0].label} has become the best by validation; it has not "
            "been scored."
        )
    if best.earlier:
        texts.append(
            "The test split was used before in this search, when other points were the best: "
            f"{listed(best.earlier)}."
        )
    rows = [_test_row(name, best) for name in best.test if name in _SCORES]
    headings = ["Test split", "Best point", "by seed", "Persistence"]
    caption = "Mean ± standard deviation over seeds. ↓ lower is better, ↑ higher is better."
    return Part(
        heading="What the best is worth",
        texts=tuple(texts),
        tables=((TableData(headings, rows), caption),) if rows else (),
    )


def _test_row(name: str, best: BestResult) -> Row:
    """One metric over seeds."""
    scores = [*best.test[name].values()]
    persistence = best.persistence.get(name)
    decimals = decimals_of(min((abs(score) for score in scores if score), default=1.0))
    cells = [
        spread(scores, decimals),
        ", ".join(f"{score:.{decimals}f}" for score in scores),
        NONE if persistence is None else f"{persistence:.{decimals}f}",
    ]
    metric = METRICS.get(name)
    arrow = "" if metric is None else f" {'↑' if metric.higher_is_better else '↓'}"
    return Row(f"{metric.label if metric else name}{arrow}", [Cell(text) for text in cells])


def _ending(search: Search, best: BestResult | None) -> list[Html]:
    commands = [
        f"{search.command}    # goes on with what is missing",
        f"python tuning/search.py status {search.folder}",
        f"python tuning/search.py report {search.folder}    # this page again, from the runs",
        *([f"{best.command}    # trains the best again"] if best is not None else []),
    ]
    return [
        element("h2", "How the numbers are defined"),
        definition_list(_definitions(search, best), css="terms"),
        element("h2", "How to repeat this"),
        element("pre", "\n".join(commands)),
    ]


def _definitions(search: Search, best: BestResult | None) -> list[tuple[str, str]]:
    error = METRICS[search.options.error]
    by_fraction = search.options.fidelity == "fraction"
    return [
        ("trial", "one point of the space, trained with one seed; a point is judged by the mean "
         "over its seeds, and only if all of them were trained to their end"),
        (f"validation {error.label}", f"{error.definition}; of the validation split"
         + ("" if search.base.training.select == "final" else
            "; of the weights with the lowest squared error so far, which the run keeps")),
        ("± and bands", "standard deviation over seeds, with S − 1; no interval of confidence. "
         "The lowest of many errors is lower than the same settings would give again"),
        ("stopped trial", "the scheduler ended it because others were better at the same "
         + ("fraction of the data" if by_fraction else "iteration")
         + "; it had less training, so it is compared with no finished one"),
        ("marginal gain", "of a source: the error of the best point of a set without it minus that "
         "of the set with it, averaged over all pairs of sets that were both tried"),
        ("Shapley value", "a source's share in the gain of all sources over none, averaged over "
         "all orders in which sources can be added; exact where every set was tried, else of the "
         "sum of single worths that fits the tried sets best (Shapley kernel weights)"),
        ("gates", GATES_DEFINITION),
        ("operations", "multiplications and additions of convolutions and matrix products in all "
         "of the training so far, forwards and backwards, of teachers beside the student too"),
        ("seconds", "wall time of training; trials may have shared their cores, so they are no "
         "benchmark"),
        *([] if best is None else best.definitions.items()),
        ("files", f"{CSV_FILE} and {PARQUET_FILE} have every trial, {RESULTS_FILE} everything "
         f"here, {SETTINGS_FILE} the best settings; each trial's folder is an ordinary run"),
    ]  # fmt: skip
