"""Scheduled sampling is the field's schedule, and its draws depend on nothing but their keys."""

from __future__ import annotations

import pytest
import torch

from tmu_dist.training.schedules import sampling_mask, sampling_probability


def test_default_is_the_published_decrement() -> None:
    eta = 1.0
    for step in range(1, 50_101):
        eta = eta - 2e-5 if step < 50_000 else 0.0
        if step % 4_999 == 0 or step >= 49_999:
            assert sampling_probability(step, stop_step=50_000) == pytest.approx(eta, abs=1e-9)


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
