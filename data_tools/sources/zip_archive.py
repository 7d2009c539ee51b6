"""The tree of a ZIP archive."""

import posixpath
import stat
import struct
import zipfile
import zlib

from data_tools.sources.base import ZipMember, open_zip, read
from data_tools.sources.label_files import synsets_above
from data_tools.sources.tree import Tree
from imm_scale.errors import UserError

_UTF8 = 0x800  # flag of an entry: its name is UTF-8
_ENCRYPTED = 0x1
_FIELD = struct.Struct("<HH")  # kind and length of an extra field
_UNICODE_PATH = 0x7075
_LONGEST_LINK = 4096


def tree_of(path: str) -> Tree:
    """Every file of an archive. Raises UserError for one that is damaged or protected by a password."""
    try:
        return _listed(path, open_zip(path).infolist())
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--source {path} is no readable ZIP file ({error}): it is damaged or cut short, copy it again"
        ) from error


def _listed(path: str, infos: list[zipfile.ZipInfo]) -> Tree:
    files = [info for info in infos if not info.is_dir()]
    if files and all(info.flag_bits & _ENCRYPTED for info in files):
        raise UserError(f"--source {path} is protected by a password: unpack it, and give the folder")
    tree = Tree(path, synsets=synsets_above(path))
    has_slashes = any("/" in info.filename for info in files)
    links: dict[str, str] = {}
    for info in infos:
        name = _name(info)
        # Some archivers of Windows write backslashes, against the specification of ZIP.
        name = name if has_slashes else name.replace("\\", "/")
        if name.endswith("/"):
            tree.add_folder(name)
        elif stat.S_ISLNK(info.external_attr >> 16):
            links[name] = _target(path, name, info)
        else:
            tree.add(name, ZipMember(path, info.filename, info.header_offset), info.file_size)
    tree.add_links(links)
    return tree


def _target(path: str, name: str, info: zipfile.ZipInfo) -> str:
    """Where a link leads: the content of its entry."""
    try:
        target = read(ZipMember(path, info.filename, info.header_offset), _LONGEST_LINK).decode(
            "utf-8", "surrogateescape"
        )
    except (RuntimeError, zipfile.BadZipFile, zlib.error, EOFError):
        return "?"  # one damaged entry among others
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))


def _name(info: zipfile.ZipInfo) -> str:
    """The name as it was typed: without the flag of UTF-8, Python takes it for the code page of DOS.

    Many archivers leave the flag out where the system's names are UTF-8, and names of Unix need be no text at all.
    """
    if info.flag_bits & _UTF8:
        return info.filename
    stored = info.filename.encode("cp437")
    try:
        return _unicode_path(info.extra, stored) or stored.decode("utf-8")
    except UnicodeDecodeError:
        return info.filename if info.create_system == 0 else stored.decode("utf-8", "surrogateescape")


def _unicode_path(extra: bytes, stored: bytes) -> str | None:
    """The name beside one in a code page that lacks its letters, where several names may look alike.

    Source: APPNOTE.TXT of PKWARE, 4.6.9: version 1, CRC of the name it stands for, UTF-8.
    """
    while len(extra) > _FIELD.size:
        kind, length = _FIELD.unpack_from(extra)
        content, extra = extra[_FIELD.size : _FIELD.size + length], extra[_FIELD.size + length :]
        if kind == _UNICODE_PATH and content[:5] == struct.pack("<BI", 1, zlib.crc32(stored)):
            return content[5:].decode("utf-8")
    return None
