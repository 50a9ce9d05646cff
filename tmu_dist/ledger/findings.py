"""Everything that follows from a ledger's runs, as numbers: what the page then says.

Deliberately not here: the statistics themselves (`statistics`), words and tables (`page`).

Legend: S seeds, N sequences, T lead time, L TMU layers, M teachers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from tmu_dist.evaluation.comparison import RunEntry, check_comparable
from tmu_dist.evaluation.result import MODEL, EvaluationResult
from tmu_dist.evaluation.score_table import Scores
from tmu_dist.evaluation.tables import METRICS
from tmu_dist.ledger.records import ArmRecord, Ledger
from tmu_dist.ledger.statistics import (
    Answer,
    Difference,
    Measurement,
    Relation,
    answer,
    difference,
    gain,
    measure_csi,
    measure_mean,
    relation,
)

Line = TypeVar("Line")

SCRATCH, TMU, NO_TEACHERS, NO_BETA = "scratch", "tmu", "tmu-scratch", "tmu-beta-0"
CONTROLS: Mapping[str, str] = MappingProxyType(
    {
        "scratch-longer": "more iterations, no teachers",
        NO_TEACHERS: "the parameters, no teachers",
        NO_BETA: "the parameters, teachers that are not imitated",
        "tmu-shuffled": "the teachers' memories of another sequence",
        "tmu-random-weights": "the memories of untrained teachers",
    }
)
"""Arms that have everything of memory transfer but the knowledge, and what they have instead."""
MAIN = "mse_per_frame"
"""The score that decides."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A number that arms are compared by."""

    name: str
    label: str
    higher_is_better: bool
    decimals: int
    """Of the score; differences have one more."""
    measure: Callable[[ArmRecord], Measurement]


@dataclass(frozen=True, kw_only=True)
class SourceFinding:
    """What one source is worth by one score; positive is better, None where a run is missing."""

    contribution: Difference | None
    """Gain of all sources over all but this one."""
    alone: Difference | None
    """Gain of this source alone over the network without teachers."""


@dataclass(frozen=True, kw_only=True)
class ScoreFindings:
    """All comparisons by one score."""

    score: Score
    arms: Mapping[str, Measurement]
    """By name, of the arms that have a run."""
    from_scratch: Mapping[str, Difference]
    """Arm minus scratch, by name; without arms that share no seed with it."""
    controls: Mapping[str, Difference | None]
    """Gain of memory transfer over scratch and over every control."""
    sources: Mapping[str, SourceFinding]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a ledger's runs say."""

    scores: tuple[ScoreFindings, ...]
    """The main score first."""
    answer: Answer
    gates: Mapping[str, tuple[float, ...]]
    """Mean transfer gate of each source (Table 5) in the student with all sources, by seed."""
    gate_relation: Relation | None
    """Of gate and contribution over sources; None where these are too few."""
    same_bits: bool | None
    """Whether beta = 0 and the network built without teachers score the same to the last bit, as
    they must; None where they share no seed."""

    @property
    def main(self) -> ScoreFindings:
        """By the score that decides."""
        return self.scores[0]


def find(ledger: Ledger) -> Findings:
    """Compare everything that has runs.

    Raises:
        ValueError: no run at all, runs evaluated in different ways, or without the scores of every
            sequence.
    """
    check_comparable(
        [
            RunEntry(label=f"{arm.name}, seed {seed}", result=record.evaluation)
            for arm in ledger.arms
            for seed, record in arm.seeds.items()
        ]
    )
    scores = tuple(_compare(ledger, score) for score in scores_of(ledger))
    controls = dict(scores[0].controls)
    over_scratch = controls.pop(SCRATCH)
    gates = _gates(ledger)
    known = {
        source: found.contribution.mean
        for source, found in scores[0].sources.items()
        if found.contribution is not None and source in gates
    }
    return Findings(
        scores=scores,
        answer=answer(over_scratch, controls),
        gates=gates,
        gate_relation=relation(
            [float(np.mean(gates[source])) for source in known], list(known.values())
        ),
        same_bits=_same_bits(ledger),
    )


