"""What every transfer method must do, whatever it learns from: a check a promise, run for each.

The checks are plain functions that raise AssertionError, so that test_broken_methods.py can prove
that they notice what they are for. What a method is expected to be is its entry in
tests/transfer_methods.py.

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.conftest import TINY_MODEL
from tests.transfer_methods import (
    CASES,
    FRAME,
    STEPS,
    Case,
    batch,
    built,
    case_of,
    differ,
    gradients,
    learning,
    masked,
    numbers_of_merges,
    optimised,
    same_bits,
    teachers_of,
    terms_of,
    trained,
    untrained_teachers,
)
from tests.unit.test_training import MODELS, assert_same, final_state, run_until
from tests.unit.test_training import run as train
from tmu_dist.backbones import BACKBONES
from tmu_dist.config import (
    AdapterConfig,
    AdversarialConfig,
    DistillationConfig,
    ModelConfig,
    RunConfig,
)
from tmu_dist.config.transfer import Method
from tmu_dist.data.loader import open_archive
from tmu_dist.models.attention import Merged, StateMerge
from tmu_dist.models.build import build_predictor, skeleton
from tmu_dist.teachers.card import DataFacts
from tmu_dist.teachers.store import load_model, load_weights

TeachersOf = Callable[[str], tuple[str, ...]]
"""Folders of two teachers of a backbone."""


# The promises


def check_teachers_stay_frozen(config: RunConfig) -> None:
    """Training changes no bit of a teacher, and no optimiser holds one, itself or as a copy."""
    run = built(config)
    teachers = teachers_of(run)
    files = [load_weights(source)[1] for source in config.transfer.teachers]
    if config.transfer.method not in ("finetune", "l2_sp"):
        assert len(teachers) == len(files), "some teachers are out of sight"
    before = [{k: v.clone() for k, v in each.state_dict().items()} for each in teachers]
    if config.transfer.starting_teacher is None:
        theirs = [value for each in [*files, *before] for value in each.values()]
        copies = [p for p in optimised(run) if any(same_bits(p, value) for value in theirs)]
        assert not copies, "an optimiser holds a teacher's weights"
    trained(run, 3)
    frozen = {id(p) for each in teachers for p in each.parameters()}
    assert not frozen & {id(p) for p in optimised(run)}, "an optimiser holds a teacher"
    for each, state in zip(teachers, before, strict=True):
        now = each.state_dict()
        assert all(same_bits(now[k], value) for k, value in state.items()), (
            "training changes a teacher"
        )
        assert not any(p.requires_grad or p.grad is not None for p in each.parameters())
        assert not any(module.training for module in each.modules())


def check_every_teacher_matters(config: RunConfig, pool: Sequence[str]) -> None:
    """Another teacher in any place gives the student another gradient, or another start."""

    def learned(*teachers: str) -> dict[str, Tensor | None]:
        run = built(replace(config, transfer=replace(config.transfer, teachers=teachers)))
        return gradients(run, terms_of(run, batch()), run.student)

    given = config.transfer.teachers
    expected = learned(*given)
    assert not differ(expected, learned(*given)), "the same teachers teach otherwise"
    for place, teacher in enumerate(given):
        other = next(each for each in pool if each != teacher)
        changed = learned(*given[:place], other, *given[place + 1 :])
        assert differ(expected, changed), f"teacher {place} does not matter"


def check_off_is_the_twin(off: RunConfig, twin: RunConfig) -> None:
    """With its weights 0, a method trains the student of another one, bit for bit."""
    one, other = built(off), built(twin)
    asked = []
    for each in teachers_of(one):
        each.register_forward_hook(lambda *_: asked.append(1))
    states = [dict(trained(run, 3).student.state_dict()) for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    other_bits = [k for k, value in states[0].items() if not same_bits(value, states[1][k])]
    assert not other_bits, f"not the twin's: {other_bits}"
    assert not asked, "teachers that teach nothing are run all the same"


def check_nothing_is_drawn(config: RunConfig) -> None:
    """Training draws no random numbers: it must not depend on who drew before."""
    run = built(config)
    before = torch.get_rng_state()
    trained(run, STEPS)
    run.transfer.method.liveness(run.trainee, batch())
    assert torch.equal(torch.get_rng_state(), before), "training draws random numbers"


def check_test_network(config: RunConfig, case: Case, gone: Path) -> None:
    """What a run offers holds what its paper says, and predicts without anything of `gone`."""
    offered = train(replace(config, training=replace(config.training, num_steps=2))).run
    card, weights = load_weights(offered)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    num_slots = 2 if case.network == "slots" else 0
    whole = build_predictor(FRAME, config.model, tmu=config.transfer.tmu, num_slots=num_slots)
    expected = {name: tuple(value.shape) for name, value in whole.state_dict().items()}
    if case.network == "sources":
        _check_sources(config, weights, expected)
    else:
        assert shapes == expected, "the tested network is not what it should be"
    assert card.auxiliary_parameters == case.beside
    frames = batch().frames_BTCHW[:, :3]
    forecast = load_model(offered).model.predict(frames, 4)
    shutil.rmtree(gone, ignore_errors=True)
    assert torch.equal(load_model(offered).model.predict(frames, 4), forecast)
    assert forecast.isfinite().all()


def _check_sources(
    config: RunConfig, weights: dict[str, Tensor], plain: dict[str, tuple[int, ...]]
) -> None:
    """The plain network, every teacher whole, and the merges of the paper's equations."""
    own = {name.removeprefix("network."): value for name, value in weights.items()}
    assert {name: tuple(own[name].shape) for name in plain} == plain
    left = sum(value.numel() for value in weights.values())
    left -= sum(own[name].numel() for name in plain)
    for source in config.transfer.teachers:
        for name, value in load_weights(source)[1].items():
            held = [each for other, each in weights.items() if other.endswith(name)]
            assert any(same_bits(value, each) for each in held), f"{source}: {name} is missing"
            left -= value.numel()
    assert left == numbers_of_merges(config), f"{left} numbers beside network and sources"


