"""A pack that is there is compared in everything that decides its content."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_tools import pack
from data_tools.common import load_pack
from tests.unit.data_tools.sources import trees

FILES = {b"a/1.png": trees.png(1), b"b/1.png": trees.png(2)}


def _pack(source: object, out: Path, *more: object) -> int:
    return pack.main(["--source", str(source), "--out", str(out), *map(str, more)])


def _again(capsys, source, out, *more) -> str:
    """What a second run says; with its code."""
    capsys.readouterr()
    code = _pack(source, out, *more)
    said = capsys.readouterr()
    assert (code == 0) == ("already packed" in said.out), said
    return "same" if code == 0 else said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: (s / "b/2.png").write_bytes(trees.png(3)), "the source's files"),
        (lambda s: (s / "b/1.png").unlink(), "the source's files"),
        (lambda s: (s / "b/1.png").rename(s / "b/9.png"), "the source's files"),
        (lambda s: (s / "b/1.png").rename(s / "a/9.png"), "the source's files"),
        (lambda s: (s / "b/1.png").write_bytes(trees.png(2) + b"\0"), "the source's files"),
        (lambda s: (s / "c").mkdir(), "the source's files"),
        (lambda s: (s / "b/Thumbs.db").write_bytes(b"x"), "same"),
    ],
)
def test_a_folder_that_changed(tmp_path, capsys, change, message):
    source = trees.as_folder(tmp_path / "source", FILES)
    assert _pack(source, tmp_path / "out") == 0
    assert _again(capsys, source, tmp_path / "out") == "same"
    change(source)
    assert message in _again(capsys, source, tmp_path / "out")


def test_labels_that_changed_beside_the_same_files(tmp_path, capsys):
    files = {**FILES, b"dataset.json": json.dumps({"labels": [["a/1.png", 0], ["b/1.png", 1]]}).encode()}
    source = trees.as_folder(tmp_path / "source", files)
    assert _pack(source, tmp_path / "out") == 0
    (source / "dataset.json").write_text(json.dumps({"labels": [["a/1.png", 1], ["b/1.png", 0]]}))
    assert "the source's files" in _again(capsys, source, tmp_path / "out")


@pytest.mark.parametrize("make", [trees.as_zip, trees.as_tar])
def test_an_archive_that_changed(tmp_path, capsys, make):
    name = {trees.as_zip: "a.zip", trees.as_tar: "a.tar"}[make]
    source = make(tmp_path / name, FILES)
    assert _pack(source, tmp_path / "out") == 0
    os.utime(source, (0, 0))
    assert _again(capsys, source, tmp_path / "out") == "same"
    make(
        tmp_path / name,
        {
            name: data.replace(b"IHDR", b"IHDR")
            for name, data in [(b"a/1.png", FILES[b"b/1.png"]), (b"b/1.png", FILES[b"a/1.png"])]
        },
    )
    assert "the source's files" in _again(capsys, source, tmp_path / "out"), "of the same size, with other content"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--background", "black"], "background '#ffffff' (asked for: '#000000')"),
        (["--background", "#FFF"], "same"),
        (["--channels", "1"], "channels 3 (asked for: 1)"),
        (["--seed", "1"], "seed 0 (asked for: 1)"),
        (["--label-column", "fine"], "same"),
        (["--max-bad", "3", "--workers", "1"], "same"),
    ],
)
def test_arguments_that_decide_the_content(tmp_path, capsys, more, message):
    source = trees.as_folder(tmp_path / "source", FILES)
    assert _pack(source, tmp_path / "out") == 0
    assert message in _again(capsys, source, tmp_path / "out", *more)


def test_columns_of_parquet(tmp_path, capsys):
    columns = {"image": list(FILES.values()), "fine": [0, 1], "coarse": [0, 0], "other": list(FILES.values())}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    source, out = tmp_path / "a.parquet", tmp_path / "out"
    assert _pack(source, out, "--label-column", "fine") == 0
    assert "label_column 'fine' (asked for: 'coarse')" in _again(capsys, source, out, "--label-column", "coarse")
    said = _again(capsys, source, out, "--label-column", "fine", "--image-column", "other")
    assert "image_column 'image' (asked for: 'other')" in said


def test_a_map_is_compared_by_what_it_says(tmp_path, capsys):
    source, out, labels = trees.as_folder(tmp_path / "source", FILES), tmp_path / "out", tmp_path / "map.json"
    labels.write_text('{"0": "a", "1": "b"}')
    assert _pack(source, out, "--labels", labels) == 0
    labels.rename(tmp_path / "moved.json")
    assert _again(capsys, source, out, "--labels", tmp_path / "moved.json") == "same"
    labels.write_text('{"0": "a", "1": "b", "2": "c"}')
    assert "the names or the order of the classes" in _again(capsys, source, out, "--labels", labels)
    assert "the names or the order of the classes" in _again(capsys, source, out)


def test_a_source_that_moved(tmp_path, capsys):
    source, out, moved = trees.as_folder(tmp_path / "source", FILES), tmp_path / "out", tmp_path / "moved"
    assert "there is no pack" in _again(capsys, source, out, "--source-moved")
    assert _pack(source, out) == 0
    source.rename(moved)
    said = _again(capsys, moved, out)
    assert str(source) in said and str(moved) in said and "--source-moved" in said
    assert _again(capsys, moved, out, "--source-moved") == "same"
    assert load_pack(str(out)).arguments["source"] == str(moved)
    assert _again(capsys, moved, out) == "same", "it has to be said once"
    (moved / "a/2.png").write_bytes(trees.png(5))
    assert "the source's files" in _again(capsys, moved, out, "--source-moved")


def test_a_pack_of_an_earlier_version(tmp_path, capsys):
    source, out = trees.as_folder(tmp_path / "source", FILES), tmp_path / "out"
    assert _pack(source, out) == 0
    document = json.loads((out / "pack.json").read_text())
    for key in ("listing", "label_map", "image_column", "label_column", "background"):
        del document["arguments"][key]
    document["arguments"]["labels"] = None
    (out / "pack.json").write_text(json.dumps(document))
    capsys.readouterr()
    assert _pack(source, out) == 0
    assert "earlier version, which did not note listing, label_map" in capsys.readouterr().out
    assert "size None (asked for: 3)" in _again(capsys, source, out, "--size", 3)


@pytest.mark.parametrize("colour", ["whiteish", "#12345", "300,0,0"])
def test_backgrounds_that_are_none(tmp_path, capsys, colour):
    assert _pack("digits", tmp_path / "out", "--background", colour) == 2
    assert f"--background {colour}: a name such as white, or #rrggbb" in capsys.readouterr().err
