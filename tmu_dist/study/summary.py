"""What became of every claim: the picture and the table that docs/results/README.md leads with.

Made from the records in a folder; a claim without a record stands there as not run. Whatever the
file says below the table stays.

Deliberately not here: judging (`verdicts`), drawing (`overview`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tmu_dist.evaluation.plots import svg_text
from tmu_dist.evaluation.tables import Cell, Row, TableData, markdown
from tmu_dist.files import atomic_write_text
from tmu_dist.ledger.records import EVALUATION_FOLDERS, Weights
from tmu_dist.ledger.words import between, signed
from tmu_dist.study.design import RESULTS_FILE, SCALES, Claim, Scale, Study
from tmu_dist.study.overview import overview, tables
from tmu_dist.study.record import ClaimFacts, StudyRecord
from tmu_dist.study.studies import STUDIES
from tmu_dist.study.tables import VERDICTS

SUMMARY_FILE, PICTURE_FILE = "README.md", "overview.svg"
_END = "<!-- the table above is written by `python -m tmu_dist.study summary` -->"
_HEAD = (
    "# What the paper claims, and what runs here say\n\n"
    "Each claim with the record that it was tested by, at the scale that was run: “small” is the "
    "paper's protocol shrunk, and no evidence about its full size. How a verdict comes about, and "
    "what each scale is, is in [docs/studies.md](../studies.md)."
)
_PICTURE = (
    f"![Rows of the paper's tables by their error in parts of training from scratch, the paper's "
    f"and ours.]({PICTURE_FILE})\n\n"
)


def record_name(study: str, scale: Scale, weights: Weights) -> str:
    """Folder of a study's committed record."""
    parts = ["study", study, *([scale] if scale != "small" else [])]
    return "-".join([*parts, *([weights] if weights != "chosen" else [])])


def write_summary(folder: Path) -> Path:
    """Write the picture and the table from the records of a folder; returns the table's file."""
    file = folder / SUMMARY_FILE
    below = file.read_text().partition(_END)[2] if file.is_file() else "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    records = read_records(folder)
    picture = ""
    if shown := tables(records):
        atomic_write_text(folder / PICTURE_FILE, svg_text(overview(shown)))
        picture = _PICTURE
    file.write_text(f"{_HEAD}\n\n{picture}{table(records)}\n{_END}{below}")
    return file


def read_records(folder: Path) -> list[StudyRecord]:
    """The records of a folder, study by study and scale by scale."""
    places = [
        folder / record_name(study, scale, weights)
        for study in STUDIES
        for scale in SCALES
        for weights in EVALUATION_FOLDERS
    ]
    return [StudyRecord.load(place) for place in places if (place / RESULTS_FILE).is_file()]


def table(records: Sequence[StudyRecord]) -> str:
    """Every claim of every study, once for each of its records."""
    rows = []
    for study in STUDIES.values():
        own = [record for record in records if record.study == study.name]
        for claim in study.claims:
            rows += [_row(study, claim, record) for record in own]
            rows += [] if own else [_not_run(study, claim)]
    headings = ["Claim", "Study", "Where", "Evidence here", "Verdict", "Command"]
    return markdown(TableData(headings, rows)).replace("---:", "---")  # words, not numbers


def _row(study: Study, claim: Claim, record: StudyRecord) -> Row:
    found = next((facts for facts in record.claims if facts.key == claim.key), None)
    if found is None:
        return _not_run(study, claim)
    folder = record_name(study.name, record.scale, record.weights)
    data = ", other clips standing in" if record.has_stand_ins else ""
    link = f"[{study.name}, {record.variant}]({folder}/table.md){data}"
    evidence = f"{link}: {_evidence(found, record)}"
    verdict = VERDICTS[found.verdict]
    return Row(
        claim.text,
        [
            Cell(study.title),
            Cell(claim.where),
            Cell(evidence),
            Cell(verdict if found.verdict == "undecided" else f"**{verdict}**"),
            Cell(f"`{record.command}`"),
        ],
    )


def _evidence(found: ClaimFacts, record: StudyRecord) -> str:
    """The number behind a verdict: of several comparisons the least favourable one."""
    known = [(pair, pair.gain) for pair in found.pairs if pair.gain is not None]
    if not known:
        return "no finished run"
    worst = {name: rank for rank, name in enumerate(("opposite", "undecided", "holds"))}
    pair, gain = min(known, key=lambda each: (worst.get(each[0].verdict, 3), each[1].mean))
    score = record.score(pair.score)
    decimals = score.decimals + 1
    text = (
        f"{pair.better} over {pair.worse} gains {signed(gain.mean, decimals)} {score.label} "
        f"({between((gain.low, gain.high), decimals)}), {len(gain.by_seed)} seeds"
    )
    return text if len(found.pairs) == 1 else f"of {len(found.pairs)} comparisons the least: {text}"


def _not_run(study: Study, claim: Claim) -> Row:
    command = f"`python -m tmu_dist.study {study.name}`"
    texts = (study.title, claim.where, "–", "not run", command)
    return Row(claim.text, [Cell(text) for text in texts])
