"""Statistics from counts: right numbers, and the same ones however they are put together."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from data_prep.physics import PixelScale
from data_prep.statistics import CodeHistogram, statistics_record, wet_codes
from tmu_dist.data.manifest import Units

DBZ = PixelScale(0, 70).units("reflectivity", "dBZ")
FINE_DBZ = PixelScale(0, 70, "uint16").units("reflectivity", "dBZ")

codes_8 = arrays(np.uint8, array_shapes(max_dims=3, max_side=6))


def histogram_of(*parts: np.ndarray) -> CodeHistogram:
    histogram = CodeHistogram.empty(parts[0].dtype.name)
    for part in parts:
        histogram.update(part)
    return histogram


@settings(deadline=None)
@given(st.lists(codes_8, min_size=1, max_size=6), st.randoms())
def test_any_order_of_merging_gives_the_same_bytes(parts, random):
    at_once = histogram_of(*parts)
    singles = [histogram_of(part) for part in parts]
    while len(singles) > 1:
        random.shuffle(singles)
        other = singles.pop()
        singles[0].merge(CodeHistogram.from_record(json.loads(json.dumps(other.to_record()))))
    assert json.dumps(singles[0].to_record()) == json.dumps(at_once.to_record())
    assert json.dumps(statistics_record(singles[0], DBZ, 15.0)) == json.dumps(
        statistics_record(at_once, DBZ, 15.0)
    )


@settings(deadline=None)
@given(codes_8, st.floats(0.01, 10), st.floats(-50, 50))
def test_moments_agree_with_numpy(codes, scale, offset):
    units = Units(
        quantity="q", unit="1", scale=scale, offset=offset, max_code=254, missing_code=255
    )
    record = statistics_record(histogram_of(codes), units, offset + 100 * scale)
    values = offset + scale * codes[codes < 255].astype(np.float64)
    assert record["count"] == values.size
    assert record["missing"] == codes.size - values.size
    if not values.size:
        assert record["mean"] is record["std"] is record["wet_fraction"] is None
        return
    for name, expected in (
        ("mean", values.mean()),
        ("variance", values.var()),
        ("std", values.std()),
        ("min", values.min()),
        ("max", values.max()),
        ("wet_fraction", (codes[codes < 255] >= 100).mean()),
    ):
        assert record[name] == pytest.approx(expected, rel=1e-9, abs=1e-9), name


def test_sixteen_bits_and_the_missing_code():
    codes = np.array([[0, 30_000, 65_534], [65_535, 65_535, 65_535]], np.uint16)
    record = statistics_record(histogram_of(codes), FINE_DBZ)
    assert (record["count"], record["missing"]) == (3, 3)
    assert (record["min"], record["max"]) == (0.0, pytest.approx(70.0))
    assert record["wet_fraction"] is None
    bins = record["histogram"]
    assert bins["codes_per_bin"] == 257 and len(bins["counts"]) == 255
    assert [bins["counts"][i] for i in (0, 30_000 // 257, 254)] == [1, 1, 1]
    assert sum(bins["counts"]) == 3


def test_eight_bits_have_a_bin_for_each_code():
    record = statistics_record(histogram_of(np.array([3, 3, 254, 255], np.uint8)), DBZ)
    assert record["histogram"]["codes_per_bin"] == 1
    assert len(record["histogram"]["counts"]) == 255
    assert record["histogram"]["counts"][3] == 2


def test_many_pixels_are_counted_exactly():
    """Sums of squares beyond 2**53, where floating point would round."""
    histogram = CodeHistogram.empty("uint16")
    histogram.counts[[0, 65_533, 65_534]] = [1, 2**45, 2**45]
    units = Units(
        quantity="q", unit="1", scale=1.0, offset=0.0, max_code=65_534, missing_code=65_535
    )
    record = statistics_record(histogram, units)
    assert record["count"] == 2**46 + 1
    assert record["mean"] == pytest.approx(65_533.5, rel=1e-12)
    assert record["variance"] == pytest.approx(0.25 + 65_533.5**2 / 2**46, rel=1e-6)


def test_large_arrays_are_counted_in_pieces():
    codes = np.arange(3 * 2**20 + 5, dtype=np.uint32).astype(np.uint8)
    assert histogram_of(codes).counts.tolist() == np.bincount(codes, minlength=256).tolist()
    strided = codes.reshape(5, -1)[:, ::3] if codes.size % 5 == 0 else codes[::3]
    assert histogram_of(strided).counts.sum() == strided.size


def test_a_threshold_includes_the_code_of_its_value():
    units = Units(quantity="q", unit="1", scale=0.1, offset=0.0, max_code=254, missing_code=255)
    assert np.flatnonzero(wet_codes(units, 0.3))[0] == 3  # 0.1 * 3 is 0.30000000000000004
    assert np.flatnonzero(wet_codes(units, 0.7))[0] == 7  # 0.1 * 7 is 0.7000000000000001
    assert np.flatnonzero(wet_codes(units, 0.31))[0] == 4
    assert not wet_codes(units, 26.0).any()


def test_video_has_all_codes():
    units = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)
    record = statistics_record(histogram_of(np.array([0, 255], np.uint8)), units)
    assert (record["mean"], record["max"], record["missing"]) == (0.5, 1.0, 0)
    assert len(record["histogram"]["counts"]) == 256


def test_codes_without_a_meaning_are_an_error():
    units = Units(quantity="q", unit="1", scale=1.0, offset=0.0, max_code=100, missing_code=200)
    with pytest.raises(ValueError, match=r"2 stored codes lie above max_code=100 .*\(200\)"):
        statistics_record(histogram_of(np.array([1, 200, 101, 150], np.uint8)), units)


def test_types_do_not_mix():
    histogram = CodeHistogram.empty("uint8")
    with pytest.raises(ValueError, match="counts uint8 codes, got uint16"):
        histogram.update(np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match="uint16 codes is no part of uint8"):
        histogram.merge(CodeHistogram.empty("uint16"))
    with pytest.raises(ValueError, match="got 'int32'"):
        CodeHistogram.empty("int32")


@pytest.mark.parametrize(
    "record",
    [
        {"dtype": "uint8", "codes": [1]},
        {"dtype": "float", "codes": [], "counts": []},
        {"dtype": "uint8", "codes": [256], "counts": [1]},
        {"dtype": "uint8", "codes": [1, 2], "counts": [1, 2, 3]},
        {"dtype": "uint8", "codes": [-1], "counts": [1]},
        {"dtype": "uint8", "codes": [1], "counts": [-4]},
    ],
)
def test_a_damaged_record_is_refused(record):
    with pytest.raises(ValueError, match="no record of a histogram"):
        CodeHistogram.from_record(record)
