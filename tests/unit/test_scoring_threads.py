"""Scores do not depend on threads; what goes wrong in one is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tmu_dist.data.transforms import Window
from tmu_dist.evaluation.pass_tables import ForecastTable, PassTables
from tmu_dist.evaluation.rain import RadarSettings, RadarTable
from tmu_dist.evaluation.score_table import ScoreTable
from tmu_dist.evaluation.threads import map_in_threads

RADAR = RadarSettings(
    unit="dBZ", thresholds=(20.0, 40.0), scales=(1, 4), numbers=(0.3, 0.6), pixel_km=None
)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    last_first = [threading.Event() for _ in range(2)]

    def act(number: int) -> int:
        if threads > 1 and number == 0:
            assert last_first[0].wait(10)  # the second ends before the first
        if number == 1:
            last_first[0].set()
        return number**2

    assert list(map_in_threads(act, range(20), threads=threads)) == [n**2 for n in range(20)]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_is_raised_and_few_items_are_taken_after_it(threads: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    def act(number: int) -> None:
        if number in (4, 5):
            raise ValueError(f"bad item {number}")

    with pytest.raises(ValueError, match="bad item 4"):
        list(map_in_threads(act, items(), threads=threads))
    assert len(taken) <= 5 + 2 * threads


@pytest.mark.parametrize("with_missing", [False, True])
def test_threads_change_no_bit_of_any_score(with_missing: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(6, 3, 2, 24, 20, generator=generator)
    forecasts = {
        name: truth + 0.2 * torch.randn(truth.shape, generator=generator) for name in ("a", "b")
    }
    observed = torch.rand(truth.shape, generator=generator) > 0.01 if with_missing else None
    ids, weights = torch.tensor([4, 2, 9, 0, 7, 7]), torch.tensor([1, 1, 1, 1, 1, 0])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            tables = PassTables(
                {name: ForecastTable(ScoreTable(), RadarTable(RADAR)) for name in forecasts}
            )
            tables.update(forecasts, Window(truth, observed), ids, weights)
            found.append({name: table.compute() for name, table in tables.forecasts.items()})
    finally:
        torch.set_num_threads(before)
    alone, together = found
    for name in forecasts:
        assert alone[name].scores.sample_ids_N.tolist() == [0, 2, 4, 7, 9]
        for metric, values_NT in alone[name].scores.values_NT.items():
            np.testing.assert_array_equal(values_NT, together[name].scores.values_NT[metric])
        one, other = alone[name].radar, together[name].radar
        assert one is not None and other is not None
        np.testing.assert_array_equal(one.counts_TKX, other.counts_TKX)
        np.testing.assert_array_equal(one.sums_TKSX, other.sums_TKSX)
