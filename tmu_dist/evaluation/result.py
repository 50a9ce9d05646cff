"""What one evaluation found, in memory and on disk.

`evaluation.json` holds every average and what it means; `per_sequence.npz` holds the scores of
every sample and lead time, so that two evaluations can be compared sequence by sequence; of radar
also the contingency counts (hits, misses, false alarms, correct negatives) of every threshold.

Deliberately not here: computing anything (`runner`), showing anything (`report`).

Shape letters: N samples, T lead time, K thresholds, L TMU layers, M teachers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmu_dist.evaluation.categorical import Counts
from tmu_dist.evaluation.ensemble import Ensemble
from tmu_dist.evaluation.radar_result import RadarResult
from tmu_dist.evaluation.score_table import Scores
from tmu_dist.files import atomic_file, atomic_write_text

JSON_NAME = "evaluation.json"
PER_SEQUENCE_NAME = "per_sequence.npz"
MODEL, PERSISTENCE = "model", "persistence"
"""The two forecasts that every evaluation scores."""
FLOW = "optical_flow"
"""The third, of radar, where pysteps is installed."""
ENSEMBLE_MEAN, MEAN_OVER_SAMPLES = "ensemble_mean", "mean_over_samples"
"""Of stochastic networks: the mean forecast, and what one sample is expected to reach."""
ENSEMBLE = "ensemble"
"""Of stochastic networks: no forecast, but the scores of all samples together."""
FORECAST_LABELS = {
    PERSISTENCE: "persistence",
    FLOW: "optical flow",
    ENSEMBLE_MEAN: "ensemble mean",
    MEAN_OVER_SAMPLES: "mean over samples",
    MODEL: "model",
}
"""For people, in the order in which they are shown (`EvaluationResult.labels`)."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """Which predictor was evaluated."""

    name: str
    method: str
    teachers: tuple[str, ...]
    seed: int
    step: int
    """Training steps behind the weights."""
    num_input_frames: int
    num_target_frames: int


@dataclass(frozen=True, kw_only=True)
class EvaluatedData:
    """Which sequences it was evaluated on."""

    url: str
    split: str
    manifest_hash: str
    num_sequences: int


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of weights."""

    train: int
    """Resident while training: the student, what is trained beside it, its frozen teachers."""
    test: int
    """Needed to predict."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How long predicting takes; definitions stand in `RUNTIME_DEFINITIONS`."""

    ms_per_sequence_batch_1: float
    ms_per_sequence_batch_8: float
    seconds_per_evaluation_batch: float
    evaluation_batch_size: int
    device: str


@dataclass(frozen=True, kw_only=True)
class TransferGates:
    """Mean transfer gate of each teacher in each TMU layer (paper, Table 5), in [0, 1]."""

    teachers: tuple[str, ...]
    layers: tuple[int, ...]
    """Numbers of the TMU layers, 0 is the lowest."""
    means_LM: tuple[tuple[float, ...], ...]

    def per_teacher(self) -> tuple[float, ...]:
        """Average over layers, one value per teacher."""
        return tuple(math.fsum(column) / len(column) for column in zip(*self.means_LM))


