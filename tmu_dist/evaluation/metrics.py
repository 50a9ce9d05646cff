"""Numbers per predicted frame: errors, PSNR, SSIM, with masks for what was not observed.

A pixel that was not observed counts nowhere: neither the truth there, nor what was predicted. A
frame without a single observed pixel has no score (NaN).

Deliberately not here: keeping and averaging the numbers (`score_table`), scores of rain at
thresholds (`rain`).

Shape letters: T lead time, C channels, H height, W width, X = C*H*W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter  # type: ignore[import-untyped]
from skimage.metrics import structural_similarity
from torch import Tensor

from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import to_uint8

FloatArray: TypeAlias = NDArray[np.float64]
SSIMMode: TypeAlias = Literal["uint8_7x7", "float_7x7_range1", "float_7x7_range2", "gauss_11"]

_AVERAGED = "averaged over sequences, then over lead times"
_TRUNCATED = "both images truncated to 8 bits, floor(255 v)"


class FramePair:
    """Predicted and true frames [T, C, H, W] of one sample, in the forms that metrics need.

    Everything is float64, the eight-bit forms too, so that differences cannot wrap. Where nothing
    was observed, both are 0.

    Args:
        predicted_TCHW: finite, nominally in [0, 1].
        true_TCHW: in [0, 1] where observed.
        observed_TCHW: False where nothing was observed; None means everywhere observed.
    """

    def __init__(
        self, predicted_TCHW: Tensor, true_TCHW: Tensor, observed_TCHW: Tensor | None = None
    ) -> None:
        self.observed_TCHW: NDArray[np.bool_] | None = None
        if observed_TCHW is not None:
            self.observed_TCHW = observed_TCHW.numpy()
            predicted_TCHW = predicted_TCHW.masked_fill(~observed_TCHW, 0)
            true_TCHW = true_TCHW.masked_fill(~observed_TCHW, 0)
        self.predicted_TCHW: FloatArray = predicted_TCHW.double().clamp(0, 1).numpy()
        self.true_TCHW: FloatArray = true_TCHW.double().numpy()
        self.predicted_8bit_TCHW: FloatArray = to_uint8(predicted_TCHW).double().numpy()
        self.true_8bit_TCHW: FloatArray = to_uint8(true_TCHW).double().numpy()

    @cached_property
    def error_TX(self) -> FloatArray:
        """Prediction minus truth, one row of C*H*W values per frame; 0 where not observed."""
        difference = self.predicted_TCHW - self.true_TCHW
        return difference.reshape(len(difference), -1)

    @cached_property
    def num_observed_T(self) -> NDArray[np.int64]:
        """Observed values of each frame."""
        if self.observed_TCHW is None:
            return np.full(len(self.true_TCHW), self.true_TCHW[0].size)
        return self.observed_TCHW.sum(axis=(1, 2, 3))

    def mean_over_observed(self, values_TX: FloatArray) -> FloatArray:
        """Mean of each row over the observed pixels, shape [T]; NaN where there are none.

        Args:
            values_TX: one value per pixel, 0 where not observed.
        """
        with np.errstate(invalid="ignore"):
            return values_TX.sum(axis=1) / self.num_observed_T

    def sum_as_if_observed(self, values_TX: FloatArray) -> FloatArray:
        """Mean over the observed pixels times the number of all, shape [T].

        Where nothing is missing this is the sum, in all its bits.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return values_TX.sum(axis=1) * (values_TX.shape[1] / self.num_observed_T)


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
    return pair.sum_as_if_observed(pair.error_TX**2)


def _mse_mean(pair: FramePair) -> FloatArray:
    return pair.mean_over_observed(pair.error_TX**2)


def _mae_per_frame(pair: FramePair) -> FloatArray:
    return pair.sum_as_if_observed(np.abs(pair.error_TX))


def _mae_mean(pair: FramePair) -> FloatArray:
    return pair.mean_over_observed(np.abs(pair.error_TX))


def _mse_physical(pair: FramePair, span: float) -> FloatArray:
    return _mse_mean(pair) * span**2


def _mae_physical(pair: FramePair, span: float) -> FloatArray:
    return _mae_mean(pair) * span


def _observed_fraction(pair: FramePair) -> FloatArray:
    return pair.num_observed_T / pair.true_TCHW[0].size


def _psnr_db(pair: FramePair) -> FloatArray:
    error_TCHW = pair.predicted_8bit_TCHW - pair.true_8bit_TCHW
    mean_T = pair.mean_over_observed((error_TCHW**2).reshape(len(error_TCHW), -1))
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
    def window(self) -> int:
        """Side of the window in pixels."""
        return 11 if self.gaussian else 7

    def score(self, pair: FramePair) -> FloatArray:
        """Mean over channels and the valid region of each frame, shape [T].

        With missing pixels: over the windows of the valid region that hold none.
        """
        height, width = pair.true_TCHW.shape[-2:]
        if min(height, width) < self.window:
            raise ValueError(
                f"SSIM looks through a {self.window}x{self.window} window, but frames are "
                f"{height}x{width}: leave out 'ssim', or evaluate larger frames."
            )
        true_TCHW, predicted_TCHW = (
            (pair.true_8bit_TCHW, pair.predicted_8bit_TCHW)
            if self.eight_bit
            else (pair.true_TCHW, pair.predicted_TCHW)
        )
        values_T = np.empty(len(true_TCHW))
        for t, (true_CHW, predicted_CHW) in enumerate(zip(true_TCHW, predicted_TCHW)):
            observed_CHW = None if pair.observed_TCHW is None else pair.observed_TCHW[t]
            if observed_CHW is None or observed_CHW.all():
                values_T[t] = self._compare(true_CHW, predicted_CHW, full=False)
            else:
                values_T[t] = self._compare_observed(true_CHW, predicted_CHW, observed_CHW)
        return values_T

    def _compare_observed(
        self, true_CHW: FloatArray, predicted_CHW: FloatArray, observed_CHW: NDArray[np.bool_]
    ) -> float:
        """NaN where no window is without missing pixels."""
        whole_CHW = minimum_filter(
            observed_CHW, size=(1, self.window, self.window), mode="constant", cval=False
        )
        channels = whole_CHW.any(axis=(1, 2))
        if not channels.any():
            return np.nan
        _, map_CHW = self._compare(true_CHW, predicted_CHW, full=True)
        pairs = zip(map_CHW[channels], whole_CHW[channels], strict=True)
        return float(np.mean([map_HW[whole_HW].mean() for map_HW, whole_HW in pairs]))

    def _compare(self, true_CHW: FloatArray, predicted_CHW: FloatArray, *, full: bool) -> Any:
        weighting = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return structural_similarity(
            true_CHW,
            predicted_CHW,
            data_range=self.data_range,
            channel_axis=0,
            full=full,
            **(weighting if self.gaussian else {}),
        )


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
