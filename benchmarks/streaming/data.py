"""What the benchmark reads: the same samples in every format, all written from one array.

Digits are Moving MNIST as `data_prep moving-mnist` makes it; radar is rain of the Netherlands as
`data_prep radar` cuts it out of KNMI's files, or synthetic fields where those are not at hand. A
place is one folder:

    samples.npy              uncompressed, for memmap; what all else is made from
    samples.zst, .ends.npy   samples compressed one by one, end to end (places named *-zstd)
    tars/                    an archive of this project, uncompressed or by zstd
    zarr/                    an archive of this project (*-zstd)
    zarr-samples/            a Zarr array with one chunk a sample

Not here: formats of other loaders (contenders.py writes them in their environments).

Shape letters: N samples, T time, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zstandard
from numpy.typing import NDArray

from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from data_prep.pipeline import OutputSettings, WorkSettings, build_archive
from data_prep.radar_plan import RadarPlanSettings
from data_prep.radar_source import RadarSettings, radar_source
from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from data_prep.writers.zarr_store import (
    ZarrLayout,
    create_split,
    finish_store,
    write_frames,
    zarr_shards,
)
from data_prep.writers.zarr_tables import FrameAxis, ZarrSample
from tmu_dist.data.archive import open_archive
from tmu_dist.data.manifest import Compression, Manifest, Units

_DBZ = Units(
    quantity="reflectivity", unit="dBZ", scale=70 / 254, offset=0.0, max_code=254, missing_code=255
)
_INTENSITY = Units(
    quantity="intensity", unit="1", scale=1 / 255, offset=0.0, max_code=255, missing_code=None
)
_SHARD_BYTES = 64 << 20
"""Of samples in a tar, before compression; as data_prep has it."""
_ZARR_SHARD_BYTES = 128 << 20
_KNMI_FRAMES, _FRAMES, _TILE, _TILE_STEP = 92, 20, 256, 64
_CROP = (150, 90, _TILE + 3 * _TILE_STEP, _TILE + 5 * _TILE_STEP)
"""Top, left, height and width in KNMI's grid: the country, and room for 4 x 6 tiles."""


def write_places(folder: Path, knmi: Path | None, *, quick: bool) -> dict[str, str]:
    """Write digits-raw, digits-zstd, radar-raw and radar-zstd, each once.

    Args:
        folder: where the places go.
        knmi: KNMI's files of 2010-08-26; None: synthetic radar.
        quick: fewer samples.

    Returns:
        What the samples are, by name of the data.
    """
    sources: Mapping[str, tuple[Units, Any]] = {
        "digits": (_INTENSITY, lambda: _digits(1024 if quick else 4096)),
        "radar": (_DBZ, lambda: _radar(knmi, stride=12 if quick else 6)),
    }
    for name, (units, make) in sources.items():
        raw, compressed = folder / f"{name}-raw", folder / f"{name}-zstd"
        if (compressed / "finished").exists():
            continue
        samples_NTCHW = make()
        _write_npy(raw / "samples.npy", samples_NTCHW)
        compressed.mkdir(exist_ok=True)
        os.link(raw / "samples.npy", compressed / "samples.npy")
        _write_frames_end_to_end(compressed, samples_NTCHW)
        _write_tars(raw, samples_NTCHW, units, "none")
        _write_tars(compressed, samples_NTCHW, units, "zstd")
        write_zarr_archive(str(compressed / "zarr"), {"train": samples_NTCHW}, units)
        _write_zarr_samples(raw, samples_NTCHW, None)
        _write_zarr_samples(compressed, samples_NTCHW, zarr.codecs.ZstdCodec(level=1))
        (compressed / "finished").touch()
    return {
        "digits": "Moving MNIST, two digits, 20 frames of 64x64 (82 KB)",
        "radar": "20 frames of 256x256 (1.3 MB), "
        + ("rain over the Netherlands, 2010-08-26 (KNMI)" if knmi else "SYNTHETIC fields"),
    }


def read_afresh(folder: Path) -> None:
    """Put all files of a folder into the page cache by reading them in order.

    Files just written lie there in pieces as large as the writes were, and small ones are read half
    as fast. Read from disk they lie there alike, whoever wrote them.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.read(1 << 20):
                    pass


def _digits(count: int) -> NDArray[np.uint8]:
    with tempfile.TemporaryDirectory() as folder:
        config = MovingMNISTConfig(digits=2, train=count, val=1, test=1)
        write_moving_mnist(config, folder, show_progress=False)
        return open_archive(folder).read("train", range(count))  # type: ignore[return-value]


def _radar(knmi: Path | None, stride: int) -> NDArray[np.uint8]:
    if knmi is None:
        return _synthetic_radar(stride)
    with tempfile.TemporaryDirectory() as folder:
        source = radar_source(
            RadarSettings(source=str(knmi), crop=_CROP),
            RadarPlanSettings(
                frames=_FRAMES,
                stride=stride,
                proportions={"train": 1.0},
                tile=(_TILE, _TILE),
                tile_step=(_TILE_STEP, _TILE_STEP),
            ),
        )
        build_archive(source, folder, OutputSettings(), WorkSettings(show_progress=False))
        archive = open_archive(folder)
        count = archive.manifest.num_samples("train")
        return archive.read("train", range(count))  # type: ignore[return-value]


def _synthetic_radar(stride: int) -> NDArray[np.uint8]:
    """Return as many samples as KNMI's files give: cells of 5 km that drift, two thirds dry."""
    rng = np.random.default_rng(0)
    height, width = _CROP[2:]
    rows, columns = np.mgrid[:height, :width]
    dbz_THW = np.zeros((_KNMI_FRAMES, height, width), np.float32)
    for _ in range(60):
        y, x = rng.uniform(-0.3, 1.0, 2) * (height, width)
        size, peak = rng.uniform(5, 25), rng.uniform(20, 50)
        for t in range(_KNMI_FRAMES):
            distance_HW = (rows - y - 1.5 * t) ** 2 + (columns - x - 2.0 * t) ** 2
            dbz_THW[t] = np.maximum(dbz_THW[t], peak * np.exp(-distance_HW / (2 * size**2)))
    dbz_THW *= rng.uniform(0.9, 1.0, dbz_THW.shape)
    codes_THW = np.where(dbz_THW < 5, 0, np.round(dbz_THW / _DBZ.scale)).astype(np.uint8)
    starts = range(0, _KNMI_FRAMES - _FRAMES + 1, stride)
    corners = itertools.product(*(range(0, n - _TILE + 1, _TILE_STEP) for n in (height, width)))
    return np.stack(
        [
            codes_THW[t : t + _FRAMES, None, y : y + _TILE, x : x + _TILE]
            for t, (y, x) in itertools.product(starts, list(corners))
        ]
    )


