"""A folder of PNG images and one command; and the same command after SIGKILL."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from tmu_dist.data.archive import open_archive


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A day of radar images, one every six minutes."""
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    field_HW = rng.integers(0, 160, (60, 50), dtype=np.uint8)
    for number in range(160):
        hour, minute = divmod(6 * number, 60)
        frame_HW = np.roll(field_HW, number, axis=1)
        Image.fromarray(frame_HW).save(folder / f"2016-05-01_{hour:02d}{minute:02d}.png")
    return folder


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    return [
        *("radar", "--source", str(images), "--out", str(out), "--reader", "images"),
        *("--option", "preset=paper", "--frames", "6", "--split-by", "time"),
        *more,
    ]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_command_makes_a_valid_archive_of_a_folder_of_images(images: Path, tmp_path: Path):
    out = tmp_path / "archive"
    assert main(arguments(images, out, "--workers", "1")) == 0
    assert main(["verify", str(out)]) == 0
    archive = open_archive(str(out))
    assert set(archive.manifest.splits) == {"train", "val", "test"}
    assert archive.manifest.frame_interval_minutes == 6.0
    assert archive.manifest.units.unit == "dBZ"
    (first_TCHW,) = archive.read("train", [0])
    assert first_TCHW.shape == (6, 1, 60, 50)


def test_killed_in_the_middle_the_same_command_ends_in_the_same_bytes(images: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(images, whole, "--workers", "1")) == 0
    command = [sys.executable, "-m", "data_prep", *arguments(images, killed, "--workers", "2")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(killed.glob(".parts/*/job-*.json")) and process.poll() is None:
        assert time.monotonic() < deadline, "no job was finished in a minute"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists(), "it was too fast to be killed: use more images"
    subprocess.run(command, check=True, capture_output=True)
    assert contents(killed) == contents(whole)
