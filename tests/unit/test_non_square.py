"""Images of 16 x 24 pixels from a folder to samples, numbers and exports, through an autoencoder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imm_scale
from data_tools import encode, images, pack, stats, verify
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import export
from imm_scale.data.manifest import Manifest
from imm_scale.planner import flops
from tests import ranks
from tests.conftest import TINY
from tests.small_vae import save_small_vae

HEIGHT, WIDTH = 16, 24


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, vae: str) -> str:
    """80 pictures of several shapes, of two classes, cropped to 16 x 24 and encoded to 8 x 12."""
    folder = tmp_path_factory.mktemp("wide")
    generator = np.random.default_rng(0)
    for i in range(80):
        path = folder / "source" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize([(24, 16), (48, 32), (30, 40)][i % 3], Image.Resampling.BICUBIC).save(path)
    source = ["--source", str(folder / "source"), "--out", str(folder / "images"), "--size", "16x24"]
    assert pack.main(source) == 0
    assert pack.main(source) == 0  # the size of a pack that stands there is compared too
    arguments = ["--images", str(folder / "images"), "--out", str(folder / "latents"), "--codec", "vae", "--vae", vae]
    assert encode.main(arguments) == 0
    assert encode.main(arguments) == 0
    return str(folder / "latents" / "manifest.json")


def test_a_crop_of_another_shape_is_the_centre() -> None:
    # A ramp of one grey level a pixel: the middle of what is left is the middle of what was there.
    for width, height in ((24, 16), (48, 32), (200, 100), (100, 200), (25, 100)):
        ramp = np.linspace(0, 255, width)[None, :].repeat(height, axis=0)
        cropped = np.array(images.center_crop(Image.fromarray(ramp.astype(np.uint8)), (16, 24))).astype(float)
        assert cropped.shape == (16, 24)
        assert abs(cropped[:, 11:13].mean() - 127) < 4  # rounded down, and resized by a cubic filter
        shown = min(1.0, (24 / 16) / (width / height))  # of the width
        slope = (cropped[:, 16].mean() - cropped[:, 7].mean()) / 9 * 24
        assert slope == pytest.approx(255 * shown, rel=0.15)


def test_the_manifest_says_both_sides(manifest: str, vae: str, tmp_path: Path) -> None:
    stored = Manifest.load(manifest)
    assert stored.latent_shape == (4, 8, 12) and stored.format_version == 2
    assert stored.codec.image_shape == (HEIGHT, WIDTH) and stored.codec.image_width == WIDTH
    assert verify.main([manifest, "--workers", "1"]) == 0
    page = tmp_path / "page.png"
    assert stats.main([manifest, "--vae", vae, "--page", str(page), "--columns", "3"]) == 0
    assert Image.open(page).size == (3 * WIDTH, 10 * HEIGHT)


@pytest.fixture(scope="module")
def run_dir(manifest: str, vae: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = str(tmp_path_factory.mktemp("run") / "wide")
    settings = [f"data.manifest={manifest}", f"run.dir={run_dir}", f"sampling.vae={vae}", "train.max_steps=2"]
    ranks.train(1, *TINY, *settings)
    return run_dir


def test_samples_of_a_run_and_of_its_exports_are_as_wide(run_dir: str, vae: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--num", "6", "--steps", "1", "--labels", "all", "--latents"]
    assert ranks.run(ranks.command, 1, "sample", run_dir, *out, "--format", "grid,folder,npz") == [0]
    written = np.load(tmp_path / "steps-1.npz")
    assert written["arr_0"].shape == (6, HEIGHT, WIDTH, 3) and written["latents"].shape == (6, 4, 8, 12)
    assert {Image.open(path).size for path in (tmp_path / "steps-1").glob("*.png")} == {(WIDTH, HEIGHT)}
    # Two classes in rows of three: cells 1 apart, enlarged to 32 pixels on the lesser side.
    assert Image.open(tmp_path / "steps-1.png").size == (2 * (3 * WIDTH + 2), 2 * (2 * HEIGHT + 1))
    for form, name in (("safetensors", "net.safetensors"), ("diffusers", "folder")):
        export.export(run_dir, str(tmp_path / name), None, format=form)
        again = imm_scale.sample(imm_scale.load(str(tmp_path / name), vae=vae), steps=1, num=6, labels="all")
        assert np.array_equal(again.numpy(), written["arr_0"])


def test_a_spec_of_another_shape_comes_back(run_dir: str) -> None:
    spec, _ = export.read(run_dir)
    assert spec.space.image_shape == (HEIGHT, WIDTH)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert (spec.net.height, spec.net.image_width, spec.net.tokens) == (8, 12, 24)
    # The planner counts what a transposed net costs, and 24 / 16 of a square one's linear layers at least.
    transposed = type(spec.net)(**{**vars(spec.net), "height": 12, "image_width": 8})
    square = type(spec.net)(**{**vars(spec.net), "image_width": 8})
    assert flops.forward_multiply_adds(spec.net) == flops.forward_multiply_adds(transposed)
    assert 1.3 < flops.forward_multiply_adds(spec.net) / flops.forward_multiply_adds(square) < 24**2 / 16**2


def _commands(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit codes and output of several commands of one process, for starting one takes longer than they do."""
    return [ranks.command_and_output(*argv) for argv in commands]


