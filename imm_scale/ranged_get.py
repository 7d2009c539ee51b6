"""Ranges of objects by plain HTTP from signed URLs, straight into given memory.

A general client of an object store spends more time on a request than the network does on half a megabyte: it resolves,
serializes and signs it anew, in one event loop, and copies what comes. A URL signed once serves every range of its
object, and each thread keeps a connection of its own.
"""

import contextlib
import http.client
import os
import ssl
import threading
import urllib.request
from urllib.parse import SplitResult, urlsplit

_local = threading.local()


class RefusedError(Exception):
    """An answer other than the range asked for, which a general client can tell more about."""


class BusyError(OSError):
    """The server asks to come again later."""


def is_direct(signed_url: str) -> bool:
    """Whether the way to this server leads through no proxy of the environment."""
    parts = urlsplit(signed_url)
    return parts.scheme not in urllib.request.getproxies() or bool(urllib.request.proxy_bypass(parts.netloc))


def get_into(signed_url: str, start: int, buffer: memoryview, timeout: float) -> int:
    """Fills the buffer from byte `start` of the object on and returns how many bytes there were.

    No message holds the URL, whose signature is a secret.

    Raises:
        RefusedError: another status than that of a range.
        BusyError: 429 or 5xx.
        OSError: the connection failed or was cut.
    """
    parts = urlsplit(signed_url)
    try:
        response = _answer(parts, start, start + len(buffer), timeout)
        if response.status != http.client.PARTIAL_CONTENT or response.length is None:
            return _other(response)
        expected = min(response.length, len(buffer))
        filled = 0
        while filled < expected and (count := response.readinto(buffer[filled:expected])):
            filled += count
    except (RefusedError, BusyError):
        _close(parts)
        raise
    except (OSError, http.client.HTTPException) as error:
        _close(parts)
        raise ConnectionError(type(error).__name__) from None
    if filled < expected:
        _close(parts)
        raise ConnectionError("the answer was cut short")
    return filled


def _other(response: http.client.HTTPResponse) -> int:
    """What an answer without a range means."""
    if response.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        response.read()  # so that the connection can be used again
        return 0  # the object ends before it
    if response.status == http.client.TOO_MANY_REQUESTS or response.status >= 500:
        raise BusyError(f"HTTP status {response.status}")
    raise RefusedError(f"HTTP status {response.status}")


def _answer(parts: SplitResult, start: int, stop: int, timeout: float) -> http.client.HTTPResponse:
    """The head of the answer. A kept connection that the server has closed meanwhile is opened anew, once."""
    kept = _connections().get((parts.scheme, parts.netloc))
    target, headers = f"{parts.path}?{parts.query}", {"Range": f"bytes={start}-{stop - 1}"}
    if kept is not None:
        with contextlib.suppress(ConnectionError, http.client.CannotSendRequest):
            kept.request("GET", target, headers=headers)
            return kept.getresponse()
        _close(parts)
    connection = _connect(parts, timeout)
    _connections()[parts.scheme, parts.netloc] = connection
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _connect(parts: SplitResult, timeout: float) -> http.client.HTTPConnection:
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
        return http.client.HTTPSConnection(parts.netloc, timeout=timeout, context=context)
    return http.client.HTTPConnection(parts.netloc, timeout=timeout)


def _connections() -> dict[tuple[str, str], http.client.HTTPConnection]:
    """This thread's own."""
    if not hasattr(_local, "connections"):
        _local.connections = {}
    found: dict[tuple[str, str], http.client.HTTPConnection] = _local.connections
    return found


def _close(parts: SplitResult) -> None:
    connection = _connections().pop((parts.scheme, parts.netloc), None)
    if connection is not None:
        connection.close()
