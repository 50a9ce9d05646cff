"""The training loop: stopped anywhere and continued, it ends with the same weights bit for bit."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_transfer import batch, student_of, tmu_method
from tmu_dist.backbones import BACKBONES
from tmu_dist.collectives import Collectives
from tmu_dist.config import (
    AdversarialConfig,
    ConfigError,
    FaultConfig,
    KLConfig,
    ModelConfig,
    RunConfig,
    SAVPConfig,
    TransferConfig,
    VPNConfig,
)
from tmu_dist.data.loader import open_archive
from tmu_dist.files import WriteError, atomic_directory, atomic_write_text
from tmu_dist.run_folder import Event, read_log
from tmu_dist.teachers.card import TeacherError
from tmu_dist.teachers.store import load_card, load_model, load_weights
from tmu_dist.training.checkpoint import ResumeError
from tmu_dist.training.loop import NonFiniteLossError, RunResult, train
from tmu_dist.training.run_lock import lock_run
from tmu_dist.training.step import TrainingStep

CPU = torch.device("cpu")
MODELS = {
    "savp": ModelConfig(
        cell="savp", savp=SAVPConfig(base_channels=2, latent_size=2, posterior_channels=2)
    ),
    "vpn": ModelConfig(
        cell="vpn",
        hidden_channels=4,
        kernel_size=3,
        vpn=VPNConfig(channels=2, num_encoder_blocks=1, num_decoder_blocks=1),
    ),
}
"""Small networks of the backbones that are not stacks of cells."""


class Killed(BaseException):
    """Stands for a signal: nothing in the loop may catch it."""


def run(config: RunConfig, listener: Callable[[Event], None] | None = None) -> RunResult:
    return train(config, Collectives(), CPU, listener=listener)


def run_until(config: RunConfig, step: int) -> None:
    def kill(event: Event) -> None:
        if event["event"] == "train" and event["step"] == step:
            raise Killed

    with pytest.raises(Killed):
        run(config, kill)


def final_state(folder: str) -> dict[str, Any]:
    newest = sorted(Path(folder, "checkpoints").iterdir())[-1]
    state = torch.load(newest / "state.pt", weights_only=True)
    return {
        "weights": load_weights(str(newest))[1],
        "training_step": state["training_step"],
    }


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("stops", [[1], [2], [3], [5], [6], [1, 4, 6]])
def test_continued_run_equals_uninterrupted_one(tmu_config: RunConfig, stops: list[int]) -> None:
    straight = replace(tmu_config, output=tmu_config.output + "-straight")
    expected = run(straight)
    for stop in stops:
        run_until(tmu_config, stop)
    result = run(tmu_config)
    assert (result.best_step, result.best_mse_per_frame) == (
        expected.best_step,
        expected.best_mse_per_frame,
    )
    assert_same(final_state(result.run), final_state(expected.run))
    assert_same(load_weights(result.run)[1], load_weights(expected.run)[1])

    losses = [
        [(e["step"], e["loss/total"]) for e in read_log(Path(r)) if e["event"] == "train"]
        for r in (result.run, expected.run)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 8))


@pytest.mark.parametrize("cell", [cell for cell in BACKBONES if cell != "convlstm"])
def test_every_backbone_teaches_learns_and_continues(tiny_config: RunConfig, cell: str) -> None:
    """A teacher and a TMU student of each; the student is killed once, with all that it trains."""
    model = MODELS.get(cell) or replace(tiny_config.model, cell=cell)
    training = replace(tiny_config.training, num_steps=4)
    if cell == "vpn":
        training = replace(training, sampling="always")
    if cell == "savp":
        adversarial = AdversarialConfig(
            video_weight=0.1, image_weight=0.1, feature_weight=1.0, base_channels=2
        )
        kl = KLConfig(anneal_from=1, anneal_until=3)
        training = replace(training, adversarial=adversarial, kl=kl, decay_from=2)
    teacher = replace(
        tiny_config,
        output=tiny_config.output + "-teacher",
        model=model,
        training=replace(training, num_steps=3),
    )
    student = replace(
        tiny_config,
        model=model,
        training=training,
        transfer=TransferConfig(method="tmu", teachers=(run(teacher).run,)),
    )
    straight = run(replace(student, output=student.output + "-straight"))
    run_until(student, 2)
    continued = run(student)
    assert_same(final_state(continued.run), final_state(straight.run))
    events = read_log(Path(continued.run))
    terms = [event for event in events if event["event"] == "train"][-1]
    assert terms["loss/distillation"] > 0
    finetuned = replace(
        student,
        output=student.output + "-finetuned",
        training=replace(training, num_steps=3),
        transfer=TransferConfig(method="finetune", teachers=student.transfer.teachers),
    )
    run(finetuned)
    if cell == "savp":
        assert {"loss/kl", "loss/adversarial_video", "loss/feature_matching"} <= terms.keys()
    assert any(event["event"] == "liveness" for event in events)


@pytest.mark.parametrize(
    ("cell", "settings", "message"),
    [
        ("vpn", {}, "set training.sampling=always"),
        ("vpn", {"sampling": "always", "frame_loss": "l1"}, "leave training.frame_loss=backbone"),
        (
            "vpn",
            {"sampling": "always", "adversarial": AdversarialConfig(video_weight=0.1)},
            "no differentiable forecasts",
        ),
        ("vpn", {"sampling": "always", "kl": KLConfig(weight=0.1)}, "networks with latents"),
        ("predrnn", {"kl": KLConfig(weight=0.1)}, "networks with latents"),
    ],
)
def test_training_that_does_not_go_with_a_backbone_is_refused(
    tiny_config: RunConfig, cell: str, settings: dict[str, Any], message: str
) -> None:
    model = MODELS.get(cell) or replace(tiny_config.model, cell=cell)
    training = replace(tiny_config.training, **settings)
    with pytest.raises(ConfigError, match=message):
        run(replace(tiny_config, model=model, training=training))
    assert not Path(tiny_config.output).exists()


def test_global_random_draws_continue_too(tiny_config: RunConfig) -> None:
    """Whatever draws from torch's generator (a stochastic model, say) resumes as well."""

    def draws(config: RunConfig, stop: int | None) -> dict[int, float]:
        seen: dict[int, float] = {}

        def draw(event: Event) -> None:
            if event["event"] == "train":
                seen[event["step"]] = torch.rand(()).item()
                if event["step"] == stop:
                    raise Killed

        with pytest.raises(Killed) if stop else nullcontext():
            run(config, draw)
        return seen

    straight = draws(replace(tiny_config, output=tiny_config.output + "-straight"), None)
    assert draws(tiny_config, 5) | draws(tiny_config, None) == straight