def test_it_is_measured_shown_and_reported(run_dir: str, tmp_path: Path) -> None:
    turned, page = tmp_path / "turned", tmp_path / "report.html"
    turned.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (WIDTH, HEIGHT, 3), dtype=np.uint8)
        Image.fromarray(noise).save(turned / f"{i}.png")
    extractor = ["evaluation.extractor.kind=pixels", "evaluation.metrics=[frechet]"]
    evaluate = ["evaluate", run_dir, "--num", "40", "--steps", "1", "evaluation.repeats=1", *extractor]
    done = ranks.run(
        _commands,
        1,
        evaluate,
        ["evaluate", run_dir, "sampling.steps=[1]", "--gallery", extractor[0]],
        ["report", run_dir, "--out", str(page)],
        ["evaluate", "--make-reference", str(turned), "--out", f"{tmp_path}/turned.npz", extractor[0]],
        [*evaluate, f"evaluation.reference={tmp_path}/turned.npz"],
    )[0]
    assert [code for code, _ in done] == [0, 0, 0, 0, 2], done
    assert "24x16 pixels, those of the reference 16x24" in done[-1][1]
    record = next(Path(run_dir, "evaluations").glob("*.json")).read_text()
    assert "frechet_pixels" in record and page.stat().st_size > 1000
    strip = Image.open(next(Path(run_dir, "gallery").glob("same_noise-*.png")))
    assert strip.height % HEIGHT == 0 and strip.width > strip.height
    with np.load(next(Path(run_dir, "references").glob("*.npz"))) as reference:
        assert json.loads(str(reference["imm_scale"]))["source"]["image_size"] == [HEIGHT, WIDTH]


def test_pixels_need_no_squares_either(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "source" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 10, 3), dtype=np.uint8)).save(path)
    assert pack.main(["--source", str(tmp_path / "source"), "--out", str(tmp_path / "images")]) == 0
    out = ["--out", str(tmp_path / "latents"), "--codec", "pixels"]
    assert encode.main(["--images", str(tmp_path / "images"), *out]) == 0
    assert Manifest.load(str(tmp_path / "latents/manifest.json")).latent_shape == (3, 6, 10)


@pytest.mark.parametrize("size", ["16x", "x24", "16x24x3", "0x24", "-4x8", "16 24", "axb", "²x8"])
def test_sizes_that_are_none_are_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pack.main(["--source", "digits", "--out", "nowhere", f"--size={size}"])
    assert ended.value.code == 2 and "neither N, as in 256, nor HxW" in capsys.readouterr().err
