"""The public Python surface: names and signatures, what importing it costs, and the README's lines as they stand."""

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import imm_scale
from imm_scale import config
from imm_scale.checkpoint import export
from imm_scale.config.schema import SamplingConfig
from tests import ranks
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
REGISTER = "(name: str) -> collections.abc.Callable[[~Class], ~Class]"
SURFACE = {
    "load": (
        "(source: str, ema: float | None = None, device: str | torch.device | None = None, *, vae: str | None = None)"
        " -> imm_scale.sampling.job.Model"
    ),
    "sample": (
        "(source: str | imm_scale.sampling.job.Model, steps: int = 1, num: int | None = None, *,"
        " labels: str | collections.abc.Sequence[int] = 'all', seed: int = 0, guidance: float = 1.0,"
        " guidance_interval: tuple[float, float] = (0.0, 1.0), sampler: str = 'auto', grid: str = 'auto',"
        " latents: bool = False) -> torch.Tensor"
    ),
    "evaluate": (
        "(source: str, steps: int | collections.abc.Sequence[int] | None = None, num: int | None = None, *,"
        " seed: int | None = None, repeats: int | None = None, guidance: float | None = None,"
        " reference: str | None = None, ema: float | None = None, overrides: collections.abc.Sequence[str] = (),"
        " out: str | None = None) -> dict[str, typing.Any]"
    ),
    "train": "(config: str | imm_scale.config.schema.Config, *words: str) -> Literal['completed', 'preempted']",
    "register_method": REGISTER,
    "register_backbone": REGISTER,
    "register_space": REGISTER,
    "register_metric": REGISTER,
}


def _run(code: str, cwd: str) -> str:
    """What the lines print, in a process that has them alone."""
    os.chdir(cwd)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


def test_names_and_signatures_are_kept():
    assert sorted(imm_scale.__all__) == sorted([*SURFACE, "UserError", "__version__"])
    for name, signature in SURFACE.items():
        assert str(inspect.signature(getattr(imm_scale, name))) == signature, name
        assert inspect.getdoc(getattr(imm_scale, name)), name
    assert issubclass(imm_scale.UserError, ValueError)
    assert imm_scale.__version__[0].isdigit()
    assert set(imm_scale.__all__) <= set(dir(imm_scale))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        imm_scale.trian  # noqa: B018


def test_the_defaults_of_sample_are_those_of_the_config():
    ours = {name: parameter.default for name, parameter in inspect.signature(imm_scale.sample).parameters.items()}
    schema = dataclasses.asdict(SamplingConfig())
    assert ours["guidance"] == schema["guidance_scale"]
    assert list(ours["guidance_interval"]) == schema["guidance_interval"]
    assert all(ours[name] == schema[name] for name in ("labels", "seed", "sampler", "grid"))


