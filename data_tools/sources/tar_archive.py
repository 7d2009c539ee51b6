"""What is in a tar, for any writer: plain, PAX or GNU headers, links, tars inside tars, compressed."""

import bz2
import gzip
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO

from data_tools.sources.base import LeftOut, Slice
from data_tools.sources.spool import Spool
from data_tools.sources.tree import end_of_links
from imm_scale.errors import UserError

_NUL = bytes(2 * tarfile.BLOCKSIZE)
_CHUNK = 1 << 20
_OPENERS: dict[bytes, Callable[[str], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


@dataclass
class Entries:
    """Files and folders of a tar by name; a later file of one name stands for an earlier one.

    `links` are those that lead to no file of it, and where they lead.
    """

    files: dict[str, Slice] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    keeps: list[Any] = field(default_factory=list)


def entries_of(path: str) -> Entries:
    """Everything in a tar, which may be compressed by gzip, bzip2 or xz: it is unpacked to a temporary file then.

    Raises:
        UserError: it is empty, damaged, cut short, or two archives joined.
    """
    entries = Entries()
    with open(path, "rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
        opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
        opener = None if is_tar(head) else opener  # a name may begin as a compressed file does
        if opener is None:
            _read(file, path, path, 0, "", entries)
            return entries
    spool = _decompressed(path, opener)
    entries.keeps.append(spool)
    with open(spool.name, "rb") as file:
        _read(file, path, spool.name, 0, "", entries)
    return entries


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is a tar of any writer since 1988."""
    return head[257:262] == b"ustar"


def _decompressed(path: str, opener: Callable[[str], Any]) -> Spool:
    spool = Spool(path)
    with opener(path) as packed:
        while chunk := _next_chunk(packed, path):
            spool.write(chunk)
    spool.flush()
    return spool


def _next_chunk(packed: IO[bytes], path: str) -> bytes:
    try:
        return packed.read(_CHUNK)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} cannot be decompressed ({error}): it is damaged or cut short, copy it again"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path} cannot be decompressed ({error}): it is damaged, copy it again") from error


def _read(file: BinaryIO, where: str, data_path: str, start: int, prefix: str, entries: Entries) -> None:
    """Adds what is in the tar that begins at byte `start` of a file; tars inside it count as folders."""
    inner: list[tuple[str, int]] = []
    links: dict[str, str] = {}
    size = os.fstat(file.fileno()).st_size
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # millions of them would fill the memory
                if archive.offset > size:
                    raise tarfile.ReadError(f"{info.name} reaches to byte {archive.offset}, the file to {size}")
                _add(info, data_path, prefix, entries, inner, links)
            _check_end(file, where, archive.offset, nested=bool(prefix))
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where}{f' ({prefix[:-1]}.tar in it)' if prefix else ''} is no readable tar archive ({error}): it is "
            "empty, damaged or cut short, copy or write it again"
        ) from error
    _follow_links(links, entries)
    for name, offset in inner:
        _read(file, where, data_path, offset, f"{name}/", entries)


def _add(
    info: tarfile.TarInfo,
    data_path: str,
    prefix: str,
    entries: Entries,
    inner: list[tuple[str, int]],
    links: dict[str, str],
) -> None:
    name = prefix + info.name
    if info.isdir():
        entries.folders.append(name)
    elif info.issparse():
        entries.left_out.add("files with holes", name)
    elif info.isreg():
        if name.lower().endswith(".tar"):
            inner.append((name[:-4], info.offset_data))
            return
        if name in entries.files:
            entries.left_out.add("older files of the same name", name)
        entries.files[name] = Slice(data_path, info.offset_data, info.size)
    elif info.islnk():
        links[name] = prefix + info.linkname
    elif info.issym():
        links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))
    else:
        entries.left_out.add("pipes, sockets and devices", name)


def _follow_links(links: dict[str, str], entries: Entries) -> None:
    """Files take the place of links to them, by way of other links too, whatever their order."""
    for name, target in links.items():
        target = end_of_links(target, links, entries.files)
        if target in entries.files:
            entries.files[name] = entries.files[target]
        else:
            entries.links[name] = target


def _check_end(file: BinaryIO, where: str, end: int, nested: bool) -> None:
    """tarfile takes a cut archive for a short one, a damaged header for the end, and the first of two for all."""
    file.seek(end)
    rest = file.read(len(_NUL))
    if len(rest) < len(_NUL):
        raise UserError(f"{where} has no end of an archive after byte {end}: it was cut short, copy it again")
    if rest != _NUL:
        raise UserError(f"{where}: the tar header at byte {end} is damaged: copy or write the archive again")
    while not nested and (chunk := file.read(_CHUNK)):
        if content := chunk.lstrip(b"\0"):
            second = file.tell() - len(content)
            raise UserError(
                f"{where} goes on after the end of an archive at byte {end}, as two tars do that were joined: cut them "
                f"apart (head -c {second}, tail -c +{second + 1}) and give both files"
            )
