"""An HTTP server of objects that counts what it is asked for, and stops or lies when it is told to.

For tests of what happens between the first and the last byte of a transfer.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ObjectServer:
    """Objects by path, and what is to happen to them."""

    def __init__(self) -> None:
        self.url = ""
        self.objects: dict[str, bytes] = {}
        self.once: dict[str, bytes] = {}
        """What the next GET of a path gives instead."""
        self.gets: Counter[str] = Counter()
        """GET requests by path."""
        self.held: set[str] = set()
        """Paths of which only half is sent until `go_on` is set."""
        self.half_sent: dict[str, threading.Event] = {}
        """Of each held path: set when the half has been sent."""
        self.go_on = threading.Event()

    def hold(self, path: str) -> threading.Event:
        """Stop transfers of an object half-way; return what tells that one has come so far."""
        self.held.add(path)
        return self.half_sent.setdefault(path, threading.Event())


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that were killed."""


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Run a server in threads of this process."""
    server = ObjectServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(self.path[1:], body=False)

        def do_GET(self) -> None:
            path = self.path[1:]
            server.gets[path] += 1
            self._answer(path, body=True)

        def _answer(self, path: str, *, body: bool) -> None:
            data = server.objects.get(path)
            if body:
                data = server.once.pop(path, data)
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
            self.end_headers()
            if not body:
                return
            if path in server.held:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                server.half_sent[path].set()
                server.go_on.wait(60)
                data = data[len(data) // 2 :]
            self.wfile.write(data)

    with _QuietServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            http.shutdown()
            thread.join()
