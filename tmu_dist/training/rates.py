"""Which parameters learn, and how fast: factors of the run's learning rate by name pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from tmu_dist.config import ConfigError
from tmu_dist.models.rollout import Predictor
from tmu_dist.transfer.patterns import names_like


def rate_groups(
    student: Predictor,
    trainee: nn.Module,
    *,
    of_method: Mapping[str, float] | None = None,
    chosen: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Freeze what is not to learn, and group the rest by learning rate, as optimisers take it.

    Call it before the trainee is wrapped for data-parallel training, which asks once what has a
    gradient. What is frozen already, such as teachers inside a student, stays so.

    Args:
        student: whose parameters go by their own names (`stack.layers.0.cell.gates.weight`).
        trainee: whose parameters are trained; those beside the student go by its names.
        of_method: factors by pattern (`TransferMethod.rates`); what one names may be absent.
        chosen: "PATTERN=FACTOR" (`training.rates`), counting after the method's.

    Returns:
        Groups of "params" with their "factor": of parameters that several patterns match, the last
        counts; without any, 1. Factor 0 is in no group: those parameters are frozen.

    Raises:
        ConfigError: an entry that cannot be read or matches nothing, or a student all frozen.
    """
    trained = _trained(student, trainee)
    names = [name for name, _ in trained]
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in (of_method or {}).items():
        factors |= {name: factor for name in names if fnmatchcase(name, pattern)}
    for pattern, factor in map(_read, chosen):
        factors |= dict.fromkeys(names_like(pattern, names, "training.rates"), factor)

    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained:
        if factors[name]:
            groups.setdefault(factors[name], []).append(parameter)
        else:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(
            f"training.rates={list(chosen)} freezes the whole student, so the network that the run "
            f"offers would learn nothing: give some of {names[0]}, ..., {names[-1]} a factor above "
            "0."
        )
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def _trained(student: Predictor, trainee: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are not frozen, in the trainee's order, by the names that users know."""
    own = {id(parameter): name for name, parameter in student.named_parameters()}
    return [
        (own.get(id(parameter), name), parameter)
        for name, parameter in trainee.named_parameters()
        if parameter.requires_grad
    ]


def _read(entry: str) -> tuple[str, float]:
    pattern, _, number = entry.rpartition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not pattern or not 0 <= factor < math.inf:
        raise ConfigError(
            f"training.rates has {entry!r}: write PATTERN=FACTOR, a name pattern and a number from "
            "0 (frozen) on, such as 'stack.layers.0.*=0.1'."
        )
    return pattern, factor
