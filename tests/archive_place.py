"""Archives of either format, in each way that they are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.descriptors import opened_by
from tmu_dist.data import storage
from tmu_dist.data.archive import Archive, open_archive
from tmu_dist.data.cache import NodeCache

WAYS = ("files", "cache", "ranges")


class Place(NamedTuple):
    """Where an archive is, and how it is read."""

    url: str
    cache: NodeCache | None

    def open(self) -> Archive:
        return open_archive(self.url, cache=self.cache)

    def shard(self, number: int) -> Any:
        """What the manifest says of a training shard."""
        return self.open().manifest.shards("train")[number]

    def read(self, path: str) -> bytes:
        return storage.read_bytes(self.url, path)

    def write(self, path: str, data: bytes) -> None:
        """Change the bytes of an object, in the same file if it is one."""
        folder = storage.local_path(self.url)
        if folder is None:
            storage.write_bytes(self.url, path, data)
        else:
            (folder / path).write_bytes(data)

    def change(self, number: int, edit: Callable[[bytes], bytes]) -> None:
        """Change the bytes of a training shard, in the same file if it is one."""
        path = self.shard(number).path
        self.write(path, edit(self.read(path)))

    def copy_of(self, number: int) -> Path:
        """The cache's file of a training shard."""
        assert self.cache is not None
        return self.cache.folder / self.shard(number).sha256


def place_of(way: str, folder: Path, write_archive: Callable[..., str], **options: Any) -> Place:
    """Write an archive to be read in one of the `WAYS`, given an empty folder."""
    url = str(folder / "archive") if way == "files" else f"memory://{folder}"
    cache = NodeCache(folder / "cache", 2**20) if way == "cache" else None
    return Place(write_archive(url, **options), cache)


def open_files(folder: Path) -> set[str]:
    """The files of a folder that this process has open or mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split(maxsplit=5)[5] for line in maps if str(folder) in line}
    return {path for path in found | opened_by(os.getpid()) if path.startswith(str(folder))}
