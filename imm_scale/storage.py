"""Files anywhere fsspec reaches (a path, s3://, memory://, ...), written whole or not at all."""

import os
import posixpath
import uuid
from functools import lru_cache
from typing import Any

import fsspec

from imm_scale.errors import UserError


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The plain path of a local URL."""
    assert is_local(url), url
    return url.removeprefix("file://")


def join(url: str, *parts: str) -> str:
    return posixpath.join(url, *parts)


def parent(url: str) -> str:
    return posixpath.dirname(url.rstrip("/"))


def name(url: str) -> str:
    return posixpath.basename(url.rstrip("/"))


@lru_cache(maxsize=32)
def _filesystem(protocol: str) -> Any:
    try:
        # Listings are never cached: another process may be writing.
        return (
            fsspec.filesystem(protocol, use_listings_cache=False) if protocol != "file" else fsspec.filesystem("file")
        )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"no file system for {protocol}:// ({error}); install the fsspec package that provides it"
        ) from error


def _locate(url: str) -> tuple[Any, str]:
    protocol = "file" if is_local(url) else url.split("://", 1)[0]
    filesystem = _filesystem(protocol)
    return filesystem, local_path(url) if protocol == "file" else filesystem._strip_protocol(url)


def exists(url: str) -> bool:
    filesystem, path = _locate(url)
    return bool(filesystem.exists(path))


def size(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    filesystem, path = _locate(url)
    return int(filesystem.info(path)["size"])


def list_names(url: str) -> list[str]:
    """Sorted names of the files and folders directly inside a folder; empty if there is no such folder."""
    filesystem, path = _locate(url)
    try:
        return sorted(name(entry) for entry in filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []


def make_folder(url: str) -> None:
    """Creates a local folder and its parents; object stores need none."""
    if is_local(url):
        os.makedirs(local_path(url), exist_ok=True)


def remove(url: str) -> None:
    """Removes a file or a whole folder; what is not there is no error."""
    filesystem, path = _locate(url)
    try:
        filesystem.rm(path, recursive=True)
    except FileNotFoundError:
        return


def read_bytes(url: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    filesystem, path = _locate(url)
    return bytes(filesystem.cat_file(path))


def read_text(url: str) -> str:
    return read_bytes(url).decode()


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; shorter where the file ends before `stop`."""
    filesystem, path = _locate(url)
    return bytes(filesystem.cat_file(path, start=start, end=stop))


def write_bytes(url: str, data: bytes) -> None:
    """Writes a file whole: a reader sees the old content or the new, whenever the writer dies."""
    if not is_local(url):
        filesystem, path = _locate(url)
        filesystem.pipe_file(path, data)  # an object appears only when its upload completes
        return
    path = local_path(url)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_text(url: str, text: str) -> None:
    write_bytes(url, text.encode())
