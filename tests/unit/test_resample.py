"""Area averages against a plain description, and what must be preserved."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.resample import Crop, area_average, crop, resampled_grid
from tmu_dist.data.manifest import Grid

shapes = st.tuples(st.integers(1, 13), st.integers(1, 13))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def fields(draw, missing=True):
    """A field, some of it missing, and a size to bring it to."""
    rows, columns = draw(shapes)
    random = np.random.default_rng(draw(seeds))
    values_HW = random.gamma(0.5, 10, (rows, columns)).astype(np.float32)
    if missing:
        values_HW[random.random((rows, columns)) < draw(st.sampled_from([0.0, 0.2, 0.8]))] = np.nan
    return values_HW, draw(st.integers(1, rows)), draw(st.integers(1, columns))


def plain_average(values_HW, height, width, min_observed):
    """The same by cutting every pixel into so many equal pieces that all of them fit."""
    rows, columns = values_HW.shape
    pieces = np.repeat(np.repeat(values_HW.astype(np.float64), height, 0), width, 1)
    blocks = pieces.reshape(height, rows, width, columns).swapaxes(1, 2).reshape(height, width, -1)
    observed = np.count_nonzero(~np.isnan(blocks), axis=-1)
    sums = np.nansum(blocks, axis=-1)
    enough = (observed >= min_observed * rows * columns) & (observed > 0)
    return np.where(enough, sums / np.maximum(observed, 1), np.nan)


@settings(deadline=None, max_examples=200)
@given(fields(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_agrees_with_a_plain_description(field, min_observed):
    values_HW, height, width = field
    averages = area_average(values_HW, height, width, min_observed=min_observed)
    assert averages.dtype == np.float32 and averages.shape == (height, width)
    expected = plain_average(values_HW, height, width, min_observed)
    np.testing.assert_allclose(averages, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(fields(missing=False))
def test_the_mean_is_preserved_where_nothing_is_missing(field):
    values_HW, height, width = field
    averages = area_average(values_HW, height, width)
    np.testing.assert_allclose(averages.mean(dtype=float), values_HW.mean(dtype=float), rtol=1e-5)


@settings(deadline=None)
@given(fields(), st.floats(-40, 90, width=32))
def test_a_constant_field_stays_constant_where_it_was_observed(field, value):
    values_HW, height, width = field
    values_HW = np.where(np.isnan(values_HW), np.float32(np.nan), np.float32(value))
    averages = area_average(values_HW, height, width, min_observed=0)
    np.testing.assert_array_equal(averages[~np.isnan(averages)], np.float32(value))


def test_by_a_whole_factor_it_is_the_mean_of_blocks():
    values_HW = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert area_average(values_HW, 2, 2).tolist() == [[4, 7], [16, 19]]


def test_agrees_with_pysteps_by_a_whole_factor():
    dimension = pytest.importorskip("pysteps.utils.dimension")
    rain = np.random.default_rng(0).gamma(0.3, 5, (60, 80)).astype(np.float32)
    metadata = {"unit": "mm/h", "xpixelsize": 1000, "ypixelsize": 1000}
    theirs, _ = dimension.aggregate_fields_space(rain, metadata, 4000)
    np.testing.assert_allclose(area_average(rain, 15, 20), theirs, rtol=1e-5)


def test_pixels_shared_by_two_targets_count_by_area():
    """Three columns to two: the middle one is half in each."""
    values_HW = np.array([[3, 6, 12]], np.float32)
    assert area_average(values_HW, 1, 2).tolist() == [[4, 10]]


def test_exactly_the_observed_part_that_is_asked_for_is_enough():
    values_HW = np.array([[1, np.nan], [np.nan, 3]], np.float32)
    assert area_average(values_HW, 1, 1, min_observed=0.5).tolist() == [[2]]
    assert np.isnan(area_average(values_HW, 1, 1, min_observed=0.51)).all()
    # Of nothing there is no mean, whatever is asked for.
    with np.errstate(all="raise"):
        nothing = area_average(np.full((2, 2), np.nan, np.float32), 1, 1, min_observed=0)
    assert np.isnan(nothing).all()


def test_its_own_size_is_no_change():
    values_HW = np.array([[1, np.nan]], np.float32)
    assert area_average(values_HW, 1, 2) is values_HW


@pytest.mark.parametrize("size", [(5, 6), (4, 7), (0, 6), (8, 12)])
def test_nothing_is_enlarged(size):
    with pytest.raises(ValueError, match=r"4 x 6 pixels .* nothing is enlarged"):
        area_average(np.zeros((4, 6), np.float32), *size)


def test_min_observed_is_a_fraction():
    with pytest.raises(ValueError, match=r"min_observed must be in \[0, 1\], got 50"):
        area_average(np.zeros((4, 6), np.float32), 2, 2, min_observed=50)


def test_a_crop_is_the_named_rows_and_columns():
    values_HW = np.arange(20, dtype=np.float32).reshape(4, 5)
    assert crop(values_HW, Crop(1, 2, 2, 3)).tolist() == [[7, 8, 9], [12, 13, 14]]
    assert crop(values_HW, Crop(0, 0, 4, 5)).shape == (4, 5)


@pytest.mark.parametrize("rectangle", [(0, 0, 5, 5), (0, 1, 4, 5), (3, 0, 2, 1), (0, 5, 1, 1)])
def test_a_crop_lies_inside_the_field(rectangle):
    with pytest.raises(ValueError, match="does not lie inside the field of 4 x 5"):
        crop(np.zeros((4, 5), np.float32), Crop(*rectangle))


def test_a_crop_has_a_size():
    for numbers in ((-1, 0, 1, 1), (0, 0, 0, 1)):
        with pytest.raises(ValueError, match="A crop needs top and left of at least 0"):
            Crop(*numbers)


def test_the_grid_follows_crop_and_average():
    grid = Grid(
        height=100, width=200, projection="EPSG:28992", unit="m",
        left=1000.0, top=50_000.0, pixel_width=500.0, pixel_height=250.0,
    )  # fmt: skip
    small = resampled_grid(grid, Crop(20, 40, 60, 90), 30, 60)
    assert (small.height, small.width, small.projection) == (30, 60, "EPSG:28992")
    assert (small.left, small.top) == (1000 + 40 * 500, 50_000 - 20 * 250)
    assert (small.pixel_width, small.pixel_height) == (750, 500)
    # The far edges are the crop's.
    assert small.left + 60 * small.pixel_width == 1000 + 130 * 500
    assert small.top - 30 * small.pixel_height == 50_000 - 80 * 250
    assert resampled_grid(grid, None, 100, 200) == grid


def test_a_grid_without_a_place_has_a_size_only():
    assert resampled_grid(Grid(height=10, width=20), Crop(0, 0, 10, 10), 5, 5) == Grid(
        height=5, width=5
    )


def test_a_grid_is_not_enlarged_or_left():
    with pytest.raises(ValueError, match="nothing is enlarged"):
        resampled_grid(Grid(height=10, width=20), Crop(0, 0, 10, 10), 11, 10)
    with pytest.raises(ValueError, match="does not lie inside"):
        resampled_grid(Grid(height=10, width=20), Crop(5, 0, 10, 10), 5, 5)
