"""Numbers per predicted frame: errors, PSNR, SSIM, with masks for what was not observed.

A pixel that was not observed counts nowhere: neither the truth there, nor what was predicted. A
frame without a single observed pixel has no score (NaN).

Deliberately not here: keeping and averaging the numbers (`score_table`), scores of rain at
thresholds (`rain`).

Shape letters: T lead time, F some of the frames, N = T*C images, C channels, H height, W width,
X = C*H*W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import to_uint8
from tmu_dist.evaluation.categorical import count_pixels
from tmu_dist.evaluation.ssim import SimilarityWindow, mean_similarity
from tmu_dist.evaluation.windows import CHUNK_PIXELS

FloatArray: TypeAlias = NDArray[np.float64]
SSIMMode: TypeAlias = Literal["uint8_7x7", "float_7x7_range1", "float_7x7_range2", "gauss_11"]

_AVERAGED = "averaged over sequences, then over lead times"
_TRUNCATED = "both images truncated to 8 bits, floor(255 v)"


class FramePair:
    """Predicted and true frames [T, C, H, W] of one sample, in the forms that metrics need.

    Where nothing was observed, both frames are 0. Every form is made when it is first asked for.
    Sums are taken in float64.

    Args:
        predicted_TCHW: finite, nominally in [0, 1].
        true_TCHW: in [0, 1] where observed.
        observed_TCHW: False where nothing was observed; None means everywhere observed.
    """

    def __init__(
        self,
        predicted_TCHW: NDArray[np.floating[Any]],
        true_TCHW: NDArray[np.floating[Any]],
        observed_TCHW: NDArray[np.bool_] | None = None,
    ) -> None:
        # In one piece, so that the order of every sum is the same for all.
        self._given_predicted_TCHW = np.ascontiguousarray(predicted_TCHW)
        self._given_true_TCHW = np.ascontiguousarray(true_TCHW)
        self.observed_TCHW = None if observed_TCHW is None else np.ascontiguousarray(observed_TCHW)

    def _observed(self, frames_TCHW: NDArray[Any]) -> NDArray[Any]:
        """The frames with 0 where nothing was observed."""
        seen_TCHW = self.observed_TCHW
        return frames_TCHW if seen_TCHW is None else np.where(seen_TCHW, frames_TCHW, 0)

    @cached_property
    def predicted_TCHW(self) -> NDArray[np.floating[Any]]:
        """The prediction, clipped to [0, 1]."""
        return self._observed(self._given_predicted_TCHW).clip(0, 1)

    @cached_property
    def true_TCHW(self) -> NDArray[np.floating[Any]]:
        """The truth."""
        return self._observed(self._given_true_TCHW)

    @cached_property
    def predicted_8bit_TCHW(self) -> NDArray[np.uint8]:
        """The prediction in eight bits."""
        return to_uint8(self._observed(self._given_predicted_TCHW))

    @cached_property
    def true_8bit_TCHW(self) -> NDArray[np.uint8]:
        """The truth in eight bits."""
        return to_uint8(self._observed(self._given_true_TCHW))

    @property
    def squared_error_T(self) -> FloatArray:
        """Sum of the squared errors of each frame."""
        return self._error_sums[0]

    @property
    def absolute_error_T(self) -> FloatArray:
        """Sum of the absolute errors of each frame."""
        return self._error_sums[1]

    @cached_property
    def _error_sums(self) -> tuple[FloatArray, FloatArray]:
        squared_T, absolute_T = (np.empty(len(self.true_TCHW)) for _ in range(2))
        for some, error_FX in self._errors(self.predicted_TCHW, self.true_TCHW):
            absolute_T[some] = np.abs(error_FX).sum(axis=1)
            squared_T[some] = np.square(error_FX).sum(axis=1)
        return squared_T, absolute_T

    @cached_property
    def squared_error_8bit_T(self) -> FloatArray:
        """Sum of the squared errors of each frame in eight bits."""
        squared_T = np.empty(len(self.true_TCHW))
        for some, error_FX in self._errors(self.predicted_8bit_TCHW, self.true_8bit_TCHW):
            squared_T[some] = np.square(error_FX).sum(axis=1)
        return squared_T

    def _errors(
        self, predicted_TCHW: NDArray[Any], true_TCHW: NDArray[Any]
    ) -> Iterator[tuple[slice, FloatArray]]:
        """Prediction minus truth of a few frames at a time, a row each; 0 where not observed.

        In float64, so that bytes do not wrap; so few that it stays in a core's cache.
        """
        step = max(1, CHUNK_PIXELS // self.num_values)
        for first in range(0, len(true_TCHW), step):
            some = slice(first, first + step)
            error_FCHW = np.subtract(predicted_TCHW[some], true_TCHW[some], dtype=np.float64)
            yield some, error_FCHW.reshape(len(error_FCHW), -1)

    @cached_property
    def num_observed_T(self) -> NDArray[np.int64]:
        """Observed values of each frame."""
        if self.observed_TCHW is None:
            return np.full(len(self._given_true_TCHW), self.num_values)
        return count_pixels(self.observed_TCHW)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width."""
        _, _, height, width = self._given_true_TCHW.shape
        return height, width

    @property
    def num_values(self) -> int:
        """Values of a frame, C*H*W."""
        return self._given_true_TCHW[0].size

    def mean_over_observed(self, sums_T: FloatArray) -> FloatArray:
        """Mean over the observed pixels of each frame; NaN where there are none.

        Args:
            sums_T: of each frame, over the observed pixels.
        """
        with np.errstate(invalid="ignore"):
            return sums_T / self.num_observed_T

    def sum_as_if_observed(self, sums_T: FloatArray) -> FloatArray:
        """Mean over the observed pixels times the number of all.

        Where nothing is missing this is the sum, in all its bits.

        Args:
            sums_T: of each frame, over the observed pixels.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums_T * (self.num_values / self.num_observed_T)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named number per frame, with the words that define it in every output."""

    label: str
    """Column heading."""
    definition: str
    higher_is_better: bool
    score: Callable[[FramePair], FloatArray]
    """The value of each frame of a pair, shape [T]; NaN where nothing was observed."""


