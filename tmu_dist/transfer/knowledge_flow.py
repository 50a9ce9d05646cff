"""Knowledge Flow: teachers' hidden states mixed into the student's until it stands alone.

Liu, Peng and Schwing, ICLR 2019 (paper, Table 1); docs/methods/knowledge_flow.md.

Legend: B batch, T time, C channels, P hidden channels, H, W map height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.config import ConfigError, KnowledgeFlowConfig
from tmu_dist.models.build import build_predictor
from tmu_dist.models.layer import Guide
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.teachers.adapter import LayerPlan, TeacherPlan
from tmu_dist.teachers.bank import TeacherBank, Teaching
from tmu_dist.transfer.base import (
    DeadDistillationError,
    Forward,
    Liveness,
    LossTerms,
    Task,
    TaughtMethod,
    Term,
    TrainingBatch,
    annealed,
    gradient_norm,
    is_negligible,
    reduce_squares,
    weighted,
)
from tmu_dist.transfer.imitation import any_observed


class KnowledgeFlow(TaughtMethod):
    """A plain student into whose layers teachers' hidden states flow, less and less of them.

    The objective is the frame terms, plus a rising weight times the mean over layers of -log of
    the student's own share, plus, if wanted, the distance from the last iterate's predictions. In
    the last iterations the teachers are not run and the student is trained as it is tested; if
    these are all iterations, training equals training from scratch bit for bit.

    Args:
        task, bank, teacher_input: as in `TaughtMethod`; the teachers tell their hidden states.
        settings: of the method.
        num_steps: iterations of the run, over which the curriculum is laid out.
    """

    def __init__(
        self,
        task: Task,
        *,
        settings: KnowledgeFlowConfig,
        num_steps: int,
        bank: TeacherBank,
        teacher_input: Literal["own", "student", "truth"],
    ) -> None:
        super().__init__(task, bank=bank, teacher_input=teacher_input)
        self.settings = settings
        self.taught_steps = num_steps - round(settings.alone_fraction * num_steps)
        self.ramp_steps = round(settings.ramp_fraction * num_steps)

    @property
    def unsteady(self) -> str | None:
        return "the curriculum of transfer.method=knowledge_flow changes its objective"

    def build_student(self) -> Predictor:
        return build_predictor(self.task.frame, self.task.model)

    def trainee(self, student: Predictor) -> nn.Module:
        """The student among its flows.

        Raises:
            ConfigError: the flows that the settings ask for do not fit the student's maps.
        """
        if not self.taught_steps:
            return student
        flows = Flows(self.bank.plans, self.settings)
        return FlowingStudent(student, flows, remembers=self.settings.consistency > 0)

    def rates(self) -> Mapping[str, float]:
        return {"flows.mixtures.*": self.settings.mixture_rate}

    def loss(self, forward: Forward, batch: TrainingBatch) -> LossTerms:
        if self.teaches_at(batch):
            compare = self.settings.consistency > 0
            rollout = self.unroll(forward, batch, teachings=self.teach(batch), compare=compare)
        else:
            rollout = self.unroll(forward, batch)
        terms = self.task.objective.terms(rollout, batch)
        if (dependence := rollout.objectives.get("dependence")) is not None:
            terms["independence"] = Term(batch.share * dependence, self._independence(batch.step))
        if (change_BTCHW := rollout.objectives.get("change_BTCHW")) is not None:
            change = self._change(change_BTCHW, batch)
            terms["consistency"] = Term(change, self.settings.consistency)
        return LossTerms(terms=terms, rollout=rollout)

    def teaches_at(self, batch: TrainingBatch) -> bool:
        return max(batch.step, 1) <= self.taught_steps

    def liveness(self, trainee: nn.Module, batch: TrainingBatch) -> Liveness | None:
        if not self.teaches_at(batch) or not any_observed(batch, slice(1, None)):
            return None
        assert isinstance(trainee, FlowingStudent)
        rollout = self.unroll(trainee, batch, teachings=self.teach(batch))
        own = self.own_terms(rollout, batch).total()
        taught = gradient_norm(own, trainee.flows.transforms.values())
        predicted = gradient_norm(own, trainee.student.parameters())
        own_shares = trainee.flows.own_shares()
        # The curriculum lets the flows dry up, and their gradients with them.
        flowing = 1 - min(own_shares)
        if flowing and is_negligible(taught, flowing * predicted):
            raise DeadDistillationError(
                f"The frames give the transforms of the teachers' states a gradient of norm "
                f"{taught:.3g} (the student: {predicted:.3g}) although {flowing:.3g} of a layer's "
                "output comes from teachers: nothing flows. Check that the teachers are trained "
                "networks, and that training.rates does not freeze all transforms."
            )
        return KnowledgeFlowLiveness(
            teaching_gradient_norm=taught,
            prediction_gradient_norm=predicted,
            own_shares=own_shares,
        )

    def _independence(self, step: int) -> float:
        """Weight of the dependence on teachers at an iteration."""
        return annealed(self.settings.independence, step, start=0, stop=self.ramp_steps)

    def _change(self, change_BTCHW: Tensor, batch: TrainingBatch) -> Tensor:
        """Divergence of this iterate's frames from the last one's as Gaussians of variance 1."""
        observed = batch.observed_targets_BTCHW
        reduction = self.task.objective.reduction
        return weighted(0.5 * reduce_squares(change_BTCHW, reduction, observed), batch)


@dataclass(frozen=True, kw_only=True)
class KnowledgeFlowLiveness(Liveness):
    """How much flows; the teaching gradient is the one that the frames give the transforms."""

    own_shares: list[float]
    """Share of the student's own hidden state in what each layer puts out."""


