"""Moving averages on slices: closed forms, several at once, and decays that count in images."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imm_scale.parallel.ema import (
    WARMUP_WIDTH,
    ShardedEma,
    older_state_name,
    power_function_exponent,
    state_name,
)
from imm_scale.parallel.param_slice import ParamSlice


def _shards() -> list[ParamSlice]:
    torch.manual_seed(0)
    return [ParamSlice(name, (4, 6), offset, {"weight": torch.randn(12)}) for name, offset in (("a", 0), ("b", 12))]


@pytest.mark.parametrize("power", [1.0, 0.25, 3.0])
def test_n_updates_towards_one_weight_leave_decay_to_the_n_of_the_old(power):
    shards = _shards()
    before = [shard.states["weight"].clone() for shard in shards]
    ema = ShardedEma(shards, [0.9, 0.99], power)
    for shard in shards:
        shard.states["weight"].add_(1.0)
    for _ in range(8):
        ema.update()
    for decay, averages in ema.averages.items():
        for average, old in zip(averages, before, strict=True):
            # old + (1 - d^n): eight fp32 lerps of values of order 1.
            torch.testing.assert_close(average, old + 1.0 - decay ** (8 * power), rtol=1e-5, atol=1e-6)
    assert set(ema.states(1)) == {state_name(0.9), state_name(0.99)}


def test_restart_forgets_and_a_rank_without_slices_has_nothing_to_do():
    shards = _shards()
    ema = ShardedEma(shards, [0.5])
    shards[0].states["weight"].zero_()
    ema.restart()
    assert torch.equal(ema.averages[0.5][0], torch.zeros(12))
    empty = ShardedEma([], [0.5])
    empty.update()
    assert empty.averages == {0.5: []}


@given(st.lists(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True), min_size=2, max_size=2, unique=True))
def test_two_decays_never_have_one_name(decays):
    names = [state_name(decay) for decay in decays]
    assert names[0] != names[1]
    assert [float(name.removeprefix("ema-")) for name in names] == decays


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_neighbours_of_long_averages_differ(images, more):
    """Decays as they come from a length in images, whose digits are nines."""
    first, second = 1 - 1 / (1 + images), 1 - 1 / (1 + images + more)
    assert (state_name(first) == state_name(second)) == (first == second)


@given(st.integers(1, 999_999), st.integers(0, 4))
def test_decays_of_six_digits_keep_the_name_they_had(digits, zeros):
    decay = float(f"0.{'0' * zeros}{digits}")
    assert state_name(decay) == older_state_name(decay)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_power_function_are_those_of_the_paper(width, gamma):
    """Karras et al. 2023, section 3.1, name both pairs; and the width is the standard deviation it is said to be."""
    exponent = power_function_exponent(width)
    assert exponent == pytest.approx(gamma, abs=5e-3)
    # The density (gamma + 1) t^gamma on [0, 1], integrated by hand.
    mean, square = (exponent + 1) / (exponent + 2), (exponent + 1) / (exponent + 3)
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_warm_average_weighs_steps_as_the_closed_form_says(batch):
    """The product of (1 - 1/j)^p over j in (i, n] telescopes to (i/n)^p: step i weighs (i/n)^p - ((i-1)/n)^p."""
    steps, p = 40, power_function_exponent(WARMUP_WIDTH) + 1.0
    part = ParamSlice("a", (steps,), 0, {"weight": torch.ones(steps)})
    ema = ShardedEma([part], [1 - 1e-9])  # of no effect before a hundred million steps
    for i in range(steps):
        part.states["weight"].copy_(torch.eye(steps)[i])
        ema.update(batch / (batch * (i + 1)))
    i = np.arange(1, steps + 1)
    expected = (i / steps) ** p - ((i - 1) / steps) ** p
    # 40 fp32 lerps of values below 1.
    np.testing.assert_allclose(ema.averages[1 - 1e-9][0].numpy(), expected, atol=1e-6)
    assert expected.sum() == pytest.approx(1.0), "nothing is left of the initial weights"


def test_a_warm_average_becomes_the_plain_one():
    """From the step at which (1 - 1/n)^p exceeds the decay, updates are plain; p = 7.94, so n = 76 for 0.9."""
    part = ParamSlice("a", (1,), 0, {"weight": torch.ones(1)})
    ema = ShardedEma([part], [0.9])
    for n, warm in ((2, True), (75, True), (76, False), (1000, False)):
        ema.averages[0.9][0].zero_()
        ema.update(1 / n)
        decay = 1.0 - float(ema.averages[0.9][0])
        assert decay == pytest.approx((1 - 1 / n) ** 7.937204 if warm else 0.9, rel=1e-5)
