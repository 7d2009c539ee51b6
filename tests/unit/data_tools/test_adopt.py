"""Foreign latents: conventions that can be chosen are read as they are meant, and what contradicts them is refused."""

import gzip
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from numpy.typing import NDArray

from data_tools import stats, verify
from imm_scale.data import codec as codecs
from imm_scale.data.dataset import Dataset, read_all
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.spaces import Latents, LatentsConfig
from imm_scale.errors import UserError
from tests.small_vae import save_small_vae

SCALING_FACTOR = 0.18215  # of every AutoencoderKL whose config names no other, as the small one's
SAMPLES = 40


@dataclass
class Truth:
    """Raw posteriors such as an autoencoder of that scaling factor has: 1 / 0.18215 wide, with little noise in each."""

    mean: NDArray[np.float64] = field(
        default_factory=lambda: np.random.default_rng(1).normal(0.5, 5.5, (SAMPLES, 4, 8, 12))
    )
    logvar: NDArray[np.float64] = field(
        default_factory=lambda: np.random.default_rng(2).normal(-6.0, 1.0, (SAMPLES, 4, 8, 12))
    )

    @property
    def std(self) -> NDArray[np.float64]:
        return np.exp(0.5 * self.logvar)

    @property
    def sample(self) -> NDArray[np.float64]:
        return self.mean + self.std * np.random.default_rng(3).normal(size=self.mean.shape)


TRUTH = Truth()


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_vae(tmp_path_factory.mktemp("vae"))


