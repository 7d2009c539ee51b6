"""Blocks kept in a folder on the node's own disk, shared by its ranks, within a number of bytes.

Every change happens under one file lock, which the system frees when its holder is killed; entries appear by rename.
So a killed process leaves at most a temporary file, which the next change by anyone removes.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

from imm_scale.errors import UserError

log = logging.getLogger("imm_scale")
_SUFFIX = ".block"
_FULL_SHARE = 0.9  # eviction makes this much room at once, so that few writes pay for it


class BlockCache:
    """Bytes by key; the least recently used entries make room for new ones.

    The entries' bytes never exceed `max_bytes`. What is read must be checked by the caller: a disk may damage it.

    Raises:
        UserError: the folder cannot be created or written, or max_bytes is not positive.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise UserError(f"data.cache_bytes is {max_bytes}: it must be above 0")
        self._folder, self._max_bytes = folder, max_bytes
        self._refused = False
        self._lock_path, self._total_path = os.path.join(folder, "lock"), os.path.join(folder, "total")
        try:
            os.makedirs(folder, exist_ok=True)
            with self._locked():
                self._write_total(sum(size for _, size, _ in self._entries()))
        except OSError as error:
            raise UserError(
                f"data.cache_dir={folder} cannot be used ({error.strerror}): name another folder"
            ) from error

    def get(self, key: str) -> bytes | None:
        """The bytes put under a key, if they are still there."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data = file.read()
            os.utime(path)
        except FileNotFoundError:
            return None
        return data

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Keeps the bytes, at the cost of others; what is larger than the whole cache is not kept.

        Nor is anything more once the disk takes none, being full, say: that is logged, and reading goes on without.
        """
        if len(data) > self._max_bytes or self._refused:
            return
        try:
            self._put(key, data)
        except OSError as error:
            self._refused = True
            log.warning(
                "data.cache_dir=%s takes no more blocks (%s): what is not in it is read from the store from now on",
                self._folder,
                error,
            )

    def _put(self, key: str, data: bytes | memoryview) -> None:
        with self._locked():
            path = self._path(key)
            if os.path.exists(path):
                return
            total = self._read_total()
            if total + len(data) > self._max_bytes:
                total = self._evict(int(self._max_bytes * _FULL_SHARE) - len(data))
            # Counted before it is there: killed in between, the total is too large, never too small.
            self._write_total(total + len(data))
            temporary = path + ".tmp"
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, path)

    def drop(self, key: str) -> None:
        """Forgets a key, as when its bytes turn out to be damaged."""
        with self._locked(), contextlib.suppress(FileNotFoundError):
            size = os.path.getsize(self._path(key))
            os.remove(self._path(key))
            self._write_total(self._read_total() - size)

    def _path(self, key: str) -> str:
        return os.path.join(self._folder, key + _SUFFIX)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _entries(self) -> Iterator[tuple[str, int, int]]:
        """Path, bytes and time of last use of every entry; removes temporary files, since the lock is held."""
        for entry in list(os.scandir(self._folder)):
            if entry.name.endswith(".tmp"):
                os.remove(entry.path)
            elif entry.name.endswith(_SUFFIX):
                status = entry.stat()
                yield entry.path, status.st_size, status.st_mtime_ns

    def _evict(self, goal: int) -> int:
        """Removes the longest unused entries until at most `goal` bytes are left; returns how many are."""
        entries = sorted(self._entries(), key=lambda entry: entry[2])
        total = sum(size for _, size, _ in entries)
        for path, size, _ in entries:
            if total <= max(goal, 0):
                break
            os.remove(path)
            total -= size
        return total

    def _read_total(self) -> int:
        """Counts again where the file was lost or torn by a kill."""
        try:
            with open(self._total_path) as file:
                return int(file.read())
        except (FileNotFoundError, ValueError):
            return sum(size for _, size, _ in self._entries())

    def _write_total(self, total: int) -> None:
        temporary = self._total_path + ".tmp"
        with open(temporary, "w") as file:
            file.write(str(total))
        os.replace(temporary, self._total_path)
