"""Rain from image files to scores: archives with missing pixels teach, train and are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from tests.conftest import TINY_MODEL
from tests.unit.test_training import assert_same, final_state
from tmu_dist.config import (
    DataConfig,
    LaunchConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    TransferConfig,
    WindowConfig,
)
from tmu_dist.evaluate import evaluate_model
from tmu_dist.training.launch import launch


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rain as tars and as Zarr: tiles of 16 x 16 pixels, one of four partly unobserved."""
    folder = tmp_path_factory.mktemp("rain")
    raw = folder / "raw"
    raw.mkdir()
    y, x = np.mgrid[:32, :32]
    for number in range(48):
        distance = ((x - number) % 32 - 16) ** 2 + (y - 14) ** 2
        pixels_HW = (160 * np.exp(-distance / 40)).astype(np.uint8)
        pixels_HW[20:, :10] = 255
        time = f"20160501{number // 12:02d}{5 * (number % 12):02d}"
        Image.fromarray(pixels_HW).save(raw / f"{time}.png")
    urls = {}
    for form in ("webdataset", "zarr"):
        urls[form] = str(folder / form)
        arguments = [
            *("radar", "--source", str(raw), "--reader", "images", "--out", urls[form]),
            *("--option", "quantity=reflectivity", "scale=0.25", "offset=0", "missing=255"),
            *("--tile", "16", "16", "--frames", "6", "--split-by", "time"),
            *("--split-gap-minutes", "0", "--evaluation-stride", "2"),
            *("--proportions", "train", "0.5", "val", "0.25", "test", "0.25"),
            *("--format", form, "--workers", "1", "--no-show-progress"),
        ]
        assert data_prep(arguments) == 0
        assert data_prep(["verify", urls[form]]) == 0
    return urls


def config(url: str, output: Path, transfer: TransferConfig | None = None) -> RunConfig:
    return RunConfig(
        output=str(output),
        window=WindowConfig(num_input_frames=3, num_target_frames=3),
        data=DataConfig(url=url),
        model=TINY_MODEL,
        transfer=transfer or TransferConfig(method="scratch"),
        training=TrainingConfig(num_steps=4, batch_size=4, sampling_stop_step=10),
        schedule=ScheduleConfig(log_every=1, validate_every=2, checkpoint_every=4),
        launch=LaunchConfig(launcher="local"),
    )


def test_a_student_of_rain_is_taught_and_scored_in_its_units(
    archives: dict[str, str], tmp_path: Path
) -> None:
    teacher = launch(config(archives["webdataset"], tmp_path / "teacher")).run
    transfer = TransferConfig(method="tmu", teachers=(teacher,))
    student = launch(config(archives["webdataset"], tmp_path / "student", transfer)).run
    result = evaluate_model(student, archives["webdataset"], flow="off")
    assert result.radar is not None
    assert result.radar.settings.threshold_label(0) == "20 dBZ"
    persistence = result.radar.forecasts["persistence"]
    assert 0 < persistence.mean("csi")[0] < 1
    observed = persistence.counts_TKX.sum(axis=-1)[:, 0]
    num_sequences = result.data.num_sequences
    # One of four tiles misses 12 x 10 of its pixels; no score may count them.
    missing = num_sequences // 4 * 12 * 10
    assert observed.tolist() == [num_sequences * 256 - missing] * 3


def test_tars_and_zarr_train_the_same_network(archives: dict[str, str], tmp_path: Path) -> None:
    runs = []
    for form, url in archives.items():
        runs.append(launch(config(url, tmp_path / form)).run)
    assert_same(final_state(runs[0]), final_state(runs[1]))
