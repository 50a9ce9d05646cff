"""What depends on the iteration: the learning rate, scheduled sampling, and random draws.

Draws are pure functions of (seed, step, sample), not of a generator's state: they do not depend on
the number of ranks, on restarts, or on anything else that draws random numbers.

Legend: B batch, T predicted steps that feed back, S steps of a rollout, Z noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tmu_dist.config import TrainingConfig
from tmu_dist.draws import keyed_normal, keyed_uniform

# Uses of the hash; the data order hashes with the same seed.
_SAMPLING, _NOISE, _CLIP = 0x5A3B, 0x401E, 0xC11B


def learning_rate(step: int, settings: TrainingConfig) -> float:
    """Learning rate of an iteration (from 1): constant, then linear to 0 after the last one."""
    start = settings.decay_from
    if start is None or step <= start:
        return settings.learning_rate
    return settings.learning_rate * (settings.num_steps + 1 - step) / (settings.num_steps - start)


def sampling_probability(step: int, settings: TrainingConfig) -> float:
    """Probability of a true input at iteration `step` (from 1).

    "linear" falls from 1 to 0 at `sampling_stop_step`; with the default of 50,000 this is the
    field's decrement of 2e-5 an iteration. "inverse_sigmoid" is k / (k + exp(n / k)), and 0 once
    it is below 0.001 (SAVP's public code). "always" is 1.
    """
    if settings.sampling == "always":
        return 1.0
    if settings.sampling == "linear":
        stop = settings.sampling_stop_step
        return 1.0 - step / stop if step < stop else 0.0
    scale = settings.sampling_scale
    probability = scale / (scale + math.exp(min(step / scale, 700.0)))
    return probability if probability >= 0.001 else 0.0


def sampling_mask(
    probability: float, sample_ids_B: Tensor, num_steps: int, *, seed: int, step: int
) -> Tensor:
    """Bool [B, num_steps]: True where a sequence's step reads the true frame.

    Each sequence and step draws on its own; the whole frame shares the draw.
    """
    draws_BT = sample_ids_B.numpy()[:, None] * num_steps + np.arange(num_steps)
    return torch.from_numpy(keyed_uniform(draws_BT, _SAMPLING, seed, step) < probability)


def sequence_noise(
    sample_ids_B: Tensor, num_steps: int, noise_size: int, *, seed: int, step: int
) -> Tensor | None:
    """Standard normal numbers [B, num_steps, noise_size] of a batch; None where none are used."""
    if not noise_size:
        return None
    count = num_steps * noise_size
    draws_BN = sample_ids_B.numpy()[:, None] * count + np.arange(count)
    noise_BN = keyed_normal(draws_BN, _NOISE, seed, step).astype(np.float32)
    return torch.from_numpy(noise_BN).unflatten(1, (num_steps, noise_size))


def random_index(count: int, *, seed: int, step: int, use: int) -> int:
    """One of 0..count - 1, the same for the whole global batch."""
    return int(keyed_uniform(np.arange(1), _CLIP, seed, step, use)[0] * count)
