"""A study's results as plain data: what its page, its table and the summary are made from.

FOLDER/results.json is all of it; `docs/results/study-NAME` has copies for the record. Runs are
named from the folder where the study was run.

Deliberately not here: judging (`verdicts`), showing (`page`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tmu_dist.evaluation.result import FLOW, FORECAST_LABELS, PERSISTENCE
from tmu_dist.files import atomic_write_text
from tmu_dist.ledger.findings import first_result, without_repeats
from tmu_dist.ledger.records import ArmRecord, Ledger, SeedRecord, Weights
from tmu_dist.ledger.statistics import Difference, Measurement
from tmu_dist.recipes.clips import STAND_IN
from tmu_dist.study.design import RESULTS_FILE, Row, Scale, Study, in_words
from tmu_dist.study.verdicts import Findings, Verdict

_COLOURS = {"tmu": 0, "finetune": 1, "l2_sp": 1, "knowledge_flow": 2, "art": 2}
_OTHER_COLOUR = 4


@dataclass(frozen=True, kw_only=True)
class SeedFacts:
    """One run."""

    run: str
    """Its folder, from the study's."""
    scores: Mapping[str, float]
    gates: Mapping[str, float]
    """Mean transfer gate of each source."""
    parameters_train: int
    parameters_test: int
    seconds_per_batch: float
    ms_per_sequence: float
    validation: Mapping[int, float] = field(default_factory=dict)
    """MSE per frame on the validation split, by iteration; older records have none."""


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """One line, with its runs."""

    key: str
    label: str
    sources: str
    group: str
    recipe: str
    settings: Mapping[str, Any]
    """Changes of the recipe, those of the command among them."""
    method: str
    teachers: tuple[str, ...]
    num_steps: int
    x: float | None
    published: Mapping[str, float]
    seeds: Mapping[int, SeedFacts]
    failures: Mapping[int, str]

    @property
    def name(self) -> str:
        """What to call it where no column says its sources."""
        return self.label if self.sources == "none" else f"{self.label} ({self.sources})"

    @property
    def series(self) -> int:
        """Index of its method's colour in charts."""
        return _COLOURS.get(self.method, _OTHER_COLOUR)

    def values(self, score: str) -> list[float]:
        """A score of every seed."""
        return [facts.scores[score] for facts in self.seeds.values() if score in facts.scores]

    @property
    def validations(self) -> list[Mapping[int, float]]:
        """The validation errors of every seed that has some."""
        return [facts.validation for facts in self.seeds.values() if facts.validation]


@dataclass(frozen=True, kw_only=True)
class GainFacts:
    """By how much a row is better than another, and how sure that is (95 %)."""

    by_seed: tuple[float, ...]
    mean: float
    low: float
    high: float
    student: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class PairFacts:
    """One comparison of a claim."""

    better: str
    worse: str
    score: str
    gain: GainFacts | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class ClaimFacts:
    """One claim, and what became of it."""

    key: str
    text: str
    where: str
    verdict: Verdict
    pairs: tuple[PairFacts, ...]


@dataclass(frozen=True, kw_only=True)
class OrderingFacts:
    """The order of a group's rows beside the paper's."""

    group: str
    score: str
    tau: float
    same: tuple[tuple[str, str], ...]
    opposite: tuple[tuple[str, str], ...]
    undecided: tuple[tuple[str, str], ...]
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class ScoreFacts:
    """How a score is written."""

    name: str
    label: str
    higher_is_better: bool
    decimals: int