def as_record(ledger: Ledger, findings: Findings) -> dict[str, Any]:
    """All numbers of a ledger as plain data, for other programs; undefined ones are None."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(each) for key, each in value.items()}
        if isinstance(value, tuple | list):
            return [plain(each) for each in value]
        if is_dataclass(value):
            names = [entry.name for entry in fields(value)]
            names += ["flag"] if isinstance(value, Difference) else []
            return {name: plain(getattr(value, name)) for name in names}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "recipe": ledger.recipe,
        "command": ledger.command,
        "git_revision": ledger.git_revision,
        "facts": plain(ledger.facts),
        "answer": findings.answer,
        "same_bits": findings.same_bits,
        "gates": plain(findings.gates),
        "gate_relation": plain(findings.gate_relation),
        "arms": {
            arm.name: {
                "label": arm.label,
                "group": arm.group,
                "method": arm.method,
                "sources": list(arm.sources),
                "failures": plain(arm.failures),
                "runs": {
                    str(seed): {
                        "run": record.run,
                        "scores": plain(record.evaluation.overall[MODEL]),
                        "parameters": plain(record.evaluation.parameters),
                        "runtime": plain(record.evaluation.runtime),
                        "seconds_per_batch": record.seconds_per_batch,
                    }
                    for seed, record in arm.seeds.items()
                },
            }
            for arm in ledger.arms
        },
        "differences": {
            found.score.name: {
                "minus_scratch": plain(found.from_scratch),
                "gain_over_controls": plain(found.controls),
                "sources": plain(found.sources),
            }
            for found in findings.scores
        },
    }


def first_result(ledger: Ledger) -> EvaluationResult:
    """The evaluation of any run; they are all of the same sequences."""
    return next(record.evaluation for arm in ledger.arms for record in arm.seeds.values())


def distinct_arms(ledger: Ledger) -> list[ArmRecord]:
    """Arms that have runs, without those whose runs are all another arm's.

    Of two sources, leaving one out and taking the other alone are one run.
    """
    return without_repeats(ledger.arms, lambda arm: {record.run for record in arm.seeds.values()})


def without_repeats(lines: Iterable[Line], runs_of: Callable[[Line], set[str]]) -> list[Line]:
    """Lines that have runs, without those whose runs have all been seen before."""
    seen: set[str] = set()
    kept = []
    for line in lines:
        runs = runs_of(line)
        if not runs <= seen:
            kept.append(line)
        seen |= runs
    return kept


def scores_of(ledger: Ledger) -> tuple[Score, ...]:
    """What arms are compared by; of radar also CSI at the first threshold."""
    decimals = {MAIN: 1, "mae_per_frame": 1, "ssim": 3}

    def mean_of(name: str) -> Callable[[ArmRecord], Measurement]:
        return lambda arm: measure_mean(
            {
                seed: scores_of_sequences(record.evaluation).per_sequence(name)
                for seed, record in arm.seeds.items()
            }
        )

    found = [
        Score(
            name=name,
            label=METRICS[name].label,
            higher_is_better=METRICS[name].higher_is_better,
            decimals=count,
            measure=mean_of(name),
        )
        for name, count in decimals.items()
    ]
    radar = first_result(ledger).radar
    if radar is not None:
        label = f"CSI, {radar.settings.threshold_label(0)}"
        found.append(
            Score(name="csi", label=label, higher_is_better=True, decimals=3, measure=_csi)
        )
    return tuple(found)


def _csi(arm: ArmRecord) -> Measurement:
    counts = {}
    for seed, record in arm.seeds.items():
        assert record.evaluation.contingency is not None, "radar is always counted"
        counts[seed] = record.evaluation.contingency[MODEL][:, :, 0]
    return measure_csi(counts)


def scores_of_sequences(result: EvaluationResult) -> Scores:
    """The model's scores of every sequence.

    Raises:
        ValueError: the evaluation was saved without them.
    """
    if result.per_sequence is None:
        raise ValueError(
            f"The evaluation of {result.model.name} has no scores of single sequences: delete it "
            "and run the ledger's command again, which evaluates again."
        )
    return result.per_sequence[MODEL]


def _compare(ledger: Ledger, score: Score) -> ScoreFindings:
    arms = {arm.name: score.measure(arm) for arm in ledger.arms if arm.seeds}

    def better(of: str | None, over: str | None) -> Difference | None:
        if of not in arms or over not in arms:
            return None
        return gain(arms[of], arms[over], higher_is_better=score.higher_is_better)

    differences = {
        name: difference(own, arms[SCRATCH])
        for name, own in arms.items()
        if name != SCRATCH and SCRATCH in arms
    }
    untaught = NO_TEACHERS if NO_TEACHERS in arms else NO_BETA
    sources = {}
    for source in ledger.sources:
        rest = tuple(other for other in ledger.sources if other != source)
        sources[source] = SourceFinding(
            contribution=better(TMU, _taught_by(ledger, rest) if rest else untaught),
            alone=better(_taught_by(ledger, (source,)), untaught),
        )
    return ScoreFindings(
        score=score,
        arms=arms,
        from_scratch={name: found for name, found in differences.items() if found is not None},
        controls={name: better(TMU, name) for name in (SCRATCH, *CONTROLS)},
        sources=sources,
    )


def _taught_by(ledger: Ledger, sources: tuple[str, ...]) -> str | None:
    """The arm of memory transfer from just these sources that has runs."""
    for arm in ledger.arms:
        if arm.group in ("memory", "subset") and arm.sources == sources and arm.seeds:
            return arm.name
    return None


def _gates(ledger: Ledger) -> dict[str, tuple[float, ...]]:
    arm = ledger.arm(TMU)
    by_seed_SM = [
        record.evaluation.gates.per_teacher()
        for record in (arm.seeds.values() if arm else ())
        if record.evaluation.gates is not None
    ]
    return dict(zip(ledger.sources, zip(*by_seed_SM)))


def _same_bits(ledger: Ledger) -> bool | None:
    arms = [ledger.arm(name) for name in (NO_TEACHERS, NO_BETA)]
    first, second = ({} if arm is None else arm.seeds for arm in arms)
    seeds = first.keys() & second.keys()
    if not seeds:
        return None
    return all(_bits(first[s].evaluation) == _bits(second[s].evaluation) for s in seeds)


def _bits(result: EvaluationResult) -> dict[str, bytes]:
    values_NT = scores_of_sequences(result).values_NT
    return {name: values.tobytes() for name, values in values_NT.items()}