def _write_npy(path: Path, samples_NTCHW: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True)
    np.save(path, samples_NTCHW)


def _write_frames_end_to_end(place: Path, samples_NTCHW: NDArray[np.uint8]) -> None:
    compress = zstandard.ZstdCompressor(level=1).compress
    blobs = [compress(frames_TCHW.data) for frames_TCHW in samples_NTCHW]
    (place / "samples.zst").write_bytes(b"".join(blobs))
    np.save(place / "samples.zst.ends.npy", np.cumsum([len(blob) for blob in blobs]))


def _write_tars(
    place: Path, samples_NTCHW: NDArray[np.uint8], units: Units, compression: Compression
) -> None:
    url = str(place / "tars")
    per_shard = max(1, _SHARD_BYTES // samples_NTCHW[0].nbytes)
    shards = []
    for number, first in enumerate(range(0, len(samples_NTCHW), per_shard)):
        samples = (
            Sample(f"sample-{i:06d}", samples_NTCHW[i], {"sample_id": i})
            for i in range(first, min(first + per_shard, len(samples_NTCHW)))
        )
        shards.append(write_shard(url, shard_path("train", number), samples, compression))
    manifest = _manifest(samples_NTCHW, units, splits={"train": tuple(shards)})
    write_manifest(url, manifest(compression=compression))


def write_zarr_archive(
    url: str, samples: Mapping[str, NDArray[np.uint8]], units: Units, **fields: Any
) -> None:
    """Write the sequences [N, T, C, H, W] of each split end to end, in chunks and shards of
    data_prep's default size; `fields` are more of the manifest's."""
    splits, created = {}, []
    for split, samples_NTCHW in samples.items():
        num_samples, num_frames, channels, height, width = samples_NTCHW.shape
        frames_NCHW = samples_NTCHW.reshape(-1, channels, height, width)
        layout = ZarrLayout(
            url=url,
            split=split,
            units=units,
            num_frames=len(frames_NCHW),
            channels=channels,
            height=height,
            width=width,
            dtype="uint8",
            frames_per_shard=_ZARR_SHARD_BYTES // (height * width),
        )
        axis = FrameAxis(
            [f"sequence-{i}" for i in range(num_samples) for _ in range(num_frames)],
            [float(t) for _ in range(num_samples) for t in range(num_frames)],
            is_clock=False,
        )
        entries = [
            ZarrSample(f"sample-{i:06d}", i * num_frames, 0, 0, 1.0, {"sample_id": i})
            for i in range(num_samples)
        ]
        created += create_split(layout, axis, entries, title="benchmark")
        written = [
            write_frames(layout, number, frames_NCHW[frames.start : frames.stop])
            for number in range(layout.num_shards)
            for frames in (layout.shard_frames(number),)
        ]
        splits[split] = zarr_shards(layout, written, entries)
    manifest = _manifest(next(iter(samples.values())), units, splits=splits, **fields)
    write_manifest(url, manifest(format="zarr", objects=finish_store(url, created)))


def _manifest(samples_NTCHW: NDArray[np.uint8], units: Units, **fields: Any) -> Any:
    """Return the manifest's constructor, with all that both formats have in common."""
    _, num_frames, channels, height, width = samples_NTCHW.shape
    return functools.partial(
        Manifest,
        name="streaming-benchmark",
        num_frames=num_frames,
        channels=channels,
        height=height,
        width=width,
        units=units,
        frame_interval_minutes=None,
        created_by={"source": "benchmarks/streaming/data.py"},
        **fields,
    )


def _write_zarr_samples(place: Path, samples_NTCHW: NDArray[np.uint8], compressor: Any) -> None:
    per_shard = max(1, _SHARD_BYTES // samples_NTCHW[0].nbytes)
    array = zarr.create_array(
        place / "zarr-samples",
        shape=samples_NTCHW.shape,
        dtype="uint8",
        chunks=(1, *samples_NTCHW.shape[1:]),
        shards=(per_shard, *samples_NTCHW.shape[1:]),
        compressors=compressor,
    )
    for first in range(0, len(samples_NTCHW), per_shard):
        array[first : first + per_shard] = samples_NTCHW[first : first + per_shard]
