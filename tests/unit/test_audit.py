"""Leaks that were made on purpose are found; clean archives have none."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data_prep.audit import audit_archive, audit_archives, block_means
from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tmu_dist.data.manifest import Manifest, Units
from tmu_dist.data.storage import StorageError

MISSING = 255
SIZE = 48
NUM_FRAMES = 3


def rain(seed: int, size: int = SIZE) -> np.ndarray:
    """Frames_TCHW of blobs that change from frame to frame, dry in about the half of the field."""
    random = np.random.default_rng(seed)
    fields = [gaussian_filter(random.standard_normal((size, size)), 4) for _ in range(NUM_FRAMES)]
    scaled = [np.clip(field / field.std() * 60, 0, 254) for field in fields]
    return np.stack(scaled)[:, None].astype(np.uint8)


def write_archive(folder: Path, splits: dict[str, list], *, missing_code: int | None = MISSING):
    """Write samples (frames, or frames and record) as an archive of one shard a split."""
    shards = {}
    shape = None
    for split, samples in splits.items():
        made = []
        for number, sample in enumerate(samples):
            frames, meta = sample if isinstance(sample, tuple) else (sample, {})
            shape = frames.shape
            made.append(Sample(f"{split}-{number}", frames, {"sample_id": number, **meta}))
        shards[split] = (write_shard(str(folder), shard_path(split, 0), made),)
    assert shape is not None
    units = Units(
        quantity="reflectivity",
        unit="dBZ",
        scale=0.25,
        offset=0.0,
        max_code=254 if missing_code else 255,
        missing_code=missing_code,
    )
    manifest = Manifest(
        name="made-up",
        num_frames=shape[0],
        channels=shape[1],
        height=shape[2],
        width=shape[3],
        units=units,
        frame_interval_minutes=5.0,
        splits=shards,
        created_by={},
    )
    write_manifest(str(folder), manifest)
    return str(folder)


def found(leaks) -> list[tuple]:
    return [(leak.kind, leak.first[1:], leak.second[1:]) for leak in leaks]


def test_different_rain_is_no_leak(tmp_path):
    splits = {"train": range(20), "val": range(20, 24), "test": range(24, 30)}
    url = write_archive(tmp_path, {s: [rain(i) for i in seeds] for s, seeds in splits.items()})
    audit = audit_archives([url])
    assert audit.leaks == ()
    assert audit.frames == {"train": 60, "val": 12, "test": 18}
    assert (audit.uninformative, audit.too_plain) == (0, 0)
    assert "No two splits share a frame" in str(audit)


def test_a_shared_frame_is_named_with_both_places(tmp_path):
    leaking = rain(30)
    leaking[2] = rain(3)[1]
    url = write_archive(
        tmp_path, {"train": [rain(i) for i in range(5)], "test": [rain(29), leaking]}
    )
    leaks = audit_archive(url)
    assert found(leaks) == [("identical", ("train", 3, 1), ("test", 1, 2))]
    assert str(leaks[0]) == (
        f"identical: {url} train sample 3, frame 1 and {url} test sample 1, frame 2: "
        "the same pixels"
    )


def test_validation_against_test_counts_too(tmp_path):
    url = write_archive(tmp_path, {"train": [rain(0)], "val": [rain(1)], "test": [rain(1)]})
    assert found(audit_archive(url)) == [
        ("identical", ("val", 0, frame), ("test", 0, frame)) for frame in range(NUM_FRAMES)
    ]


def test_what_one_split_repeats_is_no_leak(tmp_path):
    """Overlapping windows: the same frames again and again, in one split."""
    url = write_archive(tmp_path, {"train": [rain(0), rain(0)[::-1]], "test": [rain(1)]})
    audit = audit_archives([url])
    assert audit.leaks == ()
    assert audit.frames["train"] == NUM_FRAMES


def test_a_noisy_copy_is_similar(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.audit._ROWS", 4)  # several pieces each way
    monkeypatch.setattr("data_prep.audit._COLUMNS", 5)
    noise = np.random.default_rng(0).integers(-20, 21, rain(2).shape)
    copy = np.clip(rain(2).astype(int) + noise, 0, 254).astype(np.uint8)
    url = write_archive(tmp_path, {"train": [rain(i) for i in range(5)], "test": [rain(9), copy]})
    assert found(audit_archive(url)) == [
        ("similar", ("train", 2, frame), ("test", 1, frame)) for frame in range(NUM_FRAMES)
    ]
    assert audit_archives([url], min_correlation=0.99999).leaks == ()
    assert audit_archives([url], max_distance=0).leaks == ()


def test_a_brighter_copy_of_another_resolution_in_another_archive_is_similar(tmp_path):
    large = rain(2, size=96)
    small = large.reshape(NUM_FRAMES, 1, 48, 2, 48, 2).mean(axis=(3, 5))
    small = (small * 0.7 + 20).astype(np.uint8)
    one = write_archive(tmp_path / "one", {"train": [large], "test": [rain(7, size=96)]})
    other = write_archive(tmp_path / "other", {"train": [rain(8)], "test": [small]})
    assert audit_archive(one) == audit_archive(other) == []
    leaks = audit_archives([one, other]).leaks
    assert [leak.kind for leak in leaks] == ["similar"] * NUM_FRAMES
    assert {(leak.first.url, leak.second.url) for leak in leaks} == {(one, other)}


def test_two_archives_may_train_with_the_same_frames(tmp_path):
    one = write_archive(tmp_path / "one", {"train": [rain(0)]})
    other = write_archive(tmp_path / "other", {"train": [rain(0)], "test": [rain(1)]})
    assert audit_archives([one, other]).leaks == ()
    third = write_archive(tmp_path / "third", {"train": [rain(1)]})
    assert len(audit_archives([one, other, third]).leaks) == NUM_FRAMES
    with pytest.raises(ValueError, match="different archives"):
        audit_archives([one, one])


def test_frames_without_information_are_counted_not_compared(tmp_path):
    """Dry frames are equal everywhere; so are frames that one radar does not cover at all."""
    dry = np.zeros((NUM_FRAMES, 1, SIZE, SIZE), np.uint8)
    dry[..., :10] = MISSING
    dry[1] = MISSING
    url = write_archive(tmp_path, {"train": [rain(0), dry], "test": [rain(1), dry]})
    audit = audit_archives([url])
    assert audit.leaks == ()
    assert audit.uninformative == 2 * NUM_FRAMES
    # Where every pixel is a measurement, the same two values are information.
    url = write_archive(
        tmp_path / "all", {"train": [rain(0), dry], "test": [rain(1), dry]}, missing_code=None
    )
    assert [leak.kind for leak in audit_archive(url)] == ["identical"]


def test_little_rain_is_too_plain_to_be_similar(tmp_path):
    """One small shower at the same place is chance, unless its pixels are equal."""

    def shower(value: int) -> np.ndarray:
        frames = np.zeros((NUM_FRAMES, 1, SIZE, SIZE), np.uint8)
        frames[..., 20:23, 20:23] = value
        return frames

    url = write_archive(tmp_path, {"train": [shower(90)], "test": [shower(91)]})
    audit = audit_archives([url])
    assert audit.leaks == () and audit.too_plain == 2
    url = write_archive(tmp_path / "same", {"train": [shower(90)], "test": [shower(90)]})
    assert [leak.kind for leak in audit_archive(url)] == ["identical"]


def test_missing_pixels_do_not_make_frames_similar(tmp_path):
    """Two quiet fields under one radar's mask share the mask, and that is no likeness."""

    def masked(seed: int) -> np.ndarray:
        frames = rain(seed)
        frames[..., :24, :] = MISSING
        return frames

    url = write_archive(tmp_path, {"train": [masked(i) for i in range(4)], "test": [masked(9)]})
    assert audit_archive(url) == []