RUNTIME_DEFINITIONS = {
    "parameters.train": "weights resident while training: the student, what is trained "
    "beside it, and its frozen teachers",
    "parameters.test": "weights needed to predict",
    "ms_per_sequence_batch_1": "milliseconds to predict one whole sequence, one sequence at a "
    "time: median of repeats after warm-up, without reading and scoring",
    "ms_per_sequence_batch_8": "the same with eight sequences at once, divided by eight",
    "seconds_per_evaluation_batch": "wall time of the evaluation pass per batch of this process: "
    "reading, predicting and scoring",
}
_CONTINGENCY = "contingency"
"""Name of an array in `per_sequence.npz`, beside those of the metrics."""
_UNDEFINED = "undefined"
GATES_DEFINITION = (
    "transfer gate averaged over sequences, time, layers, channels and pixels (paper, Table 5)"
)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Averages of the model and of the baselines, with everything needed to read them.

    `overall[forecast][metric]` and `per_lead_time[forecast][metric]` hold the averages, with
    forecast `model`, `persistence` or `optical_flow`. Of a stochastic network, `model` is the best
    of its samples by SSIM, and `ensemble_mean`, `mean_over_samples` and `ensemble` say what the
    samples are worth otherwise (`Ensemble.definitions`). Only `psnr_db` can be infinite (see its
    definition); JSON has no infinity and holds null there. A number that is undefined because
    nothing was observed is NaN, and "undefined" in JSON. `per_sequence[forecast]` is present on a
    fresh result and on one that was loaded together with its npz file.
    """

    model: EvaluatedModel
    data: EvaluatedData
    definitions: Mapping[str, str]
    overall: Mapping[str, Mapping[str, float]]
    per_lead_time: Mapping[str, Mapping[str, tuple[float, ...]]]
    gates: TransferGates | None
    parameters: ParameterCounts
    runtime: Runtime
    radar: RadarResult | None = None
    """Scores at thresholds; None for video."""
    ensemble: Ensemble | None = None
    """How a stochastic network was sampled; None for deterministic ones."""
    per_sequence: Mapping[str, Scores] | None = None
    contingency: Mapping[str, Counts] | None = None
    """Of radar: counts of every sequence, lead time and threshold [N, T, K, 4] by forecast;
    present like `per_sequence`."""

    @property
    def labels(self) -> dict[str, str]:
        """What each forecast is called, in the order in which they are shown."""
        labels = {name: text for name, text in FORECAST_LABELS.items() if name in self.overall}
        return labels if self.ensemble is None else labels | {MODEL: self.ensemble.selection}

    def to_dict(self) -> dict[str, Any]:
        """The averages as plain JSON values; per-sequence scores only by file name."""
        tree = {
            "model": asdict(self.model),
            "data": asdict(self.data),
            "definitions": dict(self.definitions),
            "overall": _map_numbers(self.overall, _to_json),
            "per_lead_time": _map_numbers(self.per_lead_time, _to_json),
            "per_sequence": None if self.per_sequence is None else PER_SEQUENCE_NAME,
            "gates": None
            if self.gates is None
            else asdict(self.gates) | {"per_teacher": self.gates.per_teacher()},
            "parameters": asdict(self.parameters),
            "runtime": asdict(self.runtime),
        }
        if self.ensemble is not None:
            tree["ensemble"] = asdict(self.ensemble) | {"model": self.ensemble.selection}
        return tree if self.radar is None else tree | {"radar": self.radar.to_dict()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`, without per-sequence scores.

        Raises:
            ValueError: a part is missing or has unknown fields.
        """
        try:
            gates, radar, ensemble = tree["gates"], tree.get("radar"), tree.get("ensemble")
            model = {**tree["model"], "teachers": tuple(tree["model"]["teachers"])}
            return cls(
                model=EvaluatedModel(**model),
                data=EvaluatedData(**tree["data"]),
                definitions=tree["definitions"],
                overall=_map_numbers(tree["overall"], _from_json),
                per_lead_time=_map_numbers(tree["per_lead_time"], _from_json),
                gates=None
                if gates is None
                else TransferGates(
                    teachers=tuple(gates["teachers"]),
                    layers=tuple(gates["layers"]),
                    means_LM=tuple(tuple(row) for row in gates["means_LM"]),
                ),
                parameters=ParameterCounts(**tree["parameters"]),
                runtime=Runtime(**tree["runtime"]),
                radar=None if radar is None else RadarResult.from_dict(radar),
                ensemble=None
                if ensemble is None
                else Ensemble(num_samples=ensemble["num_samples"], seed=ensemble["seed"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"This is not an evaluation written by this version ({error}): evaluate again."
            ) from None

    def save(self, folder: Path) -> None:
        """Write `evaluation.json`, and `per_sequence.npz` when the scores are at hand."""
        if self.per_sequence is not None:
            arrays: dict[str, NDArray[Any]] = {
                f"{forecast}.{name}": values_NT
                for forecast, scores in self.per_sequence.items()
                for name, values_NT in scores.values_NT.items()
            }
            for forecast, counts_NTKX in (self.contingency or {}).items():
                arrays[f"{forecast}.{_CONTINGENCY}"] = counts_NTKX
            ids_N = self.per_sequence[MODEL].sample_ids_N
            with atomic_file(folder / PER_SEQUENCE_NAME) as path:
                np.savez_compressed(path, allow_pickle=False, sample_ids=ids_N, **arrays)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        atomic_write_text(folder / JSON_NAME, text)

    @classmethod
    def load(cls, folder: Path) -> EvaluationResult:
        """Read what `save` wrote.

        Raises:
            ValueError: no evaluation lies there, or it was written by another version.
        """
        file = folder / JSON_NAME
        if not file.is_file():
            raise ValueError(f"{folder} holds no {JSON_NAME}: run tmu_dist.evaluate with --out.")
        tree = json.loads(file.read_text())
        result = cls.from_dict(tree)
        if tree["per_sequence"] is None:
            return result
        values: dict[str, dict[str, NDArray[Any]]] = {}
        with np.load(folder / tree["per_sequence"], allow_pickle=False) as arrays:
            for key in arrays.files:
                if key != "sample_ids":
                    forecast, name = key.split(".")
                    values.setdefault(forecast, {})[name] = arrays[key]
            ids_N = arrays["sample_ids"]
        counts = {f: own.pop(_CONTINGENCY) for f, own in values.items() if _CONTINGENCY in own}
        scores = {forecast: Scores(ids_N, by_name) for forecast, by_name in values.items()}
        return replace(result, per_sequence=scores, contingency=counts or None)


def _map_numbers(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Change every leaf of nested mappings and lists; lists become tuples."""
    if isinstance(tree, Mapping):
        return {key: _map_numbers(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return tuple(_map_numbers(value, change) for value in tree)
    return change(tree)


def _to_json(value: float) -> float | str | None:
    if math.isnan(value):
        return _UNDEFINED
    return None if math.isinf(value) else value


def _from_json(value: float | str | None) -> float:
    if value == _UNDEFINED:
        return math.nan
    return math.inf if value is None else float(value)
