"""Extrapolation along the optical flow: moves rain, needs no luck with missing pixels, is quiet.

Shape letters: B batch, T time, C channels, H height, W width.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.synthetic_radar import DBZ, moving_rain
from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import to_physical, to_unit_interval
from tmu_dist.evaluation.baselines import FlowUnavailableError, OpticalFlow, persistence

RAIN = Units(
    quantity="rain_rate", unit="mm/h", scale=0.5, offset=0.0, max_code=254, missing_code=255
)


@pytest.fixture(scope="module")
def flow() -> OpticalFlow:
    pytest.importorskip("cv2")
    pytest.importorskip("pysteps")
    return OpticalFlow(DBZ)


def cell(dy: float, dx: float, *, num_frames: int = 5, size: int = 64) -> Tensor:
    """One cell that moves by (dy, dx) pixels per frame, [1, T, 1, H, W] in [0, 1]."""
    rows, columns = np.mgrid[:size, :size]
    frames = [
        np.exp(-((rows - 28 - dy * t) ** 2 + (columns - 26 - dx * t) ** 2) / 60)
        for t in range(num_frames)
    ]
    return torch.tensor(0.7 * np.array(frames), dtype=torch.float32)[None, :, None]


def peak(frame_HW: Tensor) -> tuple[int, int]:
    row, column = np.unravel_index(int(frame_HW.argmax()), frame_HW.shape)
    return int(row), int(column)


@pytest.mark.parametrize(("dy", "dx"), [(0, 3), (2, -2), (0, 0)])
def test_rain_goes_on_as_it_went(flow: OpticalFlow, dy: float, dx: float) -> None:
    inputs, future = cell(dy, dx), cell(dy, dx, num_frames=9)[:, 5:]
    forecast = flow.forecast(inputs, None, 4)
    assert forecast.dtype == torch.float32 and forecast.shape == future.shape
    for t in range(4):
        assert peak(forecast[0, t, 0]) == pytest.approx(peak(future[0, t, 0]), abs=1)
    if dy or dx:
        still = (persistence(inputs, 4) - future).abs().mean()
        assert (forecast - future).abs().mean() < 0.25 * still


def test_rain_rate_moves_too(flow: OpticalFlow) -> None:
    """Motion is found in the logarithm, but what moves is the rain rate itself."""
    forecast = OpticalFlow(RAIN).forecast(cell(0, 3), None, 3)
    assert peak(forecast[0, 2, 0]) == pytest.approx((28, 26 + 3 * 7), abs=1)
    assert float(forecast.max()) == pytest.approx(0.7, abs=0.02)


def test_missing_pixels_are_no_rain_edges(flow: OpticalFlow) -> None:
    """A border that is not observed in any frame neither moves nor leaves holes."""
    inputs = cell(0, 3)
    observed = torch.ones_like(inputs, dtype=torch.bool)
    observed[..., 50:] = False
    inputs = inputs.masked_fill(~observed, 0)
    forecast = flow.forecast(inputs, observed, 2)
    assert forecast.isfinite().all()
    assert peak(forecast[0, 1, 0]) == pytest.approx((28, 26 + 3 * 6), abs=1)
    wild = inputs.masked_fill(~observed, 0.9)  # what lies under the mask does not matter
    assert torch.equal(flow.forecast(wild, observed, 2), forecast)


def test_inflow_takes_the_nearest_observed_value(flow: OpticalFlow) -> None:
    columns = torch.linspace(0.8, 0.0, 64).repeat(64, 1)  # strongest at the edge it comes from
    inputs = cell(0, 3) * 0.2 + columns
    forecast = flow.forecast(inputs.clamp(0, 1), None, 3)
    np.testing.assert_allclose(forecast[0, 2, 0, 5:60, 0], inputs[0, -1, 0, 5:60, 0], atol=0.05)


def test_holes_in_the_last_frame_take_the_nearest_observed_value(flow: OpticalFlow) -> None:
    inputs = torch.full((1, 3, 1, 32, 32), 0.5)
    observed = torch.ones_like(inputs, dtype=torch.bool)
    observed[:, :, :, 10:20, 5:9] = False
    forecast = flow.forecast(inputs.masked_fill(~observed, 0), observed, 2)
    torch.testing.assert_close(forecast, torch.full_like(forecast, 0.5))


@pytest.mark.parametrize("what", ["no rain", "rain everywhere", "nothing observed", "one pixel"])
def test_where_no_motion_is_seen_the_last_frame_stays(flow: OpticalFlow, what: str) -> None:
    inputs = torch.zeros(1, 4, 1, 16, 16)
    observed = None
    if what == "rain everywhere":
        inputs += 0.5
    elif what == "one pixel":
        inputs[..., 3, 4] = 0.5
    elif what == "nothing observed":
        observed = torch.zeros_like(inputs, dtype=torch.bool)
    forecast = flow.forecast(inputs, observed, 2)
    torch.testing.assert_close(forecast, persistence(inputs, 2), atol=1e-6, rtol=0)


def test_motion_is_not_followed_through_a_lost_frame(flow: OpticalFlow) -> None:
    inputs = cell(0, 3)
    observed = torch.ones_like(inputs, dtype=torch.bool)
    observed[:, 2] = False
    recent = flow.forecast(inputs[:, 3:], observed[:, 3:], 2)
    assert torch.equal(flow.forecast(inputs.masked_fill(~observed, 0), observed, 2), recent)
    observed[:, 3] = False  # one frame is left: no motion, no failure
    forecast = flow.forecast(inputs.masked_fill(~observed, 0), observed, 2)
    torch.testing.assert_close(forecast, persistence(inputs, 2), atol=1e-6, rtol=0)


def test_sequences_of_a_batch_do_not_influence_each_other(flow: OpticalFlow) -> None:
    codes = torch.from_numpy(np.stack([moving_rain(seed) for seed in range(3)]))
    frames, observed = to_unit_interval(codes, DBZ)
    assert observed is not None
    together = flow.forecast(frames, observed, 3)
    for b in range(3):
        alone = flow.forecast(frames[[b]], observed[[b]], 3)
        assert torch.equal(alone[0], together[b])


def test_it_is_pysteps_inside_the_frame(flow: OpticalFlow) -> None:
    """The same as calling pysteps by hand, wherever that gives a number."""
    from pysteps import extrapolation, motion

    inputs = cell(1, 2, num_frames=4)
    dbz = to_physical(inputs.double(), DBZ)[0, :, 0].numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one cell has few vectors
        velocity = motion.get_method("LK")(dbz)
    theirs = extrapolation.get_method("semilagrangian")(dbz[-1], velocity, 3)
    ours = to_physical(flow.forecast(inputs, None, 3).double(), DBZ)[0, :, 0].numpy()
    known = np.isfinite(theirs)
    assert known.mean() > 0.8
    np.testing.assert_allclose(ours[known], theirs[known], atol=1e-4)


def test_one_frame_shows_no_motion(flow: OpticalFlow) -> None:
    with pytest.raises(ValueError, match="two frames at least"):
        flow.forecast(cell(0, 1)[:, :1], None, 2)


@pytest.mark.parametrize("library", ["cv2", "pysteps"])
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(FlowUnavailableError, match=r"pip install 'tmu-dist\[flow\]'") as raised:
        OpticalFlow(replace(DBZ))
    assert library in str(raised.value)


def test_pysteps_is_imported_in_silence_and_only_when_needed() -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("pysteps")
    code = (
        "import sys; from tmu_dist.evaluation import baselines;"
        "assert 'pysteps' not in sys.modules; baselines._load_pysteps()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