def _mse_per_frame(pair: FramePair) -> FloatArray:
    return pair.sum_as_if_observed(pair.squared_error_T)


def _mse_mean(pair: FramePair) -> FloatArray:
    return pair.mean_over_observed(pair.squared_error_T)


def _mae_per_frame(pair: FramePair) -> FloatArray:
    return pair.sum_as_if_observed(pair.absolute_error_T)


def _mae_mean(pair: FramePair) -> FloatArray:
    return pair.mean_over_observed(pair.absolute_error_T)


def _mse_physical(pair: FramePair, span: float) -> FloatArray:
    return _mse_mean(pair) * span**2


def _mae_physical(pair: FramePair, span: float) -> FloatArray:
    return _mae_mean(pair) * span


def _observed_fraction(pair: FramePair) -> FloatArray:
    return pair.num_observed_T / pair.num_values


def _psnr_db(pair: FramePair) -> FloatArray:
    mean_T = pair.mean_over_observed(pair.squared_error_8bit_T)
    with np.errstate(divide="ignore"):  # identical images: infinite, averaged separately
        return 20.0 * np.log10(255.0) - 10.0 * np.log10(mean_T)


@dataclass(frozen=True, kw_only=True)
class _SSIMForm:
    """One published form of structural similarity."""

    description: str
    data_range: float
    eight_bit: bool = False
    gaussian: bool = False

    @property
    def window(self) -> SimilarityWindow:
        """What images are seen through."""
        return SimilarityWindow(side=11 if self.gaussian else 7, gaussian=self.gaussian)

    def score(self, pair: FramePair) -> FloatArray:
        """Mean over channels and the valid region of each frame, shape [T].

        With missing pixels: over the windows of the valid region that hold none, and over the
        channels that have such windows; NaN where none has.
        """
        height, width = pair.frame_size
        side = self.window.side
        if min(height, width) < side:
            raise ValueError(
                f"SSIM looks through a {side}x{side} window, but frames are "
                f"{height}x{width}: leave out 'ssim', or evaluate larger frames."
            )
        true_TCHW, predicted_TCHW = (
            (pair.true_8bit_TCHW, pair.predicted_8bit_TCHW)
            if self.eight_bit
            else (pair.true_TCHW, pair.predicted_TCHW)
        )
        observed_TCHW = pair.observed_TCHW
        images = (-1, height, width)
        means_N = mean_similarity(
            true_TCHW.reshape(images),
            predicted_TCHW.reshape(images),
            self.window,
            data_range=self.data_range,
            observed_NHW=None if observed_TCHW is None else observed_TCHW.reshape(images),
        )
        means_TC = means_N.reshape(true_TCHW.shape[:2])
        seen_TC = ~np.isnan(means_TC)
        with np.errstate(invalid="ignore"):
            return np.where(seen_TC, means_TC, 0.0).sum(axis=1) / seen_TC.sum(axis=1)


