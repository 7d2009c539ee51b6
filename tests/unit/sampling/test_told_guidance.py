"""Samples of a net that is told its guidance, from the command line on: one pass a step, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale import build, sampling
from imm_scale.checkpoint import export
from imm_scale.config.schema import SamplingConfig
from imm_scale.data.manifest import Codec
from imm_scale.data.spaces import Latents
from imm_scale.errors import UserError
from imm_scale.methods.eulerian import EulerianConfig
from imm_scale.methods.eulerian.guidance import TrainingGuidanceConfig
from imm_scale.methods.flow_map import FlowMapConfig
from imm_scale.models.dit import DiTConfig
from imm_scale.planner.flops import forward_multiply_adds
from imm_scale.sampling import draw, guides
from imm_scale.sampling.guides import Guide
from tests import ranks
from tests.conftest import ANY_METHOD

RECIPE = str(Path(__file__).parents[3] / "configs" / "method" / "imf.yaml")
METHOD = EulerianConfig(
    flow_map=FlowMapConfig(second_time="t_minus_s", time_scale=1.0), guidance=TrainingGuidanceConfig(kind="condition")
).resolved("fp32")
SPEC = build.ModelSpec(
    METHOD,
    DiTConfig(16, 1, 2, 2, channels=1, height=4, image_width=4, num_classes=5, guidance=True),
    Latents(0.5, (1, 4, 4), Codec("pixels", "", 4, 1, 1, (0.0,), (1.0,)), 5, ()),
)
PLAIN = replace(SPEC, method=replace(METHOD, guidance=TrainingGuidanceConfig()), net=replace(SPEC.net, guidance=False))
CHOSEN = SamplingConfig(guidance_scale=7.5, guidance_interval=[0.4, 0.65])


def _net(spec):
    net, generator = build.net(spec), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net.eval().requires_grad_(False)


def test_the_spec_that_travels_says_that_it_is_told():
    again = build.ModelSpec.from_json(SPEC.to_json())
    assert again == SPEC and again.net.guidance and again.method.tells_guidance
    fields = json.loads(PLAIN.to_json())
    del fields["backbone"]["config"]["guidance"], fields["method"]["config"]["guidance"]["kind"]  # as written before
    assert build.ModelSpec.from_json(json.dumps(fields)) == PLAIN


def test_samples_are_the_loop_by_hand_at_one_evaluation_a_step():
    net = _net(SPEC)
    plan = draw.plan_of(CHOSEN, SPEC, 4, 6, 0)
    x, label = SPEC.space.prior(0, "sample", torch.arange(6)).double(), torch.arange(6) % 5
    told = torch.tensor([[1 - 1 / 7.5, 0.4, 0.65]], dtype=torch.float64)
    for t, s in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        at = torch.tensor([t], dtype=torch.float64)
        scaled = (x / (0.5 * np.hypot(1 - t, t))).float()
        x = x - (t - s) * 0.5 * net.model(scaled, at, at - s, label, None, told).double()
    (batch,) = sampling.sample(net, SPEC, plan)
    torch.testing.assert_close(batch[2], x, rtol=1e-5, atol=1e-5)  # fp32 in batches of other sizes
    times = draw.times_of(SPEC, plan)
    assert (plan.function_evaluations(times), plan.guide_forwards(times)) == (4, 0)
    heun = replace(plan, sampler="heun")
    assert heun.function_evaluations(times) == 7
    plain = draw.plan_of(CHOSEN, PLAIN, 4, 6, 0)
    assert plain.function_evaluations(times) == 5, "0.5 is in the interval"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 0.5}, r"sampling\.guidance_scale=0\.5"),
        ({"guidance_scale": 9.0}, r"method\.guidance\.largest=8"),
        ({"guidance_interval": [0.6, 0.9]}, r"sampling\.guidance_interval"),
    ],
)
def test_guidance_it_was_never_told_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        draw.plan_of(replace(CHOSEN, **changes), SPEC, 1, 6, 0)
    draw.plan_of(replace(CHOSEN, **changes), PLAIN, 1, 6, 0)


@pytest.mark.parametrize(("model", "guide"), [(SPEC, PLAIN), (PLAIN, SPEC)])
def test_a_guide_beside_it_is_refused(model, guide):
    with pytest.raises(UserError, match=r"is told its guidance.*leave it out"):
        guides.put(_net(model), model, "a", Guide(guide, _net(guide), "b", "another"))


def test_a_run_is_resumed_exported_sampled_and_evaluated(digits, tmp_path):
    run, words = str(tmp_path / "run"), [*ANY_METHOD, "method.guidance.kind=condition", f"data.manifest={digits}"]
    for steps in (2, 3):
        ranks.train(1, RECIPE, *words, f"run.dir={run}", f"train.max_steps={steps}")
    code, output = ranks.run(
        ranks.command_and_output, 1, "train", RECIPE, *words, f"run.dir={run}", "method.guidance.largest=4"
    )[0]
    assert code == 2 and "method.guidance.largest: 8.0 -> 4.0" in output
    export.export(run, str(tmp_path / "net.safetensors"), ema=0.0)
    drawn = ("--num", "64", "--steps", "1,2", "--guidance", "1,7.5", "sampling.guidance_interval=[0.4,0.65]")
    for source in (run, str(tmp_path / "net.safetensors")):
        argv = ("sample", source, *drawn, "--format", "npz", "--out", str(tmp_path / "samples"))
        code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
        assert code == 0, output
    record = json.loads((tmp_path / "samples" / "steps-2-guidance-7.5.json").read_text())
    assert record["function_evaluations"] == 2
    code, output = ranks.run(ranks.command_and_output, 1, "evaluate", run, *drawn, "--repeats", "1")[0]
    assert code == 0, output
    results = [json.loads(path.read_text())["results"][0] for path in Path(run, "evaluations").glob("*.json")]
    assert {(one["steps"], one["guidance_scale"]) for one in results} == {(1, 1.0), (1, 7.5), (2, 1.0), (2, 7.5)}
    forward = 2 * forward_multiply_adds(export.read(run)[0].net)
    assert all(one["function_evaluations"] == one["steps"] for one in results)
    assert all(one["flops_per_image"] == one["steps"] * forward for one in results)