def test_finished_run_is_left_alone_and_can_be_made_longer(tiny_config: RunConfig) -> None:
    first = run(tiny_config)
    before = final_state(first.run)
    assert run(tiny_config).steps == 7
    assert_same(final_state(first.run), before)
    longer = replace(tiny_config, training=replace(tiny_config.training, num_steps=9))
    assert run(longer).steps == 9


def test_run_folder_tells_who_made_it(tmu_config: RunConfig) -> None:
    folder = Path(run(tmu_config).run)
    provenance = json.loads((folder / "run.json").read_text())["starts"][0]
    assert provenance["manifest_hash"] == load_card(str(folder)).data.manifest_hash
    assert list(provenance["teachers"]) == ["teacher-1", "teacher-2"]
    assert provenance["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert json.loads((folder / "config.json").read_text())["transfer"]["method"] == "tmu"
    assert list((folder / "tensorboard").iterdir())
    liveness = [e for e in read_log(folder) if e["event"] == "liveness"]
    assert liveness[0]["step"] == 0
    assert all(e["teaching_gradient_norm"] > 0 for e in liveness)
    card = load_card(str(folder))
    assert card.data.normalisation == "stored uint8 / 255"
    assert card.teachers == ("teacher-1", "teacher-2")
    assert len(card.teacher_parameters) == 2
    assert len(list((folder / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"learning_rate": 0.5}}, "training.learning_rate"),
        ({"training": {"seed": 9}}, "training.seed"),
        ({"data": {"fraction": 0.5}}, "data.fraction"),
        ({"model": {"hidden_channels": 8}}, "model.hidden_channels"),
    ],
)
def test_other_settings_are_refused(
    tiny_config: RunConfig, change: dict[str, dict[str, Any]], named: str
) -> None:
    run_until(tiny_config, 3)
    ((section, fields),) = change.items()
    other = replace(tiny_config, **{section: replace(getattr(tiny_config, section), **fields)})
    with pytest.raises(ResumeError, match=named):
        run(other)


