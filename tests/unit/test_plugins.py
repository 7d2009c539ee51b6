"""What is registered from outside the package goes all the way that a run goes (docs/extending.md walks through it)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from imm_scale import config as configs
from imm_scale.checkpoint.format import Checkpoint
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.shards import write_shard
from imm_scale.errors import UserError
from imm_scale.methods.mmd import grouped_mmd
from imm_scale.registry import METHODS, METRICS
from tests import ranks
from tests.conftest import losses

ROOT = Path(__file__).parents[2]
PLUGIN = "plugins=[tests.points_plugin]"
POINTS = (
    PLUGIN,
    "method.name=denoiser",
    "model.name=perceptron",
    "data.space.name=points",
    "train.global_batch_size=32",
    "train.micro_batch_size=16",
    "train.max_steps=12",
    "train.log_every=1",
    "train.checkpoint_every=4",
    "optimizer.lr=1e-2",
    "ema.decays=[0.5]",
    "wandb.mode=disabled",
    "evaluation.metrics=[frechet,{name: mean_gap, power: 2}]",
)
CENTRES = np.array([[2.0, 0.0], [-2.0, 1.0]])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """400 points around two centres, a class each."""
    folder = tmp_path_factory.mktemp("points")
    label = np.arange(400) % 2
    points = CENTRES[label] + 0.1 * np.random.default_rng(0).standard_normal((400, 2))
    keys = [f"{i:06d}" for i in range(400)]
    shard = write_shard(str(folder), "a.tar", keys, points[:, :, None, None].astype(np.float16), label.tolist())
    codec = Codec("pixels", "", 1, 2, 1, (0.0, 0.0), (1.0, 1.0))
    Manifest(codec, (2, 1, 1), 2, ("right", "left"), (shard,)).save(str(folder / "manifest.json"))
    return str(folder / "manifest.json")


@pytest.fixture(scope="module")
def runs(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of two ranks at each of three ZeRO stages."""
    folder = tmp_path_factory.mktemp("runs")
    dirs = {stage: folder / f"stage-{stage}" for stage in (0, 1, 3)}
    for stage, run_dir in dirs.items():
        ranks.train(2, *_overrides(manifest, run_dir), f"zero.stage={stage}")
    return dirs


def _overrides(manifest: str, run_dir: Path) -> list[str]:
    return [*POINTS, f"data.manifest={manifest}", f"run.dir={run_dir}"]


def _done(*argv: object) -> str:
    code, printed = ranks.run(ranks.command_and_output, 1, *map(str, argv))[0]
    assert code == 0, printed
    return printed


def test_it_trains_alike_at_every_stage(runs):
    curve = losses(runs[0])
    assert len(curve) == 12 and curve[-1] < 0.8 * curve[0]
    for stage in (1, 3):
        # Sums of two ranks' fp32 gradients in another order, over 12 steps of Adam.
        np.testing.assert_allclose(losses(runs[stage]), curve, rtol=1e-5)


def test_it_is_killed_and_goes_on_to_the_same_bits(manifest, runs, tmp_path):
    overrides = [*_overrides(manifest, tmp_path / "run"), "zero.stage=1"]
    started = ranks.start(ranks.command, 2, "train", *overrides)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 6) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process, _ in started:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    ranks.train(2, *overrides)
    assert losses(tmp_path / "run") == losses(runs[1])
    ours, theirs = (Checkpoint.latest(str(folder)) for folder in (tmp_path / "run", runs[1]))
    for name, tensor in theirs.weights("weight").items():
        assert tensor.equal(ours.weights("weight")[name]), name


def test_it_is_recomputed_in_the_backward_pass_alike(manifest, runs, tmp_path):
    overrides = [*_overrides(manifest, tmp_path / "run"), "zero.stage=0", "train.activation_checkpointing=true"]
    ranks.train(2, *overrides)
    assert losses(tmp_path / "run") == losses(runs[0])


