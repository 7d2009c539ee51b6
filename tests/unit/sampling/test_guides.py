"""Autoguidance from the command line on: another average, step or run as the guide, its cost, names and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import imm_scale
from imm_scale.checkpoint import export
from imm_scale.config.schema import GuideConfig, SamplingConfig
from imm_scale.errors import UserError
from imm_scale.planner.flops import forward_multiply_adds
from imm_scale.sampling import draw, guides
from imm_scale.sampling.job import Model
from imm_scale.sampling.source import find
from tests import ranks

ARGV = ("--steps", "2", "--num", "5", "--labels", "0-4", "--latents", "--format", "npz")
FP32 = 1e-6  # nets in fp32 in batches of other sizes


@pytest.fixture(scope="module")
def smaller(trained, digits, tmp_path_factory) -> str:
    """An export of a smaller net with random weights on the same data."""
    spec, _ = export.read(trained)
    spec = replace(spec, net=replace(spec.net, width=16, depth=1))
    torch.manual_seed(1)
    weights = {key: 0.1 * torch.randn_like(v) for key, v in _net(spec).model.state_dict().items()}
    out = str(tmp_path_factory.mktemp("smaller") / "smaller.safetensors")
    export.write(spec, weights, out)
    return out


def _net(spec):
    from imm_scale import build

    return build.net(spec)


def _by_hand(ours, guide, w):
    """w f + (1 - w) g at each of two steps, of the first five samples."""
    (spec, f), (_, g) = ours, guide
    plan = draw.plan_of(SamplingConfig(labels="0-4"), spec, 2, 5, 0)
    index = torch.arange(5)
    x, label, times = spec.space.prior(0, "sample", index).double(), index % 5, draw.times_of(spec, plan)
    with torch.no_grad():
        for t, s in zip(times[:-1, None], times[1:, None], strict=True):
            x = w * f(x, s, t, label) + (1 - w) * g(x, s, t, label)
    return x.float().numpy()


def test_another_average_of_the_run(trained, tmp_path):
    argv = ("sample", trained, *ARGV, "--ema", "0.99", "--guide-ema", "0", "--guidance", "1,3", "--out", str(tmp_path))
    code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert code == 0, output
    expected = _by_hand(export.load_net(trained, 0.99), export.load_net(trained, 0.0), 3.0)
    (name,) = [path.stem for path in tmp_path.glob("steps-2-guidance-3-guide-????????.npz")]
    drawn = np.load(tmp_path / f"{name}.npz")
    np.testing.assert_allclose(drawn["latents"], expected, rtol=FP32, atol=FP32)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["guide"] == "k=11-seed0, step 2, ema 0.0" and record["function_evaluations"] == 4
    assert record["settings"]["guide"][:8] == name[-8:]
    # At w = 1 there is no guide: the name, and the identity, of samples without one.
    plain = json.loads((tmp_path / "steps-2.json").read_text())
    assert plain["guide"] is None and "guide" not in plain["settings"] and plain["function_evaluations"] == 2


def test_another_model_and_what_it_costs(trained, smaller):
    guide = guides.read(smaller)
    model = imm_scale.load(trained).guided_by(guide)
    z = imm_scale.sample(model, 2, 5, labels="0-4", guidance=2.0, latents=True).numpy()
    np.testing.assert_allclose(z, _by_hand(export.load_net(trained), export.load_net(smaller), 2.0), atol=FP32)
    assert guide.text == "smaller.safetensors"
    plan = draw.SamplingPlan(steps=3, guidance_scale=2.0, guidance_interval=(0.0, 0.5), sampler="heun")
    times = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    # Heun looks at 0.9, 0.6, 0.6, 0.3, 0.3; of these 0.3 lies in the interval.
    assert (plan.function_evaluations(times), plan.guide_forwards(times)) == (7, 2)


def test_evaluations_with_a_guide_are_their_own(trained, smaller, tmp_path):
    run = str(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations")))
    few = ("--steps", "2", "--num", "64", "--repeats", "1", "--ema", "0")
    for guide in ((), ("--guide", smaller), ("--guide-ema", "0.99")):
        argv = ("evaluate", run, *few, "--guidance", "2", *guide)
        for _ in range(2):  # the second time it is read
            code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
            assert code == 0, output
        assert ("guidance 2 by " in output) == bool(guide)
    records = [json.loads(path.read_text()) for path in Path(run, "evaluations").glob("*.json")]
    results = {record["results"][0]["guide"]: record["results"][0] for record in records}
    assert set(results) == {None, "smaller.safetensors", "run, step 2, ema 0.99"} and len(records) == 3
    assert len({result["value"] for result in results.values()}) == 3
    assert {result["function_evaluations"] for result in results.values()} == {4}
    own, other = (forward_multiply_adds(export.read(source)[0].net) for source in (trained, smaller))
    assert results[None]["flops_per_image"] == 2 * 4 * own
    assert results["smaller.safetensors"]["flops_per_image"] == 2 * (2 * own + 2 * other)


def _config(**guide):
    return SamplingConfig(guide=GuideConfig(**guide), guidance_scale=2.0, ema=guide.pop("model_ema", None))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ({"ema": 0.99}, "is the model itself, so guidance would do nothing"),
        ({"step": 2}, "is the model itself"),
        ({"step": 1}, "no committed checkpoint at step 1|step 1"),
        ({"ema": 0.5}, "holds no moving average of decay 0.5"),
        ({"source": "/nowhere"}, "/nowhere is not a run folder"),
    ],
)
def test_guides_that_are_none(guide, message, trained):
    with pytest.raises(UserError, match=message):
        Model.load(find(trained).at_newest(), _config(**guide), torch.device("cpu"))


def test_a_guide_on_other_samples_is_refused(trained, tmp_path):
    spec, weights = export.read(trained)
    for changes, message in (
        ({"sigma_data": 1.0}, "sigma_data 0.5, of the guide 1.0"),
        ({"codec": replace(spec.space.codec, std=(0.9,))}, r"std \(.*\), of the guide \(0\.9,\)"),
        ({"class_names": tuple("jihgfedcba")}, "class_names"),
    ):
        export.write(replace(spec, space=replace(spec.space, **changes)), weights, f"{tmp_path}/other.safetensors")
        with pytest.raises(UserError, match=f"draws other samples than the model: {message}"):
            imm_scale.load(trained).guided_by(guides.read(f"{tmp_path}/other.safetensors"))
    # Names that one of them lacks are no difference.
    export.write(replace(spec, space=replace(spec.space, class_names=())), weights, f"{tmp_path}/unnamed.safetensors")
    imm_scale.load(trained, ema=0.0).guided_by(guides.read(f"{tmp_path}/unnamed.safetensors"))


def test_an_export_has_no_other_step(smaller):
    with pytest.raises(UserError, match=r"sampling\.guide\.step=1.*is no run, so it has no other step"):
        Model.load(find(smaller), _config(step=1), torch.device("cpu"))


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_guide_without_guidance_is_refused(command, trained, tmp_path):
    code, output = ranks.run(ranks.command_and_output, 1, command, trained, "--guide-ema", "0")[0]
    assert code == 2 and "sampling.guide is set and guidance is off" in output


def test_a_guide_needs_no_label_drop(trained, smaller, tmp_path):
    spec, weights = export.read(trained)
    export.write(
        replace(spec, method=replace(spec.method, label_drop=0.0)), weights, f"{tmp_path}/undropped.safetensors"
    )
    model = imm_scale.load(f"{tmp_path}/undropped.safetensors")
    with pytest.raises(UserError, match=r"label_drop above 0, or a guide"):
        imm_scale.sample(model, 1, 2, guidance=2.0)
    assert imm_scale.sample(model.guided_by(guides.read(smaller)), 1, 2, guidance=2.0).shape == (2, 8, 8, 1)


def test_a_guide_is_compiled_with_its_model(trained, smaller, monkeypatch):
    compiled = []
    monkeypatch.setattr(draw, "_set_compiled", lambda net, enabled: compiled.append((net, enabled)))
    model = imm_scale.load(trained).guided_by(guides.read(smaller))
    draw.Drawer(model.net, model.spec, draw.SamplingPlan(steps=1, guidance_scale=2.0, compile=True))
    assert compiled == [(model.net.model, True), (model.net.guide.model, True)]
