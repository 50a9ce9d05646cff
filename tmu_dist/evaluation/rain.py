"""Scores of radar forecasts at thresholds: contingency counts and fractions, kept per sample.

`RadarTable` collects integer counts and sums per sample and lead time; one rank equals N ranks bit
for bit. `RadarScores` holds their totals over samples, and gives every score per lead time,
averaged over lead times, and of the counts pooled over all lead times.

Deliberately not here: the definitions (`categorical`, `neighbourhood`), errors (`metrics`), other
forecasts (`baselines`).

Shape letters: N samples, T lead time, K thresholds, S scales, X = 4 counts or 3 sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.manifest import Manifest, Units
from tmu_dist.evaluation.categorical import (
    CATEGORICAL_SCORES,
    Counts,
    base_rate,
    categorical_score,
    contingency,
)
from tmu_dist.evaluation.metrics import FloatArray, FramePair
from tmu_dist.evaluation.neighbourhood import fraction_sums, fractions_skill_score
from tmu_dist.evaluation.score_table import SampleRows

DEFAULT_THRESHOLDS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "reflectivity": (20.0, 30.0, 40.0),  # dBZ; 20 is the paper's
        "rain_rate": (0.5, 2.0, 5.0, 10.0),  # mm/h
        "accumulation": (0.1, 0.5, 1.0, 2.0),  # mm in the archive's interval
        "vil": (0.7, 3.5, 6.9, 12.0),  # kg/m2, levels of the SEVIR benchmark
    }
)
"""Of every quantity that is scored as radar. Archives of other quantities are video."""
DEFAULT_SCALES = (1, 2, 4, 8, 16)
"""Sides of the neighbourhoods of the FSS in pixels."""
RADAR_SCORE_NAMES = (*CATEGORICAL_SCORES, "fss")


@dataclass(frozen=True, kw_only=True)
class RadarSettings:
    """What is scored; thresholds and scales rise."""

    unit: str
    """Of the thresholds: the archive's own."""
    thresholds: tuple[float, ...]
    scales: tuple[int, ...]
    """Pixels."""
    numbers: tuple[float, ...]
    """The thresholds on the scale from 0 to 1 that networks see."""
    pixel_km: float | None
    """Side of a pixel; None where the grid does not say, or says it in degrees."""

    def threshold_label(self, k: int) -> str:
        """Such as "20 dBZ"."""
        return f"{self.thresholds[k]:g} {self.unit}"

    def scale_label(self, s: int) -> str:
        """Such as "8 px (16 km)"."""
        pixels = self.scales[s]
        km = "" if self.pixel_km is None else f" ({pixels * self.pixel_km:.3g} km)"
        return f"{pixels} px{km}"


def is_radar(units: Units) -> bool:
    """Whether archives of these units are scored as radar."""
    return units.quantity in DEFAULT_THRESHOLDS


def radar_settings(
    manifest: Manifest,
    thresholds: Iterable[float] | None = None,
    scales: Iterable[int] | None = None,
) -> RadarSettings | None:
    """What to score of an archive; None where it holds no radar.

    Args:
        manifest: of the archive.
        thresholds: in the archive's unit; None means `DEFAULT_THRESHOLDS` within its range.
        scales: pixels; None means `DEFAULT_SCALES` up to the smaller side of a frame.

    Raises:
        ValueError: settings for an archive that is no radar, thresholds that the archive cannot
            reach (nothing, or everything, would be an event), no positive scale.
    """
    units = manifest.units
    if not is_radar(units):
        if thresholds is not None or scales is not None:
            raise ValueError(
                f"{manifest.name} holds {units.quantity}: thresholds and scales are for "
                f"{', '.join(DEFAULT_THRESHOLDS)}. Leave them out."
            )
        return None
    if units.scale < 0:
        raise ValueError(
            f"{manifest.name} has units.scale={units.scale}: radar scores need numbers that rise "
            "with the rain."
        )
    low, high = units.offset, units.offset + units.max_code * units.scale
    side = min(manifest.height, manifest.width)
    if thresholds is None:
        reached = tuple(t for t in DEFAULT_THRESHOLDS[units.quantity] if low < t <= high)
    else:
        reached = _rising(thresholds, "thresholds")
        if bad := [t for t in reached if not low < t <= high]:
            raise ValueError(
                f"Thresholds {bad} lie outside what {manifest.name} stores, above {low:g} and up "
                f"to {high:g} {units.unit}: choose others."
            )
    if not reached:
        raise ValueError(
            f"None of the usual thresholds {DEFAULT_THRESHOLDS[units.quantity]} lies in what "
            f"{manifest.name} stores, {low:g} to {high:g} {units.unit}: choose thresholds."
        )
    sides = [n for n in DEFAULT_SCALES if n <= side] if scales is None else list(scales)
    if any(n < 1 for n in sides):
        raise ValueError(f"Scales are sides in pixels of at least 1, got {sides}.")
    return RadarSettings(
        unit=units.unit,
        thresholds=reached,
        scales=_rising(sides, "scales"),
        numbers=tuple((t - low) / (high - low) for t in reached),
        pixel_km=_pixel_km(manifest),
    )


