"""Parquet as people have it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import sources
from imm_scale.errors import UserError
from tests.unit.data_tools.sources import trees

PNGS = [trees.png(i) for i in range(4)]


def _write(path: Path, columns: dict[str, object], class_names: list[str] | None = None, label: str = "label") -> Path:
    table = pa.table(columns)
    if class_names is not None:
        features = {label: {"names": class_names, "_type": "ClassLabel"}}
        said = json.dumps({"info": {"features": features}}).encode()
        table = table.replace_schema_metadata({b"huggingface": said})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def _find(*paths: object, labels: list[str] | None = None, column: str = "label") -> sources.Source:
    return sources.find(sources.locate([str(path) for path in paths]), labels, "image", column)


def test_names_of_classes_come_from_the_schema_in_its_order(tmp_path):
    path = _write(
        tmp_path / "a.parquet", {"image": PNGS, "kind": [1, 0, 3, 1]}, ["zebra", "ant", "none", "bee"], "kind"
    )
    source = _find(path, column="kind")
    assert source.class_names == ["zebra", "ant", "none", "bee"] and source.labels == [1, 0, 3, 1]
    assert _find(path, labels=["ant", "bee", "zebra"], column="kind").labels == [0, 2, 1, 0], "a map goes by names"
    with pytest.raises(UserError, match="label 'zebra'"):
        _find(path, labels=["ant", "bee"], column="kind")


def test_two_classes_of_one_name_stay_two(tmp_path):
    """As "crane" in ImageNet, a bird and a machine."""
    path = _write(tmp_path / "a.parquet", {"image": PNGS, "label": [0, 1, 2, 2]}, ["crane", "ship", "crane"])
    assert _find(path).labels == _find(path, labels=["crane", "ship", "crane"]).labels == [0, 1, 2, 2]
    with pytest.raises(UserError, match="names several classes alike"):
        _find(path, labels=["ship", "crane", "crane"])


def test_files_that_name_other_classes_are_not_mixed(tmp_path):
    first = _write(tmp_path / "1.parquet", {"image": PNGS, "label": [0, 1, 0, 1]}, ["a", "b"])
    second = _write(tmp_path / "2.parquet", {"image": PNGS, "label": [0, 1, 0, 1]}, ["b", "a"])
    with pytest.raises(UserError, match="name different classes"):
        _find(first, second)


@pytest.mark.parametrize(
    ("values", "expected", "bad"),
    [
        (pa.array([3, 1, 0, 2], pa.uint8()), [3, 1, 0, 2], []),
        ([1.0, 0.0, float("nan"), 0.5], [1, 0], ["nan", "0.5"]),
        ([1.0, 0.0, float("inf"), float("-inf")], [1, 0], ["inf", "-inf"]),
        (["b", "", "a", "b"], [1, 0, 1], ["''"]),
        ([True, False, None, True], [1, 0, 1], ["None"]),
        (["10", "9", "10", "2"], [2, 1, 2, 0], []),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), [1, 0, 1], ["None"]),
        (pa.array(["b", "a", "b", "b"], pa.large_string()), [1, 0, 1, 1], []),
        (pa.array(["b", "a", "b", "b"], pa.string_view()), [1, 0, 1, 1], []),
    ],
)
def test_labels_of_all_types(tmp_path, values, expected, bad):
    source = _find(_write(tmp_path / "a.parquet", {"image": PNGS, "label": values}))
    assert source.labels == expected
    assert [reason for _, reason in source.bad] == [f"its label is {value}" for value in bad]


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_images_of_all_types(tmp_path, kind):
    stored = pa.array([PNGS[i] for i in (0, 1, 0, 2)])
    images = stored.dictionary_encode() if pa.types.is_dictionary(kind) else stored.cast(kind)
    source = _find(_write(tmp_path / "a.parquet", {"image": images, "label": [0, 1, 0, 1]}))
    assert [sources.read(image) for image in source.images] == [PNGS[i] for i in (0, 1, 0, 2)]


def test_a_column_that_is_there_twice(tmp_path):
    """As a join of two tables leaves it."""
    table = pa.Table.from_arrays(
        [pa.array(PNGS), pa.array([0] * 4), pa.array([1] * 4)], names=["image", "label", "label"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns 'label'"):
        _find(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": PNGS, "label": [[1], [2], [3], [0]]}, "column label is list.*--label-column"),
        ({"image": ["a.png"] * 4, "label": [0] * 4}, "column image is string.*--image-column"),
        ({"image": [[1.0, 2.0]] * 4, "label": [0] * 4}, "column image is list.*--image-column"),
        ({"image": PNGS, "label": [0, 1, -1, 0]}, "label -1 of .*a.parquet:2 is negative"),
        ({"image": PNGS, "label": [0, 1, 2, 123_456_789]}, "would make 123456790 classes"),
        ({"image": pa.array([None] * 4, pa.binary()), "label": [0] * 4}, "4 unusable.*no bytes of an image"),
    ],
)
def test_columns_that_are_no_images_or_labels(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        _find(_write(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize(
    "files",
    [
        ("train-0.parquet", "test-0.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet"),
        ("set [x]/set_dev.parquet", "set [x]/set_eval.parquet"),
    ],
)
def test_splits_are_not_mixed_but_when_asked_for(tmp_path, files):
    paths = [_write(tmp_path / name, {"image": PNGS, "label": [0, 1, 0, 1]}) for name in files]
    with pytest.raises(
        UserError, match=r"has files of the splits.*choose by a pattern, as in --source '(.*)'"
    ) as error:
        _find(tmp_path)
    pattern = str(error.value).split("as in --source '")[1].split("'")[0]
    assert len(_find(pattern).images) == 4, "what the message suggests works"
    with pytest.raises(UserError, match="has files of the splits"):
        _find(f"{tmp_path}/**/*.parquet")
    assert len(_find(*paths).images) == 8
