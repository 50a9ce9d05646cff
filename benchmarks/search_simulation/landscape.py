"""From recorded curves to the curve of any trial: points between the recorded ones, and noise.

Errors are handled as logarithms. Shape letters: K validations of a run, R recorded runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmu_dist.draws import keyed_hash
from tuning.space import Axis, Point, Space, Value


class Landscape:
    """Every point's expected curve, and curves as runs would have them.

    Between recorded values of an axis on a logarithmic scale the mean of the logarithms over seeds
    is interpolated linearly; other axes have their recorded values alone. A run's curve is the
    point's times the deviation of a recorded run, drawn from all of them, from the mean of its own
    point's seeds (scaled up by sqrt(S / (S - 1)), since that mean is made of these S seeds).

    Args:
        record: results.json of `benchmarks.search_curves`.
        noise: the deviations count so many times.

    Raises:
        ValueError: a point and seed was recorded twice or not at all.
    """

    def __init__(self, record: Mapping[str, Any], noise: float = 1.0) -> None:
        self._axes = tuple(
            Axis(name=axis["name"], values=tuple(map(_hashable, axis["values"])))
            for axis in record["axes"]
        )
        self._is_log = tuple(axis["is_log"] for axis in record["axes"])
        seeds = record["seeds"]
        curves = record["curves"]
        self.steps_K: NDArray[np.int64] = np.array(curves[0]["steps"])
        shape = (*(len(axis.values) for axis in self._axes), len(seeds))
        logs = np.full((*shape, len(self.steps_K)), np.nan)
        operations = np.full(shape, np.nan)
        for curve in curves:
            where = (*self._cell(curve["point"]), seeds.index(curve["seed"]))
            logs[where] = np.log(curve["errors"])
            operations[where] = curve["operations_per_step"]
        if len(curves) != operations.size or np.isnan(operations).any():
            raise ValueError(
                f"{len(curves)} curves were recorded for {operations.size} pairs of point and "
                "seed; each must be there once: record them again with benchmarks.search_curves."
            )
        self._mean_log = logs.mean(axis=-2)
        self._operations = operations.mean(axis=-1)
        scale = noise * math.sqrt(len(seeds) / (len(seeds) - 1))
        deviations = scale * (logs - self._mean_log[..., None, :])
        self._deviations_RK = deviations.reshape(-1, len(self.steps_K))

    @property
    def space(self) -> Space:
        """What searches here vary: a range for every axis on a logarithmic scale."""
        axes = []
        for axis, is_log in zip(self._axes, self._is_log, strict=True):
            if is_log:
                low, high = (_number(axis.values[end]) for end in (0, -1))
                axis = Axis(name=axis.name, low=low, high=high, is_log=True)
            axes.append(axis)
        return Space(name="recorded", axes=tuple(axes))

    @property
    def num_steps(self) -> int:
        """Iterations of a whole run."""
        return int(self.steps_K[-1])

    @property
    def spread_of_final(self) -> float:
        """Relative standard deviation of the last error between seeds of one point."""
        return float(self._deviations_RK[:, -1].std())

    def truth_K(self, point: Point) -> NDArray[np.float64]:
        """The lowest error so far that is to be expected at each validation."""
        return np.minimum.accumulate(np.exp(self._between(point, self._mean_log)))

    def curve_K(self, point: Point, *key: int) -> NDArray[np.float64]:
        """The lowest error so far at each validation of one run; a pure function of its key."""
        row = int(keyed_hash(np.zeros(1, np.int64), *key)[0] % np.uint64(len(self._deviations_RK)))
        logs = self._between(point, self._mean_log) + self._deviations_RK[row]
        return np.minimum.accumulate(np.exp(logs))

    def relative_cost(self, point: Point) -> float:
        """Seconds a step over those of the recorded points' mean."""
        return float(self._between(point, self._operations) / self._operations.mean())

    def _cell(self, point: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(axis.values.index(_hashable(point[axis.name])) for axis in self._axes)

    def _between(self, point: Point, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Multilinear in the logarithms of ranges; the axes of the space are the array's first."""
        for axis, is_log in zip(self._axes, self._is_log, strict=True):
            value = point[axis.name]
            if not is_log:
                values = values[axis.values.index(value)]
                continue
            logs = [math.log(_number(known)) for known in axis.values]
            place = float(np.interp(math.log(_number(value)), logs, range(len(logs))))
            low = min(int(place), len(logs) - 2)
            values = values[low] + (place - low) * (values[low + 1] - values[low])
        return values


def _hashable(value: Any) -> Value:
    """As points have it: JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _number(value: Value) -> float:
    assert isinstance(value, (int, float))
    return float(value)
