"""Did two runs do the same? What is compared, and how far apart they are.

Steps and the position in the data must be the same. Losses differ by their largest difference in
parts of the step's whole loss, validation scores in parts of themselves, and weights by the largest
difference in a tensor in parts of the largest number in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tmu_dist.data.storage import join_url
from tmu_dist.folders import list_folders
from tmu_dist.run_folder import PROVENANCE_FILE, read_json, read_log
from tmu_dist.teachers.store import load_weights
from tmu_dist.training.checkpoint import FACTS_FILE

WEIGHTS_TOLERANCE = 20.0
"""Weights may differ by this many times the tolerance of losses: Adam divides by the size of the
gradient, so where that is tiny, its last digits move a weight as far as all of them elsewhere."""

ByStep = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison."""

    run: str
    what: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """No also where the difference is not a number."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        limit = f"at most {self.allowed:.0e}" if self.allowed else "must be 0"
        return f"{verdict}  {self.run:10}{self.what:34}{self.difference:9.2g}  ({limit})"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left behind."""

    steps: list[int]
    """Of the training events in the log, as they stand there."""
    losses: ByStep
    """Terms of the objective."""
    scores: ByStep
    """Of the validations."""
    position: Mapping[str, Any]
    """In the data at the newest checkpoint, and what it depends on."""
    weights: Mapping[str, Tensor]
    """Of the newest checkpoint."""
    from_step: int
    """Where its last start began."""
    world_size: int
    """Ranks of its last start."""
    device: str


def outcome_of(run: str) -> Outcome:
    """Read what is compared from a run folder that has a checkpoint; every step must be logged."""
    events = read_log(run)
    training = [event for event in events if event["event"] == "train"]
    newest = newest_checkpoint(run)
    assert newest is not None
    facts = read_json(run, f"{newest}/{FACTS_FILE}")
    last_start = read_json(run, PROVENANCE_FILE)["starts"][-1]
    return Outcome(
        steps=[event["step"] for event in training],
        losses={
            event["step"]: {k: v for k, v in event.items() if k.startswith("loss/")}
            for event in training
        },
        scores={
            event["step"]: {k: v for k, v in event.items() if k not in ("event", "step", "seconds")}
            for event in events
            if event["event"] == "validation"
        },
        position={"consumed": facts["progress"]["consumed"], **facts["data"]},
        weights=load_weights(join_url(run, newest))[1],
        **{name: last_start[name] for name in ("from_step", "world_size", "device")},
    )


def newest_checkpoint(run: str) -> str | None:
    """Path of the newest whole checkpoint in a run folder."""
    found = list_folders(run, "checkpoints", FACTS_FILE)
    return found[-1] if found else None


def compare(run: str, expected: Outcome, found: Outcome, *, tolerance: float) -> list[Check]:
    """Compare a run with the one that it should equal.

    Args:
        run: its name in the checks.
        expected: of the other one.
        found: of this one.
        tolerance: of losses and scores; 0: everything must have the same bits.
    """
    repeated = len(found.steps) - len(set(found.steps))
    wrong_steps = len(set(expected.steps) ^ set(found.steps)) + repeated
    moved = sum(found.position.get(name) != value for name, value in expected.position.items())
    totals = {step: terms["loss/total"] for step, terms in expected.losses.items()}
    measured: dict[str, tuple[float, float]] = {
        "steps missing or repeated": (wrong_steps, 0.0),
        "position in the data": (moved, 0.0),
        "losses of all steps": (_difference(expected.losses, found.losses, totals), tolerance),
        "validation scores": (_difference(expected.scores, found.scores), tolerance),
        "final weights": (
            _weights_difference(expected.weights, found.weights),
            tolerance * WEIGHTS_TOLERANCE,
        ),
    }
    return [
        Check(run=run, what=what, difference=float(difference), allowed=allowed)
        for what, (difference, allowed) in measured.items()
    ]


def _difference(
    expected: ByStep, found: ByStep, wholes: Mapping[int, float] | None = None
) -> float:
    """The largest one in parts of `wholes` by step, or of the value itself."""
    if {step: values.keys() for step, values in expected.items()} != {
        step: values.keys() for step, values in found.items()
    }:
        return math.inf
    return _largest(
        [
            abs(found[step][name] - value) / (abs(wholes[step] if wholes else value) or 1.0)
            for step, values in expected.items()
            for name, value in values.items()
        ]
    )


def _weights_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """In parts of the largest number of a tensor."""
    if expected.keys() != found.keys():
        return math.inf
    return _largest(
        [
            float((found[name] - value).abs().max()) / (float(value.abs().max()) or 1.0)
            for name, value in expected.items()
        ]
    )


def _largest(values: Sequence[float]) -> float:
    """The largest, which is NaN if any is: `max` may overlook it."""
    return math.nan if any(map(math.isnan, values)) else max(values)
