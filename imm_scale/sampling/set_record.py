"""The record beside a set of samples: whose the set is, whether it is whole, and which name it has.

FOLDER/NAME.json lies beside NAME.png, NAME.npz, NAME/ and NAME.shards/. It is written before the first sample, with all
that decides the samples, and again after the last output, as finished. A set is never drawn over one of other samples:
it gets a name of its own, which says what tells the two apart.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from imm_scale import storage
from imm_scale.errors import UserError

FORMAT_VERSION = 1
_ENDINGS = (".png", ".npz", ".shards", "")
_LONGEST_WORD = 40  # characters, of several in a name

Settings = Mapping[str, Any]
Record = dict[str, Any]


def identity(settings: Settings) -> str:
    """sha256 of all that decides the bits of a sample."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def url(folder: str, name: str) -> str:
    """Where the record of a set lies."""
    return storage.join(folder, f"{name}.json")


def read(folder: str, name: str) -> Record | None:
    """The record of a set; None where there is none."""
    try:
        record: Record = json.loads(storage.read_text(url(folder, name)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{url(folder, name)} is no record of samples ({error}): move it away or give --out") from error
    return record


def begin(folder: str, name: str, settings: Settings, num: int, shown: Mapping[str, str]) -> str:
    """Takes a name for a set: `name` itself, or a longer one where a set of other samples has that.

    Args:
        num: samples of the set. A set of fewer of the same samples goes on; one of more is left as it is.
        shown: what to write for some settings in a name, in place of their values.

    Returns:
        The name, whose record stands from here on.

    Raises:
        UserError: all names are taken.
    """
    for candidate in _names(folder, name, settings, num, shown):
        if _is_ours(folder, candidate, settings, num):
            return candidate
    raise UserError(f"{storage.join(folder, name)} and the names like it hold other samples: choose another --out")


def unfinished(settings: Settings, num: int) -> Record:
    """What a record says while samples are drawn."""
    return {
        "format_version": FORMAT_VERSION,
        "identity": identity(settings),
        "num": num,
        "finished": False,
        "settings": dict(settings),
    }


def _is_ours(folder: str, name: str, settings: Settings, num: int) -> bool:
    """Whether a set of these samples stands under a name, or nothing did and now its record does."""
    record = read(folder, name)
    if record is None and not _is_free(folder, name, identity(settings)):
        return False
    if record is None:
        storage.create_bytes(url(folder, name), json.dumps(unfinished(settings, num), indent=1).encode())
        record = read(folder, name)  # another job may have been faster
    return record is not None and record.get("identity") == identity(settings) and record["num"] <= num


def _is_free(folder: str, name: str, wanted: str) -> bool:
    """Whether nothing lies under a name that has no record, or parts of the same samples, of a job that was stopped."""
    parts = storage.join(folder, f"{name}.shards")
    records = [part for part in storage.list_names(parts) if part.endswith(".json")]
    if records:
        return all(json.loads(storage.read_text(storage.join(parts, part)))["identity"] == wanted for part in records)
    return not any(storage.exists(storage.join(folder, f"{name}{ending}")) for ending in _ENDINGS)


def _names(folder: str, name: str, settings: Settings, num: int, shown: Mapping[str, str]) -> Iterator[str]:
    yield name
    record = read(folder, name)
    suffixes = _differences((record or {}).get("settings", {}), settings, shown)
    if record is not None and not suffixes:
        suffixes = [f"num-{num}"]
    yield "-".join([name, *suffixes, *([] if suffixes else [identity(settings)[:8]])])
    yield "-".join([name, *suffixes, identity(settings)[:8], f"num-{num}"])


def _differences(other: Settings, settings: Settings, shown: Mapping[str, str]) -> list[str]:
    """What tells these samples from others, as words of a file name: seed-1, ema-0.999."""
    if not other:
        return []
    ours = json.loads(json.dumps(settings))  # as a file gives it back
    differing = [key for key in ours if other.get(key) != ours[key]]
    return [_word(shown.get(key) or f"{key}-{_text(ours[key])}") for key in differing]


def _text(value: Any) -> str:
    """A value in a name; a hash stands for what no name can hold."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if re.fullmatch(r"[\w.+-]{1,24}", text) else _hash(text)


def _word(text: str) -> str:
    """Any text as a part of a file name."""
    word = re.sub(r"[^\w.+-]+", "_", text)
    return word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD - 9]}-{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def check_finished(images: str) -> None:
    """Raises UserError where the record of a set of images (NAME.npz, NAME/ or NAME.shards/) says it is not whole."""
    folder, name = storage.parent(images.rstrip("/")), storage.name(images.rstrip("/"))
    stem = name.removesuffix(".npz").removesuffix(".shards")
    try:
        record = json.loads(storage.read_text(url(folder, stem)))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return  # not a set of ours
    if isinstance(record, dict) and record.get("finished") is False:
        raise UserError(
            f"{images} is not whole: its samples are still being drawn, or the job was stopped. Run the "
            "same `imm-scale sample` again, which goes on where it stopped"
        )