def check_resume(config: RunConfig) -> None:
    """Killed and continued, a run ends with the same bits, and offers the same."""
    straight = train(replace(config, output=config.output + "-straight"))
    run_until(config, 3)
    continued = train(config)
    assert_same(final_state(continued.run), final_state(straight.run))
    assert_same(load_weights(continued.run)[1], load_weights(straight.run)[1])


def check_every_parameter_learns(config: RunConfig) -> None:
    """At every iteration each has a gradient; at the first ones none of them is zero."""
    run = trained(built(config), 1)
    assert len(learning(run.trainee)) == len(optimised(run)), "the optimiser misses parameters"
    for step in range(2, STEPS + 1):
        found = gradients(run, terms_of(run, batch(step)), run.trainee)
        without = [name for name, gradient in found.items() if gradient is None]
        assert not without, f"no gradient at step {step}: {without}"
        if step == 2:
            zero = [name for name, gradient in found.items() if not gradient.any()]  # type: ignore[union-attr]
            assert not zero, f"a gradient of zeros: {zero}"
        run.training_step(batch(step))


def check_every_term_counts(config: RunConfig, case: Case) -> None:
    """The objective has the paper's terms, and leaving one out changes the gradient."""
    run = trained(built(config), 1)
    terms = terms_of(run, batch(2))
    assert set(terms.terms) == {"prediction", *case.terms}
    whole = gradients(run, terms, run.trainee)
    for name in case.terms:
        assert terms.terms[name].weight > 0
        rest = {other: term for other, term in terms.terms.items() if other != name}
        without = gradients(run, replace(terms, terms=rest), run.trainee)
        assert differ(whole, without), f"the term {name} changes nothing"


def check_bf16_stays_near_fp32(config: RunConfig) -> None:
    """Autocast changes what is learned a little; weights and teachers stay float32."""
    exact = built(config)
    rough = built(replace(config, training=replace(config.training, precision="bf16")))
    totals = [run.training_step(batch())["loss/total"] for run in (exact, rough)]
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=2e-2)
    values = [*rough.trainee.state_dict().values(), *rough.student.state_dict().values()]
    assert all(value.dtype == torch.float32 for value in values if value.is_floating_point())
    assert all(value.isfinite().all() for value in values)


def check_missing_pixels_leave_no_trace(config: RunConfig) -> None:
    """A missing pixel of a target is not learned from, whatever stands there or is predicted."""
    given = masked(batch())
    assert given.observed_BTCHW is not None
    hidden = ~given.observed_BTCHW
    last = hidden.clone()
    last[:, :-1] = False  # earlier frames are read as they are: 0 where nothing was seen
    changed = replace(given, frames_BTCHW=given.frames_BTCHW.masked_fill(last, torch.nan))
    found = []
    for each in (given, changed, batch()):
        run = built(config)
        found.append(gradients(run, terms_of(run, each), run.trainee))
    assert not differ(*found[:2]), "missing pixels are learned from"
    assert differ(found[0], found[2]), "masks have no effect"
    terms = terms_of(trained(run, 1), given)
    (direct,) = torch.autograd.grad(terms.total(), terms.rollout.predictions_BTCHW)
    assert direct.any() and not direct[hidden[:, 1:]].any(), "missing pixels count"
    run.training_step(given)
    assert all(p.isfinite().all() for p in run.trainee.parameters())


