"""Quantities and stored codes: known values, inverses, and what has no conversion."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data_prep.physics import (
    AccumulationToRate,
    DecibelToLinear,
    Inverse,
    MarshallPalmer,
    PixelScale,
    convert,
    linear_for_average,
)
from data_prep.readers.radar import NO_ECHO_DBZ, UNITS

CONNECTED = ("accumulation", "rain_rate", "reflectivity")
NAN = float("nan")

rates = arrays(
    np.float32, (4, 3), elements=st.just(0.0) | st.floats(2**-9, 512, width=32) | st.just(NAN)
)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# Rain and reflectivity


def test_marshall_palmer_at_known_rates():
    """Z = 200 R^1.6: 1 mm/h is 10 log10(200) dBZ, and ten times the rain 16 dB more."""
    dbz = MarshallPalmer().reflectivity_dbz(f32(0.1, 1, 10, 100))
    assert dbz.dtype == np.float32
    np.testing.assert_allclose(dbz, 10 * math.log10(200) + np.array([-16, 0, 16, 32]), atol=1e-5)
    np.testing.assert_allclose(MarshallPalmer(223, 1.53).reflectivity_dbz(f32(2)), 28.08881, 1e-6)


def test_rain_and_reflectivity_agree_with_pysteps():
    conversion = pytest.importorskip("pysteps.utils.conversion")
    rain = np.random.default_rng(1).gamma(0.5, 8, (40, 30)).astype(np.float32) + 0.05
    metadata = {"unit": "mm/h", "transform": None, "threshold": 0.01, "zerovalue": 0.0}
    theirs, _ = conversion.to_reflectivity(rain, metadata, zr_a=200.0, zr_b=1.6)
    np.testing.assert_allclose(MarshallPalmer().reflectivity_dbz(rain), theirs, atol=1e-4)


@pytest.mark.parametrize("rate", [0.0, -0.5, 1e-5, -math.inf])
def test_no_rain_is_no_echo_and_back(rate):
    dbz = MarshallPalmer().reflectivity_dbz(f32(rate))
    assert dbz == NO_ECHO_DBZ
    assert MarshallPalmer().rain_rate(dbz) == 0
    assert MarshallPalmer().rain_rate(f32(-99.0)) == 0


def test_missing_stays_missing_and_the_input_stays_as_it_was():
    steps = [MarshallPalmer(), AccumulationToRate(5), DecibelToLinear(), Inverse(MarshallPalmer())]
    for step in steps:
        for function in (step.forward, step.inverse):
            values = f32(1.5, NAN, 0)
            values.setflags(write=False)
            result = function(values)
            assert result.dtype == np.float32
            assert np.isnan(result).tolist() == [False, True, False]


def test_a_z_r_relation_needs_positive_parameters():
    with pytest.raises(ValueError, match="positive b, got 0"):
        MarshallPalmer(200, 0)
    with pytest.raises(ValueError, match="over some minutes, got 0"):
        AccumulationToRate(0)


def test_decibels_and_linear():
    step = DecibelToLinear()
    np.testing.assert_allclose(step.forward(f32(0, 10, 35)), [1, 10, 3162.2776], rtol=1e-6)
    np.testing.assert_allclose(step.inverse(f32(1, 10, 0)), [0, 10, NO_ECHO_DBZ], atol=1e-5)


# Chains


def test_five_minutes_of_rain_to_dbz():
    conversion = convert("accumulation", "reflectivity", accumulation_minutes=5)
    np.testing.assert_allclose(conversion(f32(1 / 12, 10 / 12)), [23.0103, 39.0103], atol=1e-4)
    record = conversion.record()
    assert json.loads(json.dumps(record)) == record
    assert [step["step"] for step in record] == ["accumulation_to_rate", "z_r"]
    assert record[0]["minutes"] == 5
    assert (record[1]["a"], record[1]["b"]) == (200.0, 1.6)
    assert (record[1]["unit_from"], record[1]["unit_to"]) == ("mm/h", "dBZ")


def test_the_way_back_is_recorded_as_such():
    conversion = convert("reflectivity", "accumulation", accumulation_minutes=10)
    np.testing.assert_allclose(conversion(f32(23.0103, NO_ECHO_DBZ)), [1 / 6, 0], rtol=1e-5)
    record = conversion.record()
    assert [step["step"] for step in record] == [
        "inverse of z_r",
        "inverse of accumulation_to_rate",
    ]
    assert [(step["from"], step["to"]) for step in record] == [
        ("reflectivity", "rain_rate"),
        ("rain_rate", "accumulation"),
    ]
    assert record[1]["unit_to"] == "mm"


def test_another_z_r_relation_is_used():
    one = convert("rain_rate", "reflectivity", z_r=MarshallPalmer(300, 1.4))
    np.testing.assert_allclose(one(f32(1)), 24.7712, rtol=1e-5)


@settings(deadline=None)
@given(
    rates,
    st.sampled_from(CONNECTED),
    st.sampled_from(CONNECTED),
    st.floats(100, 400),
    st.floats(1.2, 2),
    st.sampled_from([1.0, 5.0, 7.5, 60.0]),
)
def test_every_conversion_is_undone_by_its_inverse(rain, start, end, a, b, minutes):
    z_r = MarshallPalmer(a, b)
    facts = {"z_r": z_r, "accumulation_minutes": minutes}
    values = convert("rain_rate", start, **facts)(rain)
    conversion = convert(start, end, **facts)
    back = conversion.inverse(conversion(values))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, values, rtol=2e-5, atol=2e-5)
    # No rain comes back as exactly that.
    np.testing.assert_array_equal(back[rain == 0], values[rain == 0])
    # The inverse conversion is the conversion the other way round.
    np.testing.assert_array_equal(convert(end, start, **facts)(conversion(values)), back)


@pytest.mark.parametrize("quantity", UNITS)
def test_the_same_quantity_is_left_alone(quantity):
    conversion = convert(quantity, quantity)
    values = f32(1, NAN)
    assert conversion(values) is values
    assert conversion.steps == () and conversion.record() == []


@pytest.mark.parametrize("start", UNITS)
@pytest.mark.parametrize("end", UNITS)
def test_where_physics_has_no_path_there_is_an_error(start, end):
    if start == end or {start, end} <= set(CONNECTED):
        convert(start, end, accumulation_minutes=5)
    else:
        with pytest.raises(ValueError, match=f"no physical path from {start} .* to {end} "):
            convert(start, end, accumulation_minutes=5)


def test_an_accumulation_needs_its_minutes():
    with pytest.raises(ValueError, match="minutes of the accumulation must be known"):
        convert("accumulation", "reflectivity")
    with pytest.raises(ValueError, match="No quantity 'snow'"):
        convert("snow", "rain_rate")  # type: ignore[arg-type]


# Averages


def test_reflectivity_is_averaged_as_z_and_rain_as_rain():
    """Half a pixel of 40 dBZ and half without echo are 37 dBZ, not 4."""
    to_linear, from_linear, name = linear_for_average("reflectivity")
    mean = to_linear(f32(40, NO_ECHO_DBZ)).mean(keepdims=True)
    np.testing.assert_allclose(from_linear(mean), 40 - 10 * math.log10(2), rtol=1e-4)
    assert "linear" in name
    to_linear, from_linear, _ = linear_for_average("rain_rate")
    assert to_linear(f32(3)) == 3 and from_linear(f32(3)) == 3


# Stored codes


@pytest.mark.parametrize(
    "dtype, reserve, max_code",
    [("uint8", True, 254), ("uint8", False, 255), ("uint16", True, 65_534)],
)
def test_a_scale_says_what_its_codes_mean(dtype, reserve, max_code):
    scale = PixelScale(-10, 60, dtype, reserve)
    units = scale.units("reflectivity", "dBZ")
    assert (units.max_code, units.missing_code) == (max_code, max_code + 1 if reserve else None)
    codes = np.array([0, 7, max_code], dtype)
    physical = units.offset + units.scale * codes.astype(np.float64)
    np.testing.assert_allclose(scale.decode(codes), physical, atol=1e-5)
    np.testing.assert_allclose(scale.decode(codes)[[0, 2]], [-10, 60], atol=1e-5)


@settings(deadline=None)
@given(
    arrays(np.float32, (3, 5), elements=st.floats(-10, 80, width=32) | st.just(NAN)),
    st.sampled_from(["uint8", "uint16"]),
)
def test_a_value_in_range_comes_back_to_within_half_a_step(values, dtype):
    scale = PixelScale(0, 70, dtype)
    codes, above = scale.encode(values)
    assert codes.dtype == dtype
    assert above == np.count_nonzero(values > 70)
    back = scale.decode(codes)
    missing = np.isnan(values)
    np.testing.assert_array_equal(np.isnan(back), missing)
    np.testing.assert_array_equal(codes == scale.missing_code, missing)
    error = np.abs(back - np.clip(values, 0, 70))[~missing]
    assert (error <= scale.step / 2 + 70 * 2**-23).all()


def test_codes_survive_decoding_and_encoding():
    for scale in (
        PixelScale(0, 70),
        PixelScale(-31.5, 95.5, "uint16"),
        PixelScale(0, 1, "uint8", False),
    ):
        codes = np.arange(scale.max_code + 1 + scale.reserve_missing).astype(scale.dtype)
        again, above = scale.encode(scale.decode(codes))
        np.testing.assert_array_equal(again, codes)
        assert above == 0


def test_halves_are_rounded_up():
    scale = PixelScale(0, 254)
    assert scale.encode(f32(0.5, 1.5, 2.5, 2.49, 253.5)).codes.tolist() == [1, 2, 3, 2, 254]
    # A product in steps of 0.5 dBZ: 17.5 dBZ is code 63.5.
    assert PixelScale(0, 70).encode(f32(17.5)).codes == 64


def test_values_outside_the_range_are_clipped_and_those_above_counted():
    codes, above = PixelScale(0, 70).encode(f32(-32, -math.inf, 70, 70.1, 1e38, math.inf, NAN))
    assert codes.tolist() == [0, 0, 254, 254, 254, 254, 255]
    assert above == 3


def test_missing_values_need_a_code():
    with pytest.raises(ValueError, match=r"2 values are missing .* reserve_missing"):
        PixelScale(0, 1, reserve_missing=False).encode(f32(NAN, 1, NAN))


def test_impossible_scales_and_foreign_codes_are_refused():
    for low, high in ((1, 1), (2, 1), (0, math.inf), (NAN, 1)):
        with pytest.raises(ValueError, match="needs low < high"):
            PixelScale(low, high)
    with pytest.raises(ValueError, match="dtype must be one of"):
        PixelScale(0, 1, "int16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="These codes are uint8, got uint16"):
        PixelScale(0, 1).decode(np.zeros(2, np.uint16))
