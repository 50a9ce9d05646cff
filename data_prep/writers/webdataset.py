"""Samples to an archive in WebDataset's format: tar shards, each with whole sequences.

The format is docs/data_format.md. Nothing here knows where samples come from.

Not here: the manifest and other objects (objects.py), Zarr (zarr_store.py).

Shape letters: T time, C channels, H height, W width.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from data_prep.source import Codes
from tmu_dist.data import storage
from tmu_dist.data.manifest import TAR_BLOCK_BYTES, Compression, Shard

FRAMES_SUFFIX: Mapping[Compression, str] = {"zstd": ".frames.npy.zst", "none": ".frames.npy"}
"""By compression."""
META_SUFFIX = ".meta.json"

_ZSTD_LEVEL = 1  # on sequences with an empty background, higher levels gain a few percent only


class Sample(NamedTuple):
    """One sequence on its way into a shard."""

    key: str
    """Unique in the archive; letters, digits, "-" and "_" only."""
    frames_TCHW: Codes
    meta: Mapping[str, Any]
    """A few JSON values about the sample; `sample_id` (its position in the split) among them."""


def encode_frames(
    frames_TCHW: Codes,
    compression: Compression,
    compressor: zstandard.ZstdCompressor | None = None,
) -> bytes:
    """Return the stored form of a sample's frames: a little-endian npy file, compressed or not.

    Args:
        frames_TCHW: the frames.
        compression: of the npy file.
        compressor: from `new_compressor`, for many samples one after another; with one of its own
            each, small samples take three times as long. The bytes are the same.
    """
    npy = io.BytesIO()
    little_endian = frames_TCHW.dtype.newbyteorder("<")
    np.save(npy, np.ascontiguousarray(frames_TCHW, little_endian), allow_pickle=False)
    if compression == "none":
        return npy.getvalue()
    return (compressor or new_compressor()).compress(npy.getbuffer())


def new_compressor() -> zstandard.ZstdCompressor:
    """Return what compresses samples; for one thread."""
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL)


def decode_frames(payload: bytes, compression: Compression) -> NDArray[np.generic]:
    """Inverse of `encode_frames`.

    Raises:
        ValueError: the payload is no npy file, or not compressed as said.
    """
    kind = "npy array" if compression == "none" else "zstd-compressed npy array"
    try:
        npy = io.BytesIO(payload)
        if compression == "zstd":
            npy = io.BytesIO(zstandard.ZstdDecompressor().decompress(payload))
        frames_TCHW = np.load(npy, allow_pickle=False)
    except (zstandard.ZstdError, ValueError, EOFError) as error:
        raise ValueError(f"is no {kind}: {error}") from error
    if rest := npy.read():
        raise ValueError(f"is no {kind}: {len(rest)} bytes follow the array")
    return frames_TCHW


def shard_path(split: str, number: int) -> str:
    """Return the path of a shard inside its archive."""
    return f"{split}/shard-{number:06d}.tar"


def write_shard(
    url: str, path: str, samples: Iterable[Sample], compression: Compression = "zstd"
) -> Shard:
    """Write samples as one tar, whole or not at all, and return what the manifest says of it.

    Takes one sample at a time from `samples`, so that only the tar grows in memory.
    """
    suffix, compressor = FRAMES_SUFFIX[compression], new_compressor()
    tar_bytes = io.BytesIO()
    offsets, sizes, checksums = [], [], []
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            payload = encode_frames(sample.frames_TCHW, compression, compressor)
            offsets.append(_add_member(tar, tar_bytes, sample.key + suffix, payload))
            sizes.append(len(payload))
            checksums.append(google_crc32c.value(payload))
            meta = json.dumps(sample.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
            _add_member(tar, tar_bytes, sample.key + META_SUFFIX, meta.encode())
    data = tar_bytes.getbuffer()
    shard = Shard(
        path=path,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        offsets=tuple(offsets),
        sizes=tuple(sizes),
        crc32c=tuple(checksums),
    )
    storage.write_bytes(url, path, data)
    return shard


def _add_member(tar: tarfile.TarFile, file: io.BytesIO, name: str, data: bytes) -> int:
    """Append a member and return the byte at which its data starts."""
    # TarInfo's defaults (mtime, uid, gid 0, mode 644, no names) are what makes tars reproducible.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    start = file.tell()
    tar.addfile(member, io.BytesIO(data))
    return start + TAR_BLOCK_BYTES
