"""Several forecasts of one sequence by a stochastic network: their noise, and what they are worth.

A "draw" is one forecast under one noise; outputs call it a sample, as the literature does. A draw's
noise is a pure function of (seed, sequence, draw), so batches, ranks and the number of draws
change none of them.

Scores of single draws are those of any forecast (`metrics`). Here are the two scores of all D
draws x_i of a pixel with the true value y, each summed over the pixels of a frame:

    CRPS      = mean_i |x_i - y| - 1/2 mean_{i != j} |x_i - x_j|
    diversity = mean_{i != j} (x_i - x_j)^2 = 2 var(x),  var with D - 1

The CRPS in this form is the fair one (Ferro 2014): its expectation does not depend on D. That of a
single forecast would be its absolute error. Both need two draws.

Deliberately not here: predicting (`runner`), keeping the scores (`pass_tables`).

Shape letters: B batch, D draws of one sequence, T lead time or step, Z noise, C channels, H height,
W width, P = T*C*H*W or some of these pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from tmu_dist.draws import keyed_normal
from tmu_dist.evaluation.metrics import FloatArray, FramePair
from tmu_dist.evaluation.score_table import in_numpy, mean_of_finite
from tmu_dist.models.rollout import Predictor

DEFAULT_NUM_SAMPLES = 10
ENSEMBLE_DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "crps_per_frame": "continuous ranked probability score of all samples of a sequence "
        "together, fair form: mean |x - y| less half the mean |x - x'| over pairs of samples; "
        "per pixel, in the unit and with the sum and masks of mae_per_frame, which is the CRPS of "
        "a single forecast. Lower is better",
        "diversity_per_frame": "mean squared difference between two samples of a sequence, over "
        "all pairs (twice the variance, with N - 1), in the unit and with the sum and masks of "
        "mse_per_frame. Neither high nor low is better in itself",
    }
)
"""Names of the scores of an ensemble, and what they mean."""

_PIXELS_AT_ONCE = 4096
"""Ten draws of them stay in a core's cache."""
_EVALUATION = 0xE7A1
"""Use of the hash; training draws noise with the same seeds."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """How often a stochastic network forecasts each sequence, and from which noise."""

    num_samples: int
    seed: int = 0

    @property
    def selection(self) -> str:
        """Which of the draws the model's scores are of."""
        return f"best of {self.num_samples} by SSIM"

    @property
    def definitions(self) -> dict[str, str]:
        """What the forecasts and scores of this ensemble mean, by name."""
        drawn = f"{self.num_samples} samples (seed {self.seed})"
        return {
            "model": f"{self.selection}: of {drawn} of each sequence, the one whose SSIM, averaged "
            "over lead times, is highest; every score of the model is of that sample (protocol "
            "of the paper's Table 3). It is chosen with the truth at hand and improves with the "
            "number of samples, so it must not be read as the score of a single forecast",
            "mean_over_samples": f"each score averaged over the {drawn}: what a single sample is "
            "expected to reach",
            "ensemble_mean": f"scores of one forecast, the mean of the {drawn}, each clipped to "
            "[0, 1]",
            **ENSEMBLE_DEFINITIONS,
        }

    def noise(
        self, sample_ids_B: Tensor, draws_B: Tensor, *, num_steps: int, noise_size: int
    ) -> Tensor:
        """Standard normal numbers, float32 [B, num_steps, noise_size].

        A longer forecast begins with the numbers of a shorter one.

        Args:
            sample_ids_B: position of each sequence in its split.
            draws_B: number of each draw, from 0.
            num_steps, noise_size: of the network's rollout.
        """
        numbers = np.arange(num_steps * noise_size)
        rows = [
            keyed_normal(numbers, _EVALUATION, self.seed, sample_id, draw).astype(np.float32)
            for sample_id, draw in zip(sample_ids_B.tolist(), draws_B.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).unflatten(1, (num_steps, noise_size))


def choose_ensemble(
    model: Predictor, num_samples: int | None, seed: int, *, default: int = DEFAULT_NUM_SAMPLES
) -> Ensemble | None:
    """The ensemble of a stochastic network; None for a deterministic one.

    Args:
        model: the network.
        num_samples: as the user said; None means the default.
        seed: of the noise.
        default: number of samples of a stochastic network.

    Raises:
        ValueError: less than one sample, or several of a deterministic network.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"--num-samples {num_samples}: at least one forecast has to be made.")
    if model.noise_size:
        return Ensemble(num_samples=default if num_samples is None else num_samples, seed=seed)
    if num_samples is not None and num_samples > 1:
        raise ValueError(
            f"--num-samples {num_samples}: this network is deterministic, so all its forecasts of "
            "a sequence are the same. Leave --num-samples out."
        )
    return None


def best_by_ssim(ssim_DT: FloatArray) -> int:
    """The draw with the highest SSIM averaged over lead times; the first where none has one."""
    means_D = mean_of_finite(ssim_DT, axis=1)
    return int(np.where(np.isnan(means_D), -np.inf, means_D).argmax())


def mean_forecast(draws_DTCHW: Tensor) -> Tensor:
    """The mean of the draws, each clipped to [0, 1] as scores see it; float64 [T, C, H, W]."""
    return draws_DTCHW.clamp(0, 1).mean(dim=0, dtype=torch.float64)


def ensemble_scores(draws_DTCHW: Tensor, pair: FramePair) -> FloatArray:
    """The scores of `ENSEMBLE_DEFINITIONS`, in their order, [2, T].

    NaN for a single draw, and where nothing was observed.

    Args:
        draws_DTCHW: all draws of one sequence.
        pair: the truth, with any forecast beside it.
    """
    count, lead_times = draws_DTCHW.shape[:2]
    if count == 1:
        return np.full((len(ENSEMBLE_DEFINITIONS), lead_times), np.nan)
    draws_DP, true_P = in_numpy(draws_DTCHW).reshape(count, -1), pair.true_TCHW.reshape(-1)
    crps_P, diversity_P = np.empty(true_P.shape), np.empty(true_P.shape)
    # Sorted, the sum of |x_i - x_j| over pairs is the sum of (2 k - D + 1) x_k, k from 0: no
    # D x D differences.
    weights_D1 = (2.0 * np.arange(count) - count + 1)[:, None] / (count * (count - 1))
    for first in range(0, len(true_P), _PIXELS_AT_ONCE):
        some = slice(first, first + _PIXELS_AT_ONCE)
        own_DP = draws_DP[:, some].clip(0, 1).astype(np.float64)
        error_P = np.abs(own_DP - true_P[some]).mean(axis=0)
        diversity_P[some] = 2.0 * own_DP.var(axis=0, ddof=1)
        crps_P[some] = error_P - (weights_D1 * _sorted_draws(own_DP)).sum(axis=0)
    if pair.observed_TCHW is not None:
        missing_P = ~pair.observed_TCHW.reshape(-1)
        crps_P[missing_P] = diversity_P[missing_P] = 0.0
    return np.stack(
        [
            pair.sum_as_if_observed(values_P.reshape(lead_times, -1).sum(axis=1))
            for values_P in (crps_P, diversity_P)
        ]
    )


def _sorted_draws(draws_DP: FloatArray) -> FloatArray:
    """The draws of each pixel in rising order.

    By a network of comparisons, each of two draws at all pixels at once: five times as fast as
    sorting pixel by pixel, at ten draws.
    """
    rows = list(draws_DP)
    for low, high in _comparisons(len(rows)):
        rows[low], rows[high] = (
            np.minimum(rows[low], rows[high]),
            np.maximum(rows[low], rows[high]),
        )
    return np.stack(rows)


@cache
def _comparisons(count: int) -> tuple[tuple[int, int], ...]:
    """Batcher's merge exchange, which sorts any number of values (Knuth, vol. 3, algorithm 5.2.2M).

    Returns:
        Places (low, high), one pair after another; the smaller value goes to the lower place.
    """
    found = []
    top = 1 << ((count - 1).bit_length() - 1)
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            found += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return tuple(found)
