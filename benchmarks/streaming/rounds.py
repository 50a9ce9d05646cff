"""Contenders as running processes, asked for passes one after the other, in rounds.

Shared by all parts of the benchmark; which contenders take part is in __main__.py, what they do in
contenders.py and ours.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROOT = Path(__file__).parents[2]
"""The repository: contenders are started here, so that they find each other's modules."""
PEER_OF = {"litdata": "litdata", "litdata_chunks": "litdata", "mosaicml_streaming": "mosaicml"}
"""Contenders that run in another environment, by the name that --peer gives it."""
UNPINNED = ("tars_in_workers",)
"""Contenders that may use all cores."""
_PATIENCE_SECONDS = 300
"""For one answer of a contender; the slowest takes some ten seconds."""

Measured: TypeAlias = dict[str, dict[str, Any]]
"""By label: `rates` in samples/s, `cpu_rates` in samples per CPU second, of every round; `samples`
and `order` of the checked pass; or why it `failed`."""


class ContenderError(Exception):
    """A contender that ended, or did not answer in time."""


@dataclass(frozen=True)
class Bench:
    """What all parts of a run need."""

    folder: Path
    """Of the places."""
    peers: Mapping[str, str]
    """Interpreter of each --peer."""
    core: int
    """Of the contenders."""
    rounds: int
    seconds: float
    """Of a contender in a round, at least."""

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def interpreter(self, contender: str) -> str:
        """Return the Python that a contender runs in.

        Raises:
            ContenderError: it needs a --peer that was not given.
        """
        peer = PEER_OF.get(contender)
        if peer is not None and peer not in self.peers:
            raise ContenderError(f"no --peer {peer}=PYTHON")
        return sys.executable if peer is None else self.peers[peer]


class Run(NamedTuple):
    """A contender and what it reads."""

    contender: str
    place: str
    """Folder, or URL."""
    environment: Mapping[str, str] = {}  # never changed


class Contender:
    """A running process of contenders.py.

    Raises:
        ContenderError: it cannot be started, ended, or did not answer in time; says its last words.
    """

    def __init__(self, bench: Bench, run: Run) -> None:
        python = bench.interpreter(run.contender)
        command = [python, "-m", "benchmarks.streaming.contenders", run.contender, run.place]
        if run.contender not in UNPINNED:
            command += ["--core", str(bench.core)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**environment(bench), **run.environment},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def wait_until_ready(self) -> None:
        self._answer()

    def ask(self, number: int, seconds: float, *, check: bool = False) -> dict[str, Any]:
        """Ask for passes and wait for the answer (contenders.py:serve)."""
        request = {"number": number, "seconds": seconds, "check": check}
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(request), file=self._requests, flush=True)
        return self._answer()

    def end(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()

    def close(self) -> None:
        """End it, and wait until it has gone."""
        self.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            line = self._answers.readline() if selector.select(_PATIENCE_SECONDS) else ""
        if not line:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            last_words = said[-1] if said else "without a word"
            raise ContenderError(f"ended or gave no answer in {_PATIENCE_SECONDS} s: {last_words}")
        return json.loads(line)


def measure_runs(bench: Bench, runs: Mapping[str, Run]) -> Measured:
    """Start all runs, check that they read the same samples, and time them in rounds."""
    measured: Measured = {}
    contenders: dict[str, Contender] = {}

    @contextlib.contextmanager
    def noted(label: str) -> Iterator[None]:
        try:
            yield
        except ContenderError as error:
            say(f"  {label} failed: {error}")
            measured[label] = {"failed": str(error)}
            if label in contenders:
                contenders.pop(label).close()

    try:
        for label, run in runs.items():
            with noted(label):
                contenders[label] = Contender(bench, run)
        for label, run in runs.items():
            with noted(label):
                if label in contenders:
                    contenders[label].wait_until_ready()
                    measured[label] = _warmed_up(contenders[label], run)
        _check_equal(measured)
        for number in range(1, bench.rounds + 1):
            for label in random.Random(number).sample(sorted(contenders), len(contenders)):
                with noted(label):
                    answer = contenders[label].ask(number * 1000, bench.seconds)
                    rates = {"rates": "seconds", "cpu_rates": "cpu_seconds"}
                    for rate, seconds in rates.items():
                        measured[label].setdefault(rate, []).append(
                            round(answer["samples"] / answer[seconds], 1)
                        )
    finally:
        for contender in contenders.values():
            contender.end()  # all of them at the same time
        for contender in contenders.values():
            contender.close()
    return {label: measured[label] for label in runs}


def environment(bench: Bench) -> dict[str, str]:
    # One thread for arithmetic; caches and what libraries put aside lie with the samples.
    return {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(bench.folder)}


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def _warmed_up(contender: Contender, run: Run) -> dict[str, Any]:
    if run.contender.startswith("bare"):  # bytes that are no frames
        contender.ask(0, 0)
        return {}
    answer = contender.ask(0, 0, check=True)
    return {key: answer[key] for key in ("samples", "sum", "order")}


def _check_equal(measured: Measured) -> None:
    """Refuse a comparison of loaders that have not read the same samples."""
    read = {label: (m["samples"], m["sum"]) for label, m in measured.items() if "sum" in m}
    if len(set(read.values())) > 1:
        raise RuntimeError(f"The contenders read different samples (count, checksum): {read}")