_SSIM_FORMS: dict[SSIMMode, _SSIMForm] = {
    "uint8_7x7": _SSIMForm(
        description=f"{_TRUNCATED}; uniform 7x7 window, sample covariance, data range 255",
        data_range=255.0,
        eight_bit=True,
    ),
    "float_7x7_range1": _SSIMForm(
        description="images in [0, 1]; uniform 7x7 window, sample covariance, data range 1",
        data_range=1.0,
    ),
    "float_7x7_range2": _SSIMForm(
        description="images in [0, 1]; uniform 7x7 window, sample covariance, data range 2 (as "
        "older scikit-image assumed for float images; gives higher values)",
        data_range=2.0,
    ),
    "gauss_11": _SSIMForm(
        description="images in [0, 1]; Gaussian 11x11 window (sigma 1.5), population covariance, "
        "data range 1",
        data_range=1.0,
        gaussian=True,
    ),
}

_PLAIN_METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "mse_per_frame": Metric(
            label="MSE / frame",
            definition="squared error summed over the channels and pixels of a frame, as in the "
            f"paper's tables; prediction clipped to [0, 1]; {_AVERAGED}",
            higher_is_better=False,
            score=_mse_per_frame,
        ),
        "mse_mean": Metric(
            label="MSE, mean",
            definition="squared error averaged over the channels and pixels of a frame; "
            f"prediction clipped to [0, 1]; {_AVERAGED}",
            higher_is_better=False,
            score=_mse_mean,
        ),
        "mae_per_frame": Metric(
            label="MAE / frame",
            definition="absolute error summed over the channels and pixels of a frame; "
            f"prediction clipped to [0, 1]; {_AVERAGED}",
            higher_is_better=False,
            score=_mae_per_frame,
        ),
        "mae_mean": Metric(
            label="MAE, mean",
            definition="absolute error averaged over the channels and pixels of a frame; "
            f"prediction clipped to [0, 1]; {_AVERAGED}",
            higher_is_better=False,
            score=_mae_mean,
        ),
        "psnr_db": Metric(
            label="PSNR [dB]",
            definition="20 log10(255) - 10 log10(mean squared error over channels and pixels), "
            f"{_TRUNCATED}; {_AVERAGED}; identical images (infinite) are left out and counted in "
            "identical_frames",
            higher_is_better=True,
            score=_psnr_db,
        ),
    }
)

