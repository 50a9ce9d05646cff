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
        matched = {
            name: self.weights[name]
            for name, value in own.items()
            if name in self.weights and self.weights[name].shape == value.shape
        }
        unmatched = {
            name: f"{_shape(self.weights.get(name))} there, {_shape(value)} here"
            for name, value in own.items()
            if name not in matched
        }
        unused = tuple(sorted(self.weights.keys() - own.keys()))
        if not matched or (self.unmatched == "refuse" and (unmatched or unused)):
            shown = [f"{name} is {what}" for name, what in sorted(unmatched.items())]
            shown += [f"{name} is unknown here" for name in unused]
            raise TeacherError(
                f"The weights of teacher {self.name!r} do not fit the student: "
                f"{len(matched)} of its {len(own)} tensors match, {len(shown)} differ "
                f"({'; '.join(shown[:5])}{'; ...' if len(shown) > 5 else ''}). Use the model.* "
                "settings of its card"
                + (
                    ", or start the others at random with transfer.start.unmatched=random."
                    if matched
                    else "."
                )
            )
        with torch.no_grad():
            for name, value in matched.items():
                own[name].copy_(value)
        return StartReport(
            source=self.name,
            matched=tuple(matched),
            random=unmatched,
            unused=unused,
        )


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


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else "x".join(map(str, value.shape)) or "a number"
