"""Logit-normal times, of flow matching and of IMM, against scipy's normal distribution."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from imm_scale.errors import UserError
from imm_scale.methods.special_cases import ConsistencyConfig, ConsistencyTraining
from tests.unit.methods.small import flow_map_of, flow_matching, gmmn, imm

N = 20_000
BOUND = 1.95 / math.sqrt(N)  # Kolmogorov and Smirnov at p = 1e-3
RANGE = {"t_min": 0.1, "t_max": 0.9}


def consistency(**settings):
    config = ConsistencyConfig(particles=1, kernel="energy", **settings)
    return ConsistencyTraining(config.resolved("fp32"))


def times(make, **settings) -> tuple[np.ndarray, np.ndarray]:
    """t, and s where there is one, of N groups."""
    method, group = make(**RANGE, **settings), torch.arange(N)
    if make is flow_matching:
        t = method.draw_times(group, 0)
        return t.numpy(), t.numpy()
    s, _, t = method.draw_times(flow_map_of(), group, 0)
    return t.numpy(), s.numpy()


@pytest.mark.parametrize("make", [flow_matching, imm, consistency])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-0.6, 0.5)])
def test_the_logit_of_t_in_its_range_is_normal(make, mean, deviation):
    t, _ = times(make, logit_normal=[mean, deviation])
    place = (t - 0.1) / 0.8
    quantile = stats.norm.cdf((np.log(place / (1 - place)) - mean) / deviation)
    assert stats.kstest(quantile, "uniform").statistic < BOUND


def test_s_of_imm_stays_uniform_below_t():
    t, s = times(imm, logit_normal=[0.0, 1.0])
    assert stats.kstest((s - 0.1) / (t - 0.1), "uniform").statistic < BOUND
    assert abs(stats.spearmanr((s - 0.1) / (t - 0.1), t).statistic) < 4 / math.sqrt(N)  # standard error 1 / sqrt(N)


def test_times_stay_finite_and_within_their_range_at_both_ends_of_the_uniforms():
    place = flow_matching(logit_normal=[0.0, 1.0]).config.place
    t = place(torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64))
    assert 0.0 < t[0] < 1e-3
    assert t[1] == 0.5
    assert 1.0 - 1e-3 < t[2] < 1.0


@pytest.mark.parametrize("make", [flow_matching, imm, consistency])
@pytest.mark.parametrize("numbers", [[0.0], [0.0, 1.0, 2.0], [0.0, 0.0], [0.0, -1.0], [math.nan, 1.0], [0.0, math.inf]])
def test_a_mean_and_a_deviation_above_0_are_wanted(make, numbers):
    with pytest.raises(UserError, match=r"method\.logit_normal=.* must be a mean and a standard deviation"):
        make(logit_normal=numbers).config.validate()


def test_a_method_with_one_t_has_no_use_for_it():
    gmmn().config.validate()
    with pytest.raises(UserError, match="leave it at"):
        gmmn(logit_normal=[0.0, 1.0]).config.validate()
