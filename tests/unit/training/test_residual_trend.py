"""The warning that a flow map's residual grows while flow matching stands still."""

import math

import pytest

from imm_scale.training.residual_trend import STEPS, ResidualTrend

EVERY = 50  # steps between records


def record(step, apart, equal, **more):
    return {"step": step, "residual_gap_0": equal, "residual_gap_0_33": apart, "residual_gap_67_100": apart, **more}


def warnings(apart, equal, steps, every=EVERY):
    """(step, warning) of records whose parts are functions of the step."""
    trend = ResidualTrend()
    heard = ((step, trend.warning(record(step, apart(step), equal(step)))) for step in range(every, steps + 1, every))
    return [(step, text) for step, text in heard if text]


def growing(step):
    return math.exp(step / 2000)  # by e^(3/8) = 1.45 from the first quarter of 1000 steps to the last


def flat(step):
    return 2.0 + 0.05 * math.sin(step)


def test_growth_beside_a_flat_part_is_warned_of_after_a_thousand_steps_and_again_after_as_many():
    heard = warnings(growing, flat, 3 * STEPS)
    assert [step for step, _ in heard] == [1050, 2100]
    assert "step 1050: the residual of samples with s before t has grown 1.45-fold over 1000 steps" in heard[0][1]


@pytest.mark.parametrize(
    ("apart", "equal"),
    [
        (growing, growing),  # everything grows: the data, or the learning rate
        (lambda step: math.exp(-step / 2000), flat),
        (lambda step: 1.0 + 0.3 * math.sin(step / 100), flat),  # comes and goes
        (lambda step: math.exp(step / 10_000), flat),  # 8 % in a thousand steps
        (lambda step: math.nan, flat),
    ],
)
def test_other_trends_are_not(apart, equal):
    assert warnings(apart, equal, 3 * STEPS) == []


def test_too_few_records_say_nothing():
    assert warnings(growing, flat, 5 * STEPS, every=200) == []


def test_records_of_methods_without_a_residual_say_nothing():
    trend = ResidualTrend()
    assert all(trend.warning({"step": step, "loss": growing(step)}) is None for step in range(50, 3000, 50))


def test_terminal_velocity_matching_has_its_velocity_error_in_place_of_s_equal_to_t():
    trend = ResidualTrend()
    heard = []
    for step in range(EVERY, 1100, EVERY):
        parts = {"residual_gap_0_33": growing(step), "residual_gap_0": None, "velocity_error_gap_33_67": flat(step)}
        heard.append(trend.warning({"step": step, **parts}))
    assert sum(text is not None for text in heard) == 1
