"""An HTTP proxy that breaks down on request."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Fault", "FaultyProxy"]

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


@dataclass
class Fault:
    """What goes wrong, and with which requests.

    Attributes:
        method: a regular expression such as ``GET``; empty for every one.
        path: a regular expression that is searched for in path and query.
        access_key: only requests that are signed with this key; empty for all.
        first: the first matching request that fails; 1 is the next one.
        times: how many fail from there on; None for all.
        status: answer this status; None lets the server answer.
        cut_after: cut the connection after so many bytes of the server's body.
        delay_seconds: wait before the answer.
        bytes_per_second: of an answer; None sends it as fast as it comes.
        num_seen, num_failed: requests that matched, and those that failed.
    """

    method: str = ""
    path: str = ""
    access_key: str = ""
    first: int = 1
    times: int | None = 1
    status: int | None = None
    cut_after: int | None = None
    delay_seconds: float = 0.0
    bytes_per_second: float | None = None
    num_seen: int = 0
    num_failed: int = 0

    def strikes(self, method: str, path: str, headers: dict[str, str]) -> bool:
        """Count a request, and say whether it fails."""
        if not re.fullmatch(self.method or ".*", method) or not re.search(self.path, path):
            return False
        if self.access_key not in headers.get("authorization", ""):
            return False
        self.num_seen += 1
        past = self.num_seen - self.first
        strikes = past >= 0 and (self.times is None or past < self.times)
        self.num_failed += strikes
        return strikes


class FaultyProxy:
    """Passes requests on to a server, apart from those that meet a `Fault`.

    Args:
        target: the server, such as ``http://127.0.0.1:5000``.
    """

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target).netloc
        self._lock = threading.Lock()
        self.faults: list[Fault] = []
        #: Method, path and headers of every request, in order.
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, method: str = "", path: str = "", **what: Any) -> Fault:
        """Add a `Fault`; the first one that strikes decides."""
        fault = Fault(method, path, **what)
        with self._lock:
            self.faults.append(fault)
        return fault

    def mend(self) -> None:
        """From now on nothing fails."""
        with self._lock:
            self.faults.clear()

    def ranges(self, path: str) -> list[str]:
        """The ``Range`` headers of all GET requests for a path."""
        return [
            headers.get("range", "")
            for method, requested, headers in self.requests
            if method == "GET" and re.search(path, requested)
        ]

    def _fault_of(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        with self._lock:
            self.requests.append((method, path, headers))
            return next((f for f in self.faults if f.strikes(method, path, headers)), None)

    def _ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._target, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name not in _HOP_BY_HOP | {"content-length", "expect"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement

        def _serve(self) -> None:
            sent = {name.lower(): value for name, value in self.headers.items()}
            body = self._body(sent)
            fault = proxy._fault_of(self.command, self.path, sent)
            if fault is not None:
                if fault.delay_seconds:
                    time.sleep(fault.delay_seconds)
                if fault.status is not None:
                    self.send_response(fault.status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            status, headers, content = proxy._ask(self.command, self.path, sent, body)
            self.send_response_only(status)
            length = str(len(content))
            for name, value in headers:
                if name.lower() == "content-length":
                    length = value  # HEAD has one, too, without a body
                elif name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if fault is not None and fault.bytes_per_second is not None:
                time.sleep(len(content) / fault.bytes_per_second)
            if fault is None or fault.cut_after is None:
                self.wfile.write(content)
                return
            self.wfile.write(content[: fault.cut_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def _body(self, headers: dict[str, str]) -> bytes:
            if headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(headers.get("content-length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