METRIC_NAMES: tuple[str, ...] = (*_PLAIN_METRICS, "ssim")
PHYSICAL_METRIC_NAMES: tuple[str, ...] = ("mse_physical", "mae_physical")
"""Errors in the archive's unit, such as dBZ; reported beside the others for radar."""
ERROR_METRIC_NAMES: tuple[str, ...] = ("mse_per_frame", "mae_per_frame")
"""Cheap enough for every validation."""
SSIM_MODES: tuple[SSIMMode, ...] = get_args(SSIMMode)

_OBSERVED_ONLY: Mapping[str, str] = MappingProxyType(
    {
        "mse_per_frame": "mean over the observed pixels times the number of all pixels (the sum, "
        "where nothing is missing)",
        "mae_per_frame": "mean over the observed pixels times the number of all pixels (the sum, "
        "where nothing is missing)",
        "ssim": "mean over the windows without missing pixels",
    }
)
"""What each metric does with missing pixels; the others average over the observed ones."""


def select_metrics(
    names: Sequence[str] = METRIC_NAMES,
    *,
    ssim_mode: SSIMMode = "uint8_7x7",
    units: Units | None = None,
) -> dict[str, Metric]:
    """The named metrics, in the order given.

    Args:
        names: some of `METRIC_NAMES` and, with units, `PHYSICAL_METRIC_NAMES`.
        ssim_mode: which published form of SSIM `ssim` means; values of different forms must
            never stand in one table.
        units: of the archive. When pixels can be missing in it, definitions say how they are
            left out, and `observed_fraction` is added.
    """
    if ssim_mode not in SSIM_MODES:
        raise ValueError(f"Unknown ssim_mode {ssim_mode!r}: choose from {', '.join(SSIM_MODES)}.")
    known = {**_PLAIN_METRICS, "ssim": _ssim(ssim_mode)}
    if units is not None:
        known |= _physical_metrics(units)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"Unknown metrics {unknown}: choose from {', '.join(known)}.")
    chosen = {name: known[name] for name in names}
    if units is None or units.missing_code is None:
        return chosen
    for name, metric in chosen.items():
        rule = _OBSERVED_ONLY.get(name, "mean over the observed pixels")
        chosen[name] = replace(metric, definition=f"{metric.definition}; {rule}")
    return chosen | {"observed_fraction": _OBSERVED_FRACTION}


def _ssim(mode: SSIMMode) -> Metric:
    form = _SSIM_FORMS[mode]
    return Metric(
        label="SSIM",
        definition=f"structural similarity, form {mode}: {form.description}; valid "
        f"region, K1 0.01, K2 0.03, averaged over channels; {_AVERAGED}",
        higher_is_better=True,
        score=form.score,
    )


def squared_unit(unit: str) -> str:
    """The unit of a squared error: dBZ², (mm/h)²."""
    return f"{unit}²" if unit.isalpha() else f"({unit})²"


def _physical_metrics(units: Units) -> dict[str, Metric]:
    """Errors in the unit of the archive; prediction clipped to the range that it stores."""
    span = units.max_code * units.scale
    low, high = sorted((units.offset, units.offset + span))
    clipped = f"prediction clipped to the stored range, {low:g} to {high:g} {units.unit}"
    squared = squared_unit(units.unit)
    return {
        "mse_physical": Metric(
            label=f"MSE [{squared}]",
            definition=f"squared error in {squared} averaged over the pixels of a frame; "
            f"{clipped}; {_AVERAGED}",
            higher_is_better=False,
            score=partial(_mse_physical, span=span),
        ),
        "mae_physical": Metric(
            label=f"MAE [{units.unit}]",
            definition=f"absolute error in {units.unit} averaged over the pixels of a frame; "
            f"{clipped}; {_AVERAGED}",
            higher_is_better=False,
            score=partial(_mae_physical, span=abs(span)),
        ),
    }


_OBSERVED_FRACTION = Metric(
    label="Observed",
    definition=f"part of the pixels of the true frames that was observed; {_AVERAGED}",
    higher_is_better=True,
    score=_observed_fraction,
)
