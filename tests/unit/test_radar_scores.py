"""Radar scores against pysteps, plain loops and closed forms; masks; merged equals whole.

Shape letters: B batch, T lead time, K thresholds, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from tests.synthetic_radar import DBZ
from tmu_dist.data.manifest import Grid, Manifest, Shard, Units
from tmu_dist.evaluation.categorical import (
    CATEGORICAL_SCORES,
    base_rate,
    categorical_score,
    contingency,
)
from tmu_dist.evaluation.metrics import FramePair
from tmu_dist.evaluation.neighbourhood import fraction_sums
from tmu_dist.evaluation.radar_result import RadarResult
from tmu_dist.evaluation.rain import RADAR_SCORE_NAMES, RadarScores, RadarTable, radar_settings

T, H, W = 3, 40, 33
SCALES = (1, 2, 3, 4, 8, 16, 50)


def fields(seed: int, count: int = T) -> NDArray[np.float64]:
    """Smooth random reflectivity [T, 1, H, W] in dBZ, about a third above 20."""
    noise = np.random.default_rng(seed).normal(size=(count, 1, H, W))
    smooth = gaussian_filter(noise, (0, 0, 2.5, 2.5))
    return np.clip(15 + 12 * smooth / smooth.std(), 0, 70)


def masks(seed: int, count: int = T) -> NDArray[np.bool_]:
    """True where observed, about three of four pixels, in patches."""
    noise = np.random.default_rng(seed).normal(size=(count, 1, H, W))
    smooth = gaussian_filter(noise, (0, 0, 2, 2))
    return smooth > -0.7 * smooth.std()


def manifest(units: Units = DBZ, **changes: Any) -> Manifest:
    shape: dict[str, Any] = {"num_frames": 2, "channels": 1, "height": H, "width": W}
    shard = Shard(
        path="test/shard-000000.tar", num_bytes=1024, sha256="0" * 64, offsets=(512,), sizes=(9,),
        crc32c=(0,),
    )  # fmt: skip
    return Manifest(
        name="rain", units=units, frame_interval_minutes=5.0, created_by={},
        splits={"test": (shard,)}, dtype="uint16" if units.max_code > 255 else "uint8",
        **(shape | changes),
    )  # fmt: skip


def pair(predicted_dbz: NDArray[Any], true_dbz: NDArray[Any], mask: Any = None) -> FramePair:
    def numbers(dbz: NDArray[Any]) -> NDArray[np.float32]:
        return (dbz / 70).astype(np.float32)

    return FramePair(numbers(predicted_dbz), numbers(true_dbz), mask)


def scores_of(*pairs: FramePair, **settings: Any) -> RadarScores:
    chosen = radar_settings(manifest(), **settings)
    assert chosen is not None
    table = RadarTable(chosen)
    for sample_id, own in enumerate(pairs):
        table.add(sample_id, own)
    return table.compute()[0]


@pytest.fixture(scope="module")
def verification() -> Any:
    pytest.importorskip("cv2")
    with contextlib.redirect_stdout(io.StringIO()):
        return pytest.importorskip("pysteps").verification


@pytest.mark.parametrize("threshold", [5.0, 20.0, 35.0])
def test_categorical_scores_agree_with_pysteps(verification: Any, threshold: float) -> None:
    """Of the observed pixels: pysteps itself counts NaN as "no rain"."""
    predicted, true, mask = fields(1), fields(2), masks(3)
    theirs = verification.detcatscores.det_cat_fct(
        predicted[mask], true[mask], threshold, ["CSI", "POD", "FAR", "HSS", "BIAS"]
    )
    ours = scores_of(pair(predicted, true, mask), thresholds=[threshold])
    for name in CATEGORICAL_SCORES:
        assert ours.pooled(name)[0] == pytest.approx(theirs[name.upper()], rel=1e-12)


@pytest.mark.parametrize("threshold", [5.0, 20.0, 35.0])
def test_fss_agrees_with_pysteps_where_all_is_observed(verification: Any, threshold: float) -> None:
    predicted, true = fields(1), fields(2)
    ours = scores_of(pair(predicted, true), thresholds=[threshold], scales=SCALES)
    per_lead_time_TS = ours.per_lead_time("fss")[:, 0]
    for t, (s, scale) in itertools.product(range(T), enumerate(SCALES)):
        theirs = verification.spatialscores.fss(predicted[t, 0], true[t, 0], threshold, scale)
        assert per_lead_time_TS[t, s] == pytest.approx(theirs, rel=1e-9)
    pooled = verification.spatialscores.fss_init(threshold, 8)
    for t in range(T):
        verification.spatialscores.fss_accum(pooled, predicted[t, 0], true[t, 0])
    theirs = verification.spatialscores.fss_compute(pooled)
    assert ours.pooled("fss")[0, SCALES.index(8)] == pytest.approx(theirs, rel=1e-9)


def test_masked_fss_agrees_with_a_plain_loop() -> None:
    """Fractions over the observed pixels; beyond the edge is no rain, and counts as observed."""
    predicted, true, mask = fields(1) >= 20, fields(2) >= 20, masks(3)
    sums_TSX = fraction_sums(predicted[None], true[None], mask, SCALES)[:, 0]
    f, o, seen = (a[0, 0] for a in (predicted & mask, true & mask, mask))
    for s, n in enumerate(SCALES):
        totals = np.zeros(3)
        for y, x in zip(*np.nonzero(seen), strict=True):
            top, left = y - n // 2, x - n // 2
            window = np.s_[max(top, 0) : top + n, max(left, 0) : left + n]
            size = n * n - (~seen[window]).sum()
            fraction_f, fraction_o = f[window].sum() / size, o[window].sum() / size
            totals += fraction_f**2, fraction_f * fraction_o, fraction_o**2
        np.testing.assert_allclose(sums_TSX[0, s], totals, rtol=1e-12)


def test_fss_at_one_pixel_follows_from_the_counts() -> None:
    """Without neighbourhood: 1 - (misses + false alarms) / (2 hits + misses + false alarms)."""
    ours = scores_of(pair(fields(1), fields(2), masks(3)), thresholds=[20.0], scales=[1])
    hits, misses, alarms, _ = ours.counts_TKX.sum(axis=0)[0]
    expected = 1 - (misses + alarms) / (2 * hits + misses + alarms)
    assert ours.pooled("fss")[0, 0] == pytest.approx(expected, rel=1e-12)


def test_counts_are_those_of_the_table() -> None:
    predicted = np.array([1, 1, 0, 0, 1, 0], bool).reshape(1, 2, 3)
    observed = np.array([1, 0, 1, 0, 1, 1], bool).reshape(1, 2, 3)
    seen = np.array([1, 1, 1, 1, 1, 0], bool).reshape(1, 2, 3)
    assert contingency(predicted, observed, None).tolist() == [2, 2, 1, 1]
    assert contingency(predicted, observed, seen).tolist() == [2, 1, 1, 1]


def test_scores_in_closed_form() -> None:
    counts = np.array([30, 10, 20, 40])
    scores = {name: float(categorical_score(name, counts)) for name in CATEGORICAL_SCORES}
    assert scores["csi"] == 0.5
    assert scores["pod"] == 0.75
    assert scores["far"] == pytest.approx(0.4)
    assert scores["bias"] == 1.25
    assert scores["hss"] == pytest.approx(2 * (1200 - 200) / (40 * 50 + 50 * 60))
    assert base_rate(counts) == 0.4
    with pytest.raises(ValueError, match="Unknown score 'ets'"):
        categorical_score("ets", counts)


def test_counts_of_a_large_archive_do_not_overflow() -> None:
    counts = np.full(4, 2**40)
    assert categorical_score("hss", counts) == 0.0
    assert categorical_score("csi", counts) == pytest.approx(1 / 3)


def test_a_perfect_forecast() -> None:
    perfect = scores_of(pair(fields(1), fields(1), masks(3)), thresholds=[20.0, 30.0])
    best = {"csi": 1, "pod": 1, "far": 0, "hss": 1, "bias": 1, "fss": 1}
    for name in RADAR_SCORE_NAMES:
        np.testing.assert_allclose(perfect.mean(name), best[name], atol=1e-12)


def test_what_is_undefined_is_left_out_and_counted() -> None:
    """Rain in the first of three frames only; a forecast of nothing."""
    true = np.concatenate([fields(1, 1), np.zeros((2, 1, H, W))])
    nothing = scores_of(pair(np.zeros_like(true), true), thresholds=[20.0], scales=[1, 4])
    assert nothing.per_lead_time("csi")[0] == 0 and np.isnan(nothing.per_lead_time("csi")[1:]).all()
    assert nothing.mean("csi") == 0 and nothing.num_undefined("csi") == 2
    assert np.isnan(nothing.mean("far")) and nothing.num_undefined("far") == 3
    assert nothing.mean("bias") == 0
    assert nothing.num_undefined("fss").tolist() == [[2, 2]]
    assert nothing.mean("fss").tolist() == [[0, 0]]


def test_mean_over_lead_times_is_not_the_pooled_score() -> None:
    ours = scores_of(pair(fields(1), fields(2)), thresholds=[20.0])
    per_lead_time_T = ours.per_lead_time("csi")[:, 0]
    assert ours.mean("csi")[0] == pytest.approx(per_lead_time_T.mean())
    hits, misses, alarms, _ = ours.counts_TKX.sum(axis=0)[0]
    assert ours.pooled("csi")[0] == hits / (hits + misses + alarms)
    assert ours.mean("csi")[0] != ours.pooled("csi")[0]


def test_what_is_forecast_under_missing_pixels_does_not_matter() -> None:
    true, mask = fields(2), masks(3)
    wild = np.where(mask, fields(1), 70 - fields(4))
    first = scores_of(pair(fields(1), true, mask), scales=SCALES)
    second = scores_of(pair(wild, np.where(mask, true, 70.0), mask), scales=SCALES)
    np.testing.assert_array_equal(first.counts_TKX, second.counts_TKX)
    np.testing.assert_array_equal(first.sums_TKSX, second.sums_TKSX)


def test_a_full_mask_changes_nothing() -> None:
    everywhere = np.ones((T, 1, H, W), bool)
    first = scores_of(pair(fields(1), fields(2)), scales=SCALES)
    second = scores_of(pair(fields(1), fields(2), everywhere), scales=SCALES)
    np.testing.assert_array_equal(first.counts_TKX, second.counts_TKX)
    np.testing.assert_allclose(first.sums_TKSX, second.sums_TKSX, rtol=1e-12)


def test_nothing_observed_is_no_score() -> None:
    nowhere = np.zeros((T, 1, H, W), bool)
    ours = scores_of(pair(fields(1), fields(2), nowhere))
    assert ours.counts_TKX.sum() == 0 and ours.sums_TKSX.sum() == 0
    for name in RADAR_SCORE_NAMES:
        assert np.isnan(ours.mean(name)).all() and np.isnan(ours.pooled(name)).all()
    assert np.isnan(ours.base_rate_K).all()


@pytest.mark.parametrize(("max_code", "scale", "threshold"), [(254, 0.1, 2.3), (65534, 0.01, 0.7)])
def test_a_code_that_means_the_threshold_is_an_event(
    max_code: int, scale: float, threshold: float
) -> None:
    """And the code below it is none, for every threshold that a code can mean."""
    units = Units(
        quantity="rain_rate", unit="mm/h", scale=scale, offset=0.0, max_code=max_code,
        missing_code=max_code + 1,
    )  # fmt: skip
    code = round(threshold / scale)
    codes = torch.tensor([code - 1, code, code + 1, max_code], dtype=torch.int64)
    frames = (codes.float() / max_code).reshape(1, 1, 2, 2)  # as networks see them
    settings = radar_settings(manifest(units, height=2, width=2), thresholds=[threshold])
    assert settings is not None
    table = RadarTable(settings)
    table.add(0, FramePair(frames.numpy(), frames.numpy()))
    assert table.compute()[0].counts_TKX[0, 0].tolist() == [3, 0, 0, 1]


def test_merging_ranks_in_any_order_equals_counting_at_once() -> None:
    settings = radar_settings(manifest(), scales=SCALES)
    assert settings is not None
    pairs = [pair(fields(10 + i), fields(20 + i), masks(30 + i)) for i in range(5)]

    def table_of(ids: list[int]) -> RadarTable:
        table = RadarTable(settings)
        for i in ids:
            table.add(i, pairs[i])
        return table

    whole, whole_counts = table_of([0, 1, 2, 3, 4]).compute()
    ranks = [table_of([4, 0]), table_of([2]), table_of([3, 1, 0])]  # sample 0 was padded
    for order in itertools.permutations(ranks):
        merged = RadarTable(settings)
        for table in order:
            merged.merge(pickle.loads(pickle.dumps(table)))  # as ranks exchange them
        totals, counts_NTKX = merged.compute()
        np.testing.assert_array_equal(totals.counts_TKX, whole.counts_TKX)
        np.testing.assert_array_equal(totals.sums_TKSX, whole.sums_TKSX)
        np.testing.assert_array_equal(counts_NTKX, whole_counts)
    assert whole_counts.shape == (5, T, 3, 4)
    with pytest.raises(ValueError, match="Sample 0 was scored twice"):
        other = RadarTable(settings)
        other.add(0, pairs[1])
        table_of([0]).merge(other)
    with pytest.raises(ValueError, match="other thresholds"):
        table_of([0]).merge(RadarTable(replace(settings, thresholds=(1.0,))))


def test_radar_is_known_by_its_quantity() -> None:
    grey = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)
    assert radar_settings(manifest(grey)) is None
    with pytest.raises(ValueError, match="holds intensity: thresholds and scales are for"):
        radar_settings(manifest(grey), thresholds=[0.5])
    settings = radar_settings(manifest())
    assert settings is not None
    assert settings.thresholds == (20, 30, 40) and settings.unit == "dBZ"
    assert settings.numbers == pytest.approx((20 / 70, 30 / 70, 40 / 70))
    assert settings.scales == (1, 2, 4, 8, 16)
    small = radar_settings(manifest(height=10))
    assert small is not None and small.scales == (1, 2, 4, 8)


def test_thresholds_start_at_the_offset_of_the_archive() -> None:
    shifted = replace(DBZ, offset=-10.0)
    settings = radar_settings(manifest(shifted), thresholds=[25.0])
    assert settings is not None and settings.numbers == pytest.approx([35 / 70])


def test_useless_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Thresholds \[0.0, 71.0\] lie outside .* 70 dBZ"):
        radar_settings(manifest(), thresholds=[0.0, 20.0, 71.0])
    with pytest.raises(ValueError, match="none twice"):
        radar_settings(manifest(), thresholds=[20.0, 20.0])
    with pytest.raises(ValueError, match="at least one value of scales"):
        radar_settings(manifest(), scales=[])
    with pytest.raises(ValueError, match=r"at least 1, got \[0, 2\]"):
        radar_settings(manifest(), scales=[0, 2])
    with pytest.raises(ValueError, match="rise with the rain"):
        radar_settings(manifest(replace(DBZ, scale=-0.1, offset=25.0)))
    weak = replace(DBZ, quantity="vil", unit="kg/m2", scale=0.5 / 254)
    with pytest.raises(ValueError, match="None of the usual thresholds"):
        radar_settings(manifest(weak))


def test_scales_are_named_in_km_where_the_grid_knows() -> None:
    grid = Grid(
        height=H, width=W, projection="EPSG:28992", unit="m", left=0.0, top=0.0,
        pixel_width=2000.0, pixel_height=2000.0,
    )  # fmt: skip
    settings = radar_settings(manifest(grid=grid))
    assert settings is not None and settings.scale_label(3) == "8 px (16 km)"
    for unknown in (None, replace(grid, unit="degree"), replace(grid, pixel_height=3000.0)):
        settings = radar_settings(manifest(grid=unknown))
        assert settings is not None and settings.scale_label(3) == "8 px"


def test_a_radar_result_survives_json() -> None:
    true = np.concatenate([fields(1, 2), np.zeros((1, 1, H, W))])  # undefined in the last frame
    settings = radar_settings(manifest(), scales=[1, 4])
    assert settings is not None
    result = RadarResult(
        settings=settings,
        forecasts={"model": scores_of(pair(fields(2), true), scales=[1, 4])},
        flow_ms_per_sequence=1.5,
    )
    text = json.dumps(result.to_dict(), allow_nan=False)
    again = RadarResult.from_dict(json.loads(text))
    assert again.settings == settings
    assert json.dumps(again.to_dict()) == text
    tree = json.loads(text)["forecasts"]["model"]
    assert tree["csi"]["mean"] == result.forecasts["model"].mean("csi").tolist()
    perfect = scores_of(pair(np.zeros_like(true), np.zeros_like(true)), scales=[1, 4])
    dry = RadarResult(settings=settings, forecasts={"model": perfect}).to_dict()
    assert dry["forecasts"]["model"]["csi"]["mean"] == [None, None, None]
    assert dry["forecasts"]["model"]["csi"]["undefined_lead_times"] == [3, 3, 3]