def check_padding_leaves_no_trace(config: RunConfig) -> None:
    """Sequences of weight 0 are not learned from. Half a batch, so that partners stay together."""
    weights_B = torch.tensor([0.5, 0.5, 0, 0])
    given = replace(batch(), weights_B=weights_B)
    changed = replace(given, frames_BTCHW=given.frames_BTCHW * weights_B.ne(0).view(-1, 1, 1, 1, 1))
    found = []
    for each in (given, changed):
        run = built(config)
        found.append(gradients(run, terms_of(run, each), run.trainee))
    assert not differ(*found), "padding is learned from"


def check_parts_add_up(config: RunConfig) -> None:
    """The gradients of a batch's parts are its own; what is not of sequences counts by share."""
    # The last iterate is compared with once an update, so accumulation is refused with it.
    flow = replace(config.transfer.knowledge_flow, consistency=0.0)
    whole = replace(config, transfer=replace(config.transfer, knowledge_flow=flow))
    run, given = trained(built(whole), 2), batch(3, size=6)
    expected = gradients(run, terms_of(run, given), run.trainee)
    parts = [
        gradients(run, terms_of(run, given.rows(rows)), run.trainee)
        for rows in (slice(2), slice(2, 6))
    ]
    for name, gradient in expected.items():
        found = [part[name] for part in parts]
        if gradient is None:
            assert found == [None, None]
        else:
            torch.testing.assert_close(sum(found), gradient, rtol=1e-4, atol=1e-6)


def check_nothing_comes_from_later_frames(config: RunConfig) -> None:
    """What is predicted from the first frames does not depend on those that follow."""
    given = replace(batch(), sampling_mask_BT=torch.ones(4, 2, dtype=torch.bool))
    changed = replace(given, frames_BTCHW=given.frames_BTCHW.clone())
    changed.frames_BTCHW[:, 4:] = 1.0
    run = built(config)
    first, second = (terms_of(run, each).rollout.predictions_BTCHW for each in (given, changed))
    assert torch.equal(first[:, :4], second[:, :4]), "later frames are known"
    assert not torch.equal(first[:, 4], second[:, 4])


def check_plain_part_starts_like_scratch(config: RunConfig, scratch: RunConfig) -> None:
    """With one seed all methods start from the same plain network, if not from a teacher's."""
    run, plain = built(config), built(scratch).student.state_dict()
    own = run.transfer.method.plain_part(run.student).state_dict()
    others = [name for name, value in plain.items() if not same_bits(own[name], value)]
    assert not others, f"other first weights: {others}"


# Every method keeps them


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def config(name: str, tiny_config: RunConfig, teacher_runs: tuple[str, str]) -> RunConfig:
    return case_of(tiny_config, name, teacher_runs)


def test_every_method_has_a_case() -> None:
    assert {case.settings["method"] for case in CASES.values()} == set(get_args(Method))
    assert set(get_args(Method)) <= CASES.keys()


def test_teachers_stay_frozen(config: RunConfig) -> None:
    check_teachers_stay_frozen(config)


def test_every_teacher_matters(config: RunConfig, teacher_runs: tuple[str, str]) -> None:
    check_every_teacher_matters(config, teacher_runs)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.twin])
def test_off_is_the_twin(name: str, tiny_config: RunConfig, teacher_runs: tuple[str, str]) -> None:
    case = CASES[name]
    off = case_of(tiny_config, name, teacher_runs, **case.off)
    check_off_is_the_twin(off, case_of(tiny_config, case.twin, teacher_runs))


def test_nothing_is_drawn(config: RunConfig) -> None:
    check_nothing_is_drawn(config)


def test_the_tested_network_is_the_papers(
    name: str, tiny_config: RunConfig, teacher_runs: tuple[str, str], tmp_path: Path
) -> None:
    """The teachers are copies, which are removed once the run is done."""
    copies = [shutil.copytree(each, tmp_path / "gone" / Path(each).name) for each in teacher_runs]
    config = case_of(tiny_config, name, tuple(map(str, copies)))
    check_test_network(config, CASES[name], tmp_path / "gone")
    assert not any(each.exists() for each in copies)


@pytest.mark.parametrize("name", [name for name in CASES if name in get_args(Method)])
def test_resume_equals_uninterrupted(config: RunConfig) -> None:
    check_resume(config)


def test_every_parameter_learns(config: RunConfig) -> None:
    check_every_parameter_learns(config)


def test_every_term_counts(name: str, config: RunConfig) -> None:
    check_every_term_counts(config, CASES[name])


def test_bf16_stays_near_fp32(config: RunConfig) -> None:
    check_bf16_stays_near_fp32(config)


def test_missing_pixels_leave_no_trace(config: RunConfig) -> None:
    check_missing_pixels_leave_no_trace(config)


