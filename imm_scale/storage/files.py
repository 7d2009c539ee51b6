"""Files anywhere fsspec reaches (a path, s3://, memory://, ...), written whole or not at all."""

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import fsspec

from imm_scale.errors import UserError
from imm_scale.storage import ranges, retries
from imm_scale.storage.retries import OnRetry, error_code, retry
from imm_scale.storage.urls import is_local, local_path, name

_SIGNED_SECONDS = 300  # temporary credentials, which end a signature too, are renewed longer than that before they end
_COPY_BYTES = 1 << 20


@lru_cache(maxsize=32)
def _filesystem(protocol: str) -> Any:
    options: dict[str, Any] = {}
    if protocol != "file":
        options["use_listings_cache"] = False  # another process may be writing
    if protocol in ("s3", "s3a"):
        # One layer of retries, ours: it counts them, and knows which errors are final.
        options["config_kwargs"] = {
            "connect_timeout": retries.POLICY.timeout,
            "read_timeout": retries.POLICY.timeout,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 64,
            "signature_version": "s3v4",  # also of signed URLs, whose old form newer buckets refuse
        }
    try:
        filesystem = fsspec.filesystem(protocol, **options)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"no file system for {protocol}:// ({error}); install the fsspec package that provides it"
        ) from error
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1
    return filesystem


def _locate(url: str) -> tuple[Any, str]:
    protocol = "file" if is_local(url) else url.split("://", 1)[0]
    filesystem = _filesystem(protocol)
    return filesystem, local_path(url) if protocol == "file" else filesystem._strip_protocol(url)


def _call(url: str, method: str, *args: Any, on_retry: OnRetry | None = None, **options: Any) -> Any:
    filesystem, path = _locate(url)
    action = getattr(filesystem, method)
    if is_local(url):
        return action(path, *args, **options)
    return retry(url, lambda: action(path, *args, **options), on_retry)


def exists(url: str) -> bool:
    """Whether there is a file or a folder."""
    try:
        _call(url, "info")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return int(_call(url, "info")["size"])


def list_names(url: str) -> list[str]:
    """Sorted names of the files and folders directly inside a folder; empty if there is no such folder."""
    try:
        return sorted(name(entry) for entry in _call(url, "ls", detail=False))
    except FileNotFoundError:
        return []


def make_folder(url: str) -> None:
    """Creates a local folder and its parents; object stores need none."""
    if is_local(url):
        os.makedirs(local_path(url), exist_ok=True)


def check_writable(folder: str) -> None:
    """Raises OSError, with its path, where a local folder could not be made or written to; makes nothing."""
    if not is_local(folder):
        return
    path = os.path.abspath(local_path(folder))
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def remove(url: str) -> None:
    """Removes a file or a whole folder; what is not there is no error."""
    with contextlib.suppress(FileNotFoundError):
        _call(url, "rm", recursive=True)


