"""Learning rates against their closed forms."""

import math

import pytest

from imm_scale import config as configs
from imm_scale.errors import UserError
from imm_scale.training.lr_schedule import learning_rate

COMMON = ["optimizer.lr=2e-3", "train.max_steps=100", "train.global_batch_size=64", "train.micro_batch_size=64"]


def _rates(images: list[int], *overrides: str) -> list[float]:
    config = configs.load([], [*COMMON, *overrides]).config
    return [learning_rate(config, n) for n in images]


def test_constant_after_a_linear_rise():
    rates = _rates([1, 500, 999, 1000, 6400], "optimizer.warmup_images=1000")
    assert rates == pytest.approx([2e-6, 1e-3, 2e-3 * 0.999, 2e-3, 2e-3], rel=1e-12)
    assert _rates([1, 6400]) == [2e-3, 2e-3]


def test_cosine_is_half_way_down_in_the_middle_and_zero_at_the_end():
    middle = 1000 + (6400 - 1000) // 2
    rates = _rates([1000, middle, 6400], "optimizer.schedule=cosine", "optimizer.warmup_images=1000")
    assert rates == pytest.approx([2e-3, 1e-3, 0.0], abs=1e-15)
    third = 1000 + (6400 - 1000) // 3
    assert _rates([third], "optimizer.schedule=cosine", "optimizer.warmup_images=1000")[0] == pytest.approx(1.5e-3)


def test_inverse_square_root_halves_at_four_times_its_reference():
    settings = ["optimizer.schedule=inverse_sqrt", "optimizer.reference_images=800", "optimizer.warmup_images=100"]
    rates = _rates([50, 100, 800, 3200, 80_000], *settings)
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3, 2e-4], rel=1e-12)
    assert rates[-1] == pytest.approx(2e-3 / math.sqrt(100))


def test_a_reference_of_no_images_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.reference_images=0 is out of range"):
        _rates([1], "optimizer.reference_images=0")
