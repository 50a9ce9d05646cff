"""Running a network closed-loop over a batch: once without noise, or often with it.

Deliberately not here: scoring (`pass_tables`), what the noise is (`ensemble`).

Shape letters: B batch, D draws of one sequence, T time, Z noise, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tmu_dist.config import WindowConfig
from tmu_dist.evaluation.ensemble import Ensemble
from tmu_dist.models.rollout import Predictor, Rollout


class Forecaster(NamedTuple):
    """A network, and what it is asked for."""

    model: Predictor
    window: WindowConfig
    device: torch.device
    """Where the model is."""

    def roll_out(self, inputs_BTCHW: Tensor, noise_BTZ: Tensor | None = None) -> Rollout:
        """Continue the input frames; without noise, by the mean of the latents."""
        return self.model(
            inputs_BTCHW.to(self.device),
            num_input_frames=self.window.num_input_frames,
            num_frames=self.window.num_frames,
            noise_BTZ=None if noise_BTZ is None else noise_BTZ.to(self.device),
            diagnostics=True,
        )

    def target_frames(self, rollout: Rollout) -> Tensor:
        """What a rollout predicts beyond the inputs, [B, T, C, H, W]."""
        return rollout.predictions_BTCHW[:, self.window.num_input_frames - 1 :]

    def draw(
        self, inputs_BTCHW: Tensor, sample_ids_B: Tensor, ensemble: Ensemble, *, batch_size: int
    ) -> Iterator[tuple[Tensor, Rollout]]:
        """Every draw of every sequence, all draws of the first one first.

        Args:
            inputs_BTCHW, sample_ids_B: the sequences.
            ensemble: how many draws, and their seed.
            batch_size: draws that the network makes at once, of whatever sequences.

        Yields:
            Numbers of the draws, sample_id * D + draw, and their rollout.
        """
        count = ensemble.num_samples
        rows = torch.arange(len(sample_ids_B)).repeat_interleave(count).split(batch_size)
        draws = torch.arange(count).repeat(len(sample_ids_B)).split(batch_size)
        for rows_B, draws_B in zip(rows, draws, strict=True):
            ids_B = sample_ids_B[rows_B]
            noise_BTZ = ensemble.noise(
                ids_B,
                draws_B,
                num_steps=self.window.num_frames - 1,
                noise_size=self.model.noise_size,
            )
            yield ids_B * count + draws_B, self.roll_out(inputs_BTCHW[rows_B], noise_BTZ)
