"""What decides the content of a pack, and whether one that is there is the one asked for."""

import argparse
import hashlib
from typing import Any

from PIL import ImageColor

from data_tools.common import LABELS_NAME, PACK_NAME, Pack
from data_tools.sources import Located
from imm_scale import storage
from imm_scale.errors import UserError

_MEANINGS = {
    "listing": "the source's files (their names, sizes or labels have changed since)",
    "label_map": "the names or the order of the classes in --labels",
}


def background(text: str) -> tuple[int, int, int]:
    """RGB of a colour by its name or as #rrggbb. Raises UserError."""
    try:
        colour = ImageColor.getrgb(text)[:3]
        if max(colour) > 255:
            raise ValueError("a channel has 0 to 255")
    except ValueError as error:
        raise UserError(f"--background {text}: a name such as white, or #rrggbb, is needed") from error
    return colour


def of(args: argparse.Namespace, located: Located, label_map: list[str] | None) -> dict[str, Any]:
    """The arguments that decide what the shards hold, and a fingerprint of the source."""
    built_in, parquet = located.kind == "built_in", located.kind == "parquet"
    return {
        "source": located.given[0] if len(located.given) == 1 else located.given,
        "listing": None if built_in else located.fingerprint(),
        "label_map": None if label_map is None else hashlib.sha256(repr(label_map).encode()).hexdigest(),
        "image_column": args.image_column if parquet else None,
        "label_column": args.label_column if parquet or located.kind == "tar" else None,
        "size": args.size,
        "channels": args.channels if args.channels is not None else (1 if built_in else 3),
        "background": "#{:02x}{:02x}{:02x}".format(*background(args.background)),
        "shard_bytes": args.shard_bytes,
        "shard_samples": args.shard_samples,
        "seed": args.seed,
    }


def check_same(out: str, existing: Pack, arguments: dict[str, Any], moved: bool) -> None:
    """Raises UserError if a pack is another one than asked for, or lacks a shard.

    Args:
        moved: whether the source is said to be the same at another place.
    """
    unknown = [key for key in arguments if key not in existing.arguments]
    differing = [key for key in arguments if key not in unknown and existing.arguments[key] != arguments[key]]
    if differing == ["source"] and "listing" not in unknown:
        if not moved:
            raise UserError(
                f"{out} holds a pack of {existing.arguments['source']}, whose files had the names and sizes of "
                f"those of {arguments['source']}: if it is the same source that has moved, say --source-moved; else "
                "choose another --out"
            )
    elif differing:
        said = ", ".join(_said(key, existing.arguments[key], arguments[key]) for key in differing)
        raise UserError(f"{out} holds another pack; it differs in {said}: choose another --out")
    if not storage.exists(storage.join(out, LABELS_NAME)):
        raise UserError(
            f"{storage.join(out, LABELS_NAME)} is missing: remove {storage.join(out, PACK_NAME)} to pack again"
        )
    for shard in existing.shards:
        url = storage.join(out, shard.name)
        if not storage.exists(url) or storage.size(url) != shard.bytes:
            raise UserError(
                f"{url} is missing or not of {shard.bytes} bytes: remove {storage.join(out, PACK_NAME)} to pack again"
            )
    if unknown:
        print(
            f"{out} was packed by an earlier version, which did not note {', '.join(unknown)}: these are not compared"
        )


def _said(key: str, existing: Any, requested: Any) -> str:
    return _MEANINGS.get(key, f"{key} {existing!r} (asked for: {requested!r})")
