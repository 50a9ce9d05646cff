"""The transforms of Winograd's minimal filtering, in exact numbers.

Legend: M outputs of a tile along one axis, R taps of a filter, A = M + R - 1 points, at which the
polynomials are multiplied.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import NamedTuple

Matrix = tuple[tuple[Fraction, ...], ...]

TILE = 4
"""Outputs of a tile along each axis. Of 5 x 5 filters tiles of 2 were slower than the direct
convolution, and larger ones lose a digit with every pair of points."""

POINTS = {3: (Fraction(2, 3), Fraction(3, 2)), 5: (Fraction(1, 2), Fraction(1), Fraction(2))}
"""By taps of a filter. These points, their opposites, which share their sums, 0 and infinity had
the smallest rounding error of all pairs and triples of fractions between 1/4 and 3 with small
numbers."""


class Transforms(NamedTuple):
    """y = output ((filters g) . (inputs d)) along one axis."""

    output: Matrix
    """A^T, [M, A]."""
    filters: Matrix
    """G, [A, R]."""
    inputs: Matrix
    """B^T, [A, A]."""

    @property
    def num_points(self) -> int:
        """Points along one axis (A)."""
        return len(self.inputs)


@cache
def transforms(taps: int) -> Transforms:
    """Those of filters with `taps` taps along each axis.

    Values at the finite points p are sums of powers of p; interpolation divides by the differences
    of the points, which is left to the filters, transformed once an update.
    """
    points = [Fraction(0), *(sign * p for p in POINTS[taps] for sign in (1, -1))]
    output = [[p**i for p in points] + [Fraction(i == TILE - 1)] for i in range(TILE)]
    filters, inputs = [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = _product([p - q for q in others])
        filters.append([p**k / scale for k in range(taps)])
        inputs.append([*_polynomial(others), Fraction(0)])
    filters.append([Fraction(k == taps - 1) for k in range(taps)])
    inputs.append(_polynomial(points))
    return Transforms(_matrix(output), _matrix(filters), _matrix(inputs))


def transposed(matrix: Matrix) -> Matrix:
    """Rows become columns."""
    return _matrix([list(column) for column in zip(*matrix)])


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - root), from the lowest."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        scaled = [*(-root * c for c in coefficients), Fraction(0)]
        coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


def _product(values: list[Fraction]) -> Fraction:
    product = Fraction(1)
    for value in values:
        product *= value
    return product


def _matrix(rows: list[list[Fraction]]) -> Matrix:
    return tuple(tuple(row) for row in rows)
