"""A small object store over HTTP: ranged requests, every one written down, and failures on demand."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qlip.data.storage.retry import RetryPolicy

QUICK = RetryPolicy(tries=12, timeout=0.5, longest_wait=0.02)
"""RetryPolicy that a test has."""

SLOW = 1.5  # seconds, far beyond the timeout


@dataclass
class Request:
    """What was asked for."""

    method: str
    path: str
    span: tuple[int, int] | None


@dataclass
class ObjectServer:
    """The files of a folder at `address`.

    Attributes:
        fault: what goes wrong with a request, or None: "500", "403" or any status; "drop" closes the connection
            unanswered; "cut" ends the body half-way; "short" answers with fewer bytes than asked for; "slow" waits;
            "whole" ignores the range.
        requests: all of them, failed ones too.
    """

    folder: Path
    address: str = ""
    fault: Callable[[Request], str | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)

    def gets(self) -> list[Request]:
        """Requests for bytes."""
        return [request for request in self.requests if request.method == "GET"]


@contextmanager
def serving(folder: Path) -> Iterator[ObjectServer]:
    """The server while the block runs."""
    state = ObjectServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body in one packet, or the next answer waits for an acknowledgement

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, format: str, *arguments: Any) -> None:
            del format, arguments

        def _answer(self, body: bool) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            span = (int(found[1]), int(found[2] or 10**15) + 1) if found else None
            request = Request(self.command, self.path.lstrip("/"), span)
            state.requests.append(request)
            fault = state.fault(request)
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
                return
            if fault == "slow":
                time.sleep(SLOW)
            path = state.folder / request.path
            if fault is not None and fault.isdigit():
                self._send(int(fault), b"")
            elif not path.is_file():
                self._send(404, b"")
            else:
                self._send_file(path, None if fault == "whole" else span, fault, body)

        def _send_file(self, path: Path, span: tuple[int, int] | None, fault: str | None, body: bool) -> None:
            size = path.stat().st_size
            begin, end = span or (0, size)
            if begin >= size:
                self._send(416, b"")
                return
            end = min(end, size)
            if fault == "short" and body:
                end = begin + (end - begin) // 2
            self.send_response(200 if span is None else 206)
            self.send_header("Content-Length", str(end - begin))
            if span is not None:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.end_headers()
            if not body:
                return
            with open(path, "rb") as file:
                file.seek(begin)
                data = file.read((end - begin) // 2 if fault == "cut" else end - begin)
            self.wfile.write(data)
            if fault == "cut":
                self.close_connection = True

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            del request, client_address  # a client that went away

    server = Server(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def denying_store(folder: Path, name: str) -> Iterator[str]:
    """The address of a store of one's own with the files of a folder, of which it gives all but one while this runs."""
    fsspec = pytest.importorskip("fsspec")
    memory = pytest.importorskip("fsspec.implementations.memory")

    class Denying(memory.MemoryFileSystem):  # type: ignore[misc,name-defined]
        protocol = "denying"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]
        denied = True

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace("denying://", "memory://"))  # type: ignore[no-any-return]

        def cat_file(self, path: str, **values: Any) -> bytes:
            return self._checked(path, super().cat_file, **values)

        def info(self, path: str, **values: Any) -> Any:
            return self._checked(path, super().info, **values)

        @classmethod
        def _checked(cls, path: str, ask: Callable[..., Any], **values: Any) -> Any:
            if cls.denied and path.endswith(name):
                raise PermissionError("Forbidden")
            return ask(path, **values)

    for path in folder.rglob("*"):
        if path.is_file():
            Denying().pipe_file(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    fsspec.register_implementation("denying", Denying, clobber=True)
    try:
        yield "denying://bucket"
    finally:
        Denying.denied = False
