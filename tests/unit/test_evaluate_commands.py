"""`python -m tmu_dist.evaluate` and `predict` on a tiny archive: files, numbers, clear errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tmu_dist import evaluate, predict
from tmu_dist.config import ModelConfig, TMUConfig, WindowConfig
from tmu_dist.data.loader import open_archive
from tmu_dist.evaluation.result import EvaluationResult
from tmu_dist.evaluation.runner import check_archive_fits
from tmu_dist.models.build import FrameShape, build_predictor
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import load_card, write_model

SMALL = ModelConfig(num_layers=2, hidden_channels=4, kernel_size=3)


@pytest.fixture
def model_folder(archive_url: str, tmp_path: Path) -> Path:
    """An untrained TMU network whose card fits the tiny archive."""
    manifest = open_archive(archive_url).manifest
    frame = FrameShape(channels=1, height=manifest.height, width=manifest.width)
    card = TeacherCard(
        name="student", method="tmu", step=5, seed=0, frame=frame, model=SMALL, tmu=TMUConfig(),
        window=WindowConfig(num_input_frames=3, num_target_frames=3), num_slots=2,
        data=DataFacts.of(manifest), teachers=("one", "two"), teacher_parameters=(10, 20),
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, build_predictor(frame, SMALL, tmu=TMUConfig(), num_slots=2), card)
    return folder


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
    assert "--out" in fails(capsys, evaluate, "s3://bucket/model", "--data", archive_url)
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
    gaps = replace(manifest.units, missing_code=255)
    with pytest.raises(ValueError, match="missing pixels"):
        check_archive_fits(
            replace(card, data=replace(card.data, units=gaps)), replace(manifest, units=gaps)
        )


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