def test_padding_leaves_no_trace(config: RunConfig) -> None:
    check_padding_leaves_no_trace(config)


def test_parts_add_up(config: RunConfig) -> None:
    check_parts_add_up(config)


def test_nothing_comes_from_later_frames(config: RunConfig) -> None:
    check_nothing_comes_from_later_frames(config)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.starts])
def test_plain_part_starts_like_scratch(config: RunConfig, tiny_config: RunConfig) -> None:
    check_plain_part_starts_like_scratch(config, case_of(tiny_config, "scratch", ()))


@pytest.mark.parametrize("name", ["l2_sp"])
def test_l2_sp_holds_to_its_teacher(config: RunConfig) -> None:
    """The penalty of Li et al., written out: 0 at the start, and then half a squared distance."""
    run = built(config)
    start = load_weights(config.transfer.teachers[0])[1]

    def penalty() -> float:
        return terms_of(run, batch()).terms["l2_sp_start"].value.item()

    assert penalty() == 0
    trained(run, 3)
    own = run.student.state_dict()
    squares = [(own[k].double() - start[k].double()).square().sum().item() for k in start]
    assert penalty() == pytest.approx(sum(squares) / 2, rel=1e-5)


def test_attention_whose_gates_are_closed_is_scratch(
    tiny_config: RunConfig, teacher_runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With z = 0 a merged state is the student's own, so sources have no other way in."""
    names = ("art", "scratch")
    runs = [built(case_of(tiny_config, name, teacher_runs)) for name in names]
    open_gates = terms_of(runs[0], batch()).rollout.predictions_BTCHW
    merge = StateMerge.forward

    def closed(*given: Any) -> Merged:
        return Merged(given[2], torch.zeros_like(merge(*given).update_BPHW))

    monkeypatch.setattr(StateMerge, "forward", closed)
    own, plain = (terms_of(run, batch()).rollout.predictions_BTCHW for run in runs)
    assert torch.equal(own, plain)
    assert not torch.equal(open_gates, plain)


# On every backbone

METHODS = ("l2_sp", "knowledge_flow", "art", "distillation", "tmu")


@pytest.fixture(scope="module")
def teachers_by_cell(archive_url: str, tmp_path_factory: pytest.TempPathFactory) -> TeachersOf:
    """Teachers of any backbone, made once when they are asked for."""
    folder = tmp_path_factory.mktemp("backbones")
    data = DataFacts.of(open_archive(archive_url).manifest)
    return cache(lambda cell: untrained_teachers(folder, model_of(cell), data))


def model_of(cell: str) -> ModelConfig:
    """A small network of a backbone for frames of 16x16."""
    return MODELS.get(cell) or replace(TINY_MODEL, cell=cell)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cell", [cell for cell in BACKBONES if cell != "convlstm"])
def test_every_backbone(
    name: str, cell: str, tiny_config: RunConfig, teachers_by_cell: TeachersOf
) -> None:
    """One iteration, two updates: all is finite, and the tested network is what it should be."""
    whole = replace(tiny_config, model=model_of(cell))
    changes = {}
    if cell == "savp":  # predictions of the prior, too, and terms of discriminators
        adversarial = AdversarialConfig(video_weight=0.1, base_channels=2, clip_length=4)
        whole = replace(whole, training=replace(whole.training, adversarial=adversarial))
    if cell == "vpn":
        whole = replace(whole, training=replace(whole.training, sampling="always"))
        if name == "distillation":  # it has no differentiable forecasts
            changes = {"distillation": DistillationConfig(features=0.5)}
    run = built(case_of(whole, name, teachers_by_cell(cell), **changes))
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    losses = run.training_step(batch(size=2, frames=5, noise_size=run.student.latent_size))
    assert all(math.isfinite(value) for value in losses.values())
    after = run.student.state_dict()
    assert all(value.isfinite().all() for value in run.trainee.state_dict().values())
    still = [k for k, p in learning(run.student).items() if torch.equal(before[k], after[k])]
    assert not still, f"not trained: {still}"
    if CASES[name].network == "plain":
        assert after.keys() == skeleton(FRAME, run.config.model).state_dict().keys()


def test_a_teacher_that_learns_from_targets_does_not_pass_them_on(
    tiny_config: RunConfig, teachers_by_cell: TeachersOf
) -> None:
    """SAVP's latents know the next frame in training; a student that reads its states must not."""
    adapter = AdapterConfig(grid="resample", layers=(0, 1), channels="project")
    teachers = teachers_by_cell("savp")
    config = case_of(tiny_config, "knowledge_flow", teachers, adapter=adapter)
    check_nothing_comes_from_later_frames(config)
