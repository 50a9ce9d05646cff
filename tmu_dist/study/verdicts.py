"""Which claims of the paper hold in our runs, and which are turned round.

A pair of rows is decided as an arm of a ledger is (`tmu_dist.ledger.statistics`): the difference
is paired by seed and test sequence, and both 95 % intervals, the two-way bootstrap and Student's t
over seeds, lie on one side. Everything else is undecided, as is one seed.

Deliberately not here: the statistics themselves, tables and words (`page`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np

from tmu_dist.evaluation.comparison import RunEntry, check_comparable
from tmu_dist.ledger.findings import Score, scores_of
from tmu_dist.ledger.records import ArmRecord, Ledger
from tmu_dist.ledger.statistics import (
    NUM_RESAMPLES,
    Difference,
    Measurement,
    gain,
)
from tmu_dist.study.design import GATE, Claim, Row, Study

Verdict: TypeAlias = Literal["holds", "opposite", "undecided", "not run"]

_OF_FLAG: Mapping[str, Verdict] = {
    "helps": "holds",
    "negative transfer": "opposite",
    "undecided": "undecided",
}
_FIRST: tuple[Verdict, ...] = ("opposite", "not run", "undecided", "holds")
"""Of several verdicts that must all hold, the first of these that is among them."""

RULE = (
    "A pair of rows counts as decided only where the whole 95 % interval of the two-way bootstrap "
    "over seeds and test sequences is on one side of zero, and that over seeds alone (Student's "
    "t), too. A claim holds if all of its pairs do in all of its scores, which needs no correction "
    "for their number; it is the opposite if any pair is decided the other way, which of many "
    "pairs happens by chance, too (each at 95 %); otherwise these runs leave it undecided, as one "
    "seed leaves everything. That rows are alike holds if both whole intervals are within the part "
    "of the second row's score that the claim names."
)


@dataclass(frozen=True, kw_only=True)
class PairFinding:
    """What runs say of one pair by one score."""

    better: str
    """Row that the claim has as the better one."""
    worse: str
    score: str
    gain: Difference | None
    """Of the first over the second; positive: as claimed. None without runs of one seed."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class ClaimFinding:
    """What runs say of a claim."""

    claim: Claim
    pairs: tuple[PairFinding, ...]
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """How the rows of a group are ordered by a score, in the paper and here."""

    group: str
    score: str
    tau: float
    """Kendall's, of the paper's values and our means: 1 the same order, -1 the reverse."""
    same: tuple[tuple[str, str], ...]
    """Pairs, the paper's better row first, that are decided as in the paper."""
    opposite: tuple[tuple[str, str], ...]
    undecided: tuple[tuple[str, str], ...]

    @property
    def verdict(self) -> Verdict:
        """Of the whole order."""
        if self.opposite:
            return "opposite"
        return "undecided" if self.undecided else "holds"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that follows from a study's runs."""

    scores: Mapping[str, Score]
    """In the study's order; those that its data have."""
    values: Mapping[str, Mapping[str, Measurement]]
    """By score, then by row, of rows that have a run."""
    claims: tuple[ClaimFinding, ...]
    orderings: tuple[Ordering, ...]


def find(study: Study, ledger: Ledger) -> Findings:
    """Measure every row and judge every claim.

    Args:
        study: what is asked.
        ledger: its runs; arms are named by rows.

    Raises:
        ValueError: runs that cannot be compared, or without the scores of single sequences.
    """
    check_comparable(
        [
            RunEntry(label=f"{arm.name}, seed {seed}", result=record.evaluation)
            for arm in ledger.arms
            for seed, record in arm.seeds.items()
        ]
    )
    scores = _scores(study, ledger)
    values = {name: _measure(study, ledger, score) for name, score in scores.items()}
    return Findings(
        scores=scores,
        values=values,
        claims=tuple(judge(claim, study, scores, values) for claim in study.claims),
        orderings=tuple(
            found
            for name, score in scores.items()
            for group in study.groups
            if (found := order(study.rows_of(group), group, score, values[name])) is not None
        ),
    )


