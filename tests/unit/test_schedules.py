"""Scheduled sampling is the field's schedule, and its draws depend on nothing but their keys."""

from __future__ import annotations

import math

import pytest
import torch

from tmu_dist.config import TrainingConfig
from tmu_dist.training.schedules import (
    learning_rate,
    random_index,
    sampling_mask,
    sampling_probability,
    sequence_noise,
)


def test_default_is_the_published_decrement() -> None:
    eta = 1.0
    for step in range(1, 50_101):
        eta = eta - 2e-5 if step < 50_000 else 0.0
        if step % 4_999 == 0 or step >= 49_999:
            assert sampling_probability(step, TrainingConfig()) == pytest.approx(eta, abs=1e-9)


def test_mask_of_a_sequence_does_not_depend_on_its_batch() -> None:
    ids = torch.arange(100)
    whole = sampling_mask(0.5, ids, 9, seed=1, step=7)
    assert torch.equal(whole[40:50], sampling_mask(0.5, ids[40:50], 9, seed=1, step=7))
    assert not torch.equal(whole, sampling_mask(0.5, ids, 9, seed=1, step=8))
    assert not torch.equal(whole, sampling_mask(0.5, ids, 9, seed=2, step=7))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_mask_has_the_asked_frequency(probability: float) -> None:
    mask = sampling_mask(probability, torch.arange(5000), 9, seed=0, step=1)
    assert mask.shape == (5000, 9) and mask.dtype == torch.bool
    assert mask.float().mean().item() == pytest.approx(probability, abs=0.01)
    assert mask.float().mean(0).tolist() == pytest.approx([probability] * 9, abs=0.03)


def test_inverse_sigmoid_is_savps_schedule() -> None:
    settings = TrainingConfig(sampling="inverse_sigmoid", sampling_scale=900.0)
    for step in (1, 900, 4_500, 6_000):
        expected = 900 / (900 + math.exp(step / 900))
        assert sampling_probability(step, settings) == pytest.approx(expected)
    assert sampling_probability(900 * 14, settings) == 0.0
    assert sampling_probability(10**9, settings) == 0.0
    assert sampling_probability(10**9, TrainingConfig(sampling="always")) == 1.0


def test_learning_rate_falls_to_zero_after_the_last_step() -> None:
    settings = TrainingConfig(num_steps=10, learning_rate=0.5, decay_from=5)
    rates = [learning_rate(step, settings) for step in range(1, 12)]
    assert rates == pytest.approx([0.5] * 6 + [0.4, 0.3, 0.2, 0.1, 0.0])
    assert learning_rate(10, TrainingConfig(num_steps=10, learning_rate=0.5)) == 0.5


def test_noise_is_normal_and_belongs_to_its_sequence() -> None:
    ids = torch.arange(400)
    noise = sequence_noise(ids, 9, 8, seed=1, step=7)
    assert noise is not None and noise.shape == (400, 9, 8) and noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.unique().numel() > 0.99 * noise.numel()
    assert torch.equal(noise[40:50], sequence_noise(ids[40:50], 9, 8, seed=1, step=7))
    for other in ({"seed": 2, "step": 7}, {"seed": 1, "step": 8}):
        assert not torch.equal(noise, sequence_noise(ids, 9, 8, **other))
    assert sequence_noise(ids, 9, 0, seed=1, step=7) is None


def test_random_places_cover_everything() -> None:
    places = [random_index(4, seed=0, step=step, use=0) for step in range(200)]
    assert set(places) == {0, 1, 2, 3}
    assert places != [random_index(4, seed=0, step=step, use=1) for step in range(200)]
