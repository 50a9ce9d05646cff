"""What became of every claim: the picture and the tables that docs/results/README.md leads with.

Made from the records in a folder; a claim without a record stands there as not run. Whatever the
file says below the tables stays.

Deliberately not here: judging (`verdicts`), drawing (`overview`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tmu_dist.evaluation.plots import svg_text
from tmu_dist.evaluation.tables import Cell, Row, TableData, markdown
from tmu_dist.files import atomic_write_text
from tmu_dist.ledger.records import EVALUATION_FOLDERS
from tmu_dist.ledger.words import between, signed
from tmu_dist.study.design import RESULTS_FILE, SCALES, Claim, Study, folder_name, in_words
from tmu_dist.study.overview import overview, tables
from tmu_dist.study.record import ClaimFacts, StudyRecord
from tmu_dist.study.studies import STUDIES
from tmu_dist.study.tables import VERDICTS

SUMMARY_FILE, PICTURE_FILE = "README.md", "overview.svg"
_END = "<!-- the table above is written by `python -m tmu_dist.study summary` -->"
_HEAD = (
    "# What the paper claims, and what runs here say\n\n"
    "Each claim beside its records, with the commands that made them. “Small” is the paper's "
    "protocol shrunk, and no evidence about its full size; “last weights” are those of the last "
    "iteration, where others are those with the least validation error. Of several comparisons "
    "the one is shown that speaks for the claim least: how much better the first row is than the "
    "second, with its 95 % interval. What a scale and a verdict are is in "
    "[docs/studies.md](../studies.md)."
)
_NONE = Cell("not run")
_PICTURE = (
    f"![Rows of the paper's tables by their error in parts of training from scratch, the paper's "
    f"and ours.]({PICTURE_FILE})\n\n"
)


def record_name(record: StudyRecord) -> str:
    """Folder of a study's committed record."""
    scale = [record.scale] if record.scale != "small" else []
    return folder_name(
        "study", record.study, *scale, settings=record.settings, weights=record.weights
    )


def write_summary(folder: Path) -> Path:
    """Write the picture and the tables from the records of a folder; returns the file."""
    file = folder / SUMMARY_FILE
    below = file.read_text().partition(_END)[2] if file.is_file() else "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    records = read_records(folder)
    picture = ""
    if shown := tables([record for record in records if not record.settings]):
        atomic_write_text(folder / PICTURE_FILE, svg_text(overview(shown)))
        picture = _PICTURE
    file.write_text(f"{_HEAD}\n\n{picture}{claims(records)}\n{_END}{below}")
    return file


def read_records(folder: Path) -> list[StudyRecord]:
    """The records of a folder, those of one study side by side."""
    found = [StudyRecord.load(file.parent) for file in folder.glob(f"study-*/{RESULTS_FILE}")]
    return sorted((record for record in found if record.study in STUDIES), key=_place)


def _place(record: StudyRecord) -> tuple[int, int, list[str], int]:
    return (
        list(STUDIES).index(record.study),
        SCALES.index(record.scale),
        in_words(record.settings),
        list(EVALUATION_FOLDERS).index(record.weights),
    )


def claims(records: Sequence[StudyRecord]) -> str:
    """Every claim, study by study, beside what its records say and the commands they came from."""
    return "\n".join(
        _section(study, [record for record in records if record.study == study.name])
        for study in STUDIES.values()
    )


def _section(study: Study, records: Sequence[StudyRecord]) -> str:
    """A study's commands, its claims, and of runs with other settings those that they tell of."""
    plain = [record for record in records if not record.settings]
    changed = [record for record in records if record.settings]
    commands = [record.command for record in plain] or [f"python -m tmu_dist.study {study.name}"]
    commands += [record.command for record in changed]
    parts = [f"## {study.title}", "\n".join(["```bash", *commands, "```"])]
    parts.append(_table(study.claims, plain))
    if changed:
        told = [
            claim
            for claim in study.claims
            if any(_found(claim, record) != _NONE for record in changed)
        ]
        parts += ["With other settings:", _table(told, changed)]
    return "\n\n".join(parts) + "\n"


def _table(claims: Sequence[Claim], records: Sequence[StudyRecord]) -> str:
    headings = ["Claim", "Where", *([_link(record) for record in records] or ["Here"])]
    rows = [
        Row(
            claim.text, [Cell(claim.where), *([_found(claim, each) for each in records] or [_NONE])]
        )
        for claim in claims
    ]
    table = markdown(TableData(headings, rows)).rstrip("\n")
    return table.replace("---:", "---")  # words, not numbers


def _link(record: StudyRecord) -> str:
    folder = record_name(record)
    data = ", other clips standing in" if record.has_stand_ins else ""
    return f"[{record.variant}]({folder}/table.md){data}"


def _found(claim: Claim, record: StudyRecord) -> Cell:
    found = next((facts for facts in record.claims if facts.key == claim.key), None)
    if found is None or not any(pair.gain for pair in found.pairs):
        return _NONE
    verdict = VERDICTS[found.verdict]
    shown = verdict if found.verdict == "undecided" else f"**{verdict}**"
    return Cell(f"{shown}{_evidence(found, record)}")


def _evidence(found: ClaimFacts, record: StudyRecord) -> str:
    """The number behind a verdict: of several comparisons the least favourable one."""
    known = [(pair, pair.gain) for pair in found.pairs if pair.gain is not None]
    worst = {name: rank for rank, name in enumerate(("opposite", "undecided", "holds"))}
    pair, gain = min(known, key=lambda each: (worst.get(each[0].verdict, 3), each[1].mean))
    score = record.score(pair.score)
    decimals = score.decimals + 1
    seeds = len(gain.by_seed)
    text = (
        f"{pair.better} over {pair.worse} {signed(gain.mean, decimals)} {score.label} "
        f"({between((gain.low, gain.high), decimals)}), {seeds} seed{'' if seeds == 1 else 's'}"
    )
    return f": {text}" if len(found.pairs) == 1 else f"; least of {len(found.pairs)}: {text}"
