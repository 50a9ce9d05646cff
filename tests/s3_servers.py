"""Real S3 servers on loopback, each a process of its own, for tests of what object stores do.

`moto` is correct and slow (multipart writes, pages of a list, S3's errors), `localbucket` is fast,
`hadro` only reads and can fail, or be slow, on purpose. None of them is needed to use the project:
a test is skipped where its server is not installed.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest

_START_SECONDS = 60  # moto imports for seconds, and many tests may share few cores


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str
    """http://127.0.0.1:PORT"""
    pid: int
    """To stop it as a crash would, or for a while (SIGSTOP, SIGCONT)."""

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it the store of this process, until the test is over."""
        for name, value in s3_environment(self.endpoint).items():
            monkeypatch.setenv(name, value)

    def make_bucket(self, name: str) -> None:
        """Make a bucket (moto; the buckets of the others are folders)."""
        connection = HTTPConnection(self.endpoint.removeprefix("http://"), timeout=60)
        with closing(connection):
            connection.request("PUT", f"/{name}")
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"{self.endpoint} would not make {name}: {answer.read()!r}")


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return the variables with which any S3 client talks to this server and to no other host."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@contextmanager
def moto() -> Iterator[S3Server]:
    """Start a server that keeps everything in memory."""
    with _server("moto", ["moto.server", "-H", "127.0.0.1", "-p"]) as server:
        yield server


@contextmanager
def localbucket(folder: Path) -> Iterator[S3Server]:
    """Start a server whose buckets are the folders in `folder`."""
    command = ["localbucket", "--host", "127.0.0.1", str(folder), "--port"]
    with _server("localbucket", command) as server:
        yield server


@contextmanager
def hadro(
    folder: Path, error_rate: float = 0.0, seed: int = 0, latency_ms: float = 0.0
) -> Iterator[S3Server]:
    """Start a read-only server whose buckets are the folders in `folder`.

    Args:
        folder: holds the buckets.
        error_rate: share of the requests that are answered with 503, from 0 to 1.
        seed: of the draws that decide which.
        latency_ms: wait before every answer.
    """
    command = ["hadro", "--host", "127.0.0.1", str(folder), "--error-rate", str(error_rate)]
    command += ["--fault-seed", str(seed), "--latency-ms", str(latency_ms), "--port"]
    with _server("hadro", command) as server:
        yield server


@contextmanager
def _server(package: str, command: list[str]) -> Iterator[S3Server]:
    """Start `python -m COMMAND PORT` on a free port; end it on leaving."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install {package})")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            [sys.executable, "-m", *command, str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    said = output.read().decode(errors="replace")
                    raise RuntimeError(f"{package} did not start on port {port}:\n{said}")
                time.sleep(0.02)
            yield S3Server(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.kill()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
