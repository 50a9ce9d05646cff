"""Any number of ranks finds what one process finds, on video and on radar.

Legend: B batch, T time, C channels, H, W height, width, Z noise.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TINY_MODEL
from tests.distributed.test_elastic import spawn_worlds
from tests.synthetic_radar import write_radar_archive
from tmu_dist.collectives import Collectives
from tmu_dist.config import ModelConfig, TMUConfig, WindowConfig
from tmu_dist.data.loader import SequenceLoader, open_archive
from tmu_dist.evaluation.ensemble import Ensemble
from tmu_dist.evaluation.result import EvaluationResult
from tmu_dist.evaluation.runner import PassScores, score_predictor
from tmu_dist.models.build import build_predictor
from tmu_dist.models.rollout import Rollout
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


# Scores, to the last bit


class Simple(nn.Module):
    """Arithmetic on pixels, which is exact whatever the batch; a little noise if it is given."""

    noise_size = 0

    def forward(self, frames_BTCHW: Tensor, **given: Any) -> Rollout:
        steps = given["num_frames"] - 1
        frames_BTCHW = frames_BTCHW[:, -1:].expand(-1, steps, -1, -1, -1) / 2
        if given["noise_BTZ"] is not None:
            frames_BTCHW = frames_BTCHW + given["noise_BTZ"][..., None, None] / 8
        return Rollout(frames_BTCHW, frames_BTCHW, (), {})


class Drawing(Simple):
    """The same, stochastic."""

    noise_size = 1


def _score(collectives: Collectives, url: str, folder: str) -> None:
    """Every number that passes over a split find, with this number of ranks."""
    archive, ranks = open_archive(url), collectives.ranks
    results = {}

    def scored(name: str, model: Any, split: str, batch_size: int, **options: Any) -> None:
        loader = SequenceLoader(
            archive,
            split,
            global_batch_size=batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        found = score_predictor(
            model,
            loader.one_pass(),
            window=WindowConfig(num_input_frames=3, num_target_frames=3),
            units=archive.manifest.units,
            device=torch.device("cpu"),
            collectives=collectives,
            **options,
        )
        results[name] = numbers(found)

    for batch_size in range(1, 8):
        scored(f"val-{batch_size}", Simple(), "val", batch_size)
        for most in (1, 3, 5):
            scored(f"first {most}-{batch_size}", Simple(), "val", batch_size, max_samples=most)
        drawing = {
            "ensemble": Ensemble(num_samples=3, seed=4),
            "metrics": ("mse_per_frame", "ssim"),
        }
        scored(f"drawn-{batch_size}", Drawing(), "val", batch_size, **drawing)
    scored("train-5", Simple(), "train", 5)
    # The sums in a network's convolutions depend on the size of a batch: here every rank has two
    # sequences at once, and those of one process are two as well.
    torch.manual_seed(0)
    frame = FrameShape(channels=1, height=16, width=16)
    network = build_predictor(frame, TINY_MODEL, tmu=TMUConfig(), num_slots=2).eval()
    scored("network", network, "train", 2 * ranks.world_size)
    torch.save(results, f"{folder}/{ranks.world_size}-{ranks.rank}.pt")


def numbers(found: PassScores) -> dict[str, Any]:
    """All that does not tell time, by name."""
    tables = {name: forecast.scores for name, forecast in found.forecasts.items()}
    if found.ensemble is not None:
        tables["ensemble"] = found.ensemble
    return {
        "gates": found.gates and (found.gates.teachers, found.gates.layers, found.gates.means_LM),
        **{
            name: {
                "ids": table.sample_ids_N.tolist(),
                "overall": {key: value.hex() for key, value in table.overall().items()},
                "values": {key: v_NT.tobytes() for key, v_NT in table.values_NT.items()},
            }
            for name, table in tables.items()
        },
    }


def test_scores_are_the_same_bits_on_any_number_of_ranks(archive_url: str, tmp_path: Path) -> None:
    """5 and 22 sequences in batches of any size: some ranks have padding, or nothing else."""
    _score(Collectives(), archive_url, str(tmp_path))
    spawn_worlds((2, 3, 4), _score, archive_url, str(tmp_path))

    def load(world_size: int, rank: int) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(tmp_path / f"{world_size}-{rank}.pt")
        return loaded

    alone = load(1, 0)
    for name, found in alone.items():
        what = name.rpartition("-")[0]
        if what:
            assert found == alone[f"{what}-5"], "the size of batches matters"
    assert alone["first 3-5"]["model"]["ids"] == [0, 1, 2]
    assert alone["first 3-5"]["model"] != alone["val-5"]["model"]
    assert len(alone["drawn-5"]["ensemble"]["ids"]) == 5
    assert alone["network"]["gates"] is not None
    for world_size in (2, 3, 4):
        for rank in range(world_size):
            shared = load(world_size, rank)
            assert shared.keys() == alone.keys()
            assert not [name for name, found in alone.items() if shared[name] != found]
