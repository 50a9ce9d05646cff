"""The page of a ledger and its table, and whether what they say is what the runs predicted.

OUT/report.html      self-contained, for people
OUT/table.md         verdict and tables as text
OUT/results.json     every number, for other programs

Deliberately not here: tables and charts (`parts`), numbers (`findings`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from tmu_dist.data.archive import Archive, open_archive
from tmu_dist.evaluation.page import STYLE
from tmu_dist.evaluation.predictions import RECOMPUTED, FloatArray, recompute
from tmu_dist.evaluation.result import GATES_DEFINITION, MODEL, EvaluationResult
from tmu_dist.evaluation.score_table import Scores
from tmu_dist.evaluation.tables import markdown
from tmu_dist.files import atomic_write_text
from tmu_dist.html_page import Html, bullet_list, definition_list, document, element
from tmu_dist.ledger.findings import (
    SCRATCH,
    Findings,
    as_record,
    distinct_arms,
    find,
    first_result,
    scores_of_sequences,
)
from tmu_dist.ledger.parts import all_parts
from tmu_dist.ledger.records import EVALUATION_FOLDERS, ArmRecord, Ledger, load
from tmu_dist.ledger.statistics import NUM_RESAMPLES, VERDICT_RULE
from tmu_dist.ledger.words import between, called, signed

log = logging.getLogger(__name__)

PAGE_FILE, TABLE_FILE, RESULTS_FILE = "report.html", "table.md", "results.json"
_STYLE = f"""{STYLE}
th:first-child {{ white-space: normal; min-width: 11rem; }}
td.text, th.text {{ min-width: 4.5rem; }}
.charts {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }}
"""
_TOLERANCE = 1e-6
_NOTES = "What this does and does not show"


def write_ledger(folder: Path, ledger: Ledger) -> None:
    """Write the page, the table and the numbers.

    Args:
        folder: for the files, each of which appears whole or not at all.
        ledger: with a finished run at least; arms and seeds may be missing.

    Raises:
        ValueError: no run, or runs that cannot be compared.
    """
    findings = find(ledger)
    atomic_write_text(folder / TABLE_FILE, _as_markdown(ledger, findings))
    record = json.dumps(as_record(ledger, findings), indent=1, allow_nan=False)
    atomic_write_text(folder / RESULTS_FILE, record + "\n")
    title = f"Knowledge or parameters? {ledger.recipe}"
    first, second = verdict(ledger, findings)
    body = [
        element("h1", title),
        element("p", first, css="lead"),
        element("p", second),
        definition_list(_facts(ledger), css="facts"),
    ]
    for part in all_parts(ledger, findings):
        body += part.as_html()
    body += [element("h2", _NOTES), bullet_list(_notes(ledger, findings))]
    body += _missing(ledger)
    body += [
        element("h2", "How the numbers are defined"),
        definition_list(_definitions(ledger, findings), css="terms"),
        element("h2", "How to repeat this"),
        element("pre", "\n".join(_commands(ledger))),
    ]
    atomic_write_text(folder / PAGE_FILE, document(title, body, style=_STYLE))


def verdict(ledger: Ledger, findings: Findings) -> tuple[str, str]:
    """Two sentences by `VERDICT_RULE`: what may be concluded, and the numbers behind it."""
    score, controls = findings.main.score, dict(findings.main.controls)
    over_scratch = controls.pop(SCRATCH)
    if over_scratch is None:
        return (
            "No answer: memory transfer from all sources and training from scratch need a finished "
            "run of one seed.",
            "The command below adds what is missing.",
        )
    names = {arm.name: f"“{called(arm, ledger)}”" for arm in ledger.arms}
    unbeaten = [names[n] for n, found in controls.items() if found and found.flag != "helps"]
    missing = [names.get(name, name) for name, found in controls.items() if found is None]
    first = {
        "knowledge": "It is the teachers' knowledge that helps: memory transfer is better than "
        "training from scratch and than every control.",
        "open": "Memory transfer is better than training from scratch and than every control that "
        f"was run; whether knowledge does it is open without {', '.join(missing)}.",
        "not shown": "Memory transfer is better than training from scratch, but it is not shown "
        f"that the teachers' knowledge does it: it is not shown to beat {', '.join(unbeaten)}.",
        "no gain": "Memory transfer is not shown to be better than training from scratch, so there "
        "is no gain to explain.",
        "negative transfer": "Memory transfer is worse than training from scratch: negative "
        "transfer.",
        "undecided": "Undecided: one seed ranks nothing.",
    }[findings.answer]
    decimals, count = score.decimals + 1, len(over_scratch.seeds)
    ends = between((over_scratch.low, over_scratch.high), decimals)
    second = (
        f"By {score.label} it gains {signed(over_scratch.mean, decimals)} over scratch (95 % "
        f"interval {ends}, {count} seed{'' if count == 1 else 's'})"
    )
    known = {name: found for name, found in controls.items() if found is not None}
    if known:
        least = min(known, key=lambda name: known[name].mean)
        ends = between((known[least].low, known[least].high), decimals)
        second += f", and least over {names[least]}: {signed(known[least].mean, decimals)} ({ends})"
    return first, second + "."


def _as_markdown(ledger: Ledger, findings: Findings) -> str:
    blocks = [f"# Knowledge or parameters? {ledger.recipe}", " ".join(verdict(ledger, findings))]
    for part in all_parts(ledger, findings):
        blocks += [f"## {part.heading}", *part.texts]
        for data, caption in part.tables:
            blocks += [markdown(data).rstrip("\n"), *([caption] if caption else [])]
    notes = "\n".join(f"- {note}" for note in _notes(ledger, findings))
    blocks += [f"## {_NOTES}", notes]
    if failed := _failures(ledger):
        blocks += ["## Failed and missing runs", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(blocks) + "\n"


def _facts(ledger: Ledger) -> list[tuple[str, str]]:
    result, facts = first_result(ledger), ledger.facts
    data, model = result.data, result.model
    seeds = sorted({seed for arm in ledger.arms for seed in arm.seeds})
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    known = [
        ("Frames", "x".join(map(str, facts.get("frame", ())))),
        ("Network", _network(facts)),
        ("Training", _training(facts)),
    ]
    return [
        ("Made", f"{made}, git revision {ledger.git_revision or 'unknown'}"),
        ("Command", ledger.command),
        ("Sources", ", ".join(ledger.sources)),
        ("Task", f"{model.num_input_frames} frames in, {model.num_target_frames} predicted"),
        *((term, text) for term, text in known if text),
        ("Evaluated on", f"{data.split} split of {data.url}: {data.num_sequences:,} sequences "
                         f"(manifest {data.manifest_hash[:12]})"),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Machine", result.runtime.device),
    ]  # fmt: skip


def _network(facts: Mapping[str, object]) -> str:
    if not {"cell", "num_layers", "hidden_channels"} <= facts.keys():
        return ""
    return f"{facts['cell']}, {facts['num_layers']} layers of {facts['hidden_channels']} channels"


def _training(facts: Mapping[str, object]) -> str:
    if not {"num_steps", "batch_size"} <= facts.keys():
        return ""
    return f"{facts['num_steps']:,} iterations of {facts['batch_size']} sequences"


def _notes(ledger: Ledger, findings: Findings) -> list[str]:
    counts = [len(arm.seeds) for arm in ledger.arms if arm.seeds]
    num_seeds = max(counts)
    seeds = (
        f"Of {num_seeds} seeds, resampling makes few different sets, so the seed part of the "
        "intervals is coarse and too short: of three seeds, it goes from the lowest to the "
        "highest, which would hold the truth in 3 of 4 cases and not in 19 of 20 if only seeds "
        "mattered. So nothing is concluded unless the interval over seeds alone (Student's t), "
        "which takes the test sequences as given, is on the same side."
    )
    if num_seeds == 1:
        seeds = (
            "There is one seed: no standard deviation and no interval over seeds can be given, the "
            "intervals here are over test sequences alone, and nothing is decided."
        )
    if min(counts) < num_seeds:
        seeds += " Arms have different numbers of seeds; differences take those that both have."
    notes = [
        seeds,
        "“Undecided” and “not shown” do not mean that there is no difference, but that these runs "
        "cannot tell.",
        "The verdict's comparisons must all hold at once; every other interval stands for itself, "
        "at 95 %: of twenty, one leaves out zero by chance where nothing differs.",
        "Intervals take test sequences as independent. Windows cut from one event or one film are "
        "not, and their intervals are too narrow.",
        "All arms have the same data, batches and iterations (“longer” apart) and untuned "
        "settings. Another target, network, amount of data or length of training can turn any of "
        "this round.",
        "A contribution depends on the other sources: two that know the same contribute little "
        "each. A source alone has a network of one slot, the network without teachers has one for "
        "every source.",
    ]
    ensemble = first_result(ledger).ensemble
    if ensemble is not None:
        notes.append(f"Scores of these stochastic networks are of the {ensemble.selection}.")
    return notes


def _missing(ledger: Ledger) -> list[Html]:
    lines = _failures(ledger)
    return [element("h2", "Failed and missing runs"), bullet_list(lines)] if lines else []


def _failures(ledger: Ledger) -> list[str]:
    """Runs without a result: failed ones with their error, arms that no run was tried of."""
    lines = [
        f"{arm.name}, seed {seed}: {why}"
        for arm in ledger.arms
        for seed, why in arm.failures.items()
    ]
    untried = [arm.name for arm in ledger.arms if not arm.seeds and not arm.failures]
    return [*lines, *([f"Not run yet: {', '.join(untried)}"] if untried else [])]


def _definitions(ledger: Ledger, findings: Findings) -> list[tuple[str, str]]:
    known = first_result(ledger).definitions
    names = [*(found.score.name for found in findings.scores), "parameters.train",
             "parameters.test", "ms_per_sequence_batch_1"]  # fmt: skip
    texts = [(name, known[name]) for name in names if name in known]
    texts += [("gates", GATES_DEFINITION)] if findings.gates else []
    return [
        *texts,
        ("s/batch, train", "wall time of one training iteration, waiting for data included, "
         "validation and checkpoints left out"),
        ("95 % interval", f"two-way bootstrap: {NUM_RESAMPLES:,} times, as many seeds and as many "
         "test sequences as there are, both drawn with replacement and crossed, the same draws for "
         "every arm; the 2.5 % and 97.5 % quantiles of the mean difference, which is paired by "
         "seed and sequence (of CSI, taken of the drawn sequences' counts)"),
        ("over seeds alone", "Student's t on the mean differences of the seeds, 95 %"),
        ("verdict", VERDICT_RULE),
    ]  # fmt: skip


def _commands(ledger: Ledger) -> list[str]:
    return [
        ledger.command,
        "python -m tmu_dist.ledger page FOLDER    # this page again, from the records",
        "python -m tmu_dist.ledger check FOLDER   # every score again, from the predictions",
    ]


def check_ledger(folder: Path) -> list[str]:
    """Compare the records and the table with the scores that the saved predictions give.

    Scores are taken again from predictions and true frames by code of their own (`recompute`), and
    compared to 1e-6 with every score of every sequence and every average; the table must be the
    one that the records give, and its first table must show the recomputed means. CSI, which only
    radar has, is not taken again. Runs of stochastic networks keep no predictions and are named in
    the log.

    Returns:
        What does not agree, a line each; empty where all does.

    Raises:
        ValueError: there is no ledger.
    """
    ledger = load(folder)
    found, checked = recheck_runs(folder, ledger.arms)
    return found + _table_problems(folder, ledger, checked)


def recheck_runs(
    folder: Path, arms: Sequence[ArmRecord]
) -> tuple[list[str], dict[str, EvaluationResult]]:
    """Take the scores of every run again from its saved predictions.

    Args:
        folder: that runs are named from.
        arms: whose runs.

    Returns:
        What does not agree, a line each; and every run's evaluation with the recomputed scores.
    """
    archives: dict[str, Archive] = {}
    checked: dict[str, EvaluationResult] = {}
    found = []
    for arm in arms:
        for record in arm.seeds.values():
            result = record.evaluation
            if record.run in checked:
                continue
            checked[record.run] = result
            if result.ensemble is not None:
                log.warning("%s is of a stochastic network: not checked", record.run)
                continue
            url = result.data.url
            try:
                archives[url] = archives.get(url) or open_archive(url)
                again = recompute(
                    folder / record.run / EVALUATION_FOLDERS[record.weights], archives[url]
                )
            except ValueError as error:
                found.append(f"{record.run}: {error}")
                continue
            found += [f"{record.run}: {problem}" for problem in _disagreements(result, again)]
            checked[record.run] = _with_scores(result, again)
    return found, checked


def _disagreements(result: EvaluationResult, again: Mapping[str, FloatArray]) -> list[str]:
    """Scores of sequences and averages that are not the recomputed ones."""
    problems = []
    own = scores_of_sequences(result)
    averages = _with_scores(result, again).overall[MODEL]
    for name, values_NT in again.items():
        stored_NT = own.values_NT[name]
        if stored_NT.shape != values_NT.shape:
            problems.append(f"{name} of {stored_NT.shape} frames, predictions {values_NT.shape}")
            continue
        wrong_NT = ~np.isclose(stored_NT, values_NT, rtol=_TOLERANCE, atol=0, equal_nan=True)
        if wrong_NT.any():
            n, t = np.argwhere(wrong_NT)[0]
            problems.append(
                f"{name} of {wrong_NT.sum()} frames differs, first of sequence {n}, lead time "
                f"{t + 1}: recorded {stored_NT[n, t]:.9g}, predictions give {values_NT[n, t]:.9g}"
            )
        recorded = result.overall[MODEL][name]
        if not np.isclose(recorded, averages[name], rtol=_TOLERANCE, atol=0, equal_nan=True):
            problems.append(
                f"average {name}: recorded {recorded:.9g}, predictions give {averages[name]:.9g}"
            )
    return problems


def _with_scores(result: EvaluationResult, again: Mapping[str, FloatArray]) -> EvaluationResult:
    """The evaluation with recomputed scores and averages in the place of the recorded ones."""
    scores = Scores(scores_of_sequences(result).sample_ids_N, again)
    return replace(result, overall={MODEL: scores.overall()}, per_sequence={MODEL: scores})


def _table_problems(
    folder: Path, ledger: Ledger, checked: Mapping[str, EvaluationResult]
) -> list[str]:
    """Whether the table is of these records and shows the means of the recomputed scores."""
    file = folder / TABLE_FILE
    if not file.is_file():
        return [f"{file} is missing: python -m tmu_dist.ledger page {folder}"]
    text = file.read_text()
    findings = find(ledger)
    found = []
    if text != _as_markdown(ledger, findings):
        found.append(f"{file} is not of these records: python -m tmu_dist.ledger page {folder}")
    rows = [_cells(line) for line in text.splitlines() if line.startswith("| ")]
    headings = rows[0]
    for arm in distinct_arms(ledger):
        row = next((r for r in rows if r[:2] == [arm.label, ", ".join(arm.sources) or "none"]), [])
        if len(row) != len(headings):
            found.append(f"{file} has no row of {arm.name}")
            continue
        results = [checked[record.run] for record in arm.seeds.values()]
        for score in (f.score for f in findings.scores if f.score.name in RECOMPUTED):
            shown = row[next(i for i, h in enumerate(headings) if h.startswith(score.label))]
            mean = float(np.mean([r.overall[MODEL][score.name] for r in results]))
            number = re.match(r"[\d.]+", shown)
            half = 0.5 * 10.0**-score.decimals * (1 + _TOLERANCE)
            if number is None or not abs(float(number[0]) - mean) <= half:
                found.append(
                    f"{file}: {arm.name} shows {score.label} {shown}, predictions give {mean:.9g}"
                )
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip("|").split("|")]
