"""Two torchrun ranks find what one process finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tmu_dist.config import ModelConfig, TMUConfig, WindowConfig
from tmu_dist.data.loader import open_archive
from tmu_dist.evaluation.result import EvaluationResult
from tmu_dist.models.build import FrameShape, build_predictor
from tmu_dist.teachers.card import DataFacts, TeacherCard
from tmu_dist.teachers.store import write_model

pytestmark = pytest.mark.distributed


def test_two_ranks_evaluate_like_one(archive_url: str, tmp_path: Path) -> None:
    """Five sequences in batches of four: in the last batch, rank 1 has nothing but padding."""
    manifest = open_archive(archive_url).manifest
    frame = FrameShape(channels=1, height=manifest.height, width=manifest.width)
    model = ModelConfig(num_layers=1, hidden_channels=4, kernel_size=3)
    card = TeacherCard(
        name="student", method="tmu", step=1, seed=0, frame=frame, model=model, tmu=TMUConfig(),
        window=WindowConfig(num_input_frames=3, num_target_frames=3), num_slots=1,
        data=DataFacts.of(manifest), teachers=("one",), teacher_parameters=(10,),
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, build_predictor(frame, model, tmu=TMUConfig(), num_slots=1), card)

    def evaluated(name: str, start: list[str], *extra: str) -> EvaluationResult:
        out = tmp_path / name
        command = [str(folder), "--data", archive_url, "--batch-size", "4", "--out", str(out)]
        subprocess.run([*start, "-m", "tmu_dist.evaluate", *command, *extra], check=True)
        return EvaluationResult.load(out)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    alone = evaluated("alone", [sys.executable])
    shared = evaluated("shared", [*torchrun, "--nproc-per-node", "2"], "--launcher", "torchrun")
    assert shared.data == alone.data
    assert shared.gates is not None and alone.gates is not None
    np.testing.assert_allclose(shared.gates.means_LM, alone.gates.means_LM, rtol=1e-6)
    for forecast in ("model", "persistence"):
        for name, value in alone.overall[forecast].items():
            assert shared.overall[forecast][name] == pytest.approx(value, rel=1e-5)
    # Persistence involves no network, so nothing but the dealing of samples differs: same bits.
    assert shared.overall["persistence"] == alone.overall["persistence"]