def test_it_is_sampled_from_the_run_and_from_an_export(runs, tmp_path):
    export = tmp_path / "points.safetensors"
    _done("export", runs[1], "--out", export)
    for source, more in ((runs[1], ()), (export, (PLUGIN,))):
        out = tmp_path / f"samples-{source.name}"
        flags = ("--steps", 2, "--num", 8, "--latents", "--format", "npz,grid", "--out", out)
        _done("sample", source, *flags, *more)
    with np.load(tmp_path / f"samples-{runs[1].name}" / "steps-2.npz") as here:
        with np.load(tmp_path / f"samples-{export.name}" / "steps-2.npz") as there:
            assert np.array_equal(here["latents"], there["latents"])
        assert here["arr_0"].shape == (8, 16, 16, 1) and (here["arr_0"].sum(axis=(1, 2, 3)) == 255).all()
        assert here["latents"].shape == (8, 2)


def test_it_is_measured_by_a_metric_of_its_own_and_reported(runs, manifest, tmp_path):
    printed = _done("evaluate", runs[1], "--steps", "1,2", "--num", 64, "--repeats", 2)
    assert "mean_gap_latents" in printed
    (result,) = [
        json.loads(file.read_text())["results"][0]
        for file in (runs[1] / "evaluations").iterdir()
        if json.loads(file.read_text())["steps"] == 2
    ]
    assert result["measures"]["mean_gap_latents"]["value"] > 0
    page = tmp_path / "report.html"
    _done("report", runs[1], "--out", page)
    assert "denoiser" in page.read_text()


def test_keys_are_its_own(manifest):
    loaded = configs.load([], [*POINTS, "method.samples_per_time=4", "model.width=8"])
    assert loaded.config.method.group_size == 4
    assert "Samples of a group" in configs.explain("method.samples_per_time", loaded)
    assert configs.from_yaml(configs.to_yaml(loaded.config)) == loaded.config
    with pytest.raises(UserError, match=r"method\.k is a key of the method imm .* not of denoiser"):
        configs.load([], [*POINTS, "method.k=3"])
    with pytest.raises(UserError, match=r"mean_gap has name, power"):
        configs.load([], [*POINTS, "evaluation.metrics=[{name: mean_gap, powr: 2}]"])


def test_a_kernel_of_its_own_trains_imm(digits, tmp_path):
    small = ["model.width=16", "model.depth=1", "model.heads=2", "train.max_steps=2", "train.micro_batch_size=32"]
    overrides = [
        PLUGIN,
        *small,
        f"data.manifest={digits}",
        "train.global_batch_size=32",
        "train.log_every=1",
        "wandb.mode=disabled",
    ]
    curves = {}
    for kernel in ("multiquadric", "energy"):
        ranks.train(1, *overrides, f"method.kernel={kernel}", f"run.dir={tmp_path}/{kernel}")
        curves[kernel] = losses(tmp_path / kernel)
    assert curves["multiquadric"] != curves["energy"]


def test_a_kernel_of_its_own_is_that_of_its_formula():
    configs.load([], [PLUGIN])  # registers it
    x, y = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
    # One particle a side: 0 + 0 - 2 k(x, y), with k = 1 - sqrt(1 + (2 * 5)^2 / 2).
    mmd = grouped_mmd(x, y, torch.tensor([2.0]), "multiquadric")
    assert mmd.item() == pytest.approx(-2 * (1 - 51**0.5), rel=1e-12)
    with pytest.raises(UserError, match=r"method\.kernel=multiquadratic is unknown; .*laplace.*multiquadric"):
        configs.load([], [PLUGIN, "method.kernel=multiquadratic"])


# --- bad input ---


def _refused(folder: Path, *argv: str) -> str:
    """What `imm-scale` says in a process of its own, where nothing from outside is registered yet."""
    code, printed = ranks.typed(folder, *argv)
    assert code == 2 and "Traceback" not in printed, printed
    return printed


