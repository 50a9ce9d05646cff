"""Forecasts of "at least this much rain": contingency counts, and the scores made of them.

Counts are integers and add up: over pixels, sequences, lead times and ranks, in any order.
Scores are taken of sums of counts, never averaged over frames. A score whose denominator is 0
(nothing observed and nothing forecast, say) is undefined: NaN.

Definitions (Wilks, Statistical Methods in the Atmospheric Sciences, ch. 8), with
hits a, misses b (observed only), false alarms c (forecast only), correct negatives d:

    CSI = a / (a + b + c)    POD = a / (a + b)    FAR = c / (a + c)    bias = (a + c) / (a + b)
    HSS = 2 (a d - b c) / ((a + b)(b + d) + (a + c)(c + d))

Shape letters: the leading axes are anything; K thresholds, X = 4 counts.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Counts: TypeAlias = NDArray[np.int64]
COUNT_NAMES = ("hits", "misses", "false_alarms", "correct_negatives")
"""What the last axis of counts holds."""
CATEGORICAL_SCORES = {
    "csi": "critical success index, hits / (hits + misses + false alarms): 1 is perfect",
    "pod": "probability of detection, hits / (hits + misses): 1 is perfect",
    "far": "false alarm ratio, false alarms / (hits + false alarms): 0 is perfect",
    "hss": "Heidke skill score, the part of correct pixels beyond chance: 1 is perfect, 0 chance",
    "bias": "frequency bias, pixels forecast / pixels observed at or above the threshold: 1 is "
    "perfect, below 1 too rare, above 1 too frequent",
}


def contingency(
    predicted: NDArray[np.bool_], observed: NDArray[np.bool_], valid: NDArray[np.bool_] | None
) -> Counts:
    """Count the four outcomes over the last three axes (channels and pixels).

    Args:
        predicted: the forecast reaches the threshold, [..., C, H, W].
        observed: the truth does, same shape.
        valid: pixels that count, of the same shape or without its first axes; None means all.

    Returns:
        Counts [..., 4] in the order of `COUNT_NAMES`.
    """
    if valid is not None:
        predicted, observed = predicted & valid, observed & valid
    hits = count_pixels(predicted & observed)
    forecast, happened = count_pixels(predicted), count_pixels(observed)
    total = np.prod(observed.shape[-3:]) if valid is None else count_pixels(valid)
    counts = (hits, happened - hits, forecast - hits, total - forecast - happened + hits)
    return np.stack(counts, axis=-1)


def count_pixels(events: NDArray[np.bool_]) -> Counts:
    """Number of true values over the last three axes (channels and pixels)."""
    # One call a frame: without an axis NumPy counts ten times as fast as it sums along one.
    frames = events.reshape(-1, math.prod(events.shape[-3:]))
    counts = np.array([np.count_nonzero(frame) for frame in frames], np.int64)
    return counts.reshape(events.shape[:-3])


def categorical_score(name: str, counts: Counts) -> NDArray[np.float64]:
    """A score of `CATEGORICAL_SCORES`.

    Args:
        name: which.
        counts: [..., 4].

    Returns:
        [...]; NaN where the denominator is 0.
    """
    # As floats: products of counts of a large archive do not fit 64 bits.
    a, b, c, d = np.moveaxis(counts.astype(np.float64), -1, 0)
    match name:
        case "csi":
            above, below = a, a + b + c
        case "pod":
            above, below = a, a + b
        case "far":
            above, below = c, a + c
        case "hss":
            above = 2 * (a * d - b * c)
            below = (a + b) * (b + d) + (a + c) * (c + d)
        case "bias":
            above, below = a + c, a + b
        case _:
            known = ", ".join(CATEGORICAL_SCORES)
            raise ValueError(f"Unknown score {name!r}: choose from {known}.")
    return divide_or_nan(above, below)


def base_rate(counts: Counts) -> NDArray[np.float64]:
    """Part of the pixels at which the truth reaches the threshold; NaN without pixels."""
    a, b, c, d = np.moveaxis(counts.astype(np.float64), -1, 0)
    return divide_or_nan(a + b, a + b + c + d)


def divide_or_nan(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ratio; NaN where the denominator is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below != 0)
