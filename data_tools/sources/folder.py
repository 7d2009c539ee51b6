"""The tree of a folder on this machine."""

import os

from data_tools.sources import names
from data_tools.sources.label_files import synsets_above
from data_tools.sources.tree import Tree
from imm_scale.errors import UserError, explain_os_error


def walk(root: str) -> Tree:
    """Every file below a folder. Links are followed, but each folder is visited once: where it is, if that is below.

    Raises:
        UserError: a folder that cannot be read.
    """
    tree = Tree(root, separator="/", synsets=synsets_above(root))
    seen: dict[tuple[int, int], str] = {}
    links = [""]
    while links:
        _visit(root, links.pop(0), tree, seen, links)
    return tree


def _identity(path: str) -> tuple[int, int] | None:
    """What is the same for one folder by all its paths; None where one may not look."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _visit(root: str, start: str, tree: Tree, seen: dict[tuple[int, int], str], links: list[str]) -> None:
    """Adds what is below a folder, and lists links to folders for later."""
    waiting = [start]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder) if folder else root
        identity = _identity(path)
        first = seen.get(identity) if identity is not None else None
        if first is not None:  # a link, or below a link to a folder above this one
            tree.left_out.add("links to folders that are packed already", f"{path} (to {first})")
            continue
        if identity is not None:
            seen[identity] = path
        if folder:
            tree.add_folder(folder)
        for entry in _entries(path):
            inside = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                if names.is_system(entry.name, folder=True):
                    tree.left_out.add("hidden and system files", entry.path)
                else:
                    (links if entry.is_symlink() else waiting).append(inside)
            elif _leads_nowhere(entry) and not names.is_image(entry.name):
                tree.add_broken_link(inside, os.readlink(entry.path))
            elif _is_file(entry):
                tree.add(inside, entry.path, _size(entry))
            else:
                tree.left_out.add("pipes, sockets and devices", entry.path)


def _entries(path: str) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: names.raw(entry.name))
    except OSError as error:
        mistake = explain_os_error(error)
        what = str(mistake) if mistake else f"{path}: {error.strerror}"
        raise UserError(f"a folder of --source cannot be read: {names.printable(what)}") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where one may not look: reading the "file" will say so
        return False


def _leads_nowhere(entry: "os.DirEntry[str]") -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _is_file(entry: "os.DirEntry[str]") -> bool:
    """Whether it can be tried as a file; so can links of images that lead nowhere, whose names are to be reported."""
    try:
        return entry.is_file() or _leads_nowhere(entry)
    except OSError:
        return True


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
