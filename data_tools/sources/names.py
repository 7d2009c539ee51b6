"""What names of files and folders say: system files, images, splits of a data set, order of classes."""

import mimetypes
import re
from collections.abc import Iterable

from PIL import Image

# Folders that file managers, network storage and notebooks leave in people's data; compared in lower case.
_SYSTEM_FOLDERS = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "@tmp",
    "#recycle",
    "@recycle",
    "@recently-snapshot",
    "#snapshot",
    "~snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
}
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
# What editors keep beside a file, and programs that download or copy call it until it is whole.
_UNFINISHED = {".bak", ".old", ".orig", ".swp", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".download"}
# Formats of pixels that Pillow opens; not PostScript, which runs another program.
_FORMATS = """
PNG JPEG MPO GIF WEBP BMP DIB PPM TIFF AVIF JPEG2000 ICO CUR ICNS TGA PCX DCX DDS QOI SGI SUN PSD MSP XBM XPM BLP FTEX
"""
Image.init()
FORMATS = [name for name in _FORMATS.split() if name in Image.OPEN]
_IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
_LONGEST_NAME = 255  # bytes, in file systems; archives hold longer ones
_TYPES = mimetypes.MimeTypes()  # Python's own list: that of the machine would make sets depend on it
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "minival"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
    "fold": "fold",
}
SPLITS = tuple(dict.fromkeys(_SPLIT_WORDS.values()))
_SPLIT = "|".join(sorted(_SPLIT_WORDS, key=len, reverse=True))
_SPLIT_FOLDER = re.compile(rf"({_SPLIT})([-_ ]*(set|data|split|images?|imgs?|\d+|[ab]))*", re.IGNORECASE)
_SPLIT_IN_FILE = re.compile(rf"(?<![a-z])({_SPLIT})(?![a-z])", re.IGNORECASE)


def is_system(name: str, folder: bool) -> bool:
    """Whether a file or folder is hidden or left by the system: .thumbs, @eaDir, Thumbs.db, x.png~, x.png.part."""
    known = _SYSTEM_FOLDERS if folder else _SYSTEM_FILES
    if name.startswith(".") or name.lower() in known:
        return True
    return not folder and (name.endswith("~") or suffix(name) in _UNFINISHED)


def suffix(name: str) -> str:
    """What follows the last dot, with it, in lower case; "" if there is none."""
    stem, dot, ending = name.rpartition(".")
    return dot + ending.lower() if stem else ""


def is_image(name: str) -> bool:
    """Whether a name is an image's, readable or not."""
    return suffix(name) in _IMAGE_SUFFIXES or (_type(name) or "").startswith("image/")


def is_other(name: str) -> bool:
    """Whether a name is that of something else than an image. Of many names neither holds: their content decides."""
    return not is_image(name) and _type(name) is not None


def _type(name: str) -> str | None:
    return _TYPES.guess_type("x" + suffix(name))[0]


def folder_split(name: str) -> str | None:
    """The split that a folder is called after: train for "train_images", validation for "val2017"; else None."""
    match = _SPLIT_FOLDER.fullmatch(name)
    return _SPLIT_WORDS[match[1].lower()] if match else None


def file_split(path: str) -> str | None:
    """The split that a file is called after: train for "data/train-00000-of-00001.parquet"; else None."""
    match = _SPLIT_IN_FILE.search(path)
    return _SPLIT_WORDS[match[1].lower()] if match else None


def up_to_split(name: str) -> str | None:
    """A file's name to the end of the word that says the split: "set_dev" of "set_dev-00001.parquet"; or None."""
    match = _SPLIT_IN_FILE.search(name)
    return name[: match.end()] if match else None


def raw(name: str) -> bytes:
    """The bytes of a name, which need be no text."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        return b"".join(_raw_letter(c) for c in name)


def _raw_letter(c: str) -> bytes:
    return bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else c.encode("utf-8", "surrogatepass")


def is_number(name: str) -> bool:
    """Whether a name has decimal digits alone, no more than a file's name can have (Python reads at most 4,300)."""
    return name.isascii() and name.isdecimal() and len(name) <= _LONGEST_NAME


def in_order(classes: Iterable[str]) -> list[str]:
    """Classes by name; by number where all names are decimal numbers."""
    classes = set(classes)
    if all(map(is_number, classes)):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes, key=raw)


def printable(text: str) -> str:
    """A name as it may stand in a line of text: bytes that are no text, and control characters, are written out."""
    return "".join(c if c.isprintable() else _written_out(c) for c in text)


def _written_out(c: str) -> str:
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()