@dataclass(frozen=True, kw_only=True)
class ArchiveFacts:
    """What was read."""

    name: str
    role: str
    original: str
    """Of whom the files are."""
    sequences: Mapping[str, int]
    frame: tuple[int, int, int]
    """Channels, height, width."""
    manifest_hash: str


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """Who taught."""

    name: str
    archive: str
    """That it learned from."""
    steps: int
    """Of the weights that it was chosen with."""
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """Everything that a study's page says."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    study: str
    title: str
    question: str
    scale: Scale
    weights: Weights = "chosen"
    """Whose scores these are."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the command changed in every row that did not have it, by name."""
    notes: tuple[str, ...]
    command: str
    git_revision: str
    software: Mapping[str, str]
    machine: str
    finished: str
    """When the record was made."""
    test_sequences: int
    window: tuple[int, int]
    """Frames in, frames predicted."""
    networks: tuple[str, ...]
    trainings: tuple[str, ...]
    """Of students."""
    selection: str
    """Of stochastic networks, which sample their scores are of; "" without such networks."""
    scores: tuple[ScoreFacts, ...]
    rows: tuple[RowFacts, ...]
    baselines: Mapping[str, Mapping[str, float]]
    """Forecasts without training, by label, then by score."""
    claims: tuple[ClaimFacts, ...]
    orderings: tuple[OrderingFacts, ...]
    archives: tuple[ArchiveFacts, ...]
    teachers: tuple[TeacherFacts, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of all rows together."""
        return tuple(sorted({seed for row in self.rows for seed in row.seeds}))

    @property
    def variant(self) -> str:
        """Its scale, what was changed, and whose scores if not those of the chosen weights."""
        last = ["last weights"] if self.weights == "last" else []
        return ", ".join([self.scale, *in_words(self.settings), *last])

    @property
    def has_stand_ins(self) -> bool:
        """Whether other clips were read in place of a data set that was not there."""
        return any(archive.original.startswith(STAND_IN) for archive in self.archives)

    @property
    def distinct_rows(self) -> list[RowFacts]:
        """Rows without those whose runs are all another row's."""
        return without_repeats(self.rows, lambda row: {facts.run for facts in row.seeds.values()})

    def row(self, key: str) -> RowFacts:
        """A row by its key."""
        return next(row for row in self.rows if row.key == key)

    def score(self, name: str) -> ScoreFacts:
        """A score by its name."""
        return next(score for score in self.scores if score.name == name)

    def to_json(self) -> str:
        """As `results.json`."""
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    def save(self, folder: Path) -> None:
        """Write `results.json`."""
        atomic_write_text(folder / RESULTS_FILE, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> StudyRecord:
        """Read what `save` wrote.

        Raises:
            ValueError: there is none, or it was written by another version.
        """
        file = folder / RESULTS_FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} holds no {RESULTS_FILE}: name the folder of one study, such as "
                "runs/studies/table1-small, or run `python -m tmu_dist.study` first."
            )
        try:
            return _ADAPTER.validate_json(file.read_text())
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(
                f"{file} was not written by this version ({'.'.join(map(str, first['loc']))}: "
                f"{first['msg']}): run the study's command again, which keeps all finished runs."
            ) from None


_ADAPTER = TypeAdapter(StudyRecord)


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What is known of a study beside its runs' results."""

    scale: Scale
    weights: Weights
    settings_for_all: Mapping[str, Any]
    command: str
    git_revision: str
    software: Mapping[str, str]
    finished: str
    recipes: Mapping[str, str]
    """Whole name of the recipe of each row."""
    settings: Mapping[str, Mapping[str, Any]]
    num_steps: Mapping[str, int]
    networks: tuple[str, ...]
    trainings: tuple[str, ...]
    archives: tuple[ArchiveFacts, ...]
    teachers: tuple[TeacherFacts, ...]


