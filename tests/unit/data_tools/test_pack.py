import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import images, pack
from data_tools.images import Rendered, Unreadable


def _picture(path: Path, width: int = 6, height: int = 6, seed: int = 0, mode: str = "RGB") -> None:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for i in range(7):
        _picture(folder / ("cat" if i % 2 else "dog") / f"{i}.{'png' if i % 3 else 'bmp'}", seed=i)
    _picture(folder / "dog" / "more" / "below.png", seed=7)
    (folder / "dog" / ".hidden").write_text("x")
    return folder


def _pack(*arguments: object) -> int:
    return pack.main([str(argument) for argument in arguments])


def _read(folder: Path) -> list[tuple[str, np.ndarray, int]]:
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        for name in files:
            key, extension = name.split(".")
            if extension == "png":
                image = np.array(Image.open(io.BytesIO(files[name])))
                samples.append((key, image, int(files[f"{key}.cls"])))
    return samples


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_real_digits(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    assert _pack("--source", "digits", "--out", tmp_path / "out", "--shard-samples", 700) == 0
    samples = _read(tmp_path / "out")
    assert [key for key, _, _ in samples] == [f"{i:08d}" for i in range(1797)]
    data = load_digits()
    pairs = zip(data.images, data.target, strict=True)
    expected = sorted((np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label)) for image, label in pairs)
    assert sorted((image.tobytes(), label) for _, image, label in samples) == expected
    labels = [label for _, _, label in samples]
    assert labels != [int(t) for t in data.target] and len(set(labels[:100])) == 10
    description = json.loads((tmp_path / "out/pack.json").read_text())
    assert description["image_shape"] == [8, 8, 1]
    assert [shard["samples"] for shard in description["shards"]] == [700, 700, 397]
    assert json.loads((tmp_path / "out/labels.json").read_text()) == {str(i): str(i) for i in range(10)}


