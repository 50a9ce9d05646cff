"""Folders on a disk or in an object store, by address, whose parts are whole or not there at all.

An address is a local path or a URL of `tmu_dist.data.storage`, which also reads from any of them.
On a disk, files and folders are written beside their final names and renamed (`tmu_dist.files`). A
store puts a single object whole, but cannot rename a folder: there the files of a folder are put
one by one, and the last one, its mark, says that the others are there. A folder without its mark is
never listed, and the next `keep_folders` sweeps it away. On a disk `sweep_unfinished` does that.

Not here: what the files are, and locks.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tmu_dist.data import storage
from tmu_dist.files import atomic_directory, atomic_write_text, sweep

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 10.0
"""How often growing files are put in a store."""


def write_text(address: str, path: str, text: str) -> None:
    """Write or replace a text file; readers see the old one or the whole new one.

    Raises:
        WriteError: on a disk that is full or not writable.
        StorageError: a store that refuses or cannot be reached.
    """
    folder = storage.local_path(address)
    if folder is not None:
        atomic_write_text(folder / path, text)
    else:
        storage.write_bytes(address, path, text.encode())


def write_folder(
    address: str,
    files: Mapping[str, bytes | memoryview],
    before_change: Callable[[], None] = lambda: None,
) -> None:
    """Write or replace a folder that appears whole or not at all.

    Args:
        address: the folder itself.
        files: content by file name; a store gets them in this order, so the last one must be the
            mark by which the folder is listed.
        before_change: called before anything changes that others can see: the rename of a folder
            on a disk, every object of a store. What it raises ends the writing.

    Raises:
        WriteError, StorageError: as in `write_text`; nothing can be seen of the new folder.
    """
    folder = storage.local_path(address)
    if folder is not None:
        with atomic_directory(folder, before_change) as staging:
            for name, content in files.items():
                (staging / name).write_bytes(content)
        return
    *_, mark = files
    before_change()
    if storage.exists(address, mark):  # or new files would stand under the old mark
        storage.delete(address, mark)
    for name, content in files.items():
        before_change()
        storage.write_bytes(address, name, content)


def list_folders(address: str, parent: str, mark: str) -> list[str]:
    """Return the paths of a folder's whole subfolders, such as `parent/NAME`, sorted.

    Args:
        address: the folder.
        parent: the subfolder whose subfolders are meant; "" for the folder itself.
        mark: the file that every whole one has.
    """
    found = map(PurePosixPath, storage.list_objects(address, parent))
    here = PurePosixPath(parent)
    return sorted(
        str(path.parent)
        for path in found
        # A hidden one is being written, or was, on a disk.
        if path.name == mark and path.parent.parent == here and path.parent.name[0] != "."
    )


def keep_folders(address: str, parent: str, mark: str, keep: Collection[str]) -> None:
    """Remove a folder's subfolders but those in `keep`, and what a killed process left of others.

    The mark of a subfolder goes first, so that nothing half removed is ever listed. No other
    process may be writing below `parent`.
    """
    here = PurePosixPath(parent)
    doomed = []
    for path in storage.list_objects(address, parent):
        inside = PurePosixPath(path).relative_to(here).parts
        if len(inside) > 1 and inside[0][0] != "." and str(here / inside[0]) not in keep:
            doomed.append(path)
    for path in doomed:
        if PurePosixPath(path).name == mark:
            storage.delete(address, path)
    storage.delete_many(address, [p for p in doomed if PurePosixPath(p).name != mark])


def sweep_unfinished(address: str, parent: str, name: str | None = None) -> None:
    """Remove what killed processes left half written below a folder on a disk.

    In a store nobody can tell what is unfinished from what another process is writing: there
    `keep_folders` does it. No other process may be writing below `parent`, or what has this name.

    Raises:
        WriteError: something cannot be removed.
    """
    folder = storage.local_path(address)
    if folder is not None:
        sweep(folder / parent, name)


class Mirror:
    """A local folder whose files are put in a store: for files that grow, which objects cannot.

    Args:
        url: where the files go; a store's.
        before_put: called before every file; what it raises keeps the store as it is.
    """

    def __init__(self, url: str, before_put: Callable[[], None] = lambda: None) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="tmu-dist-")
        self.folder = Path(self._scratch.name)
        self._url = url
        self._before_put = before_put
        self._published: dict[Path, tuple[int, int]] = {}
        self._one_at_a_time = threading.Lock()  # or older content could replace newer
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._publish_often, daemon=True)

    def publish(self) -> None:
        """Put every file that changed since the last time.

        Raises:
            StorageError: a file could not be put; the next call puts it again.
            Whatever `before_put` raises.
        """
        with self._one_at_a_time:
            for file in sorted(self.folder.rglob("*")):
                if file.is_file():
                    facts = file.stat()
                    state = facts.st_size, facts.st_mtime_ns
                    if self._published.get(file) != state:
                        path = file.relative_to(self.folder).as_posix()
                        self._before_put()
                        storage.write_bytes(self._url, path, file.read_bytes())
                        self._published[file] = state

    def start(self) -> None:
        """Publish every few seconds from now on; a store out of reach is warned of."""
        self._thread.start()

    def close(self) -> None:
        """Publish the rest, if that was started and the store takes it; remove the folder."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
            self._publish_if_possible()
        self._scratch.cleanup()

    def _publish_often(self) -> None:
        pause = PUBLISH_SECONDS
        while not self._closed.wait(pause):
            started = time.monotonic()
            self._publish_if_possible()
            # Files grow and each copy is of the whole: never more than a tenth of the time.
            pause = max(PUBLISH_SECONDS, 10 * (time.monotonic() - started))

    def _publish_if_possible(self) -> None:
        try:
            self.publish()
        except storage.StorageError as error:
            log.warning("%s is not up to date: %s", self._url, error)
        except ValueError as error:  # `before_put` forbids it
            log.warning("%s", error)
            self._closed.set()


@contextmanager
def local_folder(address: str) -> Iterator[Path]:
    """Yield a local folder to write results into; a store gets them when the block ends well.

    On a disk it is the folder itself, which need not exist yet.
    """
    folder = storage.local_path(address)
    if folder is not None:
        yield folder
        return
    mirror = Mirror(address)
    try:
        yield mirror.folder
        mirror.publish()
    finally:
        mirror.close()