def test_importing_it_imports_neither_torch_nor_numpy():
    code = (
        "import sys, imm_scale; imm_scale.UserError; print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_checkout_need_not_be_installed():
    """As on a machine without network, where it is started from its folder."""
    code = """
import importlib.metadata as metadata
known = metadata.version
def version(name):
    if name == "imm-scale":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
import imm_scale
from imm_scale.checkpoint import run_folder
print(imm_scale.__version__, run_folder.versions()["imm-scale"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "unknown not installed"


def test_samples_are_those_of_the_command(trained, tmp_path):
    """Two batches of the net's calls, guidance, another seed: the same bits by both ways, and from an export."""
    flags = ("--steps", "2", "--num", "70", "--labels", "0-3", "--seed", "5", "--guidance", "1.5", "--latents")
    argv = ("sample", trained, *flags, "--format", "npz", "--out", str(tmp_path))
    assert ranks.run(ranks.command, 1, *argv) == [0]
    written = np.load(tmp_path / "steps-2-guidance-1.5.npz")
    model = imm_scale.load(trained, device="cpu")
    chosen = {"steps": 2, "num": 70, "seed": 5, "guidance": 1.5}
    assert np.array_equal(imm_scale.sample(model, labels="0-3", **chosen).numpy(), written["arr_0"])
    latents = imm_scale.sample(model, labels=[0, 1, 2, 3], latents=True, **chosen)
    assert latents.dtype == torch.float32
    assert np.array_equal(latents.numpy(), written["latents"])
    export.export(trained, f"{tmp_path}/net.safetensors", None)
    exported = imm_scale.sample(f"{tmp_path}/net.safetensors", labels="0-3", **chosen)
    assert np.array_equal(exported.numpy(), written["arr_0"])


def test_counts_of_labels_say_how_many(trained):
    model = imm_scale.load(trained)
    assert len(imm_scale.sample(model, labels="0:3,4:2")) == 5
    with pytest.raises(imm_scale.UserError, match="leave num out"):
        imm_scale.sample(model, num=5, labels="0:3,4:2")


def test_vae_latents_need_their_autoencoder(trained):
    model = imm_scale.load(trained)
    without = dataclasses.replace(model, artifacts=None)  # as `load` leaves a model of vae latents
    assert torch.equal(imm_scale.sample(without, num=3, latents=True), imm_scale.sample(model, num=3, latents=True))
    with pytest.raises(imm_scale.UserError, match="vae=FOLDER"):
        imm_scale.sample(without, num=3)


def test_raw_weights_are_other_weights(trained):
    raw, averaged = (imm_scale.load(trained, ema=ema) for ema in (0.0, None))
    assert raw.weights_id != averaged.weights_id


def test_an_evaluation_is_the_one_the_command_reads_again(trained, digits, tmp_path):
    assert ranks.run(ranks.command, 1, "export", trained, "--out", f"{tmp_path}/net.safetensors") == [0]
    given = f"{tmp_path}/net.safetensors"
    overrides = [f"data.manifest={digits}"]
    evaluation = imm_scale.evaluate(given, 1, 64, repeats=2, overrides=overrides, out=f"{tmp_path}/ours")
    assert [result["steps"] for result in evaluation["results"]] == [1]
    assert list(evaluation["results"][0]["seeds"]) == [0, 1]
    argv = (
        "evaluate",
        given,
        "--steps",
        "1",
        "--num",
        "64",
        "--repeats",
        "2",
        "--out",
        f"{tmp_path}/theirs",
        *overrides,
    )
    assert ranks.run(ranks.command, 1, *argv) == [0]
    ours, theirs = (list((tmp_path / name).glob("*.json")) for name in ("ours", "theirs"))
    assert [path.name for path in ours] == [path.name for path in theirs], "the same settings"
    values = [json.loads(path.read_text())["results"][0]["values"] for path in (*ours, *theirs)]
    assert values[0] == values[1] == list(evaluation["results"][0]["values"])
    assert imm_scale.evaluate(given, [1], 64, repeats=2, overrides=overrides, out=f"{tmp_path}/ours") == json.loads(
        ours[0].read_text()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: imm_scale.load("nowhere"), "nowhere is not a run folder"),
        (lambda run: imm_scale.load(run, ema=0.5), "no moving average of decay 0.5; it has 0.99"),
        (lambda run: imm_scale.sample(run, steps=0), "steps=0 must be at least 1"),
        (lambda run: imm_scale.sample(run, labels=[3, 10]), "the model knows classes 0 to 9"),
        (lambda run: imm_scale.sample(run, sampler="euler"), "sampling.sampler=euler does not draw"),
        (lambda run: imm_scale.evaluate("nowhere"), "nowhere is not a run folder"),
        (lambda run: imm_scale.evaluate(run, overrides=["evaluation.nmu=5"]), "evaluation.num"),
        (lambda run: imm_scale.train("dmeo"), "did you mean demo"),
    ],
)
def test_a_mistake_is_named(trained, call, message):
    with pytest.raises(imm_scale.UserError, match=re.escape(message)):
        call(trained)


def test_out_is_refused_where_it_does_nothing(trained):
    with pytest.raises(imm_scale.UserError, match="leave out away"):
        imm_scale.evaluate(trained, 1, out="elsewhere")


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_in_the_same_processes(tiny, tmp_path, size):
    """By words, then by a config that asks for one step more, with an evaluation before and after."""
    code = f"""
import imm_scale
from imm_scale import config
args = {tiny}
print(imm_scale.train(args[0], *args[1:], "train.max_steps=1"))
first = imm_scale.evaluate("run", 1, 64)["results"]
print(imm_scale.train(config.load([], args).config, "train.max_steps=2"))
print(imm_scale.evaluate("run", 1, 64)["results"][0]["value"] == first[0]["value"])
"""
    lines = [text.split() for text in ranks.run(_run, size, code, str(tmp_path))]
    assert [[fields[i] for i in (0, -2, -1)] for fields in lines] == [["completed", "completed", "False"]] * size
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records] == [1, 2]


def _readme() -> str:
    text = (ROOT / "README.md").read_text()
    return text[text.index("## From Python") :].split("```python\n")[1].split("```")[0]


def test_the_readme_lines_run(digits, tmp_path):
    """As they stand, where configs/demo.yaml is the demo's on a smaller net and a few steps."""
    lines = _readme()
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10
    (tmp_path / "configs").mkdir()
    small = [word for word in TINY if "ema" not in word]
    more = [f"data.manifest={digits}", "train.max_steps=2", "evaluation.num=64"]
    demo = config.load([str(ROOT / "configs" / "demo.yaml")], [*small, *more]).config
    (tmp_path / "configs" / "demo.yaml").write_text(config.to_yaml(demo))
    code = lines + "\nprint(images.shape, images.dtype, latents.shape, latents.dtype)"
    (printed,) = ranks.run(_run, 1, code, str(tmp_path))
    *results, shapes = printed.strip().splitlines()[-5:]
    assert [line.split()[:2] for line in results] == [[str(steps), "frechet_latents"] for steps in (1, 2, 4, 8)]
    assert shapes == "torch.Size([100, 8, 8, 1]) torch.uint8 torch.Size([100, 1, 8, 8]) torch.float32"
