"""Stores and folders of a run, as one node sees them: who can read and write them, and how fast.

All places are looked at side by side, each in a thread that may be given up, so that one that never
answers costs seconds and hides none of the others. What is read is what loaders read; what is
written goes into a folder of its own below the run folder, and is removed again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from tmu_dist.config import RunConfig
from tmu_dist.data.archive import open_archive
from tmu_dist.data.storage import (
    MissingObjectError,
    StorageError,
    delete,
    exists,
    join_url,
    list_paths,
    local_path,
    open_store,
    read_bytes,
    stream_bytes,
    write_bytes,
)
from tmu_dist.side_by_side import side_by_side

_PLACE_SECONDS = 25.0
"""Longer than a store that fails is asked again."""
_READ_SECONDS = 1.5
_WRITE_BYTES = 4 * 2**20
_MARK = "mark"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder or store that a run needs."""

    setting: str
    """Which names it: data.url."""
    url: str
    use: Literal["archive", "teacher", "memories", "output"]
    marks: tuple[str, ...] = ()
    """Files of which one must be there."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How long so many bytes took."""

    num_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Their quotient."""
        return self.num_bytes / max(self.seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class PlaceFacts:
    """What a node found at a place."""

    place: Place
    is_there: bool = True
    """A file that marks it is there; of an output: what another node wrote is seen."""
    error: str = ""
    """Why it cannot be used: out of reach, no rights, no such bucket, damaged."""
    read: Rate | None = None
    write: Rate | None = None
    copied_bytes: int = 0
    """Of all shards that are read through the node's cache."""
    largest_bytes: int = 0
    """Of the largest such shard."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a node is to look at."""

    places: tuple[Place, ...] = ()
    reading: Literal["auto", "cache", "range"] = "auto"
    cache_folder: str | None = None
    cache_gib: float | None = None
    probe: str = field(default_factory=lambda: f".doctor-{secrets.token_hex(4)}")
    """Folder below the run folder for what is written to try it."""
    is_marked: bool = False
    """Whether who asks has put a file there that nodes must see."""
    number: int = 0
    """Of the node: each reads another shard."""

    @property
    def copies(self) -> bool:
        """Whether the node's cache is used."""
        return self.reading != "range" and any(
            local_path(place.url) is None or (self.reading == "cache" and place.use == "archive")
            for place in self.places
            if place.use in ("archive", "teacher")
        )


def wanted_of(config: RunConfig, *, without: Sequence[str] = ()) -> Wanted:
    """What nodes are to look at for a run.

    Args:
        config: with absolute paths.
        without: folders that do not exist yet, and will be made.
    """
    from tmu_dist.data.manifest import MANIFEST_PATH
    from tmu_dist.run_folder import SELECTED_FILE
    from tmu_dist.teachers.card import CARD_FILE

    data = config.data
    archives = {"data.url": (data.url,), "data.mix_with": data.mix_with}
    places = [
        Place(setting=setting, url=url, use="archive", marks=(MANIFEST_PATH,))
        for setting, urls in archives.items()
        for url in urls
    ]
    places += [
        Place(setting="transfer.teachers", url=url, use="teacher", marks=(CARD_FILE, SELECTED_FILE))
        for url in config.transfer.teachers
    ]
    if config.placement.cache is not None:
        places.append(Place(setting="placement.cache", url=config.placement.cache, use="memories"))
    places.append(Place(setting="output", url=config.output, use="output"))
    return Wanted(
        places=tuple(place for place in places if place.url not in without),
        reading=data.reading,
        cache_folder=data.cache_folder,
        cache_gib=data.cache_gib,
    )


@contextmanager
def marked(wanted: Wanted) -> Iterator[Wanted]:
    """Put a file into the run folder that all nodes must see, while the block runs.

    If it cannot be written, nodes are not asked for it: they will say why themselves.
    """
    (output,) = (place.url for place in wanted.places if place.use == "output")
    probe = join_url(output, wanted.probe)
    made = _missing_folders(output)
    try:
        write_bytes(probe, _MARK, wanted.probe.encode())
    except StorageError:
        yield wanted
        return
    try:
        yield replace(wanted, is_marked=True)
    finally:
        with suppress(StorageError):
            delete(probe, _MARK)
        _remove_empty(probe, made)


def look_at_places(wanted: Wanted) -> list[PlaceFacts]:
    """Look at all places at once; none takes longer than 25 seconds."""
    looks = {place: partial(_look_at, place, wanted) for place in wanted.places}
    ends = side_by_side(looks, seconds=_PLACE_SECONDS)
    return [_facts_of(place, ends.get(place)) for place in wanted.places]