def judge(
    claim: Claim,
    study: Study,
    scores: Mapping[str, Score],
    values: Mapping[str, Mapping[str, Measurement]],
) -> ClaimFinding:
    """What the measured values say of a claim."""
    pairs = []
    for name in claim.scores or study.scores[:1]:
        for better, worse in claim.pairs:
            first, second = (values.get(name, {}).get(key) for key in (better, worse))
            found = None
            if first is not None and second is not None:
                found = gain(first, second, higher_is_better=scores[name].higher_is_better)
            if claim.alike_within is None or second is None:
                verdict = judge_better(found)
            else:
                verdict = judge_alike(found, claim.alike_within * abs(second.mean))
            pairs.append(
                PairFinding(better=better, worse=worse, score=name, gain=found, verdict=verdict)
            )
    return ClaimFinding(
        claim=claim, pairs=tuple(pairs), verdict=together(pair.verdict for pair in pairs)
    )


def judge_better(found: Difference | None) -> Verdict:
    """Of a gain that is claimed to be positive."""
    return "not run" if found is None else _OF_FLAG[found.flag]


def judge_alike(found: Difference | None, margin: float) -> Verdict:
    """Of a difference that is claimed to be smaller than a margin, whatever its sign."""
    if found is None:
        return "not run"
    if found.student is None:
        return "undecided"
    low, high = min(found.low, found.student[0]), max(found.high, found.student[1])
    if -margin < low and high < margin:
        return "holds"
    return "opposite" if low > margin or high < -margin else "undecided"


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Of verdicts that must all hold."""
    found = set(verdicts)
    return next(verdict for verdict in _FIRST if verdict in found)


def order(
    rows: Sequence[Row], group: str, score: Score, values: Mapping[str, Measurement]
) -> Ordering | None:
    """Compare the order of rows with the paper's; None of fewer than three rows that both have."""
    theirs = {row.key: row.published[score.name] for row in rows if score.name in row.published}
    known = [row.key for row in rows if row.key in theirs and row.key in values]
    if len(known) < 3:
        return None
    sign = 1 if score.higher_is_better else -1
    decided: dict[Verdict, list[tuple[str, str]]] = {name: [] for name in _FIRST}
    agreement = 0
    pairs = [pair for pair in combinations(known, 2) if theirs[pair[0]] != theirs[pair[1]]]
    for one, other in pairs:
        first_is_better = sign * theirs[one] > sign * theirs[other]
        better, worse = (one, other) if first_is_better else (other, one)
        found = gain(values[better], values[worse], higher_is_better=score.higher_is_better)
        decided[judge_better(found)].append((better, worse))
        ours = sign * (values[better].mean - values[worse].mean)
        agreement += (ours > 0) - (ours < 0)
    return Ordering(
        group=group,
        score=score.name,
        tau=agreement / len(pairs),
        same=tuple(decided["holds"]),
        opposite=tuple(decided["opposite"]),
        undecided=(*decided["undecided"], *decided["not run"]),
    )


def _scores(study: Study, ledger: Ledger) -> dict[str, Score]:
    known = {score.name: score for score in scores_of(ledger)}
    known[GATE] = Score(
        name=GATE, label="mean transfer gate", higher_is_better=True, decimals=3, measure=_no_gate
    )
    return {name: known[name] for name in study.scores if name in known}


def _no_gate(arm: ArmRecord) -> Measurement:
    raise ValueError(f"{arm.name}: a gate is that of one teacher, which the row of a study names.")


def _measure(study: Study, ledger: Ledger, score: Score) -> dict[str, Measurement]:
    found = {}
    for arm in ledger.arms:
        row = study.row(arm.name)
        if not arm.seeds:
            continue
        measure: Callable[[ArmRecord], Measurement] = score.measure
        if score.name == GATE:
            found[arm.name] = _gate(row, arm)
        else:
            found[arm.name] = measure(arm)
    return found


def _gate(row: Row, arm: ArmRecord) -> Measurement:
    """The mean gate of one teacher by seed, which has no values of single sequences."""
    by_seed = {}
    for seed, record in arm.seeds.items():
        gates = record.evaluation.gates
        if gates is None or row.gate_of not in arm.sources:
            raise ValueError(f"{arm.name}: its run has no transfer gate of {row.gate_of}.")
        by_seed[seed] = gates.per_teacher()[arm.sources.index(row.gate_of)]
    score_S = np.array(list(by_seed.values()))
    return Measurement(
        seeds=tuple(by_seed),
        score_S=score_S,
        resampled_SR=np.repeat(score_S[:, None], NUM_RESAMPLES, axis=1),
    )
