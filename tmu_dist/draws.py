"""Random draws as pure functions of numbers: who asks, or how often, changes nothing.

A run draws its order, its sampling masks and its networks' noise by hashing what a draw is for
(seed, step, sample), not from a generator with a state. So ranks, restarts, batch sizes and
anything else that draws cannot change them, and they outlive library versions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def keyed_hash(values: NDArray[np.integer], *key: int) -> NDArray[np.uint64]:
    """Hash integers to 64 bits under a key of integers; splitmix64 rounds, vectorised.

    A key is of two words at least: under one word, value and word could change places.
    """
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _splitmix64(state ^ np.uint64(word % 2**64))
    return _splitmix64(_splitmix64(values.astype(np.uint64)) ^ state)


def keyed_uniform(values: NDArray[np.integer], *key: int) -> NDArray[np.floating]:
    """Uniform numbers in [0, 1), one an integer."""
    return (keyed_hash(values, *key) >> np.uint64(11)) * 2.0**-53


def keyed_normal(values: NDArray[np.integer], *key: int) -> NDArray[np.floating]:
    """Standard normal numbers, one an integer (Box and Muller 1958)."""
    radius = np.sqrt(-2.0 * np.log1p(-keyed_uniform(values, *key, 1)))
    cosine = np.cos(2.0 * np.pi * keyed_uniform(values, *key, 2))
    normal: NDArray[np.floating] = radius * cosine
    return normal


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One output of splitmix64 (Steele, Lea, Flood 2014) per state; uint64 arrays wrap silently."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
