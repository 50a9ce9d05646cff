"""What is measured: single scores, plain and now, and whole evaluations beside the forecast.

Shape letters: B batch, D draws, T lead time, C channels, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks.evaluation_speed import plain
from benchmarks.evaluation_speed.plain import Sequences
from benchmarks.provenance import say
from tmu_dist.config import ModelConfig, TMUConfig
from tmu_dist.data.transforms import Window
from tmu_dist.evaluation.categorical import contingency
from tmu_dist.evaluation.ensemble import ensemble_scores
from tmu_dist.evaluation.metrics import METRIC_NAMES, FramePair, select_metrics
from tmu_dist.evaluation.neighbourhood import fraction_sums
from tmu_dist.evaluation.pass_tables import ForecastTable, PassTables
from tmu_dist.evaluation.rain import RadarSettings, RadarTable
from tmu_dist.evaluation.score_table import ScoreTable
from tmu_dist.models.build import build_predictor
from tmu_dist.models.shapes import FrameShape

LEAD_TIMES = INPUTS = 10
DRAWS = 10
NUM_TEACHERS = 2
RADAR = RadarSettings(
    unit="dBZ",
    thresholds=(20.0, 30.0, 40.0),
    scales=(1, 2, 4, 8, 16),
    numbers=(20 / 70, 30 / 70, 40 / 70),
    pixel_km=1.0,
)
FORECASTS = ("model", "persistence")


class Case(NamedTuple):
    """Sequences like those of a kind of archive."""

    size: int
    """Height and width in pixels."""
    is_radar: bool
    """Scored at thresholds, too, and a quarter of the pixels is not observed."""
    batch_size: int
    """Sequences of the evaluation."""
    network: Mapping[str, Any]
    """Settings of the student that forecasts them."""


_PAPER: dict[str, Any] = {"num_layers": 4, "hidden_channels": 64, "patch_size": 4}
CASES = {
    "digits": Case(64, is_radar=False, batch_size=8, network=_PAPER),
    "clips": Case(128, is_radar=False, batch_size=4, network=_PAPER),
    "radar": Case(256, is_radar=True, batch_size=2, network=_PAPER),
}
QUICK_CASES = {
    "digits": Case(32, False, 2, {"num_layers": 1, "hidden_channels": 8}),
    "radar": Case(48, True, 2, {"num_layers": 1, "hidden_channels": 8}),
}


class Score(NamedTuple):
    """The same numbers of one sequence, in two ways."""

    plain: Callable[[], NDArray[Any]]
    now: Callable[[], NDArray[Any]]


def fields(seed: int, count: int, size: int) -> NDArray[np.float32]:
    """Smooth random frames [T, 1, H, W] in [0, 1]; as dBZ from 0 to 70: 30, 9 and 2 % at least
    20, 30 and 40."""
    noise = np.random.default_rng(seed).normal(size=(count, 1, size, size))
    smooth = gaussian_filter(noise, (0, 0, 3, 3))
    codes = np.clip(254 * (0.2 + 0.17 * smooth / smooth.std()), 0, 254)
    return (codes.round() / 254).astype(np.float32)


def observed_disc(count: int, size: int) -> NDArray[np.bool_]:
    """What a radar sees from the middle of the frame: about three quarters of it."""
    y, x = np.mgrid[:size, :size] - size / 2
    return np.broadcast_to(np.hypot(y, x) < 0.49 * size, (count, 1, size, size)).copy()


def scores(case: Case) -> dict[str, Score]:
    """What is compared of one sequence."""
    true_TCHW = fields(1, LEAD_TIMES, case.size)
    noise_TCHW = 0.4 * (fields(2, LEAD_TIMES, case.size) - 0.2)
    mask_TCHW = observed_disc(LEAD_TIMES, case.size) if case.is_radar else None
    given = Sequences(true_TCHW + noise_TCHW, true_TCHW, mask_TCHW)

    def pair() -> FramePair:
        return FramePair(*given)

    def errors() -> NDArray[Any]:
        fresh, metrics = pair(), select_metrics([n for n in METRIC_NAMES if n != "ssim"])
        return np.stack([metric.score(fresh) for metric in metrics.values()])

    def ssim(mode: Any) -> NDArray[Any]:
        return select_metrics(["ssim"], ssim_mode=mode)["ssim"].score(pair())

    found = {"MSE, MAE, PSNR": Score(partial(plain.errors, given), errors)}
    for mode, eight_bit, gaussian in (
        ("uint8_7x7", True, False),
        ("float_7x7_range1", False, False),
        ("gauss_11", False, True),
    ):
        plainly = partial(plain.ssim, given, eight_bit=eight_bit, gaussian=gaussian)
        found[f"SSIM {mode}"] = Score(plainly, partial(ssim, mode))
    if case.is_radar:
        found |= _at_thresholds(given, pair)
    else:
        found[f"CRPS, diversity of {DRAWS}"] = _of_draws(given, case.size)
    return found


def _at_thresholds(given: Sequences, pair: Callable[[], FramePair]) -> dict[str, Score]:
    numbers, scales = RADAR.numbers, RADAR.scales
    least_K1111 = np.array(numbers).reshape(-1, 1, 1, 1, 1) - 2.0**-23

    def events() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        fresh = pair()
        both = (fresh.predicted_TCHW >= least_K1111, fresh.true_TCHW >= least_K1111)
        return *both, fresh.observed_TCHW

    return {
        f"counts at {len(numbers)} thresholds": Score(
            partial(plain.counts, given, numbers),
            lambda: contingency(*events()).swapaxes(0, 1),
        ),
        f"FSS at {len(numbers)} thresholds, {len(scales)} scales": Score(
            partial(plain.fss, given, numbers, scales),
            lambda: fraction_sums(*events(), scales),
        ),
    }


def _of_draws(given: Sequences, size: int) -> Score:
    draws_DTCHW = given.true_TCHW + np.stack(
        [0.4 * (fields(10 + d, LEAD_TIMES, size) - 0.2) for d in range(DRAWS)]
    )
    draws = torch.from_numpy(draws_DTCHW)
    return Score(
        partial(plain.crps, given, draws_DTCHW),
        lambda: ensemble_scores(draws, FramePair(given.true_TCHW, given.true_TCHW)),
    )


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of every score by round, plain and now; and their difference."""
    ways = scores(case)
    found: dict[str, Any] = {}
    for name, score in ways.items():
        expected, value = score.plain(), score.now()
        scale = np.maximum(np.abs(expected), 1e-300)
        difference = float((np.abs(value - expected) / np.maximum(scale, 1.0)).max())
        found[name] = {"frames": LEAD_TIMES, "difference": difference, "plain": [], "now": []}
    for _ in range(rounds):
        for name, score in ways.items():
            found[name]["plain"].append(seconds_of(score.plain))
            found[name]["now"].append(seconds_of(score.now))
    return found


