"""What methods of flow maps refuse or say of settings that are allowed and seldom meant."""

from pathlib import Path

import pytest
import torch

from imm_scale import config as configs
from imm_scale.errors import UserError
from imm_scale.methods.eulerian.steps import StepConfig, next_time
from imm_scale.methods.probability_path import OTFlowMatching

METHODS = Path(__file__).parents[3] / "configs" / "method"
TANGENT = ("meanflow", "imf", "sct", "tvm")
DIFFERENCE = ("soflow", "alpha_flow", "ct", "ect")
IMAGES = 6400  # of the runs below


def method(preset, *words):
    schedule = [f"method.schedule_images={IMAGES}"] if preset in (*DIFFERENCE, "sct") else []
    return configs.load([str(METHODS / f"{preset}.yaml")], [*schedule, *words]).config.method


@pytest.mark.parametrize("preset", [*TANGENT, *DIFFERENCE, "shortcut", "split_meanflow"])
def test_presets_as_they_are_give_no_caution(preset):
    assert method(preset).cautions(IMAGES) == []


@pytest.mark.parametrize("preset", [*TANGENT, *DIFFERENCE, "shortcut"])
def test_a_large_time_scale_is_said(preset):
    (caution,) = method(preset, "method.flow_map.time_scale=1000").cautions(IMAGES)
    assert "time_scale=1000 multiplies every derivative" in caution


def test_imm_is_published_with_a_large_time_scale():
    assert configs.load([], []).config.method.cautions(IMAGES) == []


@pytest.mark.parametrize("preset", ["soflow", "alpha_flow", "ect", "sct"])
@pytest.mark.parametrize(
    ("images", "words"),
    [(2 * IMAGES, "ends at 50% of it and stays as it is"), (IMAGES // 4, "is 25% through at its end")],
)
def test_a_schedule_of_another_length_than_the_run_is_said(preset, images, words):
    (caution,) = method(preset).cautions(images)
    assert f"schedule_images=6,400 is not the {images:,} images of this run" in caution and words in caution


def test_a_constant_step_has_no_schedule():
    assert method("ct").cautions(2 * IMAGES) == []


def test_xformers_computes_no_tangent():
    model = configs.load([], ["model.attention=xformers"]).config.model
    assert "xformers computes attention's value alone" in model.cautions(method("meanflow").takes_tangents)[0]
    assert model.cautions(method("soflow").takes_tangents) == []
    assert configs.load([], []).config.model.cautions(True) == []


@pytest.mark.parametrize(("precision", "least"), [("fp32", 1e-4), ("tf32", 5e-3), ("fp16", 5e-3), ("bf16", 2e-2)])
def test_steps_of_a_difference_are_at_least_what_the_precision_tells(precision, least):
    for preset in ("soflow", "alpha_flow"):
        assert method(preset).resolved(precision).step.min_gap == least
        larger = method(preset, "method.step.min_gap=0.1").resolved(precision)
        assert larger.step.min_gap == 0.1
        with pytest.raises(UserError, match=rf"min_gap=5e-05 is less than precision={precision} .* at least {least:g}"):
            method(preset, "method.step.min_gap=5e-5").resolved(precision)


@pytest.mark.parametrize("preset", ["ct", "ect"])
def test_steps_in_noise_levels_have_imms_least_gap(preset):
    gaps = {
        precision: method(preset).resolved(precision).step.min_gap for precision in ("fp32", "tf32", "bf16", "fp16")
    }
    assert gaps == {"fp32": 0.0, "tf32": 0.0, "bf16": 1e-4, "fp16": 1e-4}


def test_the_second_point_is_that_far_behind_but_never_past_s():
    s, t = torch.tensor([0.0, 0.30, 0.399], dtype=torch.float64), torch.full((3,), 0.4, dtype=torch.float64)
    step = StepConfig(start=0.01, end=0.01, min_gap=0.02)
    r = next_time(OTFlowMatching(), step, s, t, torch.zeros_like(t), 0.5)
    # a (t - s) is 0.004, 0.001 and 1e-5.
    torch.testing.assert_close(r, torch.tensor([0.38, 0.38, 0.399], dtype=torch.float64), rtol=1e-15, atol=0.0)
