"""What `--source` means: one of the built-in sets, a folder of classes, or files of one kind."""

import glob
import hashlib
import os
import zipfile
from dataclasses import dataclass, field

from data_tools.sources import folder, label_files, names
from data_tools.sources.built_in import BUILT_IN
from data_tools.sources.classes import class_root, is_inside
from data_tools.sources.tar_archive import is_tar
from data_tools.sources.tree import Tree
from imm_scale.errors import UserError, explain_stand_in

_ENDINGS = {
    "zip": (".zip",),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    "parquet": (".parquet",),
}
_OTHER_ARCHIVES = (
    ".7z",
    ".rar",
    ".tar.zst",
    ".tzst",
    ".tar.lz4",
    ".arrow",
    ".tfrecord",
    ".h5",
    ".hdf5",
    ".mdb",
    ".lmdb",
)
_MAGIC = {"zip": (b"PK\3\4", b"PK\5\6"), "parquet": (b"PAR1",)}
_KNOWN = "a folder with a subfolder of images per class, .zip, .tar (or .tar.gz) or .parquet files"
_ENDS = (
    1 << 16
)  # bytes at both ends of an archive that the fingerprint covers: headers, and the ZIP's or Parquet's index


@dataclass
class Located:
    """Where images are, listed but not yet read.

    Attributes:
        given: --source as absolute paths; the name of a built-in set stays as it is.
        kind: built_in, folder, zip, tar or parquet.
        files: of the three last kinds.
        tree: of a folder.
        splits: those that files given one by one are of.
        folders: those below the one given in which files were found, if they are several.
    """

    given: list[str]
    kind: str
    files: list[str] = field(default_factory=list)
    tree: Tree | None = None
    splits: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """How messages call the source."""
        return names.printable(", ".join(self.given[:3]) + (", ..." if len(self.given) > 3 else ""))

    def fingerprint(self) -> str:
        """A hash of the names and sizes of all files, of what says labels, and of both ends of archives."""
        digest = hashlib.sha256()
        for line in _tree_lines(self.tree) if self.tree is not None else map(_file_line, self.files):
            digest.update(line + b"\n")
        return digest.hexdigest()


def _tree_lines(tree: Tree) -> list[bytes]:
    lines = [b"%s\0%d" % (names.raw(path), file.size) for path, file in sorted(tree.files.items())]
    lines += sorted(names.raw(path) for path in tree.folders)
    said = [path for path in tree.files if path.split("/")[-1] in (label_files.EDM_NAME, label_files.SYNSETS_NAME)]
    return [*lines, *(tree.text(path).encode() for path in sorted(said)), (tree.synsets or "").encode()]


def _file_line(path: str) -> bytes:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        ends = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        ends += file.read(_ENDS)
    return b"%s\0%d\0%s" % (names.raw(os.path.basename(path)), size, hashlib.sha256(ends).digest())


def locate(given: list[str]) -> Located:
    """Finds and lists what is meant, without reading images.

    Args:
        given: names of a built-in set, a folder, files, or patterns of files.

    Raises:
        UserError: nothing there, several kinds, files of several splits, or what is no set of images.
    """
    if len(given) == 1 and given[0] in BUILT_IN:
        return Located(given, "built_in")
    built_in = next((text for text in given if text in BUILT_IN and not os.path.lexists(text)), None)
    if built_in is not None:
        raise UserError(f"--source {built_in} is a set of its own: give it alone, and pack the others apart")
    paths: list[str] = []
    for text in given:
        paths += _expand(text)
    whole = [os.path.abspath(path) for path in paths]
    folders = [path for path in paths if os.path.isdir(path)]
    if folders and len(paths) > 1:
        raise UserError(f"--source {paths[0]} {paths[1]} ...: give one folder, or files")
    if folders:
        return _in_folder(folders[0], whole)
    splits = sorted({split for path in paths if (split := names.file_split(os.path.basename(path)))})
    return Located(whole, _kind_of(paths), paths, splits=splits if len(splits) > 1 else [])


def _expand(text: str) -> list[str]:
    if "://" in text:
        raise UserError(f"--source {text}: sources are read from local disks; copy it there, or mount it, first")
    path = os.path.expanduser(text)
    if os.path.lexists(path):
        if os.path.isdir(path) or os.path.isfile(path):
            return [path]
        raise UserError(f"--source {text} is neither a folder nor a regular file, or a link that leads nowhere")
    matched = sorted(glob.glob(path, recursive=True), key=names.raw) if glob.has_magic(path) else []
    if not matched:
        raise UserError(f"--source {text} is no folder or file: name some, or {' or '.join(BUILT_IN)}")
    _check_splits(matched, os.path.dirname(path), text)
    return matched