def _rising(values: Iterable[Any], name: str) -> tuple[Any, ...]:
    given = list(values)
    if not given or len(set(given)) != len(given):
        raise ValueError(f"Give at least one value of {name}, and none twice; got {given}.")
    return tuple(sorted(given))


def _pixel_km(manifest: Manifest) -> float | None:
    grid = manifest.grid
    if grid is None or grid.unit != "m" or grid.pixel_width is None or grid.pixel_height is None:
        return None
    if not math.isclose(grid.pixel_width, grid.pixel_height, rel_tol=0.01):
        return None
    return grid.pixel_width / 1e3


@dataclass(frozen=True)
class RadarScores:
    """Totals over the samples of one forecast, and every score of them."""

    counts_TKX: Counts
    """Hits, misses, false alarms, correct negatives over all observed pixels."""
    sums_TKSX: FloatArray
    """Sums of the FSS, see `neighbourhood`."""

    def per_lead_time(self, name: str) -> FloatArray:
        """A score of each lead time and threshold, [T, K]; the FSS also of each scale, [T, K, S].

        NaN where it is undefined (0 / 0).
        """
        if name == "fss":
            return fractions_skill_score(self.sums_TKSX)
        return categorical_score(name, self.counts_TKX)

    def mean(self, name: str) -> FloatArray:
        """The mean over the lead times at which it is defined, [K] or [K, S]."""
        scores_TK = self.per_lead_time(name)
        defined = ~np.isnan(scores_TK)
        total, count = np.where(defined, scores_TK, 0.0).sum(axis=0), defined.sum(axis=0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def num_undefined(self, name: str) -> NDArray[np.int64]:
        """Lead times that the mean leaves out, [K] or [K, S]."""
        return np.isnan(self.per_lead_time(name)).sum(axis=0)

    def pooled(self, name: str) -> FloatArray:
        """The score of the counts added up over all lead times, [K] or [K, S]."""
        if name == "fss":
            return fractions_skill_score(self.sums_TKSX.sum(axis=0))
        return categorical_score(name, self.counts_TKX.sum(axis=0))

    @cached_property
    def base_rate_K(self) -> FloatArray:
        """Part of the observed pixels at which the truth reaches each threshold."""
        return base_rate(self.counts_TKX.sum(axis=0))


class RadarTable:
    """Counts one forecast after another: add / merge / compute."""

    def __init__(self, settings: RadarSettings) -> None:
        self.settings = settings
        self._counts = SampleRows()
        self._sums = SampleRows()

    def add(self, sample_id: int, pair: FramePair) -> None:
        """Count one sample."""
        # Frames are float32: a code that means exactly the threshold has to reach it.
        at_least_K1111 = np.array(self.settings.numbers).reshape(-1, 1, 1, 1, 1) - 2.0**-23
        predicted, observed = (
            frames_TCHW >= at_least_K1111 for frames_TCHW in (pair.predicted_TCHW, pair.true_TCHW)
        )
        counts_KTX = contingency(predicted, observed, pair.observed_TCHW)
        self._counts.add(sample_id, counts_KTX.swapaxes(0, 1))
        scales = self.settings.scales
        self._sums.add(sample_id, fraction_sums(predicted, observed, pair.observed_TCHW, scales))

    def merge(self, other: RadarTable) -> None:
        """Take over the rows of another rank's table of the same settings."""
        if self.settings != other.settings:
            raise ValueError(
                f"Tables of other thresholds or scales cannot be merged: {self.settings} and "
                f"{other.settings}."
            )
        self._counts.merge(other._counts)
        self._sums.merge(other._sums)

    def compute(self) -> tuple[RadarScores, Counts]:
        """Totals over all samples, and the counts of each [N, T, K, 4] by rising sample id."""
        _, counts_NTKX = self._counts.stacked()
        _, sums_NTKSX = self._sums.stacked()
        return RadarScores(counts_NTKX.sum(axis=0), sums_NTKSX.sum(axis=0)), counts_NTKX


def radar_definitions(settings: RadarSettings) -> dict[str, str]:
    """What every radar score means, with the settings."""
    thresholds = ", ".join(settings.threshold_label(k) for k in range(len(settings.thresholds)))
    scales = ", ".join(settings.scale_label(s) for s in range(len(settings.scales)))
    return {
        **CATEGORICAL_SCORES,
        "fss": "fractions skill score (Roberts and Lean 2008) over neighbourhoods of n x n pixels: "
        "1 is perfect; no rain beyond the edge of the frame, pixels without observation are left "
        "out of the fractions",
        "scores at thresholds": "an event is a pixel at or above the threshold. Counts (of the FSS "
        "sums) are pooled over all observed pixels and sequences at each lead time; the score is "
        "taken per lead time and averaged over lead times; where it is undefined (0 / 0) it is "
        "left out and counted. Pooled: of the counts of all lead times together",
        "thresholds": thresholds,
        "neighbourhoods": scales,
    }