class Flow(NamedTuple):
    """What flows from one layer of a teacher into one of the student's."""

    teacher: int
    shown_as: int
    """Layer of the student under which the teacher tells that layer's states."""
    plan: LayerPlan


class Flows(nn.Module):
    """Mixtures of a student's hidden states with its teachers', and the transforms of these.

        F_k = p_k(0) H_k + sum_c p_k(c) Q_{k,c} * H_c          p_k = softmax(w_k), w_k = 0 at first

    Args:
        plans: how each teacher is used.
        settings: which layers flow where, and the kernels of Q.

    Raises:
        ConfigError: maps of two layers differ in size, or hold several time slices.
    """

    def __init__(self, plans: Sequence[TeacherPlan], settings: KnowledgeFlowConfig) -> None:
        super().__init__()
        layers = range(len(plans[0].layers))
        self.candidates = [_candidates(plans, layer, settings.candidates) for layer in layers]
        self.mixtures = nn.ParameterList(torch.zeros(1 + len(each)) for each in self.candidates)
        self.transforms = nn.ParameterDict(
            {
                _name(layer, flow): _transform(flow.plan, into, settings.kernel_size)
                for layer in layers
                for into in [plans[0].layers[layer].student.channels]
                for flow in self.candidates[layer]
            }
        )

    def forward(self, teachings: Sequence[Teaching]) -> list[Guide]:
        """What guides the student at each step."""
        shares = [mixture.softmax(0) for mixture in self.mixtures]
        by_layer = [
            self._from_teachers(layer, share[1:], teachings).unbind(1)
            for layer, share in enumerate(shares)
        ]
        own = [share[0] for share in shares]
        return [_Mixing(own, maps) for maps in zip(*by_layer, strict=True)]

    def dependence(self) -> Tensor:
        """Mean over layers of -log p_k(0); a scalar that is 0 for a student that stands alone."""
        return -torch.stack([mixture.log_softmax(0)[0] for mixture in self.mixtures]).mean()

    def idle(self) -> Tensor:
        """The dependence without flows: 0, and 0 in the gradient of every parameter."""
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0.0

    def own_shares(self) -> list[float]:
        """p_k(0) by layer."""
        return [float(mixture.detach().softmax(0)[0]) for mixture in self.mixtures]

    def _from_teachers(self, layer: int, shares: Tensor, teachings: Sequence[Teaching]) -> Tensor:
        """The sum over candidates at all steps, [B, T, P, H, W]."""
        found = []
        for flow, share in zip(self.candidates[layer], shares, strict=True):
            states_BTPHW = teachings[flow.teacher].states["hidden"][flow.shown_as]
            # As a factor of the filters, the share needs no copy of the maps for its gradient.
            filters = share * self.transforms[_name(layer, flow)]
            found.append(F.conv2d(states_BTPHW.flatten(0, 1), filters, padding="same"))
        return sum(found[1:], start=found[0]).unflatten(0, states_BTPHW.shape[:2])


