"""A run's numbers among Ray's own metrics, for Prometheus and Grafana (cluster/grafana.json).

Every node of a Ray cluster offers its metrics to Prometheus; these come from the process that
follows the run's log, so they are as many whatever the number of ranks. Prometheus shows
`tmu_dist_loss` as `ray_tmu_dist_loss`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from statistics import fmean
from typing import Any

from ray.util.metrics import Gauge

from tmu_dist.data.storage import StorageError
from tmu_dist.run_folder import PROVENANCE_FILE, Event, read_json

_GAUGES: Mapping[str, tuple[str, ...]] = {
    "step": ("Steps trained",),
    "num_steps": ("Steps that the run is to have",),
    "loss": ("Terms of the loss; total is their weighted sum", "term"),
    "samples_per_second": ("Sequences a second, all ranks",),
    "data_wait_fraction": ("Share of the time that rank 0 waits for data",),
    "validation_mse_per_frame": ("MSE per frame on the validation split, closed-loop",),
    "persistence_mse_per_frame": ("That of repeating the last frame",),
    "gate_mean": ("Mean transfer gate, over teachers", "layer"),
    "world_size": ("Ranks that train",),
    "restarts": ("Starts of the run after its first",),
}
"""What each says, and its tags beside `run`."""
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "train": {name: name for name in ("step", "samples_per_second", "data_wait_fraction")},
    "validation": {
        "mse_per_frame": "validation_mse_per_frame",
        "persistence_mse_per_frame": "persistence_mse_per_frame",
    },
}
"""Fields of events and their gauges."""
_LOSS = "loss/"
_AGAIN_SECONDS = 5.0
"""Ray drops a gauge that was not set for two of its reports, 20 s by default."""


class RunMetrics:
    """Exports what a run's log says; listens to a `LogFollower`. Ray must be connected.

    Args:
        run: the run folder, whose name is the tag `run`.
        num_steps: that the run is to have.
    """

    def __init__(self, run: str, num_steps: int) -> None:
        self._run = run
        self._last_step: int | None = None
        self._gauges = {
            name: Gauge(f"tmu_dist_{name}", description=meaning, tag_keys=("run", *tags))
            for name, (meaning, *tags) in _GAUGES.items()
        }
        self._values: dict[tuple[str, str, str], float] = {}
        self._set("num_steps", num_steps)
        self._closed = threading.Event()
        threading.Thread(target=self._set_again, daemon=True).start()

    def __call__(self, event: Event) -> None:
        """Export what one event of the log says."""
        if self._last_step is None or event["step"] < self._last_step or event["event"] == "resume":
            self._look_at_starts()
        self._last_step = event["step"]
        for field, name in _FIELDS.get(event["event"], {}).items():
            self._set(name, event[field])
        for field, value in event.items():
            if field.startswith(_LOSS):
                self._set("loss", value, "term", field.removeprefix(_LOSS))
        for layer, means in enumerate(event.get("gate_means") or ()):
            self._set("gate_mean", _mean(means), "layer", str(layer))

    def close(self) -> None:
        """Let Ray forget the numbers."""
        self._closed.set()

    def _look_at_starts(self) -> None:
        """How often the run was started, and with how many ranks, is not in its log."""
        with suppress(StorageError, ValueError):
            starts = read_json(self._run, PROVENANCE_FILE)["starts"]
            self._set("world_size", starts[-1]["world_size"])
            self._set("restarts", len(starts) - 1)

    def _set(self, name: str, value: float, tag: str = "run", of: str = "") -> None:
        self._values[name, tag, of] = value
        self._gauges[name].set(value, {tag: of, "run": PurePosixPath(self._run).name})

    def _set_again(self) -> None:
        while not self._closed.wait(_AGAIN_SECONDS):
            for (name, tag, of), value in self._values.copy().items():
                self._set(name, value, tag, of)


def _mean(value: Any) -> float:
    return fmean(map(_mean, value)) if isinstance(value, Sequence) else float(value)
