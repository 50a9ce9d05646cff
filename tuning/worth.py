"""What single sources are worth, from the errors of sets of them: marginal gains, Shapley values.

Legend: M sources, N sets, P pairs of sets, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Errors: TypeAlias = Mapping[frozenset[str], NDArray[np.float64]]
"""Of every set that was tried, its error by seed, [S]."""


def marginal_gains(errors_S: Errors, source: str) -> NDArray[np.float64]:
    """How much a source lowers the error of each set without it, where both were tried, [P, S]."""
    gains_PS = [
        error_S - errors_S[tried | {source}]
        for tried, error_S in errors_S.items()
        if source not in tried and tried | {source} in errors_S
    ]
    return np.array(gains_PS)


def is_complete(errors_S: Errors, sources: Sequence[str]) -> bool:
    """Whether every set of the sources was tried, the empty one included."""
    return len(errors_S) == 2 ** len(sources)


def shapley_values(errors_S: Errors, sources: Sequence[str]) -> NDArray[np.float64] | None:
    """Share of each source in the gain of all of them over none, [M, S].

    The additive game that fits the gains of the sets that were tried best: weighted least squares
    with the weights (M - 1) / (C(M, n) n (M - n)) of sets of n sources, exact for none and all. Of
    a game of which every set is known, these are its Shapley values (Charnes, Golany, Keane and
    Rousseau 1988; Lundberg and Lee, NeurIPS 2017, Theorem 2).

    Args:
        errors_S: of sets of these sources.
        sources: all there are.

    Returns:
        None where it does not follow: without the empty set, all of them, or enough others.
    """
    size = len(sources)
    none, everyone = frozenset[str](), frozenset(sources)
    if not size or none not in errors_S or everyone not in errors_S:
        return None
    total_S = errors_S[none] - errors_S[everyone]
    tried = [each for each in errors_S if each not in (none, everyone)]
    weights_N = np.array([(size - 1) / (comb(size, k) * k * (size - k)) for k in map(len, tried)])
    has_NM = np.array([[source in each for source in sources] for each in tried], dtype=float)
    has_NM = has_NM.reshape(len(tried), size)
    gains_NS = np.array([errors_S[none] - errors_S[each] for each in tried])
    gains_NS = gains_NS.reshape(len(tried), len(total_S))
    # The last source has what the others leave of the total, so only theirs are unknown.
    last_N1 = has_NM[:, -1:]
    scale_N1 = np.sqrt(weights_N)[:, None]
    unknowns = scale_N1 * (has_NM[:, :-1] - last_N1)
    if size > 1 and np.linalg.matrix_rank(unknowns) < size - 1:
        return None
    others_MS = np.linalg.lstsq(unknowns, scale_N1 * (gains_NS - last_N1 * total_S))[0]
    return np.concatenate([others_MS, total_S[None] - others_MS.sum(0, keepdims=True)])