def read_bytes(url: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    try:
        return bytes(_call(url, "cat_file"))
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        # Replaced on another machine between NFS's look-up and its read: a second look-up finds the new file.
        return bytes(_call(url, "cat_file"))


def read_text(url: str) -> str:
    """A file's UTF-8 text. Raises FileNotFoundError."""
    return read_bytes(url).decode()


def read_range(url: str, start: int, stop: int, on_retry: OnRetry | None = None) -> bytes:
    """Bytes [start, stop) of a file; shorter where the file ends before `stop`. `on_retry` is told of each retry."""
    if is_local(url):
        descriptor = os.open(local_path(url), os.O_RDONLY)
        try:
            return os.pread(descriptor, stop - start, start)
        finally:
            os.close(descriptor)
    try:
        return bytes(_call(url, "cat_file", start=start, end=stop, on_retry=on_retry))
    except OSError as error:
        if error_code(error) in ("InvalidRange", "416"):
            return b""  # the file ends before `start`
        raise


def read_into(url: str, start: int, buffer: memoryview, on_retry: OnRetry | None = None) -> int:
    """Fills the buffer from byte `start` on and returns how many bytes there were, without new memory where it can."""
    if is_local(url):
        descriptor = os.open(local_path(url), os.O_RDONLY)
        try:
            return os.preadv(descriptor, [buffer], start)
        finally:
            os.close(descriptor)
    if url.startswith(("s3://", "s3a://")):
        with contextlib.suppress(ranges.RefusedError):
            return int(retry(url, lambda: _get_into(url, start, buffer), on_retry))
        # The general client says why, or finds another way.
    data = read_range(url, start, start + len(buffer), on_retry)
    buffer[: len(data)] = data
    return len(data)


def _get_into(url: str, start: int, buffer: memoryview) -> int:
    signed_url = _signed(url, int(time.monotonic() / _SIGNED_SECONDS))
    if not ranges.is_direct(signed_url):
        raise ranges.RefusedError("a proxy is in the way")
    return ranges.get_into(signed_url, start, buffer, retries.POLICY.timeout)


@lru_cache(maxsize=4096)
def _signed(url: str, period: int) -> str:
    """A URL by which an object can be read until well after this period of time; a secret, not to be shown."""
    filesystem, path = _locate(url)
    return str(filesystem.url(path, expires=4 * _SIGNED_SECONDS))


def write_bytes(url: str, data: bytes) -> None:
    """Writes a file whole: a reader sees the old content or the new, whenever the writer dies."""
    if not is_local(url):
        _call(url, "pipe_file", data)  # an object appears only when its upload completes
        return
    path = local_path(url)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with _temporary(path, (data,)) as temporary:
        os.replace(temporary, path)


def write_chunks(url: str, chunks: Iterable[bytes | memoryview], staging: str) -> None:
    """As `write_bytes`, for what is too large to be held in one piece.

    Args:
        staging: a local folder; what goes to a remote store is gathered there first, and removed after its upload.
    """
    path = local_path(url) if is_local(url) else os.path.join(staging, name(url))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with _temporary(path, chunks) as temporary:
        if is_local(url):
            os.replace(temporary, path)
        else:
            filesystem, remote = _locate(url)
            retry(url, lambda: filesystem.put_file(temporary, remote))


def write_file(url: str, path: str) -> None:
    """Copies a local file of any size to `url`, whole or not at all, through little memory."""
    if is_local(url):
        with open(path, "rb") as source:
            write_chunks(url, iter(lambda: source.read(_COPY_BYTES), b""), staging="")
    else:
        filesystem, remote = _locate(url)
        retry(url, lambda: filesystem.put_file(path, remote))


def create_bytes(url: str, data: bytes) -> bool:
    """Writes a file whole unless there is one; of several writers one wins. Returns whether this one did.

    Where an answer was lost on the way the winner may be told False: what counts is the file's content.
    """
    try:
        if not is_local(url):
            _call(url, "pipe_file", data, mode="create")
            return True
        path = local_path(url)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with _temporary(path, (data,)) as temporary:
            os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error_code(error) in ("PreconditionFailed", "412"):
            return False
        raise
    return True


@contextlib.contextmanager
def _temporary(path: str, chunks: Iterable[bytes | memoryview]) -> Iterator[str]:
    """A file beside `path` with these contents, on disk; it is gone afterwards, moved or not."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        # Of a full disk the system says that it is full, but not which file it was.
        if error.errno is not None and error.filename in (None, temporary):
            error.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def is_temporary(file_name: str) -> bool:
    """Whether a file is what a killed `write_bytes` leaves behind."""
    return re.fullmatch(r".*\.[0-9a-f]{8}\.tmp", file_name) is not None


def write_text(url: str, text: str) -> None:
    """Writes text as UTF-8, whole or not at all, as `write_bytes` does."""
    write_bytes(url, text.encode())
