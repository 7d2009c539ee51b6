"""The files and folders of a source, whatever holds them."""

import zipfile
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.sources import names
from data_tools.sources.base import Image, LeftOut, read
from imm_scale.errors import UserError


@dataclass(frozen=True, slots=True)
class File:
    """A file of a tree: its path below the root, with slashes, and where its bytes are."""

    path: str
    image: Image
    size: int


@dataclass
class Tree:
    """The files and folders of a folder or an archive, without those that are hidden or the system's.

    `synsets` is the text of an ImageNet LOC_synset_mapping.txt beside or above it, `keeps` what must live as long.
    """

    where: str
    separator: str = ":"
    files: dict[str, File] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
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


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".", "..")]
