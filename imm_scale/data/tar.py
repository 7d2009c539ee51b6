"""Tar archives as this project writes them: members with plain 512-byte headers, found without Python's tarfile.

The parser takes nothing for granted that a cut or a flipped bit could have changed: header checksums, member types,
the padding of names and the two empty blocks at the end are checked. Archives of other writers (PAX or GNU headers)
go through tarfile, with the end checked as well, because tarfile takes a cut archive for a short one.
"""

import io
import mmap
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from imm_scale.errors import UserError, explain_stand_in

BLOCK = tarfile.BLOCKSIZE
_NUL = bytes(BLOCK)
_PIECE = 1 << 20
_CHECKSUM = slice(148, 156)
_FOREIGN_TYPES = b"xgLKSDVMN"  # PAX and GNU extensions


@dataclass(frozen=True)
class Member:
    """A file in an archive: its bytes are [offset, offset + size)."""

    name: str
    offset: int
    size: int


class _ForeignError(Exception):
    """An archive with extended headers, which tarfile has to read."""


def member(name: str, data: bytes) -> bytes:
    """A header and the padded data of one file, the same bytes whenever and by whomever it is written.

    Raises:
        UserError: a name that does not fit a plain (ustar) header.
    """
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mtime = 0
    try:
        header = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise UserError(f"sample name {name!r} does not fit a tar header ({error}): use a shorter one") from error
    return header + data + bytes(-len(data) % BLOCK)


def end() -> bytes:
    """The two empty blocks that end an archive."""
    return bytes(2 * BLOCK)


def members(data: bytes | mmap.mmap, where: str) -> list[Member]:
    """Every regular file of an archive, in order.

    Raises:
        UserError: a damaged header, a member that reaches past the end, or an archive without its end. `where` names
            the archive in the message.
    """
    other = _other_kind(data[:BLOCK])
    if other is not None:
        raise UserError(f"{where} is {other}")
    try:
        return list(_plain_members(data, where))
    except _ForeignError:
        return _foreign_members(data, where)


def _other_kind(head: bytes) -> str | None:
    """What a file is that begins as no tar does, and what to do; None where the parser may say."""
    if head[257:262] == b"ustar":
        return None  # whatever the name of its first file makes it look like
    if not head:
        return "empty: it was cut short, copy it again"
    stand_in = explain_stand_in(head, "a tar archive")
    if stand_in is not None:
        return stand_in
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\3\4")):
        return "compressed: shards are plain tar archives, so that parts of them can be read; unpack and write it again"
    return None


def _plain_members(data: bytes | mmap.mmap, where: str) -> Iterator[Member]:
    position = 0
    while True:
        header = data[position : position + BLOCK]
        if header == _NUL and data[position + BLOCK : position + 2 * BLOCK] == _NUL:
            _check_rest(data, position + 2 * BLOCK, where)
            return
        if len(header) < BLOCK:
            raise UserError(f"{where} ends at byte {len(data)} without the end of an archive: it was cut short")
        name, size, kind = _read_header(header, position, where)
        start = position + BLOCK
        position = start + size + -size % BLOCK
        if position > len(data):
            raise UserError(
                f"{where} ends at byte {len(data)}, {name} reaches to byte {start + size}: it was cut short"
            )
        if kind in b"0\0":
            yield Member(name, start, size)


def _read_header(header: bytes, position: int, where: str) -> tuple[str, int, bytes]:
    """Name, size and type. The sum over the header, with its own field as spaces, finds any flipped bit."""
    try:
        stored = int(header[_CHECKSUM].strip(b" \0"), 8)
        if stored != sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" "):
            raise UserError(f"{where}: the tar header at byte {position} is damaged (checksum)")
        kind = header[156:157]
        if kind in _FOREIGN_TYPES:
            raise _ForeignError
        # Names need be no text; bytes that are none go through as Python's own functions take them.
        name = header[:100].rstrip(b"\0").decode(errors="surrogateescape")
        prefix = header[345:500].rstrip(b"\0").decode(errors="surrogateescape") if header[257:262] == b"ustar" else ""
        return (f"{prefix}/{name}" if prefix else name), int(header[124:136].strip(b" \0"), 8), kind
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: the tar header at byte {position} is damaged ({error})") from error


def _foreign_members(data: bytes | mmap.mmap, where: str) -> list[Member]:
    try:
        with tarfile.open(fileobj=io.BytesIO(bytes(data)), mode="r:") as archive:
            infos = archive.getmembers()
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{where} is no readable tar archive ({error}): copy or write it again") from error
    last = infos[-1] if infos else None
    after = last.offset_data + last.size + -last.size % BLOCK if last else 0
    if data[after : after + 2 * BLOCK] != 2 * _NUL:
        raise UserError(f"{where}: no end of the archive after byte {after}: it was cut short or damaged")
    _check_rest(data, after + 2 * BLOCK, where)
    return [Member(info.name, info.offset_data, info.size) for info in infos if info.isreg()]


def _check_rest(data: bytes | mmap.mmap, start: int, where: str) -> None:
    """After the end of an archive there is nothing but empty blocks, unless another archive was joined to it."""
    for position in range(start, len(data), _PIECE):
        if data[position : position + _PIECE].strip(b"\0"):
            raise UserError(
                f"{where} goes on after the end of an archive at byte {start}, as two tars do that were joined: "
                "cut them apart, or write one anew"
            )


def samples(data: bytes | mmap.mmap, where: str) -> list[tuple[str, dict[str, Member]]]:
    """Members grouped by key as stock webdataset does: neighbours that share the name up to its first dot.

    Returns:
        Key and {extension: member} of each sample, in order.

    Raises:
        UserError: as `members`, or a sample with two files of one extension.
    """
    grouped: list[tuple[str, dict[str, Member]]] = []
    for file in members(data, where):
        folder, _, base = file.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if not grouped or grouped[-1][0] != key:
            grouped.append((key, {}))
        if extension in grouped[-1][1]:
            raise UserError(f"{where}: sample {key} has two files .{extension}")
        grouped[-1][1][extension] = file
    return grouped