def test_folder(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    assert _pack("--source", source, "--out", out, "--shard-samples", 3) == 0
    assert sorted(path.name for path in out.glob("*.tar")) == [f"images-{i:06d}.tar" for i in range(3)]
    assert json.loads((out / "labels.json").read_text()) == {"0": "cat", "1": "dog"}
    expected = {}
    for path in source.rglob("[!.]*.*"):
        expected[np.array(Image.open(path)).tobytes()] = int("dog" in path.parts)
    assert {image.tobytes(): label for _, image, label in _read(out)} == expected
    assert (out / "quarantine.txt").read_text() == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_same_arguments_give_the_same_bytes_and_another_seed_another_order(
    tmp_path: Path, source: Path, workers: int
) -> None:
    _pack("--source", source, "--out", tmp_path / "a")
    _pack("--source", source, "--out", tmp_path / "b", "--workers", workers)
    _pack("--source", source, "--out", tmp_path / "c", "--seed", 1)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    assert _contents(tmp_path / "a")["images-000000.tar"] != _contents(tmp_path / "c")["images-000000.tar"]


def test_running_again(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    _pack("--source", source, "--out", out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert _pack("--source", source, "--out", out) == 0
    assert "already packed: 8 images" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert _pack("--source", source, "--out", out, "--size", 4) == 2
    assert "size None (asked for: 4)" in capsys.readouterr().err
    (out / "images-000000.tar").write_bytes(b"short")
    assert _pack("--source", source, "--out", out) == 2
    assert "images-000000.tar is missing or not of" in capsys.readouterr().err
    (out / "labels.json").unlink()
    assert _pack("--source", source, "--out", out) == 2
    assert "labels.json is missing: remove" in capsys.readouterr().err
    (out / "pack.json").unlink()
    assert _pack("--source", source, "--out", out) == 0
    assert (out / "images-000000.tar").stat().st_size > 5 and (out / "labels.json").exists()


def test_an_interrupted_job_starts_over(tmp_path: Path, source: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    _pack("--source", source, "--out", out, "--shard-samples", 2)
    (out / "pack.json").unlink()
    (out / "images-000003.tar.0123abcd.tmp").write_text("half")
    assert _pack("--source", source, "--out", out, "--shard-samples", 5) == 0
    _pack("--source", source, "--out", whole, "--shard-samples", 5)
    assert _contents(out) == _contents(whole)


def test_a_folder_with_other_files_is_left_alone(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert _pack("--source", source, "--out", out) == 2
    assert "'thesis.tex', which is no part of a pack" in capsys.readouterr().err
    assert os.listdir(out) == ["thesis.tex"]


def test_unreadable_images_are_listed_and_left_out(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "cat" / "notes.txt").write_text("no image")
    (source / "cat" / "README").write_text("no image either")
    whole = (source / "dog" / "2.png").read_bytes()
    (source / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(source / "cat" / "deep.png")
    assert _pack("--source", source, "--out", tmp_path / "out") == 0
    assert len(_read(tmp_path / "out")) == 8
    lines = sorted((tmp_path / "out/quarantine.txt").read_text().splitlines())
    reasons = dict(line.split("\t") for line in lines)
    assert {os.path.basename(name) for name in reasons} == {"cut.png", "deep.png"}
    assert "8 bits" in reasons[str(source / "cat/deep.png")]
    said = capsys.readouterr().out
    assert "left out: 5, 2 of them listed in" in said
    assert f"1  files that are no images (.txt), as {source}/cat/notes.txt" in said
    assert _pack("--source", source, "--out", tmp_path / "strict", "--max-bad", 1) == 2
    assert "more than 1 unreadable images" in capsys.readouterr().err
    assert not (tmp_path / "strict/pack.json").exists()
    assert len((tmp_path / "strict/quarantine.txt").read_text().splitlines()) == 2


def test_mixed_sizes_need_size(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _picture(source / "cat" / "wide.png", width=11, height=7)
    assert _pack("--source", source, "--out", tmp_path / "a") == 2
    message = capsys.readouterr().err
    assert "wide.png" in message and "11x7" in message and "6x6" in message and "--size" in message
    assert _pack("--source", source, "--out", tmp_path / "b", "--size", 5, "--channels", 1) == 0
    assert {image.shape for _, image, _ in _read(tmp_path / "b")} == {(5, 5)}


def test_bad_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _pack("--source", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert "is no folder" in capsys.readouterr().err
    _picture(tmp_path / "flat" / "a.png")
    assert _pack("--source", tmp_path / "flat", "--out", tmp_path / "out") == 2
    assert "lies in no class folder" in capsys.readouterr().err
    (tmp_path / "texts" / "cat").mkdir(parents=True)
    (tmp_path / "texts" / "cat" / "a.txt").write_text("x")
    assert _pack("--source", tmp_path / "texts", "--out", tmp_path / "out") == 2
    assert "no images in" in capsys.readouterr().err
    (tmp_path / "texts" / "cat" / "a.png").write_text("x")
    assert _pack("--source", tmp_path / "texts", "--out", tmp_path / "out") == 2
    assert "no readable images" in capsys.readouterr().err
    assert _pack("--source", "digits", "--out", tmp_path / "out", "--size", 0) == 2
    assert "--size is 0" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _pack("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in text and "quarantine.txt" in text and "imm-scale encode" in text


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 70), (70, 257), (5, 9), (16, 16), (31, 33)])
def test_center_crop_is_the_centre_at_the_wanted_size(width: int, height: int) -> None:
    # A ramp: the crop's mean is the centre's value and its slope that of the shorter side.
    x, y = np.meshgrid((np.arange(width) + 0.5) / width - 0.5, (np.arange(height) + 0.5) / height - 0.5)
    values = np.stack([x * 200 + 128, y * 200 + 128, x * 0 + 40], axis=-1).round().astype(np.uint8)
    cropped = np.array(images.center_crop(Image.fromarray(values), 16)).astype(float)
    assert cropped.shape == (16, 16, 3)
    assert np.allclose(cropped.mean(axis=(0, 1)), [128, 128, 40], atol=8)
    shown = min(width, height) / np.array([width, height])
    # Away from the borders, where enlarging a small image repeats its edge.
    slope = [(cropped[:, 11, 0] - cropped[:, 4, 0]).mean(), (cropped[11, :, 1] - cropped[4, :, 1]).mean()]
    assert np.allclose(slope, 200 * shown * 7 / 16, atol=6)


def test_rendering_turns_photographs_upright(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((4, 9, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    rendered = images.render(str(tmp_path / "turned.jpg"), 3, None)
    assert isinstance(rendered, Rendered) and rendered.shape == (9, 4, 3)
    assert isinstance(images.render(str(tmp_path / "nowhere.png"), 3, None), Unreadable)


def test_a_terminal_that_cannot_show_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("käfer", "猫"):
        _picture(tmp_path / "source" / name / "1.png")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="iso-8859-1", write_through=True)
    monkeypatch.setattr("sys.stdout", stdout)
    assert _pack("--source", tmp_path / "source", "--out", tmp_path / "out") == 0
    said = stdout.buffer.getvalue()  # type: ignore[attr-defined]
    assert "  käfer\n".encode("iso-8859-1") in said and b"\\u732b" in said


def test_names_of_built_in_sets(tmp_path, source, capsys, monkeypatch):
    assert _pack("--source", "digits", source, "--out", tmp_path / "a") == 2
    assert "--source digits is a set of its own: give it alone" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    source.rename(tmp_path / "digits")
    assert _pack("--source", "digits", "--out", tmp_path / "b") == 0
    said = capsys.readouterr().out
    assert "the folder of that name here is ./digits" in said and "packed 1797 images" in said
    assert _pack("--source", "./digits", "--out", tmp_path / "c") == 0
    assert "packed 8 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "200000"], "--size 200000x200000: at most"),
        (["--size", "20000x10000"], "--size 20000x10000: at most"),
        (["--background", "rgb(300, 0, 0)"], "--background rgb(300, 0, 0): a name"),
        (["--labels", "nowhere.json"], "--labels nowhere.json"),
        (["--out", "/dev/null/x"], "choose"),
    ],
)
def test_arguments_are_checked_before_the_source_is_read(tmp_path, capsys, arguments, message):
    given = ["--source", tmp_path / "nowhere", "--out", tmp_path / "out", *arguments]
    assert _pack(*given) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_rights_is_named_before_the_source_is_read(tmp_path, source, capsys, monkeypatch):
    assert _pack("--source", source, "--out", tmp_path / "out") == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert _pack("--source", tmp_path / "nowhere", "--out", tmp_path / "other") == 2
    assert f"{tmp_path}: permission denied" in capsys.readouterr().err
    assert _pack("--source", source, "--out", tmp_path / "out") == 0, "nothing is written where all is there"


@pytest.mark.parametrize("inside", ["out", "cat/out", "../source/out"])
def test_output_inside_the_source_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], inside: str
) -> None:
    assert _pack("--source", source, "--out", source / inside) == 2
    assert "lies inside --source" in capsys.readouterr().err


def test_output_that_is_no_folder(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null", "/dev/null/x", f"{tmp_path}/{'x' * 300}"):
        assert _pack("--source", source, "--out", out) == 2, out
        assert "choose" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