def make_record(
    study: Study,
    ledger: Ledger,
    findings: Findings,
    known: Circumstances,
    validations: Mapping[str, Mapping[int, float]],
) -> StudyRecord:
    """Everything of a study as plain data.

    Args:
        study: what was asked.
        ledger: the runs, with one finished at least.
        findings: what follows from them.
        known: what is not in the runs' results.
        validations: MSE per frame on the validation split, by run, then by iteration.
    """
    first = first_result(ledger)
    ensembles = [
        record.evaluation.ensemble
        for arm in ledger.arms
        for record in arm.seeds.values()
        if record.evaluation.ensemble is not None
    ]
    arms = {arm.name: arm for arm in ledger.arms}
    return StudyRecord(
        study=study.name,
        title=study.title,
        question=study.question,
        scale=known.scale,
        weights=known.weights,
        settings=dict(known.settings_for_all),
        notes=study.notes[known.scale],
        command=known.command,
        git_revision=known.git_revision,
        software=dict(known.software),
        machine=first.runtime.device,
        finished=known.finished,
        test_sequences=first.data.num_sequences,
        window=(first.model.num_input_frames, first.model.num_target_frames),
        networks=known.networks,
        trainings=known.trainings,
        selection=ensembles[0].selection if ensembles else "",
        scores=tuple(
            ScoreFacts(
                name=score.name,
                label=score.label,
                higher_is_better=score.higher_is_better,
                decimals=score.decimals,
            )
            for score in findings.scores.values()
        ),
        rows=tuple(_row(row, arms[row.key], findings, known, validations) for row in study.rows),
        baselines=_baselines(ledger, findings),
        claims=tuple(
            ClaimFacts(
                key=found.claim.key,
                text=found.claim.text,
                where=found.claim.where,
                verdict=found.verdict,
                pairs=tuple(
                    PairFacts(
                        better=pair.better,
                        worse=pair.worse,
                        score=pair.score,
                        gain=_gain(pair.gain),
                        verdict=pair.verdict,
                    )
                    for pair in found.pairs
                ),
            )
            for found in findings.claims
        ),
        orderings=tuple(
            OrderingFacts(**asdict(found), verdict=found.verdict) for found in findings.orderings
        ),
        archives=known.archives,
        teachers=known.teachers,
    )


def _row(
    row: Row,
    arm: ArmRecord,
    findings: Findings,
    known: Circumstances,
    validations: Mapping[str, Mapping[int, float]],
) -> RowFacts:
    values = {
        name: by_row[row.key] for name, by_row in findings.values.items() if row.key in by_row
    }
    return RowFacts(
        key=row.key,
        label=row.label,
        sources=row.sources,
        group=row.group,
        recipe=known.recipes[row.key],
        settings=dict(known.settings[row.key]),
        method=arm.method,
        teachers=arm.sources,
        num_steps=known.num_steps[row.key],
        x=row.x,
        published=dict(row.published),
        seeds={
            seed: _seed(seed, record, arm, values, validations[record.run])
            for seed, record in arm.seeds.items()
        },
        failures=dict(arm.failures),
    )


def _seed(
    seed: int,
    record: SeedRecord,
    arm: ArmRecord,
    values: Mapping[str, Measurement],
    validation: Mapping[int, float],
) -> SeedFacts:
    result = record.evaluation
    gates = () if result.gates is None else result.gates.per_teacher()
    return SeedFacts(
        run=record.run,
        scores={
            name: float(own.score_S[own.seeds.index(seed)])
            for name, own in values.items()
            if np.isfinite(own.score_S[own.seeds.index(seed)])
        },
        gates=dict(zip(arm.sources, gates)),
        parameters_train=result.parameters.train,
        parameters_test=result.parameters.test,
        seconds_per_batch=record.seconds_per_batch,
        ms_per_sequence=result.runtime.ms_per_sequence_batch_1,
        validation=dict(validation),
    )


def _baselines(ledger: Ledger, findings: Findings) -> dict[str, dict[str, float]]:
    """Persistence, and optical flow where it was computed, by the scores that they have."""
    result = first_result(ledger)
    found: dict[str, dict[str, float]] = {}
    for forecast in (PERSISTENCE, FLOW):
        own = dict(result.overall.get(forecast, {}))
        if result.radar is not None and forecast in result.radar.forecasts:
            own["csi"] = float(result.radar.forecasts[forecast].mean("csi")[0])
        scores = {n: own[n] for n in findings.scores if n in own and math.isfinite(own[n])}
        if scores:
            found[FORECAST_LABELS[forecast]] = scores
    return found


def _gain(found: Difference | None) -> GainFacts | None:
    if found is None or not all(map(math.isfinite, (found.mean, found.low, found.high))):
        return None
    return GainFacts(
        by_seed=found.by_seed,
        mean=found.mean,
        low=found.low,
        high=found.high,
        student=found.student,
    )
