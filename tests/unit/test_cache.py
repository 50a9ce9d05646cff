"""The node cache: what it hands out is the object, it keeps its limit, and says what is wrong."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pickle
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.descriptors import opened_by
from tests.object_server import ObjectServer, object_server
from tmu_dist.data import cache as cache_module
from tmu_dist.data import cache_folder, storage
from tmu_dist.data.cache import (
    AlteredObjectError,
    CachedFiles,
    CacheLimitError,
    CacheStats,
    LocalFiles,
    NodeCache,
    default_cache_folder,
    node_cache,
    object_files,
)
from tmu_dist.files import WriteError

SIZE = 1000


class Stored:
    """Objects on a server, as a manifest would describe them."""

    def __init__(self, server: ObjectServer) -> None:
        self.server = server

    def add(self, path: str, num_bytes: int = SIZE, seed: str = "") -> tuple[str, str, int, str]:
        """Store an object; return what `NodeCache.open` wants to know of it."""
        word = hashlib.sha256((seed or path).encode()).digest()
        data = (word * (num_bytes // len(word) + 1))[:num_bytes]
        self.server.objects[path] = data
        return self.server.url, path, num_bytes, hashlib.sha256(data).hexdigest()


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with object_server() as running:
        yield running


@pytest.fixture
def stored(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Stored:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(cache_module, "_RETRY_SECONDS", 0.001)
    return Stored(server)


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache", 3 * SIZE)


def content(file: int) -> bytes:
    try:
        return os.pread(file, 10**7, 0)
    finally:
        os.close(file)


def held(cache: NodeCache) -> set[str]:
    """Names of all files in the folder."""
    return {path.name for path in cache.folder.iterdir()}


def eventually(happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_an_object_is_fetched_once(stored: Stored, cache: NodeCache) -> None:
    shard = stored.add("train/shard-0.tar")
    assert cache.fetch(*shard)
    for _ in range(3):
        assert content(cache.open(*shard)) == stored.server.objects["train/shard-0.tar"]
    assert not cache.fetch(*shard)
    assert stored.server.gets == {"train/shard-0.tar": 1}
    assert cache.stats() == CacheStats(objects_fetched=1, bytes_fetched=SIZE, hits=4)
    assert held(cache) == {shard[3]}, "no locks and no partial files are left"


def test_other_processes_find_the_copies(stored: Stored, cache: NodeCache) -> None:
    shard = stored.add("a")
    cache.fetch(*shard)
    sent = pickle.loads(pickle.dumps(cache))
    assert (sent.folder, sent.limit_bytes) == (cache.folder, cache.limit_bytes)
    assert not sent.fetch(*shard)
    assert sent.stats() == CacheStats(0, 0, 1)


def test_equal_objects_are_one_file_and_equal_paths_are_two(
    stored: Stored, cache: NodeCache
) -> None:
    first = stored.add("one/train/shard-0.tar", seed="x")
    same = stored.add("two/train/shard-0.tar", seed="x")
    other = stored.add("three/train/shard-0.tar", seed="y")
    assert cache.fetch(*first) and not cache.fetch(*same) and cache.fetch(*other)
    assert len(held(cache)) == 2


def test_an_empty_object(stored: Stored, cache: NodeCache) -> None:
    assert content(cache.open(*stored.add("empty", 0))) == b""


def test_threads_race_for_one_object(stored: Stored, cache: NodeCache) -> None:
    shard = stored.add("a")
    half_sent = stored.server.hold("a")
    with ThreadPoolExecutor(8) as threads:
        opened = [threads.submit(cache.open, *shard) for _ in range(8)]
        assert half_sent.wait(10)
        time.sleep(0.05)
        assert not any(one.done() for one in opened)
        stored.server.go_on.set()
        assert {content(one.result()) for one in opened} == {stored.server.objects["a"]}
    assert stored.server.gets["a"] == 1
    assert cache.stats() == CacheStats(1, SIZE, 7)


def test_what_was_used_longest_ago_goes_first(stored: Stored, cache: NodeCache) -> None:
    a, b, c, d, e = (stored.add(name) for name in "abcde")
    for shard in (a, b, c):
        cache.fetch(*shard)
        age(cache, shard, 100)
    os.close(cache.open(*a))
    cache.fetch(*d)
    assert held(cache) == {a[3], c[3], d[3]}
    age(cache, a, 50)
    pickle.loads(pickle.dumps(cache)).touch(c[3])
    cache.fetch(*e)
    assert held(cache) == {c[3], d[3], e[3]}


def age(cache: NodeCache, shard: tuple[str, str, int, str], seconds: float) -> None:
    before = time.time() - seconds
    os.utime(cache.folder / shard[3], (before, before))


def test_touching_costs_a_disk_access_a_second_at_most(stored: Stored, cache: NodeCache) -> None:
    shard = stored.add("a")
    cache.fetch(*shard)
    age(cache, shard, 100)
    before = (cache.folder / shard[3]).stat().st_mtime_ns
    assert cache.touch(shard[3])
    assert (cache.folder / shard[3]).stat().st_mtime_ns == before
    elsewhere = pickle.loads(pickle.dumps(cache))
    assert elsewhere.touch(shard[3])
    assert (cache.folder / shard[3]).stat().st_mtime_ns > before
    assert not elsewhere.touch("0" * 64)
    assert not elsewhere.touch("0" * 64)


def test_what_is_released_goes_before_all_others(stored: Stored, cache: NodeCache) -> None:
    a, b, c, d, e, f = (stored.add(name) for name in "abcdef")
    for shard in (a, b, c):
        cache.fetch(*shard)
    age(cache, a, 200)
    age(cache, b, 100)
    cache.release(c[3])
    pickle.loads(pickle.dumps(cache)).touch(c[3])  # by a reader that is a little late
    cache.fetch(*d)
    assert held(cache) == {a[3], b[3], d[3]}
    cache.release(d[3])
    cache.release(b[3])
    assert cache.keep(b[3]) and not cache.keep(c[3])
    cache.fetch(*e)
    assert held(cache) == {a[3], b[3], e[3]}
    cache.fetch(*f)
    assert held(cache) == {b[3], e[3], f[3]}, "b was kept after all"
    cache.release(d[3])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_released_ones_the_first_goes_first(
    stored: Stored, cache: NodeCache, order: tuple[int, int]
) -> None:
    shards = [stored.add(name) for name in "abc"]
    for shard in shards:
        cache.fetch(*shard)
    for number in order:
        cache.release(shards[number][3])
        time.sleep(0.002)
    cache.fetch(*stored.add("d"))
    assert shards[order[0]][3] not in held(cache) and shards[order[1]][3] in held(cache)


def test_what_is_fetched_again_is_no_longer_released(stored: Stored, cache: NodeCache) -> None:
    a, b, c, d = (stored.add(name) for name in "abcd")
    for shard in (a, b, c):
        cache.fetch(*shard)
    cache.release(b[3])
    assert not cache.fetch(*b)
    age(cache, c, 100)
    cache.fetch(*d)
    assert held(cache) == {a[3], b[3], d[3]}


def test_what_is_open_stays_readable(stored: Stored, cache: NodeCache) -> None:
    a = stored.add("a")
    file = cache.open(*a)
    for name in "bcd":
        cache.fetch(*stored.add(name))
    assert a[3] not in held(cache)
    assert content(file) == stored.server.objects["a"]


def test_room_is_made_before_a_download(stored: Stored, cache: NodeCache) -> None:
    for name in "abc":
        cache.fetch(*stored.add(name))
    d = stored.add("d", 2 * SIZE)
    half_sent = stored.server.hold("d")
    with ThreadPoolExecutor(1) as thread:
        fetching = thread.submit(cache.fetch, *d)
        assert half_sent.wait(10)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) == 3 * SIZE
        assert (cache.folder / f"{d[3]}.part").stat().st_size == 2 * SIZE
        stored.server.go_on.set()
        assert fetching.result()


def test_downloads_wait_for_room_that_others_use(stored: Stored, cache: NodeCache) -> None:
    """Never above the limit: the second big object is not begun before the first is done."""
    small, first, second = stored.add("s"), stored.add("a", 2 * SIZE), stored.add("b", 2 * SIZE)
    cache.fetch(*small)
    half_sent = stored.server.hold("a")
    with ThreadPoolExecutor(2) as threads:
        fetching = threads.submit(cache.fetch, *first)
        assert half_sent.wait(10)
        waiting = threads.submit(cache.fetch, *second)
        assert eventually(lambda: f"{second[3]}.part" in held(cache))
        time.sleep(0.1)
        assert not stored.server.gets["b"]
        assert small[3] in held(cache), "removing it now would not help"
        stored.server.go_on.set()
        assert fetching.result() and waiting.result()
    assert second[3] in held(cache) and first[3] not in held(cache)


def test_an_object_larger_than_the_limit(stored: Stored, cache: NodeCache) -> None:
    exact, larger = stored.add("a", 3 * SIZE), stored.add("b", 3 * SIZE + 1)
    assert cache.fetch(*exact)
    with pytest.raises(CacheLimitError, match=r"/b has .* raise data\.cache_gib"):
        cache.fetch(*larger)
    assert held(cache) == {exact[3]} and not stored.server.gets["b"]


def test_leftovers_of_killed_processes_go(stored: Stored, cache: NodeCache) -> None:
    cache.folder.mkdir()
    dead, alive = (cache.folder / f"{word * 32}.part" for word in ("aa", "bb"))
    dead.write_bytes(bytes(2 * SIZE))
    alive.write_bytes(bytes(2 * SIZE))
    stranger = cache.folder / "notes.txt"
    stranger.write_bytes(bytes(10 * SIZE))
    own = stored.add("a")
    (cache.folder / f"{own[3]}.part").write_bytes(b"x" * 10 * SIZE)
    with alive.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert content(cache.open(*own)) == stored.server.objects["a"]
    assert held(cache) == {own[3], alive.name, stranger.name}


def test_what_gets_its_name_while_room_is_made_counts_once(
    stored: Stored, cache: NodeCache
) -> None:
    a, b = stored.add("a"), stored.add("b")
    cache.fetch(*a)
    cache.fetch(*b)
    seen_before = cache.folder / f"{b[3]}.part"
    seen_before.write_bytes(bytes(SIZE))
    with seen_before.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        cache.fetch(*stored.add("c"))
    assert {a[3], b[3]} < held(cache)


@pytest.mark.parametrize("wrong", [b"y" * SIZE, b"y" * (SIZE - 1), b"y" * (SIZE + 1), b""])
def test_an_altered_object(stored: Stored, cache: NodeCache, wrong: bytes) -> None:
    url, path, num_bytes, sha256 = stored.add("train/shard-0.tar")
    right = stored.server.objects[path]
    stored.server.objects[path] = wrong
    came = "more than 1,000" if len(wrong) > SIZE else f"{len(wrong):,}"
    with pytest.raises(AlteredObjectError) as caught:
        cache.open(url, path, num_bytes, sha256)
    for named in (f"{url}/train/shard-0.tar", f"{came} bytes", "1,000 bytes", sha256, "verify"):
        assert named in str(caught.value)
    assert stored.server.gets[path] == 3
    assert not held(cache)
    stored.server.objects[path] = right
    assert content(cache.open(url, path, num_bytes, sha256)) == right


def test_of_an_object_that_does_not_end_no_more_is_read(
    stored: Stored, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(url: str, path: str) -> Iterator[bytes]:
        yield bytes(SIZE)
        yield bytes(SIZE)
        raise AssertionError("two chunks are more than the manifest says")

    monkeypatch.setattr(storage, "stream_bytes", endless)
    with pytest.raises(AlteredObjectError, match="more than 1,000 bytes"):
        cache.open(*stored.add("a"))


def test_one_bad_transfer_is_repeated(stored: Stored, cache: NodeCache) -> None:
    shard = stored.add("a")
    stored.server.once["a"] = b"y" * SIZE
    assert content(cache.open(*shard)) == stored.server.objects["a"]
    assert stored.server.gets["a"] == 2


def test_a_missing_object(stored: Stored, cache: NodeCache) -> None:
    shard = stored.add("a")
    del stored.server.objects["a"]
    with pytest.raises(storage.MissingObjectError, match="/a does not exist"):
        cache.open(*shard)
    assert not held(cache)


def test_a_copy_that_was_damaged_on_disk(stored: Stored, cache: NodeCache) -> None:
    shard = stored.add("a")
    cache.fetch(*shard)
    copy = cache.folder / shard[3]
    copy.write_bytes(b"y" * SIZE)
    assert content(cache.open(*shard)) == b"y" * SIZE, "not hashed again at every opening"
    cache.discard(shard[3])
    cache.discard(shard[3])
    assert content(cache.open(*shard)) == stored.server.objects["a"]
    copy.write_bytes(b"y")
    assert content(cache.open(*shard)) == stored.server.objects["a"]


def test_the_folder_is_emptied_under_a_download(stored: Stored, cache: NodeCache) -> None:
    shard = stored.add("a")
    half_sent = stored.server.hold("a")
    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(cache.open, *shard)
        assert half_sent.wait(10)
        shutil.rmtree(cache.folder)
        stored.server.go_on.set()
        assert content(opening.result()) == stored.server.objects["a"]
    assert held(cache) == {shard[3]}


def test_waiting_long_is_told(
    stored: Stored,
    cache: NodeCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cache_folder, "_PATIENCE_SECONDS", 0.01)
    shard = stored.add("a")
    half_sent = stored.server.hold("a")
    with ThreadPoolExecutor(2) as threads:
        fetching = [threads.submit(cache.fetch, *shard)]
        assert half_sent.wait(10)
        fetching.append(threads.submit(cache.fetch, *shard))
        assert eventually(lambda: "Waiting for others to finish" in caplog.text)
        stored.server.go_on.set()
        assert sorted(one.result() for one in fetching) == [False, True]
    assert f"{shard[0]}/a" in caplog.text


# Full and unusable disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(stored: Stored, small_disk: Path) -> None:
    cache = NodeCache(small_disk / "cache", 2**30)
    a, b, c, d = (stored.add(name, 300_000) for name in "abcd")
    for shard in (a, b, c, d):
        assert content(cache.open(*shard)) == stored.server.objects[shard[1]]
    assert held(cache) == {b[3], c[3], d[3]}, "what was used longest ago goes for the new one"
    (small_disk / "of others").write_bytes(bytes(100_000))
    large = stored.add("large", 1_000_000)
    with pytest.raises(WriteError) as caught:
        cache.open(*large)
    for named in (
        str(cache.folder),
        "full",
        "free",
        "data.cache_folder",
        "data.cache_gib",
        "large",
    ):
        assert named in str(caught.value)
    assert not held(cache) and not stored.server.gets["large"]
    assert content(cache.open(*a)) == stored.server.objects["a"]


def test_on_a_full_disk_downloads_of_others_are_waited_for(
    stored: Stored, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocation is refused as long as the first object is under way: it will make room."""
    first, second = stored.add("a"), stored.add("b")
    allocate = os.posix_fallocate

    def full_disk(file: int, offset: int, num_bytes: int) -> None:
        if cache.folder.joinpath(first[3]).exists() or stored.server.gets["a"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    half_sent = stored.server.hold("a")
    with ThreadPoolExecutor(2) as threads:
        fetching = threads.submit(cache.fetch, *first)
        assert half_sent.wait(10)
        waiting = threads.submit(cache.fetch, *second)
        time.sleep(0.1)
        assert not waiting.done()
        stored.server.go_on.set()
        assert fetching.result()
        with pytest.raises(WriteError, match="is full"):  # the disk stays full in this test
            waiting.result()
    assert not held(cache)


def test_on_a_full_disk_nobody_waits_for_those_who_wait(
    stored: Stored, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two downloads without any room: neither is a reason for the other to hope."""

    def full_disk(file: int, offset: int, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    cache.folder.mkdir()
    locked = os.open(cache.folder, os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)
    with ThreadPoolExecutor(2) as threads:
        fetching = [threads.submit(cache.fetch, *stored.add(name)) for name in "ab"]
        assert eventually(lambda: len(held(cache)) == 2)
        os.close(locked)
        for one in fetching:
            with pytest.raises(WriteError, match="is full"):
                one.result(timeout=10)
    assert not held(cache)


def test_a_folder_that_cannot_be_used(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = NodeCache(tmp_path / "file" / "cache", SIZE)
    with pytest.raises(WriteError, match=r"cannot take http.*/a: .*data\.cache_folder"):
        cache.open(*stored.add("a"))


def test_a_folder_that_cannot_be_locked(
    stored: Stored, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(WriteError, match=r"a disk of this machine.*data\.cache_folder"):
        cache.open(*stored.add("a"))


# Objects of an archive


def test_files_of_an_archive(stored: Stored, cache: NodeCache, tmp_path: Path) -> None:
    _, path, num_bytes, sha256 = stored.add("train/a")
    archive = tmp_path / "archive"
    (archive / "train").mkdir(parents=True)
    (archive / "train" / "a").write_bytes(stored.server.objects["train/a"])
    for url, used, kind in (
        (str(archive), None, LocalFiles),
        (f"file://{archive}", None, LocalFiles),
        (stored.server.url, cache, CachedFiles),
        (str(archive), cache, CachedFiles),
    ):
        files = object_files(url, used)
        assert type(files) is kind
        assert content(files.open(path, num_bytes, sha256)) == stored.server.objects["train/a"]
        files.touch(sha256)
        assert files.discard(sha256) == (kind is CachedFiles), "another copy may be right"
        with pytest.raises(storage.MissingObjectError, match="train/b does not exist"):
            files.open("train/b", num_bytes, "0" * 64)
    assert object_files(stored.server.url, None) is None
    assert (archive / "train" / "a").exists() and not held(cache)


def test_a_local_object_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(storage.StorageError, match="Could not open .*file/a: Not a directory"):
        LocalFiles(tmp_path / "file").open("a", 1, "0" * 64)


# Settings


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TMU_DIST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_cache_folder() == tmp_path / ".cache" / "tmu_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "tmu_dist"
    monkeypatch.setenv("TMU_DIST_CACHE", "~/disk")
    assert default_cache_folder() == tmp_path / "disk"
    assert node_cache(None, 1).folder == tmp_path / "disk"
    assert node_cache("~/here", 1).folder == tmp_path / "here"


def test_limit_by_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet"
    assert node_cache(str(folder), 0.5).limit_bytes == 2**29
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(CacheLimitError, match=r"data\.cache_gib"):
            node_cache(str(folder), wrong)
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert node_cache(str(folder), None).limit_bytes == 4000
    folder.mkdir(parents=True)
    (folder / ("a" * 64)).write_bytes(bytes(5000))
    (folder / "foreign").write_bytes(bytes(5000))
    assert node_cache(str(folder), None).limit_bytes == 8000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    (folder / ("a" * 64)).unlink()
    with pytest.raises(CacheLimitError, match=r"is full.*data\.cache_folder"):
        node_cache(str(folder), None)
    with pytest.raises(CacheLimitError, match="positive limit"):
        NodeCache(folder, 0)


def test_a_limit_below_the_working_set_is_refused(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 2**30)
    cache.check_working_set(2**30)
    with pytest.raises(CacheLimitError) as caught:
        cache.check_working_set(int(2.5 * 2**30) + 1)
    for named in ("1 GiB", "2.5 GiB", "at least 2.51", "data.shuffle_lanes", "data.shuffle_window"):
        assert named in str(caught.value)
    node_cache(str(tmp_path), 2.51).check_working_set(int(2.5 * 2**30) + 1)


def test_no_descriptor_is_left_open(stored: Stored, cache: NodeCache) -> None:
    a, missing = stored.add("a"), stored.add("b")
    del stored.server.objects["b"]
    with pytest.raises(storage.MissingObjectError):
        cache.open(*missing)
    for shard in (a, a, *(stored.add(name) for name in "cdef")):
        cache.fetch(*shard)
    opened = opened_by(os.getpid())
    assert opened and not [name for name in opened if name.startswith(str(cache.folder))]


def test_threads_with_too_little_room(stored: Stored, tmp_path: Path) -> None:
    """Every read is right, and the folder never above its limit, when all fight for room."""
    cache = NodeCache(tmp_path / "cache", 5 * SIZE)
    shards = [stored.add(f"s{number}", SIZE + number) for number in range(12)]
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, size_of(cache.folder))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()

    def read(number: int) -> bool:
        shard = shards[number * 7 % len(shards)]
        return content(cache.open(*shard)) == stored.server.objects[shard[1]]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(200)))
    done.set()
    watcher.join()
    assert 3 * SIZE < most <= 5 * SIZE


def size_of(folder: Path) -> int:
    """Bytes in a cache's folder at one moment: with its lock, nobody can take more or less.

    What gets its name meanwhile counts once.
    """
    try:
        locked = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    fcntl.flock(locked, fcntl.LOCK_EX)
    sizes: dict[str, int] = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            sizes[path.name.removesuffix(".part")] = path.stat().st_size
    os.close(locked)
    return sum(sizes.values())
