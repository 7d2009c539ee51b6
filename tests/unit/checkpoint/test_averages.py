"""Averages of a checkpoint by their decay: today's names, those of version 0.1, and how young they are."""

from pathlib import Path

import pytest
import torch

from imm_scale import config as configs
from imm_scale.checkpoint import averages, export
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint.format import Checkpoint, Meta
from imm_scale.errors import UserError
from imm_scale.parallel.ema import older_state_name, state_name
from imm_scale.parallel.param_slice import ParamSlice

CLOSE = [0.99999861, 0.99999931]  # alike to six digits


def _checkpoint(run_dir: Path, states: list[str], *overrides: str, step: int = 1) -> Checkpoint:
    """A checkpoint of one parameter, whose state number i is full of i."""
    url = checkpoints.folder(str(run_dir), step)
    tensors = {state: [torch.full((4,), float(i))] for i, state in enumerate(states)}
    checkpoints.write_rank(url, 0, [ParamSlice("a", (4,), 0, tensors)], str(run_dir))
    text = configs.to_yaml(configs.load([], overrides).config)
    checkpoints.commit(url, Meta(step, step * 4096, step, text, "", "hash", 1, 0, {}))
    return Checkpoint(url)


def test_close_decays_are_told_apart(tmp_path):
    read = _checkpoint(tmp_path, [state_name(decay) for decay in CLOSE], f"ema.decays={CLOSE}")
    assert [float(read.weights(export.ema_state(read, decay))["a"][0]) for decay in CLOSE] == [0.0, 1.0]


def test_names_of_version_0_1_are_read(tmp_path):
    read = _checkpoint(tmp_path, ["weight", older_state_name(CLOSE[0])], f"ema.decays=[{CLOSE[0]}]")
    assert read.states == ["ema-0.999999", "weight"]
    assert export.ema_state(read, CLOSE[0]) == export.ema_state(read, None) == "ema-0.999999"
    for other in (0.999999, CLOSE[1]):
        with pytest.raises(UserError, match=rf"no moving average of decay {other}; it has 0\.99999861 \(0: raw"):
            export.ema_state(read, other)


def test_a_name_of_version_0_1_that_stands_for_two_decays_is_none_of_them(tmp_path):
    read = _checkpoint(tmp_path, ["weight", "ema-0.999999"], f"ema.decays={CLOSE}")
    assert [averages.state_of(read, decay) for decay in CLOSE] == [None, None]


@pytest.mark.parametrize(
    ("overrides", "step", "share"),
    [
        ((), 100, 0.9**100),
        (("ema.images=4096",), 100, 0.9**100),  # a batch of 4,096 by default
        (("ema.images=409600",), 100, 0.9),
        (("ema.warmup=true",), 1, 0.0),
    ],
)
def test_what_is_left_of_the_initial_weights(overrides, step, share, tmp_path):
    read = _checkpoint(tmp_path, ["ema-0.9"], "ema.decays=[0.9]", *overrides, step=step)
    assert averages.initial_share(read, 0.9) == pytest.approx(share, rel=1e-9)


def test_a_young_average_is_warned_of_and_no_other(tmp_path):
    overrides = "ema.decays=[0.9999,0.99]"
    young = _checkpoint(tmp_path, ["ema-0.9999", "ema-0.99"], overrides, step=1000)  # 0.9999^1000 = 0.905
    assert "the average of decay 0.9999 is still 90% initial weights at step 1000" in averages.warning(young, None)
    assert averages.warning(young, 0.99) == averages.warning(young, 0.0) == ""  # 0.99^1000 = 4e-5
    assert export.warnings(str(tmp_path)) == [averages.warning(young, None)]
    old = _checkpoint(tmp_path, ["ema-0.9999", "ema-0.99"], overrides, step=23_027)  # 0.9999^23027 = 0.09999
    assert averages.warning(old, None) == ""


def test_an_average_is_not_named_twice():
    with pytest.raises(UserError, match="names an average twice"):
        configs.load([], ["ema.decays=[0.99,0.9,0.99]"])
