"""Ranges of objects by plain HTTP from signed URLs, straight into given memory.

A general client of an object store spends more time on a request than the network does on half a megabyte: it resolves,
serializes and signs it anew, in one event loop, and copies what comes. A URL signed once serves every range of its
object, from any thread, over urllib3's kept connections.
"""

import os
import urllib.request
from functools import cache
from http import HTTPStatus
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError

_CONNECTIONS = 64  # kept at most; more threads than that open others for a while
_PIECE = 1 << 20  # bytes read at once: bounds what is copied; smaller ones release the GIL more often
# A kept connection may have been closed meanwhile: once more then. All else is for who knows how often and how long.
_RETRIES = urllib3.Retry(1, connect=0, read=1, redirect=0, status=0, other=0, respect_retry_after_header=False)


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
    headers = {"Range": f"bytes={start}-{start + len(buffer) - 1}"}
    try:
        response = _pool(os.getpid()).request(
            "GET", signed_url, headers=headers, timeout=timeout, redirect=False, preload_content=False
        )
        try:
            return _fill(response, buffer)
        finally:
            response.close()  # gives a connection back whose answer was read to its end, and ends any other
    except HTTPError as error:
        raise ConnectionError(type(_cause(error)).__name__) from None


@cache
def _pool(process: int) -> urllib3.PoolManager:
    """The connections of a process: those of its parent are not to be shared."""
    return urllib3.PoolManager(maxsize=_CONNECTIONS, retries=_RETRIES, ca_certs=os.environ.get("AWS_CA_BUNDLE"))


def _fill(response: urllib3.BaseHTTPResponse, buffer: memoryview) -> int:
    if response.status != HTTPStatus.PARTIAL_CONTENT or response.length_remaining is None:
        return _other(response)
    expected = min(response.length_remaining, len(buffer))
    filled = 0
    while filled < expected and (piece := response.read(min(_PIECE, expected - filled), decode_content=False)):
        buffer[filled : filled + len(piece)] = piece
        filled += len(piece)
    if filled < expected:
        raise ConnectionError("the answer was cut short")
    return filled


def _other(response: urllib3.BaseHTTPResponse) -> int:
    """What an answer without a range means."""
    if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        response.read()  # so that the connection can be used again
        return 0  # the object ends before it
    if response.status == HTTPStatus.TOO_MANY_REQUESTS or response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise BusyError(f"HTTP status {response.status}")
    raise RefusedError(f"HTTP status {response.status}")


def _cause(error: HTTPError) -> BaseException:
    """What lies below urllib3's own errors, which name the URL."""
    reason: object = getattr(error, "reason", None) or error.__cause__
    return _cause(reason) if isinstance(reason, HTTPError) else reason if isinstance(reason, BaseException) else error