def test_other_teachers_are_refused(tmu_config: RunConfig) -> None:
    run_until(tmu_config, 3)
    swapped = replace(tmu_config.transfer, teachers=tmu_config.transfer.teachers[::-1])
    with pytest.raises(ResumeError, match="teachers: the checkpoint has"):
        run(replace(tmu_config, transfer=swapped))


@pytest.mark.parametrize(
    "file", ["state.pt", "training.json", "config.json", "weights.safetensors"]
)
def test_damaged_checkpoint_is_named(tiny_config: RunConfig, file: str) -> None:
    run_until(tiny_config, 3)
    (checkpoint,) = Path(tiny_config.output, "checkpoints").iterdir()
    content = bytearray((checkpoint / file).read_bytes())
    for damaged in (content[: len(content) // 2], _flipped(content)):
        (checkpoint / file).write_bytes(damaged)
        with pytest.raises(
            (ResumeError, TeacherError), match=rf"{checkpoint.name}/{file} is damaged"
        ):
            run(tiny_config)


def _flipped(content: bytearray) -> bytearray:
    """One bit of the middle changed, in a way that JSON cannot take for other text."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :]


def test_fewer_steps_than_trained_are_refused(tiny_config: RunConfig) -> None:
    run_until(tiny_config, 5)
    fewer = replace(tiny_config, training=replace(tiny_config.training, num_steps=3))
    with pytest.raises(ResumeError, match="trained for 4 steps, more than"):
        run(fewer)


def test_run_may_be_shortened_to_a_checkpoint(tiny_config: RunConfig) -> None:
    late = replace(tiny_config, schedule=replace(tiny_config.schedule, validate_every=100))
    run_until(late, 5)
    shorter = replace(late, training=replace(late.training, num_steps=4))
    assert run(shorter).best_step == 4


def test_two_processes_cannot_train_in_one_folder(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = partial(lock_run, patience_seconds=0.3)
    monkeypatch.setattr("tmu_dist.training.loop.lock_run", impatient)
    refusals = []

    def start_another(event: Event) -> None:
        if event["event"] == "validation" and not refusals:
            with pytest.raises(ResumeError, match=r"Process \d+ on .* is training") as refusal:
                run(tiny_config)
            refusals.append(refusal)

    assert run(tiny_config, start_another).steps == 7
    assert refusals and run(tiny_config).steps == 7


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Let every write beyond so many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_last_checkpoint_whole(tiny_config: RunConfig) -> None:
    run_until(tiny_config, 3)
    folder = Path(tiny_config.output)
    (before,) = (folder / "checkpoints").iterdir()
    strict = replace(tiny_config, faults=FaultConfig(max_failed_checkpoints=0))
    with files_limited_to(20_000), pytest.raises(WriteError, match="step-00000004") as error:
        run(strict)
    assert "free" in str(error.value) and "untouched" in str(error.value)
    assert list((folder / "checkpoints").iterdir()) == [before]
    assert run(tiny_config).steps == 7


def test_atomic_directory_replaces_or_leaves(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "thing"
    with atomic_directory(final) as staging:
        (staging / "a").write_text("1")
    with atomic_directory(final) as staging:
        (staging / "b").write_text("2")
    assert [file.name for file in final.iterdir()] == ["b"]
    with pytest.raises(Killed), atomic_directory(final) as staging:
        (staging / "c").write_text("3")
        raise Killed
    assert [file.name for file in final.iterdir()] == ["b"]
    assert [entry.name for entry in final.parent.iterdir()] == ["thing"]
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="Could not write"):
        atomic_write_text(tmp_path / "file" / "below", "")


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_non_finite_numbers_stop_before_a_checkpoint_is_poisoned(
    tiny_config: RunConfig, checkpoint_every: int
) -> None:
    wild = replace(
        tiny_config,
        training=replace(tiny_config.training, learning_rate=1e30),
        schedule=replace(tiny_config.schedule, checkpoint_every=checkpoint_every),
    )
    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d"):
        run(wild)
    for checkpoint in Path(wild.output, "checkpoints").glob("step-*"):
        weights = load_weights(str(checkpoint))[1]
        assert all(value.isfinite().all() for value in weights.values())


def test_selection_by_best_or_final(tiny_config: RunConfig) -> None:
    final = replace(tiny_config, training=replace(tiny_config.training, select="final"))
    run_until(final, 5)  # checkpoints at 2 and 4, validations at 3: the offer of 3 must stay
    assert load_card(final.output).step == 3
    result = run(final)
    assert load_card(result.run).step == 7
    best = run(replace(tiny_config, output=tiny_config.output + "-best"))
    assert load_card(best.run).step == best.best_step


def test_bf16_trains_close_to_fp32(tmu_config: RunConfig) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        config = replace(
            tmu_config,
            output=f"{tmu_config.output}-{precision}",
            training=replace(tmu_config.training, precision=precision),  # type: ignore[arg-type]
        )
        log = read_log(Path(run(config).run))
        losses[precision] = [e["loss/total"] for e in log if e["event"] == "train"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


def make_step(
    reverse_input: str, *, grad_clip_norm: float | None = None
) -> tuple[TrainingStep, torch.nn.Module]:
    method = tmu_method(1, 2)
    student = student_of(method)
    step = TrainingStep(
        method,
        student,
        student,
        student,
        device=CPU,
        learning_rate=lambda step: 0.1,
        reverse_input=reverse_input,  # type: ignore[arg-type]
        grad_clip_norm=grad_clip_norm,
    )
    step.optimizer = torch.optim.SGD(student.parameters())  # type: ignore[assignment]
    return step, student


def test_reverse_input_is_one_update_two_or_their_average() -> None:
    given = batch()
    backwards = replace(given, frames_BTCHW=given.frames_BTCHW.flip(1))
    states = {}
    for choice in ("off", "update", "average"):
        step, student = make_step(choice)
        step(given)
        states[choice] = student.state_dict()
    twice, student = make_step("off")
    twice(given)
    assert_same(dict(student.state_dict()), dict(states["off"]))
    twice(backwards)
    assert_same(dict(student.state_dict()), dict(states["update"]))

    method = tmu_method(1, 2)
    reference = student_of(method)
    losses = [method.loss(reference, one).total() for one in (given, backwards)]
    (sum(losses) / 2).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(states["average"][name], value)


def test_gradient_clipping_bounds_the_step() -> None:
    step, student = make_step("off", grad_clip_norm=1e-3)
    before = torch.nn.utils.parameters_to_vector(student.parameters()).clone()
    step(batch())
    after = torch.nn.utils.parameters_to_vector(student.parameters())
    assert (after - before).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_data_problems_are_named_before_training(tiny_config: RunConfig) -> None:
    window = replace(tiny_config.window, num_target_frames=9)
    with pytest.raises(ValueError, match="12 frames"):
        run(replace(tiny_config, window=window))
    doubled = replace(tiny_config, data=replace(tiny_config.data, fraction=2.0))
    with pytest.raises(ValueError, match="44 samples, because 22 count as 100 %"):
        run(doubled)
    assert not Path(doubled.output).exists()
    nowhere = replace(tiny_config, data=replace(tiny_config.data, url="nowhere/at-all"))
    with pytest.raises(ValueError, match="nowhere/at-all"):
        run(nowhere)
    model = replace(tiny_config.model, patch_size=5)
    with pytest.raises(ValueError, match="not tiled by 5x5"):
        run(replace(tiny_config, model=model))


def test_training_needs_both_splits(tiny_config: RunConfig, tmp_path: Path) -> None:
    manifest = open_archive(tiny_config.data.url).manifest
    only = replace(manifest, splits={"train": manifest.splits["train"]})
    (tmp_path / "manifest.json").write_text(only.to_json())
    with pytest.raises(ValueError, match="has no val split, and training needs both"):
        run(replace(tiny_config, data=replace(tiny_config.data, url=str(tmp_path))))


def test_student_can_be_loaded_and_predicts(tmu_config: RunConfig) -> None:
    """At test time the teachers are gone: the run's own folder is enough."""
    loaded = load_model(run(tmu_config).run)
    assert loaded.model.predict(torch.rand(1, 3, 1, 16, 16), 4).shape == (1, 4, 1, 16, 16)
