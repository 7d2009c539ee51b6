"""EDM's dataset.json, ImageNet's synsets, and maps of the user."""

import json
from pathlib import Path

import pytest

from data_tools import sources
from data_tools.sources.label_files import read_map
from imm_scale.errors import UserError
from tests.unit.data_tools.sources import trees

IMAGES = {f"0000{i % 2}/img{i:08d}.png".encode(): trees.png(i) for i in range(4)}
SYNSETS = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn01484850 great white shark\n"


def _find(path: Path, labels: list[str] | None = None) -> sources.Source:
    return sources.find(sources.locate([str(path)]), labels, "image", "label")


def _dataset(labels: object, extra: dict[bytes, bytes] | None = None) -> dict[bytes, bytes]:
    return {**IMAGES, **(extra or {}), b"dataset.json": json.dumps({"labels": labels}).encode()}


@pytest.mark.parametrize("make", [trees.as_folder, trees.as_zip, trees.as_tar])
@pytest.mark.parametrize("wrapper", [b"", b"cifar10-32x32/"])
def test_labels_of_edm(tmp_path, make, wrapper):
    labels = [[name.decode(), 5 - 2 * i if i < 3 else 0] for i, name in enumerate(IMAGES)]
    files = {wrapper + name: data for name, data in _dataset(labels).items()}
    target = tmp_path / {trees.as_folder: "set", trees.as_zip: "set.zip", trees.as_tar: "set.tar"}[make]
    source = _find(make(target, files))
    labels = {sources.read(image): label for image, label in zip(source.images, source.labels, strict=True)}
    assert labels == dict(zip(IMAGES.values(), [5, 3, 1, 0], strict=True))
    assert source.class_names == [str(i) for i in range(6)]


def test_edm_without_labels_is_one_class_whatever_the_folders(tmp_path):
    """Its folders are buckets of a thousand images."""
    source = _find(trees.as_folder(tmp_path / "set", _dataset(None)))
    assert source.class_names == ["0"] and source.labels == [0] * 4


def test_images_and_entries_without_each_other(tmp_path):
    labels = [[name.decode(), 1] for name in list(IMAGES)[:3]] + [["00000/gone.png", 0]]
    source = _find(trees.as_folder(tmp_path / "set", _dataset(labels)))
    assert source.labels == [1, 1, 1]
    assert source.bad == [(f"{tmp_path}/set/00000/gone.png", "listed in dataset.json, but missing")]
    assert source.left_out.reasons["images without a label in dataset.json"][0] == 1


@pytest.mark.parametrize("labels", [[["00000/img00000000.png", [0, 1.5]]], [["a.png"]], 7, [["00000/a.png", True]], []])
def test_labels_that_are_no_numbers(tmp_path, labels):
    with pytest.raises(UserError, match=r"dataset\.json.*label"):
        _find(trees.as_folder(tmp_path / "set", _dataset(labels)))


def test_paths_of_edm_in_other_spellings(tmp_path):
    labels = [[f"./{name.decode()}".replace("/", "\\" if i else "/"), i] for i, name in enumerate(sorted(IMAGES))]
    assert _find(trees.as_folder(tmp_path / "set", _dataset(labels))).labels == list(range(len(IMAGES)))


def test_an_image_with_two_labels_is_refused(tmp_path):
    names = [name.decode() for name in IMAGES]
    labels = [[name, 0] for name in names] + [[f"./{names[1]}", 0], [names[2], 3]]
    with pytest.raises(UserError, match=f"{names[2]} has the labels 0 and 3"):
        _find(trees.as_folder(tmp_path / "set", _dataset(labels)))


def test_a_broken_dataset_json_is_not_passed_over(tmp_path):
    for content in (b"{", b"[" * 100_000, b"version https://git-lfs.github.com/spec/v1\n", b"\xff\xfe"):
        with pytest.raises(UserError, match=r"dataset\.json should say the labels"):
            _find(trees.as_folder(tmp_path / "set", {**IMAGES, b"dataset.json": content}))


def test_a_dataset_json_of_something_else_or_of_a_part_decides_nothing(tmp_path):
    files = {b"a/1.png": trees.png(), b"b/1.png": trees.png(1)}
    assert _find(trees.as_folder(tmp_path / "one", {**files, b"dataset.json": b'{"name": "cats"}'})).labels == [0, 1]
    part = {**files, b"b/dataset.json": json.dumps({"labels": [["1.png", 7]]}).encode()}
    assert _find(trees.as_folder(tmp_path / "two", part)).labels == [0, 1]


@pytest.mark.parametrize("place", ["LOC_synset_mapping.txt", "ILSVRC/Data/CLS-LOC/train/LOC_synset_mapping.txt"])
def test_synsets_get_their_titles(tmp_path, place):
    """As on Kaggle, with the mapping at the top, four folders above the classes."""
    train = tmp_path / "ILSVRC/Data/CLS-LOC/train"
    trees.as_folder(train, {b"n01443537/1.JPEG": trees.png(), b"n01440764/1.JPEG": trees.png(1)})
    (tmp_path / place).write_text(SYNSETS)
    source = _find(train)
    assert source.class_names == ["n01440764 tench, Tinca tinca", "n01443537 goldfish, Carassius auratus"]
    assert [
        (source.class_names[label].split()[0] in name) for label, name in zip(source.labels, source.names, strict=True)
    ]
    (tmp_path / "labels.json").write_text(json.dumps(dict(enumerate(source.class_names))))
    assert _find(train, read_map(str(tmp_path / "labels.json"))).class_names == source.class_names
    (tmp_path / "all.txt").write_text(SYNSETS)
    assert len(_find(train, read_map(str(tmp_path / "all.txt"))).class_names) == 3, (
        "with the classes that are not there"
    )


def test_titles_only_where_every_class_is_a_synset(tmp_path):
    trees.as_folder(tmp_path / "set", {b"n01443537/1.png": trees.png(), b"mine/1.png": trees.png(1)})
    (tmp_path / "set/LOC_synset_mapping.txt").write_text(SYNSETS)
    assert _find(tmp_path / "set").class_names == ["mine", "n01443537"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"1": "a"}', "n01440764\n", "null", "a.png 1\n", "[" * 100_000])
def test_what_is_no_map(tmp_path, text):
    (tmp_path / "map").write_text(text)
    with pytest.raises(UserError, match=r"--labels .*is needed"):
        read_map(str(tmp_path / "map"))


def test_two_classes_of_one_name_in_a_map(tmp_path):
    trees.as_folder(tmp_path / "set", {b"crane/1.png": trees.png(), b"b/1.png": trees.png(1)})
    with pytest.raises(UserError, match="two classes 'crane'"):
        _find(tmp_path / "set", ["crane", "b", "crane"])
