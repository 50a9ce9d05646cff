"""The ledger's intervals, flags and verdict, against references of a few lines.

Legend: S seeds, N sequences, R resamples, T lead time.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from tmu_dist.ledger import statistics as ledger
from tmu_dist.ledger.statistics import (
    NUM_RESAMPLES,
    Difference,
    Measurement,
    answer,
    difference,
    gain,
    measure_csi,
    measure_mean,
    relation,
    sequence_counts,
    student_interval,
)

NOISE = np.random.default_rng(3)


def measured(values_SN: np.ndarray, *, first_seed: int = 0) -> Measurement:
    return measure_mean({first_seed + s: row for s, row in enumerate(values_SN)})


def found(low: float, high: float, *, seeds: int = 3) -> Difference:
    middle = (low + high) / 2
    return Difference(
        seeds=tuple(range(seeds)), by_seed=(middle,) * seeds, mean=middle, low=low, high=high,
        student=(low, high) if seeds > 1 else None,
    )  # fmt: skip


def test_the_interval_is_that_of_a_crossed_bootstrap() -> None:
    """Reference: draw seeds and sequences one resample at a time, with other random numbers."""
    first_SN = NOISE.normal(5, 1, (3, 40)) + NOISE.normal(0, 0.5, (3, 1))
    second_SN = NOISE.normal(4, 1, (3, 40))
    own = difference(measured(first_SN), measured(second_SN))
    assert own is not None
    difference_SN, rng = first_SN - second_SN, np.random.default_rng(99)
    means = [
        difference_SN[rng.integers(3, size=3)][:, rng.integers(40, size=40)].mean()
        for _ in range(20_000)
    ]
    assert own.mean == pytest.approx(difference_SN.mean(), abs=1e-12)
    assert own.by_seed == pytest.approx(difference_SN.mean(1), abs=1e-12)
    low, high = np.quantile(means, (0.025, 0.975))
    width = high - low  # ends of 10,000 resamples are sure to about two hundredths of it
    assert abs(own.low - low) < 0.03 * width and abs(own.high - high) < 0.03 * width


def test_pairing_takes_out_what_is_common() -> None:
    """Hard sequences and bad seeds that both arms share do not widen the interval."""
    hard_SN = NOISE.normal(0, 100, (1, 30)) + NOISE.normal(0, 50, (3, 1))
    own = difference(measured(hard_SN + 2.0), measured(hard_SN))
    assert own is not None
    assert (own.low, own.high) == pytest.approx((2.0, 2.0), abs=1e-9)


def test_one_bad_seed_cannot_hide_behind_many_sequences() -> None:
    """By sequences alone the difference would be sure; one seed of three says the opposite."""
    values_SN = np.array([[-3.0], [1.0], [1.0]]) + NOISE.normal(0, 0.01, (3, 500))
    own = difference(measured(values_SN), measured(np.zeros((3, 500))))
    assert own is not None
    assert own.low == pytest.approx(-3.0, abs=0.01) and own.high == pytest.approx(1.0, abs=0.01)
    assert own.flag == "undecided"


def test_of_three_seeds_that_differ_alone_it_goes_from_the_lowest_to_the_highest() -> None:
    """As the page says: then it holds the truth in 1 - 2 / 2^3 of the cases."""
    draws_KS, zero = NOISE.normal(size=(1000, 3)), measured(np.zeros((3, 2)))
    hits = 0
    for draw_S in draws_KS:
        own = difference(measured(draw_S[:, None].repeat(2, 1)), zero)
        assert own is not None
        assert (own.low, own.high) == pytest.approx((draw_S.min(), draw_S.max()), abs=1e-9)
        hits += own.low <= 0 <= own.high
    assert hits / 1000 == pytest.approx(0.75, abs=0.04)


def test_only_common_seeds_are_compared() -> None:
    first_SN, second_SN = NOISE.normal(size=(3, 10)), NOISE.normal(size=(2, 10))
    own = difference(measured(first_SN), measured(second_SN, first_seed=1))
    assert own is not None and own.seeds == (1, 2)
    assert own.by_seed == pytest.approx((first_SN[1:] - second_SN).mean(1), abs=1e-12)
    assert difference(measured(first_SN), measured(second_SN, first_seed=7)) is None


def test_a_single_seed_has_an_interval_over_sequences_and_decides_nothing() -> None:
    values_SN = NOISE.normal(50, 1, (1, 200))
    own = difference(measured(values_SN), measured(np.zeros((1, 200))))
    assert own is not None and own.student is None and own.flag == "undecided"
    half = 1.96 * values_SN.std() / math.sqrt(200)
    assert own.high - own.mean == pytest.approx(half, rel=0.1)
    assert measured(values_SN).deviation is None


def test_students_interval_is_scipys() -> None:
    values_S = np.array([0.3, -0.1, 0.7, 0.2])
    expected = stats.t.interval(0.95, 3, values_S.mean(), stats.sem(values_S))
    assert student_interval(values_S) == pytest.approx(expected, rel=1e-9)
    sure, unsure = (
        difference(measured(values_S[:, None] + shift), measured(np.zeros((4, 1))))
        for shift in (0.4, 0.1)
    )
    assert sure is not None and sure.flag == "helps"  # 0.675 +- 0.525
    # 0.375 +- 0.525; the seeds are 0, 0.4, 0.8 and 0.3, so the other interval is above 0.
    assert unsure is not None and unsure.low > 0 and unsure.flag == "undecided"


def test_sequences_without_a_score_are_left_out() -> None:
    values_SN = np.array([[1.0, np.nan, 3.0], [2.0, np.nan, 6.0]])
    own = measured(values_SN)
    assert own.score_S.tolist() == [2.0, 4.0]
    np.testing.assert_array_equal(own.resampled_SR, measured(values_SN[:, [0, 2]]).resampled_SR)


def test_csi_is_taken_of_sums_of_counts() -> None:
    counts_SNTX = NOISE.integers(1, 50, (2, 6, 3, 4))
    counts_SNTX[:, :, 2, :3] = 0  # a lead time without rain has no CSI
    own = measure_csi(dict(enumerate(counts_SNTX)))
    sums_STX = counts_SNTX[:, :, :2].sum(1)
    expected_S = (sums_STX[..., 0] / sums_STX[..., :3].sum(-1)).mean(1)
    np.testing.assert_allclose(own.score_S, expected_S, rtol=1e-12)
    weights_N = sequence_counts(6)[17].astype(int)
    repeated_SNTX = counts_SNTX.repeat(weights_N, axis=1)
    again = measure_csi(dict(enumerate(repeated_SNTX)))
    np.testing.assert_allclose(own.resampled_SR[:, 17], again.score_S, rtol=1e-12)


def test_resamples_are_fixed_and_whole() -> None:
    counts_RN = sequence_counts(25)
    assert counts_RN.shape == (NUM_RESAMPLES, 25) and set(counts_RN.sum(1)) == {25}
    assert len(np.unique(counts_RN, axis=0)) == NUM_RESAMPLES
    assert (ledger.seed_counts(25) != counts_RN).any(), "drawn apart from the sequences"
    ledger.sequence_counts.cache_clear()
    np.testing.assert_array_equal(sequence_counts(25), counts_RN)


def test_gain_is_positive_for_the_better_arm() -> None:
    low, high = measured(np.full((3, 5), 1.0)), measured(np.full((3, 5), 2.0))
    for_errors, for_ssim = (gain(low, high, higher_is_better=way) for way in (False, True))
    assert for_errors is not None and for_errors.flag == "helps"
    assert for_ssim is not None and for_ssim.flag == "negative transfer"


@pytest.mark.parametrize(
    ("low", "high", "flag"),
    [
        (0.1, 2, "helps"),
        (-2, -0.1, "negative transfer"),
        (-1, 2, "undecided"),
        (0, 2, "undecided"),
        (math.nan, math.nan, "undecided"),
    ],
)
def test_flags(low: float, high: float, flag: str) -> None:
    assert found(low, high).flag == flag


def test_correlations_are_scipys_and_need_four_points() -> None:
    first, second = [0.1, 0.4, 0.4, 0.9, 0.2], [3.0, 1.0, 7.0, 9.0, 2.0]
    own = relation(first, second)
    assert own is not None
    assert own.pearson == pytest.approx(stats.pearsonr(first, second)[0], abs=1e-12)
    assert own.spearman == pytest.approx(stats.spearmanr(first, second)[0], abs=1e-12)
    assert relation(first[:3], second[:3]) is None
    constant = relation([1.0] * 4, second[:4])
    assert constant is not None and math.isnan(constant.pearson)


def test_the_verdict_follows_its_rule() -> None:
    """Every combination of scratch and two controls, against the rule in another form."""
    kinds = {"better": found(1, 2), "unsure": found(-1, 2), "worse": found(-2, -1), "none": None}
    for scratch, first, second in itertools.product(kinds, repeat=3):
        got = answer(kinds[scratch], {"first": kinds[first], "second": kinds[second]})
        controls = {first, second}
        if scratch == "none":
            expected = "no answer"
        elif scratch != "better":
            expected = {"unsure": "no gain", "worse": "negative transfer"}[scratch]
        elif controls & {"unsure", "worse"}:
            expected = "not shown"
        else:
            expected = "open" if "none" in controls else "knowledge"
        assert got == expected, (scratch, first, second)
    assert answer(found(1, 2, seeds=1), {}) == "undecided"
