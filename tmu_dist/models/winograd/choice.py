"""Where Winograd's filtering is faster than the library's convolution: a table of measured ratios.

`python -m benchmarks.convolutions` measures them again (docs/results/convolutions).
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple

_WORTH = 1.1
"""Least ratio of times, forward and backward together, that counts as faster."""
_FEWEST_CHANNELS = 32
"""With fewer input channels a convolution is too small a part of a step to be worth the choice."""


class _Measured(NamedTuple):
    taps: int
    side: int
    in_channels: int
    out_channels: int
    ratio: float
    """Time of the direct convolution over that of Winograd's filtering, in the worst round."""


@cache
def is_faster(taps: int, height: int, width: int, in_channels: int, out_channels: int) -> bool:
    """Whether a shape was measured to be faster, or the largest measured one that it covers was.

    The choice does not depend on the batch, so that ranks and batch sizes compute alike.
    """
    if in_channels < _FEWEST_CHANNELS:
        return False
    side = min(height, width)
    covered = [
        each
        for each in _table()
        if each.taps == taps
        and each.side <= side
        and each.in_channels <= in_channels
        and each.out_channels <= out_channels
    ]
    if not covered:
        return False
    nearest = max(covered, key=lambda each: each.in_channels * each.out_channels * each.side)
    return nearest.ratio >= _WORTH


@cache
def _table() -> tuple[_Measured, ...]:
    text = files(__package__).joinpath("measured.json").read_text()
    return tuple(_Measured(**row) for row in json.loads(text))
