"""Samples to an archive: WebDataset tar shards and, last of all, the manifest.

The format is docs/data_format.md. A folder is an archive only when it has its manifest, and that is
written when every shard is in place. Nothing here knows where samples come from.

Shape letters: T time, C channels, H height, W width.
"""

import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from tmu_dist.data import storage
from tmu_dist.data.manifest import (
    MANIFEST_PATH,
    SPLITS,
    TAR_BLOCK_BYTES,
    Manifest,
    ManifestError,
    Shard,
)

FRAMES_SUFFIX = ".frames.npy.zst"
META_SUFFIX = ".meta.json"

_ZSTD_LEVEL = 1  # on sequences with an empty background, higher levels gain a few percent only
_SHARD_PATH = re.compile(rf"({'|'.join(SPLITS)})/shard-\d{{6}}\.tar")

logger = logging.getLogger(__name__)


class ArchiveExistsError(ValueError):
    """The place to write to already holds something else."""


class Sample(NamedTuple):
    """One sequence on its way into a shard."""

    key: str
    """Unique in the archive; letters, digits, "-" and "_" only."""
    frames_TCHW: NDArray[np.uint8]
    meta: Mapping[str, Any]
    """A few JSON values about the sample; `sample_id` (its position in the split) among them."""


def encode_frames(frames_TCHW: NDArray[np.uint8]) -> bytes:
    """Return the stored form of a sample's frames: an npy file, compressed with zstd."""
    npy = io.BytesIO()
    np.save(npy, np.ascontiguousarray(frames_TCHW), allow_pickle=False)
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(npy.getvalue())


def decode_frames(payload: bytes) -> NDArray[np.generic]:
    """Inverse of `encode_frames`.

    Raises:
        ValueError: the payload is no compressed npy file.
    """
    try:
        npy = zstandard.ZstdDecompressor().decompress(payload)
        return np.load(io.BytesIO(npy), allow_pickle=False)
    except (zstandard.ZstdError, ValueError, EOFError) as error:
        raise ValueError(f"is no zstd-compressed npy array: {error}") from error


def shard_path(split: str, number: int) -> str:
    """Return the path of a shard inside its archive."""
    return f"{split}/shard-{number:06d}.tar"


def write_shard(url: str, path: str, samples: Iterable[Sample]) -> Shard:
    """Write samples as one tar, whole or not at all, and return what the manifest says of it."""
    tar_bytes = io.BytesIO()
    offsets, sizes, checksums = [], [], []
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            payload = encode_frames(sample.frames_TCHW)
            offsets.append(_add_member(tar, tar_bytes, sample.key + FRAMES_SUFFIX, payload))
            sizes.append(len(payload))
            checksums.append(google_crc32c.value(payload))
            meta = json.dumps(sample.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
            _add_member(tar, tar_bytes, sample.key + META_SUFFIX, meta.encode())
    data = tar_bytes.getvalue()
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


def prepare_archive(
    url: str, created_by: Mapping[str, Any], *, overwrite: bool = False
) -> Manifest | None:
    """Make a place ready for an archive.

    Args:
        url: where the archive will be.
        created_by: everything that determines its content, as the manifest will record it.
        overwrite: replace whatever archive is there, also a damaged one.

    Returns:
        None when the shards and the manifest can now be written, or the manifest of the finished
        archive when it is already there.

    Raises:
        ArchiveExistsError: a finished archive of other arguments is there.
    """
    if storage.exists(url, MANIFEST_PATH):
        if not overwrite:
            manifest = read_manifest(url)
            if manifest.created_by == created_by:
                return manifest
            raise ArchiveExistsError(
                f"{url} holds an archive made with other arguments "
                f"({_differences(manifest.created_by, created_by)}). Write to another place, or "
                "replace it with --overwrite."
            )
        storage.delete(url, MANIFEST_PATH)  # first, so that it never describes missing shards
    leftovers = [path for path in storage.list_paths(url) if _SHARD_PATH.fullmatch(path)]
    if leftovers:
        logger.info("Removing %d shards of an unfinished or replaced archive.", len(leftovers))
    for path in leftovers:
        storage.delete(url, path)
    return None


def write_manifest(url: str, manifest: Manifest) -> None:
    """Declare the archive finished; every shard must be in place."""
    storage.write_bytes(url, MANIFEST_PATH, manifest.to_json().encode())


def read_manifest(url: str) -> Manifest:
    """Return the manifest of a finished archive.

    Raises:
        MissingObjectError: there is no manifest, so no finished archive.
        ManifestError: the manifest is damaged or of another schema.
    """
    try:
        return Manifest.from_json(storage.read_text(url, MANIFEST_PATH))
    except storage.MissingObjectError as error:
        raise storage.MissingObjectError(
            f"{url} is not a finished archive: it has no {MANIFEST_PATH}."
        ) from error
    except ManifestError as error:
        raise ManifestError(f"{storage.join_url(url, MANIFEST_PATH)}: {error}") from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Say which values of two records differ, nested ones by dotted name."""
    parts = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            parts.append(_differences(before, after, f"{prefix}{key}."))
        elif before != after:
            parts.append(f"{prefix}{key} {before!r} there, {after!r} here")
    return "; ".join(part for part in parts if part)
