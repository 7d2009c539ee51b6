"""What a run may not change when it goes on."""

import pytest

from imm_scale import config as configs
from imm_scale.checkpoint.identity import check_identity
from imm_scale.errors import UserError


def _check(before: list[str], now: list[str]) -> None:
    check_identity(configs.load([], now).config, "hash", configs.load([], before).config, "hash")


def test_the_end_of_a_cosine_stays_and_that_of_other_schedules_moves():
    for schedule in ("constant", "inverse_sqrt"):
        settings = [f"optimizer.schedule={schedule}"]
        _check([*settings, "train.max_steps=20"], [*settings, "train.max_steps=40"])
    settings = ["optimizer.schedule=cosine"]
    _check([*settings, "train.max_steps=20"], [*settings, "train.max_steps=20", "train.log_every=7"])
    for steps in ("40", "10"):
        with pytest.raises(UserError, match=rf"train\.max_steps: 20 -> {steps}\n.*learning rate jumps"):
            _check([*settings, "train.max_steps=20"], [*settings, f"train.max_steps={steps}"])
        _check(
            [*settings, "train.max_steps=20"],
            [*settings, f"train.max_steps={steps}", "run.allow_change=[train.max_steps]"],
        )


def test_another_precision_goes_on_with_a_method_that_has_no_gap():
    settings = ["method.name=flow_matching"]
    _check(settings, [*settings, "precision=bf16"])


@pytest.mark.parametrize("key", ["train.max_step", "optimiser", "method.kk"])
def test_a_key_that_does_not_exist_allows_nothing(key):
    with pytest.raises(UserError, match=f"run.allow_change=.*{key}"):
        configs.load([], [f"run.allow_change=[{key}]"])
    configs.load([], ["run.allow_change=[objective,model,optimizer.lr,data.manifest,method.particles,zero.extra.a]"])
