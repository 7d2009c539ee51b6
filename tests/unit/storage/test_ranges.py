"""Against a server of the standard library that answers as it is told in the path."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from imm_scale.storage import ranges
from imm_scale.storage.ranges import BusyError, RefusedError

DATA = bytes(range(256)) * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    connections: ClassVar[set[tuple[str, int]]] = set()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.connections.add(self.client_address)
        kind = self.path.split("?")[0].strip("/")
        status = int(kind) if kind.isdigit() else 206
        start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())  # type: ignore[union-attr]
        body = DATA[start : stop + 1] if status < 300 else b"no"
        self.send_response(status)
        if kind != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        self.close_connection = kind in ("cut", "forgets", "endless")  # without a word of it


@pytest.fixture
def server() -> Iterator[str]:
    _Handler.connections.clear()
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


def _get(url: str, start: int = 0, length: int = 5000) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: ranges.get_into(url + "?X-Amz-Signature=secret", start, memoryview(buffer), timeout=5)])


def test_a_connection_serves_many_ranges(server: str) -> None:
    for start, length in ((0, 1), (7, 5000), (len(DATA) - 3, 10)):
        assert _get(f"{server}/x", start, length) == DATA[start : start + length]
    assert _get(f"{server}/416") == b""
    assert _get(f"{server}/x") == DATA[:5000]
    assert len(_Handler.connections) == 1


def test_a_connection_closed_meanwhile_is_opened_anew(server: str) -> None:
    assert [_get(f"{server}/forgets") for _ in range(3)] == [DATA[:5000]] * 3
    assert len(_Handler.connections) == 3


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("cut", ConnectionError),
        ("503", BusyError),
        ("429", BusyError),
        *((status, RefusedError) for status in ("endless", "200", "301", "403", "404")),
    ],
)
def test_other_answers_are_told_without_the_signature(server: str, kind: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        _get(f"{server}/{kind}")
    assert "secret" not in repr(caught.value) and caught.value.__cause__ is None
    assert _get(f"{server}/x") == DATA[:5000], "the next one is as if nothing had been"


def test_nobody_there() -> None:
    with pytest.raises(ConnectionError, match="ConnectionRefusedError"):
        _get("http://127.0.0.1:1/x")


def test_a_proxy_of_the_environment_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert not ranges.is_direct("https://bucket.example/key?x")
    assert ranges.is_direct("https://inside.example/key?x") and ranges.is_direct("http://bucket.example/key")