def write(path: Path, arrays: NDArray[Any], labels: Sequence[Any], **more: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as writer:
        for i, (array, label) in enumerate(zip(arrays, labels, strict=True)):
            extra = {f"{name}.npy": values[i].astype(np.float16) for name, values in more.items()}
            writer.write({"__key__": f"{i:04d}", "latent.npy": array.astype(np.float16), "cls": label, **extra})


def adopt(folder: Path, vae: str | None, *more: object, size: str = "16x24") -> int:
    codec = ["--codec", "vae", "--vae", vae] if vae else ["--codec", "pixels"]
    return verify.main(
        [str(folder / "manifest.json"), "--adopt", "a.tar", *codec, "--image-size", size, *map(str, more)]
    )


STORED = {
    "mean_std": np.concatenate([TRUTH.mean, TRUTH.std], axis=1),
    "mean_logvar": np.concatenate([TRUTH.mean, TRUTH.logvar], axis=1),
    "sample": TRUTH.sample,
}


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        (STORED["mean_std"], []),  # REPA, MeanFlow
        (STORED["mean_std"], ["--pixel-range", "unit"]),  # EDM2
        (STORED["mean_logvar"], ["--moments", "mean_logvar"]),  # MAR
        (STORED["sample"] * SCALING_FACTOR, ["--moments", "sample", "--scale", SCALING_FACTOR]),  # DiT, SiT
        (STORED["sample"], ["--moments", "sample"]),
        (STORED["mean_std"] * SCALING_FACTOR, ["--scale", SCALING_FACTOR]),
        ((STORED["sample"] - 0.5) * 0.2, ["--moments", "sample", "--scale", "0.2", "--shift", "0.5"]),
    ],
)
def test_conventions_are_read_as_they_are_meant(
    tmp_path: Path, vae: str, stored: NDArray[Any], options: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.tar", stored, [i % 5 for i in range(SAMPLES)])
    assert adopt(tmp_path, vae, *options) == 0
    assert "note" not in capsys.readouterr().out
    url = str(tmp_path / "manifest.json")
    assert verify.main([url, "--workers", "1"]) == 0
    manifest = Manifest.load(url)
    assert manifest.latent_shape == (4, 8, 12) and manifest.codec.image_shape == (16, 24)
    # The statistics are those of raw latents: a sample's own, or the mean's and the posteriors' together.
    is_sample = "sample" in options
    raw = TRUTH.sample if is_sample else TRUTH.mean
    variance = raw.var(axis=(0, 2, 3)) + (0 if is_sample else (TRUTH.std**2).mean(axis=(0, 2, 3)))
    # fp16 keeps 11 bits of each value, and 3,840 of them are averaged.
    np.testing.assert_allclose(manifest.codec.mean, raw.mean(axis=(0, 2, 3)), atol=1e-3)
    np.testing.assert_allclose(manifest.codec.std, np.sqrt(variance), rtol=1e-3)
    # What training sees, taken back to raw latents, is a draw of the posteriors: noise of the std they have.
    x = torch.cat([part for part, _ in read_all(url)])
    drawn = codecs.denormalize(x, manifest.codec.mean, manifest.codec.std).numpy()
    noise = (drawn - TRUTH.mean) / TRUTH.std
    if is_sample:
        np.testing.assert_allclose(drawn, TRUTH.sample, atol=0.02)  # fp16 steps of 1/64 up to 32
    else:
        # 15,360 draws of N(0, 1): its std is off by 1 / sqrt(2 * 15360) = 0.006; fp16 of the mean adds 0.08^2 / 2.
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    # Drawn samples are decoded as the chosen pixels, from the spec that travels with weights.
    space = Latents.of(LatentsConfig(), manifest)
    again = Latents.from_fields(space.to_fields())
    assert again == space
    pixels = again.artifacts(vae, torch.device("cpu"))(x[:2])
    model = codecs.VAECodec(vae)._model
    with torch.no_grad():
        decoded = model.decode(torch.from_numpy(drawn[:2]).float()).sample
    low = 0.0 if "unit" in options else -1.0
    expected = ((decoded - low) / (1 - low) * 255).clamp(0, 255).permute(0, 2, 3, 1)
    assert (pixels.float() - expected).abs().max() <= 0.51


BAD = [
    # what is stored, its options, labels, what is said
    (STORED["mean_logvar"], [], "negative, so they are no standard deviations.* --moments mean_logvar"),
    (STORED["mean_std"], ["--moments", "mean_logvar"], "none is negative.*--moments mean_std"),
    (STORED["sample"], [], "4 channels; --moments mean_std .* needs 8.* samples, not moments.*--moments sample"),
    (STORED["mean_std"], ["--moments", "sample"], "8 channels; .*needs 4.* moments, not samples"),
    (np.concatenate([STORED["sample"], STORED["sample"][::-1]], axis=1), [], "no standard deviations"),
    (STORED["sample"][:, :3], ["--moments", "sample"], "another autoencoder's"),
    (STORED["mean_std"].transpose(0, 2, 3, 1), [], "channels come last"),
    (STORED["sample"] * SCALING_FACTOR, ["--moments", "sample"], "look multiplied: give --scale 0.18215"),
    (STORED["mean_std"] * SCALING_FACTOR, [], "look multiplied: give --scale 0.18215"),
    (STORED["mean_std"] * [[[[1e3]]]], [], "up to .* are no latents"),
    (STORED["mean_std"].transpose(0, 1, 3, 2), [], "images of 24x16 pixels .*--image-size says 16x24"),
    (STORED["mean_std"][:, :, :, :8], [], "latents of 8x8 stand for images of 16x16 .* says 16x24"),
    (np.where(np.arange(SAMPLES)[:, None, None, None] == 7, np.nan, STORED["mean_std"]), [], "1 of 40 .* number 7"),
    (STORED["mean_std"], ["--scale", "0"], "must be above 0"),
    (STORED["mean_std"][:, None], [], "without the axis of the batch"),
]


@pytest.mark.parametrize(("stored", "options", "message"), BAD)
def test_what_contradicts_is_refused_and_nothing_is_written(
    tmp_path: Path,
    vae: str,
    stored: NDArray[Any],
    options: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "a.tar", stored, [i % 5 for i in range(SAMPLES)])
    assert adopt(tmp_path, vae, *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_scale_given_is_believed_and_a_doubtful_one_named(
    tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.tar", STORED["sample"] * SCALING_FACTOR, [i % 5 for i in range(SAMPLES)])
    assert adopt(tmp_path, vae, "--moments", "sample", "--scale", "1") == 0
    text = capsys.readouterr().out
    # The truth is 5.5 wide, so 1.00 after the factor, give or take 1 / sqrt(2 * 15360) = 0.006.
    assert "note: over 40 samples the stored latents have a standard deviation of 0.997" in text and "5.49" in text
    assert Manifest.load(str(tmp_path / "manifest.json")).codec.scale == 1.0


@pytest.mark.parametrize(
    ("stored", "options", "times"),
    [
        (STORED["sample"] * SCALING_FACTOR**2, ["--scale", SCALING_FACTOR], SCALING_FACTOR),  # multiplied twice
        (STORED["sample"] * 10, [], 10),
        (STORED["sample"] * SCALING_FACTOR / 10, ["--scale", SCALING_FACTOR], 0.1),
    ],
)
def test_values_that_fit_no_reading_are_named(tmp_path, vae, stored, options, times, capsys):
    """The truth is as wide as the scaling factor says."""
    width = f"{TRUTH.sample.std() * times:.3g}"
    write(tmp_path / "a.tar", stored, [i % 5 for i in range(SAMPLES)])
    assert adopt(tmp_path, vae, "--moments", "sample", *options) == 0
    assert f"note: raw latents as they are said to be have a standard deviation of {width}; by the" in (
        capsys.readouterr().out
    )


def _with_factors(vae: str, folder: Path, scaling: float, shift: float) -> str:
    """The small autoencoder with the factors of another in its config."""
    shutil.copytree(vae, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": scaling, "shift_factor": shift}))
    return str(folder)


def test_the_factors_come_from_the_autoencoders_config(
    tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [i % 5 for i in range(SAMPLES)]
    flux = _with_factors(vae, tmp_path / "flux", 0.3611, 0.1159)
    raw = TRUTH.sample / 5.5 / 0.3611  # as wide as raw latents of it are
    write(tmp_path / "a.tar", (raw - 0.1159) * 0.3611, labels)
    assert adopt(tmp_path, flux, "--moments", "sample") == 2
    assert "give --scale 0.3611 --shift 0.1159" in capsys.readouterr().err
    assert adopt(tmp_path, flux, "--moments", "sample", "--scale", "0.3611", "--shift", "0.1159") == 0
    assert "note" not in capsys.readouterr().out
    assert Manifest.load(str(tmp_path / "manifest.json")).codec.std == pytest.approx([1 / 0.3611] * 4, rel=0.05)
    # 0.65 and 1 are too near to each other to refuse either.
    sd3 = _with_factors(vae, tmp_path / "sd3", 1.5305, 0.0609)
    for name, values, is_noted in (("raw", raw * 0.3611 / 1.5305, False), ("multiplied", raw * 0.3611, True)):
        write(tmp_path / name / "a.tar", values, labels)
        assert adopt(tmp_path / name, sd3, "--moments", "sample") == 0
        assert ("note: over 40 samples" in capsys.readouterr().out) == is_noted


def test_means_far_from_the_published_ones_are_named(
    tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.tar", STORED["mean_std"], [i % 5 for i in range(SAMPLES)])
    published = codecs.VAECodec(vae).weights_hash
    monkeypatch.setitem(codecs.KNOWN_STATISTICS, published, ((0.5,) * 4, (5.5,) * 4))
    assert adopt(tmp_path, vae) == 0
    assert "published" not in capsys.readouterr().out
    (tmp_path / "manifest.json").unlink()
    monkeypatch.setitem(codecs.KNOWN_STATISTICS, published, ((0.5, 0.5, 0.5, -5.0), (5.5,) * 4))
    assert adopt(tmp_path, vae) == 0
    assert "up to 1.0 standard deviations from those published" in capsys.readouterr().out


def test_posteriors_that_are_mostly_noise_are_named(
    tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = np.concatenate([TRUTH.mean, np.abs(TRUTH.mean) * 2], axis=1)
    write(tmp_path / "a.tar", wide, [i % 5 for i in range(SAMPLES)])
    assert adopt(tmp_path, vae, "--scale", "1") == 0
    assert "most of a latent is noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (range(10), ["--num-classes", 5], "labels go from 0 to 9, --num-classes 5 allows 0 to 4"),
        (range(1, 11), ["--num-classes", 10], "0 to 9; if they count from 1, write them again from 0"),
        (
            range(1, 11),
            [],
            r"1 of 11 classes have no sample \(0\).*--num-classes; if they count",
        ),
        ([0, 1, 2, 999], [], "996 of 1000 classes have no sample"),
        (["-1", "0"], [], "label b'-1'"),
        (["0", "99999999999"], [], "label b'99999999999'"),
        (["cat", "dog"], [], "label b'cat'"),
        ([0], ["--num-classes", 0], "--num-classes is 0"),
    ],
)
def test_labels_are_held_against_the_classes(
    tmp_path: Path, labels: Sequence[Any], options: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (len(labels), 3, 4, 4))
    write(tmp_path / "a.tar", values, [str(label) for label in labels])
    assert adopt(tmp_path, None, *options, size="4") == 2
    assert re.search(message, capsys.readouterr().err)


def test_classes_without_a_sample_are_named_where_their_number_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.tar", np.random.default_rng(0).uniform(-1, 1, (4, 1, 4, 4)), ["0\n", "1", "3", " 3"])
    assert adopt(tmp_path, None, "--num-classes", 5, size="4") == 0
    assert "2 of 5 classes have no sample (2, 4)" in capsys.readouterr().out
    assert verify.main([str(tmp_path / "manifest.json"), "--workers", "1"]) == 0  # white space around labels is none


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (lambda u: u * 255, [], "pixels go from .* must lie in -1 to 1"),
        (lambda u: u, [], "none is darker than grey: give --pixel-range unit"),
        (lambda u: u * 2 - 1, ["--pixel-range", "unit"], "must lie in 0 to 1"),
        (lambda u: u.transpose(0, 2, 3, 1), [], "channels come last"),
        (lambda u: u * 2 - 1, ["--moments", "sample"], "are for --codec vae"),
    ],
)
def test_pixels_of_other_ranges_are_refused(
    tmp_path: Path, values: Any, options: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = np.random.default_rng(0).uniform(0, 1, (6, 3, 4, 4))
    write(tmp_path / "a.tar", values(unit), [0] * 6)
    assert adopt(tmp_path, None, *options, size="4") == 2
    assert re.search(message, capsys.readouterr().err)


def test_pixels_from_0_to_1_come_back_as_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    write(tmp_path / "a.tar", images.transpose(0, 3, 1, 2) / 255.0, [0] * 6)
    assert adopt(tmp_path, None, "--pixel-range", "unit", size="4") == 0
    url = str(tmp_path / "manifest.json")
    space = Latents.of(LatentsConfig(), Manifest.load(url))
    x = torch.cat([part for part, _ in read_all(url, space=space)])
    assert np.array_equal(space.artifacts(None, torch.device("cpu"))(x).numpy(), images)


def test_mirrored_latents_are_adopted_too(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (6, 3, 4, 4)).astype(np.float16)
    write(tmp_path / "a.tar", values, range(6), latent_flip=values[..., ::-1])
    assert adopt(tmp_path, None, size="4") == 0
    url = str(tmp_path / "manifest.json")
    dataset = Dataset(url)
    assert dataset.manifest.flipped and dataset.manifest.num_samples == 6
    out = np.empty((6, 2, 3, 4, 4), np.float16)
    reader = dataset.shards[0]
    start, stop = reader.span(0, 6)
    reader.decode((tmp_path / "a.tar").read_bytes()[start:stop], 0, 6, out)
    assert np.array_equal(out[:, 0], values) and np.array_equal(out[:, 1], values[..., ::-1])
    assert verify.main([url, "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["latent_flip.npy", "latent.npy", "cls"], "has latent_flip.npy before latent.npy"),
        (["latent.npy", "latent_flip.npy"], "latent.npy and cls and latent_flip.npy are needed"),
        (["latent.npy"], "latent.npy and cls are needed"),
        (["cls"], "no sample with latent.npy"),
        ([], "no sample with latent.npy"),
    ],
)
def test_shards_that_could_not_be_read_are_not_adopted(
    tmp_path: Path, members: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    array = io.BytesIO()
    np.save(array, np.linspace(-1, 1, 16).reshape(1, 4, 4).astype(np.float16))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in members:
            content = b"0" if name == "cls" else array.getvalue()
            info = tarfile.TarInfo(f"0.{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert adopt(tmp_path, None, size="4") == 2
    assert message in capsys.readouterr().err and os.listdir(tmp_path) == ["a.tar"]


def _shard(path: Path, latent: bytes, label: bytes = b"0") -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in (("0.latent.npy", latent), ("0.cls", label)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _claim(header: str, version: bytes = b"\1\0") -> bytes:
    """An array's file with this header, which holds no values."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version == b"\1\0" else 4, "little") + text


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, latent=np.zeros((1, 4, 4), np.float16))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (_npz(), "an .npz or .zip file"),
        (_claim("{'descr': '<f2', (((("), "is no array"),
        (_claim("{'descr': '<f2'\n  , 1: 2L"), "is no array"),
        (_claim("(" * 9000), "is no array"),
        (_claim("{'descr': '|O', 'fortran_order': False, 'shape': (1, 4, 4), }"), "is object of shape"),
        (_claim("{'descr': '<f2', 'fortran_order': False, 'shape': (1, 4), }"), "float16 of shape (1, 4)"),
        (_claim("{'descr': '<f2', 'fortran_order': False, 'shape': (1, 9000000, 9000000), }"), "--image-size says 4x4"),
        (_claim("{'descr': '<f2', 'fortran_order': False, 'shape': (1, 4, 4), }"), "is no fp16 array"),
        (_claim("{'descr': '<f2', 'fortran_order': False, 'shape': (1, 4, 4), }", b"\2\0"), "is no fp16 array"),
        (_claim("", b"\7\0"), "version (7, 0)"),
    ],
)
def test_arrays_that_claim_what_they_do_not_hold(tmp_path, latent, message, capsys):
    """Without reading, evaluating or allocating what they claim."""
    _shard(tmp_path / "a.tar", latent)
    assert adopt(tmp_path, None, size="4") == 2
    assert message in capsys.readouterr().err and os.listdir(tmp_path) == ["a.tar"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><title>Sign in", "is a web page"),
        (gzip.compress(bytes(10240), mtime=0), "is compressed"),
        (lzma.compress(bytes(10240)), "is compressed"),
    ],
)
def test_shards_that_are_something_else(tmp_path, content, message, capsys):
    (tmp_path / "a.tar").write_bytes(content)
    assert adopt(tmp_path, None, size="4") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("label", [b"9" * 5000, b"2147483647"])
def test_labels_beyond_all_classes(tmp_path, label, capsys):
    array = io.BytesIO()
    np.save(array, np.linspace(-1, 1, 16).reshape(1, 4, 4).astype(np.float16))
    _shard(tmp_path / "a.tar", array.getvalue(), label)
    assert adopt(tmp_path, None, size="4") == 2
    message = capsys.readouterr().err
    assert "is needed" in message or "2147483647 of 2147483648 classes have no sample (0, 1, 2, 3, 4, ...)" in message
    assert adopt(tmp_path, None, "--num-classes", 2**31, size="4") == 2
    assert "it must be 1 to 1000000" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_named_before_the_shards_are_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.tar").write_bytes(b"nothing that could be read")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert adopt(tmp_path, None, size="4") == 2
    assert f"{tmp_path}: permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["17x24", "16x25", "16x26"])
def test_images_that_their_latents_do_not_cover_are_refused(tmp_path, vae, size, capsys):
    write(tmp_path / "a.tar", STORED["mean_std"], [i % 5 for i in range(SAMPLES)])
    assert adopt(tmp_path, vae, size=size) == 2
    assert f"stand for images of 16x24 pixels (height x width, 2 to one), --image-size says {size}" in (
        capsys.readouterr().err
    )


# --- names ---


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of two shards, one in a folder of its own."""
    values = np.random.default_rng(0).uniform(-1, 1, (6, 3, 4, 4))
    write(tmp_path / "set" / "a.tar", values, range(6))
    write(tmp_path / "set" / "more" / "b.tar", -values, range(6))
    return tmp_path / "set"


PIXELS = ["--codec", "pixels", "--image-size", "4"]


@pytest.mark.parametrize("kind", ["from another folder", "absolute", "pattern", "beside the manifest", "by a link"])
def test_shards_are_named_relative_to_the_manifest_and_move_with_it(
    shards: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    os.symlink(shards, shards.parent / "link")
    names = {
        "from another folder": ["set/a.tar", "set/more/b.tar"],
        "absolute": [str(shards / "a.tar"), str(shards / "more" / "b.tar")],
        "pattern": ["set/*.tar", "set/*/*.tar"],
        "beside the manifest": ["a.tar", "more/b.tar"],
        "by a link": ["link/a.tar", str(shards.parent / "link" / "more" / "b.tar")],
    }[kind]
    assert verify.main(["set/manifest.json", "--adopt", *names, *PIXELS]) == 0
    assert [shard.name for shard in Manifest.load("set/manifest.json").shards] == ["a.tar", "more/b.tar"]
    before = torch.cat([x for x, _ in read_all("set/manifest.json")])
    monkeypatch.chdir("/")
    moved = shards.parent / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(shards, moved)
    assert torch.equal(torch.cat([x for x, _ in read_all(str(moved / "manifest.json"))]), before)


def test_a_set_in_a_store_is_adopted_by_pattern(shards: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    where = f"memory://adopt-{time.time_ns()}"
    for name in ("a.tar", "more/b.tar"):
        store.pipe_file(f"{where}/{name}", (shards / name).read_bytes())
    assert verify.main([f"{where}/manifest.json", "--adopt", "*.tar", f"{where}/more/*.tar", *PIXELS]) == 0
    assert [shard.name for shard in Manifest.load(f"{where}/manifest.json").shards] == ["a.tar", "more/b.tar"]
    assert len(torch.cat([x for x, _ in read_all(f"{where}/manifest.json")])) == 12


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nope.tar"], "--adopt nope.tar: no such file, neither here nor in the manifest's folder set"),
        (["set/no-*.tar"], "no such file"),
        (["outside.tar"], "outside.tar lies outside the manifest's folder set"),
        (["set/a.tar", "a.tar"], "names a.tar more than once"),
        (["set/note.txt"], "shards are .tar files"),
        (["twice.tar"], "may mean .*/twice.tar or .*/set/twice.tar: give the absolute path"),
        (["memory://bucket/c.tar"], "no such file|lies outside"),
        (["set/more"], "no such file|shards are .tar files"),
    ],
)
def test_names_that_mean_nothing_or_two_things_are_refused(
    shards: Path, names: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shards.parent)
    for name in ("outside.tar", "twice.tar", "set/twice.tar", "set/note.txt"):
        shutil.copy(shards / "a.tar", name)
    assert verify.main(["set/manifest.json", "--adopt", *names, *PIXELS]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_options_that_would_do_nothing_are_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(shards / "manifest.json")
    assert verify.main([url, "--adopt", "a.tar", *PIXELS, "--repair"]) == 2
    assert "--repair is not for --adopt" in capsys.readouterr().err
    assert verify.main([url, "--adopt", "a.tar", "more/b.tar", *PIXELS]) == 0
    assert verify.main([url, "--workers", "1", "--moments", "sample"]) == 2
    assert "--moments is for --adopt" in capsys.readouterr().err


# --- what else reads a manifest ---


def test_a_net_is_measured_against_data_stored_in_another_way(tmp_path: Path, vae: str) -> None:
    """The normalization is the net's, what the bytes mean the data's: both sets hold the same raw latents."""
    spaces, labels = {}, [i % 5 for i in range(SAMPLES)]
    for name, stored, options in (
        ("a", TRUTH.sample, []),
        ("b", TRUTH.sample * SCALING_FACTOR, ["--scale", SCALING_FACTOR]),
    ):
        write(tmp_path / name / "a.tar", stored, labels)
        assert adopt(tmp_path / name, vae, "--moments", "sample", *options) == 0
        spaces[name] = Latents.of(LatentsConfig(), Manifest.load(str(tmp_path / name / "manifest.json")))
    x = {
        name: torch.cat([x for x, _ in read_all(f"{tmp_path}/{name}/manifest.json", space=spaces["a"])])
        for name in "ab"
    }
    torch.testing.assert_close(x["a"], x["b"], atol=2e-3, rtol=0)  # 1/64, a step of fp16 at 16, times 0.5 / 5.5
    unit = Latents(0.5, (4, 8, 12), replace(spaces["a"].codec, pixel_range="unit"), 5, ())
    square = Latents(0.5, (4, 8, 8), spaces["a"].codec, 5, ())
    for space, message in ((unit, r"data.codec .*unit"), (square, r"data.latent_shape \(4, 8, 12\), not \(4, 8, 8\)")):
        with pytest.raises(UserError, match=message):
            list(read_all(f"{tmp_path}/a/manifest.json", space=space))


def test_stats_reads_samples_as_raw_latents(tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.tar", STORED["sample"] * SCALING_FACTOR, [i % 5 for i in range(SAMPLES)])
    assert adopt(tmp_path, vae, "--moments", "sample", "--scale", SCALING_FACTOR) == 0
    page = tmp_path / "page.png"
    assert stats.main([str(tmp_path / "manifest.json"), "--vae", vae, "--page", str(page), "--columns", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    channel = next(line for line in lines if line.startswith("      0 ")).split()
    assert float(channel[2]) == pytest.approx(TRUTH.sample[:, 0].std(), rel=1e-3)
    from PIL import Image

    assert Image.open(page).size == (2 * 24, 10 * 16)


def test_a_set_of_version_1_keeps_its_bytes_and_hash() -> None:
    codec = Codec("vae", "f" * 64, 16, 4, 2, (0.0,) * 4, (1.0,) * 4)
    assert set(codec.to_fields()) == {"kind", "weights_hash", "image_size", "channels", "factor", "mean", "std"}
    assert "moments" in Codec("vae", "", 16, 4, 2, (), (), moments="sample").to_fields()
    assert Latents(0.5, (4, 8, 8), codec, 2, ()).to_fields()["codec"] == codec.to_fields()


def test_the_documented_way_from_files_to_shards(tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs" / "data.md").read_text(), re.S)
    assert code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae-sd" / "00000").mkdir(parents=True)
    (tmp_path / "latents").mkdir()
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(SAMPLES)]
    for name, moments in zip(names, STORED["mean_std"], strict=True):
        np.save(tmp_path / "vae-sd" / name, moments.astype(np.float32))
    labels = [[name, i % 5] for i, name in enumerate(names)]
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    exec(code[1], {})
    names = [f"latents/{name}" for name in os.listdir("latents")]
    size = ["--codec", "vae", "--vae", vae, "--image-size", "16x24"]
    assert verify.main(["latents/manifest.json", "--adopt", *names, *size]) == 0
    dataset = Dataset("latents/manifest.json")
    stored = dataset.read(0, SAMPLES)
    once = STORED["mean_std"].astype(np.float32)  # as the files: rounded twice
    rows = {moments.tobytes(): i for i, moments in enumerate(once.astype(np.float16))}
    assert sorted(rows[row.tobytes()] for row in stored) == list(range(SAMPLES))
    assert all(rows[row.tobytes()] % 5 == label for row, label in zip(stored, dataset.labels, strict=True))