def seconds_of(run: Callable[[], object], least: float = 0.05) -> float:
    """Of one call; calls are repeated until they took `least` seconds together."""
    count, started = 0, time.perf_counter()
    while True:
        run()
        count += 1
        elapsed = time.perf_counter() - started
        if elapsed >= least:
            return elapsed / count


class Evaluation:
    """A batch that is forecast and scored.

    Args:
        case: of the sequences.
        device: of the network, "cpu" or "cuda"; scores are always computed on the CPU.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        count = case.batch_size
        whole_BTCHW = torch.stack(
            [torch.from_numpy(fields(n, INPUTS + LEAD_TIMES, case.size)) for n in range(count)]
        )
        self.inputs_BTCHW = whole_BTCHW[:, :INPUTS].to(device)
        observed_BTCHW = None
        if case.is_radar:
            disc_TCHW = torch.from_numpy(observed_disc(LEAD_TIMES, case.size))
            observed_BTCHW = disc_TCHW.expand(count, -1, -1, -1, -1)
        self.truth = Window(whole_BTCHW[:, INPUTS:], observed_BTCHW)
        torch.manual_seed(0)
        frame = FrameShape(channels=1, height=case.size, width=case.size)
        model = ModelConfig(**case.network)
        network = build_predictor(frame, model, tmu=TMUConfig(), num_slots=NUM_TEACHERS)
        self.network = network.to(device).eval()
        still_BTCHW = whole_BTCHW[:, INPUTS - 1 : INPUTS].expand_as(self.truth.frames_BTCHW)
        self.forecasts = dict(zip(FORECASTS, (self.forecast(), still_BTCHW), strict=True))

    def forecast(self) -> Tensor:
        """What the network says, on the CPU."""
        with torch.inference_mode():
            return self.network.predict(self.inputs_BTCHW, LEAD_TIMES).cpu()

    def score(self) -> None:
        """As an evaluation does."""
        radar = RADAR if self.case.is_radar else None
        tables = PassTables(
            {
                name: ForecastTable(ScoreTable(), None if radar is None else RadarTable(radar))
                for name in FORECASTS
            }
        )
        ids_B = torch.arange(self.case.batch_size)
        tables.update(self.forecasts, self.truth, ids_B, torch.ones(len(ids_B)))

    def score_plainly(self) -> None:
        """The same scores, one sequence after the other."""
        truth = self.truth
        for forecast_BTCHW in self.forecasts.values():
            for b in range(self.case.batch_size):
                observed = None if truth.observed_BTCHW is None else truth.observed_BTCHW[b].numpy()
                pair = Sequences(forecast_BTCHW[b].numpy(), truth.frames_BTCHW[b].numpy(), observed)
                plain.errors(pair)
                plain.ssim(pair, eight_bit=True, gaussian=False)
                if self.case.is_radar:
                    plain.counts(pair, RADAR.numbers)
                    plain.fss(pair, RADAR.numbers, RADAR.scales)


def evaluate(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of a batch by round: its forecast, and its scores, plain and now."""
    evaluation = Evaluation(case, device)
    found: dict[str, Any] = {
        "sequences": case.batch_size,
        "frames": len(FORECASTS) * case.batch_size * LEAD_TIMES,
    }
    ways = {
        "forecast": evaluation.forecast,
        "plain": evaluation.score_plainly,
        "now": evaluation.score,
    }
    for name, run in ways.items():
        if name != "forecast":  # which was made before
            run()
        found[name] = []
    for _ in range(rounds):
        for name, run in ways.items():
            found[name].append(seconds_of(run, least=0.2))
    return found


def measure(cases: Mapping[str, Case], device: str, rounds: int) -> dict[str, Any]:
    """All that the record says of each case."""
    found = {}
    for name, case in cases.items():
        say(f"{name}: evaluation of {case.batch_size} sequences of {case.size}x{case.size}")
        evaluation = evaluate(case, device, rounds)
        say(f"{name}: single scores")
        found[name] = {
            "size": case.size,
            "missing": case.is_radar,
            "scores": compare(case, rounds),
            "evaluation": evaluation,
        }
    return found
