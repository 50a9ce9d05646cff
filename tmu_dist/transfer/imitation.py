"""How states of a student are compared with its teachers' (Eq. 4): layers, weights, missing pixels.

What memory transfer and plain distillation share, down to the check that it teaches anything.

Legend: B batch, T time, C image channels, P memory channels, H, W height, width, h, w those of a
map, N any axes in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.config import ConfigError, ImitationConfig
from tmu_dist.models.rollout import StateName
from tmu_dist.models.shapes import MemoryShape
from tmu_dist.teachers.adapter import LayerPlan, TeacherPlan
from tmu_dist.teachers.bank import Teaching
from tmu_dist.transfer.base import (
    DeadDistillationError,
    Reduction,
    TrainingBatch,
    gradient_norm,
    is_negligible,
    reduce_squares,
    reduce_values,
    weighted,
)

Imitations = Mapping[int, Sequence[Tensor]]
"""By layer of the student, what is compared with each teacher, in its channels [B, T, P, h, w]."""

_LEAST_VARIANCE = 1e-6
"""transfer.imitation.scale=variance: of states that hardly change, which would count for all."""
_FADING = 0.5
"""transfer.imitation.masking=memory: what is left of an observation after a step without one."""


class Comparison:
    """The sum over layers and teachers of Eq. 4, for any state that teachers tell.

    Args:
        settings: which layers count, and each teacher and missing pixel how much.
        plans: how each teacher is used.
        reduction: over time, channels and pixels of a sequence.

    Raises:
        ConfigError: layers that the student has not, or that are not taught.
    """

    def __init__(
        self, settings: ImitationConfig, plans: Sequence[TeacherPlan], reduction: Reduction
    ) -> None:
        taught = {k: layer.student for plan in plans for k, layer in plan.layers.items()}
        chosen = taught.keys() if settings.layers == "all" else settings.layers
        if missing := sorted(set(chosen) - taught.keys()):
            raise ConfigError(
                f"transfer.imitation.layers={list(chosen)}: {missing} are no layers of this "
                "student that teachers could teach (the lowest is 0)."
            )
        self.shapes: dict[int, MemoryShape] = {k: taught[k] for k in chosen}
        """Of the student's maps in each layer that is compared."""
        self.weights = settings.teacher_weights or (1.0,) * len(plans)
        self.masking = settings.masking
        self.scale = settings.scale
        self.reduction = reduction

    def distance(
        self,
        imitations: Imitations,
        teachings: Sequence[Teaching],
        state: StateName,
        batch: TrainingBatch,
    ) -> Tensor:
        """This rank's share of Eq. 4 with weights and masks; a scalar.

        A teacher of weight 0 adds zeros to every gradient, so that its slot's parameters have one.
        """
        parts_B = []
        for k, each in self._compared(imitations).items():
            memories = [taught.states[state][k] for taught in teachings]
            share = self.share(batch, memories[0], k)
            parts_B += [
                weight * self._distance_B(imitation, memory, share)
                for imitation, memory, weight in zip(each, memories, self.weights, strict=True)
            ]
        return weighted(torch.stack(parts_B).sum(0), batch)

    def _distance_B(self, imitation: Tensor, memory: Tensor, share: Tensor | None) -> Tensor:
        """Of each sequence, from one teacher in one layer."""
        distance_B = reduce_squares(imitation - memory, self.reduction, share)
        return distance_B / variance(memory, share) if self.scale == "variance" else distance_B

    def correlations(
        self,
        imitations: Imitations,
        teachings: Sequence[Teaching],
        state: StateName,
        batch: TrainingBatch,
    ) -> list[list[float]]:
        """Pearson correlation with each teacher, by compared layer, then by teacher."""
        return [
            [
                correlation(
                    imitation,
                    taught.states[state][k],
                    self.share(batch, taught.states[state][k], k),
                )
                for imitation, taught in zip(each, teachings, strict=True)
            ]
            for k, each in self._compared(imitations).items()
        ]

    def share(self, batch: TrainingBatch, memory_BTPHW: Tensor, layer: int) -> Tensor | None:
        """What each element of a layer's maps counts, [B, T, 1, h, w]; None: 1."""
        if batch.observed_BTCHW is None or self.masking == "off":
            return None
        read_BTCHW = batch.observed_BTCHW[:, :-1]
        share_BT1HW = observed_share(read_BTCHW, memory_BTPHW, self.shapes[layer])
        return remembered_share(share_BT1HW) if self.masking == "memory" else share_BT1HW

    def counts(self, batch: TrainingBatch) -> bool:
        """Whether any element counts, so that there is something to imitate."""
        return self.masking == "off" or any_observed(batch, slice(None, -1))

    def _compared(self, imitations: Imitations) -> Imitations:
        return {k: each for k, each in imitations.items() if k in self.shapes}


