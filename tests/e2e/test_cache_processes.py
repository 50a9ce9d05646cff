"""The node cache between real processes: races, SIGKILL at any moment, two jobs on one folder."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.object_server import ObjectServer, object_server
from tests.unit.test_cache import eventually, size_of

SIZE = 200_000

READER = """
import hashlib, os, random, sys
from pathlib import Path
from tmu_dist.data.cache import NodeCache

folder, limit, url, seed, num_reads, *names = sys.argv[1:]
cache = NodeCache(Path(folder), int(limit))
chosen = random.Random(int(seed))
print("ready", flush=True)
for _ in range(int(num_reads)):
    path, num_bytes, sha256 = chosen.choice(names).split(":")
    file = cache.open(url, path, int(num_bytes), sha256)
    data = os.pread(file, 10**7, 0)
    assert hashlib.sha256(data).hexdigest() == sha256, path
    os.close(file)
print(*cache.stats(), flush=True)
"""

PREFETCHER = """
import sys, threading
from pathlib import Path
from tmu_dist.data.cache import NodeCache
from tmu_dist.data.prefetch import ShardPrefetcher, Use

folder, limit, url, *names = sys.argv[1:]
cache = NodeCache(Path(folder), int(limit))

def fetch(name):
    path, num_bytes, sha256 = name.split(":")
    return cache.fetch(url, path, int(num_bytes), sha256)

uses = (Use(name, 1, number, number) for number, name in enumerate(names))
prefetcher = ShardPrefetcher(fetch, lambda name: True, lambda name: None, uses, ahead_bytes=10)
sys.stdin.readline()
prefetcher.close()
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with object_server() as running:
        yield running


def store(server: ObjectServer, names: Sequence[str], num_bytes: int = SIZE) -> list[str]:
    """Store objects; return how the scripts are told of them."""
    stored = []
    for name in names:
        data = random.Random(name).randbytes(num_bytes)
        server.objects[name] = data
        stored.append(f"{name}:{num_bytes}:{hashlib.sha256(data).hexdigest()}")
    return stored


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(server: ObjectServer, tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start_one(
        script: str, limit: int, *arguments: object, url: str = server.url
    ) -> subprocess.Popen[str]:
        words = [tmp_path / "cache", limit, url, *arguments]
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, ...]:
    """Wait for a reader's end; return objects fetched, bytes fetched and hits."""
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return tuple(map(int, said.split()[-3:]))


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_processes_race_for_one_object(server: ObjectServer, start: Start) -> None:
    (shard,) = store(server, ["a"])
    half_sent = server.hold("a")
    readers = [start(READER, SIZE, 0, 1, shard) for _ in range(4)]
    assert half_sent.wait(60)
    for reader in readers:
        assert reader.stdout and reader.stdout.readline() == "ready\n"
    time.sleep(0.1)
    server.go_on.set()
    assert sorted(finish(reader) for reader in readers) == [(0, 0, 1)] * 3 + [(1, SIZE, 0)]
    assert server.gets["a"] == 1


def test_a_waiting_process_goes_on_where_one_was_killed(
    server: ObjectServer, start: Start, tmp_path: Path
) -> None:
    (shard,) = store(server, ["a"])
    half_sent = server.hold("a")
    first = start(READER, SIZE, 0, 1, shard)
    assert half_sent.wait(60)
    waiting = start(READER, SIZE, 0, 1, shard)
    assert waiting.stdout and waiting.stdout.readline() == "ready\n"
    time.sleep(0.1)
    assert server.gets["a"] == 1
    (part,) = (tmp_path / "cache").iterdir()
    assert part.suffix == ".part" and part.stat().st_size == SIZE
    kill(first)
    assert eventually(lambda: server.gets["a"] == 2)
    server.go_on.set()
    assert finish(waiting) == (1, SIZE, 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [shard[-64:]]


def test_room_of_a_killed_process_is_free(
    server: ObjectServer, start: Start, tmp_path: Path
) -> None:
    first, second = store(server, ["a", "b"])
    half_sent = server.hold("a")
    killed = start(READER, SIZE, 0, 1, first)
    assert half_sent.wait(60)
    kill(killed)
    assert finish(start(READER, SIZE, 0, 3, second)) == (1, SIZE, 2)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [second[-64:]]


def test_processes_killed_at_random(server: ObjectServer, start: Start, tmp_path: Path) -> None:
    """Whatever has a name is whole, and the last one standing reads all it wants."""
    shards = store(server, [f"s{number}" for number in range(9)], 4_000_000)
    limit = 5 * 4_000_000
    chosen = random.Random(0)
    for round_number in range(3):
        readers = [start(READER, limit, 3 * round_number + i, 10**6, *shards) for i in range(3)]
        for reader in readers:
            assert reader.stdout and reader.stdout.readline() == "ready\n"
        for reader in readers:
            time.sleep(chosen.uniform(0.02, 0.3))
            assert reader.poll() is None, reader.communicate()
            kill(reader)
        for path in (tmp_path / "cache").iterdir():
            if path.suffix != ".part":
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    finish(start(READER, limit, 99, 60, *shards))
    assert not list((tmp_path / "cache").glob("*.part"))
    assert size_of(tmp_path / "cache") <= limit


@pytest.mark.parametrize("limits", [(5, 5), (5, 3)])
def test_two_jobs_on_one_folder(
    server: ObjectServer, start: Start, tmp_path: Path, limits: tuple[int, int]
) -> None:
    """Each with shards of its own and common ones, in too little room: all reads are right."""
    common = store(server, ["c0", "c1"])
    jobs = [
        start(
            READER,
            limit * SIZE,
            number,
            150,
            *store(server, [f"{number}-{i}" for i in range(4)]),
            *common,
        )
        for number, limit in enumerate(limits)
    ]
    most = 0
    while any(job.poll() is None for job in jobs):
        most = max(most, size_of(tmp_path / "cache"))
        time.sleep(0.002)
    fetched = [finish(job)[0] for job in jobs]
    assert min(fetched) > 10, "the limit was never reached"
    assert 3 * SIZE <= most <= max(limits) * SIZE


def test_the_end_of_a_process_does_not_wait_for_its_prefetches(
    server: ObjectServer, start: Start, tmp_path: Path
) -> None:
    first, second = store(server, ["a", "b"])
    half_sent = [server.hold("a"), server.hold("b")]
    process = start(PREFETCHER, 2 * SIZE, first, second)
    assert all(event.wait(60) for event in half_sent)
    begin = time.monotonic()
    _, errors = process.communicate("stop\n", timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert time.monotonic() - begin < 5
    server.go_on.set()
    assert finish(start(READER, SIZE, 0, 1, first)) == (1, SIZE, 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first[-64:]]