class _Mixing(Guide):
    """One time step of the flows into every layer; on the way up only (recurrences keep H)."""

    def __init__(self, own: Sequence[Tensor], from_teachers: Sequence[Tensor]) -> None:
        self.own = own
        self.from_teachers = from_teachers

    def leave(self, layer: int, hidden_BPHW: Tensor) -> Tensor:
        return self.own[layer] * hidden_BPHW + self.from_teachers[layer]


class FlowingStudent(nn.Module):
    """A student among the flows from its teachers.

    Args:
        student: the network, which is trained and offered.
        flows: from the teachers.
        remembers: keep student and flows as they were before the last update.
    """

    def __init__(self, student: Predictor, flows: Flows, *, remembers: bool) -> None:
        super().__init__()
        self.student = student
        self.flows = flows
        self.last = copy.deepcopy(self._now()).requires_grad_(False) if remembers else None

    def forward(
        self,
        frames_BTCHW: Tensor,
        *,
        teachings: Sequence[Teaching] | None = None,
        compare: bool = False,
        **unrolling: Any,
    ) -> Rollout:
        """The student's rollout, with what the flows add to the objective.

        Args:
            frames_BTCHW: as in `Predictor.forward`, like the arguments not named here.
            teachings: of every teacher; None: the student is alone.
            compare: also tell how the predictions differ from those of the last iterate, and
                remember this one in its place. Once an update.

        Returns:
            A rollout whose `objectives` also have "dependence", and "change_BTCHW" if compared.
        """
        if teachings is None:
            rollout = self.student(frames_BTCHW, **unrolling)
            return _with(rollout, dependence=self.flows.idle())
        rollout = self.student(frames_BTCHW, guides=self.flows(teachings), **unrolling)
        rollout = _with(rollout, dependence=self.flows.dependence())
        if not compare:
            return rollout
        with torch.no_grad():
            assert self.last is not None
            guides = self.last["flows"](teachings)
            last: Rollout = self.last["student"](frames_BTCHW, guides=guides, **unrolling)
            self.last.load_state_dict(self._now().state_dict())
        return _with(rollout, change_BTCHW=rollout.predictions_BTCHW - last.predictions_BTCHW)

    def _now(self) -> nn.ModuleDict:
        return nn.ModuleDict({"student": self.student, "flows": self.flows})


def _candidates(
    plans: Sequence[TeacherPlan], layer: int, choice: Literal["same", "all"]
) -> list[Flow]:
    """What flows into a layer: of each teacher the layer that teaches it, or all that teach any."""
    found = []
    for m, plan in enumerate(plans):
        # A layer that teaches several of the student's is one candidate.
        shown_as = {each.teacher_layer: k for k, each in plan.layers.items()}.values()
        found += [Flow(m, k, plan.layers[k]) for k in (shown_as if choice == "all" else [layer])]
    into = plans[0].layers[layer].student
    for flow in found:
        if flow.plan.student[1:] != into[1:]:
            raise ConfigError(
                "transfer.knowledge_flow.candidates=all needs maps of one size in all layers: "
                f"layer {layer} of this student has {into}, layer {flow.shown_as} "
                f"{flow.plan.student} (channels x height x width). Use candidates=same."
            )
    return found


def _transform(plan: LayerPlan, out_channels: int, kernel_size: int) -> Tensor:
    """First filters of a transform: the identity if both have the same channels, else random."""
    if plan.student.slices > 1 and kernel_size > 1:
        raise ConfigError(
            f"transfer.knowledge_flow.kernel_size={kernel_size} does not work with a student "
            f"whose maps hold {plan.student.slices} time slices: use 1."
        )
    channels = plan.teacher.channels
    filters = nn.Conv2d(channels, out_channels, kernel_size, bias=False).weight
    return nn.init.dirac_(filters) if channels == out_channels else filters


def _name(layer: int, flow: Flow) -> str:
    return f"layer{layer}_teacher{flow.teacher}_layer{flow.plan.teacher_layer}"


def _with(rollout: Rollout, **objectives: Tensor) -> Rollout:
    return rollout._replace(objectives={**rollout.objectives, **objectives})
