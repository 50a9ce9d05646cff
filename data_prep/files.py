"""Original files: in a folder, or below a URL from which each is fetched while it is read."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tmu_dist.data import storage


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
    if folder is not None and folder.is_file():
        return [folder.name], []
    if folder is not None and not folder.is_dir():
        raise ValueError(f"There is no file or folder {root}: check --source.")
    matching: list[str] = []
    others: list[str] = []
    for path in storage.list_paths(root):
        name = path.rpartition("/")[2].lower()
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and (
            not include or any(fnmatch.fnmatch(path, pattern) for pattern in include)
        )
        (matching if wanted else others).append(path)
    return matching, others


def describe(root: str, files: Sequence[str]) -> list[tuple[str, int]]:
    """Name and size in bytes of each file."""
    return [(file, storage.object_size(_folder(root), file)) for file in files]


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
    """The folder that relative paths start from: of a single file, its own."""
    local = storage.local_path(root)
    return str(local.parent) if local is not None and local.is_file() else root
