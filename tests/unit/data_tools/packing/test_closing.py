"""What is said and shown at the end."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import pack
from data_tools.packing import closing
from tests.unit.data_tools.sources import trees


def _square(colour: tuple[int, int, int], side: int) -> bytes:
    import io

    stream = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(stream, "PNG")
    return stream.getvalue()


def test_the_table_of_classes():
    lines = closing.table(["ant", "bee", "cat"], {0: 3, 2: 12})
    assert lines[1:4] == ["      0        3  ant", "      1        0  bee", "      2       12  cat"]
    assert lines[4] == "most images: 12 (class 2, cat); fewest: 3 (class 0, ant)"
    assert lines[5] == "classes without images: 1: 1 (bee)"
    many = closing.table([f"c{i}" for i in range(1000)], dict.fromkeys(range(1000), 1))
    assert len(many) == 1 + 10 + 1 + 10 + 1 and "... 980 more" in many[11] and many[21].endswith("c999")


def test_numbers_that_are_not_their_own_are_named():
    assert "class 0 is named 1" in closing.table(["1", "2", "3"], {0: 1, 1: 1, 2: 1})[-1]
    assert "named" not in "".join(closing.table(["0", "1"], {0: 1, 1: 1}))


@pytest.mark.parametrize(
    ("class_names", "expected"),
    [
        (["cat", "Dog", "dog"], "1 ('Dog') and 2 ('dog')"),
        (["7", "007", "70"], "0 ('7') and 1 ('007')"),
        (["caf\u00e9", "cafe\u0301", "cafe"], "0 ('caf\u00e9') and 1 ('cafe\u0301')"),
        (["crane", "ship", "crane"], "0 ('crane') and 2 ('crane')"),
        (["sea lion", "sea  lion", "sea_lion", "lion"], "0 ('sea lion') and 1 ('sea  lion') and 2 ('sea_lion')"),
        (["0", "00", "a"], "0 ('0') and 1 ('00')"),
    ],
)
def test_names_that_most_take_for_one_are_said(class_names, expected):
    (note,) = closing.alike(class_names)
    assert note.endswith(f": {expected}")


def test_names_of_classes_that_are_different():
    assert closing.alike(["cat", "cats", "0", "10", "100", "n01440764", "n01443537", "c++", "c#"]) == []


def test_eight_images_of_each_class_can_be_looked_at(tmp_path: Path) -> None:
    colours = {b"red": (255, 0, 0), b"green": (0, 255, 0), b"large": (0, 0, 255)}
    files = {b"%s/%d.png" % (name, i): _square(colour, 16) for name, colour in colours.items() for i in range(10)}
    files = {name: data for name, data in files.items() if name != b"green/9.png" and not name.startswith(b"green/8")}
    files = {name: data for name, data in files.items() if not name.startswith(b"green/7")}
    out = tmp_path / "out"
    source = trees.as_folder(tmp_path / "source", files, [b"empty"])
    assert pack.main(["--source", str(source), "--out", str(out), "--shard-samples", "4"]) == 0
    sheet = np.array(Image.open(out / "contact-000.png")).astype(int)
    side = 64 + 2
    assert sheet.shape == (4 * side, 224 + 8 * side, 3)
    cells = sheet[side // 2 :: side, 224 + side // 2 :: side]
    white, green, red, blue = (255, 255, 255), (0, 255, 0), (255, 0, 0), (0, 0, 255)
    assert cells[0].tolist() == [list(white)] * 8, "empty"
    assert cells[1].tolist() == [list(green)] * 7 + [list(white)]
    assert cells[2].tolist() == [list(blue)] * 8
    assert cells[3].tolist() == [list(red)] * 8
    assert (sheet[:, :224] < 128).any(), "the names of the classes"


def test_many_classes_take_several_sheets(tmp_path: Path) -> None:
    files = {b"%03d/1.png" % i: _square((i, 0, 0), 4) for i in range(103)}
    out = tmp_path / "out"
    assert pack.main(["--source", str(trees.as_folder(tmp_path / "in", files)), "--out", str(out)]) == 0
    sheets = [np.array(Image.open(out / f"contact-00{i}.png")) for i in (0, 1)]
    assert [len(sheet) // 66 for sheet in sheets] == [100, 3]
    assert sheets[1][66 * 2 + 10, 224 + 10].tolist() == [102, 0, 0]


def test_a_few_images_of_another_size_are_left_out_and_more_are_refused(tmp_path, capsys):
    files = {b"a/%03d.png" % i: trees.png(i) for i in range(210)}
    files[b"a/odd.png"] = trees.png(0, width=9)
    source = trees.as_folder(tmp_path / "source", files, [b"b"])
    assert pack.main(["--source", str(source), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "packed 210 images" in said and "9x5 pixels, where" in said
    for i in range(3):
        (source / f"a/odd{i}.png").write_bytes(trees.png(i, width=9))
    assert pack.main(["--source", str(source), "--out", str(tmp_path / "again")]) == 2
    assert "4 not of that of the first" in capsys.readouterr().err
