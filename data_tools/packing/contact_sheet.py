"""A picture of the first images of every class, as they went into the shards."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageDraw

from data_tools.packing.shard_writer import EXAMPLES, Example, ShardRecord
from imm_scale import storage

_CELL = 64  # pixels on a side of what an image is shown in
_GAP = 2
_LABEL_WIDTH = 224
_ROWS = 100  # classes of a sheet
_READERS = 16  # images read at once: each is a request where the shards are in an object store


def draw(out: str, records: Sequence[ShardRecord], class_names: Sequence[str]) -> list[str]:
    """Writes contact-000.png ... into the folder of the shards, a row of at most 8 images a class.

    Returns:
        The names of the sheets.
    """
    examples: dict[int, list[tuple[str, Example]]] = {}
    for record in records:
        for example in record.examples:
            examples.setdefault(example.label, []).append((storage.join(out, record.shard.name), example))
    sheets = []
    for start in range(0, len(class_names), _ROWS):
        rows = [(i, class_names[i], examples.get(i, [])) for i in range(start, min(start + _ROWS, len(class_names)))]
        stream = io.BytesIO()
        _sheet(rows).save(stream, format="PNG")
        sheets.append(f"contact-{start // _ROWS:03d}.png")
        storage.write_bytes(storage.join(out, sheets[-1]), stream.getvalue())
    return sheets


def _sheet(rows: Sequence[tuple[int, str, Sequence[tuple[str, Example]]]]) -> Image.Image:
    step = _CELL + _GAP
    sheet = Image.new("RGB", (_LABEL_WIDTH + EXAMPLES * step, len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    with ThreadPoolExecutor(_READERS) as readers:
        for row, (label, name, places) in enumerate(rows):
            # Pillow's own font has no other letters, and older builds of it fail at them.
            pen.text(
                (4, row * step + _CELL // 3),
                f"{label}  {name}"[:34].encode("latin-1", "replace").decode("latin-1"),
                "black",
            )
            for column, cell in enumerate(readers.map(_cell, places)):
                sheet.paste(cell, (_LABEL_WIDTH + column * step, row * step))
    return sheet


def _cell(place: tuple[str, Example]) -> Image.Image:
    """An image shrunk into the cell, or enlarged by a whole factor so that its pixels are seen."""
    url, example = place
    with Image.open(io.BytesIO(storage.read_range(url, example.offset, example.offset + example.size))) as opened:
        picture = opened.convert("RGB")
    factor = _CELL // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((_CELL, _CELL))
    return picture
