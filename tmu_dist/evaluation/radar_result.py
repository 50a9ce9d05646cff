"""The radar part of an evaluation: scores at thresholds of every forecast, in memory and as JSON.

JSON holds the counts and sums, of which everything else follows, and beside them the scores for
people and other programs. There, null means undefined (0 / 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmu_dist.evaluation.categorical import COUNT_NAMES
from tmu_dist.evaluation.neighbourhood import SUM_NAMES
from tmu_dist.evaluation.rain import RADAR_SCORE_NAMES, RadarScores, RadarSettings


@dataclass(frozen=True, kw_only=True)
class RadarResult:
    """Scores at thresholds, and what became of the optical flow."""

    settings: RadarSettings
    forecasts: Mapping[str, RadarScores]
    """By name of the forecast, like `EvaluationResult.overall`."""
    flow_note: str | None = None
    """Why optical flow was not computed; None when it was."""
    flow_ms_per_sequence: float | None = None
    """Milliseconds that it took per sequence, on this rank; None when it was not computed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "settings": asdict(self.settings),
            "optical_flow": {
                "note": self.flow_note,
                "ms_per_sequence": self.flow_ms_per_sequence,
            },
            "count_names": COUNT_NAMES,
            "sum_names": SUM_NAMES,
            "forecasts": {name: _forecast_to_dict(own) for name, own in self.forecasts.items()},
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RadarResult:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: it is none.
        """
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in tree["settings"].items()
        }
        return cls(
            settings=RadarSettings(**settings),
            forecasts={
                name: RadarScores(np.array(own["counts"], np.int64), np.array(own["sums"], float))
                for name, own in tree["forecasts"].items()
            },
            flow_note=tree["optical_flow"]["note"],
            flow_ms_per_sequence=tree["optical_flow"]["ms_per_sequence"],
        )


def _forecast_to_dict(scores: RadarScores) -> dict[str, Any]:
    by_score = {
        name: {
            "mean": _plain(scores.mean(name)),
            "pooled": _plain(scores.pooled(name)),
            "undefined_lead_times": scores.num_undefined(name).tolist(),
            "per_lead_time": _plain(scores.per_lead_time(name)),
        }
        for name in RADAR_SCORE_NAMES
    }
    return {
        "base_rate": _plain(scores.base_rate_K),
        **by_score,
        "counts": scores.counts_TKX.tolist(),
        "sums": scores.sums_TKSX.tolist(),
    }


def _plain(values: NDArray[np.float64]) -> Any:
    """Nested lists, with None for NaN."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()
