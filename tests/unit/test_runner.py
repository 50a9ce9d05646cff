"""The evaluation pass: exact over batches and ranks, blind to the future, complete on disk.

Shape letters: N sequences, B batch, T time, C channels, H height, W width.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.synthetic_radar import DBZ, moving_rain
from tmu_dist.collectives import Collectives
from tmu_dist.config import ModelConfig, TMUConfig, WindowConfig
from tmu_dist.data.loader import Batch
from tmu_dist.data.manifest import Units
from tmu_dist.evaluation.baselines import FlowUnavailableError, OpticalFlow
from tmu_dist.evaluation.metrics import ERROR_METRIC_NAMES, METRIC_NAMES, PHYSICAL_METRIC_NAMES
from tmu_dist.evaluation.pass_tables import ForecastTable, PassTables
from tmu_dist.evaluation.rain import RadarSettings
from tmu_dist.evaluation.result import EvaluatedData, EvaluationResult
from tmu_dist.evaluation.runner import PassScores, evaluate, score_predictor
from tmu_dist.evaluation.score_table import ScoreTable
from tmu_dist.evaluation.timing import latency_ms
from tmu_dist.models.build import build_predictor, count_parameters
from tmu_dist.models.rollout import Predictor, Rollout
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import LoadedModel

CPU = torch.device("cpu")
WINDOW = WindowConfig(num_input_frames=3, num_target_frames=2)
FRAME = FrameShape(channels=1, height=16, width=16)
GREY = Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None)
RADAR = RadarSettings(
    unit="dBZ", thresholds=(20.0, 30.0), scales=(1, 4), numbers=(20 / 70, 30 / 70), pixel_km=None
)
SMALL = ModelConfig(num_layers=2, hidden_channels=4, kernel_size=3)


def moving_frames(num_sequences: int, num_frames: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num_sequences, num_frames, 1, 16, 16)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def one_pass(
    frames_NTCHW: Tensor, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """What `SequenceLoader.one_pass` gives: natural order, the last batch padded with repeats."""
    total = len(frames_NTCHW)
    share = batch_size // world_size
    for start in range(0, total, batch_size):
        positions = torch.arange(start, start + batch_size)[rank * share : (rank + 1) * share]
        ids = positions.clamp(max=total - 1)
        real = min(batch_size, total - start)
        weights = (positions < total).float()
        yield Batch(frames_NTCHW[ids], ids, weights, real, start + real)


class Fading(nn.Module):
    """Repeats half of the frame before: exact arithmetic, whatever the batch."""

    def forward(
        self,
        frames_BTCHW: Tensor,
        *,
        num_input_frames: int,
        num_frames: int,
        noise_BTZ: Tensor | None,
        diagnostics: bool,
    ) -> Rollout:
        assert noise_BTZ is None, "a network without noise was given some"
        assert frames_BTCHW.shape[1] == num_input_frames, "target frames must not be handed over"
        predictions = [frames_BTCHW[:, t] / 2 for t in range(num_input_frames)]
        while len(predictions) < num_frames - 1:
            predictions.append(predictions[-1] / 2)
        return Rollout(torch.stack(predictions, 1), frames_BTCHW, (), {})


class ThreadRanks(Collectives):
    """Ranks that are threads of this process."""

    def __init__(self, slots: list[Any], rank: int, meet: threading.Barrier) -> None:
        super().__init__()
        self.slots, self.rank, self.meet = slots, rank, meet

    def all_gather_objects(self, item: Any) -> list[Any]:
        self.slots[self.rank] = item
        self.meet.wait(timeout=30)
        return list(self.slots)


def score_on_ranks(
    frames: Tensor,
    *,
    batch_size: int,
    world_size: int,
    units: Units = GREY,
    model: nn.Module | None = None,
    **options: Any,
) -> list[PassScores]:
    slots: list[Any] = [None] * world_size
    results: list[Any] = [None] * world_size
    meet = threading.Barrier(world_size)

    def work(rank: int) -> None:
        batches = one_pass(frames, batch_size=batch_size, rank=rank, world_size=world_size)
        results[rank] = score_predictor(
            model or Fading(),  # type: ignore[arg-type]
            batches,
            window=WINDOW,
            units=units,
            device=CPU,
            collectives=ThreadRanks(slots, rank, meet),
            **options,
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_bit_equal(a: PassScores, b: PassScores) -> None:
    for mine, theirs in ((a.model, b.model), (a.persistence, b.persistence)):
        np.testing.assert_array_equal(mine.sample_ids_N, theirs.sample_ids_N)
        for name in METRIC_NAMES:
            np.testing.assert_array_equal(mine.values_NT[name], theirs.values_NT[name])
        assert mine.overall() == theirs.overall()


def radar_frames(num_sequences: int) -> Tensor:
    """Moving rain with missing pixels, of which sequence 1 loses its second target frame."""
    frames = np.stack([moving_rain(i, num_frames=5, size=32) for i in range(num_sequences)])
    frames[min(1, num_sequences - 1), 4] = DBZ.missing_code
    return torch.from_numpy(frames)


def radar_options() -> dict[str, Any]:
    """What `score_predictor` needs for radar scores of the sequences above."""
    pytest.importorskip("cv2")
    pytest.importorskip("pysteps")
    metrics = (*METRIC_NAMES, *PHYSICAL_METRIC_NAMES)
    return {"radar": RADAR, "flow": OpticalFlow(DBZ), "metrics": metrics}


def small_model(**tmu_slots: Any) -> Predictor:
    torch.manual_seed(0)
    return build_predictor(FRAME, SMALL, **tmu_slots)


def loaded_tmu() -> LoadedModel:
    model = small_model(tmu=TMUConfig(layers=(1,)), num_slots=2).eval()
    data = DataFacts(archive="x", manifest_hash="h", units=GREY, frame_interval_minutes=None)
    card = TeacherCard(
        name="student", method="tmu", step=7, seed=3, frame=FRAME, window=WINDOW, model=SMALL,
        tmu=TMUConfig(layers=(1,)), num_slots=2, data=data, teachers=("one digit", "two digits"),
        teacher_parameters=(100, 200),
    )  # fmt: skip
    return LoadedModel(model, card)


def evaluated(frames: Tensor, units: Units = GREY, **options: Any) -> EvaluationResult:
    return evaluate(
        loaded_tmu(),
        one_pass(frames, batch_size=4),
        EvaluatedData(url="u", split="test", manifest_hash="h", num_sequences=len(frames)),
        units=units,
        timing_frames_BTCHW=frames[:1],
        device=CPU,
        **options,
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(world_size: int) -> None:
    frames = moving_frames(11)
    alone = score_predictor(
        Fading(),  # type: ignore[arg-type]
        one_pass(frames, batch_size=4),
        window=WINDOW,
        units=GREY,
        device=CPU,
    )
    for scored in score_on_ranks(frames, batch_size=6, world_size=world_size):
        assert_bit_equal(alone, scored)


@pytest.mark.parametrize("world_size", [2, 3])
def test_radar_scores_have_the_same_bits_on_any_number_of_ranks(world_size: int) -> None:
    frames, options = radar_frames(7), radar_options()
    alone = score_predictor(
        Fading(),  # type: ignore[arg-type]
        one_pass(frames, batch_size=4),
        window=WINDOW,
        units=DBZ,
        device=CPU,
        **options,
    )
    assert list(alone.forecasts) == ["model", "persistence", "optical_flow"]
    ranks = score_on_ranks(frames, batch_size=6, world_size=world_size, units=DBZ, **options)
    for scored in ranks:
        for name, mine in alone.forecasts.items():
            theirs = scored.forecasts[name]
            for metric, values_NT in mine.scores.values_NT.items():
                np.testing.assert_array_equal(theirs.scores.values_NT[metric], values_NT)
            assert mine.radar is not None and theirs.radar is not None
            np.testing.assert_array_equal(theirs.radar.counts_TKX, mine.radar.counts_TKX)
            np.testing.assert_array_equal(theirs.radar.sums_TKSX, mine.radar.sums_TKSX)
            assert mine.contingency_NTKX is not None and theirs.contingency_NTKX is not None
            np.testing.assert_array_equal(theirs.contingency_NTKX, mine.contingency_NTKX)


def test_every_forecast_is_scored_on_the_same_pixels() -> None:
    frames = radar_frames(4)
    scored = score_on_ranks(frames, batch_size=2, world_size=1, units=DBZ, **radar_options())[0]
    observed_T = (frames[:, 3:] != DBZ.missing_code).sum(dim=(0, 2, 3, 4)).tolist()
    for forecast in scored.forecasts.values():
        assert forecast.radar is not None
        assert forecast.radar.counts_TKX.sum(axis=-1).tolist() == [[n, n] for n in observed_T]
        assert forecast.scores.overall()["unobserved_frames"] == 1


def test_moving_rain_is_easier_for_optical_flow_than_for_persistence() -> None:
    scored = score_on_ranks(
        radar_frames(6), batch_size=6, world_size=1, units=DBZ, **radar_options()
    )[0]
    flow, still = (scored.forecasts[name] for name in ("optical_flow", "persistence"))
    assert flow.radar is not None and still.radar is not None
    assert (flow.radar.mean("csi") > still.radar.mean("csi") + 0.1).all()
    assert flow.scores.overall()["mae_physical"] < still.scores.overall()["mae_physical"]
    assert scored.flow_ms_per_sequence is not None and scored.flow_ms_per_sequence > 0


def test_validation_of_radar_takes_no_extras() -> None:
    """As the training loop calls it: errors of model and persistence, masked."""
    scored = score_on_ranks(
        radar_frames(3), batch_size=3, world_size=1, units=DBZ, metrics=ERROR_METRIC_NAMES
    )[0]
    assert list(scored.forecasts) == ["model", "persistence"]
    assert scored.forecasts["model"].radar is None and scored.flow_ms_per_sequence is None
    expected = {*ERROR_METRIC_NAMES, "observed_fraction", "unobserved_frames"}
    assert set(scored.model.overall()) == expected


def test_ranks_with_different_libraries_are_told() -> None:
    first, second = PassTables({}), PassTables({"model": ForecastTable(ScoreTable(), None)})
    with pytest.raises(ValueError, match="same libraries everywhere"):
        first.merge(second)


def test_scores_are_of_the_right_frames() -> None:
    frames = moving_frames(3)
    scored = score_predictor(
        Fading(),  # type: ignore[arg-type]
        one_pass(frames, batch_size=2),
        window=WINDOW,
        units=GREY,
        device=CPU,
        metrics=["mse_mean"],
    )
    truth = frames.double() / 255
    for t, factor in enumerate([0.5, 0.25]):
        error = ((truth[:, 2] * factor - truth[:, 3 + t]) ** 2).mean()
        assert scored.model.per_lead_time()["mse_mean"][t] == pytest.approx(float(error), rel=1e-6)
        still = ((truth[:, 2] - truth[:, 3 + t]) ** 2).mean()
        assert scored.persistence.per_lead_time()["mse_mean"][t] == pytest.approx(
            float(still), rel=1e-6
        )


def test_the_future_does_not_reach_the_forecast() -> None:
    """Scrambling the target frames changes the scores but not what the gates saw."""
    frames = moving_frames(4)
    scrambled = frames.clone()
    scrambled[:, WINDOW.num_input_frames :] = 255 - frames[:, WINDOW.num_input_frames :]
    first, second = evaluated(frames), evaluated(scrambled)
    assert first.gates == second.gates
    assert first.overall["model"] != second.overall["model"]


def test_batch_size_does_not_matter_for_a_network() -> None:
    frames, model = moving_frames(7), small_model()
    scores = [
        score_predictor(
            model, one_pass(frames, batch_size=b), window=WINDOW, units=GREY, device=CPU
        ).model
        for b in (1, 3, 8)
    ]
    for other in scores[1:]:
        for name in ERROR_METRIC_NAMES:
            np.testing.assert_allclose(other.values_NT[name], scores[0].values_NT[name], rtol=1e-5)


def test_validation_can_stop_early_and_leaves_the_model_training() -> None:
    frames, model = moving_frames(13), small_model(tmu=TMUConfig(), num_slots=1).train()

    def validated(count: int, max_samples: int | None) -> PassScores:
        batches = one_pass(frames[:count], batch_size=4)
        scored = score_predictor(
            model,
            batches,
            window=WINDOW,
            units=GREY,
            device=CPU,
            metrics=ERROR_METRIC_NAMES,
            max_samples=max_samples,
        )
        left = list(batches)
        assert len(left) == (2 if max_samples else 0), "batches beyond the limit are not read"
        return scored

    scored = validated(13, max_samples=5)
    assert model.training
    assert scored.model.sample_ids_N.tolist() == [0, 1, 2, 3, 4]
    assert set(scored.model.overall()) == set(ERROR_METRIC_NAMES)
    first_five = validated(5, max_samples=None)
    assert scored.gates is not None and first_five.gates is not None
    np.testing.assert_allclose(scored.gates.means_LM, first_five.gates.means_LM, rtol=1e-6)


def test_gates_are_averaged_per_layer_and_teacher() -> None:
    frames, loaded = moving_frames(5), loaded_tmu()
    gates = evaluated(frames).gates
    assert gates is not None
    assert gates.teachers == ("one digit", "two digits")
    assert gates.layers == (1,)
    with torch.inference_mode():
        rollout = loaded.model(
            frames[:, :3].float() / 255, num_input_frames=3, num_frames=5, diagnostics=True
        )
    expected = rollout.diagnostics.transfer_gates_BTLM.mean((0, 1))
    np.testing.assert_allclose(gates.means_LM, expected, rtol=1e-5)
    np.testing.assert_allclose(gates.per_teacher(), expected.mean(0), rtol=1e-5)


def test_a_network_without_teachers_numbers_its_slots() -> None:
    model = small_model(tmu=TMUConfig(), num_slots=2)
    frames = one_pass(moving_frames(2), batch_size=2)
    scored = score_predictor(model, frames, window=WINDOW, units=GREY, device=CPU)
    assert scored.gates is not None
    assert scored.gates.teachers == ("slot 0", "slot 1")
    assert scored.gates.layers == (0, 1)


def test_an_evaluation_is_complete_and_survives_the_disk(tmp_path: Any) -> None:
    result = evaluated(moving_frames(5))
    own = count_parameters(loaded_tmu().model)
    assert (result.parameters.test, result.parameters.train) == (own, own + 300)
    assert result.runtime.ms_per_sequence_batch_1 > 0
    assert result.runtime.evaluation_batch_size == 4
    assert set(result.overall) == {"model", "persistence"}
    result.save(tmp_path)
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    named = set(tree["overall"]["model"])
    assert named == {*METRIC_NAMES, "identical_frames"} and named < set(tree["definitions"])
    again = EvaluationResult.load(tmp_path)
    assert again.to_dict() == result.to_dict()
    assert again.overall == result.overall
    assert again.per_sequence is not None and result.per_sequence is not None
    for forecast, scores in result.per_sequence.items():
        assert again.per_sequence[forecast].overall() == scores.overall()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "per_sequence.npz"]


def test_infinite_psnr_is_null_in_json_and_infinite_again(tmp_path: Any) -> None:
    still = moving_frames(3)[:, :1].expand(-1, 5, -1, -1, -1)  # persistence is perfect
    result = evaluated(still)
    result.save(tmp_path)
    text = (tmp_path / "evaluation.json").read_text()
    assert json.loads(text)["overall"]["persistence"]["psnr_db"] is None
    assert EvaluationResult.load(tmp_path).overall["persistence"]["psnr_db"] == np.inf


def test_a_radar_evaluation_survives_the_disk(tmp_path: Any) -> None:
    frames = radar_frames(3)[..., :16, :16]
    frames[:, 4] = DBZ.missing_code  # nothing to score at the second lead time
    result = evaluated(frames, DBZ, radar=RADAR, flow=radar_options()["flow"])
    assert result.radar is not None and result.radar.flow_note is None
    assert set(result.overall) == {"model", "persistence", "optical_flow"}
    assert np.isnan(result.per_lead_time["model"]["mse_mean"][1])
    assert result.overall["model"]["mse_mean"] == result.per_lead_time["model"]["mse_mean"][0]
    result.save(tmp_path)
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["per_lead_time"]["model"]["mse_mean"][1] == "undefined"
    assert {*METRIC_NAMES, *PHYSICAL_METRIC_NAMES, "csi", "fss"} < set(tree["definitions"])
    again = EvaluationResult.load(tmp_path)
    assert json.dumps(again.to_dict()) == json.dumps(result.to_dict())
    assert again.contingency is not None and result.contingency is not None
    for name, counts_NTKX in result.contingency.items():
        np.testing.assert_array_equal(again.contingency[name], counts_NTKX)
        total_TKX = result.radar.forecasts[name].counts_TKX
        np.testing.assert_array_equal(counts_NTKX.sum(axis=0), total_TKX)


@pytest.mark.parametrize("reason", [None, "pip install 'tmu-dist[flow]'"])
def test_a_radar_evaluation_says_why_optical_flow_is_missing(reason: str | None) -> None:
    missing = None if reason is None else FlowUnavailableError(reason)
    frames = radar_frames(2)[..., :16, :16]
    result = evaluated(frames, DBZ, radar=RADAR, flow=missing)
    assert set(result.overall) == {"model", "persistence"}
    assert result.radar is not None
    expected = f"optical flow not computed: {reason or 'it was not asked for'}"
    assert result.radar.flow_note == expected


def test_video_has_no_radar_part() -> None:
    result = evaluated(moving_frames(2))
    assert result.radar is None and result.contingency is None
    assert "radar" not in result.to_dict()
    assert not {"csi", "thresholds", "observed_fraction"} & set(result.definitions)


def test_evaluations_of_other_versions_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"holds no evaluation\.json"):
        EvaluationResult.load(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="evaluate again"):
        EvaluationResult.load(tmp_path)


def test_short_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs sequences of 5 frames .* have 4"):
        evaluated(moving_frames(2, num_frames=4))


def test_latency_is_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that adds 80 ms per rollout: 80 ms a sequence alone, 10 ms in a batch of eight."""
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks) * 0.08)
    frames, model = moving_frames(3), small_model()
    assert latency_ms(model, frames, WINDOW, GREY, CPU) == pytest.approx(80)
    assert latency_ms(model, frames, WINDOW, GREY, CPU, batch_size=8) == pytest.approx(10)


def test_rows_of_one_rank_without_samples_merge() -> None:
    """A rank whose whole share is padding still takes part."""
    results = score_on_ranks(moving_frames(1), batch_size=2, world_size=2)
    assert results[0].model.sample_ids_N.tolist() == [0]
    assert_bit_equal(results[0], results[1])
