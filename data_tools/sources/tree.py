"""The files and folders of a source, whatever holds them."""

import zipfile
import zlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.sources import names
from data_tools.sources.base import Image, LeftOut, read
from imm_scale.errors import UserError

_MOST_LINKS = 40  # of one path, as in Linux


@dataclass(frozen=True, slots=True)
class File:
    """A file of a tree: its path below the root, with slashes, and where its bytes are."""

    path: str
    image: Image
    size: int


@dataclass
class Tree:
    """The files and folders of a folder or an archive, without those that are hidden or the system's.

    `broken_links` are paths of links and where they should lead,
    `synsets` is the text of an ImageNet LOC_synset_mapping.txt beside or above it, `keeps` what must live as long.
    """

    where: str
    separator: str = ":"
    files: dict[str, File] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    broken_links: dict[str, str] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    synsets: str | None = None
    keeps: list[Any] = field(default_factory=list)

    def add(self, path: str, image: Image, size: int) -> None:
        """One more file, unless a part of its path is hidden or the system's. Of two with one path the later counts."""
        parts = _parts(path)
        if parts and self._keeps(parts, folder=False):
            path = "/".join(parts)
            if path in self.files:
                self.left_out.add("older files of the same name", self.name(path))
            self.files[path] = File(path, image, size)

    def add_folder(self, path: str) -> None:
        """One more folder, perhaps empty."""
        parts = _parts(path)
        if parts and self._keeps(parts, folder=True):
            self.folders.add("/".join(parts))

    def add_broken_link(self, path: str, target: str) -> None:
        """A link that leads to nothing in the tree, or to nothing at all."""
        parts = _parts(path)
        if parts and self._keeps(parts, folder=False):
            self.broken_links["/".join(parts)] = target
            self.left_out.add("links that lead nowhere", f"{self.name(path)} (to {target})")

    def add_links(self, links: Mapping[str, str]) -> None:
        """Links of an archive by name, and where they lead: files take the place of links to them."""
        folders: set[str] = set()
        for link, target in links.items():
            file = self.files.get(end_of_links(target, links, self.files))
            if file is not None:
                self.add(link, file.image, file.size)
                continue
            folders = folders or self.folders | {above for path in self.files for above in _above(path)}
            if end_of_links(target, links, folders) in folders:
                self.left_out.add("links to folders that are packed already", f"{self.name(link)} (to {target})")
            else:
                self.add_broken_link(link, target)

    def name(self, path: str) -> str:
        """How messages call a file; in a folder, its path."""
        image = self.files[path].image if path in self.files else None
        return image if isinstance(image, str) else f"{self.where}{self.separator}{path}"

    def text(self, path: str) -> str:
        """The text of a file that says labels. Raises UserError if it cannot be read."""
        image = self.files[path].image
        assert not isinstance(image, np.ndarray)
        try:
            return read(image).decode("utf-8-sig")  # some editors of Windows mark it
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            where = names.printable(self.name(path))
            raise UserError(f"{where} should say the labels but cannot be read ({error}): mend or remove it") from error

    def _keeps(self, parts: list[str], folder: bool) -> bool:
        for i, part in enumerate(parts):
            if names.is_system(part, folder or i + 1 < len(parts)):
                self.left_out.add("hidden and system files", self.name("/".join(parts)))
                return False
        return True


def end_of_links(target: str, links: Mapping[str, str], there: Container[str]) -> str:
    """Where a path of an archive leads by way of its links; no further than Linux follows them."""
    for _ in range(_MOST_LINKS):
        if target in there or target not in links:
            break
        target = links[target]
    return target


def _above(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".", "..")]
