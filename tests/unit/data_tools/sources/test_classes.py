"""Which folders are classes."""

import re
from collections import Counter
from pathlib import Path

import pytest

from data_tools import pack, sources
from data_tools.sources import names
from imm_scale.errors import UserError
from tests.unit.data_tools.sources import trees

PNG = trees.png()


def _classes(tmp_path: Path, files: dict[str, bytes], folders: list[str] = [], labels=None):  # noqa: B006 - not changed
    root = trees.as_folder(
        tmp_path / "in", {name.encode(): data for name, data in files.items()}, [name.encode() for name in folders]
    )
    source = sources.find(sources.locate([str(root)]), labels, "image", "label")
    return {name: Counter(source.labels)[i] for i, name in enumerate(source.class_names)}, source


def _images(*paths: str) -> dict[str, bytes]:
    return dict.fromkeys(paths, PNG)


@pytest.mark.parametrize(
    ("files", "folders", "expected"),
    [
        # A preview beside the classes, inside a wrapper: neither is a class.
        (_images("set/preview.jpg", "set/a/1.png", "set/b/1.png", "set/b/2.png"), [], {"a": 1, "b": 2}),
        # One class whose images lie in it, some deeper.
        (_images("cat/1.png", "cat/2.png", "cat/more/3.png"), [], {"cat": 3}),
        # Images without an ending, among documents without one.
        ({"a/0001": PNG, "a/LICENSE": b"x", "b/0002": PNG, "Makefile": b"x"}, [], {"a": 1, "b": 1}),
        # Endings Pillow does not know beside those it does.
        ({"a/1.png": PNG, "b/photo.jpg_large": PNG}, [], {"a": 1, "b": 1}),
        # Annotations beside images, both in folders of the same classes.
        ({**_images("img/a/1.png", "img/b/1.png"), "xml/a/1.xml": b"", "xml/b/1.xml": b""}, [], {"a": 1, "b": 1}),
        # A folder of documents is no class; one in which nothing is, is.
        ({"a/1.png": PNG, "c/1.png": PNG, "docs/paper.pdf": b"%PDF"}, ["b"], {"a": 1, "b": 0, "c": 1}),
        # An empty folder above the classes is none of them.
        (_images("data/a/1.png", "data/b/1.png"), ["logs"], {"a": 1, "b": 1}),
        # System folders of other makers.
        (_images("a/1.png", "b/1.png", "#recycle/2.png", "$RECYCLE.BIN/3.png", "b/.Apple/1.png"), [], {"a": 1, "b": 1}),
        # Backups of editors.
        (_images("a/1.png", "a/1.png~", "b/1.png"), [], {"a": 1, "b": 1}),
        # What browsers and other programs call a file until it is whole.
        ({**_images("a/1.png", "b/1.png"), "a/2.png.part": PNG[:60], "b/2.jpg.crdownload": PNG, "b/3.png.BAK": PNG},
         [], {"a": 1, "b": 1}),
        # Snapshots of a file server; an empty folder for a split that is still to come.
        (_images("a/1.png", "b/1.png", "~snapshot/hourly.0/a/1.png"), ["val"], {"a": 1, "b": 1}),
        # "train" is a thing as well as a split.
        (_images("bus/1.png", "car/1.png", "train/1.png"), [], {"bus": 1, "car": 1, "train": 1}),
        (_images("9/1.png", "10/1.png", "008/1.png"), [], {"008": 1, "9": 1, "10": 1}),
    ],
)  # fmt: skip
def test_classes(tmp_path, files, folders, expected):
    assert list(_classes(tmp_path, files, folders)[0].items()) == list(expected.items())


@pytest.mark.parametrize(
    "paths",
    [
        ("train/a/1.png", "train/b/1.png", "val/a/1.png"),
        ("all/Train/a/1.png", "all/Validation/a/1.png"),
        ("train2017/1.png", "val2017/1.png"),
        ("trainA/1.png", "testA/1.png"),
        ("test_images/a/1.png", "extra/a/1.png"),
        ("train/1.png",),
        ("trainval/1.png", "test/1.png"),
        ("fold_1/1.png", "fold_2/1.png", "fold_3/1.png"),
        ("train/1.png", "unlabeled/1.png"),
    ],
)
def test_splits_are_no_classes(tmp_path, paths):
    with pytest.raises(UserError, match=r"splits of a data set by their names, not classes.*--labels"):
        _classes(tmp_path, _images(*paths))


def test_splits_are_classes_if_the_user_says_so(tmp_path):
    assert _classes(tmp_path, _images("train/1.png", "test/1.png"), labels=["train", "test"])[0] == {
        "train": 1,
        "test": 1,
    }


def test_an_empty_folder_named_like_a_split_is_a_class_if_the_user_says_so(tmp_path):
    counts, source = _classes(tmp_path, _images("bus/1.png"), folders=["train"], labels=["bus", "train"])
    assert counts == {"bus": 1, "train": 0} and not source.left_out.reasons


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("data/a/1.png", "data/b/1.png", "docs/logo.png"), ["class data .* \\(a, b\\).*in/data alone"]),
        (("x/all/a/1.png", "x/all/b/1.png", "x/c/1.png"), ["class all .*in/x/all alone"]),
        (("cat/train/1.png", "cat/test/2.png", "dog/train/1.png"), ["splits of a data set \\(test, train\\)"]),
        (("a/Val2017/1.png", "a/more/1.png", "b/training/x/1.png"), ["splits of a data set \\(Val2017, training\\)"]),
        (("cat/1.png", "cat/2.png", "cat/more/3.png", "dog/1.png"), []),
        (("a/2019/1.png", "a/2020/1.png", "b/2019/1.png"), []),
        (("a/train/1.png", "b/train/1.png"), []),
        (("data/a/1.png", "docs/logo.png"), []),
    ],
)  # fmt: skip
def test_what_may_be_meant_otherwise_is_said(tmp_path, capsys, paths, expected):
    source = _classes(tmp_path, _images(*paths))[1]
    assert len(source.notes) == len(expected)
    assert all(re.search(pattern, note) for pattern, note in zip(expected, source.notes, strict=True))
    assert pack.main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(f"note: {note}" in printed for note in source.notes)


