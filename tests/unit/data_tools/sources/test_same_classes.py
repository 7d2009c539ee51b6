"""A folder, and the same tree in a ZIP, a tar or a compressed tar, give the same classes and images."""

import os
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import pack, sources
from data_tools.sources import Source, names
from tests.unit.data_tools.sources import trees

# Any bytes that may stand in a name; not hidden, no backup, and no words that mean something else than a class.
NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda name: (
        not {0, ord("/")} & set(name)
        and not name.startswith(b".")
        and not name.endswith(b"~")
        and names.folder_split(os.fsdecode(name)) is None
        and not names.is_system(os.fsdecode(name), folder=True)
    )
)
NUMBERS = st.integers(0, 200).map(lambda number: str(number).encode())
JUNK = [b"README.md", b"LICENSE", b"Thumbs.db", b".DS_Store", b"@eaDir/a.png", b".thumbs/b.png", b"__MACOSX/._c.png"]
PICTURES = [trees.png(seed) for seed in range(6)]


@st.composite
def sets(draw):  # type: ignore[no-untyped-def]
    """(files, folders, {class: its images' contents}) of a tree with two to four classes that have images."""
    classes = draw(st.lists(draw(st.sampled_from([NAMES, NUMBERS])), min_size=3, max_size=6, unique=True))
    wrapper = b"".join(name + b"/" for name in draw(st.lists(NAMES, max_size=2)))
    filled = classes[: draw(st.integers(2, min(4, len(classes))))]
    files, contents = {}, {name: Counter() for name in classes}
    for name in filled:
        for i in range(draw(st.integers(1, 2))):
            below = draw(st.sampled_from([b"", b"more/"])) if i else b""
            picture = draw(st.sampled_from(PICTURES))
            files[wrapper + name + b"/" + below + b"i" + draw(NAMES) + b"%d.png" % i] = picture
            contents[name][picture] += 1
        files[wrapper + name + b"/" + draw(st.sampled_from(JUNK))] = b"no image"
    for place in draw(st.lists(st.sampled_from([b"", wrapper]), max_size=2)):
        files[place + draw(st.sampled_from(JUNK))] = b"no image"
    return files, [wrapper + name for name in classes], contents


def _find(path: Path) -> Source:
    return sources.find(sources.locate([str(path)]), None, "image", "label")


def _in_order(classes: list[bytes]) -> list[bytes]:
    """As the documentation says, written anew: by number if all are numbers, else by their bytes."""
    numbers = all(name.strip(b"0123456789") == b"" for name in classes)
    return sorted(classes, key=lambda name: (int(name) if numbers else 0, name))


@settings(max_examples=60, deadline=None)
@given(sets())
def test_any_tree_in_any_form(made):  # type: ignore[no-untyped-def]
    files, folders, contents = made
    order = _in_order(list(contents))
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        forms = [
            trees.as_folder(base / "folder", files, folders),
            trees.as_zip(base / "a.zip", files, folders),
            trees.as_tar(base / "a.tar", files, folders),
            trees.as_tar(base / "pax.tar", files, folders, form=tarfile.PAX_FORMAT),
            trees.as_tar(base / "a.tar.gz", files, folders, mode="w:gz"),
            trees.as_tar(
                base / "dot.tar", {b"./" + name: data for name, data in files.items()}, [b"./" + f for f in folders]
            ),
        ]
        orders = []
        for form in forms:
            source = _find(form)
            packed = {name: Counter() for name in contents}
            for label, image in zip(source.labels, source.images, strict=True):
                packed[order[label]][sources.read(image)] += 1  # type: ignore[arg-type]
            assert packed == contents, form
            assert source.class_names == [names.printable(os.fsdecode(name)) for name in order], form
            orders.append([sources.read(image) for image in source.images])  # type: ignore[arg-type]
        assert all(order == orders[0] for order in orders), "in one order, so that the shards are the same"


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(TEXTS, NUMBERS.map(bytes.decode)).map(lambda name: "c" + name), min_size=2, unique=True)
       | st.lists(NUMBERS.map(bytes.decode), min_size=2, unique=True))  # fmt: skip
def test_names_in_parquet_and_beside_images_are_those_of_folders(classes):  # type: ignore[no-untyped-def]
    """As text in a Parquet column for all; in .cls for those that begin with a letter, as numbers are numbers there."""
    classes = [name for name in classes if names.folder_split(name) is None and name == name.strip()]
    pictures = {name: trees.png(seed) for seed, name in enumerate(classes)}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        trees.as_folder(base / "folder", {f"{name}/1.png".encode(): data for name, data in pictures.items()})
        pyarrow.parquet.write_table(pa.table({"image": list(pictures.values()), "label": classes}), base / "a.parquet")
        forms = [base / "folder", base / "a.parquet"]
        if all(name[0] == "c" for name in classes):
            samples = {b"%d.%s" % (i, end): data for i, (name, png) in enumerate(pictures.items())
                       for end, data in ((b"png", png), (b"cls", name.encode()))}  # fmt: skip
            forms.append(trees.as_tar(base / "a.tar", samples))
        for form in forms if len(classes) > 1 else []:
            source = _find(form)
            assert source.class_names == [
                names.printable(os.fsdecode(name)) for name in _in_order([c.encode() for c in classes])
            ]
            for label, image in zip(source.labels, source.images, strict=True):
                assert sources.read(image) == pictures[_in_order([c.encode() for c in classes])[label].decode()]  # type: ignore[arg-type]


def test_names_of_any_bytes_reach_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        b"caf\xe9/tab\there.png": trees.png(1),
        b"caf\xe9/line\nbreak.png": b"broken",
        b"k\xc3\xa4fer/\xff\xfe.png": trees.png(2),
        b"back\\slash/'\"$(x).png": trees.png(3),
    }
    out = tmp_path / "out"
    assert pack.main(["--source", str(trees.as_folder(tmp_path / "in", files)), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "caf\\xe9" in said and "käfer" in said
    lines = (out / "quarantine.txt").read_text().splitlines()
    assert len(lines) == 1 and "line\\nbreak.png\t" in lines[0]
    again = trees.as_zip(tmp_path / "in.zip", {**files, b"k\xc3\xa4fer/new.png": trees.png(4)})
    arguments = ["--source", str(again), "--labels", str(out / "labels.json"), "--out", str(tmp_path / "val")]
    assert pack.main(arguments) == 0, "the map of one pack numbers the classes of another, whatever their bytes"
    assert (tmp_path / "val/labels.json").read_text() == (out / "labels.json").read_text()
