"""Original files: in a folder, or below a URL from which each is fetched while it is read.

A Zarr store is a folder that counts as one file. It cannot be fetched, so it must lie in a folder.
"""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tmu_dist.data import storage

_STORE_METADATA = ("zarr.json", ".zgroup", ".zmetadata")


def list_files(
    root: str, patterns: Sequence[str], include: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Find original files.

    Args:
        root: a folder or URL, or one file.
        patterns: shell patterns of file names, lower case; a file must match one of them.
        include: shell patterns of paths relative to `root`; where given, a file must also match
            one of these.

    Returns:
        Paths relative to `root`, sorted: those that match, and all others.

    Raises:
        ValueError: there is no such folder.
    """
    folder = storage.local_path(root)
    if folder is not None and (folder.is_file() or is_store(folder)):
        return [folder.name], []
    if folder is not None and not folder.is_dir():
        raise ValueError(f"There is no file or folder {root}: check --source.")
    matching: list[str] = []
    others: list[str] = []
    paths = storage.list_paths(root)
    if folder is not None:
        is_known_store = cache(is_store)  # a folder of a million files is looked at once
        paths = sorted({_store_of(folder, path, is_known_store) or path for path in paths})
    for path in paths:
        name = path.rpartition("/")[2].lower()
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and (
            not include or any(fnmatch.fnmatch(path, pattern) for pattern in include)
        )
        (matching if wanted else others).append(path)
    return matching, others


def describe(root: str, files: Sequence[str]) -> list[tuple[str, int]]:
    """Name and size in bytes of each file; of a Zarr store, of all that is in it."""
    folder = storage.local_path(_folder(root))
    if folder is None:
        return [(file, storage.object_size(root, file)) for file in files]
    return [(file, _num_bytes(folder / file)) for file in files]


@contextmanager
def local_file(root: str, file: str) -> Iterator[Path]:
    """A path under which the file can be opened; one from a URL is fetched and removed again.

    Only the file itself is fetched: a reader that looks at its neighbours needs a folder.
    """
    folder = storage.local_path(_folder(root))
    if folder is not None:
        yield folder / file
        return
    with tempfile.TemporaryDirectory(prefix="data-prep-") as temporary:
        # Under the folder's own name: some readers take a series' name from it.
        path = Path(temporary) / (root.rstrip("/").rpartition("/")[2] or "files") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.read_bytes(root, file))
        yield path


def _folder(root: str) -> str:
    """The folder that relative paths start from: of a single file or store, the one it lies in."""
    local = storage.local_path(root)
    is_one = local is not None and (local.is_file() or is_store(local))
    return str(local.parent) if local is not None and is_one else root


def is_store(folder: Path) -> bool:
    """Say whether a folder is a Zarr store."""
    return any((folder / name).is_file() for name in _STORE_METADATA)


def _store_of(folder: Path, path: str, is_store: Callable[[Path], bool]) -> str | None:
    """The outermost Zarr store below a folder that a path lies in, or None."""
    parts = path.split("/")[:-1]
    for length in range(1, len(parts) + 1):
        if is_store(folder.joinpath(*parts[:length])):
            return "/".join(parts[:length])
    return None


def _num_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path} is gone: it was there when the folder was listed.") from error
