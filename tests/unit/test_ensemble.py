"""Stochastic networks: whose noise, which sample is scored, and what all samples are worth.

Shape letters: N sequences, B batch, D draws of one sequence, T time, Z noise, C channels, H height,
W width, X = C*H*W.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from tests.evaluated_runs import SETTINGS, PageText, result
from tests.synthetic_radar import DBZ, write_radar_archive
from tests.unit.test_runner import (
    CPU,
    GREY,
    RADAR,
    SMALL,
    WINDOW,
    assert_bit_equal,
    moving_frames,
    one_pass,
    radar_frames,
    score_on_ranks,
)
from tmu_dist import evaluate, predict
from tmu_dist.config import TMUConfig, WindowConfig
from tmu_dist.data.loader import open_archive
from tmu_dist.data.manifest import Units
from tmu_dist.data.transforms import window_frames
from tmu_dist.evaluation.comparison import RunEntry
from tmu_dist.evaluation.ensemble import (
    Ensemble,
    _sorted_draws,
    best_by_ssim,
    choose_ensemble,
    ensemble_scores,
    mean_forecast,
)
from tmu_dist.evaluation.metrics import METRIC_NAMES, FramePair
from tmu_dist.evaluation.report import write_comparison_page
from tmu_dist.evaluation.result import EvaluatedData, EvaluationResult
from tmu_dist.evaluation.runner import PassScores, score_predictor
from tmu_dist.evaluation.runner import evaluate as evaluate_loaded
from tmu_dist.evaluation.score_table import ScoreTable
from tmu_dist.evaluation.terminal import comparison_table, terminal_summary
from tmu_dist.models.build import build_predictor
from tmu_dist.models.cells.base import Carry, CellState
from tmu_dist.models.layer import Guide, LayerStep
from tmu_dist.models.rollout import Predictor, Step
from tmu_dist.models.shapes import FrameShape, MemoryShape
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import LoadedModel

FIVE = Ensemble(num_samples=5, seed=3)


class Guess(Predictor):
    """The frame before, changed by the noise of its four quarters: the same bits in any batch."""

    noise_size = 4

    def __init__(self) -> None:
        super().__init__(image_channels=1, memory_shapes=(MemoryShape(1, 1, 1),))

    def initial_state(self, frame_BCHW: Tensor, *, num_input_frames: int) -> None:
        return None

    def step(
        self,
        frame_BCHW: Tensor,
        state: None,
        *,
        target_BCHW: Tensor | None,
        noise_BZ: Tensor | None,
        guide: Guide | None = None,
    ) -> Step:
        if noise_BZ is None:
            noise_BZ = frame_BCHW.new_zeros(len(frame_BCHW), self.noise_size)
        noise_BCHW = noise_BZ.reshape(-1, 1, 2, 2)
        height, width = frame_BCHW.shape[-2:]
        change = noise_BCHW.repeat_interleave(height // 2, -2).repeat_interleave(width // 2, -1)
        memory = noise_BCHW[..., :1, :1]
        layer = LayerStep(
            memory,
            CellState(memory, memory),
            Carry(),
            forget_BPHW=None,
            imitations_BMPHW=memory[:, None],
            gates_BMPHW=memory[:, None],
        )
        return Step(frame_BCHW + 0.1 * change, None, [layer])


def scored(frames: Tensor, ensemble: Ensemble | None, *, batch_size: int = 4) -> PassScores:
    batches = one_pass(frames, batch_size=batch_size)
    return score_predictor(
        Guess(), batches, window=WINDOW, units=GREY, device=CPU, ensemble=ensemble
    )


def draws_of(inputs_TCHW: Tensor, sample_id: int, ensemble: Ensemble) -> Tensor:
    """All draws of one sequence, one by one."""
    draws = []
    for draw in range(ensemble.num_samples):
        one = torch.tensor([sample_id]), torch.tensor([draw])
        noise_BTZ = ensemble.noise(*one, num_steps=4, noise_size=4)
        draws.append(Guess().predict(inputs_TCHW[None], 2, noise_BTZ=noise_BTZ)[0])
    return torch.stack(draws)


def pair_of(
    predicted_TCHW: Tensor, true_TCHW: Tensor, observed_TCHW: Tensor | None = None
) -> FramePair:
    mask = None if observed_TCHW is None else observed_TCHW.numpy()
    return FramePair(predicted_TCHW.numpy(), true_TCHW.numpy(), mask)


def brute_force(
    draws_DTCHW: Tensor, true_TCHW: Tensor, t: int, seen_X: NDArray[np.bool_]
) -> tuple[float, float]:
    """CRPS and diversity of one frame from their definitions, per pixel and per pair."""
    draws_DX = draws_DTCHW[:, t].flatten(1).clamp(0, 1).double().numpy()
    truth_X = true_TCHW[t].flatten().double().numpy()
    pairs = list(itertools.permutations(draws_DX, 2))
    error_X = np.mean([np.abs(x - truth_X) for x in draws_DX], axis=0)
    crps_X = error_X - 0.5 * np.mean([np.abs(x - y) for x, y in pairs], axis=0)
    square_X = np.mean([(x - y) ** 2 for x, y in pairs], axis=0)
    factor = len(truth_X) / seen_X.sum()
    return crps_X[seen_X].sum() * factor, square_X[seen_X].sum() * factor


def test_noise_is_a_function_of_seed_sequence_and_draw() -> None:
    def noise(ids: list[int], draws: list[int], *, seed: int = 3, num_steps: int = 6) -> Tensor:
        numbers = torch.tensor(ids), torch.tensor(draws)
        ensemble = Ensemble(num_samples=1, seed=seed)
        return ensemble.noise(*numbers, num_steps=num_steps, noise_size=500)

    both = noise([7, 9], [1, 1])
    assert both.shape == (2, 6, 500) and both.dtype == torch.float32
    assert torch.equal(both[1:], noise([9], [1]))
    assert torch.equal(both[:, :2], noise([7, 9], [1, 1], num_steps=2)), "longer ones begin alike"
    others = (both[0], both[1], noise([7], [2])[0], noise([7], [1], seed=4)[0])
    for one, other in itertools.combinations(others, 2):
        correlation = float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 0.08
    assert float(both.mean()) == pytest.approx(0, abs=0.05)
    assert float(both.std()) == pytest.approx(1, abs=0.05)


def test_the_best_sample_by_ssim_is_the_one_found_by_trying_all() -> None:
    frames = moving_frames(3)
    found = scored(frames, FIVE)
    unit = window_frames(frames, WINDOW, GREY).frames_BTCHW
    chosen = set()
    for n, sequence_TCHW in enumerate(unit):
        tables = []
        for draw_TCHW in draws_of(sequence_TCHW[:3], n, FIVE):
            table = ScoreTable(units=GREY)
            one = torch.tensor([n]), torch.ones(1)
            table.update(draw_TCHW[None], sequence_TCHW[None, 3:], *one)
            tables.append(table.compute())
        best = int(np.argmax([table.values_NT["ssim"].mean() for table in tables]))
        chosen.add(best)
        for name in METRIC_NAMES:
            np.testing.assert_array_equal(
                found.model.values_NT[name][n], tables[best].values_NT[name][0]
            )
            expected_T = np.mean([table.values_NT[name][0] for table in tables], axis=0)
            mean_T = found.forecasts["mean_over_samples"].scores.values_NT[name][n]
            np.testing.assert_allclose(mean_T, expected_T, rtol=1e-12)
    assert chosen != {0}, "the test should not be won by chance"


def test_a_sequence_without_ssim_keeps_its_first_sample() -> None:
    nothing = np.full((3, 2), np.nan)
    assert best_by_ssim(nothing) == 0
    nothing[1, 0], nothing[2, 1] = 0.2, 0.3
    assert best_by_ssim(nothing) == 2


def test_more_samples_never_worsen_the_best_ssim() -> None:
    frames = moving_frames(4)
    best = [
        scored(frames, Ensemble(num_samples=count, seed=3)).model.per_sequence("ssim")
        for count in (1, 2, 4, 7)
    ]
    for few_N, more_N in itertools.pairwise(best):
        assert (more_N >= few_N).all()
    assert (best[-1] > best[0]).any()


def test_one_sample_has_the_score_of_a_plain_forecast(tmp_path: Path) -> None:
    frames, one = moving_frames(3), Ensemble(num_samples=1, seed=3)
    found = scored(frames, one)
    unit = window_frames(frames, WINDOW, GREY).frames_BTCHW
    table = ScoreTable(units=GREY)
    drawn = torch.cat([draws_of(s[:3], n, one) for n, s in enumerate(unit)])
    table.update(drawn, unit[:, 3:], torch.arange(3), torch.ones(3))
    plain = table.compute()
    for name in METRIC_NAMES:
        for forecast in ("model", "mean_over_samples"):
            values_NT = found.forecasts[forecast].scores.values_NT[name]
            np.testing.assert_array_equal(values_NT, plain.values_NT[name])
        mean_NT = found.forecasts["ensemble_mean"].scores.values_NT[name]
        np.testing.assert_allclose(mean_NT, plain.values_NT[name], rtol=1e-12)
    written = evaluated(frames, one)
    written.save(tmp_path)
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(tree["overall"]["ensemble"].values()) == {"undefined"}  # both need two samples


@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_and_ranks_do_not_matter(world_size: int) -> None:
    frames = moving_frames(7)
    alone = scored(frames, FIVE)
    others = [scored(frames, FIVE, batch_size=size) for size in (1, 3, 16)]
    others += score_on_ranks(
        frames, batch_size=6, world_size=world_size, model=Guess(), ensemble=FIVE
    )
    for other in others:
        assert_bit_equal(alone, other)
        for name, forecast in alone.forecasts.items():
            assert other.forecasts[name].scores.overall() == forecast.scores.overall()
        assert alone.ensemble is not None and other.ensemble is not None
        for name, values_NT in alone.ensemble.values_NT.items():
            np.testing.assert_array_equal(other.ensemble.values_NT[name], values_NT)
        assert other.gates == alone.gates


def test_a_rank_whose_whole_share_is_padding_still_takes_part() -> None:
    first, second = score_on_ranks(
        moving_frames(1), batch_size=2, world_size=2, model=Guess(), ensemble=FIVE
    )
    assert_bit_equal(first, second)
    assert first.gates is not None and first.gates == second.gates


def test_gates_are_averaged_over_draws() -> None:
    gates = scored(moving_frames(2), FIVE).gates
    ids_B, draws_B = torch.tensor([0, 1]).repeat_interleave(5), torch.arange(5).repeat(2)
    noise_BTZ = FIVE.noise(ids_B, draws_B, num_steps=4, noise_size=4)
    assert gates is not None
    assert gates.means_LM[0][0] == pytest.approx(float(noise_BTZ[..., 0].double().mean()))


def test_validation_draws_nothing() -> None:
    """Without an ensemble, as the training loop asks: the mean of the latents, here persistence."""
    found = scored(moving_frames(3), None)
    assert found.model.overall() == found.persistence.overall()
    assert list(found.forecasts) == ["model", "persistence"] and found.ensemble is None


def test_crps_and_diversity_are_what_their_definitions_say() -> None:
    torch.manual_seed(0)
    draws_DTCHW = torch.rand(6, 2, 2, 8, 9) * 1.4 - 0.2  # some are clipped
    true_TCHW, observed_TCHW = torch.rand(2, 2, 8, 9), torch.rand(2, 2, 8, 9) > 0.3
    for mask in (None, observed_TCHW):
        found = ensemble_scores(draws_DTCHW, pair_of(true_TCHW, true_TCHW, mask))
        for t in range(2):
            seen_X = torch.ones(144, dtype=torch.bool) if mask is None else mask[t].flatten()
            expected = brute_force(draws_DTCHW, true_TCHW, t, seen_X.numpy())
            np.testing.assert_allclose(found[:, t], expected, rtol=1e-12)


def test_what_lies_under_missing_pixels_does_not_matter() -> None:
    draws_DTCHW, true_TCHW = torch.rand(4, 2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    observed_TCHW = torch.rand(2, 1, 8, 8) > 0.5
    observed_TCHW[1] = False
    before = ensemble_scores(draws_DTCHW, pair_of(true_TCHW, true_TCHW, observed_TCHW))
    changed = torch.where(observed_TCHW, draws_DTCHW, 1 - draws_DTCHW)
    after = ensemble_scores(changed, pair_of(true_TCHW, true_TCHW, observed_TCHW))
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(before[:, 0]).all() and np.isnan(before[:, 1]).all()


@pytest.mark.parametrize("count", range(2, 20))
def test_draws_are_sorted(count: int) -> None:
    """A network of comparisons sorts everything if it sorts all rows of 0 and 1 (Knuth)."""
    every = np.arange(2 ** min(count, 12))
    rows_DP = (every >> np.arange(count)[:, None] & 1).astype(float)
    for draws_DP in (rows_DP, np.random.default_rng(count).random((count, 300))):
        np.testing.assert_array_equal(_sorted_draws(draws_DP), np.sort(draws_DP, axis=0))


def test_the_crps_of_equal_forecasts_is_their_absolute_error() -> None:
    forecast_TCHW, true_TCHW = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    pair = pair_of(forecast_TCHW, true_TCHW)
    crps_T, diversity_T = ensemble_scores(forecast_TCHW.expand(4, -1, -1, -1, -1), pair)
    np.testing.assert_allclose(crps_T, pair.absolute_error_T, rtol=1e-12)
    np.testing.assert_allclose(diversity_T, 0, atol=1e-25)


def test_the_crps_does_not_depend_on_the_number_of_samples() -> None:
    """Over many pixels that all have the same distribution: 2 draws and 30 agree."""
    torch.manual_seed(0)
    draws_DTCHW, true_TCHW = torch.rand(30, 1, 1, 300, 300), torch.rand(1, 1, 300, 300)
    pair = pair_of(true_TCHW, true_TCHW)
    few, many = (ensemble_scores(draws_DTCHW[:count], pair)[:, 0] for count in (2, 30))
    np.testing.assert_allclose(few, many, rtol=0.01)
    # uniform: E|x - y| = 1/3, so CRPS = 1/3 - 1/6; E (x - y)^2 = 1/6
    np.testing.assert_allclose(many / 300**2, (1 / 6, 1 / 6), rtol=0.01)


def test_the_mean_forecast_takes_off_what_the_samples_differ_by() -> None:
    """E |x_i - y|^2 = |mean - y|^2 + (D - 1) / (2 D) diversity, for every frame."""
    found = scored(moving_frames(3), FIVE)
    assert found.ensemble is not None
    of_one_NT, of_mean_NT = (
        found.forecasts[name].scores.values_NT["mse_per_frame"]
        for name in ("mean_over_samples", "ensemble_mean")
    )
    apart_NT = found.ensemble.values_NT["diversity_per_frame"]
    assert (apart_NT > 1).all()
    np.testing.assert_allclose(of_one_NT, of_mean_NT + 0.4 * apart_NT, rtol=1e-9)
    assert mean_forecast(torch.tensor([2.0, 0.0])[:, None, None, None, None]).item() == 0.5


def test_missing_pixels_count_nowhere() -> None:
    """What a network makes of pixels that were not observed changes no score of its samples."""
    frames = radar_frames(3)
    options: dict[str, Any] = {"radar": RADAR, "ensemble": FIVE}
    (found,) = score_on_ranks(
        frames, batch_size=3, world_size=1, units=DBZ, model=Guess(), **options
    )
    assert found.ensemble is not None
    window = window_frames(frames, WINDOW, DBZ)
    assert window.observed_BTCHW is not None
    for n in range(3):
        true_TCHW, seen_TCHW = window.frames_BTCHW[n, 3:], window.observed_BTCHW[n, 3:]
        draws = draws_of(window.frames_BTCHW[n, :3], n, FIVE)
        for t in range(2):
            values = [found.ensemble.values_NT[name][n, t] for name in found.ensemble.values_NT]
            if not seen_TCHW[t].any():
                assert np.isnan(values).all()
                continue
            seen_X = seen_TCHW[t].flatten().numpy()
            np.testing.assert_allclose(values, brute_force(draws, true_TCHW, t, seen_X), rtol=1e-9)
    radar = {name: forecast.radar for name, forecast in found.forecasts.items()}
    assert radar["mean_over_samples"] is None
    totals = [radar[n].counts_TKX.sum() for n in ("model", "persistence", "ensemble_mean")]  # type: ignore[union-attr]
    assert len(set(totals)) == 1


def test_the_best_sample_needs_ssim() -> None:
    with pytest.raises(ValueError, match="add 'ssim'"):
        score_predictor(
            Guess(), [], window=WINDOW, units=GREY, device=CPU, metrics=["mse_mean"], ensemble=FIVE
        )


def test_how_many_samples_a_network_can_give() -> None:
    certain = build_predictor(FrameShape(channels=1, height=16, width=16), SMALL)
    assert choose_ensemble(certain, None, 0) is None
    assert choose_ensemble(certain, 1, 0) is None
    with pytest.raises(ValueError, match="--num-samples 2: this network is deterministic"):
        choose_ensemble(certain, 2, 0)
    assert choose_ensemble(Guess(), None, 4) == Ensemble(num_samples=10, seed=4)
    assert choose_ensemble(Guess(), None, 4, default=3) == Ensemble(num_samples=3, seed=4)
    assert choose_ensemble(Guess(), 100, 0) == Ensemble(num_samples=100, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        choose_ensemble(Guess(), 0, 0)


def card(facts: DataFacts, window: WindowConfig = WINDOW) -> TeacherCard:
    return TeacherCard(
        name="guess", method="scratch", step=7, seed=3, window=window, model=SMALL, data=facts,
        frame=FrameShape(channels=1, height=16, width=16), tmu=TMUConfig(), num_slots=0,
        teachers=(), teacher_parameters=(),
    )  # fmt: skip


def evaluated(frames: Tensor, ensemble: Ensemble | None, units: Units = GREY) -> EvaluationResult:
    facts = DataFacts(archive="x", manifest_hash="h", units=units, frame_interval_minutes=None)
    return evaluate_loaded(
        LoadedModel(Guess(), card(facts)),
        one_pass(frames, batch_size=4),
        EvaluatedData(url="u", split="test", manifest_hash="h", num_sequences=len(frames)),
        units=units,
        timing_frames_BTCHW=frames[:1],
        device=CPU,
        ensemble=ensemble,
    )


def test_an_evaluation_survives_the_disk(tmp_path: Path) -> None:
    found = evaluated(moving_frames(5), FIVE)
    found.save(tmp_path)
    again = EvaluationResult.load(tmp_path)
    assert again.to_dict() == found.to_dict() and again.ensemble == FIVE
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["ensemble"] == {"num_samples": 5, "seed": 3, "model": "best of 5 by SSIM"}
    assert set(tree["overall"]) == {
        "model", "persistence", "ensemble_mean", "mean_over_samples", "ensemble",
    }  # fmt: skip
    assert tree["definitions"]["model"].startswith("best of 5 by SSIM")
    for name in ("mean_over_samples", "ensemble_mean", "crps_per_frame", "diversity_per_frame"):
        assert name in tree["definitions"]
    assert len(tree["per_lead_time"]["ensemble"]["diversity_per_frame"]) == 2
    assert again.per_sequence is not None and found.per_sequence is not None
    for forecast, scores in found.per_sequence.items():
        assert again.per_sequence[forecast].overall() == scores.overall()
    assert "ensemble" not in evaluated(moving_frames(5), None).to_dict()


def test_terminal_says_which_sample_it_shows() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_summary(evaluated(moving_frames(2), FIVE)))
    words = " ".join(captured.get().split())
    for needed in ("best of 5", "by SSIM", "5 samples together (seed 3)", "crps_per_frame"):
        assert needed in words
    assert max(len(line) for line in captured.get().splitlines()) <= 80
    sampled = [RunEntry(label="SAVP", result=evaluated(moving_frames(2), FIVE))]
    with console.capture() as captured:
        console.print(comparison_table(sampled))
    assert "SAVP, best of 5 by SSIM" in captured.get()
    assert max(len(line) for line in captured.get().splitlines()) <= 80
    assert " model " not in words.split("By lead time")[0], "its scores need their own name"


def test_a_page_says_which_sample_it_shows(tmp_path: Path) -> None:
    sampled = evaluated(moving_frames(3), FIVE)
    plain = evaluated(moving_frames(3), None)
    entries = [RunEntry(label="scratch", result=plain), RunEntry(label="SAVP", result=sampled)]
    write_comparison_page(tmp_path / "page.html", entries, SETTINGS)
    page = PageText((tmp_path / "page.html").read_text())
    assert page.row("SAVP, best of 5 by SSIM")
    assert page.row("SAVP, mean over samples") and page.row("SAVP, ensemble mean")
    crps = sampled.overall["ensemble"]["crps_per_frame"]
    assert page.row("SAVP, all samples together")[-2] == f"{crps:.1f}"
    names = [row[0] for row in page.rows if row]
    assert "SAVP" not in names and "scratch" in names
    assert "chosen with the truth at hand" in page.text


def test_the_best_of_different_numbers_is_not_compared(tmp_path: Path) -> None:
    runs = {
        label: replace(result(label, 90.0), ensemble=Ensemble(num_samples=count))
        for label, count in (("a", 10), ("b", 100))
    }
    entries = [RunEntry(label=label, result=run) for label, run in runs.items()]
    with pytest.raises(ValueError, match=r"'a': 10, 'b': 100.* one --num-samples"):
        write_comparison_page(tmp_path / "page.html", entries, SETTINGS)


@pytest.fixture
def guessing(monkeypatch: pytest.MonkeyPatch, archive_url: str) -> str:
    """The commands load the guessing network, whatever the folder; its archive."""
    use_guess(monkeypatch, archive_url)
    return archive_url


def use_guess(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    facts = DataFacts.of(open_archive(url).manifest)
    loaded = LoadedModel(
        Guess(), card(facts, WindowConfig(num_input_frames=3, num_target_frames=3))
    )
    for command in (evaluate, predict):
        monkeypatch.setattr(command, "load_model", lambda *_, **__: loaded)


def test_evaluate_takes_ten_samples_and_says_so(
    guessing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(["guess", "--data", guessing, "--out", str(tmp_path)])
    assert "best of 10" in capsys.readouterr().out
    assert EvaluationResult.load(tmp_path).ensemble == Ensemble(num_samples=10)
    chosen = ["--num-samples", "3", "--seed", "8", "--out", str(tmp_path)]
    evaluate.main(["guess", "--data", guessing, *chosen])
    assert EvaluationResult.load(tmp_path).ensemble == Ensemble(num_samples=3, seed=8)


def test_a_radar_report_shows_and_repeats_the_samples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = write_radar_archive(tmp_path / "archive")
    use_guess(monkeypatch, url)
    out = tmp_path / "out"
    chosen = ["--num-samples", "3", "--flow", "off", "--out", str(out)]
    evaluate.main(["guess", "--data", url, *chosen])
    page, text = (out / "report.html").read_text(), (out / "tables.md").read_text()
    for written in (page, text):
        assert "guess, best of 3 by SSIM" in written and "guess, mean over samples" in written
    assert "--num-samples 3 --seed 0" in page
    assert "guess, sample 1" in page  # under its pictures
    again = EvaluationResult.load(out)
    assert again.radar is not None
    assert set(again.radar.forecasts) == {"model", "persistence", "ensemble_mean"}


def test_predict_draws_a_row_per_sample(guessing: str, tmp_path: Path) -> None:
    arguments = ["guess", "--data", guessing, "--samples", "4", "--arrays", "--seed", "3"]
    predict.main([*arguments, "--out", str(tmp_path / "three")])
    predict.main([*arguments, "--num-samples", "5", "--out", str(tmp_path / "five")])
    three, five = (np.load(tmp_path / name / "test-000004.npz") for name in ("three", "five"))
    assert three["prediction_DTCHW"].shape == (3, 3, 1, 16, 16)
    np.testing.assert_array_equal(five["prediction_DTCHW"][:3], three["prediction_DTCHW"])
    inputs_TCHW = torch.from_numpy(three["inputs_TCHW"])
    noise_BTZ = FIVE.noise(torch.full((5,), 4), torch.arange(5), num_steps=5, noise_size=4)
    drawn = Guess().predict(inputs_TCHW.expand(5, -1, -1, -1, -1), 3, noise_BTZ=noise_BTZ)
    np.testing.assert_allclose(five["prediction_DTCHW"], drawn, atol=1e-6)
    assert (tmp_path / "three" / "test-000004.png").is_file()
    assert (tmp_path / "three" / "test-000004.gif").is_file()
