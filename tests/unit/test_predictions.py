"""Saved predictions: whole or absent, and worth the same scores when other code takes them.

Shape letters: N sequences, B batch, T lead time, C channels, H height, W width.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.synthetic_radar import write_radar_archive
from tests.unit.test_evaluate_commands import fails, write_network
from tmu_dist import evaluate
from tmu_dist.collectives import Collectives
from tmu_dist.config import ModelConfig, SAVPConfig, TMUConfig, WindowConfig
from tmu_dist.data.loader import open_archive
from tmu_dist.evaluation.predictions import (
    PREDICTIONS_NAME,
    RECOMPUTED,
    recompute,
    saved_predictions,
)
from tmu_dist.evaluation.result import MODEL, EvaluationResult
from tmu_dist.models.build import build_predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import load_model, write_model


def evaluated(model: Path, url: str, *more: str) -> Path:
    """Folder of an evaluation by the command, predictions kept."""
    evaluate.main([str(model), "--data", url, "--keep-predictions", "--batch-size", "2", *more])
    return model / "evaluation-test"


def test_the_file_holds_what_the_network_forecasts(archive_url: str, tmp_path: Path) -> None:
    model = write_network(tmp_path / "model", archive_url)
    kept_NTCHW = np.load(evaluated(model, archive_url) / PREDICTIONS_NAME)
    assert kept_NTCHW.shape == (5, 3, 1, 16, 16) and kept_NTCHW.dtype == np.float32
    network = load_model(str(model)).model.eval()
    for sample_id in (0, 4):  # the last one shares its batch with padding
        codes = open_archive(archive_url).read("test", [sample_id])[:, :3]
        inputs_BTCHW = torch.from_numpy(codes).float() / 255
        with torch.no_grad():
            frames_BTCHW = network(inputs_BTCHW, num_input_frames=3, num_frames=6)[0][:, 2:]
        np.testing.assert_allclose(kept_NTCHW[sample_id], frames_BTCHW[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["digits", "radar"])
def test_other_code_finds_the_same_scores(kind: str, archive_url: str, tmp_path: Path) -> None:
    """Radar has missing pixels and frames without any; there both must say NaN."""
    url = archive_url if kind == "digits" else write_radar_archive(tmp_path)
    model, folder = write_network(tmp_path / "model", url), tmp_path / "evaluation"
    evaluate.evaluate_model(
        str(model), url, flow="off", predictions_to=folder / PREDICTIONS_NAME
    ).save(folder)
    again = recompute(folder, open_archive(url))
    stored = EvaluationResult.load(folder).per_sequence
    assert stored is not None and set(again) == set(RECOMPUTED)
    for name, values_NT in again.items():
        expected_NT = stored[MODEL].values_NT[name]
        assert np.isfinite(expected_NT).any() and np.ptp(expected_NT[np.isfinite(expected_NT)]) > 0
        np.testing.assert_allclose(values_NT, expected_NT, rtol=1e-6)


def test_a_changed_prediction_changes_its_own_scores(archive_url: str, tmp_path: Path) -> None:
    folder = evaluated(write_network(tmp_path / "model", archive_url), archive_url)
    archive = open_archive(archive_url)
    before = recompute(folder, archive)
    frames_NTCHW = np.load(folder / PREDICTIONS_NAME, mmap_mode="r+")
    frames_NTCHW[3, 1, 0, 8, 8] += 0.25
    frames_NTCHW.flush()
    after = recompute(folder, archive)
    for name in RECOMPUTED:
        assert np.argwhere(before[name] != after[name]).tolist() == [[3, 1]]


def test_predictions_that_do_not_belong_are_refused(archive_url: str, tmp_path: Path) -> None:
    folder = evaluated(write_network(tmp_path / "model", archive_url), archive_url)
    archive = open_archive(archive_url)
    other = SimpleNamespace(url="elsewhere", manifest=SimpleNamespace(content_hash="0" * 64))
    with pytest.raises(ValueError, match="elsewhere has 000000000000"):
        recompute(folder, other)  # type: ignore[arg-type]
    report = json.loads((folder / "evaluation.json").read_text())
    changes = {"SSIM": ("definitions", "ssim", "form gauss_11"),
               "different evaluations": ("model", "num_target_frames", 2)}  # fmt: skip
    for words, (section, name, value) in changes.items():
        changed = report | {section: report[section] | {name: value}}
        (folder / "evaluation.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words):
            recompute(folder, archive)
    (folder / PREDICTIONS_NAME).unlink()
    with pytest.raises(ValueError, match="--keep-predictions"):
        recompute(folder, archive)


def test_half_a_pass_leaves_no_file(tmp_path: Path) -> None:
    path, ones_BTCHW = tmp_path / PREDICTIONS_NAME, torch.ones(2, 1, 1, 2, 2)
    with (
        pytest.raises(ValueError, match="1 of 3 sequences were not forecast"),
        saved_predictions(path, (3, 1, 1, 2, 2)) as keep,
    ):
        keep(ones_BTCHW, torch.tensor([0, 2]), torch.ones(2))
    with pytest.raises(RuntimeError), saved_predictions(path, (1, 1, 1, 2, 2)) as keep:
        keep(ones_BTCHW, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
        raise RuntimeError("killed")
    assert not list(tmp_path.iterdir())


def test_padding_is_not_kept(tmp_path: Path) -> None:
    frames_BTCHW = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)
    with saved_predictions(tmp_path / "kept.npy", (2, 1, 1, 1, 1)) as keep:
        keep(frames_BTCHW, torch.tensor([0, 1, 0]), torch.tensor([0.0, 1.0, 1.0]))
    assert np.load(tmp_path / "kept.npy").ravel().tolist() == [3.0, 2.0]


def test_several_ranks_are_refused(archive_url: str, tmp_path: Path) -> None:
    model = write_network(tmp_path / "model", archive_url)
    ranks: Any = Collectives()
    ranks.ranks = SimpleNamespace(rank=0, world_size=2)
    with pytest.raises(ValueError, match="one process, but 2"):
        evaluate.evaluate_model(
            str(model), archive_url, predictions_to=tmp_path / "x.npy", collectives=ranks
        )


def test_a_stochastic_network_is_refused(
    archive_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = FrameShape(channels=1, height=16, width=16)
    config = ModelConfig(cell="savp", savp=SAVPConfig(base_channels=4, latent_size=4))
    card = TeacherCard(
        name="stochastic", method="scratch", step=1, seed=0, frame=frame, model=config,
        tmu=TMUConfig(), window=WindowConfig(num_input_frames=3, num_target_frames=3), num_slots=0,
        data=DataFacts.of(open_archive(archive_url).manifest), teachers=(), teacher_parameters=(),
    )  # fmt: skip
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", build_predictor(frame, config), card)
    command = (str(tmp_path / "model"), "--data", archive_url, "--keep-predictions")
    assert "forecasts every sequence 10 times" in fails(capsys, evaluate, *command)
    assert not (tmp_path / "model" / "evaluation-test").exists()
