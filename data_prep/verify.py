"""Prove an archive whole, or name everything that is broken in it.

Reads every byte of every shard and trusts nothing but the manifest: sizes and sha256 of the shards,
the tar members and where they lie, crc32c, decoding, shape and dtype of every sample, the sample
records, and that no shard is there that the manifest does not know. Written apart from the training
reader (tmu_dist.data.archive), so that an error in one does not hide in the other.
"""

import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
from tqdm import tqdm

from data_prep.writers.webdataset import (
    FRAMES_SUFFIX,
    META_SUFFIX,
    decode_frames,
    read_manifest,
)
from tmu_dist.data import storage
from tmu_dist.data.manifest import SPLITS, Manifest, Shard

logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """One thing that is broken."""

    path: str
    """Object inside the archive."""
    what: str
    sample: int | None = None
    """Index in the shard; None when the shard as a whole is meant."""
    offset: int | None = None
    """Byte at which the sample's frames should start."""

    def __str__(self) -> str:
        sample = "" if self.sample is None else f", sample {self.sample} at byte {self.offset}"
        return f"{self.path}{sample}: {self.what}"


def verify_archive(url: str, *, show_progress: bool = True) -> list[Problem]:
    """Return everything that is broken in an archive; empty when it is whole.

    Raises:
        StorageError: there is no finished archive, or it cannot be reached.
        ManifestError: the manifest itself is damaged; nothing can be checked without it.
    """
    manifest = read_manifest(url)
    problems = list(_stray_objects(url, manifest))
    seen_keys: set[str] = set()
    total = sum(map(manifest.num_samples, manifest.splits))
    with tqdm(total=total, unit=" samples", disable=not show_progress) as progress:
        for shards in manifest.splits.values():
            first_id = 0
            for shard in shards:
                problems += _check_shard(url, manifest, shard, first_id, seen_keys)
                first_id += shard.num_samples
                progress.update(shard.num_samples)
    return problems


def _stray_objects(url: str, manifest: Manifest) -> Iterator[Problem]:
    """Name objects in the split folders that the manifest does not list."""
    try:
        paths = storage.list_paths(url)
    except storage.StorageError as error:
        # Plain web servers cannot list; everything else can still be proven.
        logger.warning("Not looked for stray objects: %s", error)
        return
    listed = {shard.path for shards in manifest.splits.values() for shard in shards}
    for path in paths:
        if path.split("/")[0] in SPLITS and path not in listed:
            yield Problem(path, "is not in the manifest")


def _check_shard(
    url: str, manifest: Manifest, shard: Shard, first_id: int, seen_keys: set[str]
) -> Iterator[Problem]:
    try:
        data = storage.read_bytes(url, shard.path)
    except storage.StorageError as error:
        yield Problem(shard.path, str(error))
        return
    if len(data) != shard.num_bytes:
        yield Problem(shard.path, f"has {len(data)} bytes, the manifest says {shard.num_bytes}")
    elif (sha256 := hashlib.sha256(data).hexdigest()) != shard.sha256:
        yield Problem(shard.path, f"has sha256 {sha256}, the manifest says {shard.sha256}")
    members, tar_problem = _tar_members(data)
    if tar_problem:
        yield Problem(shard.path, tar_problem)
    elif len(members) != 2 * shard.num_samples:
        yield Problem(
            shard.path,
            f"has {len(members)} tar members, the manifest's {shard.num_samples} samples "
            f"need {2 * shard.num_samples}",
        )
    for index in range(shard.num_samples):
        pair = members[2 * index : 2 * index + 2]
        problems = [
            *_check_frames(manifest, shard, index, data),
            *_check_members(shard, index, pair, data, first_id + index, seen_keys),
        ]
        for what in problems:
            yield Problem(shard.path, what, index, shard.offsets[index])


def _tar_members(data: bytes) -> tuple[list[tarfile.TarInfo], str | None]:
    """Return the members that can be read, and what stopped the reading if anything did."""
    members = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                members.append(member)
    except tarfile.TarError as error:
        return members, f"is no whole tar file: {error}"
    return members, None


def _check_frames(manifest: Manifest, shard: Shard, index: int, data: bytes) -> Iterator[str]:
    """Check the bytes that the manifest points at."""
    size = shard.sizes[index]
    payload = data[shard.offsets[index] : shard.offsets[index] + size]
    if len(payload) != size:
        yield f"only {len(payload)} of {size} bytes are there"
        return
    checksum = google_crc32c.value(payload)
    if checksum != shard.crc32c[index]:
        yield f"crc32c is {checksum:08x}, the manifest says {shard.crc32c[index]:08x}"
    try:
        frames = decode_frames(payload)
    except ValueError as error:
        yield str(error)
        return
    if frames.shape != manifest.sample_shape or frames.dtype != manifest.dtype:
        yield (
            f"holds {frames.dtype} of shape {frames.shape}, the manifest says "
            f"{manifest.dtype} of shape {manifest.sample_shape}"
        )


def _check_members(
    shard: Shard,
    index: int,
    pair: list[tarfile.TarInfo],
    data: bytes,
    sample_id: int,
    seen_keys: set[str],
) -> Iterator[str]:
    """Check the two tar members of a sample: names, place, and the record."""
    if len(pair) < 2:
        yield "its tar members are missing"
        return
    frames, meta = pair
    key = frames.name.removesuffix(FRAMES_SUFFIX)
    if [frames.name, meta.name] != [key + FRAMES_SUFFIX, key + META_SUFFIX] or not re.fullmatch(
        r"[A-Za-z0-9_-]+", key
    ):
        yield (
            f"its tar members are named {frames.name!r} and {meta.name!r}, "
            f"not KEY{FRAMES_SUFFIX} and KEY{META_SUFFIX}"
        )
    if key in seen_keys:
        yield f"its key {key!r} is used twice"
    seen_keys.add(key)
    if (frames.offset_data, frames.size) != (shard.offsets[index], shard.sizes[index]):
        yield (
            f"the tar has it at byte {frames.offset_data} with {frames.size} bytes, "
            f"the manifest says {shard.sizes[index]} bytes"
        )
    try:
        record = json.loads(data[meta.offset_data : meta.offset_data + meta.size])
    except ValueError as error:
        yield f"{meta.name} is no JSON: {error}"
        return
    if not isinstance(record, dict) or record.get("sample_id") != sample_id:
        yield f"{meta.name} does not say sample_id {sample_id}"
