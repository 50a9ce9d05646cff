"""Objects of an archive that are no shards: the manifest, small files, and what a run left behind.

A place is an archive only when it has its manifest, which is written when everything else is in
place. Objects below .parts/ belong to a run that is not finished; they are no part of an archive.

Not here: the two formats (webdataset.py, zarr_store.py).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tmu_dist.data import storage
from tmu_dist.data.manifest import (
    MANIFEST_PATH,
    REPORT_PATH,
    SPLITS,
    STATISTICS_PATH,
    Manifest,
    ManifestError,
    StoredObject,
)

PARTS_PREFIX = ".parts/"
"""Folder inside the archive's place for the pieces of an unfinished run."""

ROOT_GROUP_PATH = "zarr.json"
"""Metadata of the root group of an archive's Zarr store; written before all else of the store."""
ROOT_MARK = "tmu_dist_archive"
"""Attribute of that group which says that the store is an archive, finished or not."""

_TAR_PATH = re.compile(rf"({'|'.join(SPLITS)})/shard-\d{{6}}\.tar")
_ZARR_PATH = re.compile(rf"({'|'.join(SPLITS)})/([\w-]+/)*(zarr\.json|c(/\d+)*)")

logger = logging.getLogger(__name__)


class ArchiveExistsError(ValueError):
    """The place to write to already holds something else."""


def prepare_archive(
    url: str, created_by: Mapping[str, Any], *, overwrite: bool = False, parts: str | None = None
) -> Manifest | None:
    """Make a place ready for an archive.

    Args:
        url: where the archive will be.
        created_by: everything that determines its content, as the manifest will record it.
        overwrite: replace whatever archive is there, also a damaged one.
        parts: folder below `PARTS_PREFIX` that only runs which write the same bytes use. Pieces
            in it are kept, and then the shards that are there, too. All other pieces are removed.

    Returns:
        None when the archive can now be written, or the manifest of the finished archive when it is
        already there.

    Raises:
        ArchiveExistsError: a finished archive of other arguments is there, or a Zarr store that is
            no archive.
    """
    finished = storage.exists(url, MANIFEST_PATH)
    if finished and not overwrite:
        manifest = read_manifest(url)
        if manifest.created_by == created_by:
            _remove_parts(url, keep=None)
            return manifest
        raise ArchiveExistsError(
            f"{url} holds an archive made with other arguments "
            f"({_differences(manifest.created_by, created_by)}). Write to another place, or "
            "replace it with --overwrite."
        )
    leftovers = list(_leftovers(url))
    _remove_unfinished(url)
    if finished:
        storage.delete(url, MANIFEST_PATH)  # first, so that it never describes missing shards
    # Pieces go before shards: the record of a piece must not outlive the shard that it speaks of.
    _remove_parts(url, keep=parts)
    if parts is None or not storage.list_paths(url, parts):
        _remove(url, leftovers)
    return None


def without_default_compression(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without the compression where it is zstd, for `created_by`.

    Archives from before there was a choice have no such setting; the same command finds them still.
    """
    return {
        name: value for name, value in settings.items() if (name, value) != ("compression", "zstd")
    }


def write_object(url: str, path: str, data: bytes) -> StoredObject:
    """Write or replace one object and return what the manifest says of it."""
    storage.write_bytes(url, path, data)
    return StoredObject(path=path, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_manifest(url: str, manifest: Manifest) -> None:
    """Declare the archive finished.

    Removes what earlier runs left behind: shards that the manifest does not know, and all pieces.

    Raises:
        MissingObjectError: something that the manifest lists is not there.
        StorageError: it is there, of another size.
    """
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    listed = {stored.path: stored.num_bytes for stored in (*shards, *manifest.objects)}
    found = storage.list_objects(url)
    for path, num_bytes in listed.items():
        if path not in found:
            raise storage.MissingObjectError(
                f"{url} cannot be finished: {path} was removed while the archive was written. Run "
                "the same command again."
            )
        if found[path] != num_bytes:
            raise storage.StorageError(
                f"{url} cannot be finished: {path} has {found[path]} bytes and should have "
                f"{num_bytes}. Run the same command again, and no other one in the same place."
            )
    _remove(url, [path for path in _leftovers(url) if path not in listed])
    storage.write_bytes(url, MANIFEST_PATH, manifest.to_json().encode())
    _remove_parts(url, keep=None)
    _remove_unfinished(url)


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


def _leftovers(url: str) -> Iterator[str]:
    """Yield what archives write, and nothing that somebody else may have put there.

    Raises:
        ArchiveExistsError: there is a Zarr store that no archive began with.
    """
    paths = storage.list_paths(url)
    has_store = ROOT_GROUP_PATH in paths
    if has_store and not _is_marked(storage.read_text(url, ROOT_GROUP_PATH)):
        raise ArchiveExistsError(
            f"{url} holds a Zarr store that is no archive. Write to another place, or remove the "
            "store first."
        )
    ours = [p for p in paths if _TAR_PATH.fullmatch(p) or (has_store and _ZARR_PATH.fullmatch(p))]
    yield from ours
    if ours or has_store:
        names = (STATISTICS_PATH, REPORT_PATH, ROOT_GROUP_PATH)
        yield from (name for name in names if name in paths)


def _is_marked(root_group: str) -> bool:
    try:
        return ROOT_MARK in json.loads(root_group)["attributes"]
    except (ValueError, KeyError, TypeError):
        return False


def _remove(url: str, leftovers: list[str]) -> None:
    if leftovers:
        logger.info("Removing %d objects of an unfinished or replaced archive.", len(leftovers))
    storage.delete_many(url, [path for path in leftovers if path != ROOT_GROUP_PATH])
    if ROOT_GROUP_PATH in leftovers:  # last: without its mark, the rest would not be ours to remove
        storage.delete(url, ROOT_GROUP_PATH)


def _remove_parts(url: str, *, keep: str | None) -> None:
    """Remove pieces, except those in one folder."""
    folder = None if keep is None else keep.rstrip("/") + "/"
    paths = storage.list_paths(url, PARTS_PREFIX)
    storage.delete_many(url, [p for p in paths if folder is None or not p.startswith(folder)])


def _remove_unfinished(url: str) -> None:
    """Remove what killed processes left half-written of an archive's objects and pieces."""
    names = (STATISTICS_PATH, REPORT_PATH, ROOT_GROUP_PATH, MANIFEST_PATH)
    ours = []
    for path in storage.unfinished_files(url):
        whole = path.rpartition("#")[0]
        if (
            whole in names
            or whole.startswith(PARTS_PREFIX)
            or _TAR_PATH.fullmatch(whole)
            or _ZARR_PATH.fullmatch(whole)
        ):
            ours.append(path)
    storage.delete_unfinished(url, ours)


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
