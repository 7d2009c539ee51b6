"""An HTTP proxy before an S3 server that does to requests what networks and busy servers do."""

import http.client
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)

_FLIPPED_BYTE = 150  # of a block it lies behind the first npy header, in the first sample's values


@dataclass
class Faults:
    """Share of requests that suffer each fault; a request suffers one at most, and a byte is changed `flips` times.

    Attributes:
        busy: answered with 503 SlowDown.
        cut: the connection is closed in the middle of the answer's body.
        slow: answered after `spike_seconds`.
        flips: bodies of at least 1 KiB left to damage by one byte.
        only: requests whose path does not contain this are left alone.
    """

    busy: float = 0.0
    cut: float = 0.0
    slow: float = 0.0
    flips: int = 0
    spike_seconds: float = 2.0
    only: str = ""
    done: Counter[str] = field(default_factory=Counter)


class Proxy:
    """Listens on 127.0.0.1:`port` and passes requests on to `upstream_port`, with `faults`."""

    def __init__(self, upstream_port: int, seed: int = 0) -> None:
        self.faults = Faults()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._upstream_port = upstream_port
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def choose(self, path: str) -> str:
        """The fate of the next request."""
        with self._lock:
            faults, drawn = self.faults, self._random.random()
            if faults.only not in path:
                return "passed"
            for fate in ("busy", "cut", "slow"):
                share = getattr(faults, fate)
                if drawn < share:
                    faults.done[fate] += 1
                    return fate
                drawn -= share
            return "passed"

    def take_flip(self) -> bool:
        with self._lock:
            if self.faults.flips == 0:
                return False
            self.faults.flips -= 1
            self.faults.done["flip"] += 1
            return True

    def upstream(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._upstream_port, timeout=30)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = self.proxy.choose(self.path)
        if fate == "busy":
            self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
            return
        if fate == "slow":
            time.sleep(self.proxy.faults.spike_seconds)
        try:
            connection = self.proxy.upstream()
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            self.close_connection = True  # the server is gone, and so is the connection
            return
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
        connection.close()
        # Of a cut answer nobody sees what was flipped: it is asked for again.
        if self.command == "GET" and fate != "cut" and len(answer) >= 1024 and self.proxy.take_flip():
            changed = bytearray(answer)
            changed[_FLIPPED_BYTE] ^= 0x10
            answer = bytes(changed)
        self._answer(response.status, headers, answer, cut=fate == "cut")

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if self.command == "HEAD" or name.lower() != "content-length":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on
