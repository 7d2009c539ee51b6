"""What `--dry-run` prints is what DeepSpeed gets: our keys, the bounds that follow from the net, and zero.extra."""

import pytest
import yaml

from imm_scale import config as configs
from imm_scale.errors import UserError
from imm_scale.parallel.zero_config import check_settings
from tests import ranks, small_tokens
from tests.conftest import ANY_METHOD, TINY


def _settings(capsys, digits: str, *argv: str) -> dict:
    assert ranks.command("train", *TINY, f"data.manifest={digits}", "--dry-run", "--world-size", "2", *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    start, stop = lines.index("deepspeed:"), next(i for i, line in enumerate(lines) if line.startswith("global batch"))
    return yaml.safe_load("\n".join(lines[start:stop]))["deepspeed"]


def test_dry_run_prints_deepspeeds_settings(capsys, digits):
    extra = ["zero.extra.zero_optimization.reduce_bucket_size=1000000", "zero.extra.wall_clock_breakdown=true"]
    settings = _settings(capsys, digits, "zero.stage=3", "precision=bf16", "train.micro_batch_size=16", *extra)
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (16, 2)
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["gradient_clipping"] == 0.0
    zero = settings["zero_optimization"]
    # A block of width w: 4 w^2 of attention, 8 w^2 of the MLP, 6 w^2 of modulation, and biases.
    block = 18 * 32**2 + (4 + 5 + 6) * 32
    assert zero["stage3_max_reuse_distance"] == block and zero["stage3_max_live_parameters"] == 2 * block
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 1000000 and settings["wall_clock_breakdown"] is True


def test_samples_without_a_mirror_image_are_known_before_a_run(capsys, tmp_path):
    url = small_tokens.binary_digits(tmp_path, 0, 64)
    words = ("method.name=masked", "data.flip=true", *small_tokens.NET)
    assert ranks.command("train", *words, f"data.manifest={url}", "--dry-run") == 2
    assert "data.flip=true: sequences of tokens have no mirror image" in capsys.readouterr().err


def test_dry_run_says_what_is_seldom_meant(capsys, digits):
    argv = ("method.name=eulerian", "method.flow_map.second_time=t_minus_s", "method.flow_map.time_scale=1000")
    assert ranks.command("train", *ANY_METHOD, f"data.manifest={digits}", "--dry-run", *argv) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert "time_scale=1000 multiplies every derivative by time" in note


def test_clipping_is_off_unless_asked_for(capsys, digits):
    assert _settings(capsys, digits, "zero.stage=2")["gradient_clipping"] == 0.0  # DeepSpeed's default is 1
    assert _settings(capsys, digits, "zero.stage=2", "train.grad_clip=0.5")["gradient_clipping"] == 0.5


def test_offload_goes_where_it_is_told(capsys, digits):
    zero = _settings(capsys, digits, "zero.stage=3", "zero.offload=parameters")["zero_optimization"]
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu"}
    zero = _settings(capsys, digits, "zero.stage=1", "zero.offload=optimizer")["zero_optimization"]
    assert "offload_param" not in zero and zero["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("optimizer.type", "optimizer"),
        ("bf16.enabled", "precision"),
        ("zero_optimization.offload_param.device", "zero.offload"),
        ("communication_data_type", "zero.reduce_precision"),
    ],
)
def test_extra_settings_may_not_contradict_the_config(key, instead):
    config = configs.load([], [f"zero.extra.{key}=x"]).config
    with pytest.raises(UserError, match=instead):
        check_settings(config)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [(["precision=fp32"], "precision=fp32"), (["precision=bf16", "zero.stage=0"], "zero.stage=0")],
)
def test_16_bit_sums_need_16_bit_gradients_and_a_stage_that_makes_them(overrides, named):
    config = configs.load([], ["zero.reduce_precision=autocast", *overrides]).config
    with pytest.raises(UserError, match=named):
        check_settings(config)


def test_averages_may_count_in_images():
    assert configs.load([], ["train.global_batch_size=64"]).config.ema_power == 1.0
    assert configs.load([], ["train.global_batch_size=64", "ema.images=4096"]).config.ema_power == 1 / 64
