"""One tree of files as a folder, a ZIP and tars, with names of any bytes."""

import io
import os
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Files = Mapping[bytes, bytes]


def png(seed: int = 0, width: int = 5, height: int = 5) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def as_folder(target: Path, files: Files, folders: Sequence[bytes] = ()) -> Path:
    root = os.fsencode(target)
    for folder in folders:
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    for name, content in files.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    return target


class _RawName(zipfile.ZipInfo):
    """An entry whose name is stored as the bytes it is, without the flag of UTF-8, as Info-ZIP does."""

    raw = b""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 - zipfile's own
        return self.raw, self.flag_bits & ~0x800


def as_zip(target: Path, files: Files, folders: Sequence[bytes] = ()) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        entries = {**{folder + b"/": b"" for folder in folders}, **files}
        for i, (name, content) in enumerate(entries.items()):
            info = _RawName(str(i))
            info.raw = name
            archive.writestr(info, content)
    return target


def as_tar(
    target: Path, files: Files, folders: Sequence[bytes] = (), mode: str = "w", form: int = tarfile.GNU_FORMAT
) -> Path:
    with tarfile.open(target, mode, format=form) as archive:  # type: ignore[call-overload]
        for folder in folders:
            info = tarfile.TarInfo(os.fsdecode(folder))
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target
