"""What a pass over a split collects about every forecast; ranks exchange and merge it in one piece.

Deliberately not here: the pass itself (`runner`), what a table counts (`score_table`, `rain`).

Shape letters: B batch, D draws of one sequence, N samples, T time, K thresholds, C channels,
H height, W width, L TMU layers, M teachers, X = 4 counts, Y metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tmu_dist.data.transforms import Window
from tmu_dist.evaluation.categorical import Counts
from tmu_dist.evaluation.ensemble import best_by_ssim, ensemble_scores, mean_forecast
from tmu_dist.evaluation.metrics import FloatArray, FramePair
from tmu_dist.evaluation.rain import RadarScores, RadarTable
from tmu_dist.evaluation.result import (
    ENSEMBLE_MEAN,
    MEAN_OVER_SAMPLES,
    MODEL,
    TransferGates,
)
from tmu_dist.evaluation.score_table import (
    RowTable,
    SampleRows,
    Scores,
    ScoreTable,
    frame_pairs,
    mean_of_finite,
)
from tmu_dist.models.rollout import Rollout


class ForecastScores(NamedTuple):
    """What one forecast, of the model or a baseline, reached."""

    scores: Scores
    radar: RadarScores | None
    """Scores at thresholds; None where they were not asked for."""
    contingency_NTKX: Counts | None


class ForecastTable:
    """Everything that is counted about one forecast."""

    def __init__(self, scores: ScoreTable, radar: RadarTable | None) -> None:
        self.scores, self.radar = scores, radar

    def add(self, sample_id: int, pair: FramePair) -> None:
        """Count one sample."""
        self.enter(sample_id, self.scores.score(pair), pair)

    def enter(self, sample_id: int, scores_YT: FloatArray, pair: FramePair) -> None:
        """Count one sample whose errors are known."""
        self.scores.enter(sample_id, scores_YT)
        if self.radar is not None:
            self.radar.add(sample_id, pair)

    def merge(self, other: ForecastTable) -> None:
        self.scores.merge(other.scores)
        if self.radar is not None and other.radar is not None:
            self.radar.merge(other.radar)

    def compute(self) -> ForecastScores:
        radar, counts = (None, None) if self.radar is None else self.radar.compute()
        return ForecastScores(self.scores.compute(), radar, counts)


class PassTables:
    """All that a pass collects, so that ranks can exchange and merge it in one piece.

    Args:
        forecasts: a table for each forecast.
        ensemble: for the scores of all draws together; None where a network draws nothing.
    """

    def __init__(
        self, forecasts: dict[str, ForecastTable], ensemble: RowTable | None = None
    ) -> None:
        self.forecasts, self.ensemble = forecasts, ensemble
        self.gates = SampleRows()
        self.layers: tuple[int, ...] = ()
        """Numbers of the TMU layers that have gates."""
        self.batch_size = self.num_batches = 0
        """Of this rank alone."""

    def update(
        self,
        forecasts_BTCHW: Mapping[str, Tensor],
        truth: Window,
        sample_ids_B: Tensor,
        weights_B: Tensor,
    ) -> None:
        """Score forecasts of one batch.

        Not in threads: the operations of one sample are so short that threads spend longer on
        handing the interpreter to each other than they save. Measured with two on two cores: 1.6
        to 2.7 times the processor time, and 1.1 to 2.2 times the wall time.
        """
        self.batch_size, self.num_batches = len(weights_B), self.num_batches + 1
        for name, forecast_BTCHW in forecasts_BTCHW.items():
            batch = (forecast_BTCHW, truth.frames_BTCHW, sample_ids_B, weights_B)
            for sample_id, pair in frame_pairs(*batch, truth.observed_BTCHW):
                self.forecasts[name].add(sample_id, pair)

    def add_draws(self, sample_id: int, draws_DTCHW: Tensor, truth: Window) -> None:
        """Score a stochastic network's draws of one sequence, whose truth is a batch of one.

        The best by SSIM counts as the model's forecast; beside it, the mean score of a draw, the
        mean forecast, and all draws together.
        """
        assert self.ensemble is not None

        def beside_truth(forecast_TCHW: Tensor) -> FramePair:
            one = torch.tensor([sample_id]), torch.ones(1)
            pairs = frame_pairs(forecast_TCHW[None], truth.frames_BTCHW, *one, truth.observed_BTCHW)
            return next(pairs)[1]

        table = self.forecasts[MODEL].scores
        scores_DYT = np.stack([table.score(beside_truth(draw)) for draw in draws_DTCHW])
        best = best_by_ssim(scores_DYT[:, table.names.index("ssim")])
        self.forecasts[MODEL].enter(sample_id, scores_DYT[best], beside_truth(draws_DTCHW[best]))
        expected_YT = mean_of_finite(scores_DYT, axis=0)
        self.forecasts[MEAN_OVER_SAMPLES].scores.enter(sample_id, expected_YT)
        mean = beside_truth(mean_forecast(draws_DTCHW))
        self.forecasts[ENSEMBLE_MEAN].add(sample_id, mean)
        self.ensemble.enter(sample_id, ensemble_scores(draws_DTCHW, mean))

    def add_gates(self, rollout: Rollout, sample_ids_B: Tensor, weights_B: Tensor) -> None:
        """Keep the transfer gates of one batch, if the network has any.

        Args:
            rollout: of the batch.
            sample_ids_B: a number of its own for each row: of the sequence, or of the draw.
            weights_B: 0 for padding.
        """
        self.layers = tuple(sorted(rollout.imitations))
        if rollout.diagnostics is None or rollout.diagnostics.transfer_gates_BTLM is None:
            return
        gates_BLM = rollout.diagnostics.transfer_gates_BTLM.double().mean(dim=1).cpu().numpy()
        for position in weights_B.nonzero().flatten().tolist():
            self.gates.add(int(sample_ids_B[position]), gates_BLM[position])

    def merge(self, other: PassTables) -> None:
        if self.forecasts.keys() != other.forecasts.keys():
            raise ValueError(
                f"Ranks scored different forecasts, {list(self.forecasts)} and "
                f"{list(other.forecasts)}: install the same libraries everywhere."
            )
        for name, table in self.forecasts.items():
            table.merge(other.forecasts[name])
        if self.ensemble is not None and other.ensemble is not None:
            self.ensemble.merge(other.ensemble)
        self.gates.merge(other.gates)
        self.layers = self.layers or other.layers

    def mean_gates(self) -> TransferGates | None:
        """Means over all rows, teachers numbered; None for a network without TMU layers."""
        if not self.layers:
            return None
        _, gates_NLM = self.gates.stacked()
        means_LM = gates_NLM.mean(axis=0)
        return TransferGates(
            teachers=tuple(f"slot {m}" for m in range(means_LM.shape[1])),
            layers=self.layers,
            means_LM=tuple(tuple(row) for row in means_LM.tolist()),
        )