def test_archives_whose_names_have_dots_are_classes_of_their_own(tmp_path):
    for name in ("v1.0.tar", "v1.1.tar", "v1.1b.TAR.GZ", "Dr. No.tgz"):
        trees.as_tar(tmp_path / name, {b"1.png": PNG}, mode="w:gz" if "g" in name.lower() else "w")
    source = sources.find(sources.locate([str(tmp_path)]), None, "image", "label")
    assert source.class_names == ["Dr. No", "v1.0", "v1.1", "v1.1b"]


def test_a_file_that_is_meant_twice_is_refused(tmp_path):
    first = trees.as_zip(tmp_path / "a1.zip", {b"a/1.png": PNG, b"b/1.png": PNG})
    with pytest.raises(UserError, match=r"names .*a1\.zip twice"):
        sources.locate([str(first), f"{tmp_path}/a*.zip"])
    (tmp_path / "latest.zip").symlink_to("a1.zip")
    for given in ([str(tmp_path)], [f"{tmp_path}/*.zip"], [str(first), f"{tmp_path}/../{tmp_path.name}/a1.zip"]):
        with pytest.raises(UserError, match=r"names .* and .*, which are one file"):
            sources.locate(given)


def test_archives_of_several_folders_are_said_to_be_packed_together(tmp_path, capsys):
    """As the sizes of one data set on the Hugging Face hub."""
    for size in ("160px", "320px"):
        (tmp_path / "in" / size).mkdir(parents=True)
        trees.as_zip(tmp_path / "in" / size / "data.zip", {b"a/1.png": PNG, b"b/1.png": PNG})
    assert pack.main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert "files of several folders are packed together: 160px, 320px\n" in capsys.readouterr().out


def test_most_images_outside_of_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="3 of 4 images lie in no class folder"):
        _classes(tmp_path, _images("1.png", "2.png", "3.png", "a/4.png"))


def test_what_is_left_out_is_counted(tmp_path):
    files = {
        **_images("x.png", "a/1.png", "a/2.png", "b/1.png"),
        "a/1.txt": b"a cat",
        "a/2.txt": b"a dog",
        "b/Thumbs.db": b"",
    }
    _, source = _classes(tmp_path, files)
    assert {reason: count for reason, (count, _) in source.left_out.reasons.items()} == {
        "images in no class folder": 1,
        "files that are no images (.txt)": 2,
        "hidden and system files": 1,
    }


def test_a_label_map_numbers_folders_that_are_not_all_there(tmp_path):
    counts, source = _classes(tmp_path, _images("b/1.png"), labels=["a", "b", "c"])
    assert counts == {"a": 0, "b": 1, "c": 0} and source.labels == [1]


def test_several_folders_or_archives_beside_images_are_refused(tmp_path):
    one = trees.as_folder(tmp_path / "one", {b"a/1.png": PNG, b"b/1.png": PNG, b"data.parquet": b"PAR1"})
    with pytest.raises(UserError, match=r"holds images and \.parquet files"):
        sources.locate([str(one)])
    with pytest.raises(UserError, match="one folder, or files"):
        sources.locate([str(one), str(tmp_path)])


def test_several_archives_each_a_class_and_parts_of_classes(tmp_path, capsys):
    """As ImageNet's tars of one class each, and as archives cut into parts with a wrapper each."""
    for name in ("n01440764", "n01443537"):
        trees.as_tar(tmp_path / f"{name}.tar", {b"1.png": PNG, b"2.png": PNG})
    source = sources.find(sources.locate([str(tmp_path)]), None, "image", "label")
    assert source.class_names == ["n01440764", "n01443537"] and source.labels == [0, 0, 1, 1]
    trees.as_zip(tmp_path / "p1.zip", {b"p1/a/1.png": PNG, b"p1/b/1.png": PNG})
    trees.as_zip(tmp_path / "p2.zip", {b"p2/b/2.png": PNG, b"p2/c/2.png": PNG})
    assert pack.main(["--source", f"{tmp_path}/p*.zip", "--out", str(tmp_path / "out")]) == 0
    assert "4 images 5x5x3 of 3 classes" in capsys.readouterr().out
    inner = tmp_path / "n01440764.tar"
    whole = trees.as_tar(tmp_path / "all.tar", {b"n1.tar": inner.read_bytes(), b"n2.tar": inner.read_bytes()})
    source = sources.find(sources.locate([str(whole)]), None, "image", "label")
    assert source.class_names == ["n1", "n2"] and [sources.read(image) for image in source.images] == [PNG] * 4


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/validation/0000.parquet", "validation"),
        ("cifar_TEST.parquet", "test"),
        ("latest.parquet", None),
        ("training_images.tar", "train"),
        ("devices.tar", None),
    ],
)
def test_splits_in_names_of_files(name, split):
    assert names.file_split(name) == split