def _check_splits(files: list[str], base: str, text: str) -> None:
    by_split: dict[str, str] = {}
    for path in files:
        split = names.file_split(os.path.relpath(path, base) if base else path)
        if split:
            by_split.setdefault(split, path)
    if len(by_split) > 1:
        by_split = {split: by_split[split] for split in names.SPLITS if split in by_split}
        examples = ", ".join(names.printable(os.path.basename(path)) for path in by_split.values())
        raise UserError(
            f"--source {text} has files of the splits {', '.join(by_split)} ({examples}): choose by a pattern, as in "
            f"--source '{_pattern(next(iter(by_split.values())))}', or give several files or patterns, which are "
            "packed together"
        )


def _pattern(path: str) -> str:
    """A pattern for the files of the same split: "train*.parquet" for "train-00000-of-00001.parquet"."""
    folder, name = os.path.split(glob.escape(path))
    return os.path.join(folder, f"{names.up_to_split(name) or ''}*{names.suffix(name)}")


def _in_folder(path: str, given: list[str]) -> Located:
    tree = folder.walk(path)
    by_kind: dict[str, list[str]] = {}
    images = [name for name in tree.files if names.is_image(name)]
    root = class_root(images)
    for name in sorted(tree.files, key=names.raw):
        kind = _kind_by_name(name)
        if kind and not (images and is_inside(name, root)):
            by_kind.setdefault(kind, []).append(os.path.join(path, name))
    if not by_kind:
        return Located(given, "folder", tree=tree)
    files = next(iter(by_kind.values()))
    if len(by_kind) > 1 or images:
        kinds = " and ".join([*(["images"] if images else []), *(f".{kind} files" for kind in by_kind)])
        raise UserError(
            f"--source {path} holds {kinds}, such as {names.printable(files[0])}: name the files by a pattern, as in "
            f"--source '{os.path.dirname(files[0])}/*{names.suffix(files[0])}', or for the images move the others away"
        )
    _check_splits(files, path, path)
    folders = sorted({os.path.relpath(os.path.dirname(file), path) for file in files}, key=names.raw)
    return Located(given, _kind_of(files), files, folders=folders if len(folders) > 1 else [])


def _kind_by_name(name: str) -> str | None:
    return next((kind for kind, endings in _ENDINGS.items() if name.lower().endswith(endings)), None)


def without_ending(name: str) -> str:
    """An archive's name without what says its kind: "v1.0" of "v1.0.tar.gz"."""
    endings = [ending for endings in _ENDINGS.values() for ending in endings if name.lower().endswith(ending)]
    return name[: -max(map(len, endings))] if endings else name


def _check_once(files: list[str]) -> None:
    """Raises UserError for a file that is meant twice, by a name and a pattern or by two links."""
    seen: dict[tuple[int, int], str] = {}
    for path in files:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        first = seen.get(identity)
        seen[identity] = path
        if first is not None:
            other = "twice" if first == path else f"and {names.printable(path)}, which are one file"
            raise UserError(f"--source names {names.printable(first)} {other}: name each file once")


def _kind_of(files: list[str]) -> str:
    """The kind all files share, by their names and their first bytes. Raises UserError for others, and for doubles."""
    _check_once(files)
    kinds = {path: _checked_kind(path) for path in files}
    first = kinds[files[0]]
    other = next((path for path in files if kinds[path] != first), None)
    if other is not None:
        raise UserError(f"--source has {files[0]} and {other}, which are of two kinds: pack them apart")
    return first


def _checked_kind(path: str) -> str:
    kind = _kind_by_name(path)
    if kind is None:
        if names.is_image(path):
            raise UserError(f"--source {names.printable(path)} is an image: a folder of images per class is needed")
        unpack = "unpack it first; " if path.lower().endswith(_OTHER_ARCHIVES) else ""
        raise UserError(f"--source {names.printable(path)}: {unpack}{_KNOWN} are read")
    with open(path, "rb") as file:
        head = file.read(512)
    if is_tar(head) and kind == "tar":
        return kind  # whatever the name of its first file makes it look like
    if not head:
        raise UserError(f"{path} is empty: copy it again")
    stand_in = explain_stand_in(head, f"a .{kind} file")
    if stand_in is not None:
        raise UserError(f"{path} is {stand_in}")
    if kind == "zip" and zipfile.is_zipfile(path):
        return kind  # the index at the end counts: a program that unpacks it may come first
    if kind in _MAGIC and not head.startswith(_MAGIC[kind]):
        raise UserError(f"{path} is no readable {kind.upper()} file: it begins with {head[:4]!r}; copy it again")
    return kind