@pytest.mark.parametrize(
    ("source", "phrases"),
    [
        ("import no_such_library", ["broken", "no_such_library", "PYTHONPATH"]),
        (
            "from imm_scale import register_method\nfrom imm_scale.methods import FlowMatching\n"
            "@register_method('imm')\nclass Mine(FlowMatching): pass\n",
            ["broken", "method 'imm'", "imm_scale.methods.imm", "choose another"],
        ),
        (
            "from imm_scale import register_method\nfrom imm_scale.choices import MethodConfig\n"
            "@register_method('half')\nclass Half:\n    Config = MethodConfig\n    def loss(self): pass\n",
            ["broken", "method 'half'", "lacks wrap, grid, sample"],
        ),
        (
            "from imm_scale import register_metric\n@register_metric('bare')\nclass Bare: pass\n",
            ["broken", "metric 'bare'", "needs a Config", "MetricConfig"],
        ),
    ],
)
def test_a_plugin_that_is_none_is_named_with_what_it_lacks(source, phrases, tmp_path):
    (tmp_path / "broken.py").write_text(source)
    message = _refused(tmp_path, "explain", "plugins=[broken]")
    assert all(phrase in message for phrase in phrases), message


def test_what_does_not_fit_together_is_refused_before_anything_starts(manifest, digits, tmp_path):
    points = [*POINTS, f"run.dir={tmp_path}/run"]
    for overrides, phrases in (
        ([f"data.manifest={digits}"], ["points needs latents of (dimensions, 1, 1)", "(1, 8, 8)"]),
        ([f"data.manifest={manifest}", "method.name=imm"], ["takes no second time"]),
        (
            [f"data.manifest={manifest}", "method.name=flow_matching", "method.flow_map.second_time=none"],
            ["flow_matching", "sample space with a sigma_data", "Points has none"],
        ),
        ([f"data.manifest={manifest}", "model.name=dit"], ["dit works on samples of (channels, height, width)"]),
    ):
        code, output = ranks.run(ranks.command_and_output, 1, "train", *points, *overrides)[0]
        assert code == 2 and all(phrase in output for phrase in phrases), output
    assert not (tmp_path / "run").exists()


def test_weights_of_an_unknown_plugin_say_how_to_give_it(runs, tmp_path):
    _done("export", runs[1], "--out", tmp_path / "points.safetensors")
    message = _refused(tmp_path, "sample", str(tmp_path / "points.safetensors"), "--out", str(tmp_path))
    assert "method 'denoiser'" in message and "plugins=[tests.points_plugin]" in message


def test_it_is_planned_without_data_or_gpu(manifest):
    settings = [*POINTS, f"data.manifest={manifest}"]
    plan = json.loads(_done("plan", *settings, "--gpu", "h100-80gb", "--json"))
    # Two linear maps and two blocks of 16 x 16 for each point, a multiply-add counted twice; one pass, then back.
    forward = 2 * (3 * 16 + 2 * 16 * 16 + 16 * 2)
    assert plan["forward_flops"] == forward
    assert plan["step_flops"] == 3 * 32 * forward
    assert "denoiser" in _done("plan", *settings, "--gpu", "h100-80gb")


def test_it_is_swept(manifest, tmp_path):
    base = tmp_path / "points.yaml"
    base.write_text(configs.to_yaml(configs.load([], [*POINTS, f"data.manifest={manifest}"]).config))
    sweep = tmp_path / "widths.yaml"
    cell = {"evaluation.steps": [1], "evaluation.repeats": 1, "evaluation.num": 64, "train.max_steps": 4}
    document = {
        "configs": [str(base)],
        "folder": str(tmp_path / "sweep"),
        "settings": cell,
        "grid": {"model.width": [8, 16], "method.samples_per_time": [4]},
    }
    sweep.write_text(yaml.safe_dump(document))
    # Processes of their own: each has to register what the sweep's file names, and so has the one of each cell.
    command = [sys.executable, "-m", "imm_scale", "sweep", "submit", str(sweep), "--local", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr + done.stdout
    code, printed = ranks.typed(ROOT, "sweep", "collect", sweep)
    assert code == 0 and "2 of 2" in printed, printed


def test_names_that_are_taken_stay_whose_they_are():
    with pytest.raises(UserError, match="choose another"):
        METHODS.add("flow_matching", METHODS.get("imm"))
    assert METRICS.get("frechet").__module__ == "imm_scale.evaluation.metrics.built_in"
