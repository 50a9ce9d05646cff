"""How fast is the loader, beside numpy, other loaders and the bare client of an object store?

    python -m benchmarks.streaming --knmi FOLDER --peer litdata=PYTHON --peer mosaicml=PYTHON
    python -m benchmarks.streaming --quick

Same samples (data.py), batches of 8, one core: every contender is a process of its own
(contenders.py, ours.py) that is pinned to that core and asked for whole passes, one after the
other, in rounds (rounds.py). Rates are medians of the rounds; ratios are medians of the ratios
within a round, because neighbours on the machine change from round to round. Before, one pass of
each is checked: all have read the same samples. Everything lies in the page cache, where reading
has put it.

FOLDER holds KNMI's files of 2010-08-26 (docs/radar.md); without it radar is synthetic, and the
record says so. litdata and mosaicml-streaming want other versions than this project: make
environments of their own and name their interpreters; without, their rows are left out. Both ask
for torchvision, which neither needs here.

    python -m venv litdata && litdata/bin/pip install litdata zstd pyarrow zstandard
    python -m venv mosaicml && mosaicml/bin/pip install mosaicml-streaming zstandard

The servers of the object store part run beside the client on the other cores (tests/s3_servers.py;
they come with the extra `dev`). A run takes about ten minutes and 6 GB of disk, and writes
results.json and table.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish
from benchmarks.streaming.data import read_afresh, write_places
from benchmarks.streaming.report import table
from benchmarks.streaming.rounds import (
    PEER_OF,
    ROOT,
    Bench,
    Measured,
    Run,
    environment,
    measure_runs,
    say,
)
from tests.s3_servers import S3Server, hadro, localbucket, s3_environment

LOCAL: Mapping[str, Sequence[str]] = {
    "raw": (
        "memmap",
        "memmap_at_once",
        "memmap_dataloader",
        "webdataset",
        "litdata",
        "mosaicml_streaming",
        "zarr_samples",
        "tars",
        "tars_from_cache",
        "tars_first_pass",
        "tars_without_checksums",
        "tars_first_pass_without_checksums",
        "tars_in_workers",
    ),
    "zstd": (
        "zstd_at_offsets",
        "webdataset",
        "litdata",
        "litdata_chunks",
        "mosaicml_streaming",
        "zarr_samples",
        "zarr_frames",
        "zarr_frames_by_zarrs",
        "tars",
        "tars_from_cache",
        "tars_without_checksums",
        "tars_in_workers",
        "zarr",
    ),
}
"""Contenders by the kind of place; the first is the yardstick."""
REMOTE = {
    "bare_ranges_8": "bare_ranges_8",
    "bare_ranges_64": "bare_ranges_64",
    "ranges": "tars",
    "bare_objects": "bare_objects",
    "into_cache": "tars_into_cache",
}
FAULTY = {"ranges": "tars", "into_cache": "tars_into_cache"}
"""Contenders by label of the record."""
ERROR_RATE = 0.3
PEERS = {"litdata": "litdata", "mosaicml": "mosaicml-streaming"}
"""What --peer takes, and its package."""
PEER_FORMATS = {
    "raw": {"litdata": "litdata", "mosaicml_streaming": "mds"},
    "zstd": {"litdata": "litdata", "litdata_chunks": "litdata-chunks", "mosaicml_streaming": "mds"},
}
"""Folders that contenders write themselves, by the kind of place."""
ORDER_SAMPLES, ORDER_SHARD = 10_000_000, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--knmi", type=Path, help="KNMI's files; synthetic radar when left out")
    parser.add_argument("--peer", action="append", default=[], help="litdata=... or mosaicml=...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few samples, one round: a smoke test")
    parser.add_argument("--work", type=Path, help="keep the samples here for another run")
    parser.add_argument("--out", type=Path, default=Path("docs/results/streaming"))
    chosen = parser.parse_args()
    peers = {}
    for peer, _, python in (given.partition("=") for given in chosen.peer):
        if peer not in PEERS or not python:
            parser.error(f"--peer takes NAME=PYTHON, NAME one of {', '.join(PEERS)}, not {peer!r}")
        peers[peer] = str(Path(python).absolute())  # not resolved: an environment's link means it
    with contextlib.ExitStack() as stack:
        folder = chosen.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(
            folder=folder.absolute(),
            peers=peers,
            core=max(os.sched_getaffinity(0)),
            rounds=1 if chosen.quick else chosen.rounds,
            seconds=0.1 if chosen.quick else 0.5,
        )
        record = measure(bench, chosen.knmi, quick=chosen.quick)
    publish(record, table(record), chosen.out)


def measure(bench: Bench, knmi: Path | None, *, quick: bool) -> dict[str, Any]:
    """Make the samples, measure every part, and return the record."""
    started = time.monotonic()
    say(f"the order of {ORDER_SAMPLES:,} samples")
    order_seconds = measure_order(bench)
    say("writing samples in all formats")
    data = write_places(bench.folder, knmi, quick=quick)
    for name, kind in itertools.product(data, PEER_FORMATS):
        _write_peer_formats(bench, f"{name}-{kind}", PEER_FORMATS[kind])
    read_afresh(bench.folder)
    local, remote, faulty = {}, {}, {}
    for name, kind in itertools.product(data, LOCAL):
        place = f"{name}-{kind}"
        say(f"{place} on the local disk")
        runs = {contender: Run(contender, bench.place(place)) for contender in LOCAL[kind]}
        local[place] = measure_runs(bench, runs)
    for name in data:
        say(f"{name}-raw in object stores")
        remote[name] = measure_store(bench, f"{name}-raw")
        faulty[name] = measure_faults(bench, f"{name}-raw")
    return {
        "command": "python -m benchmarks.streaming " + " ".join(_without_paths(sys.argv[1:])),
        "rounds": bench.rounds,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": _machine(),
        "versions": _versions(bench),
        "data": data,
        "local": local,
        "remote": remote,
        "faulty": faulty,
        "order_seconds": order_seconds,
    }


def measure_store(bench: Bench, place: str) -> Measured:
    """Time the loader and the bare client over a fast S3 server on this machine."""
    with _served(bench, localbucket(bench.folder)) as variables:
        runs = {label: Run(c, f"s3://{place}", variables) for label, c in REMOTE.items()}
        return measure_runs(bench, runs)


def measure_faults(bench: Bench, place: str) -> Measured:
    """Time the loader over a sound server and one that answers many requests with 503."""
    faulty_server = hadro(bench.folder, error_rate=ERROR_RATE, seed=1)
    with (
        _served(bench, hadro(bench.folder)) as sound,
        _served(bench, faulty_server) as faulty,
    ):
        runs = {}
        for label, contender in FAULTY.items():
            runs[label] = Run(contender, f"s3://{place}", sound)
            runs[f"{label}_with_faults"] = Run(contender, f"s3://{place}", faulty)
        return measure_runs(bench, runs)


def measure_order(bench: Bench) -> list[float]:
    """Return the seconds that the order of an epoch of many samples takes, in every round."""
    code = (
        "import os, time; from tmu_dist.data.order import DataSet, epoch_order\n"
        f"os.sched_setaffinity(0, {{{bench.core}}})\n"
        f"data_set = DataSet(shard_sizes=({ORDER_SHARD},) * {ORDER_SAMPLES // ORDER_SHARD})\n"
        f"for epoch in range({bench.rounds}):\n"
        "    started = time.perf_counter(); epoch_order([data_set], seed=0, epoch=epoch)\n"
        "    print(time.perf_counter() - started)"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [round(float(line), 3) for line in said.split()]


def _write_peer_formats(bench: Bench, place: str, folders: Mapping[str, str]) -> None:
    """Have other loaders write the samples; one that cannot will find nothing to read."""
    for contender, folder in folders.items():
        if PEER_OF[contender] not in bench.peers or (bench.folder / place / folder).exists():
            continue
        python = bench.interpreter(contender)
        command = [python, "-m", "benchmarks.streaming.contenders", contender, bench.place(place)]
        done = subprocess.run(
            [*command, "--write"],
            cwd=ROOT,
            env=environment(bench),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            say(f"  {contender} did not write {place}: {done.stderr.strip().splitlines()[-1:]}")


@contextlib.contextmanager
def _served(
    bench: Bench, server: contextlib.AbstractContextManager[S3Server]
) -> Iterator[dict[str, str]]:
    """Keep a server off the contenders' core, and yield the variables with which it is reached."""
    others = os.sched_getaffinity(0) - {bench.core}
    with server as running:
        for task in Path(f"/proc/{running.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), others or {bench.core})
        yield s3_environment(running.endpoint)


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as they would be on another machine."""
    named = {"--knmi": "FOLDER", "--work": "FOLDER", "--out": "FOLDER"}
    shown = []
    for before, argument in itertools.pairwise(["", *arguments]):
        if before == "--peer":
            argument = argument.partition("=")[0] + "=PYTHON"
        shown.append(named.get(before, argument))
    return shown


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _versions(bench: Bench) -> dict[str, dict[str, str]]:
    """Return the versions of what is compared, by environment."""
    own = ["numpy", "torch", "webdataset", "zarr", "zarrs", "obstore", "zstandard", "google-crc32c"]
    wanted = {"tmu-dist": [sys.executable, *own]}
    for peer, python in bench.peers.items():
        wanted[peer] = [python, PEERS[peer], "numpy", "torch"]
    code = (
        "import importlib.metadata as m, json, sys\n"
        "installed = {d.name.lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: installed.get(n, 'absent') for n in sys.argv[1:]}))"
    )
    return {
        name: json.loads(subprocess.check_output([python, "-c", code, *packages]))
        for name, (python, *packages) in wanted.items()
    }


if __name__ == "__main__":
    main()
