"""The reference and settings of this project side by side, on one work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.provenance import say
from benchmarks.speed.measure import Floors, Run, alternate, peak_bytes, relative_difference
from benchmarks.speed.options import Effort
from benchmarks.speed.work import (
    REFERENCE,
    SETTINGS,
    Contender,
    Reference,
    Work,
    agreement,
    contender,
    prepare_forecast,
    prepare_training,
)

Part = Literal["train", "forecast"]


def compare(
    work: Work, names: Sequence[str], part: Part, floors: Floors, effort: Effort
) -> dict[str, Any]:
    """Time, operations, memory and agreement of each contender, by name.

    Args:
        work: what is computed.
        names: of contenders, the reference among them.
        part: a training step, or forecasts of the batch.
        floors: measured in every round.
        effort: how long is measured.
    """
    say(f"{part}: {work.facts()}")
    contenders: dict[str, Contender] = {}
    for name in names:
        say(f"{name}: building")
        contenders[name] = contender(name, work, effort.device)
    differences = (_of_training if part == "train" else _of_forecasts)(contenders, work, effort)
    runs: dict[str, Run] = {
        name: each.train if part == "train" else each.forecast for name, each in contenders.items()
    }
    times = timed_beside(runs, floors, effort)
    contenders.clear()
    runs.clear()
    prepare = prepare_training if part == "train" else prepare_forecast
    return {
        name: {
            "setting": dict(SETTINGS[name].overrides) if name in SETTINGS else None,
            "operations": operations(name, work, part),
            "seconds": times[name],
            "peak_bytes": peak(prepare, name, work, effort),
            "agreement": differences[name],
        }
        for name in names
    }


def timed_beside(runs: Mapping[str, Run], floors: Floors, effort: Effort) -> dict[str, list[float]]:
    """Seconds of every run by round, and the floors measured in each."""
    times = alternate(
        {"floors": floors.measure, **runs},
        effort.device,
        rounds=effort.rounds,
        seconds=effort.seconds,
    )
    return {name: times[name] for name in runs}


def peak(prepare: Callable[..., Run], name: str, work: Work, effort: Effort) -> int | None:
    """Peak memory of a contender's run; None where none is measured."""
    if not effort.measures_memory:
        return None
    say(f"{name}: memory")
    return peak_bytes(prepare, name, work, effort.device, device=effort.device)


def operations(name: str, work: Work, part: Part) -> int:
    """Of a call: those of the direct convolutions, but of teachers that need not run."""
    if part == "forecast":
        return work.forecast_operations
    is_cached = name in SETTINGS and SETTINGS[name].is_cached
    teachers = work.num_teachers * work.teacher_operations if is_cached else 0
    return work.training_operations - teachers


def _of_training(
    contenders: Mapping[str, Contender], work: Work, effort: Effort
) -> dict[str, dict[str, float]]:
    """Differences before an update from the reference, its own from float64; and of the loss after
    one."""
    exact = Reference(work, effort.device, dtype=torch.float64).outcome()
    expected = contenders[REFERENCE].outcome()
    found = {}
    losses = {}
    for name, each in contenders.items():
        say(f"{name}: first update")
        found[name] = agreement(each.outcome(), exact if name == REFERENCE else expected)
        each.train()
        losses[name] = float(each.outcome().loss)
    for name, loss in losses.items():
        found[name]["next_loss"] = abs(loss / losses[REFERENCE] - 1)
    return found


def _of_forecasts(
    contenders: Mapping[str, Contender], work: Work, effort: Effort
) -> dict[str, dict[str, float]]:
    """Differences from the reference, its own from float64."""
    exact = Reference(work, effort.device, dtype=torch.float64).forecast()
    expected = contenders[REFERENCE].forecast()

    def difference(name: str, found: Tensor) -> dict[str, float]:
        other = exact if name == REFERENCE else expected
        return {"predictions": relative_difference([found], [other])}

    return {name: difference(name, each.forecast()) for name, each in contenders.items()}
