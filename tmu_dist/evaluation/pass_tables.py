"""What a pass over a split collects about every forecast; ranks exchange and merge it in one piece.

Deliberately not here: the pass itself (`runner`), what a table counts (`score_table`, `rain`).

Shape letters: B batch, N samples, T time, K thresholds, C channels, H height, W width, L TMU
layers, M teachers, X = 4 counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from tmu_dist.data.transforms import Window
from tmu_dist.evaluation.categorical import Counts
from tmu_dist.evaluation.rain import RadarScores, RadarTable
from tmu_dist.evaluation.score_table import SampleRows, Scores, ScoreTable, frame_pairs
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

    def merge(self, other: ForecastTable) -> None:
        self.scores.merge(other.scores)
        if self.radar is not None and other.radar is not None:
            self.radar.merge(other.radar)

    def compute(self) -> ForecastScores:
        radar, counts = (None, None) if self.radar is None else self.radar.compute()
        return ForecastScores(self.scores.compute(), radar, counts)


class PassTables:
    """All that a pass collects, so that ranks can exchange and merge it in one piece."""

    def __init__(self, forecasts: dict[str, ForecastTable]) -> None:
        self.forecasts = forecasts
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
        """Score the forecasts of one batch."""
        self.batch_size, self.num_batches = len(weights_B), self.num_batches + 1
        for name, table in self.forecasts.items():
            pairs = frame_pairs(
                forecasts_BTCHW[name],
                truth.frames_BTCHW,
                sample_ids_B,
                weights_B,
                truth.observed_BTCHW,
            )
            for sample_id, pair in pairs:
                table.scores.add(sample_id, pair)
                if table.radar is not None:
                    table.radar.add(sample_id, pair)

    def add_gates(self, rollout: Rollout, sample_ids_B: Tensor, weights_B: Tensor) -> None:
        """Keep the transfer gates of one batch, if the network has any."""
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
        self.gates.merge(other.gates)
