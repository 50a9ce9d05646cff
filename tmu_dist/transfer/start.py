"""Where a student starts: the tensors that it takes from a trained network, and those it does not.

Finetuning is training with such a start (Table 1); every other method can have one, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tmu_dist.teachers.card import TeacherError


@dataclass(frozen=True, kw_only=True)
class Start:
    """A trained network's weights, for whatever tensors of a student have their name and shape."""

    name: str
    """Of the trained network."""
    weights: Mapping[str, Tensor]
    unmatched: Literal["refuse", "random"]
    """What to do with the student's other tensors."""

    def value_of(self, name: str, own: Tensor) -> Tensor | None:
        """What a tensor of a student starts from; None: nothing here has its name and shape."""
        value = self.weights.get(name)
        return value if value is not None and value.shape == own.shape else None

    def apply(self, plain: nn.Module, names: frozenset[str]) -> StartReport:
        """Copy what fits into a student and tell what did not.

        Args:
            plain: the student's plain part.
            names: of the plain network's tensors; others of the student, such as distillers, have
                no counterpart by design.

        Raises:
            TeacherError: some tensors do not fit, and `unmatched` refuses that; or none fits.
        """
        own = {name: value for name, value in plain.state_dict().items() if name in names}
        started = {name: self.value_of(name, value) for name, value in own.items()}
        report = StartReport(
            source=self.name,
            matched=tuple(name for name, value in started.items() if value is not None),
            random={
                name: f"{_shape(self.weights.get(name))} there, {_shape(own[name])} here"
                for name, value in started.items()
                if value is None
            },
            unused=tuple(sorted(self.weights.keys() - own.keys())),
        )
        is_partial = bool(report.random or report.unused)
        if not report.matched or (is_partial and self.unmatched == "refuse"):
            raise TeacherError(_refusal(report))
        with torch.no_grad():
            for name in report.matched:
                own[name].copy_(self.weights[name])
        return report


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """Which tensors of a student came from where."""

    source: str
    matched: tuple[str, ...]
    """Tensors that have the source's values."""
    random: Mapping[str, str]
    """Tensors that kept their random start, and why."""
    unused: tuple[str, ...]
    """Tensors of the source that the student has not."""


def _refusal(report: StartReport) -> str:
    """Why a start is refused, and what to do."""
    shown = [f"{name} is {what}" for name, what in sorted(report.random.items())]
    shown += [f"{name} is unknown here" for name in report.unused]
    advice = "Use the model.* settings of its card"
    if report.matched:
        advice += ", or start the others at random with transfer.start.unmatched=random"
    return (
        f"The weights of teacher {report.source!r} do not fit the student: of its "
        f"{len(report.matched) + len(report.random)} tensors {len(report.matched)} are found there "
        "under the same name and shape "
        f"({'; '.join(shown[:5])}{'; ...' if len(shown) > 5 else ''}). {advice}."
    )


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else "x".join(map(str, value.shape)) or "a number"