def test_overlapping_times_of_one_series_are_a_leak(tmp_path):
    def timed(seed, start, end, series="nl"):
        return rain(seed), {"start": start, "end": end, "series": series}

    url = write_archive(
        tmp_path,
        {
            "train": [
                timed(0, "2020-01-01T00:00:00Z", "2020-01-01T01:00:00Z"),
                timed(1, "2020-01-01T00:30:00Z", "2020-01-01T00:40:00Z"),
                timed(2, "2020-01-01T05:00:00Z", "2020-01-01T06:00:00Z"),
            ],
            "test": [
                timed(10, "2020-01-01T00:50:00Z", "2020-01-01T02:00:00Z"),
                timed(11, "2020-01-01T03:00:00Z", "2020-01-01T04:55:00Z"),
                timed(12, "2020-01-01T05:30:00Z", "2020-01-01T05:35:00Z", series="be"),
                timed(13, "2019-12-31T23:00:00Z", "2020-01-01T09:00:00Z"),
                timed(14, "2020-01-01T04:55:00Z", "2020-01-01T05:00:00Z"),
            ],
        },
    )
    leaks = audit_archive(url)
    assert [(leak.kind, leak.second.sample_id) for leak in leaks] == [
        ("same_time", 0),
        ("same_time", 3),
        ("same_time", 4),
    ]
    assert leaks[0].first.sample_id == 0
    assert "same times of nl" in leaks[0].what


def test_digits_do_not_leak(archive_url):
    audit = audit_archives([archive_url])
    assert [leak for leak in audit.leaks if leak.kind != "similar"] == []
    assert set(audit.frames) == {"train", "val", "test"}


def test_there_must_be_an_archive(tmp_path):
    with pytest.raises(StorageError, match="not a finished archive"):
        audit_archive(str(tmp_path))


def test_block_means_are_over_observed_pixels():
    codes = np.full((1, 2, 32, 35), 10, np.uint8)
    codes[0, 0, :2, :2] = [[30, 255], [255, 255]]
    codes[0, 1, :2, :2] = 255
    codes[0, :, 2:4, :2] = 255
    means = block_means(codes, 255).reshape(16, 16)
    assert means[0, 0] == 30
    assert np.isnan(means[1, 0])
    assert np.isnan(means).sum() == 1
    assert means[0, 1] == 10
    assert block_means(codes[..., :5, :7], None).shape == (1, 35)
