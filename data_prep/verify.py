"""Prove an archive whole, or name everything that is broken in it.

Reads every byte of every object and trusts nothing but the manifest: sizes and sha256; of tars the
members and where they lie, crc32c, decoding, shape and dtype of every sample, and the sample
records; of Zarr arrays all that verify_zarr.py lists; and that no object is there that the manifest
does not know. Written apart from the training reader (tmu_dist.data.archive), so that an error in
one does not hide in the other.
"""

import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from typing import cast

import google_crc32c
from tqdm import tqdm

from data_prep.verify_zarr import KEY, Problem, check_codes, check_zarr_shard, check_zarr_split
from data_prep.writers.objects import PARTS_PREFIX, ROOT_GROUP_PATH, read_manifest
from data_prep.writers.webdataset import FRAMES_SUFFIX, META_SUFFIX, decode_frames
from tmu_dist.data import storage
from tmu_dist.data.manifest import (
    MANIFEST_PATH,
    REPORT_PATH,
    SPLITS,
    STATISTICS_PATH,
    Compression,
    Manifest,
    Shard,
    StoredObject,
    ZarrShard,
)

logger = logging.getLogger(__name__)


def verify_archive(url: str, *, show_progress: bool = True) -> list[Problem]:
    """Return everything that is broken in an archive; empty when it is whole.

    Raises:
        StorageError: there is no finished archive, or it cannot be reached.
        ManifestError: the manifest itself is damaged; nothing can be checked without it.
    """
    manifest = read_manifest(url)
    problems = list(_stray_objects(url, manifest))
    for stored in manifest.objects:
        problems += _read_object(url, stored)[1]
    seen_keys: set[str] = set()
    total = sum(map(manifest.num_samples, manifest.splits))
    with tqdm(total=total, unit=" samples", disable=not show_progress) as progress:
        for split, shards in manifest.splits.items():
            array = None
            if manifest.format == "zarr":
                array, found = check_zarr_split(url, manifest, split, seen_keys)
                problems += found
            first_id = 0
            for shard in shards:
                data, found = _read_object(url, shard)
                problems += found
                if data is not None and isinstance(shard, Shard):
                    problems += _check_tar(manifest, shard, data, first_id, seen_keys)
                elif data is not None and array is not None:
                    problems += check_zarr_shard(manifest, array, cast(ZarrShard, shard), data)
                first_id += shard.num_samples
                progress.update(shard.num_samples)
    return problems


def _stray_objects(url: str, manifest: Manifest) -> Iterator[Problem]:
    """Name objects in the splits' folders, or of reserved names, that the manifest lacks."""
    try:
        paths = storage.list_paths(url)
    except storage.StorageError as error:
        # Plain web servers cannot list; everything else can still be proven.
        logger.warning("Not looked for stray objects: %s", error)
        return
    shards = (shard.path for shards in manifest.splits.values() for shard in shards)
    listed = {MANIFEST_PATH, *shards, *(stored.path for stored in manifest.objects)}
    reserved = (STATISTICS_PATH, REPORT_PATH, ROOT_GROUP_PATH)
    for path in paths:
        if path not in listed and (path.split("/")[0] in SPLITS or path in reserved):
            yield Problem(path, "is not in the manifest")
    if any(path.startswith(PARTS_PREFIX) for path in paths):
        logger.info(
            "%s has pieces of an unfinished run in %s; they are no part of it, and the command "
            "that made it removes them when it is run again.",
            url,
            PARTS_PREFIX,
        )


def _read_object(
    url: str, stored: StoredObject | Shard | ZarrShard
) -> tuple[bytes | None, list[Problem]]:
    """Return an object's bytes, if it can be read, and what is wrong with it as a whole."""
    try:
        data = storage.read_bytes(url, stored.path)
    except storage.StorageError as error:
        return None, [Problem(stored.path, str(error))]
    if len(data) != stored.num_bytes:
        what = f"has {len(data)} bytes, the manifest says {stored.num_bytes}"
    elif (sha256 := hashlib.sha256(data).hexdigest()) != stored.sha256:
        what = f"has sha256 {sha256}, the manifest says {stored.sha256}"
    else:
        return data, []
    return data, [Problem(stored.path, what)]


def _check_tar(
    manifest: Manifest, shard: Shard, data: bytes, first_id: int, seen_keys: set[str]
) -> Iterator[Problem]:
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
            *_check_members(
                shard, index, pair, data, first_id + index, seen_keys, manifest.compression
            ),
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
        frames = decode_frames(payload, manifest.compression)
    except ValueError as error:
        yield str(error)
        return
    if frames.shape != manifest.sample_shape or frames.dtype != manifest.dtype:
        yield (
            f"holds {frames.dtype} of shape {frames.shape}, the manifest says "
            f"{manifest.dtype} of shape {manifest.sample_shape}"
        )
    else:
        yield from check_codes(frames, manifest.units)


def _check_members(
    shard: Shard,
    index: int,
    pair: list[tarfile.TarInfo],
    data: bytes,
    sample_id: int,
    seen_keys: set[str],
    compression: Compression,
) -> Iterator[str]:
    """Check the two tar members of a sample: names, place, and the record."""
    suffix = FRAMES_SUFFIX[compression]
    if len(pair) < 2:
        yield "its tar members are missing"
        return
    frames, meta = pair
    key = frames.name.removesuffix(suffix)
    if [frames.name, meta.name] != [key + suffix, key + META_SUFFIX] or not re.fullmatch(KEY, key):
        yield (
            f"its tar members are named {frames.name!r} and {meta.name!r}, "
            f"not KEY{suffix} and KEY{META_SUFFIX}"
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
