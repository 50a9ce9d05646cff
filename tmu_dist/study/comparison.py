"""Two records of one study side by side: another machine, other seeds, other weights.

Runs are exact: with the same archives, teachers and software, the same row and seed should end with
the same scores on another machine of the same kind. Other seeds tell by how much scores move.

Deliberately not here: whether a record is what its runs predicted (`page.check_study`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tmu_dist.evaluation.tables import Cell, Row, TableData, markdown
from tmu_dist.ledger.words import NONE
from tmu_dist.study.record import RowFacts, ScoreFacts, SeedFacts, StudyRecord
from tmu_dist.study.tables import VERDICTS, over_seeds

_DIGITS = 9


def compare(first: Path, second: Path) -> str:
    """What two records of a study have in common, and where they part, as Markdown.

    Args:
        first, second: folders with a record: of a study here, or of one under docs/results.

    Raises:
        ValueError: there is no record, or they are of different studies.
    """
    one, other = StudyRecord.load(first), StudyRecord.load(second)
    if one.study != other.study:
        raise ValueError(
            f"{first} is of {one.study} and {second} of {other.study}: compare two of one study."
        )
    theirs = {row.key: row for row in other.rows}
    pairs = [(row, theirs[row.key]) for row in one.rows if row.key in theirs]
    lines = [
        f"# {one.title}",
        f"A: {first} ({one.variant}, {one.finished})  \nB: {second} ({other.variant}, "
        f"{other.finished})",
        markdown(_rows(one.scores, pairs)).rstrip("\n"),
        "\n".join(f"- {line}" for line in (*_same_runs(pairs), *_differences(one, other))),
    ]
    return "\n\n".join(lines) + "\n"


def _rows(scores: Sequence[ScoreFacts], pairs: Sequence[tuple[RowFacts, RowFacts]]) -> TableData:
    """Every row's scores, and how many runs of both are the same."""
    headings = ["Row"]
    for score in scores:
        headings += [f"{score.label}, A", "B"]
    rows = []
    for pair in pairs:
        if not any(row.seeds for row in pair):
            continue
        runs = _shared(*pair)
        cells = [Cell(over_seeds(row, score)) for score in scores for row in pair]
        cells += [Cell(" ".join(map(str, row.seeds)) or NONE) for row in pair]
        cells += [Cell(str(len(runs))), Cell(str(sum(_agree(*both) for both in runs)))]
        rows.append(Row(pair[0].name, cells))
    return TableData([*headings, "seeds, A", "B", "of both", "of them the same"], rows)


def _same_runs(pairs: Sequence[tuple[RowFacts, RowFacts]]) -> list[str]:
    """How many runs end alike, and which rows could not."""
    same = [_agree(*both) for pair in pairs for both in _shared(*pair)]
    lines = [
        f"Of {len(same)} runs that both have (a row with a seed), {sum(same)} have the same scores "
        f"to {_DIGITS} digits."
    ]
    changed = [mine.key for mine, others in pairs if _training(mine) != _training(others)]
    return [*lines, f"Rows with other settings: {', '.join(changed)}."] if changed else lines


def _differences(one: StudyRecord, other: StudyRecord) -> list[str]:
    """What was read and who taught, with what software, and which verdicts are others."""
    lines = [
        _hashes("Archives", *({a.name: a.manifest_hash for a in r.archives} for r in (one, other))),
        _hashes(
            "Teachers", *({t.name: t.weights_sha256 for t in r.teachers} for r in (one, other))
        ),
    ]
    if dict(one.software) != dict(other.software):
        named = (
            ", ".join(f"{name} {version}" for name, version in record.software.items())
            for record in (one, other)
        )
        lines.append(f"Other software: {' and '.join(named)}.")
    verdicts = {claim.key: claim.verdict for claim in other.claims}
    lines += [
        f"Another verdict: “{claim.text}” {VERDICTS[claim.verdict]} and "
        f"{VERDICTS[verdicts[claim.key]]}."
        for claim in one.claims
        if "not run" not in (claim.verdict, verdicts.get(claim.key, "not run"))
        and verdicts[claim.key] != claim.verdict
    ]
    return lines


def _shared(mine: RowFacts, others: RowFacts) -> list[tuple[SeedFacts, SeedFacts]]:
    """The runs of a row with seeds that both have."""
    return [(mine.seeds[seed], others.seeds[seed]) for seed in mine.seeds if seed in others.seeds]


def _agree(mine: SeedFacts, others: SeedFacts) -> bool:
    return mine.scores.keys() == others.scores.keys() and all(
        math.isclose(value, others.scores[name], rel_tol=10**-_DIGITS)
        for name, value in mine.scores.items()
    )


def _training(row: RowFacts) -> tuple[object, ...]:
    return row.recipe, dict(row.settings), row.num_steps


def _hashes(what: str, mine: dict[str, str], others: dict[str, str]) -> str:
    """How many things that both name are the same by their hashes, and which are not."""
    shared = [name for name in mine if name in others]
    changed = [name for name in shared if mine[name] != others[name]]
    text = f"{what}: {len(shared) - len(changed)} of {len(shared)} that both name are the same"
    return f"{text}; not {', '.join(changed)}." if changed else f"{text}."
