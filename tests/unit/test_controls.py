"""Teachers that cannot know better: another sequence's, or those that have learned nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_training import assert_same, final_state, run, run_until
from tests.unit.test_transfer import INPUTS, batch, gradients, student_of, task, teacher, tmu_method
from tmu_dist.config import RunConfig, TMUConfig
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.bank import FrozenTeacher, ReplicatedBank, Shown, TeacherBank, Teaching
from tmu_dist.teachers.store import LoadedModel, load_model, load_weights, write_model
from tmu_dist.transfer.base import TrainingBatch
from tmu_dist.transfer.controls import ShuffledBank, with_random_weights
from tmu_dist.transfer.tmu import MemoryDistillation


def bank() -> ReplicatedBank:
    wanted: Any = ("memory", "hidden", "predictions")
    return ReplicatedBank([FrozenTeacher(teacher(seed), wanted=wanted) for seed in (1, 2)])


def taught(bank: TeacherBank, given: TrainingBatch) -> tuple[Teaching, ...]:
    return bank.teach(
        Shown(
            given.frames_BTCHW,
            num_input_frames=INPUTS,
            num_frames=6,
            sampling_mask_BT=given.sampling_mask_BT,
        )
    )


def part(given: TrainingBatch, places: slice) -> TrainingBatch:
    return replace(
        given,
        frames_BTCHW=given.frames_BTCHW[places],
        sampling_mask_BT=given.sampling_mask_BT[places],
        weights_B=given.weights_B[places],
    )


# Shuffled


def test_every_sequence_is_taught_what_its_partner_is() -> None:
    given = batch(4)
    plain, shuffled = taught(bank(), given), taught(ShuffledBank(bank()), given)
    for one, other in zip(plain, shuffled, strict=True):
        assert one.states.keys() == other.states.keys() == {"memory", "hidden"}
        for name in one.states:
            for k in range(2):
                for place, partner in enumerate([1, 0, 3, 2]):
                    found = other.states[name][k][place]
                    assert torch.equal(found, one.states[name][k][partner])
                    assert not torch.equal(found, one.states[name][k][place])
        assert one.predictions_BTCHW is not None and other.predictions_BTCHW is not None
        assert torch.equal(other.predictions_BTCHW, one.predictions_BTCHW[[1, 0, 3, 2]])


def test_partners_do_not_depend_on_how_a_batch_is_dealt_to_ranks() -> None:
    given = batch(4)
    shuffled = ShuffledBank(bank())
    together = taught(shuffled, given)
    by_rank = [taught(shuffled, part(given, slice(start, start + 2))) for start in (0, 2)]
    for m, whole in enumerate(together):
        for k, state in whole.states["memory"].items():
            dealt = torch.cat([teachings[m].states["memory"][k] for teachings in by_rank])
            torch.testing.assert_close(dealt, state, rtol=1e-6, atol=1e-6)


def test_what_is_not_wanted_stays_away_and_facts_pass_through() -> None:
    plain = ReplicatedBank([FrozenTeacher(teacher(1))])
    shuffled = ShuffledBank(plain)
    (found,) = taught(shuffled, batch())
    assert found.predictions_BTCHW is None and set(found.states) == {"memory"}
    assert shuffled.plans == plain.plans
    assert shuffled.parameters_per_teacher == plain.parameters_per_teacher


def test_a_sequence_without_a_partner_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 3 of them: choose training.batch_size"):
        taught(ShuffledBank(bank()), batch(3))


def test_the_student_learns_from_another_sequence() -> None:
    """Eq. 4 with partners, written out; the frames that the student sees stay in their places."""
    plain = tmu_method(1)
    method = MemoryDistillation(
        task(), tmu=TMUConfig(), bank=ShuffledBank(plain.bank), teacher_input="own", beta=0.1
    )
    given, student = batch(4), student_of(method)
    rollout = method.unroll(student, given)
    memories = teacher(1)(
        given.frames_BTCHW,
        num_input_frames=INPUTS,
        num_frames=6,
        sampling_mask_BT=given.sampling_mask_BT,
    ).memories
    expected = sum(
        (rollout.imitations[k][0] - memories[k][[1, 0, 3, 2]]).square().mean().item()
        for k in range(2)
    )
    terms = method.loss(student, given).terms
    assert terms["distillation"].value.item() == pytest.approx(expected, rel=1e-5)
    of_plain = plain.loss(student_of(plain), given).terms
    assert terms["prediction"].value == of_plain["prediction"].value
    assert terms["distillation"].value != of_plain["distillation"].value
    one, other = gradients(method), gradients(plain)
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)


# Random weights


def test_random_weights_are_a_function_of_seed_and_number(teacher_runs: tuple[str, str]) -> None:
    loaded = load_model(teacher_runs[0])
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    keys = ((0, 0), (0, 1), (1, 0), (1, 1))
    found = [with_random_weights(loaded.card, seed=s, number=n) for s, n in keys]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = with_random_weights(loaded.card, seed=0, number=0)
    weights = [dict(each.model.state_dict()) for each in (again, *found)]
    assert_same(weights[0], weights[1])
    gates = [each["stack.layers.0.cell.gates.weight"] for each in (before, *weights[1:])]
    assert all(not torch.equal(one, other) for i, one in enumerate(gates) for other in gates[:i])
    assert_same(dict(loaded.model.state_dict()), before)


def test_random_weights_are_those_of_a_fresh_network_in_size(
    teacher_runs: tuple[str, str],
) -> None:
    loaded = load_model(teacher_runs[0])
    model = with_random_weights(loaded.card, seed=3, number=1).model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    fresh = teacher(11).state_dict()
    assert model.state_dict().keys() == fresh.keys()
    for name, value in model.state_dict().items():
        assert value.shape == fresh[name].shape
        assert value.std().item() == pytest.approx(fresh[name].std().item(), rel=0.3, nan_ok=True)


def test_the_card_says_that_nothing_was_learned(
    teacher_runs: tuple[str, str], tmp_path: Path
) -> None:
    loaded = load_model(teacher_runs[0])
    assert loaded.card.scores and loaded.card.step
    untrained: LoadedModel = with_random_weights(loaded.card, seed=0, number=0)
    card = untrained.card
    assert card.name == f"{loaded.card.name} (random weights)"
    assert (card.scores, card.step) == ({}, 0)
    assert (card.model, card.frame, card.data) == (
        loaded.card.model,
        loaded.card.frame,
        loaded.card.data,
    )
    write_model(tmp_path / "untrained", untrained.model, card)
    assert load_weights(str(tmp_path / "untrained"))[0].weights_sha256 == card.weights_sha256
    assert card.weights_sha256 != loaded.card.weights_sha256


# Whole runs


def controlled(config: RunConfig, control: Any, name: str) -> RunConfig:
    transfer = replace(config.transfer, control=control)
    training = replace(config.training, num_steps=4)
    return replace(config, output=f"{config.output}-{name}", transfer=transfer, training=training)


@pytest.mark.parametrize("control", ["shuffled", "random_weights"])
def test_a_controlled_run_differs_and_continues_bit_for_bit(
    tmu_config: RunConfig, control: str
) -> None:
    plain = final_state(run(controlled(tmu_config, "none", "plain")).run)["weights"]
    straight = run(controlled(tmu_config, control, "straight"))
    config = controlled(tmu_config, control, "stopped")
    run_until(config, 3)
    result = run(config)
    states = [final_state(each.run) for each in (straight, result)]
    assert_same(*states)
    assert any(not torch.equal(plain[name], states[0]["weights"][name]) for name in plain)
    card, _ = load_weights(result.run)
    assert all("(random weights)" in name for name in card.teachers) == (
        control == "random_weights"
    )
    liveness = [e for e in read_log(Path(result.run)) if e["event"] == "liveness"]
    assert liveness and all(e["teaching_gradient_norm"] > 0 for e in liveness)


def test_a_run_with_an_odd_batch_is_refused(tmu_config: RunConfig) -> None:
    config = controlled(tmu_config, "shuffled", "odd")
    with pytest.raises(ValueError, match=r"training.batch_size / ranks is even"):
        run(replace(config, training=replace(config.training, batch_size=3)))
