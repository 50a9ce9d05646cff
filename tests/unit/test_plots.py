"""Charts and pictures: files open, have the right size, and show what they must.

Shape letters: T time, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from tests.synthetic_radar import DBZ
from tmu_dist.colours import colour_scale, paint
from tmu_dist.evaluation.examples import Example
from tmu_dist.evaluation.looks import RADAR_ERROR_COLOURS
from tmu_dist.evaluation.pictures import ERROR_COLOURS, prediction_strip, write_gif
from tmu_dist.evaluation.plots import (
    DARK,
    LIGHT,
    Curve,
    Interval,
    Theme,
    interval_chart,
    lead_time_curves,
    learning_curves,
    scale_curves,
    spread_apart,
    svg_text,
    write_figure,
)

CURVES = [
    Curve(label="persistence", x=(0, 300), y=(180.0, 180.0)),
    Curve(label="scratch", x=(100, 200, 300), y=(300.0, 150.0, 100.0), series=0),
    Curve(label="TMU", x=(100, 200), y=(250.0, 99.0), series=1),
]


def frames(count: int, *, channels: int = 1, value: float = 0.5) -> NDArray[np.float64]:
    return np.full((count, channels, 8, 12), value)


def example(num_inputs: int = 2, num_truth: int = 3, channels: int = 1) -> Example:
    """Truth 0.5; "low" predicts 0 and "high" predicts 1 (and a value beyond, to be clipped)."""
    return Example(
        sample_id=4,
        inputs_TCHW=frames(num_inputs, channels=channels),
        truth_TCHW=frames(num_truth, channels=channels),
        forecasts_TCHW={
            "low": frames(3, channels=channels, value=0.0),
            "high": frames(3, channels=channels, value=7.0),
        },
    )


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def test_learning_curves_name_every_run_at_its_line() -> None:
    figure = learning_curves(CURVES)
    axes = figure.axes[0]
    lines = dict(zip(("persistence", "scratch", "TMU"), axes.lines, strict=True))
    assert {t.get_text(): t.get_color() for t in axes.texts} == {
        label: line.get_color() for label, line in lines.items()
    }
    assert axes.lines[0].get_linestyle() == "--"
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), CURVES[1].y)


def test_labels_stand_at_the_height_where_their_lines_end() -> None:
    figure = learning_curves([CURVES[0], CURVES[1]])
    figure.draw_without_rendering()
    labels = {text.get_text(): text for text in figure.axes[0].texts}
    for curve in CURVES[:2]:
        end = figure.axes[0].transData.transform((curve.x[-1], curve.y[-1]))
        box = Text.get_window_extent(labels[curve.label])
        assert (box.y0 + box.y1) / 2 == pytest.approx(end[1], abs=2)
        assert box.x0 > end[0]


@pytest.mark.parametrize("name", ["a rather long name", "an even longer name, of two lines"])
@pytest.mark.parametrize("end", [1.0, 9.0])
def test_labels_lie_apart_inside_the_figure(name: str, end: float) -> None:
    """Four runs that end at the same value, low or high, with long names."""
    curves = [
        Curve(label=f"{name} {i}", x=(1, 2), y=(5.0, end + i / 1e3), series=i) for i in range(4)
    ]
    figure = lead_time_curves(curves, metric_label="MSE", higher_is_better=False)
    figure.draw_without_rendering()
    # Of the text alone; an annotation's own extent includes the line that leads to it.
    extents = [Text.get_window_extent(label) for label in figure.axes[0].texts]
    boxes = sorted(extents, key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    assert boxes[0].y0 >= -1 and boxes[-1].y1 <= figure.texts[0].get_window_extent().y0


def test_a_wide_range_is_logarithmic_and_says_so() -> None:
    wide = [Curve(label="a", x=(1, 2), y=(1000.0, 100.0), series=0)]
    figure = learning_curves(wide)
    assert figure.axes[0].get_yscale() == "log"
    assert any("log scale" in text for text in texts(figure))
    assert learning_curves(CURVES).axes[0].get_yscale() == "linear"


def test_undefined_points_are_gaps_and_labels_stand_at_the_last_defined_one() -> None:
    nan = float("nan")
    broken = Curve(label="broken", x=(1, 2, 3, 4), y=(0.5, nan, 0.25, nan), series=0)
    never = Curve(label="never", x=(1, 2, 3, 4), y=(nan,) * 4, series=1)
    whole = Curve(label="whole", x=(1, 2, 3, 4), y=(1.0, 0.9, 0.8, 0.7))
    figure = lead_time_curves([whole, broken], metric_label="CSI", higher_is_better=True)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = {text.get_text(): text for text in axes.texts}
    box = Text.get_window_extent(labels["broken"])
    assert (box.y0 + box.y1) / 2 == pytest.approx(axes.transData.transform((3, 0.25))[1], abs=2)
    assert axes.lines[1].get_marker() == "o"  # a point between gaps has no line
    figure = lead_time_curves([whole, never], metric_label="CSI", higher_is_better=True)
    assert "never (undefined)" in texts(figure)


def test_a_second_reference_is_dotted() -> None:
    references = [Curve(label=name, x=(1, 2), y=(1.0, 2.0)) for name in "ab"]
    figure = lead_time_curves(references, metric_label="MSE", higher_is_better=False)
    first, second = figure.axes[0].lines
    assert first.get_linestyle() == "--" and second.get_linestyle() != first._dash_pattern
    assert first._dash_pattern != second._dash_pattern


def test_scales_double_from_tick_to_tick() -> None:
    curve = Curve(label="a", x=(1, 2, 4, 8, 16), y=(0.1, 0.2, 0.3, 0.4, 0.5), series=0)
    axes = scale_curves([curve], title="FSS", x_label="pixels").axes[0]
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "4", "8", "16"]


def test_a_single_point_is_visible() -> None:
    figure = learning_curves([Curve(label="a", x=(1,), y=(3.0,), series=0)])
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_empty_charts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one curve"):
        learning_curves([])
    with pytest.raises(ValueError, match="at least one point"):
        learning_curves([Curve(label="a", x=(), y=())])
    with pytest.raises(ValueError, match="at least one interval"):
        interval_chart([], title="x")


def test_interval_chart_draws_dot_and_range() -> None:
    rows = [
        Interval(label="b", mean=-2.0, low=-3.0, high=-1.0, series=1),
        Interval(label="c", mean=0.5, low=-1.0, high=2.0, series=2),
    ]
    axes = interval_chart(rows, title="difference").axes[0]
    _zero, range_b, dot_b, range_c, _dot_c = axes.lines
    np.testing.assert_array_equal(range_b.get_xdata(), (-3.0, -1.0))
    np.testing.assert_array_equal(dot_b.get_xdata(), [-2.0])
    assert range_c.get_color() == LIGHT.colour(2)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "c"]


def test_themes_change_only_colours() -> None:
    light, dark = svg_text(learning_curves(CURVES)), svg_text(learning_curves(CURVES, theme=DARK))
    assert LIGHT.background in light and DARK.background in dark
    assert light != dark


def test_svg_is_reproducible_and_needs_nothing_from_outside() -> None:
    first, second = svg_text(learning_curves(CURVES)), svg_text(learning_curves(CURVES))
    assert first == second
    assert "persistence</text>" in first
    assert 'xlink:href="http' not in first and "@import" not in first


XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
# Linear RGB as seen with full vision, protanopia, deuteranopia, tritanopia (Machado et al. 2009).
SEEN_BY = {
    "full": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def linear_rgb(colour: str) -> NDArray[np.float64]:
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    x, y, z = np.cbrt(XYZ @ linear.clip(1e-3, 1) / (0.9505, 1, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_are_readable_as_text(theme: Theme) -> None:
    """WCAG contrast of at least 4.5 with the background."""
    paper = XYZ[1] @ linear_rgb(theme.background)
    for colour in (*theme.series, theme.ink, theme.muted):
        low, high = sorted((XYZ[1] @ linear_rgb(colour), paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("vision", SEEN_BY)
def test_series_can_be_told_apart_by_every_eye(theme: Theme, vision: str) -> None:
    """At least 15 apart in CIELAB, where 2.3 is just noticeable."""
    seen = [lab(SEEN_BY[vision] @ linear_rgb(colour)) for colour in theme.series]
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(a - b) >= 15


@pytest.mark.parametrize(
    ("rising", "expected"),
    [
        ([0, 10, 20], [0, 10, 20]),
        ([5, 5], [4.5, 5.5]),
        ([0, 0, 0], [-1, 0, 1]),
        ([0, 5, 5.2, 9], [0, 4.6, 5.6, 9]),
    ],
)
def test_spread_apart_moves_as_little_as_possible(
    rising: list[float], expected: list[float]
) -> None:
    np.testing.assert_allclose(spread_apart(rising, 1.0), expected)


def test_write_figure_makes_a_png(tmp_path: Path) -> None:
    write_figure(learning_curves(CURVES), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > image.height > 300


def test_strip_labels_every_time_and_row() -> None:
    found = texts(prediction_strip(example()))
    for label in ("input", "truth", "low", "high", "t = 1", "2", "t = 3", "4", "5"):
        assert label in found
    assert found.count("error") == 3  # under each model, and at the scale


def test_strip_shows_the_pixels(tmp_path: Path) -> None:
    """2 inputs and 3 targets over 2 models: 2 + 3 + 2 * (3 + 3) frames, errors in error colours."""
    figure = prediction_strip(example())
    images = figure.axes[0].get_images()
    assert len(images) == 2 + 3 + 2 * (3 + 3)
    np.testing.assert_allclose(images[0].get_array(), 0.5)
    low_error, high_error = images[8].get_array(), images[14].get_array()
    np.testing.assert_allclose(low_error[0, 0], ERROR_COLOURS(0.25)[:3])  # -0.5 of -1..1
    np.testing.assert_allclose(high_error[0, 0], ERROR_COLOURS(0.75)[:3])  # 7 clipped to 1: +0.5


def test_a_long_strip_shows_evenly_spaced_times() -> None:
    long = Example(
        sample_id=0,
        inputs_TCHW=frames(2),
        truth_TCHW=frames(3),
        forecasts_TCHW={"model": frames(50)},
    )
    figure = prediction_strip(long, max_columns=8)
    found = texts(figure)
    assert "t = 3" in found and "52" in found
    # 2 inputs, 8 forecasts; of the times shown only the first lies within the truth.
    assert len(figure.axes[0].get_images()) == 2 + 1 + 8 + 1


def test_colour_frames_and_other_channel_counts() -> None:
    images = prediction_strip(example(channels=3)).axes[0].get_images()
    assert images[0].get_array().shape == (8, 12, 3)
    with pytest.raises(ValueError, match="not 2"):
        prediction_strip(example(channels=2))


def radar_example() -> Example:
    """Truth 35 dBZ with a missing corner; "model" forecasts 0, "optical flow" the truth."""
    truth = frames(3, value=0.5)
    truth[:, :, :2, :3] = np.nan
    return Example(
        sample_id=4,
        inputs_TCHW=truth[:2],
        truth_TCHW=truth,
        forecasts_TCHW={
            "model": frames(3, value=0.0),
            "optical flow": frames(3, value=0.5),
        },
        units=DBZ,
    )


def test_grey_fields_with_missing_pixels_are_hatched_too() -> None:
    units = replace(DBZ, quantity="intensity", unit="1", scale=1 / DBZ.max_code)
    figure = prediction_strip(replace(radar_example(), units=units))
    image, *_, error = (np.asarray(one.get_array()) for one in figure.axes[0].get_images())
    hatched = paint(np.full((8, 12), np.nan), colour_scale(units))
    np.testing.assert_array_equal(image[:2, :3], hatched[:2, :3])
    np.testing.assert_allclose(error[:2, :3], hatched[:2, :3] / 255)
    assert {"value", "not observed"} <= set(texts(figure))


def test_radar_has_the_colours_of_its_quantity() -> None:
    figure = prediction_strip(radar_example())
    images = [np.asarray(image.get_array()) for image in figure.axes[0].get_images()]
    expected = paint(np.array([[35.0]]), colour_scale(DBZ))[0, 0]
    np.testing.assert_array_equal(images[0][5, 5], expected)
    hatched = paint(np.full((8, 12), np.nan), colour_scale(DBZ))
    np.testing.assert_array_equal(images[0][:2, :3], hatched[:2, :3])
    np.testing.assert_array_equal(images[5][0, 0], (255, 255, 255))  # a forecast knows no gap
    found = texts(figure)
    for label in ("dBZ", "10", "60", "not observed", "−35 too weak", "too strong +35"):
        assert label in found


def test_radar_errors_are_on_half_the_range_and_empty_where_nothing_is_known() -> None:
    images = prediction_strip(radar_example()).axes[0].get_images()
    model_error, flow_error = (np.asarray(images[i].get_array()) for i in (8, 14))
    np.testing.assert_allclose(model_error[5, 5], RADAR_ERROR_COLOURS(0.0)[:3])  # 35 dBZ too weak
    np.testing.assert_allclose(flow_error[5, 5], RADAR_ERROR_COLOURS(0.5)[:3])
    np.testing.assert_array_equal(model_error[:2, :3], flow_error[:2, :3])
    assert np.isfinite(model_error).all()


def test_radar_without_gaps_explains_none() -> None:
    whole = replace(radar_example(), inputs_TCHW=frames(2), truth_TCHW=frames(3))
    assert "not observed" not in texts(prediction_strip(whole))


def test_radar_gif_shows_the_scale(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", radar_example(), "model")
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 5
        animation.seek(3)
        page = np.asarray(animation.convert("RGB")).astype(int)
    height, width = page.shape[:2]
    expected = paint(np.array([[35.0]]), colour_scale(DBZ))[0, 0]
    np.testing.assert_allclose(page[height // 2, int(width * 0.2)], expected, atol=12)
    for colour in (*colour_scale(DBZ).colours, RADAR_ERROR_COLOURS(0.0), RADAR_ERROR_COLOURS(1.0)):
        wanted = np.array(to_rgb(colour)) * 255
        nearest = np.abs(page - wanted).max(axis=-1).min()
        assert nearest <= 16, f"{colour} got lost in the palette"


def test_examples_need_forecasts_of_one_length() -> None:
    for forecasts in ({}, {"a": frames(2), "b": frames(3)}):
        with pytest.raises(ValueError, match="one length"):
            Example(
                sample_id=0,
                inputs_TCHW=frames(1),
                truth_TCHW=frames(1),
                forecasts_TCHW=forecasts,
            )


def test_gif_plays_inputs_then_forecast(tmp_path: Path) -> None:
    """Truth ends before the forecast does; only then is the prediction's panel alone."""
    path = tmp_path / "a.gif"
    write_gif(path, example(num_inputs=2, num_truth=2), "high", ms_per_frame=100)
    with Image.open(path) as animation:
        assert animation.n_frames == 5
        pages, durations = [], []
        for t in range(5):
            animation.seek(t)
            pages.append(np.asarray(animation.convert("RGB")).astype(int))
            durations.append(animation.info["duration"])
    assert durations == [100] * 4 + [1000]
    height, width = pages[0].shape[:2]
    middle = height // 2
    truth, prediction, error = (pages[3][middle, int(width * x)] for x in (0.2, 0.5, 0.8))
    np.testing.assert_allclose(truth, 127, atol=6)
    np.testing.assert_allclose(prediction, 255, atol=6)
    expected = np.array(ERROR_COLOURS(0.75)[:3]) * 255
    np.testing.assert_allclose(error, expected, atol=12)
    watching, beyond = pages[0], pages[4]
    empty = watching[middle, int(width * 0.5)]
    np.testing.assert_array_equal(watching[middle, int(width * 0.8)], empty)
    np.testing.assert_array_equal(beyond[middle, int(width * 0.2)], empty)