class Projections(nn.ModuleDict):
    """Learned 1x1 convolutions without bias from the student's channels to a teacher's.

    They change what is compared and nothing else, and are gone after training. Were the teacher's
    states projected instead, projecting everything to 0 would be a solution.

    Args:
        layers: by layer of the student and teacher, those that have one.
    """

    def __init__(self, layers: Mapping[tuple[int, int], LayerPlan]) -> None:
        super().__init__(
            {
                _name(k, m): nn.Conv2d(plan.student.channels, plan.teacher.channels, 1, bias=False)
                for (k, m), plan in layers.items()
            }
        )

    def forward(self, imitations: Imitations) -> dict[int, tuple[Tensor, ...]]:
        """Imitations in their teachers' channels; those without a projection as they are."""
        return {
            k: tuple(self._project(each, _name(k, m)) for m, each in enumerate(by_teacher))
            for k, by_teacher in imitations.items()
        }

    def _project(self, imitation_BTPHW: Tensor, name: str) -> Tensor:
        if name not in self:
            return imitation_BTPHW
        projected_NPHW = self[name](imitation_BTPHW.flatten(0, 1))
        return projected_NPHW.unflatten(0, imitation_BTPHW.shape[:2])


def observed_share(observed_BTCHW: Tensor, memory_BTPHW: Tensor, shape: MemoryShape) -> Tensor:
    """Share of observed pixels in the patch under each element of a memory, [B, T, 1, h, w].

    Step t of an unrolled network reads frame t, so the shares of frames 1..T-1 belong to its
    memories. Where a step reads a prediction instead (scheduled sampling), the share is that of
    the true frame at its place: there is nothing else to compare a memory with.

    Args:
        observed_BTCHW: of the frames that the T steps read.
        memory_BTPHW: the memory; only its size and type are used.
        shape: of that memory at the size the network was built for.
    """
    rows = memory_BTPHW.shape[-2] // shape.slices
    share_NHW = observed_BTCHW.to(memory_BTPHW.dtype).mean(2).flatten(0, 1)
    share_N1HW = F.adaptive_avg_pool2d(share_NHW.unsqueeze(1), (rows, memory_BTPHW.shape[-1]))
    share_BT1HW = share_N1HW.unflatten(0, observed_BTCHW.shape[:2])
    return share_BT1HW.repeat(1, 1, 1, shape.slices, 1)


def remembered_share(share_BT1HW: Tensor) -> Tensor:
    """Shares that fade instead of ending: w_t = s_t + (1 - s_t) w_{t-1} / 2, from w_1 = s_1 on."""
    found = [share_BT1HW[:, 0]]
    for share in share_BT1HW[:, 1:].unbind(1):
        found.append(share + (1 - share) * _FADING * found[-1])
    return torch.stack(found, dim=1)


def variance(states_BTPHW: Tensor, share_BT1HW: Tensor | None) -> Tensor:
    """Variance of each sequence's states over all other axes, at least 1e-6, [B].

    Args:
        states_BTPHW: of a teacher.
        share_BT1HW: what each element counts; None: 1.
    """
    exact = states_BTPHW.float() if states_BTPHW.dtype.itemsize < 4 else states_BTPHW
    mean_B = reduce_values(exact, "mean", share_BT1HW)
    centred = exact - mean_B.reshape(-1, *(1,) * (exact.dim() - 1))
    return reduce_squares(centred, "mean", share_BT1HW).clamp(min=_LEAST_VARIANCE)


def any_observed(batch: TrainingBatch, frames: slice) -> bool:
    """Whether any pixel of these frames was observed in a sequence that counts."""
    if batch.observed_BTCHW is None:
        return True
    return bool(weighted(batch.observed_BTCHW[:, frames].flatten(1).sum(1), batch) > 0)


def teaching_norms(
    teaching: Tensor, own: Tensor, student: nn.Module, *, weights: str
) -> tuple[float, float]:
    """Norms of the gradients that give a student what its teachers tell, and the rest.

    Args:
        teaching: the weighted terms that come from teachers.
        own: the other terms.
        student: without what stands beside it, which could learn from a constant student.
        weights: the settings that weigh the teaching, and their values.

    Raises:
        DeadDistillationError: nothing comes from the teachers.
    """
    parameters = list(student.parameters())
    taught, learned = gradient_norm(teaching, parameters), gradient_norm(own, parameters)
    if is_negligible(taught, learned):
        raise DeadDistillationError(
            f"What comes from the teachers gives the student a gradient of norm {taught:.3g} "
            f"(the other terms: {learned:.3g}), so the teachers teach nothing. Check that "
            f"{weights} is not too small, that the teachers are trained networks, and that no loss "
            "term was dropped."
        )
    return taught, learned


def correlation(first: Tensor, second: Tensor, weights: Tensor | None) -> float:
    """Pearson correlation over all elements; NaN when one of them is constant."""
    a, b = first.detach().double(), second.double()
    w = torch.ones_like(a) if weights is None else weights.double().expand_as(a)
    a, b = ((x - (w * x).sum() / w.sum()) * w.sqrt() for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()))


def _name(layer: int, teacher: int) -> str:
    return f"layer{layer}_teacher{teacher}"
