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
    links: list[str] = []
    _visit(root, "", tree, seen, links)
    while links:
        link = links.pop(0)
        path = os.path.join(root, link)
        first = seen.get(_identity(path))
        if first is None:
            _visit(root, link, tree, seen, links)
        else:
            tree.left_out.add("links to folders that are packed already", f"{path} (to {first})")
    return tree


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _visit(root: str, start: str, tree: Tree, seen: dict[tuple[int, int], str], links: list[str]) -> None:
    """Adds what is below a folder, and lists links to folders for later."""
    waiting = [start]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder) if folder else root
        if folder:
            tree.add_folder(folder)
        for entry in _entries(path, seen):
            inside = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                if names.is_system(entry.name, folder=True):
                    tree.left_out.add("hidden and system files", entry.path)
                else:
                    (links if entry.is_symlink() else waiting).append(inside)
            elif _is_file(entry):
                tree.add(inside, entry.path, _size(entry))
            else:
                tree.left_out.add("pipes, sockets and devices", entry.path)


def _entries(path: str, seen: dict[tuple[int, int], str]) -> "list[os.DirEntry[str]]":
    try:
        seen[_identity(path)] = path
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


def _is_file(entry: "os.DirEntry[str]") -> bool:
    """Whether it can be tried as a file; so can links that lead nowhere, whose names are to be reported."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
