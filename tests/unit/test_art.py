"""Attentive transfer: the merge equals its equations, sees no future, and keeps its sources.

Legend: B batch, T time, M sources, C channels, P hidden channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import TINY_MODEL
from tests.contracts.test_predictor import FRAME as OTHER_FRAME
from tests.contracts.test_predictor import small
from tests.unit.test_training import assert_same
from tests.unit.test_transfer import FRAME, INPUTS, batch, task, teacher
from tmu_dist.backbones import BACKBONES
from tmu_dist.config import (
    AdapterConfig,
    ARTConfig,
    ConfigError,
    ModelConfig,
    TMUConfig,
    WindowConfig,
)
from tmu_dist.data.manifest import Units
from tmu_dist.models.attention import StateMerge
from tmu_dist.models.build import build_predictor, count_parameters, count_trained
from tmu_dist.models.cells.base import CellState
from tmu_dist.models.layer import Guide
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.adapter import LayerPlan, TeacherPlan
from tmu_dist.teachers.bank import FrozenTeacher
from tmu_dist.teachers.card import DataFacts, TeacherCard, TeacherError
from tmu_dist.teachers.sourced import SourcedPredictor
from tmu_dist.transfer.art import ARTLiveness, AttentiveTransfer
from tmu_dist.transfer.base import DeadDistillationError, Objective, Task, TrainingBatch

BOTH = ARTConfig()
VARIANTS = {
    "joint": BOTH,
    "sequential": ARTConfig(sources="sequential"),
    "no-gate": ARTConfig(gate=False),
    "hidden-3x3": ARTConfig(states="hidden", kernel_size=3),
    "window": ARTConfig(window=2),
}


CARD = TeacherCard(
    name="one", method="scratch", step=1, seed=0, frame=FRAME, window=WindowConfig(),
    model=TINY_MODEL, tmu=TMUConfig(), num_slots=0,
    data=DataFacts(archive="digits", manifest_hash="", frame_interval_minutes=None,
                   units=Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0,
                               missing_code=None)),
)  # fmt: skip


def sourced(art: ARTConfig = BOTH, *, seeds: Sequence[int] = (1, 2)) -> SourcedPredictor:
    """A tiny student with frozen sources of those seeds; merges have no zeros left."""
    sources = [FrozenTeacher(teacher(seed)) for seed in seeds]
    student = SourcedPredictor(teacher(3), sources, art)
    generator = torch.Generator().manual_seed(4)
    for weight in student.merges.parameters():
        weight.data.normal_(std=0.3, generator=generator)
    return student


def unrolled(network: Predictor, given: TrainingBatch, **more: Any) -> Rollout:
    """As training runs it."""
    return network(
        given.frames_BTCHW,
        num_input_frames=INPUTS,
        num_frames=given.frames_BTCHW.shape[1],
        sampling_mask_BT=given.sampling_mask_BT,
        **more,
    )


def art_method(
    *sources: Predictor, settings: ARTConfig = BOTH, learned: Task | None = None
) -> AttentiveTransfer:
    return AttentiveTransfer(
        learned or task(),
        settings=settings,
        adapter=AdapterConfig(),
        teachers=[(CARD, FrozenTeacher(each)) for each in sources],
    )


# The equations


def expected_merge(merge: StateMerge, x: Tensor, s: Tensor, states_BTMPHW: Tensor) -> Tensor:
    """The merged state, position by position."""
    w = dict(merge.named_parameters())

    def conv(weight: Tensor, maps: Tensor) -> Tensor:
        return F.conv2d(maps, weight, padding=weight.shape[-1] // 2)

    def per_pixel(name: str, maps: Tensor) -> Tensor:
        return torch.einsum("op,bphw->bohw", w[name][..., 0, 0], maps)

    positions = [S for step in states_BTMPHW.unbind(1) for S in step.unbind(1)]
    query = per_pixel("query.weight", s)
    e = [per_pixel("score.weight", torch.tanh(query + per_pixel("key.weight", S)))
         for S in positions]  # fmt: skip
    total = sum(each.exp() for each in e)
    R = sum(each.exp() / total * S for each, S in zip(e, positions, strict=True))
    if "gate.weight" in w:
        now = states_BTMPHW[:, -1].unbind(1)
        q = w.get("source_logits", torch.zeros(1, dtype=s.dtype)).exp()
        A = sum(share * S for share, S in zip(q / q.sum(), now, strict=True))
        Uo, Co = w["gate.weight"].split(s.shape[1], 1)
        u = torch.sigmoid(conv(Uo, A) + conv(Co, R))
        R = (1 - u) * A + u * R
    Wr, Wz, W = w["of_input.weight"].chunk(3)
    Ur, Uz = w["of_state.weight"].chunk(2)
    Cr, Cz, Cn = w["of_source.weight"].chunk(3)
    r = torch.sigmoid(conv(Wr, x) + conv(Ur, s) + conv(Cr, R))
    z = torch.sigmoid(conv(Wz, x) + conv(Uz, s) + conv(Cz, R))
    n = torch.tanh(conv(W, x) + conv(w["of_reset_state.weight"], r * s) + conv(Cn, R))
    return (1 - z) * s + z * n


@dataclass
class ExpectedGuide(Guide):
    """Merges by the equations, one step."""

    student: SourcedPredictor
    seen: dict[str, list[list[Tensor]]]
    """States [B, T, P, h, w] up to the step, by name, source and layer."""

    def enter(self, layer: int, x_BCHW: Tensor, state: CellState) -> CellState:
        new = {"hidden": state.hidden_BPHW, "memory": state.memory_BPHW}
        for name, merges in self.student.merges[layer].items():
            of_sources = [layers[layer] for layers in self.seen[name]]
            if len(merges) == 1:
                new[name] = expected_merge(
                    merges[0], x_BCHW, new[name], torch.stack(of_sources, dim=2)
                )
            else:
                for merge, states in zip(merges, of_sources, strict=True):
                    new[name] = expected_merge(merge, x_BCHW, new[name], states.unsqueeze(2))
        return CellState(new["hidden"], new["memory"])


@pytest.mark.parametrize("closed_loop", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_student_reads_its_sources_by_the_equations(variant: str, closed_loop: bool) -> None:
    student = sourced(VARIANTS[variant]).double()
    given = batch()
    given = replace(given, frames_BTCHW=given.frames_BTCHW.double())
    if closed_loop:
        given = replace(given, sampling_mask_BT=None)  # type: ignore[arg-type]
    told = [unrolled(source.network, given) for source in student.sources]
    first = (lambda t: max(0, t - 1)) if variant == "window" else (lambda t: 0)
    guides = [
        ExpectedGuide(
            student,
            {
                name: [[states[:, first(t) : t + 1] for states in each.states(name)]
                       for each in told]
                for name in ("hidden", "memory")
            },
        )
        for t in range(5)
    ]  # fmt: skip
    expected = unrolled(student.network, given, guides=guides).predictions_BTCHW
    found = unrolled(student, given).predictions_BTCHW
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    alone = unrolled(student.network, given).predictions_BTCHW
    assert (found - alone).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("art", "own"),
    [
        (ARTConfig(), 3_379_712 + 2 * 4 * 2),
        (ARTConfig(sources="sequential"), 3_787_776),
        (ARTConfig(states="hidden", kernel_size=3), 4_543_744 + 2 * 4),
        (ARTConfig(states="hidden", kernel_size=3, gate=False), 4_248_832),
    ],
)
def test_parameters_of_the_papers_network(art: ARTConfig, own: int) -> None:
    frame, model = FrameShape(channels=1, height=64, width=64), ModelConfig(peephole="none")
    with torch.device("meta"):
        sources = [FrozenTeacher(build_predictor(frame, model)) for _ in range(2)]
        student = SourcedPredictor(build_predictor(frame, model), sources, art)
    assert count_trained(student) == own
    assert count_parameters(student) == own + 2 * 2_971_648
    assert not any(module.bias is not None for module in student.merges.modules()
                   if isinstance(module, nn.Conv2d))  # fmt: skip


def force_update(merge: StateMerge, amount: float) -> None:
    """Add to the pre-activation of z: at +-1e6 it is exactly 1 or 0."""

    def add(module: nn.Module, given: object, output: Tensor) -> Tensor:
        reset, update, new = output.chunk(3, 1)
        return torch.cat([reset, update + amount, new], 1)

    merge.of_source.register_forward_hook(add)


def merges_of(student: SourcedPredictor, layer: int) -> list[StateMerge]:
    return [m for m in student.merges[layer].modules() if isinstance(m, StateMerge)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("cell", BACKBONES)
def test_every_backbone_merges_and_without_update_is_the_plain_network(cell: str) -> None:
    torch.manual_seed(0)
    sources = [FrozenTeacher(build_predictor(OTHER_FRAME, small(cell)))]
    plain = build_predictor(OTHER_FRAME, small(cell))
    student = SourcedPredictor(plain, sources, BOTH)
    assert student.frame_loss == plain.frame_loss
    generator = torch.Generator().manual_seed(1)
    given = TrainingBatch(
        frames_BTCHW=torch.rand(2, 6, 2, 12, 20, generator=generator),
        observed_BTCHW=None,
        sampling_mask_BT=torch.ones(2, 2, dtype=torch.bool),
        weights_B=torch.full((2,), 0.5),
    )
    noise = torch.randn(2, 5, plain.noise_size, generator=generator) if plain.latent_size else None
    rollout = unrolled(student, given, noise_BTZ=noise)
    terms = Objective(student.frame_loss).terms(rollout, given)
    sum(term.value for term in terms.values()).backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(m.of_source.weight.grad.any() for k in range(len(student.merges))
               for m in merges_of(student, k))  # fmt: skip

    for k in range(len(student.merges)):
        for merge in merges_of(student, k):
            force_update(merge, -1e6)
    off = unrolled(student, given, noise_BTZ=noise)
    assert torch.equal(
        off.predictions_BTCHW, unrolled(plain, given, noise_BTZ=noise).predictions_BTCHW
    )
    assert not torch.equal(off.predictions_BTCHW, rollout.predictions_BTCHW)


# Nothing from the future, nothing from others


def peeking(seed: int) -> Predictor:
    """A network that reads the next frame wherever it is shown, as a posterior does."""
    network = teacher(seed)
    network.learns_from_targets = True
    step = network.step

    def peek(frame_BCHW: Tensor, state: Any, *, target_BCHW: Tensor | None, **more: Any) -> Any:
        seen = frame_BCHW if target_BCHW is None else target_BCHW
        return step(seen, state, target_BCHW=None, **more)

    network.step = peek  # type: ignore[method-assign]
    return network


def test_no_step_knows_a_later_frame_even_if_a_source_would() -> None:
    given = batch()
    shown = replace(given, sampling_mask_BT=torch.ones(2, 2, dtype=torch.bool))
    hidden = replace(given, sampling_mask_BT=torch.zeros(2, 2, dtype=torch.bool))

    def with_other(batch_: TrainingBatch, first: int) -> TrainingBatch:
        frames = batch_.frames_BTCHW.clone()
        frames[:, first:] = 1 - frames[:, first:]
        return replace(batch_, frames_BTCHW=frames)

    def predicted(network: Predictor, batch_: TrainingBatch) -> Tensor:
        return unrolled(network, batch_).predictions_BTCHW

    other = with_other(shown, 4)
    alone = peeking(1)
    assert not torch.equal(predicted(alone, shown)[:, 3], predicted(alone, other)[:, 3])
    student = SourcedPredictor(teacher(3), [FrozenTeacher(peeking(1))],
                               BOTH)  # fmt: skip
    before, after = predicted(student, shown), predicted(student, other)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4], after[:, 4])
    before = predicted(student, hidden)
    assert torch.equal(before, predicted(student, with_other(hidden, INPUTS)))
    closed = student.predict(given.frames_BTCHW[:, :INPUTS], 3)
    torch.testing.assert_close(before[:, INPUTS - 1 :], closed, rtol=0, atol=0)


def test_sequences_of_a_batch_do_not_influence_each_other() -> None:
    student, given = sourced().double(), batch(3).frames_BTCHW.double()
    together = student.predict(given[:, :INPUTS], 3)
    alone = student.predict(given[1:2, :INPUTS], 3)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-12)


def test_memories_stay_float32_under_autocast() -> None:
    student = sourced()
    full = unrolled(student, batch()).predictions_BTCHW
    with torch.autocast("cpu", torch.bfloat16):
        rollout = unrolled(student, batch())
    rollout.predictions_BTCHW.square().mean().backward()
    assert all(memory.dtype == torch.float32 for memory in rollout.memories)
    error = (rollout.predictions_BTCHW - full).abs().max()
    assert 0 < error < 0.03
    assert all(weight.grad is not None for weight in student.merges.parameters())  # type: ignore[attr-defined]


def test_guides_of_others_are_refused() -> None:
    with pytest.raises(ValueError, match="guides itself"):
        unrolled(sourced(), batch(), guides=[Guide()] * 5)


# The method


def gradients(*seeds: int) -> list[Tensor]:
    method = art_method(*(teacher(seed) for seed in seeds))
    torch.manual_seed(0)
    student = method.build_student()
    method.loss(student, batch()).total().backward()
    return [p.grad for p in method.plain_part(student).parameters() if p.grad is not None]


def test_the_student_starts_plain_and_its_sources_matter() -> None:
    torch.manual_seed(0)
    plain = build_predictor(FRAME, TINY_MODEL)
    torch.manual_seed(0)
    method = art_method(teacher(1))
    torch.manual_seed(0)
    assert_same(dict(method.plain_part(method.build_student()).state_dict()),
                dict(plain.state_dict()))  # fmt: skip
    at_zero = [weight for name, weight in art_method(teacher(1), teacher(2)).build_student()
               .named_parameters() if name.endswith(("gate.weight", "source_logits"))]  # fmt: skip
    assert len(at_zero) == 2 * 2 * 2 and not any(weight.any() for weight in at_zero)
    ours, others = gradients(1, 2), gradients(1, 7)
    assert len(ours) == len(list(plain.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(1, 2), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_but_the_sources_learns(variant: str) -> None:
    student = sourced(VARIANTS[variant]).train()
    before = {name: value.clone() for name, value in student.sources.state_dict().items()}  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    unrolled(student, batch()).predictions_BTCHW.square().mean().backward()
    optimizer.step()
    for name, value in student.named_parameters():
        assert (value.grad is None) == name.startswith("sources."), name
        assert value.grad is None or value.grad.any(), name
    assert not any(source.network.training for source in student.sources)
    assert_same(dict(student.sources.state_dict()), before)  # type: ignore[attr-defined]


def test_liveness_tells_what_the_merges_do_and_leaves_no_trace() -> None:
    method = art_method(teacher(1), teacher(2))
    student = method.build_student()
    assert isinstance(student, SourcedPredictor)
    for merge in merges_of(student, 1):
        force_update(merge, 1e6)
    report = method.liveness(student, batch())
    assert isinstance(report, ARTLiveness)
    assert 0.3 < report.merge_means[0] < 0.7 and report.merge_means[1] == 1.0
    assert report.teaching_gradient_norm > 0
    readers = [m.of_source.weight for k in (0, 1) for m in merges_of(student, k)]
    method.loss(student, batch()).total().backward()
    expected = torch.stack([weight.grad.norm() for weight in readers]).norm()  # type: ignore[union-attr]
    assert report.teaching_gradient_norm == pytest.approx(float(expected), rel=1e-5)
    student.zero_grad()
    method.liveness(student, batch())
    assert all(p.grad is None for p in student.parameters())
    assert not any(m._forward_hooks for m in merges_of(student, 0))


def test_sources_that_say_nothing_are_an_error() -> None:
    silent = teacher(1)
    for weight in silent.parameters():
        weight.data.zero_()
    method = art_method(silent)
    with pytest.raises(DeadDistillationError, match="teachers' states"):
        method.liveness(method.build_student(), batch())
    unobserved = replace(batch(), observed_BTCHW=torch.zeros(2, 6, 1, 16, 16, dtype=torch.bool))
    assert method.liveness(method.build_student(), unobserved) is None


def test_what_cannot_be_merged_is_refused() -> None:
    network = teacher(1)
    shape = network.memory_shapes[0]
    plan = TeacherPlan(frame=None, layers={0: LayerPlan(0, shape._replace(channels=9), shape)})
    with pytest.raises(TeacherError, match="layer 0: teacher 9, student 4.*channels=project"):
        AttentiveTransfer(
            task(),
            settings=BOTH,
            adapter=AdapterConfig(channels="project"),
            teachers=[(CARD, FrozenTeacher(network, plan))],
        )
    volumes = replace(TINY_MODEL, cell="e3d_lstm")
    method = art_method(
        build_predictor(FRAME, volumes),
        settings=ARTConfig(kernel_size=3),
        learned=replace(task(), model=volumes),
    )
    with pytest.raises(ConfigError, match="kernel_size=3 .* 2 time slices"):
        method.build_student()
