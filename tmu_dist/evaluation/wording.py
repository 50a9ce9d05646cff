"""How numbers are written for people, the same in the terminal and on pages.

Deliberately not here: what they mean (`metrics`, `result`).
"""

from __future__ import annotations

import math

_DECIMALS = {
    "mse_per_frame": 1,
    "mse_mean": 5,
    "mae_per_frame": 1,
    "mae_mean": 5,
    "psnr_db": 2,
    "ssim": 4,
    "identical_frames": 0,
}


def format_score(name: str, value: float) -> str:
    """A metric's value with as many decimals as it deserves."""
    return "∞" if math.isinf(value) else f"{value:.{_DECIMALS[name]}f}"


def format_difference(value: float) -> str:
    """A signed difference of errors per frame, with a real minus sign."""
    return f"{value:+.1f}".replace("-", "−")


def format_count(count: int) -> str:
    """A number of weights: 850, 84.1 k, 3.59 M."""
    if count < 1_000:
        return str(count)
    return f"{count / 1e3:.1f} k" if count < 1_000_000 else f"{count / 1e6:.2f} M"


def format_seconds(seconds: float) -> str:
    """A duration: 42.1 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