def _facts_of(place: Place, end: PlaceFacts | Exception | None) -> PlaceFacts:
    """What looking at a place came to: facts, an error, or no end in time."""
    match end:
        case PlaceFacts():
            return end
        case MissingObjectError():
            return PlaceFacts(place=place, is_there=False, error=str(end))
        case Exception():
            return PlaceFacts(place=place, error=str(end) or repr(end))
    return PlaceFacts(place=place, error=f"{place.url}: no answer within {_PLACE_SECONDS:.0f} s")


def _look_at(place: Place, wanted: Wanted) -> PlaceFacts:
    if place.use == "output":
        return _try_to_write(place, wanted)
    if place.use == "memories":
        open_store(place.url)
        list_paths(place.url, "nothing")
        return PlaceFacts(place=place)
    if not any(exists(place.url, mark) for mark in place.marks):
        read_bytes(place.url, place.marks[0])  # says whether there is a bucket at all
    return _read_shards(place, wanted) if place.use == "archive" else _read_model(place)


def _read_shards(place: Place, wanted: Wanted) -> PlaceFacts:
    """Read one shard, or as much of it as comes in a moment."""
    manifest = open_archive(place.url).manifest
    shards = [shard for split in ("train", "val") for shard in manifest.splits.get(split, ())]
    is_copied = wanted.reading == "cache" or (
        wanted.reading == "auto" and local_path(place.url) is None
    )
    shard = shards[wanted.number % len(shards)]
    facts = PlaceFacts(
        place=place,
        copied_bytes=is_copied * sum(each.num_bytes for each in shards),
        largest_bytes=is_copied * max(each.num_bytes for each in shards),
    )
    digest, done = hashlib.sha256(), 0
    started = time.monotonic()
    for chunk in stream_bytes(place.url, shard.path):
        digest.update(chunk)
        done += len(chunk)
        if time.monotonic() - started > _READ_SECONDS:
            break
    facts = replace(facts, read=Rate(num_bytes=done, seconds=time.monotonic() - started))
    if done == shard.num_bytes and digest.hexdigest() != shard.sha256:
        damage = "its content is not what the manifest says"
    elif done > shard.num_bytes or (done < shard.num_bytes and _has_ended(facts)):
        damage = f"it has {done:,} bytes, the manifest says {shard.num_bytes:,}"
    else:
        return facts
    return replace(facts, error=f"{join_url(place.url, shard.path)} is damaged: {damage}.")


def _has_ended(facts: PlaceFacts) -> bool:
    """Whether reading stopped at the end of the object, not at the end of the time."""
    return facts.read is not None and facts.read.seconds <= _READ_SECONDS


def _read_model(place: Place) -> PlaceFacts:
    from tmu_dist.teachers.store import WEIGHTS_FILE, locate

    folder = locate(place.url)
    started, done = time.monotonic(), 0
    for chunk in stream_bytes(folder, WEIGHTS_FILE):
        done += len(chunk)
        if time.monotonic() - started > _READ_SECONDS:
            break
    return PlaceFacts(place=place, read=Rate(num_bytes=done, seconds=time.monotonic() - started))


def _try_to_write(place: Place, wanted: Wanted) -> PlaceFacts:
    """Write, list, read back and delete an object, as a checkpoint is."""
    probe = join_url(place.url, wanted.probe)
    made = _missing_folders(place.url)
    sees_mark = not wanted.is_marked or exists(probe, _MARK)
    name, content = f"node-{secrets.token_hex(4)}", os.urandom(_WRITE_BYTES)
    try:
        started = time.monotonic()
        write_bytes(probe, name, content)
        written = time.monotonic()
        is_same = read_bytes(probe, name) == content
        read = time.monotonic()
        is_listed = name in list_paths(probe)
        delete(probe, name)
    finally:
        _remove_empty(probe, made)
    if not is_same or not is_listed:
        lack = "not what was written" if not is_same else "in no list of objects"
        return PlaceFacts(place=place, error=f"{probe}: what is read back is {lack}.")
    return PlaceFacts(
        place=place,
        is_there=sees_mark,
        write=Rate(num_bytes=_WRITE_BYTES, seconds=written - started),
        read=Rate(num_bytes=_WRITE_BYTES, seconds=read - written),
    )


def _missing_folders(url: str) -> list[Path]:
    """Folders on a disk that writing there would make, the lowest first."""
    folder = local_path(url)
    if folder is None:
        return []
    with suppress(OSError):  # who may not look there may not write there either, and is told so
        return [each for each in (folder, *folder.parents) if not each.exists()]
    return []


def _remove_empty(probe: str, made: Sequence[Path]) -> None:
    """Remove the probe's folder and what was made for it, unless somebody else uses it."""
    folder = local_path(probe)
    if folder is not None:
        with suppress(OSError):
            for each in (folder, *made):
                if each.exists():
                    each.rmdir()
