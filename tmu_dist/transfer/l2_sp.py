"""L2-SP: finetuning that is held near its start (Li, Grandvalet, Davoine, ICML 2018; Table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tmu_dist.config import ConfigError, L2SPConfig
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.transfer.base import Forward, LossTerms, Task, Term, TrainingBatch
from tmu_dist.transfer.patterns import names_like
from tmu_dist.transfer.scratch import Scratch
from tmu_dist.transfer.start import Start

START, REST = "l2_sp_start", "l2_sp_rest"
"""Terms of the tensors that started from the teacher, and of those that started at random."""


class L2SP(Scratch):
    """Prediction loss, and a penalty on the distance of the weights from where they started.

        L = L_frame + alpha / 2 sum_{w in S} ||w - w0||^2 + beta / 2 sum_{w not in S} ||w||^2

    S are the parameters that start from the teacher's, w0. The penalty is a part of the loss and
    no decay in the optimiser. With both weights 0 this is finetuning, bit for bit.

    Args:
        task: what the student learns.
        settings: the weights, and which parameters count.
        start: where the student starts.
    """

    def __init__(self, task: Task, *, settings: L2SPConfig, start: Start) -> None:
        super().__init__(task)
        self.settings = settings
        self.start = start
        self.weights = {START: settings.alpha, REST: settings.beta}

    def trainee(self, student: Predictor) -> nn.Module:
        """The student, and where its parameters are held to; it alone if nothing holds them.

        Raises:
            ConfigError: an `exclude` pattern matches nothing, or no started parameter is left.
        """
        ties: dict[str, list[Tie]] = {START: [], REST: []}
        for name, parameter in self._counted(student).items():
            value = self.start.value_of(name, parameter)
            tie = Tie(parameter, torch.zeros_like(parameter) if value is None else value)
            ties[REST if value is None else START].append(tie)
        if self.settings.alpha and not ties[START]:
            raise ConfigError(
                "transfer.l2_sp.include and exclude leave out every parameter that starts from "
                f"{self.start.name!r}, so transfer.l2_sp.alpha={self.settings.alpha:g} has no "
                "effect: leave out fewer, or use transfer.method=finetune."
            )
        held = {term: each for term, each in ties.items() if each and self.weights[term]}
        return HeldStudent(student, held) if held else student

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        terms = super().loss(forward, batch)
        distances = terms.rollout.objectives
        return terms.with_terms(
            {
                term: Term(batch.share * distances[term], weight)
                for term, weight in self.weights.items()
                if term in distances
            }
        )

    def _counted(self, student: Predictor) -> dict[str, nn.Parameter]:
        """The parameters that a penalty sees, by name."""
        named = dict(student.named_parameters())
        excluded = {
            name
            for pattern in self.settings.exclude
            for name in names_like(pattern, named, "transfer.l2_sp.exclude")
        }
        return {
            name: parameter
            for name, parameter in named.items()
            if name not in excluded and (self.settings.include == "all" or _mixes(name, parameter))
        }


class Tie(NamedTuple):
    """A parameter, and the point that it is held to."""

    parameter: nn.Parameter
    point: Tensor


class HeldStudent(nn.Module):
    """A student whose rollouts also tell how far its weights are from the points they are held to.

    The distances are part of the forward pass, so that every use of a parameter lies inside what
    data-parallel training wraps; they are the same on all ranks.

    Args:
        student: the network, which is trained and offered; on its device.
        held: what is held where, by term.
    """

    def __init__(self, student: Predictor, held: Mapping[str, Sequence[Tie]]) -> None:
        super().__init__()
        self.student = student
        self._parameters_of = {term: [tie.parameter for tie in ties] for term, ties in held.items()}
        # Not buffers: data-parallel training sends those to all ranks at every step, and a
        # checkpoint needs no copy of what the teacher's weights tell.
        self._points = {term: _flat([tie.point for tie in ties]) for term, ties in held.items()}

    def forward(self, *inputs: Any, **settings: Any) -> Rollout:
        """As the student, whose objectives get one entry a term: half the squared distance."""
        rollout: Rollout = self.student(*inputs, **settings)
        distances = {
            term: 0.5 * (_flat(parameters) - self._points[term]).square().sum()
            for term, parameters in self._parameters_of.items()
        }
        return rollout._replace(objectives={**rollout.objectives, **distances})


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _mixes(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight of a convolution or linear layer.

    Gains and shifts have other names or one axis, whatever their normalisation; peepholes have
    another name.
    """
    return name.rpartition(".")[2] == "weight" and parameter.dim() > 1
