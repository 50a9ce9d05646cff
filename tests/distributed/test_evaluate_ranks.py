"""Two torchrun ranks find what one process finds, on video and on radar."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.synthetic_radar import write_radar_archive
from tmu_dist.config import ModelConfig, TMUConfig, WindowConfig
from tmu_dist.data.loader import open_archive
from tmu_dist.evaluation.result import EvaluationResult
from tmu_dist.models.build import build_predictor
from tmu_dist.models.shapes import FrameShape
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import write_model

pytestmark = pytest.mark.distributed


def write_network(folder: Path, url: str) -> Path:
    manifest = open_archive(url).manifest
    frame = FrameShape(channels=1, height=manifest.height, width=manifest.width)
    model = ModelConfig(num_layers=1, hidden_channels=4, kernel_size=3)
    card = TeacherCard(
        name="student", method="tmu", step=1, seed=0, frame=frame, model=model, tmu=TMUConfig(),
        window=WindowConfig(num_input_frames=3, num_target_frames=3), num_slots=1,
        data=DataFacts.of(manifest), teachers=("one",), teacher_parameters=(10,),
    )  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir()
    write_model(folder, build_predictor(frame, model, tmu=TMUConfig(), num_slots=1), card)
    return folder


def evaluated_twice(url: str, folder: Path) -> tuple[EvaluationResult, EvaluationResult]:
    """By one process, and by two ranks."""
    model = write_network(folder / "model", url)

    def evaluated(name: str, start: list[str], *extra: str) -> EvaluationResult:
        out = folder / name
        command = [str(model), "--data", url, "--batch-size", "4", "--out", str(out)]
        subprocess.run([*start, "-m", "tmu_dist.evaluate", *command, *extra], check=True)
        return EvaluationResult.load(out)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    alone = evaluated("alone", [sys.executable])
    shared = evaluated("shared", [*torchrun, "--nproc-per-node", "2"], "--launcher", "torchrun")
    return alone, shared


def test_two_ranks_evaluate_like_one(archive_url: str, tmp_path: Path) -> None:
    """Five sequences in batches of four: in the last batch, rank 1 has nothing but padding."""
    alone, shared = evaluated_twice(archive_url, tmp_path)
    assert shared.data == alone.data
    assert shared.gates is not None and alone.gates is not None
    np.testing.assert_allclose(shared.gates.means_LM, alone.gates.means_LM, rtol=1e-6)
    for forecast in ("model", "persistence"):
        for name, value in alone.overall[forecast].items():
            assert shared.overall[forecast][name] == pytest.approx(value, rel=1e-5)
    # Persistence involves no network, so nothing but the dealing of samples differs: same bits.
    assert shared.overall["persistence"] == alone.overall["persistence"]


def test_two_ranks_score_radar_like_one(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("pysteps")
    (tmp_path / "archive").mkdir()
    alone, shared = evaluated_twice(write_radar_archive(tmp_path / "archive"), tmp_path)
    assert alone.radar is not None and shared.radar is not None
    assert alone.radar.settings == shared.radar.settings
    # Neither baseline involves a network: the same bits, those of optical flow included.
    for name in ("persistence", "optical_flow"):
        assert shared.overall[name] == alone.overall[name]
        first, second = alone.radar.forecasts[name], shared.radar.forecasts[name]
        np.testing.assert_array_equal(first.counts_TKX, second.counts_TKX)
        np.testing.assert_array_equal(first.sums_TKSX, second.sums_TKSX)
    model, same_model = alone.radar.forecasts["model"], shared.radar.forecasts["model"]
    totals = model.counts_TKX.sum(axis=-1), same_model.counts_TKX.sum(axis=-1)
    np.testing.assert_array_equal(*totals)
