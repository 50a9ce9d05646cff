"""Scheduled sampling: how often a step reads the true frame, and which steps do.

The draws are a pure function of (seed, step, sample), not of a generator's state: they do not
depend on the number of ranks, on restarts, or on anything else that draws random numbers.

Legend: B batch, T predicted steps that feed back.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tmu_dist.data.order import keyed_hash

_SAMPLING = 0x5A3B
"""Sets these draws apart from the data order, which hashes with the same seed."""


def sampling_probability(step: int, *, stop_step: int) -> float:
    """Probability of a true input at iteration `step` (from 1): linear from 1 to 0 at `stop_step`.

    With the default stop_step of 50,000 this is the field's decrement of 2e-5 an iteration.
    """
    return 1.0 - step / stop_step if step < stop_step else 0.0


def sampling_mask(
    probability: float, sample_ids_B: Tensor, num_steps: int, *, seed: int, step: int
) -> Tensor:
    """Bool [B, num_steps]: True where a sequence's step reads the true frame.

    Each sequence and step draws on its own; the whole frame shares the draw.
    """
    draws = sample_ids_B.numpy()[:, None] * num_steps + np.arange(num_steps)
    uniform = (keyed_hash(draws, _SAMPLING, seed, step) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(uniform < probability)
