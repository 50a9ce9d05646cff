"""Colours of physical fields: order, borders of steps, missing areas, colour bars."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from tmu_dist.colours import (
    MISSING,
    MISSING_LINE,
    PAPER,
    ColourScale,
    colour_scale,
    draw_colour_bar,
    paint,
    physical,
)
from tmu_dist.data.manifest import Units

DBZ = Units(
    quantity="reflectivity", unit="dBZ", scale=70 / 254, offset=0.0, max_code=254, missing_code=255
)
UNITS = {
    "reflectivity": DBZ,
    "rain_rate": dataclasses.replace(DBZ, quantity="rain_rate", unit="mm/h", scale=160 / 254),
    "accumulation": dataclasses.replace(DBZ, quantity="accumulation", unit="mm", scale=100 / 254),
    "vil": dataclasses.replace(DBZ, quantity="vil", unit="kg/m2", scale=80 / 254),
}
GREY = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)

DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
)
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.052]]
)
"""What green-blind and red-blind eyes see, in linear RGB (Machado, Oliveira and Fernandes 2009)."""
SEEN_BY = {"normal": np.eye(3), "green-blind": DEUTERANOPIA, "red-blind": PROTANOPIA}


def rgb(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text[1:]))


def linear(colours: list[tuple[int, ...]]) -> np.ndarray:
    parts = np.array(colours) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lightness(colours: list[tuple[int, ...]], seen_by: np.ndarray) -> np.ndarray:
    """CIE L* as eyes with this matrix see it."""
    luminance = (linear(colours) @ seen_by.T).clip(0, 1) @ [0.2126, 0.7152, 0.0722]
    return 116 * np.cbrt(luminance) - 16


@pytest.mark.parametrize("quantity", UNITS)
@pytest.mark.parametrize("eyes", SEEN_BY)
def test_steps_get_darker_with_the_value(quantity, eyes):
    scale = colour_scale(UNITS[quantity])
    steps = lightness([rgb(text) for text in (scale.below_colour, *scale.colours)], SEEN_BY[eyes])
    assert (np.diff(steps) < -3.5).all()


def test_reflectivity_has_steps_of_5_dbz():
    scale = colour_scale(DBZ)
    assert scale.label == "reflectivity [dBZ]"
    assert scale.bounds == tuple(range(5, 70, 5))
    assert scale.below_colour == PAPER


def test_rain_has_logarithmic_steps():
    scale = colour_scale(UNITS["rain_rate"])
    assert scale.label == "rain rate [mm/h]"
    assert scale.bounds == (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


@pytest.mark.parametrize(("high", "last"), [(100.0, 100), (99.0, 50), (10.0, 10), (0.7, 0.5)])
def test_steps_of_accumulations_end_with_the_stored_range(high, last):
    units = dataclasses.replace(UNITS["accumulation"], scale=high / 254)
    scale = colour_scale(units)
    assert scale.bounds[-1] == pytest.approx(last)
    assert len(scale.bounds) == 10


@pytest.mark.parametrize("bad", [{"bounds": (1.0,)}, {"bounds": (2.0, 1.0)}, {"bounds": ()}])
def test_a_scale_that_contradicts_itself_is_refused(bad):
    with pytest.raises(ValueError, match="colour"):
        ColourScale(label="x", colours=("#000000", "#ffffff"), **bad)


def test_a_value_at_a_bound_belongs_to_the_step_above():
    scale = colour_scale(UNITS["rain_rate"])
    values = np.array([[0.0, 0.0999, 0.1, 0.1999, 0.2, 99.9, 100.0, 1e9, -5.0]], np.float32)
    painted = paint(values, scale)
    colours = scale.colours
    expected = [PAPER, PAPER, colours[0], colours[0], colours[1]]
    expected += [colours[-2], colours[-1], colours[-1], PAPER]
    assert [tuple(pixel) for pixel in painted[0]] == [rgb(text) for text in expected]
    assert painted.dtype == np.uint8 and painted.shape == (1, 9, 3)
    # Bounds and values agree in both precisions.
    assert np.array_equal(paint(values.astype(np.float64), scale), painted)


def test_missing_areas_are_hatched_and_nothing_else_is():
    scale = colour_scale(DBZ)
    values = np.full((48, 64), 33.0, np.float32)
    values[:24, :32] = np.nan
    painted = paint(values, scale)
    corner = {tuple(pixel) for pixel in painted[:24, :32].reshape(-1, 3)}
    assert corner == {rgb(MISSING), rgb(MISSING_LINE)}
    rest = np.concatenate([painted[24:].reshape(-1, 3), painted[:24, 32:].reshape(-1, 3)])
    assert {tuple(pixel) for pixel in rest} == {rgb(scale.colours[5])}
    steps = {rgb(text) for text in scale.colours}
    assert not steps & corner


@pytest.mark.parametrize("side", [16, 64, 256, 1200])
def test_hatching_survives_at_every_size(side):
    """Lines are seen in the field as it is, and when a large one is shown 64 pixels wide."""
    painted = paint(np.full((side, side), np.nan), colour_scale(DBZ))[..., 0].astype(float)
    step = max(1, side // 64)
    width = side // step
    shown = painted[: width * step, : width * step].reshape(width, step, width, step)
    along_row = shown.mean(axis=(1, 3))[width // 2]
    assert np.ptp(along_row) > 25
    lines = np.count_nonzero(np.diff(np.sign(along_row - along_row.mean())) > 0)
    assert lines >= 3


def test_lines_keep_the_distance_that_is_asked_for():
    row = paint(np.full((40, 40), np.nan), colour_scale(DBZ), hatch_px=8)[20, :, 0]
    lines = np.flatnonzero(row == rgb(MISSING_LINE)[0])
    starts = lines[np.diff(lines, prepend=-9) > 1]
    assert set(np.diff(starts)) == {8}


def test_grey_is_the_stored_number():
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    painted = paint(physical(codes, GREY), colour_scale(GREY))
    assert np.array_equal(painted, np.repeat(codes[..., None], 3, axis=2))
    assert colour_scale(GREY).label == "intensity"


def test_paint_refuses_more_than_a_field():
    with pytest.raises(ValueError, match=r"one field \[H, W\], got shape \(2, 4, 4\)"):
        paint(np.zeros((2, 4, 4)), colour_scale(DBZ))


def test_physical_values_of_codes():
    codes = np.array([0, 127, 254, 255], np.uint8)
    values = physical(codes, DBZ)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[:3], [0, 35, 70], rtol=1e-6)
    assert np.isnan(values[3])
    fine = dataclasses.replace(DBZ, scale=0.002, offset=-32.0, max_code=65_534, missing_code=65_535)
    values = physical(np.array([[1000, 65_535]], np.uint16), fine)
    assert values[0, 0] == pytest.approx(-30.0) and np.isnan(values[0, 1])
    assert not np.isnan(physical(np.array([255], np.uint8), GREY)).any()


@pytest.mark.parametrize("size", [(440, 50), (240, 48), (90, 320)])
@pytest.mark.parametrize("quantity", UNITS)
def test_a_colour_bar_shows_every_step_in_order(quantity, size):
    scale = colour_scale(UNITS[quantity])
    bar = np.asarray(draw_colour_bar(scale, *size))
    assert bar.shape == (size[1], size[0], 3)
    lying = size[0] > size[1]
    # The line through the middle of the bar's blocks.
    line = bar[size[1] // 2 - 2] if lying else bar[::-1, 7]
    found = list(dict.fromkeys(tuple(pixel) for pixel in line))
    steps = [rgb(text) for text in scale.colours]
    assert [colour for colour in found if colour in steps] == steps


def test_a_colour_bar_shows_missing_areas_only_where_asked():
    scale = colour_scale(DBZ)
    for size in ((300, 50), (90, 300)):
        with_swatch = np.asarray(draw_colour_bar(scale, *size)).reshape(-1, 3)
        without = np.asarray(draw_colour_bar(scale, *size, shows_missing=False)).reshape(-1, 3)
        assert (with_swatch == rgb(MISSING_LINE)).all(axis=1).sum() > 15
        assert not (without == rgb(MISSING)).all(axis=1).any()


def test_a_colour_bar_needs_room():
    with pytest.raises(ValueError, match="at least 40 x 40 pixels, got 300 x 20"):
        draw_colour_bar(colour_scale(DBZ), 300, 20)


def test_importing_the_module_is_cheap():
    code = (
        "import sys, tmu_dist.colours\n"
        "heavy = {'torch', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
