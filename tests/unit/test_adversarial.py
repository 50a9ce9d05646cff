"""The adversarial step: who is updated by what, and the terms as the equations say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tmu_dist.collectives import Collectives
from tmu_dist.config import (
    AdversarialConfig,
    ModelConfig,
    Precision,
    RunConfig,
    SAVPConfig,
    TrainingConfig,
    WindowConfig,
)
from tmu_dist.models.build import build_predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.training import adversarial
from tmu_dist.training.adversarial import PRIOR, ROLLOUT, AdversarialStep
from tmu_dist.training.build import build_step
from tmu_dist.training.schedules import random_index
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import Objective, Task, TrainingBatch
from tmu_dist.transfer.scratch import Scratch

FRAME = FrameShape(channels=1, height=16, width=16)
WINDOW = WindowConfig(num_input_frames=2, num_target_frames=3)
SAVP = ModelConfig(
    cell="savp", savp=SAVPConfig(base_channels=2, latent_size=2, posterior_channels=2)
)
CONVLSTM = ModelConfig(num_layers=1, hidden_channels=4, kernel_size=3)
FULL = AdversarialConfig(video_weight=0.3, image_weight=0.2, feature_weight=2.0, base_channels=2)


def make(
    model: ModelConfig, adversarial: AdversarialConfig, *, precision: Precision = "fp32"
) -> TrainingStep:
    torch.manual_seed(0)
    config = RunConfig(
        window=WINDOW,
        model=model,
        training=TrainingConfig(
            reverse_input="off", adversarial=adversarial, adam_beta1=0.5, precision=precision
        ),
    )
    objective = Objective("l1", frame_weight=100.0)
    method = Scratch(
        Task(
            frame=FRAME,
            model=model,
            objective=objective,
            num_input_frames=WINDOW.num_input_frames,
        )
    )
    student = method.build_student()
    return build_step(config, method, student, student, torch.device("cpu"), Collectives())


def batch(model: ModelConfig) -> TrainingBatch:
    generator = torch.Generator().manual_seed(1)
    noise_size = build_predictor(FRAME, model).noise_size
    return TrainingBatch(
        frames_BTCHW=torch.rand(3, 5, 1, 16, 16, generator=generator),
        observed_BTCHW=None,
        sampling_mask_BT=torch.ones(3, 2, dtype=torch.bool),
        weights_B=torch.tensor([0.5, 0.5, 0.0]),
        noise_BTZ=torch.randn(3, 4, noise_size, generator=generator) if noise_size else None,
        step=1,
    )


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_parameters()}


def test_without_weights_there_are_no_discriminators() -> None:
    assert type(make(SAVP, AdversarialConfig())) is TrainingStep


@pytest.mark.parametrize(("model", "kinds"), [(SAVP, [ROLLOUT, PRIOR]), (CONVLSTM, [ROLLOUT])])
def test_each_kind_of_prediction_has_its_own_discriminators(
    model: ModelConfig, kinds: list[str]
) -> None:
    step = make(model, FULL)
    assert isinstance(step, AdversarialStep)
    assert list(step.discriminators.video) == list(step.discriminators.image) == kinds
    assert step.discriminators.clip_length == 4  # all that is predicted: fewer than 10 frames
    only_video = make(model, replace(FULL, image_weight=0.0))
    assert isinstance(only_video, AdversarialStep)
    assert not only_video.discriminators.image


@pytest.mark.parametrize("model", [SAVP, CONVLSTM])
def test_discriminators_are_updated_first_and_only_by_their_own_loss(model: ModelConfig) -> None:
    step = make(model, FULL)
    assert isinstance(step, AdversarialStep)
    before = weights(step.discriminators)
    student = weights(step.trainee)
    terms = step.loss(batch(model))
    updated = weights(step.discriminators)
    assert all(not torch.equal(before[name], updated[name]) for name in before)
    assert all(torch.equal(student[name], value) for name, value in weights(step.trainee).items())
    gradients = {name: p.grad for name, p in step.discriminators.named_parameters()}
    terms.total().backward()
    for name, parameter in step.discriminators.named_parameters():
        assert torch.equal(parameter, updated[name])
        assert parameter.grad is gradients[name]  # the student's backward pass adds nothing
    assert all(p.grad is not None and p.grad.any() for p in step.trainee.parameters())


def test_terms_are_least_squares_and_cosines() -> None:
    step = make(SAVP, FULL)
    assert isinstance(step, AdversarialStep)
    given = batch(SAVP)
    rollout = step.trainee.train()(
        given.frames_BTCHW,
        num_input_frames=2,
        num_frames=5,
        sampling_mask_BT=given.sampling_mask_BT,
        noise_BTZ=given.noise_BTZ,
    )
    assert rollout.prior_predictions_BTCHW is not None
    terms = step.loss(given).terms
    step.discriminators.eval()
    image_index = random_index(4, seed=0, step=given.step, use=1)
    true = given.frames_BTCHW[:2, 1:]
    expected = {"adversarial_video": 0.0, "adversarial_image": 0.0, "feature_matching": 0.0}
    for kind, predicted in (
        (ROLLOUT, rollout.predictions_BTCHW[:2]),
        (PRIOR, rollout.prior_predictions_BTCHW[:2]),
    ):
        for name, network, place in (
            ("adversarial_video", step.discriminators.video[kind], slice(0, 4)),
            ("adversarial_image", step.discriminators.image[kind], image_index),
        ):
            score_B, ours = network(predicted[:, place])
            _, theirs = network(true[:, place])
            expected[name] += (score_B - 1).square().mean().item()
            if kind == ROLLOUT:
                similarities = [F.cosine_similarity(a, b, dim=1) for a, b in zip(ours, theirs)]
                expected["feature_matching"] += sum((1 - s).mean().item() for s in similarities)
    for name, value in expected.items():
        assert terms[name].value.item() == pytest.approx(value, rel=1e-3), name
    assert {name: term.weight for name, term in terms.items()} == {
        "prediction": 100.0,
        "kl": 1.0,
        "adversarial_video": 0.3,
        "adversarial_image": 0.2,
        "feature_matching": 2.0,
        "discriminators": 0.0,
    }
    assert terms["discriminators"].value > 0


def test_unobserved_pixels_cannot_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(SAVP)
    observed = torch.ones_like(given.frames_BTCHW, dtype=torch.bool)
    observed[..., :8] = False
    hidden = replace(
        given,
        observed_BTCHW=observed,
        frames_BTCHW=given.frames_BTCHW.masked_fill(~observed, 0.0),
    )
    step = make(SAVP, FULL)
    assert isinstance(step, AdversarialStep)
    seen = []
    original = adversarial._seen
    monkeypatch.setattr(
        adversarial, "_seen", lambda *given: seen.append(original(*given)) or seen[-1]
    )
    step.loss(hidden)
    assert seen
    for frames in seen:
        for predicted in frames.predicted_BTCHW.values():
            assert not predicted[..., :8].any() and predicted[..., 8:].any()
