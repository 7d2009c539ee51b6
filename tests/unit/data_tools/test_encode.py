import argparse
import contextlib
import io
import json
import os
import random
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import encode, pack
from data_tools.statistics import ChannelSums
from imm_scale import storage
from imm_scale.data import codec as codecs
from imm_scale.data.dataset import Dataset, read_all
from imm_scale.data.manifest import Codec, Manifest
from tests import ranks
from tests.small_vae import save_small_vae

COUNT = 11


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Eleven RGB images of 8 x 8 pixels in three shards."""
    _pictures(tmp_path / "source", COUNT)
    folder = tmp_path / "images"
    assert pack.main(["--source", str(tmp_path / "source"), "--out", str(folder), "--shard-samples", "4"]) == 0
    return folder


def _pictures(folder: Path, count: int) -> None:
    """Random RGB images of 8 x 8 pixels in three classes."""
    generator = np.random.default_rng(3)
    for i in range(count):
        path = folder / f"class {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def _encode(images: Path, out: Path, *arguments: object, codec: str = "pixels") -> int:
    return encode.main(
        ["--images", str(images), "--out", str(out), "--codec", codec, *(str(argument) for argument in arguments)]
    )


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _images_of(source: Path) -> dict[bytes, str]:
    return {np.array(Image.open(path)).tobytes(): path.parent.name for path in source.rglob("*.png")}


def test_images_come_back_with_their_labels(tmp_path: Path, packed: Path) -> None:
    assert _encode(packed, tmp_path / "out") == 0
    url = str(tmp_path / "out" / "manifest.json")
    manifest = Manifest.load(url)
    assert manifest.latent_shape == (3, 8, 8) and manifest.num_samples == COUNT
    assert manifest.class_names == ("class 0", "class 1", "class 2")
    classes = {}
    for x, label in read_all(url):
        pictures = codecs.decode(x, manifest.codec, codecs.open_codec(manifest.codec))
        for picture, one in zip(pictures, label.tolist(), strict=True):
            classes[picture.numpy().tobytes()] = manifest.class_names[one]
    assert classes == _images_of(tmp_path / "source")


def test_mean_and_std_are_exact(tmp_path: Path, packed: Path) -> None:
    _encode(packed, tmp_path / "out", "--batch-size", 3)
    url = str(tmp_path / "out" / "manifest.json")
    dataset = Dataset(url)
    blocks = [(0, 4), (4, 8), (8, 11)]
    values = np.concatenate([dataset.read(*block) for block in blocks]).astype(np.float64)
    np.testing.assert_allclose(dataset.manifest.codec.mean, values.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.manifest.codec.std, values.std(axis=(0, 2, 3)), rtol=1e-12)
    x = torch.cat([x for x, _ in read_all(url)])
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(dim=(0, 2, 3), correction=0), torch.full((3,), 0.5), atol=1e-6, rtol=0)


def test_vae_sums_give_the_variance_of_the_draws() -> None:
    generator = np.random.default_rng(0)
    mean = generator.standard_normal((300, 1, 4, 4)) + 2
    std = generator.random((300, 1, 4, 4))
    stored = np.concatenate([mean, std], axis=1).astype(np.float16)
    codec = Codec("vae", "", 4, 1, 1, (), ())
    parts = ChannelSums.of(stored[:100], codec) + ChannelSums.of(stored[100:], codec)
    (estimated_mean,), (estimated_std,) = parts.mean_std()
    draws = stored[:, :1] + stored[:, 1:] * generator.standard_normal((500, 300, 1, 4, 4))
    assert abs(estimated_mean - draws.mean()) < 0.005 and abs(estimated_std - draws.std()) < 0.005


def test_same_input_gives_the_same_bytes_however_it_is_split(tmp_path: Path, packed: Path) -> None:
    _encode(packed, tmp_path / "a")
    for job in (2, 0, 1):
        assert not (tmp_path / "b" / "manifest.json").exists()
        assert _encode(packed, tmp_path / "b", "--task-index", job, "--num-tasks", 3) == 0
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_running_again_skips_what_is_finished(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    _encode(packed, out)
    whole = _contents(out)
    capsys.readouterr()
    assert _encode(packed, out) == 0
    assert "already encoded: 11 images in 3 shards" in capsys.readouterr().out
    for lost in ("manifest.json", "latents-000001.json", "latents-000002.tar", "latents-000000.index.npy"):
        (out / lost).unlink()
    modified = (out / "latents-000000.json").stat().st_mtime_ns
    assert _encode(packed, out) == 0
    assert _contents(out) == whole
    assert (out / "latents-000000.json").stat().st_mtime_ns > modified


def test_other_data_is_refused_by_name(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    _encode(packed, out)
    whole = _contents(out)
    grey, reordered = tmp_path / "grey", tmp_path / "reordered"
    source = ["--source", str(tmp_path / "source"), "--shard-samples", "4"]
    pack.main([*source, "--out", str(grey), "--channels", "1"])
    pack.main([*source, "--out", str(reordered), "--seed", "1"])
    capsys.readouterr()
    assert _encode(grey, out) == 2
    message = capsys.readouterr().err
    assert "manifest.json is of another codec" in message and "3 channels" in message and "1 channels" in message
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    assert _encode(grey, out) == 2
    assert "latents-000000.json is of another codec" in capsys.readouterr().err
    assert _encode(reordered, out) == 2
    assert "latents-000000.json belongs to other images" in capsys.readouterr().err
    (tmp_path / "manifest.json").rename(out / "manifest.json")
    assert _contents(out) == whole


def test_bad_input(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cases: list[tuple[int, str]] = [
        (_encode(tmp_path / "nowhere", out), "no pack.json in"),
        (_encode(packed, out, "--task-index", 3, "--num-tasks", 3), "--task-index 3 is outside --num-tasks 3"),
        (_encode(packed, out, "--task-index", 3), "belong together"),
        (_encode(packed, out, "--batch-size", 0), "--batch-size is 0"),
        (_encode(packed, out, codec="vae"), "--codec vae needs --vae PATH"),
        (_encode(packed, out, "--vae", "x"), "--vae x is for --codec vae"),
        (_encode(packed, out, "--vae", tmp_path, codec="vae"), "must name a folder written by"),
    ]
    messages = capsys.readouterr().err
    for code, message in cases:
        assert code == 2 and message in messages
    assert not out.exists()


def test_damaged_image_shards_are_refused(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = packed / "images-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1024])
    assert _encode(packed, tmp_path / "out") == 2
    assert "images-000001.tar (1024 bytes) is not the file pack.json describes" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    shard.unlink()
    assert _encode(packed, tmp_path / "out") == 2
    assert "images-000001.tar is missing" in capsys.readouterr().err
    shard.write_bytes(whole)
    assert _encode(packed, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": [8, 8]}, "lacks or misnames a field"),
        ({"image_shape": [8, 8, "3"]}, "'3': a whole number above 0 is needed"),
        ({"image_shape": [8, 16, 3]}, "images-000000.tar has images of shape (8, 8, 3), pack.json says (8, 16, 3)"),
        ({"shards": []}, "no shards"),
        ({"shards": [{"name": "../a.tar", "samples": 1, "bytes": 1, "sha256": ""}]}, "'../a.tar': the name of a file"),
        ({"shards": [{"name": "a.tar", "samples": 0, "bytes": 1, "sha256": ""}]}, "0: a whole number above 0"),
    ],
)
def test_a_pack_json_that_is_not_ours(tmp_path, packed, changes, message, capsys):
    document = json.loads((packed / "pack.json").read_text())
    (packed / "pack.json").write_text(json.dumps({**document, **changes}))
    assert _encode(packed, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_images_that_do_not_divide_or_are_all_alike_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shape in (("odd", (4, 7, 3)), ("flat", (4, 6, 3))):
        path = tmp_path / name / "class" / "a.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full(shape, 90, np.uint8)).save(path)
        pack.main(["--source", str(tmp_path / name), "--out", str(tmp_path / f"{name}-images")])
    vae = ["--codec", "vae", "--vae", save_small_vae(tmp_path / "vae")]
    assert encode.main(["--images", str(tmp_path / "odd-images"), "--out", str(tmp_path / "a"), *vae]) == 2
    assert "7x4 pixels, vae needs sides divisible by 2: pack them with --size 4x6" in capsys.readouterr().err
    assert _encode(tmp_path / "flat-images", tmp_path / "b") == 2
    assert "has one value in all images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"0": "a", "2": "c"}, "does not name classes 0, 1"),
        ({}, "names no class"),
        ({"0": "a", "1": 7, "2": "c"}, "something else than text"),
        ([], "no JSON object"),
        (None, "is missing"),
    ],
)
def test_labels_must_name_every_class_before_anything_is_encoded(tmp_path, packed, document, message, capsys):
    (packed / "labels.json").unlink()
    if document is not None:
        (packed / "labels.json").write_text(json.dumps(document))
    assert _encode(packed, tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_labels_without_a_name_are_refused(tmp_path, packed, capsys):
    """As labels.json of another pack would leave them; the manifest would have too few classes."""
    (packed / "labels.json").write_text(json.dumps({"0": "a", "1": "b"}))
    assert _encode(packed, tmp_path / "out") == 2
    assert "has label 2, labels.json beside it names 2 classes" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_encoding_through_an_object_store(tmp_path: Path, packed: Path) -> None:
    assert encode.main(["--images", str(packed), "--out", "memory://encoded", "--codec", "pixels"]) == 0
    stored = Manifest.load("memory://encoded/manifest.json")
    _encode(packed, tmp_path / "out")
    assert stored == Manifest.load(str(tmp_path / "out" / "manifest.json"))
    assert sum(len(x) for x, _ in read_all("memory://encoded/manifest.json")) == COUNT


def test_vae_latents(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_small_vae(tmp_path / "vae")
    out = tmp_path / "out"
    assert _encode(packed, out, "--vae", tmp_path / "vae", codec="vae") == 0
    manifest = Manifest.load(str(out / "manifest.json"))
    assert manifest.latent_shape == (4, 4, 4) and manifest.stored_shape == (8, 4, 4) and manifest.codec.factor == 2
    x = torch.cat([x for x, _ in read_all(str(out / "manifest.json"))])
    assert x.shape == (COUNT, 4, 4, 4) and abs(x.std().item() - 0.5) < 0.1
    assert _encode(packed, out) == 2
    assert "is of another codec (vae with weights" in capsys.readouterr().err
    first = _contents(out)
    shutil.rmtree(out)
    _encode(packed, out, "--vae", tmp_path / "vae", codec="vae")
    assert _contents(out) == first


def test_mirrored_latents_are_those_of_mirrored_images(tmp_path: Path, packed: Path) -> None:
    vae = save_small_vae(tmp_path / "vae")
    assert _encode(packed, tmp_path / "out", "--vae", vae, "--flip", codec="vae") == 0
    dataset = Dataset(str(tmp_path / "out" / "manifest.json"))
    assert dataset.manifest.flipped and dataset.shards[0].variants == 2
    with tarfile.open(packed / "images-000000.tar") as archive:
        pngs = [archive.extractfile(m).read() for m in archive if m.name.endswith(".png")]  # type: ignore[union-attr]
    images = torch.from_numpy(np.stack([np.array(Image.open(io.BytesIO(png))) for png in pngs]))
    expected = codecs.VAECodec(str(vae)).encode(images.flip(2)).half().numpy()
    shard = dataset.shards[0]
    out = np.empty((4, 2, *shard.stored_shape), np.float16)
    shard.decode(storage.read_range(shard.url, *shard.span(0, 4)), 0, 4, out)
    np.testing.assert_array_equal(out[:, 1], expected)
    np.testing.assert_array_equal(out[:, 0], dataset.read(0, 4))
    both = np.concatenate([out[:, v, :4].astype(np.float64) for v in (0, 1)])
    assert abs(both.mean() - np.mean(dataset.manifest.codec.mean)) < 0.2


def test_published_statistics_are_used_and_the_difference_told(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = save_small_vae(tmp_path / "vae")
    published = ((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0))
    monkeypatch.setitem(codecs.KNOWN_STATISTICS, codecs.VAECodec(str(vae)).weights_hash, published)
    assert _encode(packed, tmp_path / "out", "--vae", vae, codec="vae") == 0
    codec = Manifest.load(str(tmp_path / "out" / "manifest.json")).codec
    assert (codec.mean, codec.std) == published
    assert "published mean and std of this autoencoder are used; measured here: mean [" in capsys.readouterr().out
    mean, std = codecs.KNOWN_STATISTICS["a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"]
    assert mean[0] == 0.86488 and std[3] == 3.9870003


def test_a_vae_is_found_by_its_hub_name(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    cache, revision = tmp_path / "hub", "0123456789012345678901234567890123456789"
    model = cache / "models--some-lab--small-vae"
    save_small_vae(model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert _encode(packed, tmp_path / "out", "--vae", "some-lab/small-vae", codec="vae") == 0
    assert _encode(packed, tmp_path / "two", "--vae", "some-lab/other", codec="vae") == 2
    assert "some-lab/other is no folder here, and it cannot be had from the hub" in capsys.readouterr().err


def test_finalize_says_what_is_missing_or_too_much(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _encode(packed, out, "--task-index", 1, "--num-tasks", 3) == 0
    assert _encode(packed, out, "--finalize") == 2
    assert "2 of 3 shards are not encoded yet (latents-000000, latents-000002)" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    for task in (0, 2):
        _encode(packed, out, "--task-index", task, "--num-tasks", 3)
    (out / "manifest.json").unlink()
    (out / "latents-000007.tar").write_bytes(b"")
    assert _encode(packed, out, "--finalize") == 2
    assert "shards of no image shard (latents-000007)" in capsys.readouterr().err
    (out / "latents-000007.tar").unlink()
    (out / "latents-000001.tar.0123abcd.tmp").write_bytes(b"half")
    assert _encode(packed, out, "--finalize") == 0
    _encode(packed, tmp_path / "alone")
    assert _contents(out) == _contents(tmp_path / "alone")


def _run_encode(images: str, out: str) -> int:
    return encode.main(["--images", images, "--out", out, "--codec", "pixels"])


def test_kills_at_random_moments_leave_nothing_behind(tmp_path: Path) -> None:
    """30 SIGKILLs or more, until ten fell inside a run; a run that gets through before its kill starts from nothing."""
    images, out, whole = (str(tmp_path / name) for name in ("images", "out", "whole"))
    _pictures(tmp_path / "few", 60)
    assert pack.main(["--source", str(tmp_path / "few"), "--out", images, "--shard-samples", "5"]) == 0
    assert ranks.run(_run_encode, 1, images, whole) == [0]
    began = time.monotonic()
    assert ranks.run(_run_encode, 1, images, out) == [0]
    duration = time.monotonic() - began
    expected, moments, interrupted = _contents(Path(whole)), random.Random(0), 0
    shutil.rmtree(out)
    kills = 30 * int(os.environ.get("IMM_SOAK", "1"))
    for attempt in range(4 * kills):
        if attempt >= kills and interrupted >= 10:
            break
        ((process, _pipe),) = ranks.start(_run_encode, 1, images, out)
        time.sleep(duration * moments.uniform(0.1, 0.9))
        with contextlib.suppress(ProcessLookupError):  # it was through before
            process.kill()
        process.join()
        if os.path.exists(f"{out}/manifest.json"):
            assert _contents(Path(out)) == expected
            shutil.rmtree(out)
            duration *= 0.8  # the machine was quicker than measured: kill earlier
        elif os.path.exists(out):
            interrupted += 1
        else:
            duration *= 1.25
    assert interrupted >= 10
    assert ranks.run(_run_encode, 1, images, out) == [0]
    assert _contents(Path(out)) == expected


@pytest.mark.parametrize(
    ("flag", "env", "visible", "device"),
    [
        ("cuda", {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3"}, 1, "cuda:0"),
        ("cuda", {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3"}, 4, "cuda:3"),
        ("cuda", {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, 8, "cuda:1"),
        ("cuda", {}, 8, "cuda:0"),
        ("cuda:5", {}, 8, "cuda:5"),
        ("cpu", {}, 8, "cpu"),
    ],
    ids=["srun --gpus-per-task 1", "srun", "torchrun", "alone", "by number", "cpu"],
)
def test_a_task_encodes_on_the_gpu_the_trainer_would_take(flag, env, visible, device, monkeypatch):
    taken: list[str] = []
    monkeypatch.setattr(encode, "VAECodec", lambda folder, device: taken.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    encode.make_codec(argparse.Namespace(codec="vae", vae="x", device=flag, batch_size=1))
    assert taken == [device]


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--codec", "vae", "--vae", "x", "--device", "cuda"], ["--device cuda", "0 GPUs", "--device cpu"]),
        (["--codec", "vae", "--vae", "x", "--device", "gpu"], ["--device gpu", "cuda:1"]),
        (["--codec", "vae", "--vae", "x", "--device", "meta"], ["--device meta cannot be used here", "--device cpu"]),
        (["--codec", "pixels", "--precision", "tf32"], ["--precision tf32", "--codec vae"]),
    ],
)
def test_devices_and_precisions_that_are_not_there(arguments, phrases, tmp_path, capsys):
    assert encode.main(["--images", "x", "--out", str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert all(phrase in message for phrase in phrases), message
    assert not (tmp_path / "out").exists()


def test_shards_of_two_precisions_are_not_mixed(packed, tmp_path, capsys):
    vae, out = save_small_vae(tmp_path / "vae"), tmp_path / "out"
    arguments = ("--vae", vae, "--task-index", 0, "--num-tasks", 2)
    assert _encode(packed, out, *arguments, codec="vae") == 0
    with pytest.warns(UserWarning, match="tf32"):
        assert _encode(packed, out, *arguments, "--precision", "tf32", codec="vae") == 2
    message = capsys.readouterr().err
    assert "fp32)" in message and "tf32)" in message and "another --out" in message
    # Records from before there was a choice are of fp32.
    for path in out.glob("latents-*.json"):
        record = json.loads(path.read_text())
        del record["identity"]["precision"]
        path.write_text(json.dumps(record))
    capsys.readouterr()
    assert _encode(packed, out, "--vae", vae, codec="vae") == 0
    assert "1 shards in" in capsys.readouterr().out
