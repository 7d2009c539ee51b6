"""Nets that learn jumps to the data alone are drawn by samplers that make no others."""

from pathlib import Path

import pytest

from imm_scale import config as configs
from imm_scale.errors import UserError

_METHODS = Path(__file__).parents[3] / "configs" / "method"
_SCHEDULE = "method.schedule_images=64"
_CONSISTENCY = ("method.name=consistency", "method.particles=1", "method.kernel=energy")


@pytest.mark.parametrize("preset", ["ct", "ect", "sct"])
def test_presets_restart(preset):
    config = configs.load([str(_METHODS / f"{preset}.yaml")], [_SCHEDULE]).config
    assert config.sampling.sampler == "restart"


@pytest.mark.parametrize(
    ("files", "words"), [(["ct"], []), (["ect"], [_SCHEDULE]), (["sct"], [_SCHEDULE]), ([], _CONSISTENCY)]
)
@pytest.mark.parametrize("sampler", ["pushforward", "pushforward_restart", "heun"])
@pytest.mark.parametrize("key", ["sampling.steps", "evaluation.steps"])
def test_steps_that_land_in_between_are_refused(files, words, sampler, key):
    steps = {"sampling.steps": "[1]", "evaluation.steps": "[1]"}
    files = [str(_METHODS / f"{name}.yaml") for name in files]
    words = [*words, f"sampling.sampler={sampler}"]
    one = [f"{name}={value}" for name, value in steps.items()]
    assert configs.load(files, [*words, *one]).config.sampling.sampler == sampler  # a single jump is learned
    four = [f"{name}={value}" for name, value in {**steps, key: "[1,4]"}.items()]
    with pytest.raises(UserError, match=rf"sampler={sampler} in 4 steps .* use sampling.sampler=restart, or one step"):
        configs.load(files, [*words, *four])


def test_methods_that_land_anywhere_take_any_number_of_steps():
    for preset in ("meanflow", "shortcut", "tvm"):
        configs.load([str(_METHODS / f"{preset}.yaml")], ["sampling.steps=[1,4]"])


def test_a_moment_matching_network_takes_one_step():
    one = ["method.name=gmmn", "sampling.steps=[1]", "evaluation.steps=[1]"]
    configs.load([], one)
    with pytest.raises(UserError, match=r"2 steps of a net trained by method.name=gmmn"):
        configs.load([], [*one, "sampling.sampler=restart", "sampling.steps=[2]"])
