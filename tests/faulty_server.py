"""A web server on loopback that fails in chosen ways, to try what clients make of it.

It serves one object at every path, with ranges, as an object store does; it takes what is put and
forgets it.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeAlias

Fault: TypeAlias = int | str | None
"""What happens to a request: a status to answer; or one of

    reset         the connection is reset before an answer
    close         it is closed before an answer
    silent        no answer comes
    cut           the connection is closed in the middle of the body
    cut-reset     it is reset there
    silent-body   nothing comes after the middle of the body

or nothing: it is answered."""


@dataclass(frozen=True)
class Request:
    """What came."""

    time: float
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""


@dataclass
class Object:
    """What is served, and how; may be changed while the server runs."""

    data: bytes = b""
    etag: str | None = '"1"'
    has_ranges: bool = True
    error_body: bytes = b""
    """Of answers that are errors."""
    fault: Callable[[int], Fault] = lambda number: None
    """Given the number of the request, from 0."""
    requests: list[Request] = field(default_factory=list)


class FaultyServer(ThreadingHTTPServer):
    """See the module; `url` is where it listens, `served` what it serves."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, served: Object) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.served = served
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.over = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are expected."""


@contextmanager
def faulty_server(
    data: bytes = b"",
    fault: Callable[[int], Fault] = lambda number: None,
    certificate: tuple[str, str] | None = None,
) -> Iterator[FaultyServer]:
    """Run a server in a thread.

    Args:
        data: of the object.
        fault: as in `Object`.
        certificate: files with certificate and key, to speak TLS.
    """
    server = FaultyServer(Object(data, fault=fault))
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.url = server.url.replace("http:", "https:")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        served = self.server.served
        self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.lock:
            number = len(served.requests)
            served.requests.append(Request(time.monotonic(), self.command, self.path, headers))
        fault = served.fault(number)
        if isinstance(fault, int):
            self._send(fault, served.error_body)
        elif fault == "silent":
            self._fall_silent()
        elif fault in ("reset", "close"):
            self._break_off(fault)
        else:
            self._serve(served, headers.get("range"), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _serve(self, served: Object, asked: str | None, fault: Fault) -> None:
        whole = len(served.data)
        if not asked or not served.has_ranges:
            return self._send(200, served.data, fault=fault)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, whole) if last else whole
        if start >= whole:
            return self._send(416, served.error_body)
        place = {"content-range": f"bytes {start}-{stop - 1}/{whole}"}
        return self._send(206, served.data[start:stop], place, fault)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: Fault = None
    ) -> None:
        self.send_response(status)
        etag = self.server.served.etag
        shared = {
            "content-length": str(len(body)),
            "last-modified": "Sat, 01 Jan 2022 00:00:00 GMT",
        }
        for name, value in {
            **shared,
            **({"etag": etag} if etag else {}),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if fault else body)
        if fault == "silent-body":
            self._fall_silent()
        elif fault:
            time.sleep(0.02)  # let the client have what was sent
            self._break_off(fault)

    def _fall_silent(self) -> None:
        self.server.over.wait(60)
        self.close_connection = True

    def _break_off(self, fault: Fault) -> None:
        if fault in ("reset", "cut-reset"):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
