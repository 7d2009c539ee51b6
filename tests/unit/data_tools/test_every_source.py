"""Every kind of source gives the images and labels of the folder it was made from."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset as wds
from PIL import Image

from data_tools import pack, sources
from data_tools.common import load_pack
from data_tools.sources.label_files import read_map
from imm_scale.data import tar

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "folder" / CLASSES[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(path)
    return tmp_path / "folder"


def _files(folder: Path) -> list[tuple[Path, int]]:
    return [(path, CLASSES.index(path.parent.name)) for path in sorted(folder.rglob("*.png"))]


def _as_zip(folder: Path, out: Path) -> Path:
    with zipfile.ZipFile(out / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, _ in _files(folder):
            archive.write(path, f"data/train/{path.parent.name}/{path.name}")
            archive.writestr(f"__MACOSX/{path.name}", b"x")
    return out / "images.zip"


def _as_stock_shards(folder: Path, out: Path) -> Path:
    (out / "shards").mkdir()
    with wds.ShardWriter(str(out / "shards" / "s-%03d.tar"), maxcount=5, verbose=0) as writer:
        for path, label in _files(folder):
            writer.write({"__key__": path.stem, "png": path.read_bytes(), "cls": label})
    return out / "shards"


def _as_parquet(folder: Path, out: Path) -> Path:
    rows = _files(folder)
    images = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in rows]
    table = pa.table({"image": images, "label": [label for _, label in rows]})
    pyarrow.parquet.write_table(table, out / "images.parquet", row_group_size=5)
    return out / "images.parquet"


def _packed(folder: Path) -> set[tuple[bytes, int]]:
    samples = set()
    for path in folder.glob("*.tar"):
        data = path.read_bytes()
        for _, files in tar.samples(data, str(path)):
            png, label = (data[m.offset : m.offset + m.size] for m in (files["png"], files["cls"]))
            samples.add((np.array(Image.open(io.BytesIO(png))).tobytes(), int(label)))
    return samples


@pytest.mark.parametrize(("make", "workers"), [(_as_zip, 2), (_as_stock_shards, 1), (_as_parquet, 2)])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_kind_gives_the_same_images(make, workers: int, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source, out = make(folder, tmp_path), tmp_path / "out"
    assert pack.main(["--source", str(source), "--out", str(out), "--workers", str(workers)]) == 0
    expected = {(np.array(Image.open(path)).tobytes(), label) for path, label in _files(folder)}
    assert _packed(out) == expected


def test_real_mnist(tmp_path: Path) -> None:
    assert pack.main(["--source", "mnist5k", "--out", str(tmp_path / "out")]) == 0
    packed = load_pack(str(tmp_path / "out"))
    assert packed.image_shape == (28, 28, 1) and packed.num_images == 5000
    labels = [label for _, label in _packed(tmp_path / "out")]
    assert np.bincount(labels).tolist() == [500] * 10


def test_shards_of_a_chosen_size(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack.main(["--source", str(folder), "--out", str(out), "--shard-bytes", "9000"]) == 0
    sizes = [path.stat().st_size for path in out.glob("*.tar")]
    assert len(sizes) > 2 and max(sizes) <= 9000
    assert sorted(sizes)[1] > 9000 - 2048 - 512, "all but the last are full: a record has 2 KiB"


def test_a_label_map_decides_the_numbers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"0": "cat", "1": "bee", "2": "ant", "3": "dog"}))
    images = sources.find(sources.locate([str(folder)]), read_map(str(labels)), "image", "label")
    assert images.class_names == ["cat", "bee", "ant", "dog"]
    assert [CLASSES[2 - label] for label in images.labels] == [Path(name).parent.name for name in images.names]
    labels.write_text(json.dumps({"0": "cat", "1": "bee"}))
    cases = [
        (folder, "label 'ant' of"),
        (_as_stock_shards(folder, tmp_path), "label 2 of"),
    ]
    for source, message in cases:
        assert pack.main(["--source", str(source), "--out", str(tmp_path / "o"), "--labels", str(labels)]) == 2
        error = capsys.readouterr().err
        assert message in error and "none of the 2 classes of the label map" in error
    labels.write_text("[]")
    assert pack.main(["--source", str(folder), "--out", str(tmp_path / "o"), "--labels", str(labels)]) == 2


def test_damaged_and_unfit_sources(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = _as_stock_shards(folder, tmp_path)
    first = shards / "s-000.tar"
    first.write_bytes(first.read_bytes()[:6144])
    archive = _as_zip(folder, tmp_path)
    archive.write_bytes(archive.read_bytes()[:-100])
    flat = tmp_path / "flat.zip"
    with zipfile.ZipFile(flat, "w") as zip_file:
        zip_file.writestr("a.png", b"")
    text = tmp_path / "a.txt"
    text.write_text("")
    parquet = _as_parquet(folder, tmp_path)
    cases = [
        (["--source", str(shards)], "cut short"),
        (["--source", str(archive)], "no readable ZIP file"),
        (["--source", str(flat)], "lies in no class folder"),
        (["--source", str(text)], "a folder with a subfolder of images per class, .zip"),
        (["--source", str(parquet), "--label-column", "y"], "has no column 'y', only image, label"),
        (["--source", "digits", "--labels", str(text)], "digits has its labels"),
    ]
    for arguments, message in cases:
        assert pack.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
