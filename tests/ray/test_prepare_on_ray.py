"""Conversion as Ray tasks gives the bytes that it gives in one process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.pipeline import BadFilesError, OutputSettings, WorkSettings, build_archive
from data_prep.radar_plan import RadarPlanSettings
from data_prep.radar_source import RadarSettings, radar_source
from tmu_dist.data.manifest import Manifest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        hour, minute = divmod(5 * number, 60)
        field_HW = rng.integers(0, 160, (20, 24), dtype=np.uint8)
        Image.fromarray(field_HW).save(folder / f"20160501{hour:02d}{minute:02d}.png")
    return folder


def build(images: Path, out: Path, work: WorkSettings) -> Manifest:
    settings = RadarSettings(source=str(images), reader="images", option=("preset=paper",))
    source = radar_source(settings, RadarPlanSettings(frames=4))
    return build_archive(source, str(out), OutputSettings(samples_per_shard=5), work)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_ray_tasks_give_the_same_bytes(images: Path, tmp_path: Path) -> None:
    build(images, tmp_path / "here", WorkSettings(workers=1, show_progress=False))
    build(images, tmp_path / "ray", WorkSettings(launcher="ray", show_progress=False))
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")


def test_an_error_of_a_ray_task_is_the_error_of_the_command(images: Path, tmp_path: Path) -> None:
    (images / "201605010230.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    work = WorkSettings(launcher="ray", show_progress=False)
    with pytest.raises(BadFilesError, match=r"201605010230\.png"):
        build(images, tmp_path / "ray", work)
