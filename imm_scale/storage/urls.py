"""Names of files: a plain path, or a URL of any fsspec file system."""

import os
import posixpath
import re
from pathlib import Path


def is_local(url: str) -> bool:
    """Whether a URL is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The plain path of a local URL."""
    assert is_local(url), url
    return url.removeprefix("file://")


def join(url: str, *parts: str) -> str:
    """The URL of something inside a folder."""
    return posixpath.join(url, *parts)


def parent(url: str) -> str:
    """The URL of the folder something lies in."""
    return posixpath.dirname(url.rstrip("/"))


def name(url: str) -> str:
    """The last part of a URL."""
    return posixpath.basename(url.rstrip("/"))


def shown(url: str) -> str:
    """The URL as it may stand in a message: without a user name and password in it."""
    return re.sub(r"//[^/@]*@", "//", url)


def address(url: str) -> str:
    """The URL as a browser opens it: file:// and the whole path of what is on this machine."""
    return Path(os.path.abspath(local_path(url))).as_uri() if is_local(url) else shown(url)
