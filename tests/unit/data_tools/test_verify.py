import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from data_tools import encode, pack, stats, verify
from imm_scale.data.dataset import read_all
from imm_scale.data.loader import Loader
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.sample_order import Layout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The real digits in eight shards."""
    images = str(tmp_path / "images")
    assert pack.main(["--source", "digits", "--out", images, "--shard-samples", "250"]) == 0
    assert encode.main(["--images", images, "--out", str(tmp_path / "latents"), "--codec", "pixels"]) == 0
    return tmp_path / "latents"


def _verify(folder: Path, *more: object) -> int:
    return verify.main([str(folder / "manifest.json"), "--workers", "1", *map(str, more)])


def test_a_sound_data_set(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(data / "manifest.json"), "--workers", "2"]) == 0
    assert "8 of 8 shards are right, 1797 samples in 10 classes of 174 to 183" in capsys.readouterr().out


def test_every_damage_is_named_and_mended(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in data.iterdir()}

    def flip(name: str, position: int) -> None:
        changed = bytearray(before[name])
        changed[position] ^= 2
        (data / name).write_bytes(changed)

    (data / "latents-000000.tar").unlink()
    (data / "latents-000001.tar").write_bytes(before["latents-000001.tar"][:-2048])
    flip("latents-000002.tar", 700)  # a value
    flip("latents-000003.tar", 10)  # a name in a header
    flip("latents-000004.index.npy", 300)
    (data / "latents-000005.tar").write_bytes(before["latents-000006.tar"])
    capsys.readouterr()
    assert _verify(data) == 1
    lines = capsys.readouterr().out.splitlines()
    expected = {
        0: "missing",
        1: "bytes, the manifest says",
        2: "crc32",
        3: "the tar header at byte 0 is damaged",
        4: "index",
        5: "another sha256",
    }
    for i, problem in expected.items():
        assert any(f"latents-{i:06d}.tar" in line and problem in line for line in lines), (i, lines)
    assert not any("latents-000007.tar" in line for line in lines)
    assert "2 of 8 shards are right" in lines[-1]
    for options, message in {
        ("--repair",): "--repair needs the images",
        ("--codec", "pixels"): "are for --repair",
        ("--workers", "0"): "--workers is 0",
    }.items():
        assert _verify(data, *options) == 2
        assert message in capsys.readouterr().err
    assert _verify(data, "--repair", "--images", data.parent / "images", "--codec", "pixels") == 0
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_values_out_of_range_are_seen() -> None:
    latents = np.zeros((2, 1, 2, 2, 2), np.float16)
    latents[0, 0, 1, 0, 0] = -0.5
    latents[1, 0, 0, 0, 0] = np.nan
    vae = Codec("vae", "", 2, 1, 1, (0.0,), (1.0,))
    assert verify._value_problems(latents, vae) == ["1 values are NaN or infinite", "negative standard deviations"]
    assert verify._value_problems(latents[:1], replace(vae, moments="mean_logvar")) == []
    pixels = Codec("pixels", "", 2, 2, 1, (0.0,) * 2, (1.0,) * 2, pixel_range="unit")
    assert verify._value_problems(latents[:1], pixels) == ["pixels outside 0 to 1"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_stock_shards_are_adopted_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents = np.random.default_rng(0).uniform(-1, 1, (50, 3, 4, 4)).astype(np.float16)
    with wds.ShardWriter(str(tmp_path / "s-%02d.tar"), maxcount=20, verbose=0) as writer:
        for i, latent in enumerate(latents):
            writer.write({"__key__": f"{i:04d}", "latent.npy": latent, "cls": i % 12})
    names = sorted(path.name for path in tmp_path.glob("*.tar"))
    url = str(tmp_path / "manifest.json")
    arguments = [url, "--adopt", *names, "--codec", "pixels", "--image-size", "4"]
    assert verify.main(arguments) == 0
    assert "adopted 50 samples in 3 shards" in capsys.readouterr().out
    assert _verify(tmp_path) == 0
    manifest = Manifest.load(url)
    assert manifest.num_classes == 12 and manifest.latent_shape == (3, 4, 4)
    np.testing.assert_allclose(manifest.codec.mean, latents.astype(np.float64).mean(axis=(0, 2, 3)), rtol=1e-9)
    x, label = (torch.cat(parts) for parts in zip(*read_all(url), strict=True))
    mean, std = (torch.tensor(v)[:, None, None] for v in (manifest.codec.mean, manifest.codec.std))
    torch.testing.assert_close(x / 0.5 * std + mean, torch.from_numpy(latents).float(), atol=1e-5, rtol=1e-5)
    assert label.tolist() == [i % 12 for i in range(50)]
    with Loader(url, Layout(10, 2, 1, 10), 0, 0, 4) as loader:
        seen = torch.cat([batch.x for batch in islice(loader, 5)])
    assert torch.equal(seen.flatten(1).sum(1).sort().values, x.flatten(1).sum(1).sort().values)
    assert verify.main(arguments) == 2
    assert "exists" in capsys.readouterr().err


def test_adopting_refuses_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "0", "latent.npy": np.zeros((1, 2, 2), np.float32), "cls": 0})
    url = str(tmp_path / "manifest.json")
    assert verify.main([url, "--adopt", "a.tar", "--codec", "pixels", "--image-size", "2"]) == 2
    assert "float32 of shape (1, 2, 2): fp16" in capsys.readouterr().err
    assert verify.main([url, "--adopt", "a.tar"]) == 2
    assert "--adopt needs --codec" in capsys.readouterr().err


def test_bit_compression_of_published_codecs() -> None:
    assert stats.bit_compression(4 * 8 * 8, 3, 8 * 16) == 48
    assert stats.bit_compression(4 * 8 * 8, 3, math.log2(32768)) == 409.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--page", "page"], "the page is a PNG"),
        (["--page", "page.png", "--columns", "0"], "--columns is 0"),
        (["--page", "page.png", "--rows", "-1"], "--rows is -1"),
        (["--vae", "somewhere"], "--vae somewhere decodes the page"),
    ],
)
def test_options_of_stats_are_checked_before_the_data_is_read(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stats.main(["nowhere/manifest.json", *options]) == 2
    assert message in capsys.readouterr().err


def test_stats_and_page(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.datasets import load_digits

    page = tmp_path / "new" / "folder" / "page.png"
    assert stats.main([str(data / "manifest.json"), "--page", str(page), "--rows", "10", "--columns", "3"]) == 0
    text = capsys.readouterr().out
    images, target = load_digits(return_X_y=True)
    values = np.round(images * 255 / 16) / 127.5 - 1
    values = values.astype(np.float16).astype(np.float64)
    assert f"{values.mean():.5f}" in text and f"{values.std():.5f}" in text
    counts = np.bincount(target)
    assert all(f"{count:8d}  {i:5d}  {i}" in text for i, count in enumerate(counts))
    assert "64 positions of 1 channels; with patches of 2 a sequence of 16" in text
    assert "bit compression: 0.5 " in text
    drawn = np.array(Image.open(page).convert("L"))
    assert drawn.shape == (80, 24)
    known = {
        np.round(image.reshape(8, 8) * 255 / 16).astype(np.uint8).tobytes(): int(t)
        for image, t in zip(images, target, strict=True)
    }
    for row in range(10):
        for column in range(3):
            tile = np.ascontiguousarray(drawn[8 * row : 8 * row + 8, 8 * column : 8 * column + 8])
            assert known[tile.tobytes()] == row
