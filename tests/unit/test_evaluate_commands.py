"""`python -m tmu_dist.evaluate` and `predict` on a tiny archive: files, numbers, clear errors."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.synthetic_radar import DBZ, write_radar_archive
from tmu_dist import evaluate, predict
from tmu_dist.config import ModelConfig, TMUConfig, WindowConfig
from tmu_dist.data.loader import open_archive
from tmu_dist.evaluation.result import EvaluationResult
from tmu_dist.evaluation.runner import check_archive_fits
from tmu_dist.models.build import build_predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import load_card, write_model

SMALL = ModelConfig(num_layers=2, hidden_channels=4, kernel_size=3)


@pytest.fixture
def model_folder(archive_url: str, tmp_path: Path) -> Path:
    return write_network(tmp_path / "model", archive_url)


def write_network(folder: Path, url: str, **window: int) -> Path:
    """An untrained TMU network whose card fits an archive."""
    manifest = open_archive(url).manifest
    frame = FrameShape(channels=1, height=manifest.height, width=manifest.width)
    card = TeacherCard(
        name="student", method="tmu", step=5, seed=0, frame=frame, model=SMALL, tmu=TMUConfig(),
        window=WindowConfig(**{"num_input_frames": 3, "num_target_frames": 3} | window),
        num_slots=2, data=DataFacts.of(manifest), teachers=("one", "two"),
        teacher_parameters=(10, 20),
    )  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir()
    write_model(folder, build_predictor(frame, SMALL, tmu=TMUConfig(), num_slots=2), card)
    return folder


@pytest.fixture(scope="module")
def radar_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_radar_archive(tmp_path_factory.mktemp("radar"))


@pytest.fixture
def radar_model(radar_url: str, tmp_path: Path) -> Path:
    return write_network(tmp_path / "radar-model", radar_url)


def fails(capsys: pytest.CaptureFixture[str], command: object, *arguments: str) -> str:
    """The one line that a command ends with; it must exit with code 2 and without a trace."""
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)  # type: ignore[attr-defined]
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_evaluate_prints_and_writes(
    model_folder: Path, archive_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(model_folder), "--data", archive_url, "--batch-size", "2"])
    folder = model_folder / "evaluation-test"
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json",
        "per_sequence.npz",
        "lead_time_mse_per_frame.png",
        "lead_time_mae_per_frame.png",
        "lead_time_ssim.png",
    }
    result = EvaluationResult.load(folder)
    assert result.data.num_sequences == 5
    assert result.model.teachers == ("one", "two")
    assert result.parameters.train == result.parameters.test + 30
    assert result.gates is not None and result.gates.teachers == ("one", "two")
    printed = capsys.readouterr().out
    for word in ("persistence", "mse_per_frame", "summed over the channels", "Layer 1", "one"):
        assert word in printed


def test_batch_size_does_not_change_the_scores(model_folder: Path, archive_url: str) -> None:
    small, large = (
        evaluate.evaluate_model(str(model_folder), archive_url, batch_size=b) for b in (1, 8)
    )
    for name, value in small.overall["model"].items():
        assert large.overall["model"][name] == pytest.approx(value, rel=1e-5)


def test_evaluate_explains_bad_input(
    model_folder: Path, archive_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, missing = str(model_folder), str(tmp_path / "nowhere")
    assert "nowhere" in fails(capsys, evaluate, missing, "--data", archive_url)
    assert "nowhere" in fails(capsys, evaluate, model, "--data", missing)
    assert "torchrun" in fails(
        capsys, evaluate, model, "--data", archive_url, "--launcher", "torchrun"
    )
    assert "--out" in fails(capsys, evaluate, "https://host/model", "--data", archive_url)
    assert not (model_folder / "evaluation-test").exists()


def test_an_archive_of_another_shape_is_refused(model_folder: Path, archive_url: str) -> None:
    card, manifest = load_card(str(model_folder)), open_archive(archive_url).manifest
    check_archive_fits(card, manifest)
    with pytest.raises(ValueError, match=r"= 1x16x16, but .* has 1x32x16"):
        check_archive_fits(card, replace(manifest, height=32))
    with pytest.raises(ValueError, match=r"= 1x16x16, but .* has 3x16x16"):
        check_archive_fits(card, replace(manifest, channels=3))
    any_size = replace(card, model=replace(card.model, norm_affine="channel"))
    check_archive_fits(any_size, replace(manifest, height=32))


def test_an_archive_of_other_units_is_refused(model_folder: Path, archive_url: str) -> None:
    card, manifest = load_card(str(model_folder)), open_archive(archive_url).manifest
    rain = replace(manifest.units, unit="dBZ")
    with pytest.raises(ValueError, match=r"learned numbers that mean .*dBZ"):
        check_archive_fits(card, replace(manifest, units=rain))


def test_an_archive_of_another_interval_is_refused(model_folder: Path, archive_url: str) -> None:
    card, manifest = load_card(str(model_folder)), open_archive(archive_url).manifest
    with pytest.raises(ValueError, match=r"every None minutes, but .* 10.0 minutes apart"):
        check_archive_fits(card, replace(manifest, frame_interval_minutes=10.0))


def test_missing_pixels_do_not_keep_an_archive_from_being_scored(
    model_folder: Path, archive_url: str
) -> None:
    """A network never sees their code, so it need not be the one that it was trained with."""
    card, manifest = load_card(str(model_folder)), open_archive(archive_url).manifest
    units = replace(manifest.units, max_code=254)
    same = replace(card, data=replace(card.data, units=units))
    check_archive_fits(same, replace(manifest, units=replace(units, missing_code=255)))
    with pytest.raises(ValueError, match="learned numbers"):
        check_archive_fits(card, replace(manifest, units=units))


def test_predict_writes_pictures_and_arrays(
    model_folder: Path, archive_url: str, tmp_path: Path
) -> None:
    out = tmp_path / "pictures"
    arguments = [str(model_folder), "--data", archive_url, "--samples", "0", "4"]
    predict.main([*arguments, "--out", str(out), "--arrays"])
    stems = ("test-000000", "test-000004")
    assert {p.name for p in out.iterdir()} == {
        f"{stem}.{kind}" for stem in stems for kind in ("png", "gif", "npz")
    }
    with Image.open(out / "test-000004.gif") as animation:
        assert animation.n_frames == 6
    stored = open_archive(archive_url).read("test", [4])[0]
    arrays = np.load(out / "test-000004.npz")
    np.testing.assert_array_equal(np.round(arrays["inputs_TCHW"] * 255), stored[:3])
    np.testing.assert_array_equal(np.round(arrays["truth_TCHW"] * 255), stored[3:])
    assert arrays["prediction_TCHW"].shape == (3, 1, 16, 16)


def test_pictures_lie_beside_the_model_unless_told_otherwise(
    model_folder: Path, archive_url: str
) -> None:
    predict.main([str(model_folder), "--data", archive_url, "--samples", "1"])
    assert (model_folder / "pictures-test" / "test-000001.png").is_file()


def test_predict_runs_beyond_the_archive(
    model_folder: Path, archive_url: str, tmp_path: Path
) -> None:
    arguments = [str(model_folder), "--data", archive_url, "--samples", "1", "--arrays"]
    predict.main([*arguments, "--num-frames", "11", "--out", str(tmp_path)])
    with Image.open(tmp_path / "test-000001.gif") as animation:
        assert animation.n_frames == 11
    arrays = np.load(tmp_path / "test-000001.npz")
    assert len(arrays["prediction_TCHW"]) == 8
    assert len(arrays["truth_TCHW"]) == 3


def test_predict_needs_all_input_frames(
    radar_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = write_radar_archive(tmp_path, num_samples=1, num_frames=2)
    message = fails(capsys, predict, str(radar_model), "--data", short, "--samples", "0")
    assert "watches 3 frames" in message and "have 2" in message


def test_predict_explains_bad_input(
    model_folder: Path, archive_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = (str(model_folder), "--data", archive_url, "--out", str(tmp_path / "out"))
    assert "0..4, not 5" in fails(capsys, predict, *fixed, "--samples", "5")
    short = fails(capsys, predict, *fixed, "--samples", "0", "--num-frames", "3")
    assert "num_input_frames=3" in short
    assert "samples" in fails(capsys, predict, *fixed)
    assert "names no sequence" in fails(capsys, predict, *fixed, "--samples")
    assert not (tmp_path / "out").exists()


def test_evaluation_json_is_plain(model_folder: Path, archive_url: str, tmp_path: Path) -> None:
    evaluate.main([str(model_folder), "--data", archive_url, "--out", str(tmp_path)])
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(tree) == {
        "model", "data", "definitions", "overall", "per_lead_time", "per_sequence", "gates",
        "parameters", "runtime",
    }  # fmt: skip
    assert set(tree["overall"]) == {"model", "persistence"}
    assert len(tree["per_lead_time"]["model"]["mse_per_frame"]) == 3


def test_evaluate_radar_writes_everything(
    radar_model: Path, radar_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("pysteps")
    evaluate.main([str(radar_model), "--data", radar_url, "--batch-size", "2"])
    folder = radar_model / "evaluation-test"
    charts = ("mse_per_frame", "mae_per_frame", "ssim", "csi", "fss")
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json", "per_sequence.npz", "report.html", "tables.md", "fss_by_scale.png",
        *(f"lead_time_{name}.png" for name in charts),
    }  # fmt: skip
    result = EvaluationResult.load(folder)
    assert set(result.overall) == {"persistence", "optical_flow", "model"}
    assert result.radar is not None and result.radar.settings.thresholds == (20, 30, 40)
    assert result.radar.settings.pixel_km == 2
    assert result.overall["model"]["observed_fraction"] == pytest.approx(46 / 48)
    flow, still = (
        result.radar.forecasts[n].mean("csi")[0] for n in ("optical_flow", "persistence")
    )
    assert flow > still
    printed = capsys.readouterr().out
    for word in ("optical flow", "At 20 dBZ and more", "8 px", "mae_physical"):
        assert word in printed
    page = (folder / "report.html").read_text()
    assert "student on synthetic-rain" in page and "Rain at thresholds" in page
    assert page.count("<section>") == 3  # example sequences
    assert "| optical flow |" in (folder / "tables.md").read_text()


def test_radar_settings_of_the_command_line(
    radar_model: Path, radar_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(radar_model), "--data", radar_url, "--out", str(tmp_path / "out")]
    chosen = ["--thresholds", "35", "25", "--fss-scales", "5", "--flow", "off"]
    evaluate.main([*arguments, *chosen])
    result = EvaluationResult.load(tmp_path / "out")
    assert result.radar is not None
    assert (result.radar.settings.thresholds, result.radar.settings.scales) == ((25, 35), (5,))
    assert set(result.overall) == {"persistence", "model"}
    note = "optical flow not computed: switched off by --flow off"
    assert result.radar.flow_note == note
    printed = " ".join(capsys.readouterr().out.split())
    assert note.capitalize() in printed
    assert note.capitalize() in (tmp_path / "out" / "report.html").read_text()
    assert "--thresholds 35.0 25.0" in (tmp_path / "out" / "report.html").read_text()
    assert "70 dBZ" in fails(capsys, evaluate, *arguments, "--thresholds", "20", "99")


def test_a_missing_library_is_said_in_the_report(
    radar_model: Path, radar_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pysteps", None)
    result = evaluate.evaluate_model(str(radar_model), radar_url)
    assert result.radar is not None and result.radar.flow_note is not None
    assert "not computed: pip install 'tmu-dist[flow]'" in result.radar.flow_note
    assert set(result.overall) == {"persistence", "model"}


def test_a_single_input_frame_shows_no_motion(radar_url: str, tmp_path: Path) -> None:
    lone = write_network(tmp_path / "lone", radar_url, num_input_frames=1)
    result = evaluate.evaluate_model(str(lone), radar_url)
    assert result.radar is not None and result.radar.flow_note is not None
    assert "two input frames" in result.radar.flow_note


def test_radar_settings_mean_nothing_for_video(
    model_folder: Path, archive_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(
        capsys, evaluate, str(model_folder), "--data", archive_url, "--thresholds", "0.5"
    )
    assert "holds intensity" in message


def test_predict_radar_writes_physical_values(
    radar_model: Path, radar_url: str, tmp_path: Path
) -> None:
    out = tmp_path / "pictures"
    arguments = [str(radar_model), "--data", radar_url, "--samples", "2", "--arrays"]
    predict.main([*arguments, "--out", str(out)])
    stored = open_archive(radar_url).read("test", [2])[0].astype(float)
    arrays = np.load(out / "test-000002.npz")
    dbz = np.where(stored == DBZ.missing_code, np.nan, stored * DBZ.scale)
    np.testing.assert_allclose(arrays["inputs_TCHW"], dbz[:3], atol=1e-4)
    np.testing.assert_allclose(arrays["truth_TCHW"], dbz[3:], atol=1e-4)
    assert np.isnan(arrays["truth_TCHW"]).any()
    assert np.isfinite(arrays["prediction_TCHW"]).all()
    assert (str(arrays["quantity"]), str(arrays["unit"])) == ("reflectivity", "dBZ")
    assert arrays["inputs_TCHW"].dtype == np.float32
    assert (out / "test-000002.png").is_file() and (out / "test-000002.gif").is_file()
